import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from besteffort.engines.child import Child, free_port
from besteffort.engines.running import wait_until_healthy
from besteffort.errors import EngineError
from besteffort.progress import SilentBar
from tests.fake_engine import wait_for

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_child_that_is_stopped_is_gone(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, tmp_path / "log", {})
    assert _alive(child.pid)
    child.check()
    child.stop()
    assert not _alive(child.pid)


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("besteffort.engines.child.STOP_TIMEOUT_S", 0.3)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
    child = Child("stubborn", [sys.executable, "-c", f"{stubborn}; time.sleep(300)"], tmp_path / "log", {})
    wait_for(lambda: (tmp_path / "log").read_text() == "up\n")
    child.stop()
    assert not _alive(child.pid)


def test_what_a_child_started_goes_with_it(tmp_path: Path) -> None:
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '300']).pid, flush=True); input()"
    parent = f"{script.replace('input()', 'import time; time.sleep(300)')}"
    child = Child("parent", [sys.executable, "-c", parent], tmp_path / "log", {})
    wait_for(lambda: (tmp_path / "log").read_text().endswith("\n"))
    grandchild = int((tmp_path / "log").read_text())
    assert _alive(grandchild)
    child.stop()
    wait_for(lambda: not _alive(grandchild))


def test_a_child_that_died_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    script = "import sys; [print('line', n) for n in range(100)]; sys.exit(3)"
    child = Child("vLLM of big", [sys.executable, "-c", script], tmp_path / "big.log", {})
    with pytest.raises(EngineError, match="vLLM of big died with exit status 3") as caught:
        wait_until_healthy([(child, f"http://127.0.0.1:{free_port()}")], 60, SilentBar())
    assert "big.log" in str(caught.value)
    assert "line 99" in str(caught.value)
    assert "line 9\n" not in str(caught.value)
    child.stop()


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, tmp_path / "log", {})
    with pytest.raises(EngineError, match="sleeper was not ready after 0 s"):
        wait_until_healthy([(child, f"http://127.0.0.1:{free_port()}")], 0.3, SilentBar())
    child.stop()


def test_a_child_dies_with_its_parent_even_after_kill_9(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from besteffort.engines.child import Child\n"
        f"child = Child('sleeper', {SLEEP!r}, Path({str(tmp_path / 'log')!r}), {{}})\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        time.sleep(0.5)  # the tether has been tied by then, or dies when it sees that it came too late
        assert _alive(child_pid)
        os.kill(parent.pid, signal.SIGKILL)
    wait_for(lambda: not _alive(child_pid))
