"""Latency samples from a running engine: waves of equal requests, and the gaps between their tokens."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import aiohttp
import numpy as np

from besteffort.engines.client import Completion, complete, completion_body, random_prompt
from besteffort.engines.running import Engine
from besteffort.errors import EngineError

NUM_STEPS = 24  # of a wave, once all of its requests run
MIN_MEASUREMENTS = 40
MAX_WAVES = 6


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one duration."""

    mean_ms: float
    std_ms: float
    p50_ms: float
    p95_ms: float
    num_measurements: int

    @staticmethod
    def of(measured_ms: Sequence[float]) -> "Spread":
        p50, p95 = np.percentile(measured_ms, [50, 95])
        return Spread(
            mean_ms=float(np.mean(measured_ms)),
            std_ms=float(np.std(measured_ms, ddof=1)) if len(measured_ms) > 1 else 0.0,
            p50_ms=float(p50),
            p95_ms=float(p95),
            num_measurements=len(measured_ms),
        )


async def step_times_ms(
    session: aiohttp.ClientSession,
    engine: Engine,
    batch_size: int,
    num_prompt_tokens: int,
    rng: np.random.Generator,
    keep_on_until: float | None = None,
) -> list[float]:
    """Gaps between tokens while exactly `batch_size` requests decode.

    Ends after enough measurements, or, given `keep_on_until` (`time.perf_counter()` seconds), not
    before that instant, so that engines measured together load each other all the while.

    Raises:
        EngineError: the engine never ran that many requests at once.
    """
    gaps: list[float] = []
    for num_waves in range(1, 1000):
        wave = await _wave(session, engine, batch_size, num_prompt_tokens, rng)
        gaps += _steady_gaps_ms(wave)
        enough = len(gaps) >= MIN_MEASUREMENTS * batch_size or num_waves >= MAX_WAVES
        if time.perf_counter() >= keep_on_until if keep_on_until is not None else enough:
            break
    if not gaps:
        raise EngineError(
            f"{engine.served_name} at {engine.url} never ran {batch_size} requests at once; give it "
            "more memory for its KV cache, or lower its max_num_seqs in fleet.toml"
        )
    return gaps


async def first_token_times_ms(
    session: aiohttp.ClientSession,
    engine: Engine,
    num_prompt_tokens: int,
    num_repeats: int,
    rng: np.random.Generator,
) -> list[float]:
    """Times to the first token of single requests, one after another."""
    times = []
    for _ in range(num_repeats):
        body = completion_body(engine.served_name, random_prompt(num_prompt_tokens, rng), 1)
        times.append((await complete(session, engine.url, body)).ttft_ms)
    return times


async def _wave(
    session: aiohttp.ClientSession,
    engine: Engine,
    batch_size: int,
    num_prompt_tokens: int,
    rng: np.random.Generator,
) -> list[Completion]:
    prompts = [random_prompt(num_prompt_tokens, rng) for _ in range(batch_size)]
    bodies = [completion_body(engine.served_name, prompt, NUM_STEPS) for prompt in prompts]
    return list(await asyncio.gather(*(complete(session, engine.url, body) for body in bodies)))


def _steady_gaps_ms(wave: Sequence[Completion]) -> list[float]:
    """From the last request's first token to the first request's last: all of them decode."""
    begin = max(completion.chunk_at[0] for completion in wave)
    end = min(completion.chunk_at[-1] for completion in wave)
    return [
        1000.0 * (after - before)
        for completion in wave
        for before, after in pairwise(completion.chunk_at)
        if begin <= before and after <= end
    ]
