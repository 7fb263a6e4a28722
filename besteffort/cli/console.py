"""Progress on standard error, drawn with Rich: bars on a terminal, a line a stage in a log."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from besteffort.progress import Bar

# Where nobody watches, a bar says how far it is this often.
_LOG_EVERY_S = 15.0


class _Lossy:
    """A stream that drops what cannot be written, so that nothing ends because of what it says.

    Rich would end the process, or the thread, when nobody reads a pipe any more.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except BrokenPipeError:
            self._turn_away()
        except (OSError, ValueError):  # ValueError: it is closed
            pass
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._turn_away()
        except (OSError, ValueError):
            pass

    def _turn_away(self) -> None:
        """Nobody will read again; what still lies in the stream would fail once more at the process's end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class ConsoleProgress:
    def __init__(self) -> None:
        file = cast(IO[str], _Lossy(sys.stderr))
        self._console = Console(file=file, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        self._console.print(line, markup=False)

    @contextmanager
    def bar(self, title: str, num_steps: int) -> Iterator[Bar]:
        if not self._console.is_terminal:
            log = _LogBar(self, title, num_steps)
            yield log
            log.close()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[text]}"),
        )
        with RichProgress(*columns, console=self._console) as drawn:
            yield _DrawnBar(drawn, title, num_steps)


class _DrawnBar:
    def __init__(self, drawn: RichProgress, title: str, num_steps: int) -> None:
        self._drawn = drawn
        self._task = drawn.add_task(title, total=num_steps, text="")

    def advance(self, num_steps: int = 1) -> None:
        self._drawn.advance(self._task, num_steps)

    def describe(self, text: str) -> None:
        self._drawn.update(self._task, text=text.replace("[", r"\["))


class _LogBar:
    def __init__(self, console: ConsoleProgress, title: str, num_steps: int) -> None:
        self._console = console
        self._title = title
        self._num_steps = num_steps
        self._num_done = 0
        self._text = ""
        self._began_at = self._said_at = time.monotonic()

    def advance(self, num_steps: int = 1) -> None:
        self._num_done += num_steps
        self._say_now_and_then()

    def describe(self, text: str) -> None:
        self._text = text
        self._say_now_and_then()

    def close(self) -> None:
        self._console.say(f"{self._title}: done in {time.monotonic() - self._began_at:.0f} s")

    def _say_now_and_then(self) -> None:
        if time.monotonic() - self._said_at >= _LOG_EVERY_S:
            self._said_at = time.monotonic()
            self._console.say(f"{self._title}: {self._num_done}/{self._num_steps}  {self._text}")
