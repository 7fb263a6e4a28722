"""Draws workloads, and measures on them what each choice is worth."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.advantages.recipe import AdvantageRecipe
from besteffort.arrivals import arrival_rates_per_s, recent_rates_per_s
from besteffort.environment import Service, fleet_encoding_with
from besteffort.fleet import Fleet
from besteffort.observation import FleetEncoding
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.simulator import Branching, Routing
from besteffort.training.trace_parts import TracePart
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import stable

# Somewhat beyond the paper's lowest and highest rate, so that these are not the edge.
SLOWEST_PER_S, FASTEST_PER_S = 0.12, 52.0


def fleet_encoding_for(fleet: Fleet) -> FleetEncoding:
    """With rates over shares of a life."""
    return fleet_encoding_with(fleet, tuple(share * fleet.request_life_s for share in (0.125, 0.5, 2.0)))


@dataclass(frozen=True)
class Measured:
    """Branchings, `N` of them."""

    inputs: NDArray[np.float32]  # (N, I)
    worth: NDArray[np.float64]  # (N, M) of all that a choice has an influence on

    @property
    def advantages(self) -> NDArray[np.float64]:
        """What each model is worth beyond the mean of all, shape `(N, M)`."""
        return np.asarray(self.worth - self.worth.mean(axis=1, keepdims=True))


def join(parts: list[Measured]) -> Measured:
    return Measured(np.concatenate([p.inputs for p in parts]), np.concatenate([p.worth for p in parts]))


@dataclass(frozen=True)
class RandomSpans:
    """Workloads that last so long, at a steady rate or at one that switches at random instants."""

    duration_s: float
    recipe: AdvantageRecipe

    def draw(self, fleet: Fleet, rng: np.random.Generator) -> Requests:
        """Poisson arrivals; drawn again while there is none."""
        while True:
            arrived_at = self._draw_arrivals(fleet, rng)
            if len(arrived_at):
                break
        drawn = stable(fleet, rng, 1.0, num_requests=len(arrived_at))
        return Requests(arrived_at, drawn.task, drawn.num_prompt_tokens, drawn.num_output_tokens)

    def cut(self, part: TracePart, speed: float, rng: np.random.Generator) -> Requests:
        """From an instant on at which something comes in that time."""
        while True:
            requests = part.from_second(float(rng.uniform(0, part.period_s)), self.duration_s, speed)
            if len(requests):
                return requests

    def _draw_arrivals(self, fleet: Fleet, rng: np.random.Generator) -> NDArray[np.float64]:
        num_rates = 1 if rng.random() < self.recipe.steady_share else 1 + int(rng.integers(1, 12))
        cuts = np.sort(rng.uniform(0, self.duration_s, num_rates - 1))
        edges = np.concatenate([[0.0], cuts, [self.duration_s]])
        parts = []
        for begin, end in itertools.pairwise(edges):
            rate = self._draw_rate_per_s(rng) * fleet.rate_scale
            parts.append(np.sort(rng.uniform(begin, end, rng.poisson(rate * (end - begin)))))
        return np.concatenate(parts)

    def _draw_rate_per_s(self, rng: np.random.Generator) -> float:
        if rng.random() < self.recipe.calm_share:
            return float(np.exp(rng.uniform(np.log(SLOWEST_PER_S), np.log(FASTEST_PER_S))))
        return float(rng.uniform(SLOWEST_PER_S, FASTEST_PER_S))


class Sampler:
    """Draws workloads, and measures on them what each choice is worth."""

    def __init__(
        self,
        service: Service,
        encoding: FleetEncoding,
        recipe: AdvantageRecipe,
        workloads: TrainingWorkloads | None = None,
    ) -> None:
        self._service, self._encoding, self._recipe = service, encoding, recipe
        self._workloads = workloads or TrainingWorkloads(service.fleet)
        self._life_s = self._workloads.life_s
        self._shape = RandomSpans(max(9.0 * self._life_s, 150.0 / service.fleet.rate_scale), recipe)

    def measure(self, network: QNetwork | None, rngs: list[np.random.Generator]) -> Measured:
        """One workload for each generator, routed by the network; without one by simple thresholds."""
        with ThreadPoolExecutor(self._recipe.num_threads) as pool:
            return join(list(pool.map(lambda rng: self._measure_one(network, rng), rngs)))

    def _measure_one(self, network: QNetwork | None, rng: np.random.Generator) -> Measured:
        recipe, requests = self._recipe, self._workloads.draw(self._shape, rng)
        at = requests.arrived_at
        horizon_s = recipe.horizon_lives * self._life_s
        # Early enough that nothing which counts lives beyond the last arrival.
        latest_s = self._shape.duration_s - horizon_s - 0.7 * self._life_s
        wanted = np.searchsorted(at, np.sort(rng.uniform(0, latest_s, recipe.num_branchings)))
        starts = np.unique(np.minimum(wanted, len(at) - 1))
        until = np.maximum(np.searchsorted(at, at[starts] + horizon_s, side="right"), starts + 1)
        request_inputs = self._request_inputs(requests)
        branching = self._branching(requests, network, request_inputs)
        explored = np.full(len(at), -1)
        if rng.random() < recipe.explored_share:
            drawn = rng.random(len(at)) < recipe.epsilon
            explored[drawn] = rng.integers(0, self._encoding.num_models, drawn.sum())
        branching.give(explored)
        if recipe.open_loop:
            branching.give(branching.serve()[1])
        of_fleet, worth = branching.branch(starts, until, 1000.0 * recipe.fade_lives * self._life_s)
        return Measured(np.concatenate([of_fleet, request_inputs[starts]], axis=1), worth)

    def branching_on(self, requests: Requests) -> Branching:
        return self._branching(requests, None, self._request_inputs(requests))

    def _branching(
        self, requests: Requests, network: QNetwork | None, request_inputs: NDArray[np.float32]
    ) -> Branching:
        fleet, latency = self._service.fleet, self._service.latency
        scale = np.array(self._encoding.in_flight_scale, dtype=np.float32)
        routing = Routing(scale, self._first_thresholds(), network)
        return Branching(requests, fleet, latency, self._service.values, routing, request_inputs)

    def _first_thresholds(self) -> NDArray[np.float64]:
        """A good part of the largest batch with which a model makes the deadline alone, `(T, M - 1)`."""
        fleet = self._service.fleet
        deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
        steps_ms = self._service.latency.step_table_ms(max(model.max_num_seqs for model in fleet.models))
        rows = [
            [0.6 * (np.sum(steps[1 : model.max_num_seqs + 1] <= deadline) - 1.0)
             for model, steps in zip(fleet.models[1:], steps_ms[1:], strict=True)]
            for deadline in deadlines
        ]  # fmt: skip
        return np.array(rows, dtype=np.float64).reshape(len(fleet.tasks), -1)

    def _request_inputs(self, requests: Requests) -> NDArray[np.float32]:
        at = requests.arrived_at
        recent = recent_rates_per_s(at, self._encoding.spans_s)
        return self._encoding.encode_request(requests.task, arrival_rates_per_s(at), recent)
