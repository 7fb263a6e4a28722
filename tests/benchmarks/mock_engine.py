"""An engine that answers without delay, or streams a token each 20 ms: what is left is the router's own.

python -m tests.benchmarks.mock_engine PORT
"""

import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

NUM_TOKENS = 32
STEP_S = 0.020
STREAM_S = NUM_TOKENS * STEP_S
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"


def _plain(value: object) -> bytes:
    body = json.dumps(value).encode()
    return _HEAD % b"application/json" + b"content-length: %d\r\n\r\n" % len(body) + body


_CHOICE = {"index": 0, "text": " a" * NUM_TOKENS, "finish_reason": "length"}
_ANSWER = _plain(
    {"object": "text_completion", "choices": [_CHOICE], "usage": {"completion_tokens": NUM_TOKENS}}
)
# What routers ask of an engine before they trust it, all in one.
_ABOUT = _plain({"object": "list", "status": "ok", "data": [{"id": "mock", "object": "model"}]})
_STREAM = _HEAD % b"text/event-stream" + b"transfer-encoding: chunked\r\n\r\n"


class MockEngine(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._buffer, 0, end)
        end += 4 + (int(length[1]) if length else 0)
        if len(self._buffer) < end:
            return
        request, self._buffer = self._buffer[:end], self._buffer[end:]
        if request.startswith(b"GET"):
            self._transport.write(_ABOUT)
        elif b'"stream":true' in request:
            self._transport.write(_STREAM)
            self._token(NUM_TOKENS)
        else:
            self._transport.write(_ANSWER)

    def _token(self, num_left: int) -> None:
        if num_left == 0:
            self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        text = f'data: {{"choices":[{{"index":0,"text":"@{time.perf_counter():.6f}@"}}]}}\n\n'.encode()
        self._transport.write(b"%x\r\n%b\r\n" % (len(text), text))
        self._timer = asyncio.get_running_loop().call_later(STEP_S, self._token, num_left - 1)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(MockEngine, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
