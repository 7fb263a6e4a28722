"""One client's connection: its requests one after the other, and the answers as they come."""

import asyncio
import logging
import math
import socket
import struct
from collections import deque
from collections.abc import Sequence
from typing import Protocol, cast

from besteffort.router.limits import Limits
from besteffort.router.message import (
    Handler,
    Job,
    Refusal,
    Reply,
    Request,
    date_line,
    header_lines,
    status_line,
)
from besteffort.router.openai_errors import error_reply
from besteffort.router.outbox import Outbox
from besteffort.router.request_reader import Budget, RequestReader
from besteffort.router.watch import Watch

log = logging.getLogger(__name__)

_LINGER_S = 2.0  # how long a refused client may go on sending, so that it gets to read why
_JUST_CAME_S = 0.25  # who connected so long ago at most has surely sent something
_MAX_UNREAD = 65_536  # of requests that came before their turn
_PIECE = 16_384  # bytes read at a time: there may be hundreds of requests in as much
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class House(Protocol):
    """What the connections of a server share."""

    handler: Handler
    limits: Limits
    watch: Watch
    budget: Budget
    loop: asyncio.AbstractEventLoop
    outbox: Outbox
    connections: "set[ClientConnection]"
    draining: bool


class ClientConnection(asyncio.Protocol):
    """Reads, hands one request at a time to the handler, and is the responder of its answer.

    A client that closes its side while an answer is due counts as gone, as it does for nginx. What it asked
    before and needs no engine is still answered.
    """

    def __init__(self, house: House) -> None:
        self._house = house
        self._limits = house.limits
        self._reader = RequestReader(self, house.limits, house.budget)
        self._ready: deque[tuple[Request, Reply | None]] = deque()
        self._unread = b""  # came before its turn
        self._request: Request | None = None  # in work
        self._job: Job | None = None
        self._last_words: Reply | None = None  # a refusal to be sent after the answers before it
        self._owes_continue = False
        self._awaits_turn = False  # there is more to do, once other connections were heard
        self._leaves = False  # the client has closed its side
        self._closing = False  # nothing more is read
        self._paused = False  # the client does not read what we wrote
        self._out: list[bytes] = []
        self._size = 0  # of the bodies in it
        self._chunked = self._bodiless = False
        self._came_at = house.loop.time()
        self.due_at = math.inf

    # The following are called by the event loop and by the watch.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        house = self._house
        house.connections.add(self)
        house.watch.add(self)
        self._due_in(self._limits.head_s)
        if len(house.connections) > self._limits.max_connections:
            refusal = error_reply(503, "Too many connections", "overloaded", retry_after_s=1, closes=True)
            self._transport.write(b"".join(self._whole(refusal, None)))
            self._close()

    def connection_lost(self, error: Exception | None) -> None:
        self._house.connections.discard(self)
        self._house.watch.discard(self)
        self._abandon()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._request is not None or self._paused or self._awaits_turn:
            self._unread += data
            if len(self._unread) > _MAX_UNREAD:
                self._transport.pause_reading()
            return
        request = self._reader.known(data)
        if request is not None:  # then that is all that there is to do
            self._start(request, None)
        else:
            self._read(data)
            self._work()

    def eof_received(self) -> bool:
        self._house.outbox.flush()  # it may have asked all that it wants, and is answered
        if (self._awaits_turn or self._leaves) and self._transport.can_write_eof():
            self._leaves = True
            return True  # stay open, and close when that is answered too
        self._abandon()
        self._due_in(self._limits.send_s)
        return False  # close

    def pause_writing(self) -> None:
        self._paused = True
        self._due_in(self._limits.send_s)
        if self._job is not None:
            self._job.pause()

    def resume_writing(self) -> None:
        self._paused = False
        if self._closing:
            return
        if self._request is None:
            self._await_next()
            self._work()
        else:
            self.due_at = math.inf
            if self._job is not None:
                self._job.resume()

    def overdue(self) -> None:
        if self._closing or self._paused:
            self.due_at = math.inf
            self._transport.abort()
        elif self._reader.in_message:
            self._refuse(error_reply(408, "The request did not come in time", "request_timeout", closes=True))
        else:
            self._close()

    # The following are called by the reader.

    def head_began(self) -> None:
        if self._request is None:
            self._due_in(self._limits.head_s)

    def head_ended(self, request: Request, *, expects_continue: bool) -> Reply | None:
        self._due_in(self._limits.body_s)
        refusal = self._house.handler.refuse(request)
        if expects_continue and refusal is not None:
            raise Refusal(refusal)  # it waits for our word before it sends the body
        self._owes_continue = expects_continue
        return refusal

    def request_ended(self, request: Request, refusal: Reply | None) -> None:
        self._owes_continue = False
        self._ready.append((request, refusal))

    # Requests, one after the other.

    def _read(self, data: bytes) -> None:
        """Up to the first piece with a whole request in it; the rest has to wait."""
        try:
            if len(data) <= _PIECE:
                self._reader.feed(data)
                return
            for begin in range(0, len(data), _PIECE):
                self._reader.feed(data[begin : begin + _PIECE])
                if self._ready:
                    self._unread = data[begin + _PIECE :]
                    return
        except Refusal as refusal:
            if not (self._ready and not self._ready[-1][0].keep_alive):
                self._last_words = refusal.reply

    def _work(self) -> None:
        """Go on until a request is in work, or one was answered at once, or nothing is left to do."""
        while self._request is None and not (self._closing or self._paused):
            if self._ready:
                self._start(*self._ready.popleft())
                if self._request is None and self._has_more:
                    self._await_turn()
                    return
            elif self._last_words is not None:
                self._refuse(self._last_words)
            elif self._unread:
                data, self._unread = self._unread, b""
                if not self._leaves:
                    self._transport.resume_reading()
                self._read(data)
            elif self._owes_continue:
                self._owes_continue = False
                self._house.outbox.send(self._transport, (_CONTINUE,), 0)
            else:
                break
        if self._leaves and not (self._closing or self._paused):
            self._abandon()
            self._close()

    @property
    def _has_more(self) -> bool:
        return bool(self._ready or self._last_words or self._unread or self._owes_continue)

    def _await_turn(self) -> None:
        """Go on after all others: thousands of requests that are answered at once may come in one read."""
        if not self._awaits_turn:
            self._awaits_turn = True
            self._house.loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._awaits_turn = False
        self._work()

    def _start(self, request: Request, refusal: Reply | None) -> None:
        self._request = request
        self.due_at = math.inf
        if refusal is not None:
            self.reply(refusal)
            return
        try:
            job = self._house.handler.handle(request, self)
        except Exception:
            log.exception("a request could not be handled")
            self._refuse(error_reply(500, "The router failed; its log says how", "internal_error"))
            return
        if self._request is request:  # it is not answered yet
            self._job = job

    def _finish(self) -> None:
        """The answer is whole."""
        request, job = self._request, self._job
        assert request is not None, "an answer has a request"
        if request.body:
            self._reader.release(request)
        self._request = self._job = None
        if not request.keep_alive:
            self._close()
            return
        self._await_next()
        if job is None:
            return  # it was answered at once, and whoever started it goes on
        # Mostly there is nothing, which is as good as `_work` and quicker.
        if self._ready or self._unread or self._last_words or self._owes_continue or self._leaves:
            self._work()

    def _await_next(self) -> None:
        reader, limits = self._reader, self._limits
        if self._paused:
            return
        wait_s = limits.keep_alive_s
        if reader.in_message:
            wait_s = limits.body_s if reader.in_body else limits.head_s
        self.due_at = self._house.loop.time() + wait_s

    def _due_in(self, delay_s: float) -> None:
        self.due_at = self._house.loop.time() + delay_s

    def _abandon(self) -> None:
        """The client is gone."""
        self._closing = True
        for request, _ in self._ready:
            self._reader.release(request)
        self._ready.clear()
        self._reader.close()
        if self._request is not None:
            self._reader.release(self._request)
        job, self._request, self._job = self._job, None, None
        if job is not None:
            job.cancel()

    # The answer to the request in work: see `Responder`.

    def reply(self, reply: Reply) -> None:
        request = self._request
        assert request is not None, "an answer has a request"
        if reply.closes or self._house.draining:
            request.keep_alive = False
        self._out += self._whole(reply, request)
        self._size += len(reply.body)
        self.flush()
        self._finish()

    def answer(self, head: Sequence[bytes], body: bytes) -> None:
        request = self._request
        assert request is not None, "an answer has a request"
        if self._house.draining:
            request.keep_alive = False
        length = b"content-length: %d\r\n\r\n" % len(body)
        out = [*head, _connection_line(request), length, body]
        self._house.outbox.send(self._transport, out, len(body))
        self._finish()

    def begin(self, status: int, head: Sequence[bytes], length: int | None) -> None:
        request = self._request
        assert request is not None, "an answer has a request"
        if self._house.draining:
            request.keep_alive = False
        self._reader.release(request)  # it goes to no engine any more
        self._bodiless = status in (204, 304)
        self._chunked = False
        if self._bodiless:
            ends = b"\r\n"
        elif length is not None:
            ends = b"content-length: %d\r\n\r\n" % length
        elif request.http_1_1:
            self._chunked = True
            ends = b"transfer-encoding: chunked\r\n\r\n"
        else:
            request.keep_alive = False  # the end of the connection is the end of the body
            ends = b"\r\n"
        self._out = [*head, _connection_line(request), ends]

    def write(self, data: bytes) -> None:
        if self._bodiless:
            return
        self._size += len(data)
        if self._chunked:
            self._out += (b"%x\r\n" % len(data), data, b"\r\n")
        else:
            self._out.append(data)

    def flush(self) -> None:
        if self._out:
            out, self._out = self._out, []
            self._house.outbox.send(self._transport, out, self._size)
            self._size = 0

    def end(self) -> None:
        if self._chunked:
            self._out.append(b"0\r\n\r\n")
        self.flush()
        self._finish()

    def break_off(self) -> None:
        self._job = None
        self._closing = True
        self._house.outbox.flush()
        # A reset, since an ordinary end would be the end of a body that has no length.
        own_socket = self._transport.get_extra_info("socket")
        own_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    # Ends.

    def drain(self) -> None:
        """Take no new request; one in work, or waiting for its turn, or half read, or surely on its way, is
        answered."""
        if self._request is not None or self._closing or self._awaits_turn or self._reader.in_message:
            return
        if self._house.loop.time() >= self._came_at + _JUST_CAME_S:
            self._close()

    def abort(self) -> None:
        self._house.outbox.flush()
        self._transport.abort()

    def _refuse(self, reply: Reply) -> None:
        """Say why, and listen no more; but read on for a while, or the client would never see it."""
        self._out = self._whole(reply, None)
        self.flush()
        self._abandon()
        if self._transport.can_write_eof() and not self._leaves:
            self._due_in(_LINGER_S)
            self._transport.resume_reading()
            self._house.outbox.flush()
            self._transport.write_eof()
        else:
            self._close()

    def _close(self) -> None:
        self._closing = True
        self._due_in(self._limits.send_s)
        self._house.outbox.flush()
        self._transport.close()

    def _whole(self, reply: Reply, request: Request | None) -> list[bytes]:
        lines = (
            (b"content-type", reply.media_type.encode()),
            (b"content-length", b"%d" % len(reply.body)),
            *reply.headers,
        )
        end = b"connection: close\r\n\r\n" if request is None else _connection_line(request) + b"\r\n"
        body = b"" if request is not None and request.method == b"HEAD" else reply.body
        return [status_line(reply.status), date_line(), header_lines(lines), end, body]


def _connection_line(request: Request) -> bytes:
    if not request.keep_alive:
        return b"connection: close\r\n"
    return b"" if request.http_1_1 else b"connection: keep-alive\r\n"
