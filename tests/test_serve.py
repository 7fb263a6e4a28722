"""`besteffort serve` as a process, in front of an engine that is only played."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.conftest import ROOT
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.processes import children_of
from tests.routing import completion, read_all, read_response

_MODELS = b'{"object":"list","data":[{"id":"served"}]}'
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'


def vllm_like(connection: socket.socket, number: int) -> None:
    """Answers what `serve` asks first, then streams until it is let go."""
    if number == 0:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(_MODELS) + _MODELS)
    elif number == 1:
        connection.sendall(plain_answer())
    else:
        connection.sendall(_STREAM + b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT))


@pytest.fixture
def engine() -> Iterator[RawEngine]:
    engine = RawEngine(vllm_like)
    yield engine
    engine.close()


@pytest.fixture
def fleet_dir(tmp_path: Path, engine: RawEngine) -> Path:
    (tmp_path / "fleet.toml").write_text(
        f"""
        schema_version = 1
        name = "one"
        models = [{{ name = "only", urls = ["{engine.url}"] }}]
        tasks = [{{ name = "copa", deadline_ms_per_token = 40, lm_eval_task = "copa" }}]
        """
    )
    return tmp_path


@contextmanager
def serving(fleet_dir: Path, *options: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The process, its URL and what it said before."""
    command = [sys.executable, "-m", "besteffort", "serve", str(fleet_dir), "--policy", "round-robin"]
    process = subprocess.Popen(
        [*command, "--port", "0", *options], stderr=subprocess.PIPE, text=True, env={**os.environ, **env}
    )
    said = ""
    try:
        assert process.stderr is not None
        while (found := re.search(r" at (https?://\S+)/v1", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        yield process, found[1], said
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def test_told_to_stop_it_lets_a_stream_end_and_takes_nothing_new(fleet_dir: Path, engine: RawEngine) -> None:
    end = b"0\r\n\r\n"
    streams: list[socket.socket] = []

    def script(connection: socket.socket, number: int) -> None:
        vllm_like(connection, number)
        if number > 1:
            streams.append(connection)

    engine.script = script
    with serving(fleet_dir) as (process, url, _), connect(url) as client:
        client.sendall(completion(b'{"stream":true}'))
        wait_for(lambda: len(streams) == 1)
        assert client.recv(10)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: refused(url))
        assert process.poll() is None
        streams[0].sendall(end)
        assert read_all(client).endswith(end)
        assert process.wait(20) == 0


def refused(url: str) -> bool:
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it lay in the backlog when the listener was closed; the next is refused
        return False
    return False


def test_a_stream_that_does_not_end_is_cut_off_when_the_grace_is_over(fleet_dir: Path) -> None:
    with serving(fleet_dir, "--grace-s", "0.3") as (process, url, _), connect(url) as client:
        client.sendall(completion(b'{"stream":true}'))
        assert client.recv(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert not read_all(client).endswith(b"0\r\n\r\n")


def test_the_key_may_come_from_the_environment_and_is_never_said(fleet_dir: Path) -> None:
    with serving(fleet_dir, BESTEFFORT_API_KEY="open-sesame") as (process, url, said), connect(url) as client:
        client.sendall(completion(b"{}"))
        assert read_response(client)[0].status == 401
        client.sendall(completion(b'{"model":"x"}', b"authorization: Bearer open-sesame"))
        assert read_response(client)[0].status == 404
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "sesame" not in said + process.stderr.read()
        assert process.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ((), False),
        (("--host", "0.0.0.0"), True),  # noqa: S104
        (("--host", "0.0.0.0", "--api-key", "key"), False),  # noqa: S104
    ],
)
def test_a_door_open_to_all_is_warned_of(fleet_dir: Path, options: tuple[str, ...], warned: bool) -> None:
    with serving(fleet_dir, *options) as (_, _, said):
        assert ("warning: " in said) == warned


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--ssl-certfile", "nowhere.pem"), "--ssl-certfile nowhere.pem: cannot be used"),
        (("--ssl-certfile", "FLEET/fleet.toml"), "fleet.toml: cannot be used"),
        (("--ssl-keyfile", "x"), "--ssl-keyfile goes only with --ssl-certfile"),
        (("--max-body-mb", "0"), "--max-body-mb"),
        (("--total-timeout-s", "never"), "--total-timeout-s"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    fleet_dir: Path, options: tuple[str, ...], saying: str
) -> None:
    words = [word.replace("FLEET", str(fleet_dir)) for word in options]
    command = [sys.executable, "-m", "besteffort", "serve", str(fleet_dir), "--policy", "random", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert saying in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.vllm
def test_a_vllm_server_that_is_killed_is_started_again_and_answers_again(tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    shipped = (ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml").read_text()
    top, smallest, *_ = shipped.split("[[models]]")
    task = shipped.partition("[[tasks]]")
    (tmp_path / "fleet.toml").write_text(f"{top}[[models]]{smallest}{''.join(task[1:])}")
    with serving(tmp_path) as (process, url, _), connect(url) as client:
        client.settimeout(120)
        (tether,) = children_of(process.pid)
        (server,) = children_of(tether)
        os.kill(server, signal.SIGKILL)
        wait_for(lambda: status_of(client, b"{}") in (502, 503))
        assert process.stderr is not None
        assert "died with exit status -9 and is started again" in process.stderr.readline()
        wait_for(lambda: status_of(client, b'{"prompt":"a","max_tokens":2}') == 200, 300.0)


def status_of(client: socket.socket, body: bytes) -> int:
    client.sendall(completion(body))
    return read_response(client)[0].status
