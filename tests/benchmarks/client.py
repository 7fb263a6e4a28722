"""A client's connection that says exactly what became of each request."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import msgspec


@dataclass
class Answer:
    """`status` is 0 until it begins; one that is not `whole` broke off, or was left."""

    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    took_s: float = 0.0


def request_bytes(body: dict[str, Any]) -> bytes:
    data = msgspec.json.encode(body)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


def get_bytes(path: bytes) -> bytes:
    return b"GET %b HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n" % path


class Client(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._answer = Answer()
        self._whole: asyncio.Future[Answer] | None = None
        self._begun: asyncio.Future[None] | None = None
        self._sent_at = 0.0

    @classmethod
    async def connect(cls, port: int) -> "Client":
        return (await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port))[1]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._settle()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    async def ask(self, request: bytes) -> Answer:
        self._send(request)
        assert self._whole is not None, "just made"
        return await self._whole

    async def ask_and_leave(self, request: bytes, after_s: float | None = None) -> Answer:
        """What came until the connection was closed: after so long, or at the first bytes of the body."""
        self._send(request)
        if after_s is not None:
            await asyncio.sleep(after_s)
        else:
            self._begun = asyncio.get_running_loop().create_future()
            await self._begun
        self.close()
        return self._answer

    def close(self) -> None:
        self._transport.close()
        self.is_open = False

    def _send(self, request: bytes) -> None:
        self._answer = Answer()
        self._whole = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def _settle(self) -> None:
        self._answer.took_s = time.perf_counter() - self._sent_at
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(self._answer)
        if self._begun is not None and not self._begun.done():
            self._begun.set_result(None)
        self._whole = self._begun = None

    # The following are called by httptools.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._answer.body += data
        if self._begun is not None and not self._begun.done():
            self._begun.set_result(None)

    def on_message_complete(self) -> None:
        self._answer.whole = True
        self._settle()
