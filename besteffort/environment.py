"""Many simulated fleets side by side, as an environment for reinforcement learning.

The reward of a decision is known only when its request completes, many decisions later. So a
transition is handed over when its reward comes in, with the observation at the arrival that
followed the decision. Workloads only truncate: no state is terminal.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s
from besteffort.deadline import deadline_weight
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.observation import Encoding, FleetEncoding
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.simulator import ParallelFleets
from besteffort.training.trace_parts import TracePart
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import stable

# The paper's lowest and highest rate for its four GPUs (Sec. 4.3.1), times the fleet's `rate_scale`.
LOWEST_RATE_PER_S = 0.25
HIGHEST_RATE_PER_S = 48.0

Policy = Callable[[NDArray[np.float32]], NDArray[np.int64]]  # (F, T + M + 1) inputs to (F,) models


@dataclass(frozen=True)
class Service:
    """What is served, how fast, and what it is worth."""

    fleet: Fleet
    latency: Latency
    rewards: Rewards

    @property
    def values(self) -> NDArray[np.float64]:
        """What an answer in time counts in training, shape `(T, M)`.

        `A[t, m] / max_m A[t, m]` times the weight of the task, over the mean weight of an arrival: only the
        weights' proportions matter.
        """
        weights = np.array([task.weight for task in self.fleet.tasks])
        values = self.rewards.relative * (weights / (weights @ self.fleet.task_shares))[:, None]
        return np.asarray(values)

    def worth(
        self, task: NDArray[np.int64], model: NDArray[np.int64], latency_ms_per_token: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """`w * A[t, m] / max_m A[t, m]` of each request, shape `(N,)`: its share of the performance."""
        return self._in_time(task, latency_ms_per_token) * np.asarray(self.rewards.relative[task, model])

    def weighted_worth(
        self, task: NDArray[np.int64], model: NDArray[np.int64], latency_ms_per_token: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The same by the `values` of answers, shape `(N,)`: what training maximises."""
        return self._in_time(task, latency_ms_per_token) * self.values[task, model]

    def _in_time(
        self, task: NDArray[np.int64], latency_ms_per_token: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        deadlines = np.array([t.deadline_ms_per_token for t in self.fleet.tasks])[task]
        return deadline_weight(latency_ms_per_token, deadlines, self.fleet.deadline_kind)


def encoding_for(fleet: Fleet) -> Encoding:
    """Scales that bring a busy fleet's observations to about 1, and its worst ones to about 4."""
    return Encoding(
        num_tasks=len(fleet.tasks),
        num_models=len(fleet.models),
        batch_scale=max(model.max_num_seqs for model in fleet.models) / 4,
        rate_scale_per_s=HIGHEST_RATE_PER_S / 2 * fleet.rate_scale,
    )


def fleet_encoding_with(fleet: Fleet, spans_s: tuple[float, ...]) -> FleetEncoding:
    """The same scales, around what surrounds a replica and the rates over these spans."""
    return FleetEncoding(
        num_tasks=len(fleet.tasks),
        num_models=len(fleet.models),
        in_flight_scale=tuple(model.max_num_seqs / 4 for model in fleet.models),
        rate_scale_per_s=HIGHEST_RATE_PER_S / 2 * fleet.rate_scale,
        spans_s=spans_s,
    )


def switching_requests(
    fleet: Fleet, num_requests: int, mean_requests_per_rate: float, rng: np.random.Generator
) -> Requests:
    """Arrivals that switch at random between random rates (paper, Sec. 3.2).

    Each rate is uniform between the paper's lowest and highest, and holds for a number of requests
    that is geometric. Tasks and lengths are drawn as for every workload.
    """
    rate_rng, count_rng, request_rng = rng.spawn(3)
    counts = count_rng.geometric(1 / mean_requests_per_rate, size=num_requests)
    rates = rate_rng.uniform(LOWEST_RATE_PER_S, HIGHEST_RATE_PER_S, size=num_requests)
    num_rates = int(np.searchsorted(np.cumsum(counts), num_requests)) + 1
    rate_per_s = np.repeat(rates[:num_rates], counts[:num_rates])[:num_requests]
    steady = stable(fleet, request_rng, 1.0, num_requests=num_requests)
    gaps = np.diff(steady.arrived_at, prepend=0.0)
    return Requests(
        np.cumsum(gaps / rate_per_s), steady.task, steady.num_prompt_tokens, steady.num_output_tokens
    )


@dataclass(frozen=True)
class SwitchingRates:
    """Workloads of so many requests."""

    num_requests: int
    mean_requests_per_rate: float

    def draw(self, fleet: Fleet, rng: np.random.Generator) -> Requests:
        return switching_requests(fleet, self.num_requests, self.mean_requests_per_rate, rng)

    def cut(self, part: TracePart, speed: float, rng: np.random.Generator) -> Requests:
        return part.from_request(int(rng.integers(len(part))), self.num_requests, speed)


@dataclass(frozen=True)
class Transitions:
    """Decisions whose reward has become known, `B` of them."""

    observations: NDArray[np.float32]  # (B, T + M + 1)
    actions: NDArray[np.int64]  # (B,)
    rewards: NDArray[np.float32]  # (B,)
    next_observations: NDArray[np.float32]  # (B, T + M + 1)

    def __len__(self) -> int:
        return len(self.actions)


class Episode:
    """One workload for each of `F` fleets, from the first arrival to the last token."""

    def __init__(self, service: Service, encoding: Encoding, workloads: list[Requests]) -> None:
        self._encoding = encoding
        self._fleets = ParallelFleets(service.fleet, service.latency, workloads)
        self.task = np.stack([w.task for w in workloads])
        self._rate_per_s = np.stack([arrival_rates_per_s(w.arrived_at) for w in workloads])
        shape = self.task.shape
        self.observations = np.zeros((*shape, encoding.size), dtype=np.float32)
        self.actions = np.zeros(shape, dtype=np.int64)
        self._service = service
        self._index = -1

    def observe(self) -> NDArray[np.float32]:
        """Go to the next arrival and return the network's inputs there, shape `(F, T + M + 1)`."""
        self._index += 1
        self._fleets.advance(self._index)
        seen = self._encoding.encode(
            self.task[:, self._index], self._fleets.batch_sizes, self._rate_per_s[:, self._index]
        )
        self.observations[:, self._index] = seen
        return seen

    def route(self, actions: NDArray[np.int64]) -> None:
        self.actions[:, self._index] = actions
        self._fleets.route(self._index, actions)

    def drain(self) -> None:
        self._fleets.drain()

    @property
    def at_last_arrival(self) -> bool:
        return self._index == self._fleets.num_requests - 1

    def completed(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Fleets, indices and weighted worth of the requests that completed since the last call."""
        fleets, indices = self._fleets.collect_completed()
        task, action = self.task[fleets, indices], self.actions[fleets, indices]
        took = self._fleets.latency_ms_per_token(fleets, indices)
        return fleets, indices, self._service.weighted_worth(task, action, took)


class RoutingEnvironment:
    """`F` fleets under switching arrival rates, each `step` from one arrival to the next.

    A workload has `num_requests` decisions; the arrival after the last is seen but not routed, and
    closes the last transition. Then the fleets run dry and begin anew, empty.
    """

    def __init__(
        self,
        service: Service,
        encoding: Encoding,
        rng: np.random.Generator,
        *,
        num_fleets: int,
        num_requests: int = 1000,
        mean_requests_per_rate: float = 100.0,
        workloads: TrainingWorkloads | None = None,
    ) -> None:
        self._service, self._encoding, self._rng = service, encoding, rng
        self._num_fleets, self._num_requests = num_fleets, num_requests
        self._workloads = workloads or TrainingWorkloads(service.fleet)
        self._shape = SwitchingRates(num_requests + 1, mean_requests_per_rate)

    def reset(self) -> NDArray[np.float32]:
        """Begin new workloads; returns the observations at their first arrivals, `(F, T + M + 1)`."""
        workloads = [self._workloads.draw(self._shape, rng) for rng in self._rng.spawn(self._num_fleets)]
        self._episode = Episode(self._service, self._encoding, workloads)
        return self._episode.observe()

    def step(self, actions: NDArray[np.int64]) -> tuple[NDArray[np.float32], Transitions]:
        """Route the arrivals by `actions`, shape `(F,)`, and go to the next ones.

        Returns their observations, and the transitions whose reward became known meanwhile.
        """
        self._episode.route(actions)
        observations = self._episode.observe()
        truncated = self._episode.at_last_arrival
        if truncated:
            self._episode.drain()
        transitions = self._transitions()
        return (self.reset() if truncated else observations), transitions

    def _transitions(self) -> Transitions:
        fleets, indices, worth = self._episode.completed()
        return Transitions(
            observations=self._episode.observations[fleets, indices],
            actions=self._episode.actions[fleets, indices],
            rewards=worth.astype(np.float32),
            next_observations=self._episode.observations[fleets, indices + 1],
        )


def evaluate(
    service: Service, encoding: Encoding, workloads: list[Requests], policy: Policy
) -> NDArray[np.float64]:
    """Mean weighted worth of the requests of each workload, shape `(F,)`; all of one length.

    That is the `performance`, unless the fleet's tasks differ in weight.
    """
    episode = Episode(service, encoding, workloads)
    while not episode.at_last_arrival:
        episode.route(policy(episode.observe()))
    episode.drain()
    fleets, _, worth = episode.completed()
    return np.bincount(fleets, weights=worth, minlength=len(workloads)) / len(workloads[0])
