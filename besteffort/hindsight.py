"""How well a trace could have been served: a search that knows all arrivals and all lengths.

It improves a plan, the model of each request, by trials at one request after the other: another model
for it, for a later one too, or for all that follow, which then go by thresholds. A trial is
simulated from that very moment, under the arrivals that really come, and judged by the requests of
about one request's life. What it finds is a bound from below on what is possible, not the optimum.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s
from besteffort.deadline import deadline_weight
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.progress import Progress, Silent
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.simulator import PlanSearch, simulate_choices
from besteffort.thresholds import ThresholdTable, smoothed_rates_per_s

NUM_TRIALS = 5  # for each request and visit, beside the other models for it alone
NUM_REQUESTS_AT_ONCE = 100  # between looks at the clock
PATIENCE = 6  # visits of the whole trace in a row that find nothing better
LONGEST_HORIZON = 4.0  # lives of a request


@dataclass(frozen=True)
class Hindsight:
    """The best plan found, and how the search came to it."""

    models: NDArray[np.int64]  # (N,)
    performance: float
    num_sweeps: int  # over the whole trace, the last one maybe cut short
    curve: list[tuple[float, float]]  # seconds since the start, performance; at the start and each sweep


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
    best, best_performance = max(
        ((np.asarray(start, dtype=np.int64), search.performance(start)) for start in starts),
        key=lambda pair: pair[1],
    )
    curve = [(0.0, best_performance)]
    horizon, num_in_vain, plan = 1.0, 0, best
    with (progress or Silent()).bar("hindsight", round(budget_s)) as bar:
        while best_performance < search.highest - 1e-12 and num_in_vain < PATIENCE:
            if len(curve) - 1 == max_sweeps or time.monotonic() - began_at >= budget_s:
                break
            before_s = time.monotonic() - began_at
            plan = search.sweep(plan, horizon, rng, until=began_at + budget_s)
            performance, elapsed_s = search.performance(plan), time.monotonic() - began_at
            curve.append((elapsed_s, performance))
            num_in_vain = 0 if performance > best_performance + 1e-12 else num_in_vain + 1
            if performance >= best_performance:
                best, best_performance = plan, performance
            else:  # what looked better has spoiled what came later: look further ahead
                plan, horizon = best, min(1.5 * horizon, LONGEST_HORIZON)
            bar.describe(f"performance {best_performance:.4f}, from {curve[0][1]:.4f}")
            bar.advance(round(elapsed_s) - round(before_s))
    return Hindsight(best, best_performance, len(curve) - 1, curve)


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
        table = table or _plain_thresholds(fleet, latency)
        rates = smoothed_rates_per_s(arrival_rates_per_s(requests.arrived_at), table.num_smoothed)
        self._plans = PlanSearch(requests, fleet, latency, rewards.relative, table, rates)
        deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
        self._deadlines = deadlines[requests.task]
        # Of one that just makes its deadline; nearly all are shorter.
        self._life_s = float(np.quantile(self._deadlines * requests.num_output_tokens, 0.9)) / 1000.0

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


def _plain_thresholds(fleet: Fleet, latency: Latency) -> ThresholdTable:
    """The largest batch at which a model that is alone on its device still makes each deadline."""
    rows = [
        [np.sum(steps_ms[1 : model.max_num_seqs + 1] <= task.deadline_ms_per_token) - 1.0
         for model, steps_ms in zip(fleet.models[1:], latency.step_table_ms(1024)[1:], strict=True)]
        for task in fleet.tasks
    ]  # fmt: skip
    per_task = np.array(rows, dtype=np.float64).reshape(len(fleet.tasks), 1, -1)
    return ThresholdTable(np.empty(0), per_task)
