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
from tests.processes import alive, children_of, kill_command

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


def test_a_child_that_is_stopped_is_gone(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, tmp_path / "log", {})
    assert alive(child.pid)
    child.check()
    child.stop()
    assert not alive(child.pid)


def test_a_child_has_our_environment_and_its_own_but_not_the_router_s_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESTEFFORT_API_KEY", "sesame")
    monkeypatch.setenv("BESTEFFORT_ADMIN_API_KEY", "sesame too")
    monkeypatch.setenv("OURS", "from us")
    script = "import os; print(dict(os.environ), open(f'/proc/{os.getppid()}/environ').read(), flush=True)"
    child = Child("x", [sys.executable, "-c", script], tmp_path / "log", {"ITS": "its own"})
    wait_for(lambda: child.exit_status is not None)
    told = (tmp_path / "log").read_text()
    child.stop()
    assert "sesame" not in told
    assert "'OURS': 'from us'" in told
    assert "'ITS': 'its own'" in told


def test_a_child_is_in_our_session_and_not_in_our_group(tmp_path: Path) -> None:
    """A Ctrl-C is for us alone; but sessions get equal shares of the cores, however much each has to do."""
    script = "import os; print(os.getsid(0), os.getpgid(0), flush=True)"
    child = Child("x", [sys.executable, "-c", script], tmp_path / "log", {})
    wait_for(lambda: child.exit_status is not None)
    session, group = map(int, (tmp_path / "log").read_text().split())
    assert session == os.getsid(0)
    assert group == child.pid != os.getpgid(0)
    child.stop()


def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("besteffort.engines.child.STOP_TIMEOUT_S", 0.3)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True)"
    child = Child("stubborn", [sys.executable, "-c", f"{stubborn}; time.sleep(300)"], tmp_path / "log", {})
    wait_for(lambda: (tmp_path / "log").read_text() == "up\n")
    child.stop()
    assert not alive(child.pid)


def test_what_a_child_started_goes_with_it(tmp_path: Path) -> None:
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '300']).pid, flush=True); input()"
    parent = f"{script.replace('input()', 'import time; time.sleep(300)')}"
    child = Child("parent", [sys.executable, "-c", parent], tmp_path / "log", {})
    wait_for(lambda: (tmp_path / "log").read_text().endswith("\n"))
    grandchild = int((tmp_path / "log").read_text())
    assert alive(grandchild)
    child.stop()
    wait_for(lambda: not alive(grandchild))


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


# Ignores SIGTERM, and so does what it started, in a session of its own; both say who they are.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "grandchild"], start_new_session=True)
    if os.environ.get("LEAVES"):
        sys.exit(7)
print(os.getpid(), flush=True)
time.sleep(300)
"""


@pytest.fixture
def stubborn(tmp_path: Path) -> list[str]:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    return [sys.executable, str(script)]


def told(log: Path, number: int) -> list[int]:
    """The processes, once so many have said who they are."""
    wait_for(lambda: log.exists() and log.read_text().count("\n") == number)
    return [int(line) for line in log.read_text().split()]


def parent_of(command: list[str], log: Path, *, then: str = "time.sleep(300)") -> "subprocess.Popen[str]":
    """A process that starts the command in a thread that ends at once, and says who its tether is."""
    script = (
        "import os, signal, threading, time\n"
        "from pathlib import Path\n"
        "from besteffort.engines import child\n"
        "child.STOP_TIMEOUT_S = 0.3\n"
        f"start = lambda: made.append(child.Child('x', {command!r}, Path({str(log)!r}), {{}}))\n"
        "made = []\n"
        "thread = threading.Thread(target=start)\n"
        "thread.start(), thread.join()\n"
        "print(made[0].pid, flush=True)\n"
        f"{then}\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)


def test_what_ignores_sigterm_and_all_that_it_started_dies_with_its_parent_even_after_kill_9(
    tmp_path: Path, stubborn: list[str]
) -> None:
    with parent_of(stubborn, tmp_path / "log") as parent:
        assert parent.stdout is not None
        tether = int(parent.stdout.readline())
        command_and_grandchild = told(tmp_path / "log", 2)
        assert all(map(alive, [tether, *command_and_grandchild]))
        parent.kill()
    wait_for(lambda: not any(map(alive, [tether, *command_and_grandchild])))


def test_a_parent_that_is_killed_in_the_moment_of_the_start_leaves_nothing(
    tmp_path: Path, stubborn: list[str]
) -> None:
    with parent_of(stubborn, tmp_path / "log", then="os.kill(os.getpid(), signal.SIGKILL)") as parent:
        assert parent.stdout is not None
        tether = int(parent.stdout.readline())
    wait_for(lambda: not alive(tether))
    assert not any(map(alive, told(tmp_path / "log", (tmp_path / "log").read_text().count("\n"))))


def test_a_child_whose_starting_thread_has_ended_lives_on(tmp_path: Path) -> None:
    with parent_of(SLEEP, tmp_path / "log") as parent:
        assert parent.stdout is not None
        tether = int(parent.stdout.readline())
        wait_for(lambda: children_of(tether))
        time.sleep(0.6)  # the tether has looked at its parent by then
        assert alive(children_of(tether)[0])
        parent.kill()
    wait_for(lambda: not alive(tether))


def test_a_command_that_ends_takes_what_it_started_with_it_and_leaves_its_status(
    tmp_path: Path, stubborn: list[str]
) -> None:
    child = Child("x", stubborn, tmp_path / "log", {"LEAVES": "1"})
    wait_for(lambda: child.exit_status is not None)
    assert child.exit_status == 7
    assert not any(map(alive, told(tmp_path / "log", (tmp_path / "log").read_text().count("\n"))))
    child.stop()


def test_a_command_that_is_killed_takes_what_it_started_with_it_and_leaves_its_status(
    tmp_path: Path, stubborn: list[str]
) -> None:
    child = Child("x", stubborn, tmp_path / "log", {})
    both = told(tmp_path / "log", 2)
    kill_command(child)
    wait_for(lambda: child.exit_status is not None)
    assert child.exit_status == -signal.SIGKILL
    assert not any(map(alive, both))
    child.stop()


def test_a_tether_that_is_killed_takes_its_command_with_it(tmp_path: Path) -> None:
    child = Child("sleeper", SLEEP, tmp_path / "log", {})
    wait_for(lambda: children_of(child.pid))
    (command,) = children_of(child.pid)
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: not alive(command))
    assert child.exit_status == -signal.SIGKILL
    child.stop()


def test_the_number_of_a_child_that_died_is_nobody_else_s_until_the_last_signal_was_sent_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = Child("x", [sys.executable, "-c", "import sys; sys.exit(5)"], tmp_path / "log", {})
    wait_for(lambda: child.exit_status is not None)
    assert (child.exit_status, Path(f"/proc/{child.pid}").exists()) == (5, True)
    child.stop()
    assert (child.exit_status, Path(f"/proc/{child.pid}").exists()) == (5, False)
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *given: signals.append(given))
    monkeypatch.setattr(os, "killpg", lambda *given: signals.append(given))
    child.ask_to_stop()
    child.stop()
    child.start_again()
    assert not signals, "it went to whoever has the number now"
    monkeypatch.undo()
    child.stop()


def test_what_a_killed_tether_leaves_behind_is_gone_before_the_command_starts_again(tmp_path: Path) -> None:
    stays = "import signal, subprocess, sys, time\n"
    stays += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stays += "import os; print(os.getpid(), flush=True); time.sleep(300)"
    child = Child("x", [sys.executable, "-c", stays], tmp_path / "log", {})
    (first,) = told(tmp_path / "log", 1)
    os.kill(child.pid, signal.SIGKILL)
    wait_for(lambda: child.exit_status is not None)
    assert alive(first)
    child.start_again()
    wait_for(lambda: not alive(first))
    child.stop()
