"""How fast the machine computes, by a process of its own."""

import os
import subprocess
import sys
import time

from besteffort.profiling.pace import machine_pace
from tests.fake_engine import wait_for


def test_it_is_known_for_the_time_that_was_watched_and_for_no_other() -> None:
    began_at = time.monotonic()
    with machine_pace() as pace:
        wait_for(lambda: pace.mean_ms(began_at, time.monotonic()) is not None, timeout_s=20)
        first_ms = pace.mean_ms(began_at, time.monotonic())
        assert first_ms is not None
        assert first_ms > 0
        assert pace.mean_ms(began_at - 10.0, began_at) is None
        seen_until = time.monotonic()  # reading must not move where the process writes
        wait_for(lambda: pace.mean_ms(seen_until, time.monotonic()) is not None, timeout_s=20)
        assert pace.mean_ms(began_at, seen_until) is not None


def test_its_process_ends_with_whoever_reads_it() -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-m", "besteffort.profiling.pace"], stdin=reader, stdout=subprocess.DEVNULL
    ) as child:
        os.close(reader)
        os.close(writer)  # as `kill -9` of the reader would
        assert child.wait(20) == 0
