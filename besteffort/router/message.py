"""Requests and replies, as the server reads and writes them."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

Header = tuple[bytes, bytes]

_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class Request(msgspec.Struct):
    """`target` is a path, with its query cut off; names of headers are in lower case.

    Headers and `notes` are shared by requests whose heads are the same: the first never change once they are
    read, and what is noted may depend on nothing but the head.
    """

    method: bytes
    target: bytes
    headers: dict[bytes, bytes]
    http_1_1: bool = True
    keep_alive: bool = True
    body: bytes = b""
    notes: dict[str, Any] = msgspec.field(default_factory=dict)


class AnswerHead(msgspec.Struct):
    """An engine's. Names of headers are in lower case; the head, and `notes`, are shared as a request's are.

    A length that is among the headers may be another answer's.
    """

    status: int
    headers: list[Header]
    notes: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def is_stream(self) -> bool:
        """Whether it is one of server-sent events."""
        types = [value for name, value in self.headers if name == b"content-type"]
        return bool(types) and types[-1].startswith(b"text/event-stream")

    @property
    def is_plain_success(self) -> bool:
        return self.status < 400 and not self.is_stream


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of our own, whole. `closes`: nothing more is read from this client."""

    status: int
    body: bytes = b""
    media_type: str = "application/json"
    headers: tuple[Header, ...] = ()
    closes: bool = field(default=False)

    def identified(self, request_id: bytes) -> "Reply":
        return replace(self, headers=(*self.headers, (b"x-request-id", request_id)))


class Refusal(Exception):  # noqa: N818 -- not a fault of ours
    """A request that cannot be taken; `reply` says why to whoever sent it."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


class Responder(Protocol):
    """Where the answer to one request goes: `reply`, or `answer`, or `begin`, then `write` and `flush`, then
    `end`."""

    def reply(self, reply: Reply) -> None: ...

    def answer(self, head: Sequence[bytes], body: bytes) -> None:
        """Write all of it, as `begin`, `write` and `end` would. The status is one of those with a body."""

    def begin(self, status: int, head: Sequence[bytes], length: int | None) -> None:
        """Write the head: whole lines, in any pieces, from that of the status on. Without a `length` the body
        ends when it ends."""

    def write(self, data: bytes) -> None:
        """Put bytes of the body behind those that wait for `flush`."""

    def flush(self) -> None: ...

    def end(self) -> None: ...

    def break_off(self) -> None:
        """End in the middle, such that the client can tell."""


class Job(Protocol):
    """A request in work."""

    def cancel(self) -> None:
        """The client is gone; its responder must not be used again."""

    def pause(self) -> None:
        """The client reads slower than we write."""

    def resume(self) -> None: ...


class Handler(Protocol):
    """What the server serves."""

    def refuse(self, request: Request) -> Reply | None:
        """Say from the head alone that the request is refused; its body is then not kept.

        Where nothing is said, it is not asked again of requests with the same head.
        """

    def handle(self, request: Request, responder: Responder) -> Job | None:
        """Answer at once and return None, or return what answers later."""


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or f"HTTP/1.1 {status} \r\n".encode()


def header_lines(headers: Iterable[Header]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])


class DateLine:
    """The `date` header, made once a second."""

    def __init__(self) -> None:
        self._second = 0
        self._line = b""

    def line(self) -> bytes:
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._line = b"date: " + formatdate(second, usegmt=True).encode() + b"\r\n"
        return self._line


date_line = DateLine().line
