"""How fast the cores of this machine compute, while something else is done on them.

Two runs of one trace cannot be nearer to each other than the machine is to itself. The cores of a virtual one
are threads of real ones, of which others use the second thread now and then, for a part of a second or for
minutes: a loop of Python takes up to twice as long then, and no counter says so. A probe on each core times a
little work, by the processor time that it takes, so that whoever else runs on that core here does not count.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PROBE = Path(__file__).with_name("pace_probe.py")


class Pace:
    """How long that work took, on average over time and cores; known once the watching has ended."""

    work_us: float


@contextmanager
def watched_pace() -> Iterator[Pace]:
    """Watch all cores that this process may use, which takes a hundredth of each."""
    pace, probes = Pace(), [_probe(core) for core in sorted(os.sched_getaffinity(0))]
    try:
        yield pace
    finally:
        found_us = [float(probe.communicate()[0]) for probe in probes]
    pace.work_us = sum(found_us) / len(found_us)


def _probe(core: int) -> subprocess.Popen[str]:
    """It ends with its input, so that none outlives whoever asked for it."""
    command = [sys.executable, "-I", str(_PROBE), str(core)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
