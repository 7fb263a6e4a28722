"""How the library says how far it has come, without knowing who shows it.

The command line hands in one that draws bars; tests and scripts may hand in `Silent()`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work with a known number of steps."""

    def advance(self, num_steps: int = 1) -> None: ...

    def describe(self, text: str) -> None:
        """Show `text` beside the bar: what is being done now, or the latest figure."""


class Progress(Protocol):
    def bar(self, title: str, num_steps: int) -> AbstractContextManager[Bar]: ...

    def say(self, line: str) -> None:
        """Print one line that stays, above any bar."""


class SilentBar:
    """Shows nothing."""

    def advance(self, num_steps: int = 1) -> None:
        pass

    def describe(self, text: str) -> None:
        pass


class Silent:
    """Shows nothing, whatever is done."""

    @contextmanager
    def bar(self, title: str, num_steps: int) -> Iterator[Bar]:
        yield SilentBar()

    def say(self, line: str) -> None:
        pass
