"""Many runs served in lock-step, by policies that choose for all of them at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s
from besteffort.artifacts.policy_file import TrainedPolicy
from besteffort.deadline import deadline_weight
from besteffort.environment import Service
from besteffort.observation import Encoding
from besteffort.request import Requests
from besteffort.simulator import ParallelFleets
from besteffort.thresholds import ThresholdTable

# Past the end of a run, when its last request has long been answered.
FILLER_AFTER_S = 1e6
FILLER_GAP_S = 1e3
LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Seen:
    """`Observation` at one arrival at each of `F` fleets."""

    tasks: NDArray[np.int64]  # (F,)
    batch_sizes: NDArray[np.float64]  # (F, M)
    rates_per_s: NDArray[np.float64]  # (F,)
    arrived_at: NDArray[np.float64]  # (F,) s
    fleets: ParallelFleets

    @property
    def neighbours(self) -> NDArray[np.float64]:
        """Shape `(F, M, M)`."""
        return self.fleets.neighbours


class Chooser(Protocol):
    def choose_many(self, seen: Seen) -> NDArray[np.int64]:
        """The models, shape `(F,)`."""


@dataclass(frozen=True)
class StaticMany:
    model: int

    def choose_many(self, seen: Seen) -> NDArray[np.int64]:
        return np.full(len(seen.tasks), self.model)


class LearnedMany:
    """`policies.Learned` for many fleets; it may remember arrivals, so it is good for one series of runs."""

    def __init__(self, trained: TrainedPolicy) -> None:
        self._network, self._encoding = trained.network, trained.encoding
        self._counts: NDArray[np.float64] | float = 0.0
        self._last_at: NDArray[np.float64] | float = 0.0

    def choose_many(self, seen: Seen) -> NDArray[np.int64]:
        return np.asarray(np.argmax(self._network(self._inputs(seen)), axis=1))

    def _inputs(self, seen: Seen) -> NDArray[np.float32]:
        encoding = self._encoding
        if isinstance(encoding, Encoding):
            return encoding.encode(seen.tasks, seen.batch_sizes, seen.rates_per_s)
        recent = self._recent_rates_per_s(seen.arrived_at, np.array(encoding.spans_s))
        of_fleet = encoding.encode_fleet(seen.batch_sizes, seen.neighbours)
        of_request = encoding.encode_request(seen.tasks, seen.rates_per_s, recent)
        return np.concatenate([of_fleet, of_request], axis=1)

    def _recent_rates_per_s(
        self, arrived_at: NDArray[np.float64], spans_s: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """What `RecentRates` makes of each, shape `(F, S)`."""
        elapsed_s = arrived_at - self._last_at
        self._counts = self._counts * np.exp(-elapsed_s[:, None] / spans_s) + 1.0
        self._last_at = arrived_at
        return self._counts / spans_s


class GreedyMany:
    """`policies.Greedy` for many fleets."""

    def __init__(self, service: Service) -> None:
        fleet, latency = service.fleet, service.latency
        prompts, outputs = (
            np.array([round(sum(getattr(task, of)) / 2) for task in fleet.tasks])
            for of in ("num_prompt_tokens", "num_output_tokens")
        )
        self._num_output_tokens = outputs  # (T,)
        self._prefill_ms = latency.prefill_ms(prompts).T  # (T, M)
        self._steps_ms = latency.step_table_ms(LARGEST_BATCH)
        self._slowdown = latency.slowdown
        self._deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
        self._kind = fleet.deadline_kind
        self._relative_rewards = service.rewards.relative
        self._models = np.arange(len(fleet.models))

    def choose_many(self, seen: Seen) -> NDArray[np.int64]:
        predicted = self._predicted_ms_per_token(seen.tasks, seen.batch_sizes)
        weight = deadline_weight(predicted, self._deadlines[seen.tasks][:, None], self._kind)
        utility = weight * self._relative_rewards[seen.tasks]
        hopeless = ~utility.any(axis=1)
        return np.where(hopeless, np.argmin(predicted, axis=1), np.argmax(utility, axis=1))

    def _predicted_ms_per_token(
        self, tasks: NDArray[np.int64], batch_sizes: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """`Latency.predicted_ms_per_token`, shape `(F, M)`."""
        in_flight = np.minimum(np.ceil(batch_sizes).astype(np.int64) + 1, LARGEST_BATCH)
        busy = np.sum(np.where(batch_sizes > 0, 1 << self._models, 0), axis=1)
        slow = self._slowdown[self._models, busy[:, None] | (1 << self._models)]
        outputs = self._num_output_tokens[tasks][:, None]
        decode_ms = self._steps_ms[self._models, in_flight] * (outputs - 1)
        return np.asarray(slow * (self._prefill_ms[tasks] + decode_ms) / outputs)


class ThresholdsMany:
    """`policies.Thresholds` for many fleets; it remembers rates, so it is good for one series of runs."""

    def __init__(self, table: ThresholdTable) -> None:
        self._table = table
        self._num_seen: NDArray[np.int64] | int = 0
        self._log_rate: NDArray[np.float64] | float = 0.0

    def choose_many(self, seen: Seen) -> NDArray[np.int64]:
        bands = self._table.bands(self._smoothed(seen.rates_per_s))
        fits = seen.batch_sizes[:, 1:] <= self._table.max_batch_size[seen.tasks, bands]
        return np.asarray(np.where(fits, np.arange(1, seen.batch_sizes.shape[1]), 0).max(axis=1))

    def _smoothed(self, rates_per_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """What `RateSmoother` makes of each."""
        known = rates_per_s > 0
        self._num_seen = np.minimum(self._num_seen + known, self._table.num_smoothed)
        moves = np.log(np.where(known, rates_per_s, 1.0)) - self._log_rate
        self._log_rate = self._log_rate + np.where(known, moves, 0.0) / np.maximum(self._num_seen, 1)
        return np.where(known, np.exp(self._log_rate), rates_per_s)


@dataclass(frozen=True)
class Runs:
    """`F` workloads side by side; the shorter ones are filled up with requests that do not count."""

    workloads: list[Requests]  # each of `K` requests
    counts: NDArray[np.bool_]  # (F, K)
    rates_per_s: NDArray[np.float64]  # (F, K) as the router is told

    @property
    def task(self) -> NDArray[np.int64]:
        return np.stack([workload.task for workload in self.workloads])


def runs_of(workloads: Sequence[Requests], true_rate_per_s: float | None = None) -> Runs:
    """On stable workloads the router is given the true rate, else it estimates it (App. B)."""
    length = max(len(workload) for workload in workloads)
    filled = [_filled(workload, length) for workload in workloads]
    counts = np.arange(length) < np.array([len(workload) for workload in workloads])[:, None]
    if true_rate_per_s is None:
        rates = np.stack([arrival_rates_per_s(workload.arrived_at) for workload in filled])
    else:
        rates = np.full(counts.shape, true_rate_per_s)
    return Runs(filled, counts, rates)


def _filled(workload: Requests, length: int) -> Requests:
    missing = length - len(workload)
    later = workload.arrived_at[-1] + FILLER_AFTER_S + FILLER_GAP_S * np.arange(missing)
    ones = np.ones(missing, dtype=np.int64)
    return Requests(
        arrived_at=np.concatenate([workload.arrived_at, later]),
        task=np.concatenate([workload.task, 0 * ones]),
        num_prompt_tokens=np.concatenate([workload.num_prompt_tokens, ones]),
        num_output_tokens=np.concatenate([workload.num_output_tokens, ones]),
    )


@dataclass(frozen=True)
class Served:
    """What became of the requests of `Runs`; every array has shape `(F, K)`."""

    model: NDArray[np.int64]
    performance: NDArray[np.float64]  # w * A[t, m] / max_m A[t, m]
    deadline_met: NDArray[np.bool_]


def serve_many(
    runs: Runs, service: Service, chooser: Chooser, advance: Callable[[int], None] | None = None
) -> Served:
    """Serve all runs; `advance` is told now and then how many more arrivals were routed in each."""
    task = runs.task
    if isinstance(chooser, StaticMany):
        model = np.full(task.shape, chooser.model)
        latency = _serve_fixed(runs, service, chooser.model)
        if advance is not None:
            advance(task.shape[1])
    else:
        model, latency = _serve_in_lock_step(runs, service, chooser, advance)
    deadlines = np.array([t.deadline_ms_per_token for t in service.fleet.tasks])[task]
    return Served(model, service.worth(task, model, latency), latency <= deadlines)


def _serve_fixed(runs: Runs, service: Service, model: int) -> NDArray[np.float64]:
    """Latencies, shape `(F, K)`, where nothing is left to choose: many times as fast."""
    latencies = []
    for workload in runs.workloads:
        fleets = ParallelFleets(service.fleet, service.latency, [workload])
        fleets.run(np.full(len(workload), model))
        numbers = np.arange(len(workload))
        latencies.append(fleets.latency_ms_per_token(np.zeros_like(numbers), numbers))
    return np.stack(latencies)


def _serve_in_lock_step(
    runs: Runs, service: Service, chooser: Chooser, advance: Callable[[int], None] | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Models and latencies, both of shape `(F, K)`."""
    fleets = ParallelFleets(service.fleet, service.latency, runs.workloads)
    task, arrived_at = runs.task, np.stack([workload.arrived_at for workload in runs.workloads])
    model = np.zeros(task.shape, dtype=np.int64)
    for index in range(task.shape[1]):
        fleets.advance(index)
        seen = Seen(
            task[:, index], fleets.batch_sizes, runs.rates_per_s[:, index], arrived_at[:, index], fleets
        )
        model[:, index] = chooser.choose_many(seen)
        fleets.route(index, model[:, index])
        if advance is not None and index % 500 == 499:
            advance(500)
    fleets.drain()
    if advance is not None:
        advance(task.shape[1] % 500)
    rows, columns = np.indices(task.shape)
    return model, fleets.latency_ms_per_token(rows, columns)
