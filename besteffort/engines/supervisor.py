"""Starts servers anew that die, so that nobody has to get up at night."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from besteffort.engines.child import Child
from besteffort.progress import Progress

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_FIRST_WAIT_S = 1.0
_MAX_WAIT_S = 60.0
_STEADY_S = 60.0  # what lives this long and dies then is not thought to die at each start


@dataclass(slots=True)
class _Ward:
    child: Child
    started_at: float
    start_at: float | None = None  # it is dead, and waits for this
    num_deaths: int = 0  # one after the other


class Supervisor:
    """Looks after children from `start` until `rest`, in a thread; each death is told in a line.

    A child that dies soon after its start waits twice as long each time, from 1 s up to a minute. What
    hangs without dying is left alone.
    """

    def __init__(self, progress: Progress) -> None:
        self._wards: list[_Ward] = []
        self._progress = progress
        self._resting = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self, children: Sequence[Child]) -> None:
        self.take(children, time.monotonic())
        self._thread.start()

    def take(self, children: Sequence[Child], now_at: float) -> None:
        self._wards += [_Ward(child, now_at) for child in children]

    def rest(self) -> None:
        """When this returns, no child is started any more."""
        self._resting.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self, now_at: float) -> None:
        """Go round once; `now_at` is in seconds, by any clock that goes on steadily."""
        for ward in self._wards:
            try:
                self._look_after(ward, now_at)
            except Exception:  # the others are looked after all the same, and this one the next time
                log.exception("%s could not be looked after", ward.child.title)

    def _look_after(self, ward: _Ward, now_at: float) -> None:
        if ward.start_at is None:
            self._examine(ward, now_at)
        elif ward.start_at <= now_at:
            ward.started_at, ward.start_at = now_at, None
            self._start(ward.child)

    def _start(self, child: Child) -> None:
        """A machine that is out of memory or processes counts as another death of it."""
        try:
            child.start_again()
        except OSError as error:
            self._progress.say(f"warning: {child.title} could not be started: {error}")

    def _examine(self, ward: _Ward, now_at: float) -> None:
        status = ward.child.exit_status
        if status is None:
            return
        if now_at - ward.started_at >= _STEADY_S:
            ward.num_deaths = 0
        wait_s = min(_FIRST_WAIT_S * 2**ward.num_deaths, _MAX_WAIT_S)
        ward.num_deaths = min(ward.num_deaths + 1, 10)
        ward.start_at = now_at + wait_s
        self._progress.say(
            f"{ward.child.title} died with exit status {status} and is started again in {wait_s:g} s; "
            f"its log goes on in {ward.child.log}"
        )

    def _run(self) -> None:
        while not self._resting.wait(_LOOK_EVERY_S):
            self.look(time.monotonic())
