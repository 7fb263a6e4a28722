"""Processes that are measured: started, ready, pinned to a core, and ended."""

import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BENCH_DIR = ROOT / ".bench"
_START_TIMEOUT_S = 60.0


def completes(url: str) -> bool:
    """Whether a router or an engine answers a request; routers that are well may know no engine yet."""
    body = b'{"model":"besteffort/hellaswag","prompt":"x","max_tokens":1}'
    where, headers = f"{url}/v1/completions", {"content-type": "application/json"}
    return _is_ok(urllib.request.Request(where, body, headers))  # noqa: S310


def is_well(url: str) -> bool:
    return _is_ok(urllib.request.Request(f"{url}/health"))  # noqa: S310


def _is_ok(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    *,
    core: int | None = None,
    is_ready: Callable[[str], bool] = completes,
    log: Path = BENCH_DIR / "log",
) -> Iterator[int]:
    """Its process id, once it answers at `url`; what it started ends with it."""
    log.parent.mkdir(exist_ok=True)
    pinned = command if core is None else ["taskset", "-c", str(core), *command]
    with log.open("ab") as output:
        process = subprocess.Popen(pinned, stdout=output, stderr=output, cwd=ROOT)
    try:
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise SystemExit(f"{command[0]} does not answer; see {log}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(pid: int) -> float:
    """Of the process and its children, so far."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def rss_mib(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss / 2**20)
