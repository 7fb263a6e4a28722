"""Engines that die, hang and come back, and whom requests go to meanwhile."""

import contextlib
import functools
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from besteffort.engines.child import free_port
from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import Static
from besteffort.router import Dispatcher, Limits
from besteffort.router.breaker import Breaker, State
from besteffort.router.loads import Standing
from besteffort.router.message import AnswerHead
from besteffort.router.upstream import Fault
from tests.fake_engine import EngineProcess, FakeEngine, plain_answer, serving, wait_for
from tests.routing import Door, completion, door, limited, routing

# A server that takes requests and never answers.
_ACCEPTS = """
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
time.sleep(600)
"""
_WELL = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
_LARGE = completion(b'{"model":"large"}')
_LARGE_STREAM = completion(b'{"model":"large","stream":true}')


@dataclass
class Trio:
    """Two small engines, of which the first can be killed, and a large one behind a router."""

    url: str
    mortal: EngineProcess
    other: FakeEngine  # of the small ones
    dispatcher: Dispatcher

    def ask(self, **body: Any) -> tuple[int, str, bytes]:
        """Status, which model and replica answered, and the answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        with contextlib.closing(connection):
            connection.request("POST", "/v1/completions", json.dumps(body))
            response = connection.getresponse()
            told = response.headers
            at = f"{told['x-besteffort-model']} {told['x-besteffort-replica']}"
            return response.status, at, response.read()

    def stream(self, stack: contextlib.ExitStack) -> http.client.HTTPResponse:
        """An answer that an engine has begun."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        stack.callback(connection.close)
        body = {"model": "besteffort", "stream": True, "max_tokens": 9, "prompt": "begin"}
        connection.request("POST", "/v1/completions", json.dumps(body))
        return stack.enter_context(connection.getresponse())

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    @property
    def health(self) -> tuple[int, str, list[str]]:
        """Status code, status in words, breakers of the small engines."""
        code, body = self.get("/health")
        told = json.loads(body)
        return code, told["status"], told["breakers"]["small"]


@pytest.fixture
def trio(fleet: Fleet) -> Iterator[Trio]:
    with contextlib.ExitStack() as stack:
        mortal = EngineProcess(free_port(), step_s=60.0)
        stack.callback(mortal.kill)
        small, large = FakeEngine("small"), FakeEngine("large")
        urls = [mortal.url, *(stack.enter_context(serving(fake.app)) for fake in (small, large))]
        engines = ((Engine(urls[0], "x"), Engine(urls[1], "x")), (Engine(urls[2], "x"),))
        dispatcher = Dispatcher(fleet, Static(0, "static:small"), engines)
        url = stack.enter_context(routing(dispatcher, limited(probe_wait_s=0.1, max_probe_wait_s=0.2)))
        yield Trio(url, mortal, small, dispatcher)


@pytest.mark.parametrize("stream", [False, True])
def test_when_an_engine_is_killed_under_load_no_request_fails_and_it_gets_none_until_it_is_back(
    trio: Trio, stream: bool
) -> None:
    trio.other.step_s = 0.1
    with ThreadPoolExecutor(40) as clients:
        body = {"model": "besteffort", "max_tokens": 20, "stream": stream}
        asked = [clients.submit(trio.ask, **body) for _ in range(40)]
        wait_for(lambda: trio.dispatcher.in_flight[0][0] >= 15)  # the other answers after 2 s
        trio.mortal.kill()
        answers = [one.result() for one in asked]
    assert {(status, at) for status, at, _ in answers} == {(200, "small 1")}
    if stream:  # of which a killed engine has sent the head
        assert {answer.count(b"text") for _, _, answer in answers} == {20}
    assert trio.health[:2] == (200, "degraded")
    assert trio.health[2][0] in ("open", "half-open")
    metrics = trio.get("/metrics")[1].decode()
    assert 'besteffort_breaker_openings_total{model="small",replica="0"} 1.0' in metrics
    assert 'besteffort_breaker_state{model="small",replica="1"} 0.0' in metrics
    assert 'besteffort_breaker_state{model="small",replica="0"} 0.0' not in metrics
    assert 'besteffort_retries_total{model="small",replica="0",task="copa"}' in metrics
    retries = [line for line in metrics.splitlines() if line.startswith("besteffort_retries_total{")]
    assert [trio.ask(model="besteffort", max_tokens=0)[1] for _ in range(5)] == ["small 1"] * 5
    assert retries[0] in trio.get("/metrics")[1].decode(), "one was sent there meanwhile"
    trio.mortal.start()
    wait_for(lambda: trio.health == (200, "ok", ["closed", "closed"]))
    assert trio.ask(model="besteffort", max_tokens=0)[:2] == (200, "small 0")
    metrics = trio.get("/metrics")[1].decode()
    assert 'besteffort_probes_total{model="small",outcome="ok",replica="0"} 1.0' in metrics
    wait_for(lambda: trio.dispatcher.in_flight == [[0, 0], [0]])


def test_streams_that_had_begun_at_an_engine_that_is_killed_end_with_an_error_event(trio: Trio) -> None:
    trio.other.step_s = 0.05
    ends = set()
    with contextlib.ExitStack() as stack:
        streams = [trio.stream(stack) for _ in range(8)]
        trio.mortal.kill()
        for stream in streams:
            assert stream.status == 200
            last = stream.read().rstrip().rpartition(b"data: ")[2]
            end = "whole" if last == b"[DONE]" else json.loads(last)["error"]["code"]
            ends.add((stream.headers["x-besteffort-replica"], end))
    assert ends == {("0", "engine_failed"), ("1", "whole")}
    wait_for(lambda: trio.dispatcher.in_flight == [[0, 0], [0]])


def accepts(port: int) -> bool:
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    return False


def test_when_a_node_with_all_replicas_but_one_is_killed_no_request_fails(fleet: Fleet) -> None:
    with contextlib.ExitStack() as stack:
        killed = [free_port() for _ in range(5)]
        node: list[subprocess.Popen[bytes]] = []
        for port in killed:
            command = [sys.executable, "-S", "-c", _ACCEPTS, str(port)]
            node.append(subprocess.Popen(command, process_group=node[0].pid if node else 0))
        for process in node:
            stack.callback(process.wait)
            stack.callback(process.kill)
        for port in killed:
            wait_for(functools.partial(accepts, port), 30.0)
        alive = stack.enter_context(serving(FakeEngine("small").app))
        engines = [Engine(url, "x") for url in (*(f"http://127.0.0.1:{port}" for port in killed), alive)]
        dispatcher = Dispatcher(fleet, Static(0, "static:small"), (tuple(engines), (engines[-1],)))
        url = stack.enter_context(routing(dispatcher, limited(probe_wait_s=60.0, max_probe_wait_s=60.0)))
        before = Trio(url, None, None, dispatcher)  # type: ignore[arg-type]
        with ThreadPoolExecutor(5) as clients:
            body = {"model": "small", "max_tokens": 1}
            asked = [clients.submit(before.ask, **body) for _ in killed]
            wait_for(lambda: dispatcher.in_flight[0] == [1, 1, 1, 1, 1, 0])
            os.killpg(node[0].pid, signal.SIGKILL)  # all at once: who lives longer would be asked again
            for process in node:
                process.wait()
            assert {before.ask(**body)[:2] for _ in range(4)} == {(200, "small 5")}
            assert {one.result()[:2] for one in asked} == {(200, "small 5")}
        wait_for(lambda: dispatcher.in_flight == [[0] * 6, [0]])


def test_a_model_of_which_every_replica_is_down_fails_for_who_insists_and_others_are_served(
    fleet: Fleet,
) -> None:
    dead = [Engine(f"http://127.0.0.1:{free_port()}", "x") for _ in range(2)]
    with door(fleet, lambda connection, _: connection.sendall(plain_answer())) as one:
        engines = ((dead[0], dead[1]), one.dispatcher.engines[1])
        dispatcher = Dispatcher(fleet, Static(0, "static:small"), engines)
        with routing(dispatcher, limited(probe_wait_s=60.0, max_probe_wait_s=60.0)) as url:
            before = Door(url, one.engine, dispatcher)
            for _ in range(3):
                assert before.ask(completion(b"{}"))[0].headers["x-besteffort-model"] == "large"
            response, body = before.ask(completion(b'{"model":"small"}'))
            assert (response.status, json.loads(body)["error"]["code"]) == (502, "engine_failed")
            assert 25 <= int(response.headers["retry-after"]) <= 60  # until the next of them is asked
            _, metrics = before.ask(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b'besteffort_retries_total{model="small",replica="1",task="copa"} 3.0' in metrics
            assert before.ask(completion(b"{}"))[0].headers["x-besteffort-model"] == "large"
            _, after = before.ask(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b'besteffort_retries_total{model="small",replica="1",task="copa"} 3.0' in after


@dataclass
class Moody:
    """A script for a `RawEngine`: what it does with requests, and how it says that it is."""

    answer: Callable[[socket.socket], None]
    says: Callable[[socket.socket], None] = lambda connection: connection.sendall(_WELL)
    makes_token: Callable[[socket.socket], None] | None = None  # None: as any answer
    engine: Any = None
    num_probes: int = field(default=0)
    num_tokens: int = field(default=0)  # that the router asked for

    def __call__(self, connection: socket.socket, number: int) -> None:
        request = self.engine.requests[number]
        if request.startswith(b"GET /health "):
            self.num_probes += 1
            self.says(connection)
        elif b'"prompt": [100]' in request:
            self.num_tokens += 1
            (self.makes_token or self.answer)(connection)
        else:
            self.answer(connection)


@contextlib.contextmanager
def moody(fleet: Fleet, script: Moody, **limits: float) -> Iterator[Door]:
    with door(fleet, script, limited(**{"probe_wait_s": 0.05, "max_probe_wait_s": 0.1} | limits)) as one:
        script.engine = one.engine
        yield one


def health(one: Door) -> tuple[int, dict[str, Any]]:
    response, body = one.ask(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
    return response.status, json.loads(body)


def metric(one: Door, name: str) -> float:
    _, body = one.ask(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
    return float(body.partition(name.encode())[2].split()[0])


def says_nothing(connection: socket.socket) -> None:
    while connection.recv(1):
        pass


_GOOD = plain_answer()


def test_where_no_other_is_left_an_engine_that_failed_is_tried_before_it_says_that_it_is_well(
    fleet: Fleet,
) -> None:
    go_on = threading.Event()

    def after_a_while(connection: socket.socket) -> None:
        go_on.wait(20)
        connection.sendall(_WELL)

    script = Moody(answer=socket.socket.close, says=after_a_while)
    with moody(fleet, script) as one:
        for _ in range(3):
            assert one.ask(_LARGE)[0].status == 502
        wait_for(lambda: script.num_probes == 1)
        assert (health(one)[0], health(one)[1]["status"]) == (503, "down")
        assert health(one)[1]["breakers"] == {"small": ["half-open", "half-open"], "large": ["half-open"]}
        for body in (b'{"model":"large"}', b"{}"):
            response, _ = one.ask(completion(body))
            assert (response.status, response.headers["retry-after"]) == (502, "1")
        script.answer = lambda connection: connection.sendall(_GOOD)
        for body in (b'{"model":"large"}', b"{}"):
            assert one.ask(completion(body))[0].status == 200
        assert health(one)[1]["status"] == "down"
        go_on.set()
        wait_for(lambda: health(one)[1]["status"] == "ok")
        assert health(one)[0] == 200
        assert one.ask(_LARGE)[0].status == 200
        assert script.num_probes == 1


@pytest.mark.parametrize(
    "says",
    [
        says_nothing,
        socket.socket.close,
        lambda connection: connection.sendall(b"garbage\r\n\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 503 Dead\r\ncontent-length: 0\r\n\r\n"),
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"),
    ],
    ids=["nothing", "it closes", "garbage", "503", "half an answer"],
)
def test_an_engine_is_asked_until_it_is_well(fleet: Fleet, says: Callable[[socket.socket], None]) -> None:
    script = Moody(answer=socket.socket.close, says=says)
    with moody(fleet, script, probe_s=0.2) as one:
        one.ask(completion(b"{}"))
        wait_for(
            lambda: metric(one, 'besteffort_probes_total{model="large",outcome="failed",replica="0"}') >= 2
        )
        assert health(one)[1]["status"] == "down"
        script.says = lambda connection: connection.sendall(b"HTTP/1.1 404 No\r\ncontent-length: 0\r\n\r\n")
        wait_for(lambda: health(one)[1]["status"] == "ok")
        assert metric(one, 'besteffort_breaker_openings_total{model="large",replica="0"}') == 1


def test_an_engine_that_hangs_is_not_tried_again_before_it_says_that_it_is_well(fleet: Fleet) -> None:
    script = Moody(answer=says_nothing, says=says_nothing)
    with moody(fleet, script, first_byte_s=0.2, probe_wait_s=60.0, max_probe_wait_s=60.0) as one:
        for _ in range(3):
            assert one.ask(_LARGE_STREAM)[0].status == 504
        response, body = one.ask(_LARGE_STREAM)
        assert (response.status, json.loads(body)["error"]["code"]) == (503, "no_replica")
        assert 25 <= int(response.headers["retry-after"]) <= 60
        assert len(one.engine.requests) == 3


def test_an_engine_that_is_well_by_its_own_account_but_hangs_is_tried_with_one_request(fleet: Fleet) -> None:
    script = Moody(answer=says_nothing)
    with moody(fleet, script, first_byte_s=0.2) as one:
        for num_openings, num_requests in ((1, 3), (2, 1), (3, 1)):
            for _ in range(num_requests):
                assert one.ask(_LARGE_STREAM)[0].status == 504
            name = 'besteffort_breaker_openings_total{model="large",replica="0"}'
            assert metric(one, name) == num_openings
            wait_for(lambda: health(one)[1]["status"] == "ok")
        script.answer = lambda connection: connection.sendall(_GOOD)
        assert one.ask(_LARGE_STREAM)[0].status == 200
        script.answer = says_nothing
        for _ in range(2):
            assert one.ask(_LARGE_STREAM)[0].status == 504
        assert metric(one, name) == 3


def test_plain_answers_that_take_too_long_leave_an_engine_in_service_that_makes_tokens(fleet: Fleet) -> None:
    script = Moody(answer=says_nothing, makes_token=lambda connection: connection.sendall(_GOOD))
    asked = 'besteffort_probes_total{model="large",outcome="ok",replica="0"}'
    with moody(fleet, script, first_byte_s=0.2) as one:
        for num_late, num_tokens in enumerate((0, 0, 1, 1, 1, 2), start=1):
            assert one.ask(_LARGE)[0].status == 504
            wait_for(lambda: metric(one, asked) == num_late + num_tokens)  # noqa: B023
            assert (script.num_probes, script.num_tokens) == (num_late, num_tokens)
        assert health(one)[1]["status"] == "ok"
        assert metric(one, 'besteffort_breaker_openings_total{model="large",replica="0"}') == 0
        script.answer = lambda connection: connection.sendall(_GOOD)
        assert one.ask(_LARGE)[0].status == 200


@pytest.mark.parametrize("limit", ["first_byte_s", "total_s"])
def test_an_engine_that_is_well_by_its_own_account_but_answers_nothing_is_out_until_it_makes_a_token(
    fleet: Fleet, limit: str
) -> None:
    script = Moody(answer=says_nothing)
    with moody(fleet, script, token_s=0.2, **{limit: 0.2}) as one:
        for _ in range(3):
            assert health(one)[1]["status"] == "ok"
            assert one.ask(_LARGE)[0].status == 504
        wait_for(lambda: health(one)[1]["status"] == "down")
        response, body = one.ask(_LARGE)
        assert (response.status, json.loads(body)["error"]["code"]) == (503, "no_replica")
        num_requests = len(one.engine.requests)
        wait_for(lambda: script.num_tokens >= 3)
        assert health(one)[1]["status"] == "down", "it was well by its own account meanwhile"
        clients = [request for request in one.engine.requests[num_requests:] if b'"large"' in request]
        assert not clients, "one was tried with it"
        assert metric(one, 'besteffort_breaker_openings_total{model="large",replica="0"}') == 1
        script.answer = lambda connection: connection.sendall(_GOOD)
        wait_for(lambda: health(one)[1]["status"] == "ok")
        assert one.ask(_LARGE)[0].status == 200


@pytest.mark.parametrize("limit", ["first_byte_s", "total_s"])
def test_a_plain_answer_that_takes_too_long_counts_where_the_engine_does_not_say_that_it_is_well(
    fleet: Fleet, limit: str
) -> None:
    script = Moody(answer=says_nothing, says=says_nothing)
    waits = {"probe_s": 0.2, "probe_wait_s": 60.0, "max_probe_wait_s": 60.0}
    with moody(fleet, script, **waits, **{limit: 0.5}) as one:
        assert one.ask(_LARGE)[0].status == 504
        wait_for(lambda: health(one)[1]["status"] == "down")
        response, body = one.ask(_LARGE)
        assert (response.status, json.loads(body)["error"]["code"]) == (503, "no_replica")
        assert metric(one, 'besteffort_breaker_openings_total{model="large",replica="0"}') == 1


@pytest.mark.parametrize(
    ("status", "counts"), [(500, False), (502, True), (503, True), (504, True), (429, False)]
)
def test_a_gateway_without_its_engine_is_one_that_fails_and_its_words_are_passed_on(
    fleet: Fleet, status: int, counts: bool
) -> None:
    answer = b"HTTP/1.1 %d X\r\ncontent-length: 2\r\n\r\n{}" % status
    script = Moody(answer=lambda connection: connection.sendall(answer))
    with moody(fleet, script, probe_wait_s=60.0, max_probe_wait_s=60.0) as one:
        for _ in range(3):
            response, body = one.ask(_LARGE)
            assert (response.status, body) == (status, b"{}")
        assert (health(one)[1]["status"] == "down") == counts


class Played:
    """An engine without a network: a test says when time passes and what the engine answers."""

    def __init__(self) -> None:
        self.limits = Limits(probe_wait_s=1.0, max_probe_wait_s=10.0, faults_to_open=2)
        self.loop = self
        self.base_path, self.authority = b"", b"a"
        self.standing = Standing.UP
        self.waits_s: list[float] = []
        self.num_cancelled = 0  # timers and questions
        self.asked: list[str] = []  # paths
        self.breaker = Breaker(self, self.turn, np.random.default_rng(1), "x")  # type: ignore[arg-type]

    def turn(self, standing: Standing) -> None:
        assert standing is not self.standing, "it was so already"
        self.standing = standing

    @property
    def up(self) -> bool:
        return self.standing is Standing.UP

    def time(self) -> float:
        return 0.0

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> "Played":
        if callback == self.breaker._ask:
            self.waits_s.append(delay_s)
            self.ask = callback
        else:
            self.give_up = callback
        return self

    def send(self, sink: Any) -> "Played":
        self.sink = sink
        self.asked.append(sink.request(self)[0].split()[1].decode())
        return self

    def says(self, status: int) -> None:
        self.sink.on_head(AnswerHead(status, []), 0)
        self.sink.on_end()

    def cancel(self) -> None:
        self.num_cancelled += 1

    def probe(self, status: int) -> None:
        self.ask()
        assert self.breaker.state is State.HALF_OPEN
        self.says(status)


def test_each_wait_is_twice_as_long_up_to_a_limit_and_none_is_quite_the_same() -> None:
    engine = Played()
    engine.breaker.failed()
    assert (engine.up, engine.waits_s) == (True, [])
    for _ in range(100):  # all that were at the engine when it died
        engine.breaker.failed()
    assert (engine.up, engine.breaker.num_openings, len(engine.waits_s)) == (False, 1, 1)
    for _ in range(40):
        engine.probe(500)
    longest = np.minimum(2.0 ** np.arange(41), 10.0)
    assert np.all((longest / 2 <= engine.waits_s) & (engine.waits_s <= longest))
    assert len(set(engine.waits_s)) == 41


def test_waits_begin_anew_only_after_a_request_was_answered() -> None:
    engine = Played()
    engine.breaker.failed()
    engine.breaker.answered(200)  # not in a row
    engine.breaker.failed()
    assert engine.up
    engine.breaker.failed()
    for _ in range(3):
        engine.probe(503)
    engine.probe(200)
    assert engine.up
    engine.breaker.failed()
    assert not engine.up
    assert engine.waits_s[-1] >= 5.0
    engine.probe(200)
    engine.breaker.answered(200)
    engine.breaker.failed()
    assert engine.up
    engine.breaker.failed()
    assert not engine.up
    assert engine.waits_s[-1] <= 1.0


def test_an_answer_from_before_it_opened_does_not_close_it() -> None:
    engine = Played()
    for _ in range(2):
        engine.breaker.failed()
    engine.breaker.answered(200)
    assert (engine.up, engine.breaker.state) == (False, State.OPEN)


def test_how_an_engine_stands_follows_from_how_it_fails_and_from_what_it_says() -> None:
    engine = Played()
    for _ in range(2):
        engine.breaker.failed()
    assert engine.standing is Standing.SUSPECT
    engine.probe(503)
    assert engine.standing is Standing.UNWELL
    engine.breaker.failed()  # of one that was tried all the same
    assert engine.standing is Standing.UNWELL
    engine.breaker.failed(hangs=True)
    assert engine.standing is Standing.OUT
    engine.probe(503)  # at once
    assert engine.standing is Standing.UNWELL
    engine.probe(200)
    assert engine.up
    engine.breaker.failed(hangs=True)
    assert engine.standing is Standing.OUT


def test_an_engine_that_is_late_is_asked_once_at_a_time_and_no_more_once_it_failed() -> None:
    engine = Played()
    for status in (200, 404):
        for _ in range(3):
            engine.breaker.late()
        engine.sink.on_head(AnswerHead(status, []), 0)
        engine.sink.on_end()
        assert (engine.up, engine.breaker.state) == (True, State.CLOSED)
    assert engine.breaker.num_probes == {"ok": 2, "failed": 0}
    engine.breaker.late()
    sink, num_cancelled = engine.sink, engine.num_cancelled
    for _ in range(2):
        engine.breaker.failed()
    assert engine.standing is Standing.SUSPECT
    assert engine.num_cancelled == num_cancelled + 2, "the question and its timer"
    engine.breaker.late()  # it is asked anyhow
    assert engine.sink is sink
    engine.probe(200)
    engine.breaker.late()
    engine.sink.on_head(AnswerHead(503, []), 0)
    engine.sink.on_end()
    assert (engine.standing, engine.breaker.state) == (Standing.UNWELL, State.OPEN)
    assert (engine.breaker.num_openings, len(engine.waits_s)) == (2, 2)


_HEALTH, _TOKEN = "/health", "/v1/completions"


def late_in_a_row(engine: Played, number: int) -> None:
    for _ in range(number):
        engine.breaker.late()


def test_where_nobody_had_an_answer_between_the_late_ones_an_engine_has_to_make_a_token() -> None:
    engine = Played()
    late_in_a_row(engine, 3)  # at the same moment
    assert engine.asked == [_HEALTH]
    engine.says(200)
    assert engine.asked == [_HEALTH, _TOKEN]
    engine.breaker.late()  # it is asked already
    engine.says(200)
    assert (engine.up, engine.asked) == (True, [_HEALTH, _TOKEN])
    late_in_a_row(engine, 2)
    engine.says(200)
    engine.give_up()
    assert (engine.standing, engine.breaker.state) == (Standing.OUT, State.OPEN)
    engine.probe(200)  # which is what it says of itself
    assert (engine.standing, engine.breaker.state) == (Standing.OUT, State.HALF_OPEN)
    engine.says(200)
    assert (engine.up, engine.breaker.state) == (True, State.CLOSED)
    assert engine.asked == [_HEALTH, _TOKEN] * 3
    assert (engine.breaker.num_openings, engine.breaker.num_probes) == (1, {"ok": 5, "failed": 1})


def test_an_answer_between_late_ones_is_as_good_as_a_token() -> None:
    engine = Played()
    for _ in range(5):
        engine.breaker.late()
        engine.says(200)
        engine.breaker.answered(200)
    assert (engine.up, engine.asked) == (True, [_HEALTH] * 5)
    late_in_a_row(engine, 2)
    engine.says(200)
    assert engine.asked[-1] == _TOKEN
    engine.breaker.answered(200)  # while the token waits behind all that was asked before
    engine.give_up()
    assert (engine.up, engine.breaker.state) == (True, State.CLOSED)


def test_what_a_gateway_says_is_no_answer_of_the_engine() -> None:
    engine = Played()
    engine.breaker.late()
    engine.says(200)
    engine.breaker.answered(500)
    engine.breaker.late()
    engine.says(200)
    assert engine.asked == [_HEALTH, _HEALTH, _TOKEN]
    engine.says(500)
    assert engine.standing is Standing.UNWELL


def test_an_engine_that_could_not_be_asked_stands_as_it_stood() -> None:
    engine = Played()
    lack = Fault("lack", "no file is left")
    engine.breaker.late()
    engine.sink.on_fault(lack)
    assert (engine.up, engine.breaker.state) == (True, State.CLOSED)
    for _ in range(2):
        engine.breaker.failed()
    engine.ask()
    engine.sink.on_fault(lack)
    assert (engine.standing, engine.breaker.state) == (Standing.SUSPECT, State.OPEN)
    assert len(engine.waits_s) == 2
    assert engine.breaker.num_probes == {"ok": 0, "failed": 0}
