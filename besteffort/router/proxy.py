"""Requests to models: read, given to an engine, or turned away."""

import itertools
import re
import secrets
from collections.abc import Mapping

from besteffort.engines.running import Engine
from besteffort.router.asked import AskedReader
from besteffort.router.decision_log import DecisionLog
from besteffort.router.dispatcher import Dispatcher, ModelFullError, NoReplicaError, Route
from besteffort.router.exchange import Exchange
from besteffort.router.health import Health
from besteffort.router.limits import Limits
from besteffort.router.message import Job, Refusal, Reply, Request, Responder, header_lines
from besteffort.router.metrics import Metrics
from besteffort.router.openai_errors import error_reply
from besteffort.router.receipt import Receipts
from besteffort.router.turnover import Turnover
from besteffort.router.upstream import Upstream

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
# Headers that go to the engine as the client wrote them. All others stay here.
_PASSED_IN = (b"traceparent", b"tracestate")


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
        self._passed_in = (*_PASSED_IN, b"authorization") if forward_authorization else _PASSED_IN
        self.receipts = Receipts(dispatcher)
        self.turnover = Turnover(limits.max_in_flight)
        self._reader = AskedReader(dispatcher.fleet)
        self._upstreams = [[upstreams[engine] for engine in of_model] for of_model in dispatcher.engines]
        self._process = secrets.token_hex(8).encode()
        self._numbers = itertools.count(1)

    def handle(self, request: Request, responder: Responder) -> Job | None:
        """Take a completion request on its way."""
        request_id = self._request_id(request)
        try:
            if self.num_in_flight >= self.limits.max_in_flight:
                raise Refusal(self._turn_away())
            exchange = Exchange(self, request, self._reader.read(request, request_id), responder)
            exchange.start()
        except NoReplicaError as error:
            self.metrics.turned_away["no_replica"] += 1
            refusal = error_reply(503, str(error), "no_replica", retry_after_s=self.health.retry_after_s)
            responder.reply(refusal.identified(request_id))
            return None
        except ModelFullError:
            responder.reply(self._turn_away().identified(request_id))
            return None
        except Refusal as refused:
            responder.reply(refused.reply.identified(request_id))
            return None
        return exchange

    def _turn_away(self) -> Reply:
        self.metrics.turned_away["overloaded"] += 1
        retry_after_s = self.turnover.retry_after_s(self.dispatcher.clock())
        return error_reply(429, "Too many requests", "overloaded", retry_after_s=retry_after_s)

    def passed_in(self, headers: dict[bytes, bytes]) -> bytes:
        """The lines of a client's head that go to an engine."""
        return header_lines((name, headers[name]) for name in self._passed_in if name in headers)

    def upstream_of(self, route: Route) -> Upstream:
        return self._upstreams[route.model][route.replica]

    def _request_id(self, request: Request) -> bytes:
        given = request.headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return b"%b-%x" % (self._process, next(self._numbers))
