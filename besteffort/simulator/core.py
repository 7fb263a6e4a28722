"""The event loop in numba: arrays of records, no Python objects, O(log) per event.

All compiled code lives in this one file, because numba's cache notices a change only in the file
of the function that Python calls.

Time is kept per device, in milliseconds. A model on a device (a *site*) has a clock of *work*, in
milliseconds as if it had the device to itself, which runs slower while other models are busy there;
so a change of the busy set touches M clocks, and never the requests.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

_Function = TypeVar("_Function", bound=Callable[..., Any])
Records = NDArray[np.void]
Ints = NDArray[np.int64]

NONE = -1
MAX_BATCHED_TOKENS = 2048  # of prompts that one step reads: vLLM's default, whatever the model
END_MS = 1e300  # after every event there is, and before the infinity of an idle device


def compiled(function: _Function) -> _Function:
    """`njit` that keeps the function's type; inlined, since a call counts references to every array."""
    return cast(_Function, njit(cache=True, error_model="numpy", forceinline=True)(function))


REQUEST = np.dtype(
    [
        ("arrived_at_ms", "f8"),
        ("num_prompt_tokens", "i8"),
        ("num_output_tokens", "i8"),
        ("replica", "i8"),  # NONE before it is routed
        ("next_waiting", "i8"),  # behind it in the queue of its replica
        ("first_token_at_ms", "f8"),
        ("last_token_at_ms", "f8"),
    ],
    align=True,
)
MODEL = np.dtype(
    [
        ("in_flight", "i8"),
        ("first_replica", "i8"),
        ("num_replicas", "i8"),
        ("max_num_seqs", "i8"),
        ("prefill_base_ms", "f8"),
        ("prefill_ms_per_token", "f8"),
    ],
    align=True,
)
REPLICA = np.dtype(
    [
        ("model", "i8"),
        ("device", "i8"),
        ("first_seat", "i8"),
        ("in_flight", "i8"),  # waiting, prefilling and decoding
        ("num_decoding", "i8"),
        ("prefilling", "i8"),  # the first request whose prompt is being read, or NONE
        ("num_prefilling", "i8"),  # it and those behind it that are read in the same step
        ("first_waiting", "i8"),
        ("last_waiting", "i8"),
        ("tokens", "f8"),  # made by each decoding request since the replica last was idle
        ("tokens_at_ms", "f8"),  # the work clock when `tokens` was true
        ("mark_ms", "f8"),  # the work clock at the next event; infinite if idle
        ("batch_place", "i8"),
        ("mark_place", "i8"),
    ],
    align=True,
)
SITE = np.dtype(
    [
        ("work_ms", "f8"),
        ("num_busy", "i8"),  # replicas with requests in flight
        ("first", "i8"),  # its part of `mark_heap`
        ("num_replicas", "i8"),
    ],
    align=True,
)
DEVICE = np.dtype(
    [
        ("clock_ms", "f8"),
        ("busy_set", "i8"),  # bit m: model m has requests in flight here
        ("next_event_ms", "f8"),
        ("next_model", "i8"),  # whose event it is
        ("place", "i8"),
    ],
    align=True,
)
SEAT = np.dtype([("tokens", "f8"), ("request", "i8")], align=True)


class State(NamedTuple):
    """One fleet; or `F` fleets, where each array but the tables has one more axis in front."""

    requests: Records  # (K,) in order of arrival
    completed: Ints  # (K,) in order of completion
    num_completed: Ints  # (1,)
    models: Records  # (M,)
    replicas: Records  # (R,) model by model
    sites: Records  # (D * M,) device by device
    devices: Records  # (D,)
    seats: Records  # (S,) per replica a heap of the token counts at which its requests end
    batch_heap: Ints  # (R,) per model a heap of replicas by `in_flight`
    mark_heap: Ints  # (R,) per site a heap of replicas by `mark_ms`
    device_heap: Ints  # (D,) by `next_event_ms`
    step_ms: NDArray[np.float64]  # (M, largest batch + 1)
    slowdown: NDArray[np.float64]  # (M, 2**M)


@compiled
def fleet_of(states: State, fleet: int) -> State:
    """One of many fleets, as a view."""
    return State(
        states.requests[fleet],
        states.completed[fleet],
        states.num_completed[fleet],
        states.models[fleet],
        states.replicas[fleet],
        states.sites[fleet],
        states.devices[fleet],
        states.seats[fleet],
        states.batch_heap[fleet],
        states.mark_heap[fleet],
        states.device_heap[fleet],
        states.step_ms,
        states.slowdown,
    )


@compiled
def _before(keys: Any, a: int, b: int) -> bool:
    """Ties go to the lower index, so that every order is defined."""
    return bool(keys[a] < keys[b] or (keys[a] == keys[b] and a < b))


@compiled
def _reorder(keys: Any, heap: Ints, place_of: Any, base: int, size: int, item: int) -> None:
    """Restore the heap in `heap[base : base + size]` after `keys[item]` has changed."""
    place = place_of[item]
    while place > 0:
        above = heap[base + ((place - 1) >> 1)]
        if not _before(keys, item, above):
            break
        heap[base + place] = above
        place_of[above] = place
        place = (place - 1) >> 1
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and _before(keys, heap[base + child + 1], heap[base + child]):
            child += 1
        below = heap[base + child]
        if not _before(keys, below, item):
            break
        heap[base + place] = below
        place_of[below] = place
        place = child
    heap[base + place] = item
    place_of[item] = place


@compiled
def _push_seat(seats: Records, base: int, size: int, tokens: float, request: int) -> None:
    place = size
    while place > 0 and seats[base + ((place - 1) >> 1)]["tokens"] > tokens:
        above = base + ((place - 1) >> 1)
        seats[base + place]["tokens"] = seats[above]["tokens"]
        seats[base + place]["request"] = seats[above]["request"]
        place = (place - 1) >> 1
    seats[base + place]["tokens"] = tokens
    seats[base + place]["request"] = request


@compiled
def _pop_seat(seats: Records, base: int, size: int) -> int:
    first = seats[base]["request"]
    size -= 1
    tokens, request = seats[base + size]["tokens"], seats[base + size]["request"]
    place = 0
    while 2 * place + 1 < size:
        child = base + 2 * place + 1
        if 2 * place + 2 < size and seats[child + 1]["tokens"] < seats[child]["tokens"]:
            child += 1
        if seats[child]["tokens"] >= tokens:
            break
        seats[base + place]["tokens"] = seats[child]["tokens"]
        seats[base + place]["request"] = seats[child]["request"]
        place = child - base
    seats[base + place]["tokens"] = tokens
    seats[base + place]["request"] = request
    return int(first)


@compiled
def _move_clock(state: State, device: int, now_ms: float) -> None:
    elapsed_ms = now_ms - state.devices[device]["clock_ms"]
    state.devices[device]["clock_ms"] = now_ms
    busy = state.devices[device]["busy_set"]
    num_models = len(state.models)
    for model in range(num_models):
        if busy >> model & 1:
            state.sites[device * num_models + model]["work_ms"] += elapsed_ms / state.slowdown[model, busy]


@compiled
def _schedule(state: State, device: int) -> None:
    """Find the device's next event; of events at the same time, that of the smallest model is first."""
    clock_ms, busy = state.devices[device]["clock_ms"], state.devices[device]["busy_set"]
    num_models = len(state.models)
    soonest_ms, soonest_model = np.inf, 0
    for model in range(num_models):
        if busy >> model & 1:
            site = device * num_models + model
            mark_ms = state.replicas[state.mark_heap[state.sites[site]["first"]]]["mark_ms"]
            # Rounding may have carried the work clock past the mark by a trifle.
            left_ms = max(0.0, mark_ms - state.sites[site]["work_ms"])
            at_ms = clock_ms + left_ms * state.slowdown[model, busy]
            if at_ms < soonest_ms:
                soonest_ms, soonest_model = at_ms, model
    state.devices[device]["next_event_ms"] = soonest_ms
    state.devices[device]["next_model"] = soonest_model
    keys, places = state.devices["next_event_ms"], state.devices["place"]
    _reorder(keys, state.device_heap, places, 0, len(state.devices), device)


@compiled
def _begin_prefill(state: State, replica: int) -> float:
    """Take as many waiting prompts as there are seats, into one step; returns its work in ms.

    Such a step decodes too, as vLLM's chunked prefill does. It takes what these prompts take alone,
    and what a step of the whole batch takes beyond one of a single request.
    """
    model, num_decoding = state.replicas[replica]["model"], state.replicas[replica]["num_decoding"]
    num_seats = state.models[model]["max_num_seqs"] - num_decoding
    request = state.replicas[replica]["first_waiting"]
    state.replicas[replica]["prefilling"] = request
    num_prompts, num_tokens = 0, 0
    while request != NONE and num_prompts < num_seats:
        num_more = state.requests[request]["num_prompt_tokens"]
        if num_prompts > 0 and num_tokens + num_more > MAX_BATCHED_TOKENS:
            break
        num_prompts, num_tokens = num_prompts + 1, num_tokens + num_more
        request = state.requests[request]["next_waiting"]
    state.replicas[replica]["num_prefilling"] = num_prompts
    state.replicas[replica]["first_waiting"] = request
    per_token_ms = state.models[model]["prefill_ms_per_token"]
    alone_ms = state.models[model]["prefill_base_ms"] + per_token_ms * num_tokens
    single_ms = state.step_ms[model, 1]
    batch_ms = state.step_ms[model, num_decoding + num_prompts]
    return float(max(alone_ms, single_ms) + (batch_ms - single_ms))


@compiled
def _next_work(state: State, replica: int) -> None:
    """Begin the next prefill if one waits and has a seat; else decode on; else be idle."""
    model = state.replicas[replica]["model"]
    site = state.replicas[replica]["device"] * len(state.models) + model
    work_ms = state.sites[site]["work_ms"]
    num_decoding = state.replicas[replica]["num_decoding"]
    waits = state.replicas[replica]["first_waiting"] != NONE
    mark_ms = np.inf
    if waits and num_decoding < state.models[model]["max_num_seqs"]:
        mark_ms = work_ms + _begin_prefill(state, replica)
    elif num_decoding > 0:
        state.replicas[replica]["tokens_at_ms"] = work_ms
        ends_at = state.seats[state.replicas[replica]["first_seat"]]["tokens"]
        num_steps = ends_at - state.replicas[replica]["tokens"]
        mark_ms = work_ms + num_steps * state.step_ms[model, num_decoding]
    else:
        state.replicas[replica]["tokens"] = 0.0
    state.replicas[replica]["mark_ms"] = mark_ms
    first, size = state.sites[site]["first"], state.sites[site]["num_replicas"]
    keys, places = state.replicas["mark_ms"], state.replicas["mark_place"]
    _reorder(keys, state.mark_heap, places, first, size, replica)


@compiled
def _count(state: State, replica: int, change: int) -> None:
    """Note that one request came to the replica (+1) or left it (-1)."""
    model, device = state.replicas[replica]["model"], state.replicas[replica]["device"]
    state.models[model]["in_flight"] += change
    in_flight = state.replicas[replica]["in_flight"] + change
    state.replicas[replica]["in_flight"] = in_flight
    first, size = state.models[model]["first_replica"], state.models[model]["num_replicas"]
    keys, places = state.replicas["in_flight"], state.replicas["batch_place"]
    _reorder(keys, state.batch_heap, places, first, size, replica)
    site = device * len(state.models) + model
    if change > 0 and in_flight == 1:
        state.sites[site]["num_busy"] += 1
        state.devices[device]["busy_set"] |= 1 << model
    elif in_flight == 0:
        state.sites[site]["num_busy"] -= 1
        if state.sites[site]["num_busy"] == 0:
            state.devices[device]["busy_set"] &= ~(1 << model)


@compiled
def _complete(state: State, replica: int, request: int, now_ms: float) -> None:
    state.requests[request]["last_token_at_ms"] = now_ms
    state.completed[state.num_completed[0]] = request
    state.num_completed[0] += 1
    _count(state, replica, -1)


@compiled
def _end_prefill(state: State, replica: int, now_ms: float) -> None:
    """The prompts are read and their first tokens are there; those that decoded got one too."""
    state.replicas[replica]["tokens"] += 1.0
    request = state.replicas[replica]["prefilling"]
    base, num_decoding = state.replicas[replica]["first_seat"], state.replicas[replica]["num_decoding"]
    for _ in range(state.replicas[replica]["num_prefilling"]):
        state.requests[request]["first_token_at_ms"] = now_ms
        num_steps = state.requests[request]["num_output_tokens"] - 1
        _push_seat(state.seats, base, num_decoding, state.replicas[replica]["tokens"] + num_steps, request)
        num_decoding += 1
        request = state.requests[request]["next_waiting"]
    state.replicas[replica]["num_decoding"] = num_decoding
    state.replicas[replica]["prefilling"] = NONE
    state.replicas[replica]["num_prefilling"] = 0


@compiled
def _end_decodes(state: State, replica: int, now_ms: float) -> None:
    """Complete the requests that have all their tokens."""
    base = state.replicas[replica]["first_seat"]
    tokens = state.replicas[replica]["tokens"]
    while state.replicas[replica]["num_decoding"] > 0 and state.seats[base]["tokens"] <= tokens:
        request = _pop_seat(state.seats, base, state.replicas[replica]["num_decoding"])
        state.replicas[replica]["num_decoding"] -= 1
        _complete(state, replica, request, now_ms)


@compiled
def _next_event(state: State, device: int) -> None:
    now_ms, model = state.devices[device]["next_event_ms"], state.devices[device]["next_model"]
    _move_clock(state, device, now_ms)
    site = device * len(state.models) + model
    replica = state.mark_heap[state.sites[site]["first"]]
    # Exactly, whatever rounding says: the event has come.
    state.sites[site]["work_ms"] = state.replicas[replica]["mark_ms"]
    if state.replicas[replica]["prefilling"] != NONE:
        _end_prefill(state, replica, now_ms)
    else:
        state.replicas[replica]["tokens"] = state.seats[state.replicas[replica]["first_seat"]]["tokens"]
    _end_decodes(state, replica, now_ms)
    _next_work(state, replica)
    _schedule(state, device)


@compiled
def _enqueue(state: State, replica: int, request: int) -> None:
    state.requests[request]["replica"] = replica
    state.requests[request]["next_waiting"] = NONE  # of an earlier course of events, in a search
    if state.replicas[replica]["first_waiting"] == NONE:
        state.replicas[replica]["first_waiting"] = request
    else:
        state.requests[state.replicas[replica]["last_waiting"]]["next_waiting"] = request
    state.replicas[replica]["last_waiting"] = request


@compiled
def advance(state: State, until_ms: float) -> None:
    """Let everything happen up to `until_ms`, that instant included."""
    device = state.device_heap[0]
    while state.devices[device]["next_event_ms"] <= until_ms:
        _next_event(state, device)
        device = state.device_heap[0]


@compiled
def route(state: State, request: int, model: int) -> None:
    """Hand a request, which arrives now, to the model's replica with the smallest batch."""
    replica = state.batch_heap[state.models[model]["first_replica"]]
    device = state.replicas[replica]["device"]
    _move_clock(state, device, state.requests[request]["arrived_at_ms"])
    _enqueue(state, replica, request)
    _count(state, replica, +1)
    num_decoding = state.replicas[replica]["num_decoding"]
    has_seat = num_decoding < state.models[model]["max_num_seqs"]
    if state.replicas[replica]["prefilling"] == NONE and has_seat:
        if num_decoding > 0:  # the prefill interrupts it: see how far it has come
            work_ms = state.sites[device * len(state.models) + model]["work_ms"]
            since_ms = work_ms - state.replicas[replica]["tokens_at_ms"]
            state.replicas[replica]["tokens"] += since_ms / state.step_ms[model, num_decoding]
        _next_work(state, replica)
    _schedule(state, device)


@compiled
def advance_all(states: State, index: int) -> None:
    """Bring every fleet to the arrival of its request `index`; past the last, to its end."""
    num_fleets, num_requests = states.requests.shape
    for fleet in range(num_fleets):
        state = fleet_of(states, fleet)
        until_ms = state.requests[index]["arrived_at_ms"] if index < num_requests else END_MS
        advance(state, until_ms)


@compiled
def route_all(states: State, index: int, models: Ints) -> None:
    """Route request `index` of every fleet; `models` has shape `(F,)`."""
    for fleet in range(len(models)):
        route(fleet_of(states, fleet), index, models[fleet])


@compiled
def run(states: State, models: Ints) -> None:
    """Serve all requests of fleet 0 by the models of shape `(K,)`."""
    state = fleet_of(states, 0)
    for request in range(len(models)):
        advance(state, state.requests[request]["arrived_at_ms"])
        route(state, request, models[request])
    advance(state, END_MS)


class Stakes(NamedTuple):
    """What the requests of one fleet are worth; of `F` fleets, with one more axis in front."""

    value: NDArray[np.float64]  # (K, M) of an answer in time
    deadline_ms_per_token: NDArray[np.float64]  # (K,)
    lateness: NDArray[np.float64]  # (2,) lost per ms past the deadline; share of it past which all is lost


@compiled
def _worth(state: State, stakes: Stakes, request: int, with_latency: float) -> float:
    """Of a completed request, less `with_latency` for each deadline's length that it took."""
    took_ms = state.requests[request]["last_token_at_ms"] - state.requests[request]["arrived_at_ms"]
    latency = took_ms / state.requests[request]["num_output_tokens"]
    deadline = stakes.deadline_ms_per_token[request]
    model = state.replicas[state.requests[request]["replica"]]["model"]
    weight = 1.0
    if latency > deadline:
        weight = 0.0
        if latency - deadline < stakes.lateness[1] * deadline:
            weight = max(0.0, 1.0 - stakes.lateness[0] * (latency - deadline))
    return float(weight * stakes.value[request, model] - with_latency * min(latency / deadline, 10.0))


@compiled
def _by_thresholds(state: State, thresholds: NDArray[np.float64], scale: float) -> int:
    """The largest model whose batch size is at most `scale` times its threshold; `(M - 1,)` of them."""
    for model in range(len(state.models) - 1, 0, -1):
        batch_size = state.models[model]["in_flight"] / state.models[model]["num_replicas"]
        if batch_size <= scale * thresholds[model - 1]:
            return model
    return 0


@compiled
def run_thresholds(
    states: State, stakes: Stakes, row: Ints, rows: NDArray[np.float64], worth: NDArray[np.float64]
) -> None:
    """Serve all requests of all fleets, each by its own row of thresholds.

    `row` has shape `(F, K)`, `rows` `(R, M - 1)`; the mean worth goes to `worth` `(F,)`.
    """
    num_fleets, num_requests = row.shape
    for fleet in range(num_fleets):
        state = fleet_of(states, fleet)
        for request in range(num_requests):
            advance(state, state.requests[request]["arrived_at_ms"])
            route(state, request, _by_thresholds(state, rows[row[fleet, request]], 1.0))
        advance(state, END_MS)
        own = Stakes(stakes.value[fleet], stakes.deadline_ms_per_token[fleet], stakes.lateness)
        total = 0.0
        for request in range(num_requests):
            total += _worth(state, own, request, 0.0)
        worth[fleet] = total / num_requests


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


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]  # long, and called twice
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
                total += _worth(state, stakes, done, PER_DEADLINE)
                best = stakes.value[done].max()
                num_imperfect += _worth(state, stakes, done, 0.0) < best - TOLERANCE
        if num_missing == 0 or request == num_requests:
            return total, num_imperfect, request
        if request == start:
            chosen = model
        elif kind == BY_THRESHOLDS and request < end:
            chosen = _by_thresholds(state, search.rows[search.row[request]], more)
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
def _restore(search: Search) -> None:
    """Undo a trial. Only one thing in a request's record matters to the future: what waits behind it."""
    search.words[:] = search.saved
    state = search.state
    for replica in range(len(state.replicas)):
        if state.replicas[replica]["first_waiting"] != NONE:
            state.requests[state.replicas[replica]["last_waiting"]]["next_waiting"] = NONE


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
        _restore(search)
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
            _restore(search)
            if total > best + TOLERANCE:
                best = total
                search.plan[start:reached] = search.trial[start:reached]
                num_changes += 1
        route(state, start, search.plan[start])
    return num_changes
