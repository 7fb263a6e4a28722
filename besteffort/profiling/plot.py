"""A profile as a picture: what was measured, the fit through it, and the deadlines."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample


def plot_profile(samples: Sequence[Sample], latency: Latency, fleet: Fleet, path: Path) -> None:
    """A PNG with two panels per model: steps by batch size, and first tokens by prompt length."""
    num_models = len(fleet.models)
    figure = Figure(figsize=(9, 2.8 * num_models), layout="constrained")
    panels = figure.subplots(num_models, 2, squeeze=False)
    for m, model in enumerate(fleet.models):
        own = [sample for sample in samples if sample.model == model.name]
        _plot_steps(panels[m, 0], own, latency, m, model.max_num_seqs)
        _plot_prompts(panels[m, 1], own, latency, m)
        for deadline in sorted({task.deadline_ms_per_token for task in fleet.tasks}):
            panels[m, 0].axhline(deadline, color="#C8382E", linestyle="--", linewidth=1)
            panels[m, 0].annotate(
                f"{deadline:g} ms/token", (1, deadline), color="#C8382E", fontsize=8, va="bottom"
            )
        panels[m, 0].set_ylim(0, None)  # with the deadlines in sight, however far
        panels[m, 0].set_title(model.name, loc="left", fontsize=10)
        panels[m, 0].legend(fontsize=7)
        panels[m, 1].legend(fontsize=7)
    figure.suptitle(f"{fleet.name}: measured (95 % intervals), fitted, deadlines", fontsize=11)
    figure.savefig(path, format="png", dpi=110)


def _plot_steps(axes: Axes, own: list[Sample], latency: Latency, model: int, last: int) -> None:
    sizes = np.arange(1, last + 1)
    decode = [sample for sample in own if sample.kind == "decode"]
    steps_ms = latency.step_table_ms(last)[model, sizes]
    for nth, context in enumerate(sorted({round(sample.context_tokens, -1) for sample in decode})[:3]):
        near = [sample for sample in decode if round(sample.context_tokens, -1) == context]
        _points(axes, near, nth, f"context {context:g}" if context else "measured", by="batch_size")
        fit_ms = steps_ms + latency.context_ms_per_token[model] * sizes * context
        axes.plot(sizes, fit_ms, color=f"C{nth}", linewidth=1)
    busy = [sample for sample in own if sample.kind == "interference"]
    if busy:
        _points(axes, busy, 3, "beside busy models", by="batch_size")
    axes.set(xlabel="batch size", ylabel="step (ms)")


def _plot_prompts(axes: Axes, own: list[Sample], latency: Latency, model: int) -> None:
    alone = [sample for sample in own if sample.kind == "prefill"]
    _points(axes, alone, 0, "first token, alone", by="num_prompt_tokens")
    stalls = [sample for sample in own if sample.kind == "stall"]
    if stalls:
        _points(axes, stalls, 1, "what a batch loses to it", by="num_prompt_tokens")
    lengths = np.linspace(1, max([16, *(s.num_prompt_tokens for s in alone)]), 50)
    fit_ms = latency.prefill_ms(lengths.astype(np.int64))[model] + latency.overhead_ms[model]
    axes.plot(lengths, fit_ms, color="C0", linewidth=1)
    axes.set(xlabel="prompt (tokens)", ylabel="ms", ylim=(0, None))


def _points(axes: Axes, samples: Sequence[Sample], colour: int, label: str, *, by: str) -> None:
    axes.errorbar(
        [getattr(sample, by) for sample in samples],
        [sample.mean_ms for sample in samples],
        yerr=[sample.ci_ms or 0.0 for sample in samples],
        fmt="o",
        markersize=4,
        capsize=2,
        linewidth=1,
        color=f"C{colour}",
        label=label,
    )
