"""`besteffort serve` as a process, in front of an engine that is only played."""

import contextlib
import http.client
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pyarrow.parquet as pq
import pytest

from besteffort.engines.child import free_port
from besteffort.fleet import load_fleet
from tests.conftest import ROOT
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.processes import alive
from tests.routing import completion, read_all, read_response
from tests.test_reload import save_preferring

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


def get(client: socket.socket, path: bytes) -> int:
    client.sendall(b"GET %b HTTP/1.1\r\nhost: a\r\n\r\n" % path)
    return read_response(client)[0].status


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
    key = "open-sesame\n"  # as from a file
    with serving(fleet_dir, BESTEFFORT_API_KEY=key) as (process, url, said), connect(url) as client:
        client.sendall(completion(b"{}"))
        assert read_response(client)[0].status == 401
        client.sendall(completion(b'{"model":"x"}', b"authorization: Bearer open-sesame"))
        assert read_response(client)[0].status == 404
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "sesame" not in said + process.stderr.read()
        assert process.wait(20) == 0


def test_hung_up_it_reads_its_policy_anew_and_keeps_the_old_one_if_that_is_bad(fleet_dir: Path) -> None:
    path = fleet_dir / "policy.safetensors"
    save_preferring(path, load_fleet(fleet_dir), 0)
    good = path.read_bytes()
    with serving(fleet_dir, "--policy", str(path)) as (process, url, said), connect(url) as client:
        assert " by trained:policy at " in said
        assert process.stderr is not None
        assert get(client, b"/health") == 200  # it listens to signals by now
        for content, told in ((good[:-4], "warning: trained:policy stays in charge"), (good, "in charge, ")):
            path.write_bytes(content)
            process.send_signal(signal.SIGHUP)
            assert told in process.stderr.readline()
            assert get(client, b"/health") == 200


def test_a_router_that_nobody_listens_to_any_more_takes_another_policy_and_ends_in_order(
    fleet_dir: Path,
) -> None:
    path = fleet_dir / "policy.safetensors"
    save_preferring(path, load_fleet(fleet_dir), 0)
    loads = b'besteffort_policy_loads_total{outcome="%b"} 1.0'
    with serving(fleet_dir, "--policy", str(path)) as (process, url, _), connect(url) as client:
        assert get(client, b"/health") == 200  # it listens to signals by now
        assert process.stderr is not None
        process.stderr.close()
        for outcome in (b"ok", b"failed"):
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: loads % outcome in metrics(client))  # noqa: B023
            path.write_bytes(b"nonsense")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_router_without_standard_error_serves_and_ends_in_order(fleet_dir: Path, engine: RawEngine) -> None:
    port = free_port()
    words = ("serve", str(fleet_dir), "--policy", "random", "--port", str(port))
    command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "besteffort", *words]
    with subprocess.Popen(command) as process:
        wait_for(lambda: len(engine.requests) == 2 or process.poll() is not None, 30)
        with connect(f"http://127.0.0.1:{port}") as client:
            assert get(client, b"/health") == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def metrics(client: socket.socket) -> bytes:
    client.sendall(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
    return read_response(client)[1]


def test_hung_up_while_its_engines_start_it_reads_its_policy_anew_once_it_serves(
    fleet_dir: Path, engine: RawEngine
) -> None:
    path = fleet_dir / "policy.safetensors"
    save_preferring(path, load_fleet(fleet_dir), 0)
    command = [sys.executable, "-m", "besteffort", "serve", str(fleet_dir), "--policy", str(path)]
    hung_up = threading.Event()

    def starts_slowly(connection: socket.socket, number: int) -> None:
        hung_up.wait(20)
        vllm_like(connection, number)

    engine.script = starts_slowly
    with subprocess.Popen([*command, "--port", "0"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for(lambda: len(engine.requests) == 1)
        process.send_signal(signal.SIGHUP)
        hung_up.set()
        said = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        assert "serving one by trained:policy" in said[0]
        assert "trained:policy is in charge, after trained:policy" in said[1]
        assert process.wait(20) == 0


def test_while_its_engines_start_clients_are_told_to_come_again(fleet_dir: Path, engine: RawEngine) -> None:
    started = threading.Event()

    def starts_slowly(connection: socket.socket, number: int) -> None:
        started.wait(20)
        vllm_like(connection, number)

    engine.script = starts_slowly
    ports = [free_port(), free_port()]
    words = ("serve", fleet_dir, "--policy", "random", "--port", ports[0], "--admin-port", ports[1])
    with (
        subprocess.Popen([sys.executable, "-m", "besteffort", *map(str, words)]) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)  # also where what follows fails
        wait_for(lambda: len(engine.requests) == 1)
        health, asked = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", completion(b"{}")
        for port in ports:
            response, body = answered(port, health)
            assert (response.status, json.loads(body)) == (503, {"status": "starting"})
            response, body = answered(port, asked)
            assert (response.status, json.loads(body)["error"]["code"]) == (503, "starting")
            assert int(response.headers["retry-after"]) > 0
        late = [socket.create_connection(("127.0.0.1", port), timeout=20) for port in ports]
        started.set()
        for port, client in zip(ports, late, strict=True):
            assert read_all(client) == b"", "it lies idle, and is closed"
            client.close()
            wait_for(lambda: serves(port))  # noqa: B023
        process.terminate()
        assert process.wait(20) == 0


def serves(port: int) -> bool:
    """Or says that it will; nobody's connection is closed without a word in the moment of the change."""
    return answered(port, b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")[0].status == 200


def answered(port: int, request: bytes) -> tuple[http.client.HTTPResponse, bytes]:
    """By whoever listens there; the connection ends with it."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request)
        return read_response(client)


def test_it_ends_in_order_when_its_terminal_is_closed_while_its_engines_start(
    fleet_dir: Path, engine: RawEngine
) -> None:
    def never_starts(connection: socket.socket, number: int) -> None:
        connection.recv(1)

    engine.script = never_starts
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "besteffort", "serve", str(fleet_dir), "--policy", "random"]
        os.execv(sys.executable, [*command, "--port", "0"])  # noqa: S606
    wait_for(lambda: len(engine.requests) == 1)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), "it ended by itself, and not by the signal"


def test_it_ends_when_the_terminal_that_it_was_started_on_is_closed(fleet_dir: Path) -> None:
    command = [sys.executable, "-m", "besteffort", "serve", str(fleet_dir), "--policy", "random"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*command, "--port", "0"])  # noqa: S606
    said = ""
    while (found := re.search(r" at (http://\S+)/v1", said)) is None:
        said += os.read(terminal, 1024).decode()
    with connect(found[1]) as client:
        assert get(client, b"/health") == 200
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), "it ended by itself, and not by the signal"


# What `serve` takes for vLLM: an API server and, in a session of its own and deaf to SIGTERM, its core.
FAKE_VLLM = """
import os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
core = subprocess.Popen([sys.executable, "-c", DEAF], start_new_session=True)
if "NEVER_READY" in os.environ:
    time.sleep(600)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data":[{"id":"served"}]}')

    do_POST = do_GET


HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path: Path) -> str:
    """A folder for PYTHONPATH, before the one with the real one."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_VLLM)
    (tmp_path / "fleet.toml").write_text(
        """
        schema_version = 1
        name = "two"
        models = [{ name = "small", path = "small" }, { name = "large", path = "large" }]
        tasks = [{ name = "copa", deadline_ms_per_token = 40, lm_eval_task = "copa" }]
        """
    )
    return f"{tmp_path / 'fake'}:{ROOT}"


@pytest.mark.parametrize("serves", [True, False], ids=["while it serves", "while they start"])
@pytest.mark.parametrize(
    "signal_", [signal.SIGTERM, signal.SIGINT, None], ids=["SIGTERM", "Ctrl-C", "terminal"]
)
def test_however_it_is_told_to_end_nothing_is_left_of_the_servers_that_it_started(
    tmp_path: Path, fake_vllm: str, signal_: signal.Signals | None, serves: bool
) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "besteffort", "serve", str(tmp_path), "--policy", "random"]
        env = {**os.environ, "PYTHONPATH": fake_vllm} | ({} if serves else {"NEVER_READY": "1"})
        os.execve(sys.executable, [*command, "--port", "0"], env)  # noqa: S606
    os.set_blocking(terminal, False)
    said = bytearray()

    def heard() -> bytearray:
        with contextlib.suppress(OSError):  # there is nothing, or nobody any more
            said.extend(os.read(terminal, 65_536))  # or it would be full, and whoever draws on it stuck
        return said

    def started() -> list[psutil.Process]:
        return psutil.Process(pid).children(recursive=True)

    wait_for(lambda: heard() and len(started()) == 6, 60)  # two servers, each with its tether and its core
    wait_for(lambda: b"(Ctrl-C ends it)" in heard() or not serves, 60)
    processes = started()
    if signal_ is None:
        os.close(terminal)
        wait_for(lambda: not alive(pid), 60)
    else:
        os.kill(pid, signal_)
        wait_for(lambda: heard() and not alive(pid), 60)
        os.close(terminal)
    assert os.WIFEXITED(os.waitpid(pid, 0)[1]), "it ended by itself, and not by the signal"
    assert not psutil.wait_procs(processes, timeout=5)[1]


def test_metrics_and_administration_have_the_port_that_is_said(fleet_dir: Path) -> None:
    options = ("--admin-port", "0", "--admin-api-key", "secret")
    with serving(fleet_dir, *options) as (_, url, said):
        found = re.search(r"metrics and administration are at (http://127\.0\.0\.1:\d+)", said)
        assert found is not None
        with connect(found[1]) as inside, connect(url) as outside:
            for client, status in ((inside, 200), (outside, 404)):
                assert get(client, b"/metrics") == status
        assert "secret" not in said


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ((), False),
        (("--host", "0.0.0.0"), True),  # noqa: S104
        (("--host", "0.0.0.0", "--api-key", "key"), False),  # noqa: S104
        (("--admin-port", "0", "--admin-host", "127.0.0.2"), False),
        (("--admin-port", "0", "--admin-host", "0.0.0.0"), True),  # noqa: S104
        (("--admin-host", "0.0.0.0"), False),  # noqa: S104  -- there is no such port
        (
            ("--admin-port", "0", "--admin-host", "0.0.0.0", "--protect-metrics", "--api-key", "key"),  # noqa: S104
            False,
        ),
    ],
)
def test_a_door_open_to_all_is_warned_of(fleet_dir: Path, options: tuple[str, ...], warned: bool) -> None:
    with serving(fleet_dir, *options) as (_, _, said):
        assert ("warning: " in said) == warned


def test_fewer_files_than_connections_are_warned_of(fleet_dir: Path, engine: RawEngine) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        pytest.skip("there is no limit here")
    with serving(fleet_dir, "--max-connections", str(hard)) as (_, _, said):
        told = " ".join(said.split())
        assert told.count("warning: ") == 1
        assert f"this process may have {hard}: " in told
    engine.requests.clear()  # it is asked anew what it serves
    with serving(fleet_dir, "--max-connections", str(hard // 2)) as (process, _, said):
        assert "warning: " not in said
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


# As `besteffort`, but that the end of the decision log takes a while.
_SLOW_TO_END = """
import sys, time
from besteffort.cli import app
from besteffort.router import DecisionLog
close = DecisionLog.close
def close_slowly(log):
    print("closing", file=sys.stderr, flush=True)
    time.sleep(1.0)
    close(log)
DecisionLog.close = close_slowly
app()
"""


def test_told_to_stop_once_more_it_still_ends_in_order(fleet_dir: Path, engine: RawEngine) -> None:
    def script(connection: socket.socket, number: int) -> None:
        if number == 0:
            vllm_like(connection, number)
        else:
            connection.sendall(plain_answer())

    engine.script = script
    folder = fleet_dir / "decisions"
    words = ("serve", fleet_dir, "--policy", "random", "--port", "0", "--decision-log", folder)
    command = [sys.executable, "-c", _SLOW_TO_END, *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        found = None
        while found is None:
            found = re.search(r" at (https?://\S+)/v1", process.stderr.readline())
        with connect(found[1]) as client:
            client.sendall(completion(b"{}"))
            assert read_response(client)[0].status == 200
        process.terminate()
        while process.stderr.readline() != "closing\n":
            pass
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            process.send_signal(number)
        assert process.wait(20) == 0
    (path,) = folder.glob("*.parquet")
    assert pq.read_metadata(path).num_rows == 1


@pytest.mark.parametrize(
    ("options", "saying"),
    [
        (("--ssl-certfile", "nowhere.pem"), "--ssl-certfile nowhere.pem: cannot be used"),
        (("--ssl-certfile", "FLEET/fleet.toml"), "fleet.toml: cannot be used"),
        (("--ssl-keyfile", "x"), "--ssl-keyfile goes only with --ssl-certfile"),
        (("--max-body-mb", "0"), "--max-body-mb"),
        (("--api-key", "one", "--admin-api-key", "one"), "--admin-api-key: clients have this key too"),
        (("--admin-port", "0", "--admin-host", "203.0.113.1"), "--admin-host 203.0.113.1 --admin-port 0: "),
        (("--api-key", " \n"), "--api-key: empty"),
        (("--admin-api-key", "open\nsesame"), "--admin-api-key: empty, or with characters"),
        (("--api-key", "one", "--admin-api-key", "one\n"), "--admin-api-key: clients have this key too"),
        (("--protect-metrics",), "--protect-metrics goes only with --api-key"),
        (("--profile", "nowhere.parquet"), "--profile nowhere.parquet: no such file"),
        (("--rewards", "FLEET"), "no such file"),
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
    assert "sesame" not in done.stderr


def test_a_replay_shows_a_running_router_its_key(fleet_dir: Path, engine: RawEngine, tmp_path: Path) -> None:
    usage = b'data: {"choices":[],"usage":{"completion_tokens":2}}\n\n'
    stream = _EVENT * 2 + usage + b"data: [DONE]\n\n"

    def script(connection: socket.socket, number: int) -> None:
        if number < 2:
            vllm_like(connection, number)
        else:
            connection.sendall(_STREAM + b"%x\r\n%b\r\n0\r\n\r\n" % (len(stream), stream))

    engine.script = script
    (tmp_path / "rewards.csv").write_text("task,model,value\ncopa,only,0.9\n")
    trace = tmp_path / "trace.parquet"
    assert run("score", fleet_dir, "--given", tmp_path / "rewards.csv").returncode == 0
    words = ("trace", "generate", "stable", fleet_dir, "-o", trace, "--seed", 1, "--rate", 20)
    assert run(*words, "--num-requests", 20).returncode == 0
    with serving(fleet_dir, BESTEFFORT_API_KEY="open-sesame") as (_, url, _):
        replay = ("replay", trace, fleet_dir, "--url", url, "--json", "--name", "keyed")
        for given, wrong in (((), "no key was given"), (("--api-key", "ajar"), "not the one")):
            done = run(*replay, *given)
            assert (done.returncode, wrong in done.stderr, "ajar" in done.stderr) == (2, True, False)
        done = run(*replay, BESTEFFORT_API_KEY="open-sesame")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["answered"] == 20
    for path in (fleet_dir / "replays" / "keyed").iterdir():
        assert b"sesame" not in path.read_bytes()


def run(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "besteffort", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **env}
    )
