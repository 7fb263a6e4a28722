"""`profile`: measure a fleet's latencies on its real engines, and keep what was measured so far."""

import asyncio
import itertools
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np

from besteffort.artifacts import files
from besteffort.artifacts.profile_file import load_samples, save_samples
from besteffort.engines.client import open_session
from besteffort.engines.measure import Spread, first_token_times_ms, step_times_ms
from besteffort.engines.running import Engines, Urls, running_engines
from besteffort.errors import ProfileError
from besteffort.fleet import Fleet, load_fleet
from besteffort.latency import Sample
from besteffort.progress import Progress

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PROMPT_LENGTHS = (16, 64, 128, 256)  # tokens
NUM_PROMPT_TOKENS = 16  # where the prompt is not what is measured
NUM_PREFILLS = 6
INTERFERENCE_BATCH_SIZE = 4
INTERFERENCE_S = 6.0
REQUEST_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Run:
    """One thing to do: load the models of `models` together, and measure each of them."""

    kind: Literal["decode", "prefill", "interference"]
    models: tuple[int, ...]
    batch_size: int
    num_prompt_tokens: int

    def title(self, fleet: Fleet) -> str:
        names = " + ".join(fleet.model_names[m] for m in self.models)
        if self.kind == "prefill":
            return f"{names}, a prompt of {self.num_prompt_tokens} tokens"
        return f"{names}, batch {self.batch_size}"

    def keys(self, fleet: Fleet) -> set[tuple[str, str, int, int, tuple[str, ...]]]:
        """Of the samples that it makes."""
        return {
            (self.kind, fleet.model_names[m], self.batch_size, self.num_prompt_tokens,
             _others(fleet, self.models, m))
            for m in self.models
        }  # fmt: skip


def plan_runs(fleet: Fleet) -> list[Run]:
    """Each model alone by batch size and by prompt length; then pairs, and all models together."""
    models = range(len(fleet.models))
    longest = fleet.engine.max_model_len - 8
    decode = [
        Run("decode", (m,), batch_size, NUM_PROMPT_TOKENS)
        for m in models
        for batch_size in BATCH_SIZES
        if batch_size <= fleet.models[m].max_num_seqs
    ]
    prefill = [Run("prefill", (m,), 1, n) for m in models for n in PROMPT_LENGTHS if n <= longest]
    together = [*itertools.combinations(models, 2), tuple(models)]
    interference = [
        Run("interference", group, INTERFERENCE_BATCH_SIZE, NUM_PROMPT_TOKENS)
        for group in dict.fromkeys(together)
        if len(group) > 1
    ]
    return [*decode, *prefill, *interference]


def profile(fleet_dir: Path, *, output: Path, attached: Urls, seed: int, progress: Progress) -> None:
    """Measure, and write `output`; what an interrupted run measured is taken up again.

    Raises:
        FleetError, UsageError, EngineError: as the fleet and its engines raise them.
    """
    fleet = load_fleet(fleet_dir)
    fleet_sha256 = files.sha256(fleet_dir / "fleet.toml")
    facts = {"stage": "profile", "fleet": fleet.name, "fleet_sha256": fleet_sha256, "seed": seed}
    partial = output.with_suffix(".partial.parquet")
    samples = _taken_up(partial, fleet_sha256, progress)
    with running_engines(fleet, fleet_dir, attached, progress) as engines:
        for_now = _Notebook(partial, facts, samples)
        asyncio.run(_measure_all(fleet, engines, for_now, np.random.default_rng(seed), progress))
    partial.replace(output)
    progress.say(f"wrote {output}: {len(samples)} samples")


@dataclass(frozen=True)
class _Notebook:
    """The samples so far, on disk after every run, so that a kill costs one run."""

    path: Path
    facts: Mapping[str, Any]
    samples: list[Sample]

    def note(self, samples: list[Sample]) -> None:
        self.samples.extend(samples)
        save_samples(self.path, self.samples, self.facts)


def _taken_up(partial: Path, fleet_sha256: str, progress: Progress) -> list[Sample]:
    """What an interrupted run left behind, if it was of this very fleet.toml."""
    if not partial.exists():
        return []
    try:
        samples, facts = load_samples(partial)
    except ProfileError:
        return []
    if facts.get("fleet_sha256") != fleet_sha256:
        progress.say(f"{partial}: begun for another fleet.toml; starting anew")
        return []
    progress.say(f"{partial}: going on after {len(samples)} samples of an interrupted run")
    return samples


async def _measure_all(
    fleet: Fleet, engines: Engines, notebook: _Notebook, rng: np.random.Generator, progress: Progress
) -> None:
    done = {(s.kind, s.model, s.batch_size, s.num_prompt_tokens, s.busy_models) for s in notebook.samples}
    runs = [run for run in plan_runs(fleet) if not run.keys(fleet) <= done]
    async with open_session(REQUEST_TIMEOUT_S) as session:
        with progress.bar("Profiling", len(runs)) as bar:
            for model in {m for run in runs for m in run.models}:
                bar.describe(f"warming up {fleet.model_names[model]}")
                await step_times_ms(session, engines[model][0], 4, NUM_PROMPT_TOKENS, rng)
            for run in runs:
                bar.describe(run.title(fleet))
                notebook.note(await _measure(fleet, engines, session, run, rng))
                bar.advance()


async def _measure(
    fleet: Fleet,
    engines: Engines,
    session: aiohttp.ClientSession,
    run: Run,
    rng: np.random.Generator,
) -> list[Sample]:
    """One sample for each of the run's models, all loaded at the same time."""
    until = time.perf_counter() + INTERFERENCE_S if run.kind == "interference" else None

    async def measure(model: int) -> list[float]:
        engine = engines[model][0]
        if run.kind == "prefill":
            return await first_token_times_ms(session, engine, run.num_prompt_tokens, NUM_PREFILLS, rng)
        return await step_times_ms(session, engine, run.batch_size, run.num_prompt_tokens, rng, until)

    measured_ms = await asyncio.gather(*(measure(model) for model in run.models))
    return [
        Sample(
            kind=run.kind,
            model=fleet.model_names[model],
            batch_size=run.batch_size,
            num_prompt_tokens=run.num_prompt_tokens,
            busy_models=_others(fleet, run.models, model),
            **asdict(Spread.of(of_model)),
        )
        for model, of_model in zip(run.models, measured_ms, strict=True)
    ]


def _others(fleet: Fleet, models: tuple[int, ...], model: int) -> tuple[str, ...]:
    return tuple(fleet.model_names[other] for other in models if other != model)
