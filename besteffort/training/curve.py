"""The evaluation curve of a training, as a plot."""

from pathlib import Path

from matplotlib.figure import Figure

from besteffort.observation import Encoding, FleetEncoding
from besteffort.training.state import Training


def plot_curve(
    training: Training[Encoding] | Training[FleetEncoding], title: str, rate_scale: float, path: Path
) -> None:
    """A PNG with what counts, and what it reached at each arrival rate and on each trace."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, curve = figure.add_subplot(), training.curve
    iterations = [evaluation.iteration for evaluation in curve]
    for rate in curve[0].by_rate:
        values = [evaluation.by_rate[rate] for evaluation in curve]
        axes.plot(iterations, values, linewidth=0.8, label=f"{float(rate) * rate_scale:g}/s")
    for trace in curve[0].by_trace:
        values = [evaluation.by_trace[trace] for evaluation in curve]
        axes.plot(iterations, values, linewidth=1.6, linestyle="--", label=f"trace {trace}")
    overall = [evaluation.performance for evaluation in curve]
    axes.plot(iterations, overall, color="black", marker="o", markersize=3, linewidth=2, label="mean")
    axes.axvline(training.best_evaluation.iteration, color="grey", linestyle=":", label="kept")
    axes.set_xlabel("training iteration")
    axes.set_ylabel("performance (share of the peak)")
    axes.set_title(title)
    axes.legend(title="arrival rate (requests/s)", fontsize="small", ncols=2)
    figure.savefig(path, format="png", dpi=120)
