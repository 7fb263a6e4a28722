"""Plans for a trace, the model of each request, improved by one who knows the future."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from besteffort.simulator.compiled import compiled, compiled_apart
from besteffort.simulator.events import advance, route
from besteffort.simulator.records import END_MS, NONE, Ints, State
from besteffort.simulator.stakes import Stakes, worth_of
from besteffort.simulator.walks import by_thresholds, go_back


class Search(NamedTuple):
    """A plan for one fleet that knows its future, and what is needed to improve it."""

    state: State  # of one fleet; all but the tables, `requests` and `completed` are parts of `words`
    words: Ints  # (W,) the memory of `state`
    saved: Ints  # (W,) what it was before a trial
    plan: Ints  # (K,) the model of each request
    trial: Ints  # (K,) of the plan under trial
    scored_until: Ints  # (K,) a change at a request is judged by the requests before this one
    row: Ints  # (K,) into `rows`
    rows: NDArray[np.float64]  # (R, M - 1) thresholds, by which a trial may go on
    stakes: Stakes


# Among plans of equal worth the quicker is better: it leaves more room to what comes after.
PER_DEADLINE = 1e-6
# What a trial does beside its first request: another model for one later request, for all up to it that
# the plan treats like the first, or for all up to it what thresholds say.
ONE_MORE, ALIKE, BY_THRESHOLDS = 0, 1, 2
TOLERANCE = 1e-9


@compiled_apart
def _try(search: Search, start: int, model: int, kind: int, end: int, more: float) -> Any:
    """Send `start` to `model` and do as `kind` says up to `end`; see what becomes of it.

    `more` is the model of `end`, or what the thresholds are multiplied by. Returns the worth of the
    requests that are judged, how many of them got less than the best there is, and how far `trial` is
    filled.
    """
    state, stakes = search.state, search.stakes
    num_requests, until = len(search.plan), search.scored_until[start]
    seen = state.num_completed[0]
    num_missing = until - seen
    total, num_imperfect, request = 0.0, 0, start
    while True:
        advance(state, state.requests[request]["arrived_at_ms"] if request < num_requests else END_MS)
        while seen < state.num_completed[0]:
            done = state.completed[seen]
            seen += 1
            if done < until:
                num_missing -= 1
                total += worth_of(state, stakes, done, PER_DEADLINE)
                best = stakes.value[done].max()
                num_imperfect += worth_of(state, stakes, done, 0.0) < best - TOLERANCE
        if num_missing == 0 or request == num_requests:
            return total, num_imperfect, request
        if request == start:
            chosen = model
        elif kind == BY_THRESHOLDS and request < end:
            chosen = by_thresholds(state, search.rows[search.row[request]], more)
        elif kind == ONE_MORE and request == end:
            chosen = int(more)
        elif kind == ALIKE and request < end and search.plan[request] == search.plan[start]:
            chosen = model
        else:
            chosen = search.plan[request]
        search.trial[request] = chosen
        route(state, request, chosen)
        request += 1


@compiled
def improve(search: Search, begin: int, draws: NDArray[np.float64]) -> int:
    """Go over the requests from `begin` on, one for each row of `draws`, and change the plan for the better.

    `draws`, shape `(N, P, 4)`, are even in [0, 1) and say what the `P` trials of each request are.
    Returns how many changes were made. The state stands before the arrival of `begin`, and then before
    the one after the last.
    """
    state, num_models, num_changes = search.state, len(search.state.models), 0
    for nth in range(len(draws)):
        start = begin + nth
        advance(state, state.requests[start]["arrived_at_ms"])
        search.saved[:] = search.words
        best, num_imperfect, _ = _try(search, start, search.plan[start], ONE_MORE, NONE, 0.0)
        go_back(state, search.words, search.saved)
        num_trials = draws.shape[1] if num_imperfect > 0 else 0
        for trial in range(num_trials):
            draw = draws[nth, trial]
            model, kind, end, more = int(draw[0] * num_models), ONE_MORE, NONE, draw[3]
            ahead = int(draw[2] * draw[2] * (search.scored_until[start] - start))
            if trial < num_models:  # every model once: another one for this request alone
                model = trial
            elif draw[1] < 0.3:
                kind, end, more = BY_THRESHOLDS, start + 2 * ahead, 4.0 ** (2.0 * more - 1.5)
            elif draw[1] < 0.5:
                kind, end = ALIKE, start + ahead
            else:
                end = min(start + 1 + ahead, len(search.plan) - 1)
                if draw[1] < 0.75:
                    more *= num_models
                else:  # the two change places
                    model, more = search.plan[end], float(search.plan[start])
            if kind != BY_THRESHOLDS and model == search.plan[start]:
                continue
            total, _, reached = _try(search, start, model, kind, end, more)
            go_back(state, search.words, search.saved)
            if total > best + TOLERANCE:
                best = total
                search.plan[start:reached] = search.trial[start:reached]
                num_changes += 1
        route(state, start, search.plan[start])
    return num_changes
