"""Thresholds found by search in the simulator: the strongest policy that learns nothing.

First each band of arrival rates has a search of its own, at steady rates, by CMA-ES (Hansen, arXiv
1604.00772, with its default constants) from several starts. What is best at one steady rate breaks
where the rate is taken for another, or a queue is left over from a burst: so a band is tuned somewhat
beyond its edges, and its workloads begin with a burst. Then each is searched again with all others in
place, as the router will see it: by estimated rates, which jump. The workloads are the same for every
candidate.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s
from besteffort.evolution import maximise
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.progress import Progress, Silent
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.simulator import ThresholdTrials
from besteffort.thresholds import ThresholdTable, smoothed_rates_per_s
from besteffort.workload import stable, unpredictable_1, unpredictable_2

# The paper's rates per second, times the fleet's `rate_scale`. Narrow where queues begin to build up;
# the first band reaches down to 0, the last one up without end.
EDGES_PER_S = (1.5, 3.0, 5.0, 7.0, 9.0, 12.0, 15.0, 18.0, 22.0, 26.0, 30.0, 34.0, 38.0, 42.0, 46.0)
LOWEST_PER_S, HIGHEST_PER_S = 0.25, 50.0
OVERLAP = 1.25  # a band is tuned from its lower edge over this to its upper edge times this
BURST_SHARE = 0.15  # of the requests, at twice the rate but no faster than the highest
SMOOTHINGS = (1, 4, 8, 16, 32)


@dataclass(frozen=True)
class Effort:
    """How long the search takes."""

    num_generations: int = 60
    num_rates: int = 5  # in each band, one workload each
    num_requests: int = 1200  # of a workload that a candidate is tried on
    num_requests_held_out: int = 4000  # of one that decides between the results of several starts
    num_generations_together: int = 25  # for each band, with all others in place
    num_unpredictable: int = 3  # workloads of each kind that all bands are tuned on together
    num_requests_unpredictable: int = 4000


def after_a_burst(requests: Requests, faster: float) -> Requests:
    """The same requests, the first of them arriving `faster` times as fast."""
    gaps_s = np.diff(requests.arrived_at, prepend=0.0)
    gaps_s[: int(BURST_SHARE * len(requests))] /= faster
    return replace(requests, arrived_at=np.cumsum(gaps_s))


@dataclass(frozen=True)
class ThresholdService:
    fleet: Fleet
    latency: Latency
    values: NDArray[np.float64]  # (T, M)

    def trials(
        self, rates: NDArray[np.float64], num_requests: int, seed: int
    ) -> tuple[ThresholdTrials, NDArray[np.int64]]:
        """A steady workload after a burst for each of the paper's rates, and their tasks `(F, K)`."""
        rngs = np.random.default_rng(seed).spawn(len(rates))
        workloads = [
            after_a_burst(
                stable(self.fleet, rng, float(rate), num_requests=num_requests),
                float(np.clip(HIGHEST_PER_S / rate, 1.0, 2.0)),
            )
            for rng, rate in zip(rngs, rates, strict=True)
        ]
        tasks = np.stack([workload.task for workload in workloads])
        return ThresholdTrials(workloads, self.fleet, self.latency, self.values), tasks

    def highest(self, tasks: NDArray[np.int64]) -> float:
        """Mean worth of these requests if each got its best model in time."""
        return float(self.values.max(axis=1)[tasks].mean())

    @property
    def caps(self) -> NDArray[np.float64]:
        """The most that a batch of the models 1 to M - 1 can hold, shape `(M - 1,)`."""
        return np.array([float(model.max_num_seqs) for model in self.fleet.models[1:]])

    @property
    def statics(self) -> list[NDArray[np.float64]]:
        """One point for each model, at which it takes nearly everything."""
        models = np.arange(1, len(self.fleet.models))
        always = np.log2(1 + self.caps)
        rows = [np.where(models == model, always, -0.5) for model in range(len(self.fleet.models))]
        return [np.tile(row, len(self.fleet.tasks)) for row in rows]

    def thresholds(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        """Batch sizes on a logarithmic scale; below 0 the model is never used. Shape `(T, M - 1)`."""
        point = point.reshape(len(self.fleet.tasks), -1)
        return np.where(point < 0, -1.0, np.minimum(np.exp2(np.minimum(point, 60.0)) - 1, self.caps))


class Band:
    """The workloads of one band, and what a vector of thresholds reaches on them."""

    def __init__(self, service: ThresholdService, low: float, high: float, effort: Effort, seed: int) -> None:
        self._service = service
        self.statics = service.statics
        rates = np.geomspace(low / OVERLAP, min(high * OVERLAP, HIGHEST_PER_S), effort.num_rates)
        self._trials, self._tasks = service.trials(rates, effort.num_requests, seed)
        self._held_out = service.trials(rates, effort.num_requests_held_out, seed + 1)
        self.highest = service.highest(self._tasks)

    def worth(self, point: NDArray[np.float64]) -> float:
        return float(self._trials.worth(self._tasks, self._service.thresholds(point)).mean())

    def worth_held_out(self, point: NDArray[np.float64]) -> float:
        trials, tasks = self._held_out
        return float(trials.worth(tasks, self._service.thresholds(point)).mean())


@dataclass(frozen=True)
class Tuned:
    table: ThresholdTable
    worth_by_band: list[float]  # on held-out workloads, with the true rate known, band by band
    worth_before: float  # of those together, on workloads with estimated rates
    worth: float  # and of the table


def tune_thresholds(
    fleet: Fleet,
    latency: Latency,
    rewards: Rewards,
    *,
    seed: int = 0,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Thresholds for each task and band of arrival rates, the best that the search finds.

    What they are tuned for is the mean reward, a task's weight included (weights of 1: `performance`).
    """
    effort, progress = effort or Effort(), progress or Silent()
    weights = np.array([task.weight for task in fleet.tasks])
    weights = weights / (weights @ np.array(fleet.task_shares))
    service = ThresholdService(fleet, latency, rewards.relative * weights[:, None])
    edges = (LOWEST_PER_S, *EDGES_PER_S, HIGHEST_PER_S)
    num_bands = len(edges) - 1
    points: list[NDArray[np.float64]] = []
    reached = []
    with progress.bar("tune", 2 * num_bands) as bar:
        for band, (low, high) in enumerate(itertools.pairwise(edges)):
            of_band = Band(service, low, high, effort, seed=1_000_000 + 1000 * seed + 2 * band)
            point, worth = tune_band(of_band, points, effort, np.random.default_rng([seed, band]))
            points.append(point)
            reached.append(worth)
            bar.describe(f"{worth:.4f} at {low * fleet.rate_scale:g} to {high * fleet.rate_scale:g}/s")
            bar.advance()
        together = _Together(service, effort, np.random.default_rng([seed, num_bands]))
        before = together.worth(points)
        rngs = np.random.default_rng([seed, num_bands + 1]).spawn(num_bands)
        for band in reversed(range(num_bands)):
            points[band], worth = together.search(points, band, effort, rngs[band])
            bar.describe(f"{worth:.4f} together, {before:.4f} before")
            bar.advance()
    num_smoothed, worth = together.best_smoothing(points)
    table = replace(together.table(points), num_smoothed=num_smoothed)
    return Tuned(table, reached, before, worth)


def tune_band(
    band: Band, below: list[NDArray[np.float64]], effort: Effort, rng: np.random.Generator
) -> tuple[NDArray[np.float64], float]:
    """The best of several searches: from the band below, from the best static model, from the middle."""
    statics = band.statics
    best_static = max(statics, key=band.worth)
    starts = [best_static, np.full(len(best_static), 1.5), *below[-1:]]
    found = list(statics)
    for start, own_rng in zip(starts, rng.spawn(len(starts)), strict=True):
        if len(start):  # a fleet of one model has no thresholds
            best, _ = maximise(band.worth, start, effort.num_generations, own_rng, highest=band.highest)
            found.append(best)
    worth = [band.worth_held_out(point) for point in found]
    return found[int(np.argmax(worth))], max(worth)


class _Together:
    """All bands at once, on workloads whose rate is only estimated: stable ones and unpredictable ones."""

    def __init__(self, service: ThresholdService, effort: Effort, rng: np.random.Generator) -> None:
        self._service, fleet = service, service.fleet
        stable_rng, *other_rngs = rng.spawn(1 + 2 * effort.num_unpredictable)
        edges = (LOWEST_PER_S, *EDGES_PER_S, HIGHEST_PER_S)
        rates = np.sqrt(np.array(edges[:-1]) * np.array(edges[1:]))
        steady = [
            stable(fleet, own_rng, float(rate), num_requests=effort.num_requests)
            for own_rng, rate in zip(stable_rng.spawn(len(rates)), rates, strict=True)
        ]
        jumping = [
            generate(fleet, own_rng, effort.num_requests_unpredictable)
            for own_rng, generate in zip(
                other_rngs, (unpredictable_1, unpredictable_2) * effort.num_unpredictable, strict=True
            )
        ]
        self._workloads = (steady, jumping)
        self._trials = [ThresholdTrials(w, fleet, service.latency, service.values) for w in self._workloads]
        self.smooth(SMOOTHINGS[2])

    def smooth(self, num_arrivals: int) -> None:
        """From now on the rates are smoothed over so many arrivals."""
        self._rates = [
            [smoothed_rates_per_s(arrival_rates_per_s(w.arrived_at), num_arrivals) for w in workloads]
            for workloads in self._workloads
        ]
        self._rows: list[NDArray[np.int64]] = []

    def table(self, points: list[NDArray[np.float64]]) -> ThresholdTable:
        edges = self._service.fleet.rate_scale * np.array(EDGES_PER_S)
        return ThresholdTable(edges, np.stack([self._service.thresholds(p) for p in points], axis=1))

    def worth(self, points: list[NDArray[np.float64]]) -> float:
        """Mean of the stable and the unpredictable workloads, either kind with the same weight."""
        table = self.table(points)
        if not self._rows:
            self._rows = [
                np.stack([table.row_of(w.task, seen) for w, seen in zip(workloads, rates, strict=True)])
                for workloads, rates in zip(self._workloads, self._rates, strict=True)
            ]
        worth = [trials.worth(row, table.rows).mean()
                 for trials, row in zip(self._trials, self._rows, strict=True)]  # fmt: skip
        return float(np.mean(worth))

    def search(
        self, points: list[NDArray[np.float64]], band: int, effort: Effort, rng: np.random.Generator
    ) -> tuple[NDArray[np.float64], float]:
        """The best point for one band while the others stay."""

        def worth(point: NDArray[np.float64]) -> float:
            return self.worth([*points[:band], point, *points[band + 1 :]])

        # Beside its own: what the next bands do, which is safer, since they are made for more.
        starts = [points[band], *points[band + 1 : band + 2], *self._service.statics]
        start = max(starts, key=worth)
        if not len(start):
            return start, worth(start)
        return maximise(worth, start, effort.num_generations_together, rng)

    def best_smoothing(self, points: list[NDArray[np.float64]]) -> tuple[int, float]:
        reached = {}
        for num_arrivals in SMOOTHINGS:
            self.smooth(num_arrivals)
            reached[num_arrivals] = self.worth(points)
        best = max(reached, key=lambda num_arrivals: reached[num_arrivals])
        return best, reached[best]
