"""Is a policy worth running? All of them on workloads that no training has seen, and where it loses."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from besteffort.environment import Service
from besteffort.fleet import Fleet
from besteffort.policies import Policy
from besteffort.progress import Progress
from besteffort.report.summary import count_windows, window_performance
from besteffort.request import Requests
from besteffort.simulator import simulate
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import generate_workload, stable

RATES_PER_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0)
FIRST_SEED = 900_000  # nobody trains, tunes or chooses by these and the next ones
TOLERANCE = 0.005  # a baseline may be so much better before it counts as a loss
# Student's t, two-sided 95 %, by degrees of freedom; for more, `half_width` expands the normal quantile.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Effort:
    num_seeds: int = 3
    duration_s: float = 40.0  # of a stable workload (paper, App. B), at the paper's rates
    num_requests: int = 10_000  # of an unpredictable one


class Worth(NamedTuple):
    """Of each request, shape `(N,)`."""

    weighted: NDArray[np.float64]  # what policies are compared by: tasks count by their weight
    plain: NDArray[np.float64]  # the performance, which windows count


@dataclass(frozen=True)
class Reached:
    """One policy on one workload: the mean over seeds, and how far it is above the candidate."""

    policy: str
    performance: float  # tasks counted by their weight
    half_width: float  # of the 95 % interval of `performance`
    ahead: float  # of the candidate, on the same traces; negative: behind
    ahead_half_width: float
    windows: dict[str, float]  # mean number of windows, by threshold; empty where there is one rate

    @property
    def beats_candidate(self) -> bool:
        return self.ahead - self.ahead_half_width > 0 and self.ahead > TOLERANCE


@dataclass(frozen=True)
class Row:
    workload: str
    reached: list[Reached]  # the candidate first

    @property
    def better(self) -> list[Reached]:
        return [other for other in self.reached[1:] if other.beats_candidate]

    def to_dict(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "reached": [asdict(one) for one in self.reached],
            "lost_to": [other.policy for other in self.better],
        }


@dataclass(frozen=True)
class Workload:
    """One row of the comparison, before it is run."""

    name: str
    draw: Callable[[], list[Requests]]  # a trace for each seed
    with_windows: bool = True


def compare(
    policies: Sequence[Callable[[], Policy]],
    service: Service,
    effort: Effort,
    progress: Progress,
    trained_on: TrainingWorkloads | None = None,
) -> list[Row]:
    """The first policy against the others; each begins every workload afresh.

    Beside the paper's workloads, what training knew of others: random mixes of tasks, and the parts of
    traces that were held out from it.
    """
    names = [make().name for make in policies]
    rows = []
    workloads = _workloads(service.fleet, effort, trained_on or TrainingWorkloads(service.fleet))
    with progress.bar("compare", len(workloads)) as bar:
        for workload in workloads:
            traces = workload.draw()
            worth = [[_worth(make(), service, trace) for trace in traces] for make in policies]
            rows.append(Row(workload.name, _reached(names, worth, with_windows=workload.with_windows)))
            bar.describe(workload.name)
            bar.advance()
    return rows


def verdict(rows: Sequence[Row]) -> str | None:
    """Where the policy loses most, as half a sentence; None: nowhere."""
    losses = [(one.ahead, one.policy, row.workload) for row in rows for one in row.better]
    if not losses:
        return None
    ahead, policy, workload = max(losses)
    num_workloads = len({workload for _, _, workload in losses})
    return (
        f"it loses on {num_workloads} of {len(rows)} workloads, most against {policy} on {workload} "
        f"(by {ahead:.4f})"
    )


def _workloads(fleet: Fleet, effort: Effort, trained_on: TrainingWorkloads) -> list[Workload]:
    seeds = range(FIRST_SEED, FIRST_SEED + effort.num_seeds)

    def stable_at(rate_per_s: float) -> list[Requests]:
        # Long enough that the paper's number of requests comes, whatever the fleet's scale.
        num_requests = max(10, round(rate_per_s * effort.duration_s))
        rngs = map(np.random.default_rng, seeds)
        return [stable(fleet, rng, rate_per_s, num_requests=num_requests) for rng in rngs]

    def unpredictable(kind: str, mixed: Callable[[np.random.Generator], Fleet]) -> list[Requests]:
        rngs = map(np.random.default_rng, seeds)
        return [generate_workload(kind, mixed(rng), rng, num_requests=effort.num_requests) for rng in rngs]

    kinds = ("unpredictable-1", "unpredictable-2")
    workloads = [
        Workload(f"stable {rate * fleet.rate_scale:g}/s", partial(stable_at, rate), with_windows=False)
        for rate in RATES_PER_S
    ]
    workloads += [Workload(kind, partial(unpredictable, kind, lambda _: fleet)) for kind in kinds]
    if trained_on.task_mix == "random":
        workloads += [
            Workload(f"{kind}, random mixes", partial(unpredictable, kind, trained_on.mixed))
            for kind in kinds
        ]
    workloads += [
        Workload(f"trace {trace.name}, held out", partial(trace.held_out.cut, effort.num_seeds))
        for trace in trained_on.traces
    ]
    return workloads


def _worth(policy: Policy, service: Service, trace: Requests) -> Worth:
    outcomes = simulate(trace, service.fleet, service.latency, policy.choose)
    routed = (trace.task, outcomes.model, outcomes.latency_ms_per_token)
    return Worth(service.weighted_worth(*routed), service.worth(*routed))


def _reached(names: Sequence[str], worth: list[list[Worth]], with_windows: bool) -> list[Reached]:
    means = np.array([[one.weighted.mean() for one in of_policy] for of_policy in worth])  # (P, S)
    ahead = means - means[0]
    return [
        Reached(
            policy=name,
            performance=float(means[p].mean()),
            half_width=half_width(means[p]),
            ahead=float(ahead[p].mean()),
            ahead_half_width=half_width(ahead[p]),
            windows=_windows(worth[p]) if with_windows else {},
        )
        for p, name in enumerate(names)
    ]


def half_width(values: NDArray[np.float64]) -> float:
    """Of the 95 % interval of the mean; one value says nothing, and is taken at its word."""
    if len(values) < 2:
        return 0.0
    degrees = len(values) - 1
    t = T_95.get(degrees, 1.96 + 2.37 / degrees + 2.82 / degrees**2)
    return float(t * values.std(ddof=1) / np.sqrt(len(values)))


def _windows(worth: list[Worth]) -> dict[str, float]:
    counts = [count_windows(window_performance(one.plain)) for one in worth]
    return {threshold: float(np.mean([count[threshold] for count in counts])) for threshold in counts[0]}
