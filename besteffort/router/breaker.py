"""Keeps requests away from an engine that fails, or never answers, until it answers again.

One that fails at once would draw all requests: its count in flight is always the least.
"""

import asyncio
from collections.abc import Callable
from enum import StrEnum

import numpy as np

from besteffort.router.loads import Standing
from besteffort.router.probe import Probe, health_question, token_question
from besteffort.router.upstream import Upstream

# A gateway's, that has no engine behind it.
_NOBODY_THERE = (502, 503, 504)
_MAX_DOUBLINGS = 30


class State(StrEnum):
    CLOSED = "closed"  # requests pass
    HALF_OPEN = "half-open"  # the engine is asked how it is
    OPEN = "open"


class Breaker:
    """Opens after some faults in a row, or where an engine is late and not well by its own account; then asks
    its `/health`, less and less often.

    Closed by a good answer, it opens again at the next fault until a request is answered: an engine that is
    well by its own account but answers nothing is tried with one request at a time, less and less often too.

    Being late may be the requests' own doing: they may just be long. But where several were, and the engine
    answered none in between, it is asked for one token as well, and is not believed to be well without it.

    `turn` hears how the engine stands, each time that this changes: `UP` as long as the breaker is closed.
    `OUT` is one that hangs; others show at once that they still fail, and may be tried where none is left.
    """

    def __init__(
        self,
        upstream: Upstream,
        turn: Callable[[Standing], None],
        rng: np.random.Generator,
        served_name: str,
    ) -> None:
        self._upstream = upstream
        self._served_name = served_name
        self._turn = turn
        self._rng = rng
        self._num_faults = 0  # in a row
        self._num_late = 0  # requests in a row that took too long, none answered in between
        self._num_waits = 0  # since a request was answered
        self._timer: asyncio.TimerHandle | None = None
        self._probe: Probe | None = None
        self._wants_token = False  # as the answer to the probe
        self.standing = Standing.UP
        self.state = State.CLOSED
        self.asks_at = 0.0  # s, by the event loop's clock; while it is open
        self.num_openings = 0
        self.num_probes = {"ok": 0, "failed": 0}

    def answered(self, status: int) -> None:
        """A request got the head of an answer."""
        if status in _NOBODY_THERE:
            self.failed()
        elif (self._num_faults or self._num_late) and status < 500 and self.state is State.CLOSED:
            self._num_faults = self._num_late = self._num_waits = 0

    def failed(self, *, hangs: bool = False) -> None:
        """A request got no answer; `hangs`: it took long to notice. While it is open no more is counted."""
        if self.state is State.CLOSED:
            self._num_faults += 1
            if self._num_faults >= self._upstream.limits.faults_to_open:
                self._open(Standing.OUT if hangs else Standing.SUSPECT)
        elif hangs:
            self._stand(Standing.OUT)

    def late(self) -> None:
        """A request took too long, which may be its own doing: the engine is asked how it is."""
        if self.state is State.CLOSED:
            self._num_late += 1
            if self._probe is None:
                self._ask_how_it_is()

    def close(self) -> None:
        """For good: nothing is asked any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._probe is not None:
            self._probe.cancel()
        self._timer = self._probe = None

    def _stand(self, standing: Standing) -> None:
        if standing is not self.standing:
            self.standing = standing
            self._turn(standing)

    def _open(self, standing: Standing) -> None:
        self.num_openings += 1
        if self._probe is not None:  # since a request was late
            self._probe.cancel()
            self._probe = None
        self._stand(standing)
        self._wait()

    def _wait(self) -> None:
        limits = self._upstream.limits
        longest_s = min(limits.probe_wait_s * 2**self._num_waits, limits.max_probe_wait_s)
        self._num_waits = min(self._num_waits + 1, _MAX_DOUBLINGS)
        self.state = State.OPEN
        # Routers that saw one engine fail together must not ask it together.
        wait_s = longest_s * self._rng.uniform(0.5, 1.0)
        self.asks_at = self._upstream.loop.time() + wait_s
        self._timer = self._upstream.loop.call_later(wait_s, self._ask)

    def _ask(self) -> None:
        self._timer = None
        self.state = State.HALF_OPEN
        self._ask_how_it_is()

    @property
    def _is_silent(self) -> bool:
        """Whether nothing came of it, whatever it says of itself."""
        return self._num_late >= self._upstream.limits.faults_to_open

    def _ask_how_it_is(self) -> None:
        self._wants_token = False
        upstream = self._upstream
        self._probe = Probe(upstream, health_question(upstream), upstream.limits.probe_s, self._heard)

    def _ask_for_a_token(self) -> None:
        self._wants_token = True
        upstream = self._upstream
        question = token_question(upstream, self._served_name)
        self._probe = Probe(upstream, question, upstream.limits.token_s, self._heard)

    def _heard(self, standing: Standing | None) -> None:
        self._probe = None
        if standing is None:
            if self.state is State.HALF_OPEN:
                self._wait()
            return
        self.num_probes["ok" if standing is Standing.UP else "failed"] += 1
        if standing is Standing.UP and self._is_silent and not self._wants_token:
            self._ask_for_a_token()
        elif self.state is State.CLOSED:
            self._heard_while_closed(standing)
        elif standing is Standing.UP:
            self._num_faults = self._upstream.limits.faults_to_open - 1
            self._num_late = 0
            self.state = State.CLOSED
            self._stand(standing)
        else:
            self._wait()
            self._stand(standing)

    def _heard_while_closed(self, standing: Standing) -> None:
        """Since requests were late."""
        if self._wants_token and not self._is_silent:
            return  # somebody had an answer meanwhile
        if standing is not Standing.UP:
            self._open(standing)
        elif self._wants_token:
            self._num_late = 0
