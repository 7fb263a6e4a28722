"""Workloads from the first arrival to the last, by given models or by thresholds."""

import numpy as np
from numpy.typing import NDArray

from besteffort.simulator.compiled import compiled
from besteffort.simulator.events import advance, route
from besteffort.simulator.records import END_MS, NONE, Ints, State, fleet_of
from besteffort.simulator.stakes import Stakes, worth_of


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


@compiled
def by_thresholds(state: State, thresholds: NDArray[np.float64], scale: float) -> int:
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
            route(state, request, by_thresholds(state, rows[row[fleet, request]], 1.0))
        advance(state, END_MS)
        own = Stakes(stakes.value[fleet], stakes.deadline_ms_per_token[fleet], stakes.lateness)
        total = 0.0
        for request in range(num_requests):
            total += worth_of(state, own, request, 0.0)
        worth[fleet] = total / num_requests


@compiled
def go_back(state: State, words: Ints, saved: Ints) -> None:
    """Undo what happened since `words`, the memory of the state, was copied to `saved`.

    Only one thing in a request's record matters to the future: what waits behind it.
    """
    words[:] = saved
    for replica in range(len(state.replicas)):
        if state.replicas[replica]["first_waiting"] != NONE:
            state.requests[state.replicas[replica]["last_waiting"]]["next_waiting"] = NONE
