"""The paper's experiments (Sec. 4, App. C to F), run in the simulator.

Every router sees the same arrivals. A *way* is one of them by name: `policy` is the trained one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from besteffort.artifacts.policy_file import TrainedPolicy
from besteffort.environment import Service
from besteffort.fleet import Fleet
from besteffort.hindsight import hindsight
from besteffort.latency import Latency
from besteffort.paper import published
from besteffort.paper.routing import (
    Chooser,
    GreedyMany,
    LearnedMany,
    StaticMany,
    ThresholdsMany,
    runs_of,
    serve_many,
)
from besteffort.paper.variants import DEADLINES, HARD, SOFT, doubled, variants, with_only
from besteffort.progress import Bar, Progress
from besteffort.report.summary import WINDOW_SIZE
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.simulator import simulate_choices
from besteffort.thresholds import ThresholdTable
from besteffort.window_bound import window_bound
from besteffort.workload import STABLE_DURATION_S, generate_workload, stable

POLICY, GREEDY, THRESHOLDS, HINDSIGHT = "policy", "greedy", "thresholds", "hindsight"
# No training draws from these: the runs are held out.
STABLE_SEED, UNPREDICTABLE_SEED, HINDSIGHT_SEED, DUEL_SEED = 2401, 7886, 93, 300
RATES_PER_S = (0.25, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48)

MIN_NUM_RUNS = 5


@dataclass(frozen=True)
class Effort:
    """How much of each experiment is run. Rates are the paper's, before the fleet's `rate_scale`."""

    num_seeds: int = 3  # trials; plots show one standard deviation over them (Sec. 4.1)
    rates_per_s: tuple[float, ...] = RATES_PER_S
    num_runs: int = 20  # of 40 s at each rate, for each seed; fewer where these many requests are reached
    num_requests_stable: int = 8000  # at each rate, for each seed
    num_requests: int = 10_000  # of an unpredictable workload
    hindsight_s: float = 20.0  # of search for each unpredictable workload; 0: no regret
    num_duel_traces: int = 300  # further ones of each unpredictable workload; 0: no duels


@dataclass(frozen=True)
class Curves:
    """How one way of routing fares at `R` steady rates, for each of `S` seeds."""

    performance: NDArray[np.float64]  # (S, R)
    deadline_met: NDArray[np.float64]  # (S, R) share
    selection: NDArray[np.float64]  # (S, R, M) share of the requests
    task_selection: NDArray[np.float64]  # (S, R, T, M) share of the task's requests; NaN if it had none


@dataclass(frozen=True)
class Sweep:
    """Stable workloads from calm to overload (Sec. 4.3)."""

    fleet: Fleet
    rates_per_s: NDArray[np.float64]  # (R,)
    curves: Mapping[str, Curves]  # by way


@dataclass(frozen=True)
class Burst:
    """An unpredictable workload (Sec. 4.4), a trace of `K` requests for each of `S` seeds."""

    fleet: Fleet
    traces: list[Requests]
    rates_per_s: NDArray[np.float64]  # (S, K) as estimated
    performance: Mapping[str, NDArray[np.float64]]  # (S, K) by way
    model: Mapping[str, NDArray[np.int64]]  # (S, K) by way
    # (S,) by threshold: windows that reach it, at most, under any policy
    most_windows: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Duel:
    """Routers on many more traces of an unpredictable workload than those whose plots are drawn.

    Routers differ by less than three traces can tell; all of them serve the same ones.
    """

    performance: Mapping[str, NDArray[np.float64]]  # (N,) mean of each trace, by way


@dataclass(frozen=True)
class Experiments:
    hard: Sweep
    soft: Sweep
    deadlines: Sweep
    alone: Mapping[str, Sweep]  # by task
    unpredictable: Mapping[str, Burst]  # by workload
    two_tasks: Burst
    hard_8: Sweep  # the largest model alone on twice the GPUs
    soft_8: Sweep
    unpredictable_8: Burst
    duels: Mapping[str, Duel] = field(default_factory=dict)  # by workload


@dataclass(frozen=True)
class Inputs:
    fleet: Fleet
    latency: Latency
    rewards: Rewards
    policies: Mapping[str, TrainedPolicy]  # by variant
    table: ThresholdTable | None = None  # tuned for hard deadlines

    def service(self, fleet: Fleet) -> Service:
        return Service(fleet, self.latency, self.rewards)


Ways = Mapping[str, Callable[[], Chooser]]


def static_name(fleet: Fleet, model: int) -> str:
    return f"static {fleet.model_names[model]}"


def run_experiments(inputs: Inputs, effort: Effort, progress: Progress) -> Experiments:
    """All of them; minutes at full effort, and the same numbers each time, but for `hindsight`."""
    fleets = variants(inputs.fleet)
    with progress.bar("Simulating", _num_arrivals(inputs, effort)) as bar:
        run = _Runner(inputs, effort, bar)
        hard, ways = fleets[HARD], run.ways(HARD)
        large = {static_name(hard, -1): ways[static_name(hard, -1)]}
        soft_ways = run.ways(SOFT)
        unpredictable = {name: run.burst(name, hard, ways) for name in ("unpredictable-1", "unpredictable-2")}
        experiments = Experiments(
            hard=run.sweep("stable, hard", hard, ways),
            soft=run.sweep("stable, soft", fleets[SOFT], soft_ways),
            deadlines=run.sweep("other deadlines", fleets[DEADLINES], run.ways(DEADLINES)),
            alone={
                task: run.sweep(f"{task} alone", with_only(hard, [task]), ways) for task in hard.task_names
            },
            unpredictable=unpredictable,
            two_tasks=run.burst(
                "unpredictable-1", with_only(fleets[SOFT], published.SHIFTED_TASKS), soft_ways
            ),
            hard_8=run.sweep("twice the GPUs", doubled(hard), large),
            soft_8=run.sweep("twice the GPUs, soft", doubled(fleets[SOFT]), large),
            unpredictable_8=run.burst("unpredictable-1", doubled(hard), large),
            duels={name: run.duel(name, hard, ways) for name in unpredictable if effort.num_duel_traces},
        )
    if not effort.hindsight_s:
        return experiments
    return _with_hindsight(experiments, inputs, effort, progress)


def _num_arrivals(inputs: Inputs, effort: Effort) -> int:
    """About how often a way is asked, for all runs of a rate at once."""
    others = 2 + len(inputs.fleet.models)
    hard = others + (inputs.table is not None)
    sweep_ways = (1 + len(inputs.fleet.tasks)) * hard + 2 * others + 2
    burst_ways = 2 * hard + others + 1 + 2 * hard * bool(effort.num_duel_traces)
    arrivals = sum(round(rate * inputs.fleet.rate_scale * STABLE_DURATION_S) for rate in effort.rates_per_s)
    return sweep_ways * arrivals + burst_ways * effort.num_requests


@dataclass(frozen=True)
class _Runner:
    inputs: Inputs
    effort: Effort
    bar: Bar

    def ways(self, variant: str) -> Ways:
        """The policy of the variant, each model alone, and what else routes without learning."""
        inputs, fleet = self.inputs, variants(self.inputs.fleet)[variant]
        service, trained, table = inputs.service(fleet), inputs.policies[variant], inputs.table
        ways: dict[str, Callable[[], Chooser]] = {POLICY: lambda: LearnedMany(trained)}
        for model in range(len(fleet.models)):
            ways[static_name(fleet, model)] = _static(model)
        ways[GREEDY] = lambda: GreedyMany(service)
        if variant == HARD and table is not None:
            ways[THRESHOLDS] = lambda: ThresholdsMany(table)
        return ways

    def sweep(self, title: str, fleet: Fleet, ways: Ways) -> Sweep:
        points: dict[str, list[Curves]] = {name: [] for name in ways}
        for nth, rate_per_s in enumerate(self.effort.rates_per_s):
            self.bar.describe(f"{title}: {rate_per_s:g} requests/s")
            for name, point in self._at_rate(fleet, nth, rate_per_s, ways).items():
                points[name].append(point)
        curves = {name: _joined(of_way) for name, of_way in points.items()}
        return Sweep(fleet, np.array(self.effort.rates_per_s, dtype=np.float64), curves)

    def _at_rate(self, fleet: Fleet, nth: int, rate_per_s: float, ways: Ways) -> dict[str, Curves]:
        num_seeds, expected = self.effort.num_seeds, round(rate_per_s * fleet.rate_scale * STABLE_DURATION_S)
        enough = max(MIN_NUM_RUNS, -(-self.effort.num_requests_stable // max(1, expected)))
        num_runs = min(self.effort.num_runs, enough)
        rngs = [
            np.random.default_rng([STABLE_SEED, seed, nth, run])
            for seed in range(num_seeds)
            for run in range(num_runs)
        ]
        workloads = [stable(fleet, rng, rate_per_s) for rng in rngs]
        runs = runs_of(workloads, true_rate_per_s=rate_per_s * fleet.rate_scale)
        service = self.inputs.service(fleet)
        seed_of = np.repeat(np.arange(num_seeds), num_runs)
        points = {}
        for name, chooser in ways.items():
            served = serve_many(runs, service, chooser())
            self.bar.advance(expected)
            points[name] = _joined(
                [
                    _point(runs.task[which], served.model[which], served.performance[which],
                           served.deadline_met[which], fleet)
                    for which in (runs.counts & (seed_of == seed)[:, None] for seed in range(num_seeds))
                ],
                axis=0,
            )  # fmt: skip
        return points

    def burst(self, workload: str, fleet: Fleet, ways: Ways) -> Burst:
        self.bar.describe(f"{workload}, {fleet.deadline_kind}")
        traces = self._traces(workload, fleet, UNPREDICTABLE_SEED, self.effort.num_seeds)
        runs, service = runs_of(traces), self.inputs.service(fleet)
        served = {
            name: serve_many(runs, service, chooser(), self.bar.advance) for name, chooser in ways.items()
        }
        return Burst(
            fleet=fleet,
            traces=traces,
            rates_per_s=runs.rates_per_s,
            performance={name: of_way.performance for name, of_way in served.items()},
            model={name: of_way.model for name, of_way in served.items()},
        )

    def duel(self, workload: str, fleet: Fleet, ways: Ways) -> Duel:
        self.bar.describe(f"{workload}, {self.effort.num_duel_traces} traces")
        runs = runs_of(self._traces(workload, fleet, DUEL_SEED, self.effort.num_duel_traces))
        service = self.inputs.service(fleet)
        means = {
            name: serve_many(runs, service, chooser(), self.bar.advance).performance.mean(axis=1)
            for name, chooser in ways.items()
        }
        return Duel(means)

    def _traces(self, workload: str, fleet: Fleet, seed: int, num_traces: int) -> list[Requests]:
        rngs = [np.random.default_rng([seed, nth]) for nth in range(num_traces)]
        return [
            generate_workload(workload, fleet, rng, num_requests=self.effort.num_requests) for rng in rngs
        ]


def _static(model: int) -> Callable[[], Chooser]:
    return lambda: StaticMany(model)


def _point(
    task: NDArray[np.int64],  # all (N,)
    model: NDArray[np.int64],
    performance: NDArray[np.float64],
    deadline_met: NDArray[np.bool_],
    fleet: Fleet,
) -> Curves:
    """One seed at one rate; every array with axes of length 1 for them."""
    counts = np.zeros((len(fleet.tasks), len(fleet.models)))
    np.add.at(counts, (task, model), 1)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    return Curves(
        performance=np.array([[performance.mean()]]),
        deadline_met=np.array([[deadline_met.mean()]]),
        selection=(counts.sum(axis=0) / len(task))[None, None],
        task_selection=shares[None, None],
    )


def _joined(points: Sequence[Curves], axis: int = 1) -> Curves:
    """Seeds along axis 0, or rates along axis 1."""
    return Curves(
        performance=np.concatenate([point.performance for point in points], axis),
        deadline_met=np.concatenate([point.deadline_met for point in points], axis),
        selection=np.concatenate([point.selection for point in points], axis),
        task_selection=np.concatenate([point.task_selection for point in points], axis),
    )


def _with_hindsight(
    experiments: Experiments, inputs: Inputs, effort: Effort, progress: Progress
) -> Experiments:
    """With the best plan that a search which knows the whole trace finds as one more way, and with bounds."""
    num_searches = sum(len(burst.traces) for burst in experiments.unpredictable.values())
    with progress.bar("Searching in hindsight", num_searches) as bar:
        bursts = {
            name: _planned(name, burst, inputs, effort.hindsight_s, bar)
            for name, burst in experiments.unpredictable.items()
        }
    return replace(experiments, unpredictable=bursts)


def _planned(name: str, burst: Burst, inputs: Inputs, budget_s: float, bar: Bar) -> Burst:
    plans = []
    for seed in range(len(burst.traces)):
        bar.describe(f"{name}, seed {seed}")
        plans.append(_best_plan(burst, seed, inputs, budget_s))
        bar.advance()
    service = inputs.service(burst.fleet)
    worth = []
    for trace, plan in zip(burst.traces, plans, strict=True):
        outcomes = simulate_choices(trace, burst.fleet, inputs.latency, plan)
        worth.append(service.worth(trace.task, outcomes.model, outcomes.latency_ms_per_token))
    return replace(
        burst,
        performance={**burst.performance, HINDSIGHT: np.stack(worth)},
        model={**burst.model, HINDSIGHT: np.stack(plans)},
        most_windows={published.TOLD_THRESHOLD: _most_windows(burst, inputs)},
    )


def _most_windows(burst: Burst, inputs: Inputs) -> NDArray[np.int64]:
    """At the threshold that the paper's text is about, for each seed."""
    bounds = [
        window_bound(
            trace,
            burst.fleet,
            inputs.latency,
            inputs.rewards,
            threshold=float(published.TOLD_THRESHOLD),
            window_size=WINDOW_SIZE,
        )
        for trace in burst.traces
    ]
    return np.array(bounds, dtype=np.int64)


def _best_plan(burst: Burst, seed: int, inputs: Inputs, budget_s: float) -> NDArray[np.int64]:
    """Of a search that begins with what each way has done: the model of each request, (K,)."""
    return hindsight(
        burst.traces[seed],
        burst.fleet,
        inputs.latency,
        inputs.rewards,
        [model[seed] for model in burst.model.values()],
        np.random.default_rng([HINDSIGHT_SEED, seed]),
        table=inputs.table,
        budget_s=budget_s,
    ).models
