"""Run on each core by `pace.py`: half a millisecond of work twenty times a second, until its input ends."""

import os
import select
import signal
import sys
import time

PAUSE_S = 0.05
NUM_ADDITIONS = 12_000


def work_us() -> float:
    began_s = time.thread_time()
    total = 0
    for number in range(NUM_ADDITIONS):
        total += number
    return 1e6 * (time.thread_time() - began_s)


def main(core: int) -> None:
    """Print the mean of all times."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who reads this
    os.sched_setaffinity(0, {core})
    taken_us = [work_us()]
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        taken_us.append(work_us())
    sys.stdout.write(f"{sum(taken_us) / len(taken_us)}\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
