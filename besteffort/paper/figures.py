"""The paper's Figures 2 to 14: for each an SVG for the HTML page and a small PNG for the Markdown page."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from besteffort.fleet import Fleet
from besteffort.paper.experiments import (
    GREEDY,
    POLICY,
    THRESHOLDS,
    Burst,
    Curves,
    Experiments,
    Sweep,
    static_name,
)
from besteffort.paper.findings import mean_and_std, windows
from besteffort.report.plots import COLOURS, DASHES, drawing, model_colour
from besteffort.report.summary import WINDOW_SIZE

_POLICY_COLOUR = COLOURS[5]
_OTHER = {GREEDY: COLOURS[3], THRESHOLDS: COLOURS[8]}
_GREY = "#8A8A8A"
_PNG_DOTS_PER_INCH = 90
_PNG_COLOURS = 64
_RATE_TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 48)


@dataclass(frozen=True)
class Drawing:
    name: str  # of the file, without its ending
    svg: str
    png: bytes


def draw_all(experiments: Experiments) -> dict[int, Drawing]:
    """By the number of the paper's figure; 3, 5, 9 and 11 hold shares, 13 and 14 utility."""
    e = experiments
    unpredictable = e.unpredictable
    return {
        2: _draw("fig-02", 3.9, lambda f: _performance_and_selection(f, e.hard)),
        3: _draw("fig-03", 3.0, lambda f: _task_selections(f, e.hard)),
        4: _draw("fig-04", 3.9, lambda f: _performance_and_selection(f, e.soft)),
        5: _draw("fig-05", 3.0, lambda f: _task_selections(f, e.soft)),
        6: _draw("fig-06", 6.4, lambda f: _burst(f, unpredictable["unpredictable-1"])),
        7: _draw("fig-07", 6.4, lambda f: _burst(f, unpredictable["unpredictable-2"])),
        8: _draw("fig-08", 3.9, lambda f: _performance_and_selection(f, e.deadlines)),
        9: _draw("fig-09", 3.0, lambda f: _task_selections(f, e.deadlines)),
        10: _draw("fig-10", 3.3, lambda f: _performances_alone(f, e.alone)),
        11: _draw("fig-11", 3.0, lambda f: _selections_alone(f, e.alone)),
        12: _draw("fig-12", 6.4, lambda f: _burst(f, e.two_tasks)),
        13: _draw("fig-13", 3.9, lambda f: _utility(f, e)),
        14: _draw("fig-14", 3.4, lambda f: _windowed_utility(f, e)),
    }


def _draw(name: str, height_inches: float, draw: Callable[[Figure], None]) -> Drawing:
    with drawing(name, height_inches) as (figure, svg):
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_PNG_DOTS_PER_INCH, metadata={"Software": None})
    return Drawing(name, svg[0], _smaller(buffer))


def _smaller(png: io.BytesIO) -> bytes:
    """With a palette instead of full colours: a third of the size, and no difference to see."""
    with Image.open(png) as image:
        few = image.convert("RGB").quantize(_PNG_COLOURS, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    few.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# How each way looks, in every figure.


def _look(way: str, fleet: Fleet) -> dict[str, object]:
    if way == POLICY:
        return {"color": _POLICY_COLOUR, "lw": 2.4, "zorder": 4}
    if way in _OTHER:
        return {"color": _OTHER[way], "lw": 1.3, "linestyle": DASHES[2]}
    model = [static_name(fleet, m) for m in range(len(fleet.models))].index(way)
    return {"color": model_colour(model), "lw": 1.6, "linestyle": DASHES[1]}


def _line(axes: Axes, x: NDArray[np.float64], values: NDArray[np.float64], **look: object) -> None:
    """The mean over the seeds, axis 0, with one standard deviation shaded."""
    mean, std = mean_and_std(values)
    axes.plot(x, mean, **look)  # type: ignore[arg-type]
    axes.fill_between(x, mean - std, mean + std, color=str(look["color"]), alpha=0.22, linewidth=0)


def _ways_legend(figure: Figure, ways: Sequence[str], fleet: Fleet) -> None:
    handles = [Line2D([], [], label=way, **_look(way, fleet)) for way in ways]  # type: ignore[arg-type]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(6, len(handles)),
                  columnspacing=1.4, handletextpad=0.5)  # fmt: skip


def _models_legend(figure: Figure, fleet: Fleet) -> None:
    handles = [
        Line2D([], [], color=model_colour(m), label=name, lw=2) for m, name in enumerate(fleet.model_names)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


def _rate_axis(axes: Axes) -> None:
    """Logarithmic in effect: half of the paper's story lies below 8 requests/s."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_RATE_TICKS))
    axes.xaxis.set_minor_locator(FixedLocator([]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="requests/s")


def _performance(axes: Axes, sweep: Sweep) -> None:
    for way, curves in sweep.curves.items():
        _line(axes, sweep.rates_per_s, curves.performance, **_look(way, sweep.fleet))
    _rate_axis(axes)
    axes.set(ylim=(0, 1.03))


def _selection(axes: Axes, sweep: Sweep, shares: NDArray[np.float64]) -> None:
    """`shares` has shape `(S, R, M)`."""
    for model in range(len(sweep.fleet.models)):
        _line(axes, sweep.rates_per_s, shares[:, :, model], color=model_colour(model), lw=2.0)
    _rate_axis(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(ylim=(-0.02, 1.03))


def _performance_and_selection(figure: Figure, sweep: Sweep) -> None:
    left, right = figure.subplots(1, 2)
    _performance(left, sweep)
    left.set(ylabel="performance (1 = peak)")
    left.set_title("performance", pad=4)
    _selection(right, sweep, sweep.curves[POLICY].selection)
    right.set(ylabel="share of requests")
    right.set_title("the policy's models", pad=4)
    _ways_legend(figure, list(sweep.curves), sweep.fleet)
    handles = [
        Line2D([], [], color=model_colour(m), label=name, lw=2)
        for m, name in enumerate(sweep.fleet.model_names)
    ]
    right.legend(handles=handles, loc="best", frameon=True, framealpha=0.8)


def _task_selections(figure: Figure, sweep: Sweep) -> None:
    panels = figure.subplots(1, len(sweep.fleet.tasks), sharey=True)
    for t, (axes, task) in enumerate(zip(panels, sweep.fleet.tasks, strict=True)):
        _selection(axes, sweep, sweep.curves[POLICY].task_selection[:, :, t])
        axes.set_title(f"{task.name}, {task.deadline_ms_per_token:g} ms/token", pad=4)
    _thin_ticks(panels)
    panels[0].set(ylabel="share of its requests")
    _models_legend(figure, sweep.fleet)


def _performances_alone(figure: Figure, alone: Mapping[str, Sweep]) -> None:
    panels = figure.subplots(1, len(alone), sharey=True)
    for axes, (task, sweep) in zip(panels, alone.items(), strict=True):
        _performance(axes, sweep)
        axes.set_title(f"only {task}", pad=4)
    _thin_ticks(panels)
    panels[0].set(ylabel="performance (1 = peak)")
    first = next(iter(alone.values()))
    _ways_legend(figure, list(first.curves), first.fleet)


def _selections_alone(figure: Figure, alone: Mapping[str, Sweep]) -> None:
    panels = figure.subplots(1, len(alone), sharey=True)
    for axes, (task, sweep) in zip(panels, alone.items(), strict=True):
        _selection(axes, sweep, sweep.curves[POLICY].selection)
        axes.set_title(f"only {task}", pad=4)
    _thin_ticks(panels)
    panels[0].set(ylabel="share of requests")
    _models_legend(figure, next(iter(alone.values())).fleet)


def _thin_ticks(panels: Sequence[Axes]) -> None:
    for axes in panels:
        axes.xaxis.set_major_locator(FixedLocator([0.25, 1, 4, 16, 48]))


def _burst(figure: Figure, burst: Burst) -> None:
    """Arrival rate and windows of the first seed's trace, and the running mean over all seeds."""
    upper, middle, lower = figure.subplots(3, 1, sharex=True, height_ratios=(1, 2.2, 2.2))
    ways = [POLICY, *(static_name(burst.fleet, m) for m in (-1, -2))]
    number = np.arange(1, burst.rates_per_s.shape[1] + 1)
    upper.plot(number, _window_rates(burst), color=_GREY, lw=0.9, rasterized=True)
    upper.set(ylabel="requests/s", ylim=(0, None), xlim=(0, number[-1]))
    upper.set_title("arrival rate over the last 20 requests, first seed", pad=4)
    for way in reversed(ways):
        look = {**_look(way, burst.fleet), "lw": 0.9, "linestyle": "-"}
        ends = number[WINDOW_SIZE - 1 :]
        middle.plot(ends, windows(burst, way)[0], rasterized=True, **look)
        running = np.cumsum(burst.performance[way], axis=1) / number
        nth = np.unique(np.linspace(0, len(number) - 1, 400).astype(int))
        _line(lower, number[nth].astype(np.float64), running[:, nth], **_look(way, burst.fleet))
    middle.set(ylabel="performance", ylim=(0, 1.04))
    middle.set_title("mean of the last 20 requests, first seed", pad=4)
    lower.set(ylabel="performance", xlabel="requests so far", ylim=(0, 1.04))
    num_seeds = len(burst.traces)
    lower.set_title(f"mean of all requests so far, {num_seeds} seeds (one standard deviation)", pad=4)
    _ways_legend(figure, ways, burst.fleet)


def _window_rates(burst: Burst) -> NDArray[np.float64]:
    """Of the first seed, at each arrival; as many gaps as there are at the beginning."""
    arrived_at = burst.traces[0].arrived_at
    num_gaps = np.minimum(np.arange(len(arrived_at)), WINDOW_SIZE - 1)
    span_s = arrived_at - arrived_at[np.arange(len(arrived_at)) - num_gaps]
    return np.asarray(num_gaps / np.maximum(span_s, 1e-3))


def _utility(figure: Figure, experiments: Experiments) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    pairs = [(experiments.hard, experiments.hard_8), (experiments.soft, experiments.soft_8)]
    for axes, (sweep, wide) in zip(panels, pairs, strict=True):
        for curves, gpus, label, look in _utility_curves(sweep, wide):
            _line(axes, sweep.rates_per_s, curves.performance / gpus, **look, label=f"{label}, {gpus} GPUs")
        _rate_axis(axes)
        axes.set(ylim=(0, None))
        axes.set_title(f"{sweep.fleet.deadline_kind} deadlines", pad=4)
    panels[0].set(ylabel="performance per GPU")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)


def _utility_curves(sweep: Sweep, wide: Sweep) -> list[tuple[Curves, int, str, dict[str, object]]]:
    large, narrow_gpus = static_name(sweep.fleet, -1), sweep.fleet.num_devices
    look = _look(large, sweep.fleet)
    return [
        (sweep.curves[POLICY], narrow_gpus, POLICY, _look(POLICY, sweep.fleet)),
        (sweep.curves[large], narrow_gpus, large, look),
        (wide.curves[large], wide.fleet.num_devices, large, {**look, "color": _GREY, "linestyle": "-"}),
    ]


def _windowed_utility(figure: Figure, experiments: Experiments) -> None:
    axes = figure.subplots()
    burst, wide = experiments.unpredictable["unpredictable-1"], experiments.unpredictable_8
    large = static_name(wide.fleet, -1)
    for of, way, colour in ((wide, large, _GREY), (burst, POLICY, _POLICY_COLOUR)):
        gpus = of.fleet.num_devices
        utility = windows(of, way)[0] / gpus
        ends = np.arange(WINDOW_SIZE, WINDOW_SIZE + len(utility))
        axes.plot(ends, utility, color=colour, lw=0.9, rasterized=True, label=f"{way}, {gpus} GPUs")
    axes.set(xlabel="requests so far", ylabel="performance per GPU", ylim=(0, None), xlim=(0, int(ends[-1])))
    axes.set_title("mean of the last 20 requests, first seed", pad=4)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=2)
