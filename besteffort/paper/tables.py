"""The parts of the page: what was asked, the figures that belong to it, and tables beside the paper's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from besteffort.fleet import Fleet
from besteffort.paper import published
from besteffort.paper.experiments import (
    GREEDY,
    HINDSIGHT,
    POLICY,
    THRESHOLDS,
    Burst,
    Experiments,
    Sweep,
    static_name,
)
from besteffort.paper.findings import (
    Spread,
    Verdict,
    availability_per_s,
    hardware_utility,
    largest_shortfall,
    leads,
    most_windows_ratio,
    regret,
    soft_increase,
    window_counts,
    window_ratio,
    window_verdict,
)
from besteffort.rewards import Rewards

NOTHING = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Table:
    title: str
    headers: list[str]
    rows: list[list[str]]
    note: str = ""  # what follows from it
    wide: bool = False  # cells hold text and may be folded
    given: bool = False  # what is ours in it was given, not simulated


@dataclass(frozen=True)
class Part:
    title: str
    text: str
    figures: tuple[int, ...] = ()  # by the paper's numbers
    tables: tuple[Table, ...] = ()


def make_parts(experiments: Experiments, fleet: Fleet, rewards: Rewards) -> list[Part]:
    """In the order of the paper, the summary first."""
    e = experiments
    bursts = e.unpredictable["unpredictable-1"], e.unpredictable["unpredictable-2"]
    return [
        Part("In short", _IN_SHORT, (), (summary_table(e),)),
        Part("Rewards", _REWARDS, (), (rewards_table(fleet, rewards),)),
        Part("Stable workload, hard deadlines (Sec. 4.3.1)", _HARD, (2, 3), (rates_table(e.hard, _TITLE_2),)),
        Part("Stable workload, soft deadlines (Sec. 4.3.2)", _SOFT, (4, 5),
             (rates_table(e.soft, _TITLE_4), soft_table(e))),
        Part("Unpredictable workload 1 (Sec. 4.4)", _UNPREDICTABLE_1, (6,),
             (*windows_tables(2, bursts[0], published.TABLE_2),
              *bound_tables(bursts[0], published.RATIOS_1))),
        Part("Unpredictable workload 2 (App. C)", _UNPREDICTABLE_2, (7,),
             (*windows_tables(3, bursts[1], published.TABLE_3),
              *bound_tables(bursts[1], published.RATIOS_2))),
        Part("Different deadlines (App. D)", _DEADLINES, (8, 9), (rates_table(e.deadlines, _TITLE_8),)),
        Part("Each task alone (App. E)", _ALONE, (10, 11)),
        Part("HellaSwag and COPA only, soft deadlines (App. E)", _TWO_TASKS, (12,),
             windows_tables(4, e.two_tasks, published.TABLE_4)),
        Part("Performance per GPU (App. F)", _UTILITY, (13, 14), (utility_table(e),)),
    ]  # fmt: skip


_IN_SHORT = (
    "What the paper says in its text, and what comes out here. The modelled fleet is calibrated to the "
    "paper's static baselines, as docs/titan-rtx-opt.md tells constant by constant; where ours differs, "
    "that page says what is known of why. Ratios are over all windows of all seeds."
)
_REWARDS = (
    "Accuracy over that of OPT-6.7B, zero-shot. Those used here are the paper's, so they must be equal."
)
_HARD = (
    "40 s of Poisson arrivals at each rate; the router is told the true rate, as in the paper. Beside "
    "the paper's statics stand two routers that learn nothing: greedy, which takes the best expected "
    "reward at the present batch sizes, and thresholds (where they are tuned), the largest batch up to "
    "which each task takes each model. Rates are on a logarithmic axis, the paper's on a linear one."
)
_SOFT = (
    "An answer loses 0.01 of its reward for each ms per token past the deadline, and everything from 10 "
    "% on. The policy is fine-tuned from the hard one. Usage is a Riemann sum of OPT-6.7B's share of "
    "the task's requests over the rates."
)
_UNPREDICTABLE_1 = (
    "Equal expected time at each rate: mostly calm, with rare bursts; rate estimated "
    "from the last 5 arrivals. The paper counts windows of 20 requests of one trace. Ours of three: "
    "traces differ by far more than routers, since a backlog at OPT-6.7B outlives many calm stretches. "
    "Hindsight is the best plan of a search that knows the whole trace. It looks for the highest mean "
    "performance, as every router here does, and not for many windows past a threshold."
)
_UNPREDICTABLE_2 = "Equal expected requests at each rate: mostly far above what OPT-6.7B can serve."
_AT_MOST = (
    "The last column is a bound by linear programming: for a policy that knows the whole trace, for which "
    "the smaller models are free and always in time, and that only the largest model's capacity limits. "
)
_VERDICTS: Mapping[Verdict, str] = {
    "reached": _AT_MOST + "The policy has the paper's {ratio:g}x here.",
    "possible": _AT_MOST + "The paper's {ratio:g}x are possible here, as a plan that knows the trace shows; "
    "the policy does not have them.",
    "impossible": _AT_MOST + "It is below the paper's {ratio:g}x: on this modelled fleet they are impossible "
    "for any policy.",
    "unknown": _AT_MOST
    + "The paper's {ratio:g}x lie above what was reached and below the bound: whether any "
    "policy can have them on this modelled fleet is not known. The plan aims at the mean performance, not at "
    "windows.",
}
_DEADLINES = (
    "OpenBookQA has twice the time (80 ms per token), COPA 20 % less (32 ms), with a policy trained for "
    "them. The caption of the paper's Figure 8 is that of another figure; its text says what is shown "
    "here."
)
_ALONE = "The policy for hard deadlines, untouched, while all requests are of one task."
_TWO_TASKS = "The soft policy, untouched, on unpredictable workload 1 with two of its four tasks."
_UTILITY = (
    "The policy on its GPUs against OPT-6.7B on twice as many, each with a replica that has the GPU to "
    "itself. The paper does not say of what its average ratio is; here it is that of the mean "
    "performances per GPU. It cannot be higher than with a policy that is perfect for every request, "
    "which the table gives too."
)
_TITLE_2 = "Figure 2: performance here by requests/s"
_TITLE_4 = "Figure 4: performance here by requests/s"
_TITLE_8 = "Figure 8: performance here by requests/s"
_SHOWN_RATES = (0.25, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48)


def rewards_table(fleet: Fleet, rewards: Rewards) -> Table:
    """Table 1: two columns for each model."""
    headers = ["task"]
    for name, model in zip(published.MODELS, fleet.model_names, strict=False):
        headers += [f"{name}, paper", f"{model}, here"]
    rows = []
    for t, task in enumerate(fleet.task_names):
        row = [task]
        for value, ours in zip(published.REWARDS[task], rewards.relative[t].tolist(), strict=False):
            row += [f"{value:.2f}", f"{ours:.2f}"]
        rows.append(row)
    return Table("Table 1: rewards", headers, rows, given=True)


def rates_table(sweep: Sweep, title: str) -> Table:
    """Performance by rate and way, over the seeds."""
    spreads = {
        way: zip(curves.performance.mean(axis=0), curves.performance.std(axis=0), strict=True)
        for way, curves in sweep.curves.items()
    }
    columns = [[f"{mean:.3f} ± {std:.3f}" for mean, std in of_way] for of_way in spreads.values()]
    rows = [[f"{rate:g}", *cells] for rate, *cells in zip(sweep.rates_per_s, *columns, strict=True)]
    shown = [row for row in rows if float(row[0]) in _SHOWN_RATES]
    return Table(title, ["requests/s", *spreads], shown)


def windows_tables(
    number: int, burst: Burst, printed: Mapping[str, published.WindowRow]
) -> tuple[Table, Table]:
    """Table 2, 3 or 4 with both counts side by side, and the mean performance of each way."""
    large, medium = static_name(burst.fleet, -1), static_name(burst.fleet, -2)
    others = [way for way in (GREEDY, THRESHOLDS, HINDSIGHT) if way in burst.performance]
    counts = {way: window_counts(burst, way) for way in (POLICY, large, medium, *others)}
    headers = ["threshold"]
    for way in (POLICY, large, medium):
        headers += [f"{way}, paper", f"{way}, here"]
    headers += [f"{way}, here" for way in others]
    rows = []
    for threshold, row in printed.items():
        sign = "=" if threshold == "1.00" else "≥"
        cells = [f"{sign} {threshold}"]
        for way, value in zip((POLICY, large, medium), row, strict=True):
            cells += [f"{value:,}", _counts(counts[way][threshold])]
        rows.append(cells + [_counts(counts[way][threshold]) for way in others])
    title = f"Table {number}: windows of 20 requests that reach a threshold"
    means = [[way, _spread(Spread(values.mean(axis=1)), 4)] for way, values in burst.performance.items()]
    mean_title = f"Table {number}, continued (not in the paper): mean performance of all requests"
    return Table(title, headers, rows), Table(mean_title, ["router", "here"], means)


def bound_tables(burst: Burst, ratios: Mapping[str, float]) -> tuple[Table, ...]:
    """Windows of each seed: what is reached, and what no policy can exceed; nothing without a bound."""
    if not burst.most_windows:
        return ()
    threshold = published.TOLD_THRESHOLD
    large = static_name(burst.fleet, -1)
    ways = {way: window_counts(burst, way)[threshold].values for way in (large, POLICY, HINDSIGHT)}
    columns = [*ways.values(), burst.most_windows[threshold].astype(np.float64)]
    totals = np.array([[*column, column.sum()] for column in columns]).T
    names = [f"seed {seed}" for seed in range(len(burst.traces))] + ["all"]
    rows = [
        [name, f"{counts[0]:,.0f}", *(_times_as_many(count, counts[0]) for count in counts[1:])]
        for name, counts in zip(names, totals.tolist(), strict=True)
    ]
    headers = ["trace", large, POLICY, "the plan found in hindsight", "any policy, at most"]
    title = f"Windows at ≥ {threshold} (not in the paper), and how many times those of {large}"
    note = _VERDICTS[window_verdict(burst, threshold, ratios[threshold])]
    return (Table(title, headers, rows, note=note.format(ratio=ratios[threshold])),)


def soft_table(experiments: Experiments) -> Table:
    increases = soft_increase(experiments.hard, experiments.soft)
    rows = [
        [task, f"{published.SOFT_INCREASE[task]:+.0%}", _spread(increase, 1, percent=True, signed=True)]
        for task, increase in increases.items()
    ]
    large = experiments.hard.fleet.model_names[-1]
    return Table(f"Usage of {large}: soft over hard deadlines", ["task", "paper", "here"], rows)


def utility_table(experiments: Experiments) -> Table:
    utility = hardware_utility(experiments)
    rows = [
        ["windows of 20 in which the policy's is higher", f"{published.UTILITY_ABOVE_SHARE:.2%}",
         _spread(utility.above_share, 2, percent=True)],
        ["how many times as high on average", f"{published.UTILITY_RATIO}x", _times(utility.ratio)],
        ["the same for a perfect policy: more is impossible", NOTHING, _times(utility.highest_ratio)],
        ["how many times as many windows past 90 % of the peak", f"{published.UTILITY_PEAK_RATIO}x",
         _ratio(utility.peak_ratio)],
    ]  # fmt: skip
    return Table("Performance per GPU, unpredictable-1", ["", "paper", "here"], rows, wide=True)


def summary_table(experiments: Experiments) -> Table:
    rows = [
        *_availability_rows(experiments.hard),
        *_ratio_rows(experiments),
        *[[f"Sec. 4.3.2: {cells[0]}, use of the largest model with soft deadlines", *cells[1:]]
          for cells in soft_table(experiments).rows],
        *[[f"App. F: per GPU, {cells[0]}", *cells[1:]] for cells in utility_table(experiments).rows],
        *_own_rows(experiments),
    ]  # fmt: skip
    return Table("The paper's text and ours", ["what", "paper", "here"], rows, wide=True)


def _availability_rows(sweep: Sweep) -> list[list[str]]:
    large = static_name(sweep.fleet, -1)
    ours, theirs = availability_per_s(sweep, POLICY), availability_per_s(sweep, large)
    top = sweep.rates_per_s[-1]
    at_least = "at least " if (ours.values == top).all() else ""
    ratio = ours.mean / theirs.mean if theirs.mean else math.nan
    return [
        ["Sec. 4.3.1: availability, requests/s up to which 95 % of the deadlines are met: policy", NOTHING,
         f"{at_least}{_spread(ours, 1)}"],
        [f"the same: {large} (paper: near its peak up to)", f"{published.LARGE_HOLDS_TO_PER_S:g}",
         _spread(theirs, 1)],
        ["policy over the largest model", f"over {published.AVAILABILITY_RATIO:g}x",
         f"{at_least}{_ratio(ratio)}"],
    ]  # fmt: skip


def _ratio_rows(experiments: Experiments) -> list[list[str]]:
    rows = []
    for where, workload, ratios, to_medium in (
        ("Sec. 4.4", "unpredictable-1", published.RATIOS_1, published.RATIO_TO_MEDIUM_1),
        ("App. C", "unpredictable-2", published.RATIOS_2, published.RATIO_TO_MEDIUM_2),
    ):
        burst = experiments.unpredictable[workload]
        large, medium = static_name(burst.fleet, -1), static_name(burst.fleet, -2)
        pairs = [(large, threshold, ratio) for threshold, ratio in ratios.items()]
        for other, threshold, ratio in [*pairs, (medium, "0.94", to_medium)]:
            ours = window_ratio(burst, POLICY, other, threshold)
            what = f"{where}: {workload}, windows at ≥ {threshold}, policy over {other}"
            rows.append([what, f"{ratio:g}x", _ratio(ours)])
    return rows


def _own_rows(experiments: Experiments) -> list[list[str]]:
    """What the paper does not ask."""
    gap, rate_per_s, other = largest_shortfall(experiments.hard)
    rows = [[f"stable, hard: most that the policy is below another router ({other}, {rate_per_s:g}/s)",
             NOTHING, f"{gap:+.4f}"]]  # fmt: skip
    for name, duel in experiments.duels.items():
        lead, num_traces = leads(duel)[0], len(duel.performance[POLICY])
        what = (
            f"{name}, {num_traces} further traces: mean performance, policy less the best other router "
            f"({lead.other}), 95 % interval"
        )
        rows.append([what, NOTHING, f"{lead.mean:+.5f} ± {lead.half_width:.5f}"])
    for name, spread in regret(experiments).items():
        what = f"{name}: regret against the best plan found in hindsight"
        rows.append([what, NOTHING, _spread(spread, 2, percent=True)])
    for name, burst in experiments.unpredictable.items():
        if HINDSIGHT in burst.performance:
            large = static_name(burst.fleet, -1)
            what = f"{name}: windows at ≥ 0.96, the plan found in hindsight over {large}"
            rows.append([what, NOTHING, _ratio(window_ratio(burst, HINDSIGHT, large, "0.96"))])
        for threshold in burst.most_windows:
            large = static_name(burst.fleet, -1)
            what = f"{name}: windows at ≥ {threshold}, a bound from above for any policy, over {large}"
            rows.append([what, NOTHING, _ratio(most_windows_ratio(burst, large, threshold))])
    return rows


def _spread(spread: Spread, num_decimals: int, *, percent: bool = False, signed: bool = False) -> str:
    if not math.isfinite(spread.mean):
        return NOTHING
    factor, unit = (100, " %") if percent else (1, "")
    sign = "+" if signed else ""
    return f"{factor * spread.mean:{sign}.{num_decimals}f} ± {factor * spread.std:.{num_decimals}f}{unit}"


def _counts(spread: Spread) -> str:
    return f"{spread.mean:,.0f} ± {spread.std:,.0f}"


def _times(spread: Spread) -> str:
    return f"{_spread(spread, 2)}x" if math.isfinite(spread.mean) else NOTHING


def _times_as_many(count: float, reference: float) -> str:
    ratio = count / reference if reference else math.nan
    return f"{count:,.0f} ({_ratio(ratio)})"


def _ratio(value: float) -> str:
    """`inf` where the other has none."""
    return f"{value:.2f}x" if math.isfinite(value) else NOTHING
