"""The decision log: what is in it, that it is a trace, and that no disk holds up or harms a request."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from besteffort import dqn
from besteffort.artifacts.decisions_file import RECORDED, SCHEMA, save_decisions
from besteffort.artifacts.files import provenance, sha256
from besteffort.artifacts.policy_file import load_policy
from besteffort.artifacts.profile_file import save_samples
from besteffort.artifacts.rewards_file import read_given_rewards, save_rewards
from besteffort.cli import app
from besteffort.engines.running import Engine
from besteffort.errors import TraceError
from besteffort.fleet import Fleet, load_fleet
from besteffort.policies import Policy, RoundRobin, load_named_policy
from besteffort.progress import Silent
from besteffort.router import DecisionLog, Dispatcher
from besteffort.router.prompt_count import PromptCount, estimate
from besteffort.stages.train import train
from besteffort.trace import load_trace, read_trace
from besteffort.training.trace_parts import MIN_LIVES, MIN_NUM_REQUESTS
from besteffort.workload import generate_workload
from tests.conftest import ROOT
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.routing import completion, read_response, routing
from tests.test_dqn import BRIEF, TINY, make_samples
from tests.test_reload import save_preferring
from tests.test_serve import connect, engine, fleet_dir, get, serving, vllm_like

__all__ = ["engine", "fleet_dir"]  # fixtures

_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
_EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'
_REFUSAL = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}"


def answer(connection: socket.socket, _: int) -> None:
    body = {"choices": [{"text": "a"}], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
    data = json.dumps(body).encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(data) + data)


class Logged:
    """A router whose engine plays a script, and its log."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        self.fleet, self.folder = fleet, folder
        self.policy: Policy = RoundRobin()
        self.said: list[str] = []
        self.url = ""
        self.save: Callable[..., None] = save_decisions

    @contextmanager
    def running(self, script: Any = answer, **options: Any) -> Iterator["Logged"]:
        played = RawEngine(script)
        replica = Engine(played.url, "served")
        dispatcher = Dispatcher(self.fleet, self.policy, ((replica, replica), (replica,)))
        log = DecisionLog(
            self.folder, self.fleet, dispatcher.clock, self.said.append, save=self.save, **options
        )
        with contextlib.closing(log), routing(dispatcher, decision_log=log) as self.url:
            yield self
        played.close()

    def ask(self, body: Any = None, path: str = "/v1/completions", **headers: str) -> tuple[int, bytes]:
        connection = HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if path == "/metrics":
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body or {}), named)
        response = connection.getresponse()
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = response.read()
        connection.close()
        return response.status, data

    def counted(self, outcome: str) -> float:
        text = self.ask(path="/metrics")[1].decode()
        return float(text.split(f'besteffort_decision_log_rows_total{{outcome="{outcome}"}} ')[1].split()[0])

    @property
    def rows(self) -> list[dict[str, Any]]:
        parts = [pq.ParquetFile(path).read() for path in sorted(self.folder.glob("*.parquet"))]
        return pa.concat_tables(parts).sort_by("received_at").to_pylist() if parts else []


@pytest.fixture
def logged(fleet: Fleet, tmp_path: Path) -> Logged:
    return Logged(fleet, tmp_path)


def test_a_row_says_what_was_seen_chosen_and_came_of_it(logged: Logged, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("policies") / "policy.safetensors"
    save_preferring(path, logged.fleet, 1)
    nowhere = Path("/nowhere")
    logged.policy = load_named_policy(str(path), logged.fleet, profile=nowhere, rewards=nowhere, rng=None)  # type: ignore[arg-type]
    before = time.time()
    with logged.running():
        logged.ask({"model": "besteffort/piqa", "prompt": "x"}, x_request_id="mine")
        logged.ask({"model": "small"}, **{"x-besteffort-deadline-ms-per-token": "0.0001"})
    first, second = logged.rows
    assert set(first) == set(SCHEMA.names)
    wanted = {
        "arrived_at": 0.0, "task": "piqa", "num_prompt_tokens": 7, "prompt_estimated": False,
        "num_output_tokens": 5, "num_tokens_received": 5, "request_id": "mine", "policy": "trained:policy",
        "arrival_rate_per_s": 0.0, "batch_sizes": [0.0, 0.0], "neighbours": [0.0] * 4, "q_values": [0.0, 1.0],
        "chosen": "large", "model": "large", "replica": 0, "num_retries": 0, "outcome": "ok", "status": 200,
        "error": None, "ttft_ms": None, "deadline_ms_per_token": 80.0, "deadline_weight": 1.0,
    }  # fmt: skip
    assert {name: first[name] for name in wanted} == wanted
    assert first["latency_ms_per_token"] == pytest.approx(first["duration_ms"] / 5)
    assert 0 < first["decision_ms"] < first["duration_ms"]
    assert before - 1 < first["received_at"].timestamp() < time.time() + 1
    apart_s = (second["received_at"] - first["received_at"]).total_seconds()
    assert second["arrived_at"] == pytest.approx(apart_s, abs=1e-5)
    assert [second[name] for name in ("policy", "q_values", "chosen", "model")] == [None, None, None, "small"]
    assert (second["deadline_ms_per_token"], second["deadline_weight"]) == (0.0001, 0.0)


def test_every_end_of_a_request_has_its_row(logged: Logged) -> None:
    def script(connection: socket.socket, number: int) -> None:
        if number == 0:
            connection.sendall(_STREAM + 3 * _EVENT)
            connection.close()
        elif number == 1:
            connection.sendall(_REFUSAL)
        elif number in (2, 4):
            connection.sendall(b"garbage\r\n\r\n")
        elif number == 3:
            answer(connection, number)
        else:
            connection.sendall(_STREAM + _EVENT)

    with logged.running(script):
        logged.ask({"model": "large", "prompt": "a" * 38})
        logged.ask({"model": "large", "prompt": [1, 2, 3], "max_tokens": 9})
        logged.ask({"model": "besteffort"})  # the first replica fails, another answers
        logged.ask({"model": "large", "messages": []})  # fails, and there is no other
        connection = socket.create_connection(("127.0.0.1", urlsplit(logged.url).port or 0))
        with connection:
            body = b'{"model":"large","stream":true}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            assert connection.recv(100)
    found = [
        (row["outcome"], row["status"], row["error"], row["num_retries"], row["num_output_tokens"],
         row["num_tokens_received"], row["num_prompt_tokens"], row["latency_ms_per_token"] is None)
        for row in logged.rows
    ]  # fmt: skip
    assert found[:3] == [
        ("ok", 200, None, 0, 3, 3, 10, False),
        ("refused", 400, None, 0, 9, 0, 3, True),
        ("ok", 200, None, 1, 5, 5, 7, False),
    ]
    assert [row[:3] for row in found[3:]] == [("failed", 502, "garbage"), ("cancelled", 200, None)]


def test_parts_are_a_trace_each_and_together(logged: Logged) -> None:
    with logged.running(max_rows=4):
        for number in range(12):
            logged.ask({"model": f"besteffort/{('copa', 'piqa')[number % 2]}"})
            if number % 4 == 3:
                wait_for(lambda: len(list(logged.folder.glob("*.parquet"))) * 4 > number)  # noqa: B023
    parts = sorted(logged.folder.iterdir())
    assert len(parts) == 3
    for part in parts:
        trace = load_trace(part, logged.fleet)
        assert (len(trace), trace.arrived_at[0], trace.task.tolist()) == (4, 0.0, [0, 1, 0, 1])
    whole = read_trace(logged.folder, logged.fleet)
    assert whole.requests.task.tolist() == [0, 1] * 6
    assert whole.requests.num_prompt_tokens.tolist() == [7] * 12
    assert "q_values" in whole.further.column_names
    lasted_s = (logged.rows[-1]["received_at"] - logged.rows[0]["received_at"]).total_seconds()
    assert whole.requests.arrived_at[-1] == pytest.approx(lasted_s)
    (logged.folder / "other.parquet").write_bytes(b"")
    with pytest.raises(TraceError, match=r"other\.parquet.*leave nothing else in it"):
        read_trace(logged.folder)


def test_a_part_is_written_when_it_is_old_without_any_more_requests(logged: Logged) -> None:
    with logged.running(every_s=0.2):
        logged.ask()
        wait_for(lambda: len(logged.rows) == 1)
        assert logged.counted("written") == 1


def test_a_disk_that_hangs_holds_up_no_request_and_what_it_cannot_take_is_counted(logged: Logged) -> None:
    go, begun = threading.Event(), threading.Event()

    def save(*arguments: Any) -> None:
        begun.set()
        assert go.wait(20)
        save_decisions(*arguments)

    logged.save = save
    with logged.running(max_rows=1, max_waiting=3):
        logged.ask()
        assert begun.wait(20)
        assert [logged.ask()[0] for _ in range(10)] == [200] * 10
        assert logged.counted("too_slow") == 7
        go.set()
        wait_for(lambda: logged.counted("written") == 4)
    assert len(logged.rows) == 4
    assert [line for line in logged.said if "too slow" in line] == logged.said[:1]
    assert logged.said[1:] == [f"the decision log in {logged.folder} is written again"]


def test_a_full_disk_harms_no_request_and_is_told_once(fleet: Fleet, full_disk: Path) -> None:
    ballast = full_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        file.write(os.urandom(100_000))
    logged = Logged(fleet, full_disk)
    with logged.running(every_s=0.0):
        for number in (1, 2, 3):
            assert logged.ask()[0] == 200
            wait_for(lambda: logged.counted("not_written") == number)  # noqa: B023
        ballast.unlink()
        logged.ask()
        wait_for(lambda: logged.counted("written") == 1)
    assert len(logged.said) == 2
    assert "No space left on device" in logged.said[0]
    assert "is written again" in logged.said[1]
    assert [path.name for path in full_disk.iterdir()] == [path.name for path in full_disk.glob("*.parquet")]


def test_a_fault_of_the_log_s_own_harms_no_request(logged: Logged, caplog: pytest.LogCaptureFixture) -> None:
    def save(*arguments: Any) -> None:
        raise RuntimeError("unforeseen")

    logged.save = save
    with logged.running(max_rows=1):
        logged.ask()
        wait_for(lambda: logged.counted("not_written") == 1)
        assert logged.ask()[0] == 200
    assert "unforeseen" in caplog.text


def test_lengths_that_no_fleet_takes_are_cut_so_that_the_log_can_be_replayed(logged: Logged) -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(plain_answer(num_tokens=10**6))

    with logged.running(script):
        logged.ask({"prompt": "a" * 10**5})
    (row,) = logged.rows
    assert row["num_tokens_received"] == 10**6
    assert len(load_trace(logged.folder, logged.fleet)) == 1


@pytest.mark.parametrize("wanted", [float("nan"), 1e400, 2**63, 10**40])
def test_nothing_that_a_client_may_want_costs_it_its_answer_or_the_log_a_row(
    logged: Logged, wanted: float
) -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}")

    with logged.running(script):
        assert logged.ask({"max_tokens": wanted, "n": wanted}) == (400, b"{}")
    assert [row["outcome"] for row in logged.rows] == ["refused"]


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_prompt_is_counted_as_stated_however_the_answer_is_cut(cut: int) -> None:
    data = b'{"x":"\\"prompt_tokens\\":1}","usage":{"prompt_tokens": 12,"completion_tokens":3}}'
    count = PromptCount()
    for part in (data[:cut], data[cut:]):
        count.feed(part)
    assert count.stated == 12


def test_a_prompt_is_estimated_where_nothing_is_stated() -> None:
    given = (b'"%b"' % (b"a" * 38), b"[1, 2, 3]", b"[ 7]", b'["ab", "cd"]', b'""')
    assert [estimate(memoryview(prompt)) for prompt in given] == [10, 3, 1, 3, 1]
    assert estimate(None) == 1


def test_what_was_written_outlives_kill_9_and_a_stop_writes_the_rest(
    fleet_dir: Path,
    engine: RawEngine,
) -> None:
    engine.script = lambda connection, number: vllm_like(
        connection, 0 if engine.requests[number].startswith(b"GET") else 1
    )
    logs = fleet_dir / "logs" / "decisions"
    options = ("--decision-log", str(logs), "--decision-log-every-s", "0.3")
    with serving(fleet_dir, *options) as (process, url, _):
        post(url)
        wait_for(lambda: list(logs.glob("*.parquet")))
        process.kill()
        process.wait()
    assert len(read_trace(logs).requests) == 1
    with serving(fleet_dir, *options[:2]) as (process, url, _):
        post(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert len(read_trace(logs).requests) == 2


def post(url: str) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=20) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


@pytest.fixture
def titan_log(tmp_path: Path) -> tuple[Path, Path]:
    """The paper's fleet, and a log of 1,500 requests to it, in two parts whose arrivals overlap."""
    fleet_dir = tmp_path / "titan"
    fleet_dir.mkdir()
    for name in ("fleet.toml", "profile.parquet", "rewards.parquet"):
        shutil.copy(ROOT / "artifacts" / "titan-rtx-opt" / name, fleet_dir)
    fleet, logs = load_fleet(fleet_dir), tmp_path / "logs"
    requests = generate_workload("unpredictable-2", fleet, np.random.default_rng(0), num_requests=1500)
    for part in range(2):
        rows = slice(part, None, 2)
        of_all = {
            "received_at_s": 1.7e9 + 5.0 * requests.arrived_at[rows],
            "task": requests.task[rows],
            "num_prompt_tokens": requests.num_prompt_tokens[rows],
            "num_output_tokens": requests.num_output_tokens[rows],
        }
        zero = ("num_tokens_received", "model", "replica", "num_retries", "decision_ms", "duration_ms")
        same = {"request_id": "x", "prompt_estimated": False, "outcome": "ok", "deadline_ms_per_token": 40.0}
        same |= dict.fromkeys(zero, 0)
        table = pa.table(
            [
                pa.array(of_all[field.name], field.type)
                if field.name in of_all
                else pa.array([same.get(field.name)] * 750, field.type)
                for field in RECORDED
            ],
            schema=RECORDED,
        )
        save_decisions(logs / f"decisions-{part}.parquet", table, fleet, {})
    return fleet_dir, logs


def test_a_log_is_replayed_and_described_like_any_trace(
    titan_log: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet_dir, logs = titan_log
    app(["trace", "describe", str(logs), str(fleet_dir), "--json"], standalone_mode=False)
    described = json.loads(capsys.readouterr().out)
    assert (described["num_requests"], described["provenance"]["source"]) == (1500, "decision log of 2 parts")
    app(["trace", "describe", str(logs / "decisions-1.parquet"), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["num_requests"] == 750
    replay = ["replay", str(logs), str(fleet_dir), "--simulate", "--policy", "static:opt-125m", "--json"]
    app(replay, standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["answered"] == 1500


def test_a_log_is_trained_from_like_any_trace(
    titan_log: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet_dir, logs = titan_log
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    train(fleet_dir, recipe="tiny", traces=[logs], force=True, gate=BRIEF, progress=Silent())
    facts = load_policy(fleet_dir / "policy.safetensors", load_fleet(fleet_dir)).facts
    assert facts["sha256"]["trace logs"] == sha256(logs)
    assert set(facts["evaluation_by_trace"]) == {"logs"}


@pytest.fixture
def quick_fleet_dir(tmp_path: Path) -> Path:
    """The CPU fleet, profiled and scored, with answers so short that a second of requests is a long time."""
    folder = tmp_path / "quick"
    folder.mkdir()
    toml = (ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml").read_text()
    (folder / "fleet.toml").write_text(toml.replace("[[tasks]]", "[[tasks]]\nnum_output_tokens = [1, 2]"))
    fleet = load_fleet(folder)
    save_samples(folder / "profile.parquet", make_samples(), provenance())
    given = read_given_rewards(ROOT / "artifacts" / "titan-rtx-opt" / "rewards.csv", fleet)
    save_rewards(folder / "rewards.parquet", given, fleet, {})
    return folder


# What a client may ask for, and how the request ends.
_ASKED = (
    (b'{"model":"besteffort/copa","prompt":"a word or two"}', (), "ok"),
    (b'{"model":"besteffort/piqa","prompt":"x","stream":true}', (), "ok"),
    (b'{"model":"opt-22m","prompt":[1,2,3],"max_tokens":2}', (), "ok"),
    (b'{"prompt":"x"}', (b"x-besteffort-deadline-ms-per-token: 0.0001",), "ok"),
    (b'{"model":"besteffort/openbookqa","prompt":"refuse"}', (), "refused"),
)


def test_a_log_that_a_router_wrote_is_replayed_and_trained_from(
    quick_fleet_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, logs = load_fleet(quick_fleet_dir), quick_fleet_dir / "decisions"
    policy = quick_fleet_dir / "given.safetensors"
    save_preferring(policy, fleet, 1)
    num_sent = _written_by_a_router(quick_fleet_dir, policy, logs)
    rows = pq.ParquetDataset(logs).read().to_pylist()
    assert len(rows) == num_sent
    assert len(list(logs.iterdir())) > 1
    ends = Counter(row["outcome"] for row in rows)
    assert ends == Counter(_ASKED[number % len(_ASKED)][2] for number in range(num_sent))

    words = ["replay", str(logs), str(quick_fleet_dir), "--simulate", "--json", "--name", "again"]
    app([*words, "--policy", str(policy)], standalone_mode=False)
    replayed = json.loads(capsys.readouterr().out)
    assert (replayed["sent"], replayed["answered"]) == (num_sent, num_sent)

    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    train(quick_fleet_dir, recipe="tiny", traces=[logs], force=True, gate=BRIEF, progress=Silent())
    facts = load_policy(quick_fleet_dir / "policy.safetensors", fleet).facts
    assert facts["sha256"]["trace decisions"] == sha256(logs)
    assert set(facts["evaluation_by_trace"]) == {"decisions"}


def _written_by_a_router(fleet_dir: Path, policy: Path, logs: Path) -> int:
    """Serve as many requests, for as long, as training on a trace takes at least; how many they were."""
    played = RawEngine(lambda connection, number: _play(connection, played.requests[number]))
    names = load_fleet(fleet_dir).model_names
    engines = [word for name in names for word in ("--engine", f"{name}={played.url}")]
    options = ("--policy", str(policy), "--decision-log", str(logs), "--decision-log-every-s", "0.5")
    num_sent = 0
    with serving(fleet_dir, *options, *engines) as (process, url, _), connect(url) as client:
        assert get(client, b"/health") == 200  # from now on it serves
        ends_at = time.monotonic() + 1.1 * MIN_LIVES * load_fleet(fleet_dir).request_life_s
        while num_sent < MIN_NUM_REQUESTS or time.monotonic() < ends_at:
            body, headers, end = _ASKED[num_sent % len(_ASKED)]
            client.sendall(completion(body, *headers))
            assert read_response(client)[0].status == (200 if end == "ok" else 400)
            num_sent += 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    played.close()
    return num_sent


def _play(connection: socket.socket, request: bytes) -> None:
    if request.startswith(b"GET"):
        vllm_like(connection, 0)
    elif b"refuse" in request:
        connection.sendall(_REFUSAL)
    elif b'"stream":true' in request:
        head = _STREAM.replace(b"connection: close", b"transfer-encoding: chunked")
        connection.sendall(head + b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT) * 2 + b"0\r\n\r\n")
    else:
        answer(connection, 0)
