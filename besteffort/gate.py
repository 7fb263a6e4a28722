"""Is a policy worth running? All of them on workloads that no training has seen, and where it loses."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from besteffort.environment import Service
from besteffort.policies import Policy
from besteffort.progress import Progress
from besteffort.report.summary import count_windows, window_performance
from besteffort.request import Requests
from besteffort.simulator import simulate
from besteffort.workload import generate_workload

RATES_PER_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0)
FIRST_SEED = 900_000  # nobody trains, tunes or chooses by these and the next ones
TOLERANCE = 0.005  # a baseline may be so much better before it counts as a loss
# Student's t, two-sided 95 %, by degrees of freedom.
T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Effort:
    num_seeds: int = 3
    duration_s: float = 40.0  # of a stable workload (paper, App. B), at the paper's rates
    num_requests: int = 10_000  # of an unpredictable one


@dataclass(frozen=True)
class Reached:
    """One policy on one workload: the mean over seeds, and how far it is above the candidate."""

    policy: str
    performance: float
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


def compare(
    policies: Sequence[Callable[[], Policy]], service: Service, effort: Effort, progress: Progress
) -> list[Row]:
    """The first policy against the others; each begins every workload afresh."""
    names = [make().name for make in policies]
    rows = []
    workloads = [("stable", rate) for rate in RATES_PER_S] + [
        ("unpredictable-1", 0.0),
        ("unpredictable-2", 0.0),
    ]
    with progress.bar("compare", len(workloads)) as bar:
        for kind, rate in workloads:
            traces = [_trace(service, effort, kind, rate, FIRST_SEED + s) for s in range(effort.num_seeds)]
            worth = [[_worth(make(), service, trace) for trace in traces] for make in policies]
            name = f"stable {rate * service.fleet.rate_scale:g}/s" if kind == "stable" else kind
            rows.append(Row(name, _reached(names, worth, with_windows=kind != "stable")))
            bar.describe(name)
            bar.advance()
    return rows


def _trace(service: Service, effort: Effort, kind: str, rate: float, seed: int) -> Requests:
    rng, fleet = np.random.default_rng(seed), service.fleet
    if kind == "stable":
        # Long enough that the paper's number of requests comes, whatever the fleet's scale.
        return generate_workload(
            kind, fleet, rng, rate_per_s=rate, num_requests=max(10, round(rate * effort.duration_s))
        )
    return generate_workload(kind, fleet, rng, num_requests=effort.num_requests)


def _worth(policy: Policy, service: Service, trace: Requests) -> NDArray[np.float64]:
    outcomes = simulate(trace, service.fleet, service.latency, policy.choose)
    return service.worth(trace.task, outcomes.model, outcomes.latency_ms_per_token)


def _reached(
    names: Sequence[str], worth: list[list[NDArray[np.float64]]], with_windows: bool
) -> list[Reached]:
    means = np.array([[one.mean() for one in of_policy] for of_policy in worth])  # (P, S)
    ahead = means - means[0]
    return [
        Reached(
            policy=name,
            performance=float(means[p].mean()),
            half_width=_half_width(means[p]),
            ahead=float(ahead[p].mean()),
            ahead_half_width=_half_width(ahead[p]),
            windows=_windows(worth[p]) if with_windows else {},
        )
        for p, name in enumerate(names)
    ]


def _half_width(values: NDArray[np.float64]) -> float:
    """Of the 95 % interval of the mean; one value says nothing, and is taken at its word."""
    if len(values) < 2:
        return 0.0
    t = T_95.get(len(values) - 1, 2.2)
    return float(t * values.std(ddof=1) / np.sqrt(len(values)))


def _windows(worth: list[NDArray[np.float64]]) -> dict[str, float]:
    counts = [count_windows(window_performance(one)) for one in worth]
    return {threshold: float(np.mean([count[threshold] for count in counts])) for threshold in counts[0]}
