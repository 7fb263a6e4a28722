"""How fast the cores are: while something is done, and no longer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from besteffort.profiling import pace
from besteffort.profiling.pace import watched_pace


def test_each_core_is_watched_until_what_is_done_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    probe = pace._probe
    monkeypatch.setattr(pace, "_probe", lambda core: started.append(probe(core)) or started[-1])
    with watched_pace() as watched:
        time.sleep(0.3)
        assert len(started) == len(os.sched_getaffinity(0))
        assert all(one.poll() is None for one in started)
    assert all(one.returncode == 0 for one in started)
    assert 10.0 < watched.work_us < 100_000.0  # 12,000 additions


def test_what_fails_meanwhile_leaves_no_probe_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    probe = pace._probe
    monkeypatch.setattr(pace, "_probe", lambda core: started.append(probe(core)) or started[-1])
    with pytest.raises(ZeroDivisionError), watched_pace():
        _ = 1 / 0
    assert all(one.returncode == 0 for one in started)


def test_a_probe_ends_with_whoever_asked_for_it() -> None:
    script = "import sys; from besteffort.profiling.pace import _probe; print(_probe(int(sys.argv[1])).pid)"
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run([sys.executable, "-c", script, core], stdout=subprocess.PIPE, text=True, check=True)
    pid, ends_at = int(done.stdout.split()[0]), time.monotonic() + 20.0
    while Path(f"/proc/{pid}").exists() and time.monotonic() < ends_at:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
