"""A child process with a log, which never outlives us."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from besteffort.errors import EngineError

STOP_TIMEOUT_S = 15.0
_TETHER_TIMEOUT_S = 10.0  # to see to the rest when that is over
_POLL_S = 0.05
NUM_LOG_LINES = 25
_NOT_TOLD = ("BESTEFFORT_API_KEY", "BESTEFFORT_ADMIN_API_KEY")  # the router's keys, which no engine needs


class Child:
    """Started at once; `stop` ends it and all that it started."""

    def __init__(self, title: str, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.title = title
        self.log = log
        self._command = list(command)
        self._env = dict(env)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self._process = self._start()

    def start_again(self) -> None:
        """After it died. The log goes on."""
        self._end()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        tether = [sys.executable, "-m", "besteffort.engines.tether", str(os.getpid()), str(STOP_TIMEOUT_S)]
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_TOLD}
        with self.log.open("ab") as output:
            # A process group of its own: a Ctrl-C in the terminal reaches us alone, and we end it in order.
            # Not a session: Linux shares out its cores by session first (autogroups), so that what an engine
            # core uses of them counts against its front end, which then waits for other engines' steps.
            return subprocess.Popen(
                [*tether, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **self._env},
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Of the tether, whose child the command is."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        if self._process.returncode is not None:
            return self._process.returncode
        # Not taken from the kernel: until it is, nobody else can get the number that we may have to kill.
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def check(self) -> None:
        """Raise `EngineError` with the end of the log if it has died."""
        status = self.exit_status
        if status is not None:
            raise EngineError(
                f"{self.title} died with exit status {status}; the end of its log, {self.log}:\n"
                f"{self.log_tail()}"
            )

    def log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"  | {line}" for line in lines[-NUM_LOG_LINES:])

    def ask_to_stop(self) -> None:
        if self._process.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, time to end in order, then SIGKILL for whatever is left of all that it started."""
        self.ask_to_stop()
        give_up_at = time.monotonic() + STOP_TIMEOUT_S + _TETHER_TIMEOUT_S
        while self.exit_status is None and time.monotonic() < give_up_at:
            time.sleep(_POLL_S)
        self._end()

    def _end(self) -> None:
        """Kill what a tether leaves that was killed itself, and let go of its number."""
        if self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
