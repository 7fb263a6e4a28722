"""How well a trace could have been served: a search that knows all arrivals and all lengths.

First thresholds are fitted to this very trace, that depend on how much work a request is, which no
router can know: a short answer is worth as much as a long one. Then the plan that they make, the model
of each request, is improved by trials at one request after the other: another model for it, for a later
one too, for all like it, or the thresholds' choice for those that follow. A trial is simulated from that
very moment, under the arrivals that really come, and judged by the requests of a few requests'
lives. What it finds is a bound from below on what is possible, not the optimum.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.deadline import deadline_weight
from besteffort.evolution import maximise
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.progress import Progress, Silent
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.simulator import PlanSearch, ThresholdTrials, simulate_choices
from besteffort.thresholds import ThresholdTable

FITTING_SHARE = 0.3  # of the budget at most, for thresholds of this trace
NUM_GENERATIONS = 40  # of the search for those of one band
NUM_BANDS = 6  # of arrival rates, if there is no table that says
NUM_LENGTHS = 8  # classes of as many requests each
NUM_AROUND = 20  # requests before and after, by which the rate at one is told
NEVER = -0.5  # where a model that a table never uses begins
NUM_TRIALS = 5  # for each request and visit, beside the other models for it alone
NUM_REQUESTS_AT_ONCE = 100  # between looks at the clock
PATIENCE = 6  # visits of the whole trace in a row that find nothing better
FIRST_HORIZON, LONGEST_HORIZON = 2.0, 8.0  # lives of a request


@dataclass(frozen=True)
class Hindsight:
    """The best plan found, and how the search came to it."""

    models: NDArray[np.int64]  # (N,)
    performance: float
    num_sweeps: int  # over the whole trace, the last one maybe cut short
    curve: list[tuple[float, float]]  # s since the start, performance: starts, fitted thresholds, sweeps


def hindsight(
    requests: Requests,
    fleet: Fleet,
    latency: Latency,
    rewards: Rewards,
    starts: Sequence[NDArray[np.int64]],
    rng: np.random.Generator,
    *,
    table: ThresholdTable | None = None,
    budget_s: float = 60.0,
    max_sweeps: int | None = None,
    progress: Progress | None = None,
) -> Hindsight:
    """Search for the models that serve a trace best, from the best of the `starts`, each `(N,)`.

    The search ends with the budget, after `max_sweeps`, or when it finds nothing more. Without a
    `table` of tuned thresholds it uses those under which each model just makes its deadline. The
    result depends on the machine only if the budget ends it.
    """
    search = _Search(requests, fleet, latency, rewards, table)
    began_at = time.monotonic()
    plans = [np.asarray(start, dtype=np.int64) for start in starts]
    reached = [search.performance(plan) for plan in plans]
    best, best_performance = plans[int(np.argmax(reached))], max(reached)
    curve, num_sweeps = [(0.0, best_performance)], 0
    if best_performance < search.highest - 1e-12 and len(fleet.models) > 1:
        plan = search.fit(rng, began_at + FITTING_SHARE * budget_s)
        performance = search.performance(plan)
        curve.append((time.monotonic() - began_at, performance))
        if performance > best_performance:
            best, best_performance = plan, performance
    horizon, num_in_vain, plan = FIRST_HORIZON, 0, best
    with (progress or Silent()).bar("hindsight", round(budget_s)) as bar:
        while best_performance < search.highest - 1e-12 and num_in_vain < PATIENCE:
            if num_sweeps == max_sweeps or time.monotonic() - began_at >= budget_s:
                break
            before_s = time.monotonic() - began_at
            plan = search.sweep(plan, horizon, rng, until=began_at + budget_s)
            performance, elapsed_s = search.performance(plan), time.monotonic() - began_at
            curve.append((elapsed_s, performance))
            num_sweeps += 1
            num_in_vain = 0 if performance > best_performance + 1e-12 else num_in_vain + 1
            if performance >= best_performance:
                best, best_performance = plan, performance
            else:  # what looked better has spoiled what came later: look further ahead
                plan, horizon = best, min(1.5 * horizon, LONGEST_HORIZON)
            bar.describe(f"performance {best_performance:.4f}, from {curve[0][1]:.4f}")
            bar.advance(round(elapsed_s) - round(before_s))
    return Hindsight(best, best_performance, num_sweeps, curve)


class _Search:
    def __init__(
        self,
        requests: Requests,
        fleet: Fleet,
        latency: Latency,
        rewards: Rewards,
        table: ThresholdTable | None,
    ) -> None:
        self._requests, self._fleet, self._latency, self._rewards = requests, fleet, latency, rewards
        self._thresholds = _Fitted(requests, fleet, table or _plain_thresholds(fleet, latency))
        self._trials = ThresholdTrials([requests], fleet, latency, rewards.relative)
        deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
        self._deadlines = deadlines[requests.task]
        # Of one that just makes its deadline; nearly all are shorter.
        self._life_s = float(np.quantile(self._deadlines * requests.num_output_tokens, 0.9)) / 1000.0
        self._plans = self._new_plans()

    def _new_plans(self) -> PlanSearch:
        thresholds, fleet = self._thresholds, self._fleet
        values = self._rewards.relative
        return PlanSearch(
            self._requests, fleet, self._latency, values, thresholds.row, thresholds.rows(thresholds.point)
        )

    def fit(self, rng: np.random.Generator, until: float) -> NDArray[np.int64]:
        """Fit the thresholds to the trace, all at once and then band by band; returns their plan."""
        fitted = self._thresholds

        def worth(point: NDArray[np.float64]) -> float:
            return float(self._trials.worth(fitted.row[None], fitted.rows(point))[0])

        for part in fitted.parts:

            def worth_of_part(change: NDArray[np.float64], part: NDArray[np.int64] = part) -> float:
                return worth(fitted.changed(part, change))

            start = np.zeros(int(part.max()) + 1)
            change, _ = maximise(
                worth_of_part, start, NUM_GENERATIONS, rng, step=0.5, highest=self.highest, until=until
            )
            fitted.point = fitted.changed(part, change)
        worth(fitted.point)
        self._plans = self._new_plans()
        return np.asarray(self._trials.models[0])

    @property
    def highest(self) -> float:
        """Mean of what the best model is worth in time: nothing can be better."""
        return float(self._rewards.relative.max(axis=1)[self._requests.task].mean())

    def performance(self, models: NDArray[np.int64]) -> float:
        outcomes = simulate_choices(self._requests, self._fleet, self._latency, models)
        weight = deadline_weight(outcomes.latency_ms_per_token, self._deadlines, self._fleet.deadline_kind)
        return float(np.mean(weight * self._rewards.relative[self._requests.task, models]))

    def sweep(
        self, plan: NDArray[np.int64], horizon: float, rng: np.random.Generator, until: float
    ) -> NDArray[np.int64]:
        """Visit every request once, or as many as there is time for."""
        self._plans.begin(plan, horizon * self._life_s)
        num_trials = len(self._fleet.models) + NUM_TRIALS
        for first in range(0, len(plan), NUM_REQUESTS_AT_ONCE):
            num_requests = min(NUM_REQUESTS_AT_ONCE, len(plan) - first)
            self._plans.improve(rng.random((num_requests, num_trials, 4)))
            if time.monotonic() >= until:
                break
        return self._plans.plan


class _Fitted:
    """Thresholds on a logarithmic scale by task, band of rates and model, and how they fall with work.

    `point` has shape `(2, T, B, M - 1)`: the threshold of a request of middling length, and how much
    less it is for the longest, and more for the shortest.
    """

    def __init__(self, requests: Requests, fleet: Fleet, table: ThresholdTable) -> None:
        rates = _rates_around(requests.arrived_at)
        edges = table.rate_edges_per_s if table.num_bands > 1 else np.unique(
            np.quantile(rates, np.arange(1, NUM_BANDS) / NUM_BANDS)
        )  # fmt: skip
        lowest = np.concatenate([[0.0], edges])
        in_table = table.max_batch_size[:, table.bands(lowest)]
        level = np.where(in_table < 0, NEVER, np.log2(1 + np.maximum(in_table, 0)))
        self.point = np.stack([level, np.zeros_like(level)])
        self._caps = np.array([float(model.max_num_seqs) for model in fleet.models[1:]])
        band = np.searchsorted(edges, rates, side="right")
        num_output_tokens = requests.num_output_tokens
        inner = np.quantile(num_output_tokens, np.arange(1, NUM_LENGTHS) / NUM_LENGTHS)
        length = np.searchsorted(inner, num_output_tokens, side="right")
        self.row = (requests.task * len(lowest) + band) * NUM_LENGTHS + length  # (N,) into `rows`
        self._num_in_band = np.bincount(band, minlength=len(lowest))

    def rows(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        """Thresholds as batch sizes, shape `(T * B * lengths, M - 1)`."""
        level, slope = point[:, :, :, None]
        length = np.linspace(-1.0, 1.0, NUM_LENGTHS)[:, None]
        exponent = level - slope * length  # (T, B, lengths, M - 1)
        batch = np.where(exponent < 0, -1.0, np.exp2(np.minimum(exponent, 60.0)) - 1)
        return np.ascontiguousarray(np.minimum(batch, self._caps).reshape(-1, len(self._caps)))

    @property
    def parts(self) -> list[NDArray[np.int64]]:
        """What to change together, as indices of a change in the form of `point`; -1: stays as it is.

        First the same in every band, then each band by itself, the busiest first.
        """
        _, num_tasks, num_bands, num_models = self.point.shape
        everywhere = np.arange(2 * num_tasks * num_models).reshape(2, num_tasks, 1, num_models)
        parts = [np.broadcast_to(everywhere, self.point.shape)]
        for band in np.argsort(-self._num_in_band, kind="stable"):
            part = np.full(self.point.shape, -1)
            part[:, :, band : band + 1] = everywhere
            parts += [part] if self._num_in_band[band] else []
        return parts if num_bands > 1 else parts[:1]

    def changed(self, part: NDArray[np.int64], change: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(self.point + np.where(part >= 0, change[part], 0.0))


def _rates_around(arrived_at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Arrivals per second just before and after each request, shape `(N,)`."""
    index = np.arange(len(arrived_at))
    first = np.maximum(index - NUM_AROUND, 0)
    last = np.minimum(index + NUM_AROUND, len(index) - 1)
    return np.asarray((last - first) / np.maximum(arrived_at[last] - arrived_at[first], 1e-9))


def _plain_thresholds(fleet: Fleet, latency: Latency) -> ThresholdTable:
    """The largest batch at which a model that is alone on its device still makes each deadline."""
    rows = [
        [np.sum(steps_ms[1 : model.max_num_seqs + 1] <= task.deadline_ms_per_token) - 1.0
         for model, steps_ms in zip(fleet.models[1:], latency.step_table_ms(1024)[1:], strict=True)]
        for task in fleet.tasks
    ]  # fmt: skip
    per_task = np.array(rows, dtype=np.float64).reshape(len(fleet.tasks), 1, -1)
    return ThresholdTable(np.empty(0), per_task)
