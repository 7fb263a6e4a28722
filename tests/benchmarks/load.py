"""Closed loops of requests over connections that stay open, with as little in between as Python allows."""

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from tests.benchmarks.mock_engine import STREAM_S

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_STAMP = re.compile(rb"@(\d+\.\d+)@")
_BODY = b'{"model":"besteffort/hellaswag","prompt":"The man turned on the","max_tokens":32%b}'


@dataclass
class Sample:
    """Seconds."""

    latency_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    transit_s: list[float] = field(default_factory=list)  # from the mock's write of a token to our read
    num_failed: int = 0


def request_bytes(*, stream: bool) -> bytes:
    body = _BODY % (b',"stream":true' if stream else b"")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return head + b"Accept: */*\r\nUser-Agent: bench\r\nContent-Length: %d\r\n\r\n" % len(body) + body


class _Loop(asyncio.Protocol):
    def __init__(self, request: bytes, sample: Sample, until: float) -> None:
        self._request = request
        self._sample = sample
        self._until = until
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self._sample.num_failed += 1
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        sample = self._sample
        if not self._buffer:
            sample.ttft_s.append(now - self._sent_at)
        self._buffer += data
        for stamp in _STAMP.findall(data):
            sample.transit_s.append(now - float(stamp))
        if not self._complete():
            return
        sample.latency_s.append(now - self._sent_at)
        if not self._buffer.startswith(b"HTTP/1.1 200"):
            sample.num_failed += 1
        if now < self._until:
            self._send()
        else:
            self.done.set_result(None)
            self._transport.abort()

    def _send(self) -> None:
        self._buffer = b""
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)

    def _complete(self) -> bool:
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return False
        length = _LENGTH.search(self._buffer, 0, head)
        if length is None:
            return self._buffer.endswith(b"0\r\n\r\n")
        return len(self._buffer) >= head + 4 + int(length[1])


async def drive(
    ports: Sequence[int], *, num_connections: int, duration_s: float, stream: bool = False
) -> Sample:
    """What `num_connections` loops saw in `duration_s`; each ends with its last answer.

    Streams begin one after the other, so that their tokens do not all come at once.
    """
    sample = Sample()
    until = time.perf_counter() + duration_s
    loop = asyncio.get_running_loop()
    request = request_bytes(stream=stream)
    loops = []
    for number in range(num_connections):
        port = ports[number % len(ports)]
        loops.append(
            (await loop.create_connection(lambda: _Loop(request, sample, until), "127.0.0.1", port))[1]
        )
        if stream:
            await asyncio.sleep(STREAM_S / num_connections)
    await asyncio.gather(*(one.done for one in loops))
    return sample
