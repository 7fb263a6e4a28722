"""How fast this machine computes, from one moment to the next.

Two runs of one trace cannot be nearer to each other than the machine is to itself. A virtual one may be half
as fast for a while, since others use the same cores, and no counter of its own says so.
"""

import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO

import numpy as np

NUM_ADDITIONS = 20_000  # some 2 ms
EVERY_S = 0.25


class MachinePace:
    """How long the same small computation took, again and again, in seconds of the CPU."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def mean_ms(self, since: float, until: float) -> float | None:
        """From one `time.monotonic()` to another; None if there was no time for it."""
        self._file.seek(0)
        lines = [line.split() for line in self._file.read().splitlines() if line.count(b" ") == 1]
        taken = [float(took) for at, took in lines if since <= float(at) <= until]
        return 1000.0 * float(np.mean(taken)) if taken else None


@contextmanager
def machine_pace() -> Iterator[MachinePace]:
    """Measured by a process of its own, so that it holds up nobody here."""
    words = [sys.executable, "-m", __name__]
    with (
        TemporaryFile("a+b") as file,  # to append: reading moves the place that both share
        subprocess.Popen(words, stdout=file, stdin=subprocess.PIPE) as child,
    ):
        try:
            yield MachinePace(file)
        finally:
            child.kill()


def _compute() -> float:
    began_s, total = time.thread_time(), 0
    for number in range(NUM_ADDITIONS):
        total += number
    return time.thread_time() - began_s


def main() -> None:
    """A line every now and then, until the input ends: whoever reads the lines is gone."""
    while not select.select([sys.stdin], [], [], EVERY_S)[0]:
        took_s = _compute()
        sys.stdout.write(f"{time.monotonic():.3f} {took_s:.6f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
