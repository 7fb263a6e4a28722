"""One workload under a policy, and what would have come of each other choice at some of its requests."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.simulator.courses import Course, Network, branch_at, serve_course
from besteffort.simulator.fleets import idle_state
from besteffort.simulator.records import NONE
from besteffort.simulator.stakes import Stakes
from besteffort.simulator.trials import in_one_memory, stakes_of


@dataclass(frozen=True)
class Routing:
    """Who routes the requests: a network, or thresholds while there is none."""

    in_flight_scale: NDArray[np.float32]  # (M,)
    thresholds: NDArray[np.float64]  # (T, M - 1)
    network: QNetwork | None = None


class Branching:
    """`K` requests on one fleet, as often as wanted from the beginning."""

    def __init__(
        self,
        requests: Requests,
        fleet: Fleet,
        latency: Latency,
        values: NDArray[np.float64],  # (T, M) of an answer in time
        routing: Routing,
        request_inputs: NDArray[np.float32],  # (K, J) the network's inputs that are known beforehand
    ) -> None:
        num_models = len(fleet.models)
        num_fleet_inputs = 2 * num_models + num_models**2
        self._request_inputs = request_inputs
        state, words = in_one_memory(idle_state(fleet, latency, [requests]))
        stakes = stakes_of([requests], fleet, values)
        network = _compiled_network(routing.network, request_inputs, num_fleet_inputs, num_models)
        self._idle_words = words.copy()
        self._course = Course(
            state=state,
            words=words,
            saved=words.copy(),
            stakes=Stakes(stakes.value[0], stakes.deadline_ms_per_token[0], stakes.lateness),
            given=np.full(len(requests), NONE, dtype=np.int64),
            network=network,
            has_network=routing.network is not None,
            thresholds=np.ascontiguousarray(routing.thresholds[requests.task]),
            in_flight_scale=routing.in_flight_scale,
            neighbours=np.zeros((num_models, num_models)),
            inputs=np.zeros(num_fleet_inputs, dtype=np.float32),
            hidden=_scratch(network),
        )

    def use(self, network: QNetwork) -> None:
        """From now on this one routes."""
        num_inputs, num_models = len(self._course.inputs), len(self._course.in_flight_scale)
        compiled = _compiled_network(network, self._request_inputs, num_inputs, num_models)
        self._course = self._course._replace(network=compiled, has_network=True, hidden=_scratch(compiled))

    def give(self, models: NDArray[np.int64]) -> None:
        """From now on request `k` goes to `models[k]`, whatever the policy says; negative: it decides."""
        self._course.given[:] = models

    def serve(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Worth and model of each request, shape `(K,)`."""
        num_requests = len(self._course.given)
        worth, models = np.zeros(num_requests), np.zeros(num_requests, dtype=np.int64)
        self._course.words[:] = self._idle_words
        serve_course(self._course, worth, models)
        return worth, models

    def branch(
        self, starts: NDArray[np.int64], until: NDArray[np.int64], fade_ms: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The inputs that tell of the fleet at each of the rising `starts`, and what comes of each model.

        That is the worth of all requests in flight there, and of those before `until`; the arrivals
        in the last `fade_ms` count less and less. Shapes `(N, I)` and `(N, M)`.
        """
        inputs = np.zeros((len(starts), len(self._course.inputs)), dtype=np.float32)
        worth = np.zeros((len(starts), len(self._course.in_flight_scale)))
        self._course.words[:] = self._idle_words
        branch_at(self._course, starts, until, fade_ms, inputs, worth)
        return inputs, worth


def _scratch(network: Network) -> NDArray[np.float32]:
    return np.zeros((2, max(*network.second.shape, len(network.last_bias))), dtype=np.float32)


def _compiled_network(
    network: QNetwork | None, request_inputs: NDArray[np.float32], num_fleet_inputs: int, num_models: int
) -> Network:
    if network is None:
        weights = [np.zeros(s, np.float32) for s in ((num_fleet_inputs, 1), (1, 1), (1, num_models))]
        biases = [np.zeros(s, np.float32) for s in (1, 1, num_models)]
        by_request = np.zeros((1, 1), dtype=np.float32)
    else:
        weights, biases = list(network.weights), list(network.biases)
        by_request = request_inputs @ weights[0][num_fleet_inputs:] + biases[0]
    first, second, last = (np.ascontiguousarray(weight) for weight in weights)
    first = np.ascontiguousarray(first[:num_fleet_inputs])
    return Network(by_request, first, second, biases[1], last, biases[2])
