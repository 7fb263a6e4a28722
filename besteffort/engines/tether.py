"""Run a command that dies with its parent: `python -m besteffort.engines.tether PARENT_PID COMMAND...`

Linux sends the signal when the parent goes, however it went, `kill -9` included. It is set here,
in a process of its own that then becomes the command, because between fork and exec of a
threaded parent no Python code is safe to run.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it went before the line above
        sys.exit(1)
    os.execvp(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main()
