"""A child process with a log, which never outlives us."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from besteffort.errors import EngineError

STOP_TIMEOUT_S = 15.0
_TETHER_TIMEOUT_S = 10.0  # to see to the rest when that is over
NUM_LOG_LINES = 25


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
        self._kill()
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        tether = [sys.executable, "-m", "besteffort.engines.tether", str(os.getpid()), str(STOP_TIMEOUT_S)]
        with self.log.open("ab") as output:
            # A session of its own: a Ctrl-C in the terminal reaches us alone, and we end it in order.
            return subprocess.Popen(
                [*tether, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._env},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the tether, whose child the command is."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return self._process.poll()

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
        self._process.terminate()

    def stop(self) -> None:
        """SIGTERM, time to end in order, then SIGKILL for whatever is left of all that it started."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S + _TETHER_TIMEOUT_S)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        """What a tether leaves that was killed itself."""
        with contextlib.suppress(ProcessLookupError):  # nothing: it did its work
            os.killpg(self._process.pid, signal.SIGKILL)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
