"""One request's way: read, routed, sent to its engine, and the answer's bytes passed on as they come."""

import itertools
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from besteffort.engines.running import Engine
from besteffort.router.addressing import TASK_HEADER, Address, Addresses, UnknownAddressError
from besteffort.router.decision_log import DecisionLog, Entry
from besteffort.router.dispatcher import Dispatcher, NoReplicaError, Route
from besteffort.router.health import Health
from besteffort.router.limits import Limits
from besteffort.router.message import Header, Job, Refusal, Reply, Request, Responder, date_line, header_lines
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_event, error_reply
from besteffort.router.request_body import RequestBody
from besteffort.router.token_count import PlainCount, StreamCount, TokenCount
from besteffort.router.upstream import Call, Fault, Upstream

DEADLINE_HEADER = "x-besteffort-deadline-ms-per-token"
_TASK = TASK_HEADER.encode()
_DEADLINE = DEADLINE_HEADER.encode()
_MAX_DEADLINE_MS = 1e6
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
# Headers that go to the engine as the client wrote them. All others stay here.
_PASSED_IN = (b"traceparent", b"tracestate")
# Headers that speak of one connection and not of the answer (RFC 9110, Sec. 7.6.1), and those that
# are written anew.
_NOT_PASSED_OUT = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"transfer-encoding upgrade content-length server x-request-id".split()
)
# An engine that took long to begin is not asked twice: the next one would be, by as many again.
_RETRIED = frozenset(("connect", "connect_timeout", "broke_off", "garbage"))
_MAX_TRIES = 3
_TIMEOUTS = frozenset(("connect_timeout", "first_byte_timeout", "total_timeout", "stall"))


@dataclass(slots=True)
class Asked:
    """What a request asks for, as far as routing and accounting go."""

    address: Address
    deadline_ms_per_token: float
    body: RequestBody
    request_id: bytes


class Proxy:
    """Everything that requests share: engines and their connections, limits, counts."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        upstreams: Mapping[Engine, Upstream],
        health: Health,
        metrics: Metrics,
        limits: Limits,
        *,
        forward_authorization: bool = False,
        decision_log: DecisionLog | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.decision_log = decision_log
        self.health = health
        self.metrics = metrics
        self.limits = limits
        self.num_in_flight = 0
        self.forward_authorization = forward_authorization
        self.receipts = Receipts(dispatcher)
        self._addresses = Addresses(dispatcher.fleet)
        self._upstreams = upstreams
        self._process = secrets.token_hex(8).encode()
        self._numbers = itertools.count(1)

    def handle(self, request: Request, responder: Responder) -> Job | None:
        """Take a completion request on its way."""
        request_id = self._request_id(request)
        try:
            if self.num_in_flight >= self.limits.max_in_flight:
                raise Refusal(error_reply(429, "Too many requests", "overloaded", retry_after_s=1))
            exchange = Exchange(self, request, self._read(request, request_id), responder)
            exchange.start()
        except NoReplicaError as error:
            refusal = error_reply(503, str(error), "no_replica", retry_after_s=1)
            responder.reply(_identified(refusal, request_id))
            return None
        except Refusal as refused:
            responder.reply(_identified(refused.reply, request_id))
            return None
        return exchange

    def upstream_of(self, engine: Engine) -> Upstream:
        return self._upstreams[engine]

    def _request_id(self, request: Request) -> bytes:
        given = request.headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return b"%b-%x" % (self._process, next(self._numbers))

    def _read(self, request: Request, request_id: bytes) -> Asked:
        """Raises Refusal."""
        headers = request.headers
        media_type = headers.get(b"content-type")
        if media_type is not None and media_type.partition(b";")[0].strip().lower() != b"application/json":
            raise Refusal(error_reply(415, "The body must be application/json", "unsupported_media_type"))
        task = headers.get(_TASK)
        try:
            body = RequestBody(request.body)
            address = self._addresses.read(None if task is None else task.decode("latin-1"), body.model)
        except ValueError:
            raise Refusal(error_reply(400, "The body is not a JSON object", "invalid_json")) from None
        except UnknownAddressError as error:
            raise Refusal(error_reply(404, str(error), "model_not_found", error.param)) from None
        deadline = _deadline(
            headers.get(_DEADLINE), self.dispatcher.fleet.tasks[address.task].deadline_ms_per_token
        )
        return Asked(address, deadline, body, request_id)


class Receipts:
    """The headers that say what became of a request: who answers it, and by which deadline."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._made: dict[tuple[int, int, int, bool, str], bytes] = {}

    def lines(self, route: Route, deadline_ms_per_token: float) -> bytes:
        fleet = self._dispatcher.fleet
        policy = self._dispatcher.policy.name
        key = (route.task, route.model, route.replica, route.pinned, policy)
        lines = self._made.get(key)
        if lines is None:
            facts = {
                "model": fleet.model_names[route.model],
                "replica": str(route.replica),
                "task": fleet.task_names[route.task],
                "policy": "pinned" if route.pinned else policy,
            }
            pairs = [(f"x-besteffort-{name}".encode(), value.encode()) for name, value in facts.items()]
            lines = self._made[key] = header_lines(pairs)
        return b"%b%b: %g\r\n" % (lines, _DEADLINE, deadline_ms_per_token)


class Exchange:
    """A request at an engine, and the answer on its way to the client."""

    __slots__ = (
        "_asked", "_begun", "_call", "_entry", "_first_byte_at", "_last_byte_at", "_proxy", "_request",
        "_responder", "_route", "_status", "_streams", "_tokens", "_tried",
    )  # fmt: skip

    def __init__(self, proxy: Proxy, request: Request, asked: Asked, responder: Responder) -> None:
        self._proxy = proxy
        self._request = request
        self._asked = asked
        self._responder = responder
        self._route: Route
        self._entry: Entry | None = None  # if there is a log
        self._call: Call | None = None
        self._tokens: TokenCount | None = None
        self._tried: list[tuple[int, int]] = []  # models and replicas that failed
        self._status = 0
        self._streams = False
        self._begun = False
        self._first_byte_at = self._last_byte_at = 0.0

    def start(self) -> None:
        """Raises NoReplicaError."""
        proxy = self._proxy
        self._route = proxy.dispatcher.begin(self._asked.address.task, self._asked.address.pinned)
        proxy.num_in_flight += 1
        if proxy.decision_log is not None:
            decision, asked = proxy.dispatcher.decision, self._asked
            self._entry = Entry(proxy.decision_log, decision, asked.body, asked.request_id)
        self._send()

    def _send(self) -> None:
        upstream = self._proxy.upstream_of(self._route.engine)
        self._call = upstream.send(self._rewritten(upstream), self)

    # What the client's connection says: see `Job`.

    def cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._end("cancelled")

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    # What the engine's connection says: see `Sink`.

    def on_head(self, status: int, headers: Sequence[Header], length: int | None) -> None:
        self._begun = True
        self._status = status
        self._proxy.health.of(self._route).answered(status)
        self._first_byte_at = self._last_byte_at = self._proxy.dispatcher.clock()
        lines, self._streams = _passed_out(headers)
        if status < 400:
            self._tokens = StreamCount() if self._streams else PlainCount()
        receipt = self._proxy.receipts.lines(self._route, self._asked.deadline_ms_per_token)
        lines += (receipt, b"x-request-id: %b\r\n" % self._asked.request_id)
        self._responder.begin(status, b"".join(lines), length)

    def on_body(self, data: bytes) -> None:
        if self._tokens is not None:
            self._tokens.feed(data)
            if self._entry is not None:
                self._entry.feed(data)
        self._responder.write(data)

    def on_batch(self) -> None:
        if self._begun:
            self._last_byte_at = self._proxy.dispatcher.clock()
            self._responder.flush()

    def on_end(self) -> None:
        self._last_byte_at = self._proxy.dispatcher.clock()
        self._end("ok" if self._status < 400 else "refused")
        self._responder.end()

    def on_fault(self, fault: Fault) -> None:
        if not self._begun:
            self._proxy.health.of(self._route).failed()
        if not self._begun and fault.kind in _RETRIED and self._try_another():
            return
        status, code = (504, "engine_timeout") if fault.kind in _TIMEOUTS else (502, "engine_failed")
        if not self._begun:
            self._status = status
        if self._entry is not None:
            self._entry.error = fault.kind
        self._end("failed")
        fleet = self._proxy.dispatcher.fleet
        name = f"{fleet.model_names[self._route.model]}, replica {self._route.replica}"
        message = f"The engine of {name} failed: {fault}"
        if not self._begun:
            self._responder.reply(_identified(error_reply(status, message, code), self._asked.request_id))
        elif self._streams:
            self._responder.write(error_event(message, code))
            self._responder.end()
        else:
            self._responder.break_off()  # half an answer must not look whole

    def _try_another(self) -> bool:
        """Nothing of an answer has come, so that another replica may give it."""
        dispatcher, failed = self._proxy.dispatcher, self._route
        self._tried.append((failed.model, failed.replica))
        if len(self._tried) >= _MAX_TRIES:
            return False
        try:
            self._route = dispatcher.begin_again(failed, self._tried)
        except NoReplicaError:
            return False
        dispatcher.end(failed)
        self._proxy.metrics.retried(failed)
        self._send()
        return True

    def _end(self, outcome: str) -> None:
        """Everything that was counted for this request is taken back here, once."""
        assert self._call is not None, "a request ends once"
        self._call = None  # and nothing is left that refers to itself
        self._proxy.num_in_flight -= 1
        self._proxy.dispatcher.end(self._route)
        metrics = self._proxy.metrics
        metrics.ended(self._route, outcome)
        num_tokens = 0 if self._tokens is None else self._tokens.total
        if outcome == "ok" and num_tokens:
            metrics.answered(self._route, self._last_byte_at, num_tokens, self._asked.deadline_ms_per_token)
            if self._streams:
                metrics.began(self._route, self._first_byte_at)
        if self._entry is not None:
            self._log(self._entry, outcome, num_tokens)

    def _log(self, entry: Entry, outcome: str, num_tokens: int) -> None:
        route = self._route
        entry.end(
            route,
            outcome,
            status=self._status,
            num_retries=sum(pair != (route.model, route.replica) for pair in self._tried),
            began_at=self._first_byte_at if self._streams else math.nan,
            ended_at=self._proxy.dispatcher.clock() if outcome != "ok" else self._last_byte_at,
            num_tokens=num_tokens,
            deadline_ms_per_token=self._asked.deadline_ms_per_token,
        )

    def _rewritten(self, upstream: Upstream) -> list[bytes]:
        """The request as the engine gets it: of the client's headers only those that it may set."""
        body = self._asked.body.for_engine(self._route.engine.served_name)
        headers = self._request.headers
        passed = [(name, headers[name]) for name in _PASSED_IN if name in headers]
        if self._proxy.forward_authorization and b"authorization" in headers:
            passed.append((b"authorization", headers[b"authorization"]))
        head = (
            b"POST %b%b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
            # What the client did not ask to be compressed is not, and its tokens can be counted.
            b"accept-encoding: identity\r\nx-request-id: %b\r\ncontent-length: %d\r\n%b\r\n"
        ) % (
            upstream.base_path,
            self._request.target,
            upstream.authority,
            self._asked.request_id,
            len(body),
            header_lines(passed),
        )
        return [head, body]


def _passed_out(headers: Sequence[Header]) -> tuple[list[bytes], bool]:
    """The lines of an answer's head that go to the client, and whether the answer is a stream."""
    dropped, lines, streams, dated = _NOT_PASSED_OUT, [], False, False
    for name, value in headers:
        if name == b"connection":
            dropped = dropped.union(word.strip().lower() for word in value.split(b","))
    for name, value in headers:
        if name in dropped:
            continue
        lines.append(b"%b: %b\r\n" % (name, value))
        if name == b"content-type":
            streams = value.startswith(b"text/event-stream")
        elif name == b"date":
            dated = True
    if not dated:
        lines.append(date_line())
    return lines, streams


def _deadline(given: bytes | None, of_task: float) -> float:
    """Raises Refusal: what was given is no positive number of milliseconds."""
    if given is None:
        return of_task
    try:
        deadline = float(given)
    except ValueError:
        deadline = math.nan
    if not 0 < deadline <= _MAX_DEADLINE_MS:
        message = f"{DEADLINE_HEADER} must be a number of milliseconds over 0, up to {_MAX_DEADLINE_MS:g}"
        raise Refusal(error_reply(400, message, "invalid_deadline", DEADLINE_HEADER))
    return deadline


def _identified(reply: Reply, request_id: bytes) -> Reply:
    headers = (*reply.headers, (b"x-request-id", request_id))
    return Reply(reply.status, reply.body, reply.media_type, headers, reply.closes)
