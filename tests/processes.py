"""Processes of other people, as the kernel sees them."""

import os
import signal
from pathlib import Path

from besteffort.engines.child import Child
from tests.fake_engine import wait_for


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """Those that its first thread started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_command(child: Child) -> None:
    """As `kill -9`, of what the tether holds."""
    wait_for(lambda: children_of(child.pid))
    os.kill(children_of(child.pid)[0], signal.SIGKILL)
