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
        """After it died. The log goes on, and what the dead one left running is ended."""
        self._signal(signal.SIGKILL)
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        tether = [sys.executable, "-m", "besteffort.engines.tether", str(os.getpid())]
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
        self._signal(signal.SIGTERM)

    def stop(self) -> None:
        """SIGTERM, time to end in order, then SIGKILL for whatever is left of its session."""
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # nothing is left of it


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
