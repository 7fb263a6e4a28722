"""The engines of a fleet, simulated: they take as long as its profile says, or a fraction of that, and fail
in the ways that they are asked for.

python -m tests.benchmarks.simulated_engine FLEET_DIR SPEED MODEL=PORT...

A prompt is `KIND NUMBER WORDS`; the number is in every token of the answer. What is no kind is answered.
"""

import asyncio
import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import uvloop

from besteffort.artifacts.profile_file import load_latency
from besteffort.fleet import load_fleet

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_MAX_BATCH = 1024
_CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass
class Counts:
    """Of all engines here."""

    num_requests: int = 0
    num_running: int = 0
    num_left: int = 0  # the router closed the connection before the answer was whole
    failed_before: set[str] = field(default_factory=set)  # prompts that were failed once


@dataclass
class Replica:
    steps_s: list[float]  # by batch size
    counts: Counts
    num_running: int = 0

    @property
    def step_s(self) -> float:
        return self.steps_s[min(self.num_running, _MAX_BATCH)]

    def run(self, change: int) -> None:
        self.num_running += change
        self.counts.num_running += change


def _plain(body: object, status: bytes = b"200 OK") -> bytes:
    data = json.dumps(body).encode()
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(data)) + data


_MODELS = _plain({"object": "list", "data": [{"id": "simulated", "object": "model"}]})


class SimulatedEngine(asyncio.Protocol):
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._works = False
        self._timer: asyncio.TimerHandle | None = None
        self._fates: dict[str, Callable[[], None]] = {
            "endless": lambda: self._stream(1 << 60),
            "silent": lambda: None,
            "refuse": lambda: self._end(_plain({"error": {"message": self._number}}, b"400 Bad Request")),
            "fail": lambda: self._end(self._dead()),
            "fail-once": lambda: self._fail_once(lambda: self._end(self._dead())),
            "half-head": lambda: self._fail_once(lambda: self._break_off(b"HTTP/1.1 200 OK\r\ncontent-")),
            "garbage": lambda: self._fail_once(lambda: self._break_off(b"@@@ is this HTTP? @@@\r\n\r\n")),
            "half-stream": lambda: self._stream(1 << 60, breaks_after=self._num_tokens // 2),
        }

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._works:
            self._replica.counts.num_left += 1
            self._rest()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._buffer, 0, end)
        until = end + 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < until:
            return
        request, self._buffer = self._buffer[:until], self._buffer[until:]
        if request.startswith(b"GET /counts"):
            counts = self._replica.counts
            names = ("num_requests", "num_running", "num_left")
            self._transport.write(_plain({name: getattr(counts, name) for name in names}))
        elif request.startswith(b"GET"):
            self._transport.write(_MODELS)
        else:
            self._begin(json.loads(request[end + 4 :]))

    def _begin(self, body: dict[str, Any]) -> None:
        self._replica.counts.num_requests += 1
        self._replica.run(1)
        self._works = True
        self._prompt = str(body["prompt"])
        kind, self._number, *_ = [*self._prompt.split(" ", 2), ""]
        self._num_tokens = int(body["max_tokens"])
        fate = self._fates.get(kind)
        if fate is not None:
            fate()
        elif body.get("stream"):
            self._stream(self._num_tokens)
        else:
            self._answer()

    def _answer(self) -> None:
        choice = {"index": 0, "text": f"@{self._number}@" * self._num_tokens, "finish_reason": "length"}
        answer = _plain({"choices": [choice], "usage": {"completion_tokens": self._num_tokens}})
        self._later(self._num_tokens, lambda: self._end(answer))

    def _stream(self, num_tokens: int, breaks_after: int | None = None) -> None:
        self._transport.write(_CHUNKED)
        event = b'data: {"choices":[{"index":0,"text":"@%b@"}]}\n\n' % self._number.encode()
        chunk = b"%x\r\n%b\r\n" % (len(event), event)

        def step(index: int) -> None:
            if index == breaks_after:
                self._break_off()
            elif index == num_tokens:
                self._end(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            else:
                self._transport.write(chunk)
                self._later(1, lambda: step(index + 1))

        self._later(1, lambda: step(0))

    def _dead(self) -> bytes:
        return _plain({"error": {"message": self._number}}, b"500 Internal Server Error")

    def _fail_once(self, fail: Callable[[], None]) -> None:
        """The next one that is asked will answer."""
        counts = self._replica.counts
        if self._prompt in counts.failed_before:
            self._answer()
        else:
            counts.failed_before.add(self._prompt)
            fail()

    def _break_off(self, last_words: bytes = b"") -> None:
        self._rest()
        self._transport.write(last_words)
        self._transport.close()

    def _later(self, num_steps: int, callback: Callable[[], None]) -> None:
        self._timer = self._loop.call_later(num_steps * self._replica.step_s, callback)

    def _end(self, answer: bytes) -> None:
        self._rest()
        self._transport.write(answer)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._works = False
        self._replica.run(-1)


def command(fleet_dir: Path, speed: float, ports: list[tuple[str, int]]) -> list[str]:
    words = [f"{model}={port}" for model, port in ports]
    return [sys.executable, "-m", "tests.benchmarks.simulated_engine", str(fleet_dir), str(speed), *words]


async def main(fleet_dir: Path, speed: float, places: list[str]) -> None:
    fleet = load_fleet(fleet_dir)
    table_ms = load_latency(fleet_dir / "profile.parquet", fleet).step_table_ms(_MAX_BATCH)
    counts = Counts()
    for place in places:
        name, _, port = place.partition("=")
        steps_s = (table_ms[fleet.model_names.index(name)] / (1000.0 * speed)).tolist()
        replica = Replica(steps_s, counts)
        protocol = functools.partial(SimulatedEngine, replica)
        await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", int(port))
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
