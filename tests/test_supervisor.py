"""Servers that die, and are started again."""

import sys
from pathlib import Path

import pytest

from besteffort.engines.child import Child, free_port
from besteffort.engines.running import Engine, wait_until_healthy
from besteffort.engines.supervisor import Supervisor
from besteffort.fleet import Fleet
from besteffort.policies import Static
from besteffort.progress import Silent, SilentBar
from besteffort.router import Dispatcher
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.processes import kill_command
from tests.routing import Door, completion, limited, routing

_DIES = [sys.executable, "-c", "import sys; print('up', flush=True); sys.exit(3)"]
_LIVES = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(300)"]


class Told(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def dead(child: Child) -> bool:
    return child.exit_status is not None


def test_what_dies_at_each_start_waits_longer_each_time_and_keeps_its_log(tmp_path: Path) -> None:
    child, told = Child("vLLM of big", _DIES, tmp_path / "big.log", {}), Told()
    supervisor = Supervisor(told)
    now_at = 1000.0
    supervisor.take([child], now_at)
    for num_starts, wait_s in enumerate((1, 2, 4, 8, 16, 32, 60, 60), start=1):
        wait_for(lambda: dead(child))
        for _ in range(3):  # told once
            supervisor.look(now_at)
        assert len(told.lines) == num_starts
        assert "vLLM of big died with exit status 3" in told.lines[-1]
        assert f"in {wait_s} s" in told.lines[-1]
        assert "big.log" in told.lines[-1]
        supervisor.look(now_at + wait_s - 0.1)
        assert dead(child)
        assert (tmp_path / "big.log").read_text() == "up\n" * num_starts
        now_at += wait_s
        supervisor.look(now_at)
        wait_for(lambda: (tmp_path / "big.log").read_text() == "up\n" * (num_starts + 1))  # noqa: B023
    child.stop()


def test_what_lived_long_is_started_again_soon(tmp_path: Path) -> None:
    child, told = Child("sleeper", _LIVES, tmp_path / "log", {}), Told()
    supervisor = Supervisor(told)
    now_at = 0.0
    supervisor.take([child], now_at)
    for wait_s, lived_s in ((1, 5.0), (2, 5.0), (4, 5.0), (1, 100.0), (2, 5.0)):
        supervisor.look(now_at)
        kill_command(child)
        wait_for(lambda: dead(child))
        now_at += lived_s
        supervisor.look(now_at)
        assert told.lines[-1].startswith(
            f"sleeper died with exit status -9 and is started again in {wait_s} s"
        )
        now_at += wait_s
        supervisor.look(now_at)
        assert not dead(child)
    child.stop()


def test_a_start_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    child, told = Child("vLLM of big", _DIES, log, {}), Told()
    supervisor = Supervisor(told)
    supervisor.take([child], 0.0)
    wait_for(lambda: dead(child))
    supervisor.look(0.0)
    log.unlink()
    log.parent.rmdir()  # as good as a machine that is out of memory
    supervisor.look(1.0)
    assert "vLLM of big could not be started: " in told.lines[-1]
    supervisor.look(1.0)
    assert "in 2 s" in told.lines[-1]
    log.parent.mkdir()
    supervisor.look(3.0)
    wait_for(lambda: log.read_text() == "up\n")
    child.stop()


class Speechless(Silent):
    def say(self, line: str) -> None:
        raise OSError("nobody listens")


def test_what_it_cannot_say_keeps_it_from_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    children = [Child(name, _LIVES, tmp_path / name, {}) for name in ("first", "second")]
    pids = [child.pid for child in children]
    supervisor = Supervisor(Speechless())
    supervisor.start(children)
    for child in children:
        kill_command(child)
    wait_for(lambda: all(child.pid != pid for child, pid in zip(children, pids, strict=True)))
    supervisor.rest()
    assert not any(map(dead, children))
    assert "first could not be looked after" in caplog.text
    assert "nobody listens" in caplog.text
    for child in children:
        child.stop()


def test_a_fault_with_one_server_is_logged_and_tried_again_and_the_next_is_looked_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    children = [Child(name, _DIES, tmp_path / name, {}) for name in ("first", "second")]
    supervisor = Supervisor(Silent())
    supervisor.take(children, 0.0)
    wait_for(lambda: all(map(dead, children)))
    supervisor.look(0.0)
    start_again = children[0].start_again

    def fail() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(children[0], "start_again", fail)
    supervisor.look(1.0)
    wait_for(lambda: (tmp_path / "second").read_text() == "up\n" * 2)
    assert "first could not be looked after" in caplog.text
    monkeypatch.setattr(children[0], "start_again", start_again)
    supervisor.look(1.0)  # it counts as another death of it
    supervisor.look(3.0)
    wait_for(lambda: (tmp_path / "first").read_text() == "up\n" * 2)
    for child in children:
        child.stop()


def test_at_rest_it_starts_nobody_and_what_it_started_goes_with_the_rest(tmp_path: Path) -> None:
    child, told = Child("sleeper", _LIVES, tmp_path / "log", {}), Told()
    supervisor = Supervisor(told)
    supervisor.start([child])
    first = child.pid
    kill_command(child)
    wait_for(lambda: child.pid != first)
    assert not dead(child)
    supervisor.rest()
    child.stop()
    assert dead(child)
    assert len(told.lines) == 1


def test_an_engine_that_is_killed_is_started_again_and_gets_requests_again(
    fleet: Fleet, tmp_path: Path
) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tests.fake_engine", str(port), "0"]
    child = Child("engine", command, tmp_path / "log", {})
    supervisor = Supervisor(Silent())
    other = RawEngine(lambda connection, _: connection.sendall(plain_answer()))
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy([(child, url)], 60, SilentBar())
        supervisor.start([child])
        mortal, stays = Engine(url, "x"), Engine(other.url, "x")
        dispatcher = Dispatcher(fleet, Static(0, "static:small"), ((mortal, stays), (stays,)))
        with routing(dispatcher, limited(probe_wait_s=0.1, max_probe_wait_s=0.2)) as router:
            one = Door(router, other, dispatcher)
            assert one.ask(completion(b"{}"))[0].headers["x-besteffort-replica"] == "0"
            kill_command(child)
            answers = [one.ask(completion(b"{}"))[0] for _ in range(5)]
            assert [response.status for response in answers] == [200] * 5
            assert answers[0].headers["x-besteffort-replica"] == "1"
            wait_for(lambda: b'"ok"' in one.ask(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")[1], 30.0)
            assert one.ask(completion(b"{}"))[0].headers["x-besteffort-replica"] == "0"
    finally:
        supervisor.rest()
        child.stop()
        other.close()
