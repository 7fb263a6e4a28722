"""The figures that the paper's text and tables state, out of the experiments; pure arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from besteffort.gate import half_width
from besteffort.paper import published
from besteffort.paper.experiments import (
    HINDSIGHT,
    POLICY,
    Burst,
    Curves,
    Duel,
    Experiments,
    Sweep,
    static_name,
)
from besteffort.report.summary import WINDOW_THRESHOLDS, count_windows, window_performance

AVAILABLE = 0.95  # share of the deadlines that are met
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Spread:
    """One figure for each seed."""

    values: NDArray[np.float64]  # (S,)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        return float(np.std(self.values))


def riemann_sum(rates_per_s: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the last axis, with the mean of each interval's ends for its height."""
    heights = (shares[..., 1:] + shares[..., :-1]) / 2
    return np.asarray(np.sum(heights * np.diff(rates_per_s), axis=-1))


def soft_increase(hard: Sweep, soft: Sweep) -> dict[str, Spread]:
    """By task, how much more the largest model is used with soft deadlines: 0.5 is half as much again."""
    increases = {}
    for t, task in enumerate(hard.fleet.task_names):
        with_hard, with_soft = (
            riemann_sum(sweep.rates_per_s, sweep.curves[POLICY].task_selection[:, :, t, -1])
            for sweep in (hard, soft)
        )
        increases[task] = Spread(_ratio(with_soft, with_hard) - 1.0)
    return increases


def availability_per_s(sweep: Sweep, way: str) -> Spread:
    """The highest rate up to which, at every rate, 95 % of the deadlines are met; 0 if at none."""
    met = sweep.curves[way].deadline_met >= AVAILABLE
    num_held = np.sum(np.cumprod(met, axis=1), axis=1)
    return Spread(np.concatenate([[0.0], sweep.rates_per_s])[num_held])


def windows(burst: Burst, way: str) -> NDArray[np.float64]:
    """Shape `(S, K - 19)`."""
    return np.stack([window_performance(of_seed) for of_seed in burst.performance[way]])


def window_counts(burst: Burst, way: str) -> dict[str, Spread]:
    """By threshold (Tables 2 to 4)."""
    counts = [count_windows(of_seed) for of_seed in windows(burst, way)]
    return {t: Spread(np.array([float(count[t]) for count in counts])) for t in WINDOW_THRESHOLDS}


def window_ratio(burst: Burst, way: str, other: str, threshold: str) -> float:
    """How many times as many windows `way` has, over all seeds; NaN if the other has none."""
    ours, theirs = (window_counts(burst, name)[threshold].values.sum() for name in (way, other))
    return float(_ratio(np.array(ours), np.array(theirs)))


def most_windows_ratio(burst: Burst, other: str, threshold: str) -> float:
    """How many times as many windows as another way any policy could have at most; NaN if that has none."""
    theirs = window_counts(burst, other)[threshold].values.sum()
    return float(_ratio(np.array(float(burst.most_windows[threshold].sum())), np.array(theirs)))


Verdict = Literal["reached", "possible", "impossible", "unknown"]


def window_verdict(burst: Burst, threshold: str, wanted: float) -> Verdict:
    """Whether the policy has so many times the windows of the largest model; if not, whether any can."""
    large = static_name(burst.fleet, -1)
    if window_ratio(burst, POLICY, large, threshold) >= wanted:
        return "reached"
    if max(window_ratio(burst, way, large, threshold) for way in burst.performance) >= wanted:
        return "possible"
    return "impossible" if most_windows_ratio(burst, large, threshold) < wanted else "unknown"


@dataclass(frozen=True)
class Utility:
    """The policy's performance per GPU over that of the largest model on twice the GPUs (App. F)."""

    above_share: Spread  # of the windows
    ratio: Spread  # of the means
    highest_ratio: Spread  # that a policy could reach which is perfect for every request
    peak_ratio: float  # of the numbers of windows at 0.90 of the peak or above


def hardware_utility(experiments: Experiments) -> Utility:
    burst, wide = experiments.unpredictable["unpredictable-1"], experiments.unpredictable_8
    large = static_name(wide.fleet, -1)
    ours, theirs = windows(burst, POLICY), windows(wide, large)
    gpus = wide.fleet.num_devices / burst.fleet.num_devices
    mean_ours, mean_theirs = burst.performance[POLICY].mean(axis=1), wide.performance[large].mean(axis=1)
    peaks = [np.sum(of >= published.UTILITY_PEAK_THRESHOLD - _TOLERANCE) for of in (ours, theirs)]
    return Utility(
        above_share=Spread(np.mean(ours > theirs / gpus, axis=1)),
        ratio=Spread(gpus * _ratio(mean_ours, mean_theirs)),
        highest_ratio=Spread(gpus * _ratio(np.ones_like(mean_theirs), mean_theirs)),
        peak_ratio=float(_ratio(np.array(float(peaks[0])), np.array(float(peaks[1])))),
    )


def regret(experiments: Experiments) -> dict[str, Spread]:
    """By workload, the share of the best known performance that the policy leaves."""
    return {
        name: Spread(1.0 - burst.performance[POLICY].mean(axis=1) / burst.performance[HINDSIGHT].mean(axis=1))
        for name, burst in experiments.unpredictable.items()
        if HINDSIGHT in burst.performance
    }


def largest_shortfall(sweep: Sweep, way: str = POLICY) -> tuple[float, float, str]:
    """How far the way is below the best other at its worst rate: the amount, the rate, and the other."""
    means = {name: curves.performance.mean(axis=0) for name, curves in sweep.curves.items()}
    ours = means.pop(way)
    names = list(means)
    gaps = np.stack([means[name] for name in names]) - ours
    row, column = np.unravel_index(int(np.argmax(gaps)), gaps.shape)
    return float(gaps[row, column]), float(sweep.rates_per_s[column]), names[int(row)]


@dataclass(frozen=True)
class Lead:
    """Of the policy over another way, in mean performance."""

    other: str
    mean: float
    half_width: float  # of the 95 % interval, by the differences on single traces


def leads(duel: Duel) -> list[Lead]:
    """The smallest first."""
    others = dict(duel.performance)
    ours = others.pop(POLICY)
    found = [
        Lead(other, float(np.mean(ours - theirs)), half_width(ours - theirs))
        for other, theirs in others.items()
    ]
    return sorted(found, key=lambda lead: lead.mean)


def mean_and_std(
    values: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Over the seeds, which are axis 0; a task without requests at a seed is left out."""
    known = ~np.isnan(values)
    counts = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / counts
    square = np.where(known, (values - mean) ** 2, 0.0).sum(axis=0) / counts
    return np.asarray(mean), np.sqrt(square)


def as_plain(experiments: Experiments) -> dict[str, object]:
    """The figures behind the plots, for a machine: means and standard deviations over the seeds."""
    sweeps = {
        "hard": experiments.hard,
        "soft": experiments.soft,
        "deadlines": experiments.deadlines,
        **{f"{task}-alone": sweep for task, sweep in experiments.alone.items()},
        "hard-8-gpus": experiments.hard_8,
        "soft-8-gpus": experiments.soft_8,
    }
    bursts = {
        **experiments.unpredictable,
        "two-tasks": experiments.two_tasks,
        "unpredictable-1-8-gpus": experiments.unpredictable_8,
    }
    return {
        "stable": {name: _plain_sweep(sweep) for name, sweep in sweeps.items()},
        "unpredictable": {name: _plain_burst(burst) for name, burst in bursts.items()},
        "duels": {
            name: {way: of_way.round(6).tolist() for way, of_way in duel.performance.items()}
            for name, duel in experiments.duels.items()
        },
        "most_windows": {
            name: {threshold: bound.tolist() for threshold, bound in burst.most_windows.items()}
            for name, burst in bursts.items()
        },
    }


def _plain_sweep(sweep: Sweep) -> dict[str, object]:
    def plain(curves: Curves) -> dict[str, object]:
        performance, std = mean_and_std(curves.performance)
        return {
            "performance": performance.round(5).tolist(),
            "performance_std": std.round(5).tolist(),
            "deadline_met": curves.deadline_met.mean(axis=0).round(5).tolist(),
            "selection": curves.selection.mean(axis=0).round(5).tolist(),
        }

    ways: Mapping[str, object] = {name: plain(curves) for name, curves in sweep.curves.items()}
    return {"rates_per_s": sweep.rates_per_s.tolist(), "ways": ways}


def _plain_burst(burst: Burst) -> dict[str, object]:
    return {
        name: {
            "performance": performance.mean(axis=1).round(5).tolist(),
            "windows": {t: s.values.astype(int).tolist() for t, s in window_counts(burst, name).items()},
        }
        for name, performance in burst.performance.items()
    }


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
