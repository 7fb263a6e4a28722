"""Run a command that dies with us: `python -m besteffort.engines.tether PARENT_PID GRACE_S COMMAND...`

It stays the command's parent, and ends with it and by its exit status. When it is told to stop (SIGTERM), or
our process is gone, however it went, all that the command started gets SIGTERM, and SIGKILL once the command
has ended or the grace is over. vLLM needs both: while it starts it may swallow a SIGTERM, and its engine
core lives on where its API server is killed.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_LOOK_EVERY_S = 0.25
_HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)


def main() -> None:
    parent_pid, grace_s, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # whoever loses a parent further down becomes our child
    me = os.getpid()

    def tie() -> None:  # between fork and exec, where Python is safe as long as there are no threads
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # should somebody kill us alone
        if os.getppid() != me:
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)

    child = subprocess.Popen(command, preexec_fn=tie)
    while child.poll() is None and os.getppid() == parent_pid:
        heard = signal.sigtimedwait(_HEARD, _LOOK_EVERY_S)
        if heard is not None and heard.si_signo != signal.SIGCHLD:
            break
    if child.poll() is None:
        os.killpg(0, signal.SIGTERM)  # to us as well, who do not listen any more
        _wait(child, grace_s)
    _kill_descendants(child)
    _exit_as(child.returncode)


def _wait(child: "subprocess.Popen[bytes]", grace_s: float) -> None:
    give_up_at = time.monotonic() + grace_s
    while child.poll() is None and time.monotonic() < give_up_at:
        signal.sigtimedwait([signal.SIGCHLD], _LOOK_EVERY_S)


def _kill_descendants(child: "subprocess.Popen[bytes]") -> None:
    """Our children, then theirs, which have become ours, in whatever session they are, until none is left."""
    child.kill()
    child.wait()
    while pids := _children():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def _children() -> list[int]:
    me = os.getpid()
    return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]


def _exit_as(status: int) -> None:
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command's own is enough
        with contextlib.suppress(OSError):  # SIGKILL needs none
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
