"""Many courses of the same arrivals: thresholds tried on workloads, and plans tried on one trace."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from besteffort.deadline import SOFT_DECAY_PER_MS, SOFT_LIMIT
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.request import Requests
from besteffort.simulator.fleets import idle_state
from besteffort.simulator.plans import Search, improve
from besteffort.simulator.records import State, on_cache_lines
from besteffort.simulator.stakes import Stakes
from besteffort.simulator.walks import run_thresholds


def stakes_of(workloads: Sequence[Requests], fleet: Fleet, values: NDArray[np.float64]) -> Stakes:
    """What the requests of `F` workloads are worth, `values` `(T, M)` being an answer's in time."""
    task = np.stack([workload.task for workload in workloads])
    deadlines = np.array([t.deadline_ms_per_token for t in fleet.tasks])
    soft = fleet.deadline_kind == "soft"
    return Stakes(
        value=np.ascontiguousarray(values[task]),
        deadline_ms_per_token=deadlines[task],
        lateness=np.array([SOFT_DECAY_PER_MS, SOFT_LIMIT]) if soft else np.zeros(2),
    )


class ThresholdTrials:
    """`F` workloads of one length, served again and again by other thresholds."""

    def __init__(
        self, workloads: Sequence[Requests], fleet: Fleet, latency: Latency, values: NDArray[np.float64]
    ) -> None:
        self._idle = idle_state(fleet, latency, workloads)
        self._state = State(**{name: on_cache_lines(array) for name, array in self._idle._asdict().items()})
        self._stakes = stakes_of(workloads, fleet, values)

    def worth(self, row: NDArray[np.int64], rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean worth of the requests of each workload, shape `(F,)`.

        Request `k` of workload `f` goes by the thresholds `rows[row[f, k]]`, shape `(M - 1,)`.
        """
        if row.shape != self._idle.requests.shape or row.min() < 0 or row.max() >= len(rows):
            raise ValueError(f"rows of shape {row.shape} up to {row.max()} into {len(rows)}")
        for array, idle in zip(self._state, self._idle, strict=True):
            _words(array)[:] = _words(idle)
        worth = np.zeros(len(row))
        run_thresholds(self._state, self._stakes, row, np.ascontiguousarray(rows), worth)
        return worth

    @property
    def models(self) -> NDArray[np.int64]:
        """Where the requests went the last time, shape `(F, K)`."""
        fleets = np.arange(len(self._state.requests))[:, None]
        return np.asarray(self._state.replicas["model"][fleets, self._state.requests["replica"]])


class PlanSearch:
    """One trace and a plan for it, the model of each request, to be improved by one who knows the future."""

    def __init__(
        self,
        requests: Requests,
        fleet: Fleet,
        latency: Latency,
        values: NDArray[np.float64],  # (T, M) of an answer in time
        row: NDArray[np.int64],  # (N,) into `rows`: the thresholds of each request
        rows: NDArray[np.float64],  # (R, M - 1) by which a trial may go on after a change
    ) -> None:
        self._idle = idle_state(fleet, latency, [requests])
        self._state, self._words = in_one_memory(self._idle)
        self._idle_words = self._words.copy()
        self._arrived_at = requests.arrived_at
        if row.shape != (len(requests),) or row.min() < 0 or row.max() >= len(rows):
            raise ValueError(f"rows of shape {row.shape} up to {row.max()} into {len(rows)}")
        stakes = stakes_of([requests], fleet, values)
        self._search = Search(
            state=self._state,
            words=self._words,
            saved=self._words.copy(),
            plan=np.zeros(len(requests), dtype=np.int64),
            trial=np.zeros(len(requests), dtype=np.int64),
            scored_until=np.zeros(len(requests), dtype=np.int64),
            row=row,
            rows=np.ascontiguousarray(rows),
            stakes=Stakes(stakes.value[0], stakes.deadline_ms_per_token[0], stakes.lateness),
        )
        self._next = 0

    @property
    def plan(self) -> NDArray[np.int64]:
        return self._search.plan.copy()

    def begin(self, plan: NDArray[np.int64], horizon_s: float) -> None:
        """Go back to the first arrival, with this plan of shape `(N,)`.

        A change will be judged by the requests that arrive within `horizon_s` of it.
        """
        self._words[:] = self._idle_words
        self._search.plan[:] = plan
        until = np.searchsorted(self._arrived_at, self._arrived_at + horizon_s, side="right")
        self._search.scored_until[:] = np.maximum(until, np.arange(len(plan)) + 1)
        self._next = 0

    def improve(self, draws: NDArray[np.float64]) -> int:
        """Improve the next requests' part of the plan; returns the number of changes.

        `draws` are even in [0, 1), of shape `(requests, trials, 4)`.
        """
        num_changes = improve(self._search, self._next, draws)
        self._next += len(draws)
        return int(num_changes)


def _words(array: NDArray[np.generic]) -> NDArray[np.int64]:
    """The memory of an array; all records are whole 8-byte words, and copying those is fastest."""
    return array.reshape(-1).view(np.int64)


def in_one_memory(states: State) -> tuple[State, NDArray[np.int64]]:
    """The first fleet; what changes and is small lies in one array, so that a copy of it is a snapshot."""
    apart = ("requests", "completed")
    shared = ("step_ms", "slowdown", "bend_at_tokens", "prefill_bend_ms", "pressure")
    parts = {name: getattr(states, name)[0] for name in State._fields if name not in apart + shared}
    words = np.concatenate([_words(part) for part in parts.values()])
    views, first = {}, 0
    for name, part in parts.items():
        size = len(_words(part))
        views[name] = words[first : first + size].view(part.dtype)
        first += size
    rest = {name: getattr(states, name)[0].copy() for name in apart}
    tables = {name: getattr(states, name) for name in shared}
    return State(**views, **rest, **tables), words
