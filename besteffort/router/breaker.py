"""Keeps requests away from an engine that fails, until it answers again.

One that fails at once would draw all requests: its count in flight is always the least.
"""

import asyncio
from collections.abc import Callable
from enum import StrEnum

import numpy as np

from besteffort.router.probe import Probe
from besteffort.router.upstream import Upstream

# A gateway's, that has no engine behind it. A 500 may be the request's own fault, and tells nothing.
_NOBODY_THERE = (502, 503, 504)
_MAX_DOUBLINGS = 30


class State(StrEnum):
    CLOSED = "closed"  # requests pass
    HALF_OPEN = "half-open"  # the engine is asked how it is
    OPEN = "open"


class Breaker:
    """Opens after some faults in a row; then asks the engine's `/health`, less and less often.

    Closed by a good answer, it opens again at the next fault until a request is answered: an engine that is
    well by its own account but answers nothing is tried with one request at a time, less and less often too.

    `turn` hears whether requests may pass, each time that this changes.
    """

    def __init__(self, upstream: Upstream, turn: Callable[[bool], None], rng: np.random.Generator) -> None:
        self._upstream = upstream
        self._turn = turn
        self._rng = rng
        self._num_faults = 0  # in a row
        self._num_waits = 0  # since a request was answered
        self._timer: asyncio.TimerHandle | None = None
        self._probe: Probe | None = None
        self.state = State.CLOSED
        self.asks_at = 0.0  # s, by the event loop's clock; while it is open
        self.num_openings = 0
        self.num_probes = {"ok": 0, "failed": 0}

    def answered(self, status: int) -> None:
        """A request got the head of an answer."""
        if status in _NOBODY_THERE:
            self.failed()
        elif self._num_faults and self.state is State.CLOSED:
            self._num_faults = self._num_waits = 0

    def failed(self) -> None:
        """A request got no answer. Those that were on their way when it opened change nothing."""
        if self.state is not State.CLOSED:
            return
        self._num_faults += 1
        if self._num_faults >= self._upstream.limits.faults_to_open:
            self.num_openings += 1
            self._turn(False)
            self._wait()

    def close(self) -> None:
        """For good: nothing is asked any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._probe is not None:
            self._probe.cancel()
        self._timer = self._probe = None

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
        self._probe = Probe(self._upstream, self._heard)

    def _heard(self, well: bool) -> None:
        self._probe = None
        self.num_probes["ok" if well else "failed"] += 1
        if not well:
            self._wait()
            return
        self._num_faults = self._upstream.limits.faults_to_open - 1
        self.state = State.CLOSED
        self._turn(True)
