"""The plots of a report, each an `<svg>` to be put into a page, where it takes the page's text colour."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from besteffort.artifacts.outcomes_file import Verdicts
from besteffort.fleet import Fleet
from besteffort.report.summary import WINDOW_SIZE, window_performance
from besteffort.request import Outcomes

# Okabe and Ito's palette without black and yellow, which vanish on dark and light pages, then Tol's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00",
            "#44AA99", "#AA4499", "#999933", "#88CCEE")  # fmt: skip
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
_DEADLINE = "#C8382E"
_UNROUTED = "#8A8A8A"
_INK = "#010203"  # stands for the text colour of the page
_WIDTH_INCHES = 10.0
_MAX_VECTOR_POINTS = 1500  # more dots than these become one picture inside the SVG
_NUM_BINS = 60
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.alpha": 0.14,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.3,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}


def performance_over_time(outcomes: Outcomes, verdicts: Verdicts) -> str:
    """The arrival rate above, the windowed and the running performance below (paper, Fig. 6)."""
    arrived_at = outcomes.requests.arrived_at
    with drawing("performance", 4.4) as (figure, svg):
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        if len(arrived_at) >= WINDOW_SIZE:
            ends_at = arrived_at[WINDOW_SIZE - 1 :]
            spans_s = np.maximum(ends_at - arrived_at[: -WINDOW_SIZE + 1], 1e-3)
            rates_per_s = (WINDOW_SIZE - 1) / spans_s
            upper.fill_between(ends_at, rates_per_s, color=_UNROUTED, alpha=0.7, linewidth=0.5)
            windows = window_performance(verdicts.performance)
            lower.plot(ends_at, windows, color=COLOURS[4], lw=1.1, label=f"last {WINDOW_SIZE} requests")
        running = np.cumsum(verdicts.performance) / np.arange(1, len(arrived_at) + 1)
        lower.plot(arrived_at, running, color=COLOURS[5], lw=2.2, label="all requests so far")
        upper.set(ylabel="arrivals\n(requests/s)", ylim=(0, None), xlim=(0, _end_s(arrived_at)))
        lower.set(xlabel="time of arrival (s)", ylabel="performance (1 = peak)", ylim=(0, 1.04))
        lower.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.1)
    return svg[0]


def latency_over_time(outcomes: Outcomes, verdicts: Verdicts, fleet: Fleet) -> str:
    """A dot for each answered request, a cross at the top for each failed one."""
    arrived_at, latency = outcomes.requests.arrived_at, verdicts.latency_ms_per_token
    with drawing("latency", 3.6) as (figure, svg):
        axes = figure.subplots()
        rasterize = len(outcomes) > _MAX_VECTOR_POINTS
        for m in range(len(fleet.models)):
            which = (outcomes.model == m) & np.isfinite(latency)
            axes.scatter(arrived_at[which], latency[which], s=5 if rasterize else 12, alpha=0.65,
                         linewidths=0, color=model_colour(m), rasterized=rasterize)  # fmt: skip
        failed = arrived_at[~outcomes.answered]
        axes.scatter(failed, np.full(len(failed), 0.975), s=24, marker="x", color=_DEADLINE,
                     transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
        _scale_latency(axes, "y", latency, fleet)
        for deadline in _deadlines(fleet):
            axes.axhline(deadline, color=_DEADLINE, linestyle="--", linewidth=1.4, zorder=3)
        axes.set(xlabel="time of arrival (s)", ylabel="latency (ms per output token)",
                 xlim=(0, _end_s(arrived_at)))  # fmt: skip
        _legend(axes, fleet, marker="o", num_failed=len(failed))
    return svg[0]


def latency_cdf(outcomes: Outcomes, verdicts: Verdicts, fleet: Fleet) -> str:
    """Share of each model's answers that took no longer than so much."""
    latency = verdicts.latency_ms_per_token
    with drawing("cdf", 3.6) as (figure, svg):
        axes = figure.subplots()
        for m in range(len(fleet.models)):
            steps = np.sort(latency[(outcomes.model == m) & np.isfinite(latency)])
            if len(steps):
                axes.ecdf(steps, color=model_colour(m), linestyle=DASHES[m % len(DASHES)])
        _scale_latency(axes, "x", latency, fleet)
        for deadline in _deadlines(fleet):
            axes.axvline(deadline, color=_DEADLINE, linestyle="--", linewidth=1.4)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel="latency (ms per output token)", ylabel="share of its answers", ylim=(0, 1.02))
        _legend(axes, fleet, marker="")
    return svg[0]


def selection_over_time(outcomes: Outcomes, fleet: Fleet) -> str:
    """Stacked shares in equal slices of time; a slice without arrivals stays empty."""
    arrived_at = outcomes.requests.arrived_at
    with drawing("selection", 3.0) as (figure, svg):
        axes = figure.subplots()
        end_s = _end_s(arrived_at)
        edges = np.linspace(0.0, end_s, min(_NUM_BINS, max(10, len(arrived_at) // 10)) + 1)
        counts = _counts(outcomes.model, arrived_at, edges, len(fleet.models))
        shares = counts / np.maximum(counts.sum(axis=0), 1)
        tops = np.cumsum(shares[:, [*range(len(edges) - 1), -1]], axis=0)
        for row, top in enumerate(tops):
            floor = tops[row - 1] if row else np.zeros_like(top)
            colour = model_colour(row) if row < len(fleet.models) else _UNROUTED
            axes.fill_between(edges, floor, top, step="post", color=colour, linewidth=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(visible=False)
        axes.set(xlabel="time of arrival (s)", ylabel="share of requests", ylim=(0, 1), xlim=(0, end_s))
        _legend(axes, fleet, marker="s", unrouted=bool(counts[-1].any()), deadline=False)
    return svg[0]


def selection_per_task(summary: dict[str, Any]) -> str:
    """One bar for each task that had requests, divided by model."""
    tasks = {name: block for name, block in summary["tasks"].items() if block["count"]}
    with drawing("tasks", 1.3 + 0.42 * max(1, len(tasks))) as (figure, svg):
        axes = figure.subplots()
        for row, block in enumerate(tasks.values()):
            left = 0.0
            for m, share in enumerate(block["selection"].values()):
                axes.barh(row, share or 0.0, 0.7, left, color=model_colour(m), linewidth=0)
                if share and share >= 0.05:
                    axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center",
                              color=_on(model_colour(m)), fontsize=9)  # fmt: skip
                left += share or 0.0
        axes.set_yticks(range(len(tasks)), list(tasks))
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel="share of the task's requests", xlim=(0, 1))
        _legend_of(axes, list(summary["selection"]), marker="s", extra=[])
    return svg[0]


def compared_performance(summaries: Sequence[dict[str, Any]]) -> str:
    """A bar for each policy's performance, a mark on it for its share of deadlines met."""
    with drawing("comparison", 1.3 + 0.42 * max(1, len(summaries))) as (figure, svg):
        axes = figure.subplots()
        rows = range(len(summaries))
        values = [summary["performance"] or 0.0 for summary in summaries]
        axes.barh(rows, values, 0.64, color=COLOURS[4], linewidth=0)
        axes.scatter([summary["deadline_met"] or 0.0 for summary in summaries], rows, s=46, marker="D",
                     color=_DEADLINE, edgecolors=_INK, linewidths=0.6, zorder=3)  # fmt: skip
        for row, value in enumerate(values):
            axes.text(0.01, row, f"{value:.3f}", va="center", color="black", fontweight="bold", fontsize=9)
        axes.set_yticks(rows, [f"{s['policy']} ({s['engine']})" for s in summaries])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="performance (1 = peak); share of deadlines met", xlim=(0, 1.02))
        marks = [
            Line2D([], [], color=COLOURS[4], marker="s", linestyle="", label="performance"),
            Line2D([], [], color=_DEADLINE, marker="D", linestyle="", label="share of deadlines met"),
        ]
        axes.legend(handles=marks, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
    return svg[0]


@contextmanager
def drawing(name: str, height_inches: float) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on; when it is left, its SVG is appended to the list. `name` is unique on a page."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
        finished: list[str] = []
        yield figure, finished
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, dpi=170, metadata=no_metadata)
        finished.append(_inline(buffer.getvalue(), name))


def _inline(document: str, name: str) -> str:
    """From an SVG document to an element that shares a page with others: its own ids, no fixed size."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', _SVG_TAG, svg, count=1)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("'DejaVu Sans', ", "").replace(_INK, "currentColor")
    return svg.strip()


_SVG_TAG = (
    r'<svg viewBox="\1" role="img" xmlns="http://www.w3.org/2000/svg" '
    r'xmlns:xlink="http://www.w3.org/1999/xlink">'
)


def model_colour(model: int) -> str:
    return COLOURS[model % len(COLOURS)]


def _on(colour: str) -> str:
    """Black or white, whichever can be read on `colour` (luma of ITU-R BT.601)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 105 else "white"


def _deadlines(fleet: Fleet) -> list[float]:
    """In ms per output token, each once."""
    return sorted({task.deadline_ms_per_token for task in fleet.tasks})


def _end_s(arrived_at: NDArray[np.float64]) -> float:
    """Where the time axis ends; every plot over time has the same one."""
    return max(float(arrived_at[-1]), 1e-3) if len(arrived_at) else 1.0


def _counts(
    model: NDArray[np.int64], arrived_at: NDArray[np.float64], edges: NDArray[np.float64], num_models: int
) -> NDArray[np.float64]:
    """Requests by model and slice of time, shape `(M + 1, len(edges) - 1)`; unrouted ones come last."""
    return np.stack(
        [np.histogram(arrived_at[model == m], edges)[0].astype(np.float64) for m in (*range(num_models), -1)]
    )


def _scale_latency(axes: Axes, which: str, latency: NDArray[np.float64], fleet: Fleet) -> None:
    """Logarithmic if latencies reach far past the longest deadline, else from zero. Unit as given."""
    finite = latency[np.isfinite(latency) & (latency > 0)]
    longest = _deadlines(fleet)[-1]
    top = max(longest * 1.25, float(finite.max()) * 1.12 if len(finite) else 0.0)
    axis = axes.xaxis if which == "x" else axes.yaxis
    bottom = 0.0
    if top > 6 * longest:
        axes.set(**{f"{which}scale": "log"})
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bottom = 0.8 * float(min(finite.min(), longest))
    axes.set(**{f"{which}lim": (bottom, top)})


def _legend(
    axes: Axes,
    fleet: Fleet,
    *,
    marker: str,
    num_failed: int = 0,
    unrouted: bool = False,
    deadline: bool = True,
) -> None:
    extra = []
    if deadline:
        values = " / ".join(f"{value:g}" for value in _deadlines(fleet))
        label = f"deadline ({values} ms/token)"
        extra.append(Line2D([], [], color=_DEADLINE, linestyle="--", linewidth=1.4, label=label))
    if num_failed:
        label = f"failed ({num_failed})"
        extra.append(Line2D([], [], color=_DEADLINE, linestyle="", marker="x", label=label))
    if unrouted:
        extra.append(Line2D([], [], color=_UNROUTED, linestyle="", marker="s", label="not routed"))
    _legend_of(axes, fleet.model_names, marker=marker, extra=extra)


def _legend_of(axes: Axes, model_names: Sequence[str], *, marker: str, extra: list[Line2D]) -> None:
    """Above the plot, where it hides nothing; lines if there is no marker."""
    models = [
        Line2D([], [], color=model_colour(m), label=name, marker=marker,
               linestyle="" if marker else DASHES[m % len(DASHES)])
        for m, name in enumerate(model_names)
    ]  # fmt: skip
    handles = [*models, *extra]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2,
                ncols=min(6, len(handles)), handletextpad=0.5, columnspacing=1.4)  # fmt: skip
