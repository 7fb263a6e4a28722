"""One request at an engine, and the answer's bytes passed on as they come."""

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from besteffort.router.asked import Asked
from besteffort.router.decision_log import DecisionLog, Entry
from besteffort.router.dispatcher import Dispatcher, NoReplicaError, Route
from besteffort.router.health import Health
from besteffort.router.loads import Standing
from besteffort.router.message import AnswerHead, Request, Responder, date_line, status_line
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_event, error_reply
from besteffort.router.receipt import Outcome, Receipts, StreamEnd
from besteffort.router.token_count import PlainCount, StreamCount, TokenCount, stated_tokens
from besteffort.router.tries import Tries, ends_try
from besteffort.router.turnover import Turnover
from besteffort.router.upstream import Call, Fault, Upstream

_ERROR_EVENT = re.compile(rb'data: ?\{"error": ?\{.*"code": ?(5\d\d)\b')
_ERROR_BEGINS = (b'data: {"error"', b'data:{"error"')
_MAX_ERROR = 16_384  # bytes; a longer one is passed on
_PASSED_IN = "passed in"  # noted of a request: lines of its head that go to the engine
_NOTE = "passed out"  # of an answer's head: what of it goes to the client
# Headers that speak of one connection and not of the answer (RFC 9110, Sec. 7.6.1), and those that
# are written anew.
_NOT_PASSED_OUT = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade content-length server x-request-id".split()
)


class Shared(Protocol):
    """What all exchanges share."""

    dispatcher: Dispatcher
    decision_log: DecisionLog | None
    health: Health
    metrics: Metrics
    num_in_flight: int
    receipts: Receipts
    turnover: Turnover

    def passed_in(self, headers: dict[bytes, bytes]) -> bytes: ...

    def upstream_of(self, route: Route) -> Upstream: ...


class Exchange:
    """A request at an engine, and the answer on its way to the client."""

    __slots__ = (
        "_asked", "_begun", "_call", "_entry", "_first_byte_at", "_head", "_held", "_is_over",
        "_last_byte_at", "_length", "_num_answers", "_paused", "_proxy", "_request", "_responder", "_route",
        "_status", "_stream_end", "_streams", "_tokens", "_tries",
    )  # fmt: skip

    def __init__(self, proxy: Shared, request: Request, asked: Asked, responder: Responder) -> None:
        self._proxy = proxy
        self._request = request
        self._asked = asked
        self._responder = responder
        self._route: Route
        self._entry: Entry | None = None  # if there is a log
        self._call: Call | None = None
        self._head: bytes  # the lines of the engine's, from that of the status on
        self._length: int | None = None  # of the body
        self._tokens: TokenCount | None = None
        self._stream_end: StreamEnd | None = None  # where a receipt that was asked for is still to come
        self._tries: Tries | None = None  # none has failed
        self._status = 0
        self._streams = self._paused = False
        self._held = b""  # a stream's beginning that may be an error's
        self._num_answers = 1
        self._begun = self._is_over = False
        self._first_byte_at = self._last_byte_at = 0.0

    def start(self) -> None:
        """Raises NoReplicaError."""
        proxy, asked = self._proxy, self._asked
        address, dispatcher = asked.address, proxy.dispatcher
        self._route = dispatcher.begin(address.task, address.pinned, asked.deadline_ms_per_token)
        proxy.num_in_flight += 1
        try:
            if proxy.decision_log is not None:
                decision = dispatcher.decision
                self._entry = Entry(proxy.decision_log, decision, asked.body, asked.request_id)
            self._send()
        except Exception:
            proxy.num_in_flight -= 1
            dispatcher.end(self._route)
            raise

    def _send(self) -> None:
        due_at = None if self._call is None else self._call.total_due_at  # all tries together have that long
        self._call = self._proxy.upstream_of(self._route).send(self, due_at)
        if self._paused:
            self._call.pause()

    # What the client's connection says: see `Job`.

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._end("cancelled")

    def pause(self) -> None:
        self._paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._paused = False
        if self._call is not None:
            self._call.resume()

    # What the engine's connection asks and says: see `Sink`.

    def request(self, upstream: Upstream) -> Sequence[bytes]:
        """As the engine gets it: of the client's headers only those that it may set."""
        proxy, request, asked = self._proxy, self._request, self._asked
        body = asked.body.for_engine(self._route.engine.served_name)
        passed: bytes | None = request.notes.get(_PASSED_IN)
        if passed is None:
            passed = request.notes[_PASSED_IN] = proxy.passed_in(request.headers)
        lines = upstream.post_lines(request.target)
        return [lines, asked.request_id, b"\r\ncontent-length: %d\r\n" % len(body), passed, b"\r\n", body]

    def on_head(self, head: AnswerHead, length: int | None) -> None:
        status = head.status
        if status >= 500 and self._is_given_to_another(status):
            return
        self._read_head(head)
        self._length = length
        # vLLM sends the head of a stream when it has taken the request, and then lets it wait.
        if not self._streams or status >= 400:
            self._begin(status)

    def _read_head(self, head: AnswerHead) -> None:
        self._status = head.status
        passed: _PassedOut | None = head.notes.get(_NOTE)
        if passed is None:
            passed = head.notes[_NOTE] = _passed_out(head)
        self._streams = passed.streams
        self._head = passed.lines if passed.is_dated else passed.lines + date_line()

    def on_body(self, data: bytes) -> None:
        if not self._begun:
            data = self._held + data
            if _may_become_an_error(data):
                self._held = data
            elif self._begin_stream(data):
                self._pass_on(data)
        else:
            self._pass_on(data)

    def _pass_on(self, data: bytes) -> None:
        if self._tokens is not None:
            self._tokens.feed(data)
            if self._entry is not None:
                self._entry.prompt.feed(data)
        if self._stream_end is None:
            self._responder.write(data)
        else:
            self._write_up_to_receipt(self._stream_end, data)

    def on_batch(self) -> None:
        if self._begun:
            self._last_byte_at = self._proxy.dispatcher.clock()
            self._responder.flush()

    def on_end(self) -> None:
        if not self._begun:
            held = self._held
            if not self._begin_stream(held):
                return
            if held:
                self._pass_on(held)
        self._last_byte_at = self._proxy.dispatcher.clock()
        if self._stream_end is not None:  # which had no last event
            self._write_receipt(self._stream_end.rest())
        tokens = self._tokens
        if tokens is None:
            self._end("refused")
        elif not tokens.failed:
            self._end("ok")
        else:
            if self._entry is not None:
                self._entry.error = "error_event"
            self._end("failed")
        self._is_over = True
        self._responder.end()

    def on_answer(self, head: AnswerHead, body: bytes) -> None:
        self._read_head(head)
        lines = self._accept(self._status)
        self._tokens = PlainCount(total=stated_tokens(body) or 0)
        if self._entry is not None:
            self._entry.prompt.feed(body)
        self._last_byte_at = self._proxy.dispatcher.clock()
        self._end("ok")
        self._is_over = True
        self._responder.answer(lines, body)

    def on_fault(self, fault: Fault) -> None:
        status, code = (504, "engine_timeout") if fault.hangs else (502, "engine_failed")
        fleet = self._proxy.dispatcher.fleet
        name = f"{fleet.model_names[self._route.model]}, replica {self._route.replica}"
        message = f"The engine of {name} failed: {fault}"
        if fault.is_lack:
            status, code, message = 503, "overloaded", f"The router is at its limits: {fault}"
        if not self._begun:
            self._blame(fault)
            if ends_try(fault) and self._try_another(fault):
                return
            self._status = status
        if self._entry is not None:
            self._entry.error = fault.kind
        self._end("failed")
        self._say_failed(status, message, code)

    def _blame(self, fault: Fault) -> None:
        """Hold a fault before an answer against its engine, as far as it is the engine's."""
        breaker = self._proxy.health.of(self._route)
        if fault.is_lack:
            return
        # A plain answer takes as long as its client likes, and the total counts from the first try on.
        is_long = fault.kind == "first_byte_timeout" and not self._asked.body.is_streamed
        if is_long or fault.kind == "total_timeout":
            breaker.late()
        else:
            breaker.failed(hangs=fault.hangs)

    def on_crash(self) -> None:
        """Whatever it was that failed here: nothing stays counted, and the client hears of it."""
        if not self._begun:
            self._status = 500
        if self._call is not None:
            with contextlib.suppress(Exception):  # what counts comes first there
                self._end("failed")
        try:
            self._say_failed(500, "The router failed; its log says how", "internal_error")
        except Exception:
            self._responder.break_off()

    def _say_failed(self, status: int, message: str, code: str) -> None:
        if self._is_over:  # as far as we know
            self._responder.break_off()
            return
        self._is_over = True
        if not self._begun:
            is_up = self._proxy.health.of(self._route).standing is Standing.UP
            retry_after_s = None if is_up else self._proxy.health.retry_after_s
            if status == 503:  # whoever comes again finds some connection ended
                retry_after_s = 1
            reply = error_reply(status, message, code, retry_after_s=retry_after_s)
            self._responder.reply(reply.identified(self._asked.request_id))
        elif self._streams:
            self._responder.write(b"\n\n" + error_event(message, code))  # it may be in the midst of an event
            self._responder.end()
        else:
            self._responder.break_off()  # half an answer must not look whole

    def _begin_stream(self, data: bytes) -> bool:
        """Unless its first event is what vLLM says of an engine that died: that is as good as the status."""
        error = _ERROR_EVENT.match(data)
        status = self._status if error is None else int(error[1])
        if status >= 500 and self._is_given_to_another(status):
            return False
        self._begin(status)
        return True

    def _begin(self, status: int) -> None:
        """Pass on the head, now that it is this engine's answer; `status` is what that amounts to."""
        if self._status < 400:
            self._tokens = StreamCount() if self._streams else PlainCount()
        if self._streams:  # of a plain answer only the end matters
            self._first_byte_at = self._last_byte_at = self._proxy.dispatcher.clock()
            if self._status < 400 and self._asked.streams_receipt:
                self._stream_end, self._length = StreamEnd(), None
        lines = self._accept(status)
        self._responder.begin(self._status, lines, self._length)

    def _accept(self, status: int) -> Sequence[bytes]:
        """Note that it is this engine's answer. Returns its head as the client gets it."""
        proxy, route, asked = self._proxy, self._route, self._asked
        if status < 500:
            proxy.health.of(route).answered(status)
        if self._tries is not None:
            self._tries.answered(status)
        if self._status < 400:  # to count them takes as long as the body is
            self._num_answers = asked.body.num_answers
        if self._entry is not None:
            self._entry.begin()
        asked.body.let_go()
        receipt = proxy.receipts.lines(route, asked.deadline_ms_per_token)
        self._begun = True
        return self._head, receipt, b"x-request-id: ", asked.request_id, b"\r\n"

    def _is_given_to_another(self, status: int) -> bool:
        """Whether another replica is asked, since it may have a better answer than this one's 5xx."""
        if not ends_try(status):
            return False
        call, breaker = self._call, self._proxy.health.of(self._route)
        assert call is not None, "an answer is a call's"
        breaker.answered(status)
        if status == 500:
            self._tries = self._tries or Tries()
            self._tries.doubt(breaker)
        if not self._try_another(status):
            return False
        call.cancel()
        return True

    def _try_another(self, given: int | Fault) -> bool:
        """Nothing of an answer has been passed on, so that another replica may give it."""
        dispatcher, failed = self._proxy.dispatcher, self._route
        tries = self._tries = self._tries or Tries()
        tries.note(failed, given)
        if tries.are_over:
            return False
        try:
            self._route = dispatcher.begin_again(failed, tries.places)
        except NoReplicaError:
            return False
        tries.num_retries += 1
        self._status, self._streams, self._held = 0, False, b""
        dispatcher.end(failed)
        self._proxy.metrics.retried(failed)
        self._send()
        return True

    def _end(self, outcome: str) -> None:
        """Everything that was counted for this request is taken back here, once."""
        assert self._call is not None, "a request ends once"
        self._call = None  # and nothing is left that refers to itself
        proxy, route = self._proxy, self._route
        proxy.num_in_flight -= 1
        proxy.dispatcher.end(route)
        latency = None
        if outcome == "ok":
            proxy.turnover.ended(self._last_byte_at - route.arrived_at)
            latency = self._latency_ms_per_token()
        proxy.metrics.ended(route, outcome, latency, self._asked.deadline_ms_per_token)
        if latency is not None and self._streams:
            proxy.metrics.began(route, self._first_byte_at)
        if self._entry is not None:
            self._log(self._entry, outcome, latency)

    def _latency_ms_per_token(self) -> float | None:
        """None where no tokens were counted. Several answers come side by side: the mean one's counts."""
        if self._tokens is None or not (num_tokens := self._tokens.total):
            return None
        total_ms = 1000.0 * (self._last_byte_at - self._route.arrived_at)
        return total_ms * self._num_answers / num_tokens

    def _write_up_to_receipt(self, stream_end: StreamEnd, data: bytes) -> None:
        before, after = stream_end.feed(data)
        if before:
            self._responder.write(before)
        if after:
            self._last_byte_at = self._proxy.dispatcher.clock()
            self._write_receipt(b"")
            self._responder.write(after)

    def _write_receipt(self, before: bytes) -> None:
        self._stream_end = None
        assert self._tokens is not None, "those of a stream are counted"
        if self._tokens.failed:
            self._responder.write(before)
            return
        outcome = Outcome(
            num_tokens=self._tokens.total,
            ttft_ms=1000.0 * (self._first_byte_at - self._route.arrived_at),
            latency_ms_per_token=self._latency_ms_per_token(),
        )
        event = self._proxy.receipts.event(
            self._route,
            self._asked.deadline_ms_per_token,
            outcome,
            request_id=self._asked.request_id,
            is_chat=b"/chat/" in self._request.target,
        )
        self._responder.write(before + event)

    def _log(self, entry: Entry, outcome: str, latency_ms_per_token: float | None) -> None:
        route = self._route
        entry.end(
            route,
            outcome,
            status=self._status,
            num_retries=0 if self._tries is None else self._tries.num_retries,
            began_at=self._first_byte_at if self._streams and self._begun else math.nan,
            ended_at=self._proxy.dispatcher.clock() if outcome != "ok" else self._last_byte_at,
            num_tokens=0 if self._tokens is None else self._tokens.total,
            latency_ms_per_token=latency_ms_per_token,
            deadline_ms_per_token=self._asked.deadline_ms_per_token,
        )


def _may_become_an_error(begun: bytes) -> bool:
    """Whether a stream's first bytes are only the beginning of an event that says that its engine failed."""
    if b"\n" in begun or len(begun) > _MAX_ERROR:
        return False
    return any(begun.startswith(words[: len(begun)]) for words in _ERROR_BEGINS)


@dataclass(slots=True)
class _PassedOut:
    """Of an answer's head."""

    lines: bytes
    streams: bool
    is_dated: bool


def _passed_out(head: AnswerHead) -> _PassedOut:
    dropped, lines, is_dated = _NOT_PASSED_OUT, [status_line(head.status)], False
    for name, value in head.headers:
        if name == b"connection":
            dropped = dropped.union(word.strip().lower() for word in value.split(b","))
    for name, value in head.headers:
        if name in dropped:
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
        if name == b"date":
            is_dated = True
    return _PassedOut(b"".join(lines), head.is_stream, is_dated)
