"""A workload under a Q-network, and its branches."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from besteffort.simulator.compiled import compiled, compiled_apart
from besteffort.simulator.events import advance, route
from besteffort.simulator.records import END_MS, NONE, Ints, State, fleet_of
from besteffort.simulator.stakes import Stakes, worth_of
from besteffort.simulator.walks import by_thresholds, go_back

Floats = NDArray[np.float32]


class Network(NamedTuple):
    """A Q-network with two hidden layers, for one workload."""

    by_request: Floats  # (K, H) sums of the first layer over inputs that are known beforehand, and its bias
    first: Floats  # (I, H) of the inputs that tell of the fleet
    second: Floats  # (H, G)
    second_bias: Floats  # (G,)
    last: Floats  # (G, M)
    last_bias: Floats  # (M,)


class Course(NamedTuple):
    """One fleet, its workload, and who routes it: a network, or thresholds while there is none."""

    state: State  # of one fleet; all but the tables, `requests` and `completed` are parts of `words`
    words: Ints  # (W,) the memory of `state`
    saved: Ints  # (W,) what it was before a branch
    stakes: Stakes
    given: Ints  # (K,) models that are chosen beforehand; NONE: as the policy says
    network: Network
    has_network: bool
    thresholds: NDArray[np.float64]  # (K, M - 1)
    in_flight_scale: Floats  # (M,)
    neighbours: NDArray[np.float64]  # (M, M) scratch
    inputs: Floats  # (I,) that tell of the fleet, at the last decision
    hidden: Floats  # (2, max(H, G, M)) scratch


@compiled
def see_neighbours(state: State, seen: NDArray[np.float64]) -> None:
    """Row m of `seen`, `(M, M)`: what is in flight around the replica that the next request to m gets.

    On the diagonal at that replica, else at each other model on its device.
    """
    num_models = len(state.models)
    for model in range(num_models):
        replica = state.models[model]["next_replica"]
        site = state.replicas[replica]["device"] * num_models
        for other in range(num_models):
            seen[model, other] = state.sites[site + other]["in_flight"]
        seen[model, model] = state.replicas[replica]["in_flight"]


@compiled
def see_all_neighbours(states: State, seen: NDArray[np.float64]) -> None:
    """Of every fleet; `seen` has shape `(F, M, M)`."""
    for fleet in range(len(seen)):
        see_neighbours(fleet_of(states, fleet), seen[fleet])


@compiled
def _see(course: Course) -> None:
    """As `FleetEncoding.encode_fleet` does, to rounding."""
    state, num_models = course.state, len(course.state.models)
    see_neighbours(state, course.neighbours)
    for model in range(num_models):
        mean = state.models[model]["in_flight"] / state.models[model]["num_replicas"]
        course.inputs[model] = min(mean / course.in_flight_scale[model], 4.0)
        course.inputs[num_models + model] = 0.5 * np.log1p(mean)
        for other in range(num_models):
            place = 2 * num_models + model * num_models + other
            course.inputs[place] = 0.5 * np.log1p(course.neighbours[model, other])


@compiled
def _by_network(network: Network, request: int, inputs: Floats, first: Floats, second: Floats) -> int:
    """The model with the highest Q-value; inner loops run along rows, so that they are vectorised."""
    first_size, size = network.second.shape
    num_models = len(network.last_bias)
    for j in range(first_size):
        first[j] = network.by_request[request, j]
    for i in range(len(inputs)):
        value = inputs[i]
        if value != 0.0:
            for j in range(first_size):
                first[j] += value * network.first[i, j]
    for j in range(size):
        second[j] = network.second_bias[j]
    for i in range(first_size):
        value = first[i]
        if value > 0.0:
            for j in range(size):
                second[j] += value * network.second[i, j]
    for model in range(num_models):
        first[model] = network.last_bias[model]
    for i in range(size):
        value = second[i]
        if value > 0.0:
            for model in range(num_models):
                first[model] += value * network.last[i, model]
    best = 0
    for model in range(1, num_models):
        if first[model] > first[best]:
            best = model
    return best


@compiled
def _decide(course: Course, request: int) -> int:
    if course.given[request] != NONE:
        return course.given[request]  # type: ignore[no-any-return]
    if not course.has_network:
        return by_thresholds(course.state, course.thresholds[request], 1.0)
    _see(course)
    return _by_network(course.network, request, course.inputs, course.hidden[0], course.hidden[1])


@compiled
def serve_course(course: Course, worth: NDArray[np.float64], chosen: Ints) -> None:
    """Serve the whole workload; worth and model of each request go to arrays of shape `(K,)`."""
    state = course.state
    for request in range(len(chosen)):
        advance(state, state.requests[request]["arrived_at_ms"])
        model = _decide(course, request)
        chosen[request] = model
        route(state, request, model)
    advance(state, END_MS)
    for request in range(len(worth)):
        worth[request] = worth_of(state, course.stakes, request, 0.0)


@compiled_apart
def _branch(course: Course, start: int, model: int, until: int, fade_ms: float) -> float:
    """The worth of what is in flight at `start` and what arrives before `until`, if `start` goes to `model`.

    Those who arrive in the last `fade_ms` before the last of them count less and less.
    """
    state, num_requests = course.state, len(course.given)
    seen = state.num_completed[0]
    num_missing = until - seen
    end_ms = state.requests[until - 1]["arrived_at_ms"]
    total, request = 0.0, start
    while True:
        if request > start:
            advance(state, state.requests[request]["arrived_at_ms"] if request < num_requests else END_MS)
        while seen < state.num_completed[0]:
            done = state.completed[seen]
            seen += 1
            if done < until:
                num_missing -= 1
                weight = 1.0
                if done != start and fade_ms > 0:
                    weight = min(1.0, (end_ms - state.requests[done]["arrived_at_ms"]) / fade_ms)
                total += weight * worth_of(state, course.stakes, done, 0.0)
        if num_missing == 0 or request == num_requests:
            return total
        chosen = model
        if request > start:
            chosen = _decide(course, request)
        route(state, request, chosen)
        request += 1


@compiled
def branch_at(
    course: Course, starts: Ints, until: Ints, fade_ms: float, inputs: Floats, worth: NDArray[np.float64]
) -> None:
    """At each of the requests `starts`, rising, try every model under the same arrivals.

    What the fleet looks like there goes to `inputs` `(N, I)`, what comes of each model to `worth` `(N, M)`.
    """
    state, request = course.state, 0
    for nth in range(len(starts)):
        start = starts[nth]
        while request < start:
            advance(state, state.requests[request]["arrived_at_ms"])
            route(state, request, _decide(course, request))
            request += 1
        advance(state, state.requests[start]["arrived_at_ms"])
        _see(course)
        inputs[nth] = course.inputs
        course.saved[:] = course.words
        for model in range(len(state.models)):
            worth[nth, model] = _branch(course, start, model, until[nth], fade_ms)
            go_back(state, course.words, course.saved)
