"""One engine's connections: kept open, one request at a time on each."""

import asyncio
import contextlib
import errno
import logging
import math
import socket
import ssl
from collections.abc import Sequence
from typing import Protocol, cast
from urllib.parse import urlsplit

import msgspec

from besteffort.router.limits import Limits
from besteffort.router.message import AnswerHead
from besteffort.router.outbox import Outbox
from besteffort.router.response_reader import BadResponseError, ResponseReader
from besteffort.router.watch import Watch

log = logging.getLogger(__name__)

_TIMEOUTS = frozenset(("connect_timeout", "first_byte_timeout", "total_timeout", "stall"))
# What this machine or this process has too few of, whatever the engine is like.
_LACKS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL))
_COMPLAIN_EVERY_S = 60.0


class Fault(Exception):  # noqa: N818 -- of an engine's, not of ours
    """What an engine did wrong, or, of kind "lack", what was missing here to ask it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def hangs(self) -> bool:
        """Whether it took long to notice."""
        return self.kind in _TIMEOUTS

    @property
    def is_lack(self) -> bool:
        """Whether it says nothing of the engine."""
        return self.kind == "lack"


class Sink(Protocol):
    """Who asks an engine something. The answer goes to `on_head`, then `on_body`, with `on_batch` after each
    read; then to one of `on_end` and `on_fault`, which may come at any time. Or all at once to `on_answer`.

    Where one of these raises, that is logged, the call is cancelled, and `on_crash` is the last that comes.
    """

    def request(self, upstream: "Upstream") -> Sequence[bytes]:
        """All bytes of the request; the last ones may be many."""

    def on_head(self, head: AnswerHead, length: int | None) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_batch(self) -> None: ...

    def on_end(self) -> None: ...

    def on_answer(self, head: AnswerHead, body: bytes) -> None:
        """Take a whole answer, whose head is a plain success."""

    def on_fault(self, fault: Fault) -> None: ...

    def on_crash(self) -> None: ...


class Upstream:
    """Where an engine is, and the connections to it that lie idle."""

    def __init__(
        self, url: str, limits: Limits, watch: Watch, loop: asyncio.AbstractEventLoop, outbox: Outbox
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None, "checked before any engine is used"
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host = parts.hostname
        self.port = parts.port or (443 if self.tls else 80)
        self.authority = parts.netloc.rpartition("@")[2].encode()
        self.base_path = parts.path.rstrip("/").encode()
        self.limits = limits
        self.watch = watch
        self.loop = loop
        self.outbox = outbox
        self.idle: list[UpstreamConnection] = []
        self._post_lines: dict[bytes, bytes] = {}  # by path, of which there are few
        self._complains_at = -math.inf

    def send(self, sink: Sink, total_due_at: float | None = None) -> "Call":
        """Send the request of `sink`; the answer goes there, never before this returns.

        They are asked for when they go out, which may be twice, and are not kept: what waits for its answer
        would be in memory a second time. `total_due_at`, by the event loop's clock, is given for a request
        that was sent elsewhere before.
        """
        if total_due_at is None:
            total_due_at = self.loop.time() + self.limits.total_s
        call = Call(self, sink, total_due_at)
        while self.idle:
            connection = self.idle.pop()
            if connection.is_open:
                connection.take(call, reused=True)
                return call
        call.connect()
        return call

    def post_lines(self, path: bytes) -> bytes:
        """What a head begins with that posts JSON there, up to the request's id."""
        lines = self._post_lines.get(path)
        if lines is None:
            lines = self._post_lines[path] = (
                b"POST %b%b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
                # What the client did not ask to be compressed is not, and its tokens can be counted.
                b"accept-encoding: identity\r\nx-request-id: "
            ) % (self.base_path, path, self.authority)
        return lines

    def close(self) -> None:
        while self.idle:
            self.idle.pop().close()

    def complain(self, error: OSError) -> None:
        """Of what is missing here, once in a while."""
        if self.loop.time() >= self._complains_at:
            self._complains_at = self.loop.time() + _COMPLAIN_EVERY_S
            log.warning("no connection to %s: %s", self.authority.decode(), error.strerror or error)


class Call(msgspec.Struct):
    """One request at an engine, until its answer is whole, or it failed, or nobody wants it any more."""

    _upstream: Upstream
    sink: Sink
    total_due_at: float
    connection: "UpstreamConnection | None" = None
    _connecting: asyncio.Task[None] | None = None
    paused: bool = False

    def connect(self) -> None:
        self._connecting = self._upstream.loop.create_task(self._connect())

    def cancel(self) -> None:
        """Nothing more goes to the sink. The connection is closed, which tells the engine to stop."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self.connection is not None:
            self.connection.close()

    def pause(self) -> None:
        self.paused = True
        if self.connection is not None:
            self.connection.pause()

    def resume(self) -> None:
        self.paused = False
        if self.connection is not None:
            self.connection.resume()

    def end(self) -> None:
        try:
            self.sink.on_end()
        except Exception:
            self.crash()

    def fail(self, fault: Fault) -> None:
        try:
            self.sink.on_fault(fault)
        except Exception:
            self.crash()

    def crash(self) -> None:
        """The sink raised what is being handled."""
        log.exception("what an engine answered could not be handled")
        self.cancel()
        self.sink.on_crash()

    async def _connect(self) -> None:
        upstream, limits = self._upstream, self._upstream.limits
        connection = UpstreamConnection(upstream)
        fault = None
        left_s = self.total_due_at - upstream.loop.time()
        try:
            async with asyncio.timeout(min(limits.connect_s, left_s)):
                await upstream.loop.create_connection(
                    lambda: connection, upstream.host, upstream.port, ssl=upstream.tls
                )
        except TimeoutError:
            if left_s < limits.connect_s:
                fault = Fault("total_timeout", f"not done within {limits.total_s:g} s")
            else:
                fault = Fault("connect_timeout", f"no connection within {limits.connect_s:g} s")
        except asyncio.CancelledError:
            connection.close()
            raise
        except OSError as error:
            is_lack = _is_lack(error)
            if is_lack:
                upstream.complain(error)
            fault = Fault("lack" if is_lack else "connect", f"no connection: {error.strerror or error}")
        finally:
            self._connecting = None
        if fault is not None:
            self.fail(fault)
            return
        try:
            connection.take(self, reused=False)
        except Exception:
            self.crash()


class UpstreamConnection(asyncio.Protocol):
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._reader = ResponseReader(upstream.limits.max_head)
        self._call: Call | None = None
        self._reused = False
        self._unanswered = True  # not a byte has come
        self.is_open = False
        self.due_at = math.inf

    @property
    def is_idle(self) -> bool:
        return self._call is None

    def take(self, call: Call, *, reused: bool) -> None:
        """Send a call's request; this connection is its own until the answer is whole."""
        if not self.is_open:  # closed between being made and being taken
            call.fail(Fault("connect", "closed as soon as it was open"))
            return
        request = call.sink.request(self._upstream)
        self._call = call
        self._reused = reused
        self._unanswered = True
        call.connection = self
        self._reader.expect(call.sink)
        self._wait_for_more()
        if call.paused:  # while it was connecting
            self.pause()
        self._upstream.outbox.send(self._transport, request, len(request[-1]))

    def close(self) -> None:
        self._call = None
        self._reader.rest()
        if self.is_open:
            self.is_open = False
            self._transport.abort()

    def pause(self) -> None:
        if self.is_open:
            assert self._call is not None, "only a call pauses"
            self._transport.pause_reading()
            self.due_at = self._call.total_due_at

    def resume(self) -> None:
        if self.is_open:
            self._wait_for_more()
            self._transport.resume_reading()

    # The following are called by the event loop and by the watch.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True
        self._upstream.watch.add(self)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if call is None:  # nothing was asked
            self._forget()
            return
        self._unanswered = False
        try:
            body = self._reader.known_body(data)
            if body is not None:
                self._let_go(call)
                call.sink.on_answer(self._reader.known_head, body)
                return
            self._reader.feed(data)
            if self._call is not call:  # cancelled meanwhile
                return
            if self._reader.complete:
                self._let_go(call)
                call.end()
                return
            call.sink.on_batch()
            if not call.paused:
                self._wait_for_more()
        except BadResponseError as error:
            if self._call is call:
                self._fail("garbage", f"not an answer: {error}")
        except Exception:
            call.crash()

    def eof_received(self) -> bool:
        if self._call is None:
            self._forget()
        return False  # close

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._upstream.watch.discard(self)
        call = self._call
        if call is None:
            self._forget()
        elif self._reused and self._unanswered:
            # The engine closed it while it lay idle and our request was on its way: not a failure.
            self._call = call.connection = None
            call.connect()
        elif error is None and self._reader.ends_with_connection:
            self._let_go(call)
            call.end()
        else:
            self._fail("broke_off", "the connection broke off")

    def overdue(self) -> None:
        call = self._call
        self.due_at = math.inf
        if call is None:
            self._forget()
        elif call.total_due_at <= self._upstream.loop.time():
            self._fail("total_timeout", f"not done within {self._upstream.limits.total_s:g} s")
        elif not self._reader.has_begun:
            self._fail("first_byte_timeout", f"no answer within {self._upstream.limits.first_byte_s:g} s")
        else:
            self._fail("stall", f"nothing more for {self._upstream.limits.between_bytes_s:g} s")

    def _wait_for_more(self) -> None:
        call, limits = self._call, self._upstream.limits
        assert call is not None, "there is more to come"
        wait_s = limits.between_bytes_s if self._reader.has_begun else limits.first_byte_s
        due_at, total_due_at = self._upstream.loop.time() + wait_s, call.total_due_at
        self.due_at = due_at if due_at < total_due_at else total_due_at  # quicker than `min`

    def _let_go(self, call: Call) -> None:
        """Be there for the next one: the answer is whole."""
        upstream, reader = self._upstream, self._reader
        self._call = call.connection = None
        if self.is_open and reader.reusable and len(upstream.idle) < upstream.limits.max_idle:
            self.due_at = upstream.loop.time() + upstream.limits.keep_alive_s
            if call.paused:
                self._transport.resume_reading()
            reader.rest()
            upstream.idle.append(self)
        else:
            self.close()

    def _fail(self, kind: str, message: str) -> None:
        call = self._call
        assert call is not None, "a fault is a call's"
        call.connection = None
        self.close()
        call.fail(Fault(kind, message))

    def _forget(self) -> None:
        """Idle no longer, but gone."""
        self.close()
        with contextlib.suppress(ValueError):
            self._upstream.idle.remove(self)


def _is_lack(error: OSError) -> bool:
    """Whether a connection failed for want of something here."""
    if isinstance(error, socket.gaierror):  # a name that cannot be looked up without files
        try:
            socket.socket().close()
        except OSError as own:
            return own.errno in _LACKS
    return error.errno in _LACKS
