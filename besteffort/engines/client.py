"""One completion over HTTP, timed: what `profile` and `replay` send and what they keep of the answer."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from besteffort.errors import EngineError

# Ids that every vocabulary has, past the special tokens.
_TOKEN_IDS = (100, 500)


@dataclass(frozen=True, slots=True)
class Completion:
    """A streamed answer. Instants are `time.perf_counter()` seconds."""

    sent_at: float
    chunk_at: tuple[float, ...]  # one per stream event that carried text; nearly always one a token
    num_tokens: int
    headers: Mapping[str, str]
    tokens_at: tuple[int, ...] = ()  # the tokens so far at each of `chunk_at`; empty: the server did not say

    @property
    def ttft_ms(self) -> float:
        return 1000.0 * (self.chunk_at[0] - self.sent_at)

    @property
    def itl_ms(self) -> float:
        """The mean time between this answer's tokens; NaN if it has only one."""
        if self.num_tokens < 2:
            return float("nan")
        return 1000.0 * (self.chunk_at[-1] - self.chunk_at[0]) / (self.num_tokens - 1)


def random_prompt(num_tokens: int, rng: np.random.Generator) -> list[int]:
    """Token ids drawn at random, so that no prefix is ever cached."""
    return [int(token) for token in rng.integers(*_TOKEN_IDS, num_tokens)]


def completion_body(
    model: str, prompt: list[int], num_output_tokens: int, *, counted: bool = False
) -> dict[str, Any]:
    """A request for exactly `num_output_tokens`, streamed, with the count at the end.

    If `counted`, with the count so far in every event, as vLLM can: a busy one puts several tokens into one.
    """
    options = {"include_usage": True, **({"continuous_usage_stats": True} if counted else {})}
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": num_output_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": options,
    }


async def complete(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str] | None = None,
) -> Completion:
    """Send one streamed completion to `url`/v1/completions and time its answer.

    Raises:
        EngineError: it was refused, broke off, or ended without a token or its count.
    """
    sent_at = time.perf_counter()
    chunk_at: list[float] = []
    tokens_at: list[int] = []
    num_tokens = 0
    try:
        async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            if response.status != 200:
                raise EngineError(f"HTTP {response.status}: {_message(await response.text())}")
            async for line in response.content:
                now = time.perf_counter()
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise EngineError(f"the stream broke off: {_message(json.dumps(event))}")
                if event.get("usage"):
                    num_tokens = event["usage"]["completion_tokens"]
                if event.get("choices"):
                    chunk_at.append(now)
                    tokens_at.append(num_tokens)
            answer_headers = dict(response.headers)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EngineError(f"{type(error).__name__}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"an answer that makes no sense ({type(error).__name__}: {error})") from error
    if not chunk_at or not num_tokens:
        raise EngineError("the stream ended without a token or without its count")
    counted = tokens_at[0] > 0
    return Completion(
        sent_at, tuple(chunk_at), num_tokens, answer_headers, tuple(tokens_at) if counted else ()
    )


def _message(text: str) -> str:
    """The message of an error in OpenAI's schema, else the text itself, shortened."""
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return text[:300]


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """A session with no limit of connections, so that an open loop stays open."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=timeout_s, connect=min(30.0, timeout_s)),
        read_bufsize=2**20,
    )
