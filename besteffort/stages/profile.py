"""`profile`: measure a fleet's latencies on its real engines, and say what they mean for its deadlines."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from besteffort.artifacts import files
from besteffort.artifacts.profile_file import load_samples, save_samples, with_fit
from besteffort.engines.running import Urls, running_engines
from besteffort.errors import ProfileError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.latency import Latency, Sample
from besteffort.profiling import Effort, Run, measure_fleet, origin_of, plan_runs
from besteffort.profiling.measuring import Cell, served_twice
from besteffort.profiling.plot import plot_profile
from besteffort.profiling.service import with_scales
from besteffort.profiling.verdict import choice, crossings, suggest_deadlines
from besteffort.progress import Progress
from besteffort.stages.own_router import own_router

BUDGET_S = 300.0  # from the start to the last measurement
PRECISION = 0.03


def profile(
    fleet_dir: Path,
    *,
    output: Path,
    attached: Urls,
    budget_s: float = BUDGET_S,
    precision: float = PRECISION,
    suggest_deadline: bool = False,
    progress: Progress,
) -> None:
    """Measure through a router, and write `output` and its plot; what an interrupted run measured is kept.

    `budget_s` counts from the start, the engines' own start included; what a fit needs is measured
    whatever it is. `precision` is the relative half-width of a mean's 95 % interval that is good enough.

    Raises:
        FleetError, UsageError, EngineError: as the fleet and its engines raise them.
    """
    ends_at = time.monotonic() + budget_s
    if not 0.0 < precision < 1.0:
        raise UsageError(f"--precision {precision}: give a share of the mean, between 0 and 1")
    fleet = load_fleet(fleet_dir)
    fleet_sha256 = files.sha256(fleet_dir / "fleet.toml")
    facts = {
        "stage": "profile",
        "fleet": fleet.name,
        "fleet_sha256": fleet_sha256,
        "budget_s": budget_s,
        "precision": precision,
        "origin": origin_of(fleet),
    }
    notebook = _Notebook(output.with_suffix(".partial.parquet"), facts)
    notebook.take_up(progress)
    with (
        running_engines(fleet, fleet_dir, attached, progress) as engines,
        own_router(fleet, fleet_dir, engines, "round-robin") as url,
    ):
        runs = [run for run in plan_runs(fleet) if not notebook.has(run, fleet)]
        effort = Effort(budget_s, precision, ends_at)
        note = partial(notebook.note, fleet)
        rng = np.random.default_rng()  # prompts that these engines read before would be in their prefix cache
        asyncio.run(measure_fleet(fleet, url, runs, effort, note, rng, progress))
    samples, latency = with_fit(with_scales(notebook.samples, fleet), fleet)
    save_samples(output, samples, {**facts, "fit": _fit_facts(samples, latency, fleet)})
    notebook.path.unlink(missing_ok=True)
    _tell(samples, latency, fleet, output, suggest_deadline, progress)


class _Notebook:
    """The samples so far, on disk after every run, so that a kill costs one run."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path = path
        self._facts = facts
        self._kept: list[Sample] = []  # of an interrupted run
        self.samples: list[Sample] = []

    def take_up(self, progress: Progress) -> None:
        """What an interrupted run left behind, if it was of this very fleet.toml, here."""
        if not self.path.exists():
            return
        try:
            samples, facts = load_samples(self.path)
        except ProfileError:
            return
        if any(facts.get(key) != self._facts[key] for key in ("fleet_sha256", "origin")):
            progress.say(f"{self.path}: begun for another fleet.toml, or elsewhere; starting anew")
            return
        # Each service is to be served twice, minutes apart: of those that were not, both times are to come.
        kept = [sample for sample in samples if sample.kind != "service" or served_twice(sample)]
        self._kept = self.samples = kept
        progress.say(f"{self.path}: going on after {len(kept)} samples of an interrupted run")

    def has(self, run: Run, fleet: Fleet) -> bool:
        names = [fleet.model_names[m] for m in run.models]
        wanted = {
            (name, size, run.num_prompt_tokens, tuple(other for other in names if other != name))
            for name, size in zip(names, run.batch_sizes, strict=True)
        }
        there = {
            (s.model, s.batch_size, s.num_prompt_tokens, s.busy_models)
            for s in self._kept
            if s.kind == run.kind and (not s.busy_models or self._same_load(s, run, names))
        }
        return wanted <= there

    @staticmethod
    def _same_load(sample: Sample, run: Run, names: Sequence[str]) -> bool:
        sizes = dict(zip(names, run.batch_sizes, strict=True))
        return tuple(sizes.get(name) for name in sample.busy_models) == sample.busy_batch_sizes

    def note(self, fleet: Fleet, cells: Sequence[Cell]) -> None:
        self.samples = [*self._kept, *(sample for cell in cells for sample in cell.samples(fleet))]
        save_samples(self.path, self.samples, self._facts)


def _fit_facts(samples: Sequence[Sample], latency: Latency, fleet: Fleet) -> dict[str, Any]:
    """The fit's small numbers, and how far it is from what was measured, for a person to read."""
    return {
        "overhead_ms": dict(zip(fleet.model_names, latency.overhead_ms.round(4).tolist(), strict=True)),
        "context_ms_per_token": dict(
            zip(fleet.model_names, latency.context_ms_per_token.round(8).tolist(), strict=True)
        ),
        "lag_steps": latency.lag_steps,
        "residual_rms": _residuals(samples),
    }


def _residuals(samples: Sequence[Sample]) -> dict[str, float]:
    """Root mean square of (fit - measured) / measured by kind; a stall is held against its own size."""
    found: dict[str, float] = {}
    for kind in dict.fromkeys(sample.kind for sample in samples):
        shares = [
            (s.fitted_ms - s.mean_ms) / s.mean_ms
            for s in samples
            if s.kind == kind and s.fitted_ms is not None and s.mean_ms > 0
        ]
        if shares:
            found[kind] = round(float(np.sqrt(np.mean(np.square(shares)))), 4)
    return found


def _tell(
    samples: Sequence[Sample],
    latency: Latency,
    fleet: Fleet,
    output: Path,
    suggest_deadline: bool,
    progress: Progress,
) -> None:
    plot = output.with_suffix(".png")
    files.write_atomically(plot, lambda temporary: plot_profile(samples, latency, fleet, temporary))
    num_outliers = sum(len(sample.outliers_ms) for sample in samples)
    residuals = ", ".join(f"{kind} {100 * value:.1f} %" for kind, value in _residuals(samples).items())
    progress.say(
        f"wrote {output}: {len(samples)} samples, {num_outliers} outliers marked; plot in {plot}; "
        f"the fit is off by (root mean square): {residuals}"
    )
    for crossing in crossings(fleet, latency):
        progress.say(crossing.line)
    for line in choice(fleet, latency).lines:
        progress.say(line)
    if suggest_deadline:
        for line in suggest_deadlines(fleet, latency).lines:
            progress.say(line)
