"""SIGHUP: either the policy is to be read anew, or the terminal is gone."""

import os
import signal
import sys
from types import FrameType


class HangUp:
    """Listens from the moment that it is made, in the main thread; before a router runs it only takes note.

    A terminal that goes meanwhile is as good as SIGTERM.
    """

    def __init__(self) -> None:
        self._has_terminal = os.isatty(sys.stderr.fileno())
        self.came = False
        signal.signal(signal.SIGHUP, self._note)

    @property
    def was_the_terminal_s(self) -> bool:
        return self._has_terminal and not os.isatty(sys.stderr.fileno())

    def ignore(self) -> None:
        """From now on: all comes to its end anyhow."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if self.was_the_terminal_s:
            raise KeyboardInterrupt
