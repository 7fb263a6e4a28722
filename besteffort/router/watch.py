"""Ends what takes too long, without a timer for each thing."""

import asyncio
import logging
import math
from typing import Protocol

log = logging.getLogger(__name__)

TICK_S = 0.1  # how late it may notice; a timer set and cancelled per request would cost more


class Watched(Protocol):
    due_at: float  # s, by the event loop's clock; infinity: never

    def overdue(self) -> None: ...


class Watch:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Watched] = set()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, thing: Watched) -> None:
        self._watched.add(thing)
        if self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def discard(self, thing: Watched) -> None:
        self._watched.discard(thing)

    def _tick(self) -> None:
        now = self._loop.time()
        for thing in [thing for thing in self._watched if thing.due_at <= now]:
            try:
                thing.overdue()
            except Exception:  # all others still have to be looked after
                log.exception("what takes too long could not be ended")
                thing.due_at = math.inf
        self._timer = self._loop.call_later(TICK_S, self._tick) if self._watched else None
