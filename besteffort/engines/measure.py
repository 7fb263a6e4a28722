"""Latencies measured on running engines: waves of equal requests, and prompts that join them."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import aiohttp
import numpy as np

from besteffort.engines.client import Completion, complete, completion_body, random_prompt
from besteffort.errors import EngineError
from besteffort.latency import Served

_LEAD_MS = 100.0  # in which a batch's own prompts are surely read
_FEWER_OR_MORE = 16  # tokens of a prompt, at most
_SOME_EVENTS = 65  # tokens of an answer that shows how many an event has


@dataclass(frozen=True, slots=True)
class Target:
    """Where a model's requests go, and under which name."""

    session: aiohttp.ClientSession
    url: str
    model: str
    rng: np.random.Generator

    async def ask(self, num_prompt_tokens: int, num_output_tokens: int) -> Completion:
        prompt = random_prompt(num_prompt_tokens, self.rng)
        body = completion_body(self.model, prompt, num_output_tokens, counted=True)
        return await complete(self.session, self.url, body)


async def wave_paces_ms(
    target: Target, batch_size: int, num_prompt_tokens: int, num_steps: int, most_steps: int
) -> AsyncIterator[float]:
    """Time between tokens while exactly `batch_size` requests decode, of one wave after another.

    One figure per wave: the steps of one wave depend on each other, so that they say less than their
    number. It counts tokens, since a busy server hands out several at once. A wave in which no two
    events fall into the time when all decode is followed by one of twice as many steps.

    Raises:
        EngineError: the engine does not run that many requests at once.
    """
    misses = 0
    while misses < 4:
        wave = await asyncio.gather(
            *(target.ask(num_prompt_tokens, num_steps + 1) for _ in range(batch_size))
        )
        pace_ms = steady_pace_ms(wave)
        if pace_ms is None:
            misses, num_steps = misses + 1, min(2 * num_steps, most_steps)
        else:
            yield pace_ms
    raise EngineError(
        f"{target.model} at {target.url} never ran {batch_size} requests at once; give it "
        "more memory for its KV cache, or lower its max_num_seqs in fleet.toml"
    )


def steady_pace_ms(wave: Sequence[Completion]) -> float | None:
    """From the last request's first token to the first request's last: all of them decode."""
    begin = max(completion.chunk_at[0] for completion in wave)
    end = min(completion.chunk_at[-1] for completion in wave)
    num_tokens, took_s = 0, 0.0
    for completion in wave:
        inside = [n for n, at in enumerate(completion.chunk_at) if begin <= at <= end]
        if len(inside) > 1:
            num_tokens += token_count(completion, inside[0], inside[-1])
            took_s += completion.chunk_at[inside[-1]] - completion.chunk_at[inside[0]]
    return 1000.0 * took_s / num_tokens if num_tokens else None


def token_count(completion: Completion, first: int, last: int) -> int:
    """Tokens that came after event `first`, up to `last`."""
    if not completion.tokens_at:
        return last - first
    return completion.tokens_at[last] - completion.tokens_at[first]


async def serve(
    targets: Sequence[Target],
    rate_per_s: float,
    lengths: Callable[[np.random.Generator], tuple[int, int]],
    duration_s: float,
) -> list[list[Served]]:
    """Let requests come at random (Poisson) for a time, to each target as often, and wait for all answers.

    `lengths` draws a request's tokens, of its prompt and of its answer. At least one request comes to each.
    """
    began_at = time.perf_counter()

    async def one(target: Target, after_s: float) -> Served:
        num_prompt_tokens, num_output_tokens = lengths(target.rng)
        await asyncio.sleep(max(0.0, began_at + after_s - time.perf_counter()))
        done = await target.ask(num_prompt_tokens, num_output_tokens)
        latency_ms = 1000.0 * (done.chunk_at[-1] - done.sent_at) / done.num_tokens
        return Served(done.sent_at - began_at, num_prompt_tokens, num_output_tokens, latency_ms, done.ttft_ms)

    async def come(target: Target) -> list[Served]:
        num = max(1, int(target.rng.poisson(rate_per_s * duration_s)))
        instants = np.sort(target.rng.uniform(0.0, duration_s, num))
        served = await asyncio.gather(*(one(target, float(after_s)) for after_s in instants))
        return sorted(served, key=lambda each: each.at_s)  # timers a moment apart may swap

    return list(await asyncio.gather(*map(come, targets)))


async def first_token_ms(target: Target, num_prompt_tokens: int) -> float:
    """Time to the first token of a single request: the mean of one somewhat shorter and one as much longer.

    Lengths differ each time as they do in service. On a CPU a length that was just seen takes less: oneDNN
    compiles its kernels for each number of rows, and keeps some hundreds.
    """
    more = _some_tokens(target.rng, num_prompt_tokens)
    pair = [await target.ask(num_prompt_tokens + sign * more, 1) for sign in (-1, 1)]
    return float(np.mean([one.ttft_ms for one in pair]))


def _some_tokens(rng: np.random.Generator, num_prompt_tokens: int) -> int:
    return int(rng.integers(0, min(_FEWER_OR_MORE, num_prompt_tokens)))


@dataclass(frozen=True, slots=True)
class Joined:
    """A prompt that came while others decoded."""

    stall_ms: float  # by how much the others' steps were longer around it
    ttft_ms: float


async def joined_prompts(
    target: Target,
    batch_size: int,
    num_prompt_tokens: int,
    num_joining: int,
    step_ms: float,
    most_steps: int,
) -> list[Joined]:
    """Let prompts of one length join a batch that decodes, one after another, at no fixed phase.

    Each asks for a single token, so that the batch is as before once it is read. By turns they are shorter
    and longer, as in `first_token_ms`. They come so far apart that no event of the batch tells of two.
    """
    apart = 3 + 3 * (await _tokens_per_event(target) - 1)  # steps, and up to two more
    num_steps = min(16 + (7 + apart) * num_joining + math.ceil(_LEAD_MS / step_ms), most_steps)
    running = [asyncio.create_task(target.ask(16, num_steps)) for _ in range(batch_size)]
    await asyncio.sleep((6 * step_ms + _LEAD_MS) / 1000.0)
    joining: list[Completion] = []
    more = 0
    while len(joining) < num_joining and not any(task.done() for task in running):
        more = -more if len(joining) % 2 else _some_tokens(target.rng, num_prompt_tokens)
        joining.append(await target.ask(num_prompt_tokens + more, 1))
        await asyncio.sleep(step_ms * (apart + 2 * target.rng.random()) / 1000.0)
    batch = [await task for task in running]
    last = min(one.chunk_at[-1] for one in batch)
    return [
        Joined(_stall_ms(batch, one), one.ttft_ms)
        for one in joining
        if one.chunk_at[-1] < last and one.sent_at > max(other.chunk_at[0] for other in batch)
    ]


async def _tokens_per_event(target: Target) -> int:
    """Of a server that nothing else keeps busy: one, or its `--stream-interval`."""
    one = await target.ask(16, _SOME_EVENTS)
    counts = [token_count(one, n, n + 1) for n in range(len(one.chunk_at) - 1)]
    return max(1, round(float(np.median(counts))))


def _stall_ms(batch: Sequence[Completion], joining: Completion) -> float:
    """What the running requests lost between the prompt's arrival and its token, on average."""
    losses = []
    for one in batch:
        steps = [
            (before, after, (after - before) / max(1, token_count(one, n, n + 1)), token_count(one, n, n + 1))
            for n, (before, after) in enumerate(pairwise(one.chunk_at))
        ]
        usual = float(np.median([each for *_, each, _ in steps]))
        # Its token and theirs come in one step, but not at quite the same instant.
        around = [s for s in steps if s[1] > joining.sent_at and s[0] < joining.chunk_at[0] + usual / 4]
        losses.append(sum(after - before - usual * tokens for before, after, _, tokens in around))
    return 1000.0 * float(np.mean(losses))
