"""What curves of thresholds reach on whole workloads, simulated side by side."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import recent_rates_per_s
from besteffort.direct.curves import KNOTS_PER_S, ThresholdCurves, log_rate
from besteffort.direct.recipe import DirectRecipe
from besteffort.environment import Service
from besteffort.observation import FleetEncoding
from besteffort.request import Requests
from besteffort.simulator import ThresholdTrials
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import stable, unpredictable_1, unpredictable_2

BUSY_FROM_PER_S = 9.0
SHORT_RATES_PER_S = (2.0, 3.0, 4.0)
SHORT_WEIGHT, UNPREDICTABLE_WEIGHT = 3.0, 1.5  # of each kind, beside 1 for all long steady ones


@dataclass(frozen=True)
class Group:
    """Workloads of one length, and how much their mean counts."""

    workloads: list[Requests]
    weight: float


def draw_groups(
    workloads: TrainingWorkloads, recipe: DirectRecipe, rng: np.random.Generator, *, times: int = 1
) -> list[Group]:
    """Steady ones at every knot, short ones, unpredictable ones of either kind, and pieces of the traces.

    `times` as many of the random ones as the recipe says, with the same weights. The short ones weigh much:
    what a calm fleet gives away is little, and shall be none.
    """
    steady, short, piece_rng, *others = rng.spawn(3 + 2 * times * recipe.num_unpredictable)

    def draw(own: np.random.Generator, rate: float, num_requests: int) -> Requests:
        return stable(workloads.mixed(own), own, rate, num_requests=num_requests)

    groups = []
    for busy in (False, True):
        rates = times * [rate for rate in KNOTS_PER_S if (rate >= BUSY_FROM_PER_S) is busy]
        num_requests = recipe.busy_num_requests if busy else recipe.calm_num_requests
        drawn = [draw(own, rate, num_requests)
                 for own, rate in zip(steady.spawn(len(rates)), rates, strict=True)]  # fmt: skip
        groups.append(Group(drawn, len(rates) / times / len(KNOTS_PER_S)))
    rates = list(SHORT_RATES_PER_S * times * recipe.num_short)
    drawn = [draw(own, rate, recipe.short_num_requests)
             for own, rate in zip(short.spawn(len(rates)), rates, strict=True)]  # fmt: skip
    groups.append(Group(drawn, SHORT_WEIGHT))
    for nth, generate in enumerate((unpredictable_1, unpredictable_2)):
        rngs = others[nth::2]
        drawn = [generate(workloads.mixed(own), own, recipe.unpredictable_num_requests) for own in rngs]
        groups.append(Group(drawn, UNPREDICTABLE_WEIGHT))
    if workloads.traces:
        parts = [trace.trained_on for trace in workloads.traces]
        pieces = workloads.pieces(parts, recipe.unpredictable_num_requests, piece_rng)
        groups.append(Group(pieces, sum(group.weight for group in groups)))
    return groups


class Objective:
    """The same workloads for all curves."""

    def __init__(
        self, groups: Sequence[Group], service: Service, encoding: FleetEncoding, num_threads: int
    ) -> None:
        caps = np.array([float(model.max_num_seqs) for model in service.fleet.models[1:]])
        self._caps, self._num_threads = caps, num_threads
        self._parts = [
            _Part(Group(half, group.weight * len(half) / len(group.workloads)), service, encoding)
            for group in groups
            for half in _halves(group.workloads)
        ]
        self._total = sum(part.weight for part in self._parts)

    def worth(self, curves: ThresholdCurves) -> float:
        """Mean worth of a request, by the groups' weights."""
        clipped = curves.clipped(self._caps)
        rows = clipped.rows()

        def one(part: _Part) -> float:
            return part.weight * part.worth(clipped, rows)

        with ThreadPoolExecutor(self._num_threads) as pool:
            return float(sum(pool.map(one, self._parts))) / self._total


def _halves(workloads: list[Requests]) -> list[list[Requests]]:
    """So that two threads have about as much to do."""
    middle = (len(workloads) + 1) // 2
    return [half for half in (workloads[:middle], workloads[middle:]) if half]


class _Part:
    def __init__(self, group: Group, service: Service, encoding: FleetEncoding) -> None:
        self.weight = group.weight
        self._trials = ThresholdTrials(group.workloads, service.fleet, service.latency, service.values)
        self._task = np.stack([workload.task for workload in group.workloads])
        self._num_tasks = len(service.fleet.tasks)
        scale = service.fleet.rate_scale
        told = [recent_rates_per_s(w.arrived_at, encoding.spans_s) / scale for w in group.workloads]
        self._log_rates = np.moveaxis(log_rate(np.stack(told)), 2, 0)  # (S, F, K)
        self._bins_of: tuple[bytes, NDArray[np.int64]] | None = None

    def worth(self, curves: ThresholdCurves, rows: NDArray[np.float64]) -> float:
        return float(self._trials.worth(self._rows_of(curves), rows).mean())

    def _rows_of(self, curves: ThresholdCurves) -> NDArray[np.int64]:
        """The row of each request, as it was the last time unless the looks for calm have changed."""
        key = curves.calm_below.tobytes()
        if self._bins_of is None or self._bins_of[0] != key:
            short, glance, long = self._log_rates
            rows = curves.bins(short, (long, glance)) * self._num_tasks + self._task
            self._bins_of = key, np.ascontiguousarray(rows)
        return self._bins_of[1]
