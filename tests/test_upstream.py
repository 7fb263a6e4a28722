"""The side that faces engines: what they may send, how slowly, and what clients get of it."""

import asyncio
import contextlib
import json
import logging
import os
import random
import resource
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import IncompleteRead

import pytest
import uvloop

from besteffort.engines.child import free_port
from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import RoundRobin, Static
from besteffort.router import Dispatcher, Limits
from besteffort.router.exchange import Exchange
from besteffort.router.loads import Standing
from besteffort.router.message import AnswerHead
from besteffort.router.outbox import Outbox
from besteffort.router.upstream import Call, Fault, Upstream
from besteffort.router.watch import Watch
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.routing import Door, completion, door, limited, read_response, routing

_OK = b"HTTP/1.1 200 OK\r\n"
_EVENTS = _OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = b'data: {"choices":[{"text":"a"}]}\n\n'
_REQUEST = completion(b'{"model":"large","stream":true}')


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def sends(data: bytes, then: Callable[[socket.socket], None] = socket.socket.close) -> Callable[..., None]:
    def script(connection: socket.socket, _: int) -> None:
        connection.sendall(data)
        then(connection)

    return script


def stay(connection: socket.socket) -> None:
    """Until the router ends it."""
    while connection.recv(1):
        pass


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (_OK + b"content-length: 3\r\n\r\nabc", b"abc"),
        (_OK + b"content-length: 0\r\n\r\n", b""),
        (_OK + b"\r\nuntil the end", b"until the end"),
        (_OK + b"connection: close\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        (_OK + b"transfer-encoding: chunked\r\n\r\n" + chunk(b"ab") + chunk(b"c") + b"0\r\n\r\n", b"abc"),
        (_OK + b"transfer-encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\nx-trailer: 1\r\n\r\n", b"ab"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + _OK + b"content-length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + _OK + b"content-length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 299 Odd\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 3\r\n\r\nabc", b"abc"),
    ],
    ids=lambda value: repr(value)[2:90],
)
def test_every_kind_of_answer_is_passed_on(fleet: Fleet, answer: bytes, body: bytes) -> None:
    with door(fleet, sends(answer)) as one:
        response, received = one.ask(_REQUEST)
        final = answer.replace(b"HTTP/1.1 100", b"").replace(b"HTTP/1.1 103", b"")
        assert response.status == int(final.partition(b"HTTP/1.")[2][2:5])
        assert received == body
        one.settled()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_an_answer_that_comes_byte_by_byte_is_the_same(fleet: Fleet, size: int) -> None:
    answer = _OK + b"transfer-encoding: chunked\r\n\r\n" + chunk(b"abcdefgh") * 3 + b"0\r\n\r\n"

    def drip(connection: socket.socket, _: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin in range(0, len(answer), size):
            connection.sendall(answer[begin : begin + size])
            time.sleep(0.0005)

    with door(fleet, drip) as one:
        assert one.ask(_REQUEST)[1] == b"abcdefgh" * 3
        assert one.ask(_REQUEST)[1] == b"abcdefgh" * 3
        assert one.engine.num_connections == 1


@pytest.mark.parametrize(
    ("answer", "then"),
    [
        (b"", socket.socket.close),
        (b"", reset),
        (b"HTTP/1.1 2", socket.socket.close),
        (_OK + b"content-le", reset),
        (b"SSH-2.0-OpenSSH_9.2p1\r\n", stay),
        (bytes(range(256)), stay),
        (_OK + b"x: " + b"y" * 200_000, stay),
        (_OK + b"x: y\r\n" * 50_000, stay),
        (_OK + b"content-length: x\r\n\r\n", stay),
        (_OK + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabcd", stay),
        (_OK + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", stay),
        (_OK + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", stay),
        (_OK + b"x: a\r\n b\r\n\r\n", stay),
        (_OK + b"x: a\nset-cookie: b\r\n\r\n", stay),
        (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", stay),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000, stay),
    ],
    ids=lambda value: repr(value)[2:60],
)
def test_what_is_no_answer_becomes_a_502(
    fleet: Fleet, answer: bytes, then: Callable[[socket.socket], None]
) -> None:
    with door(fleet, sends(answer, then)) as one:
        response, body = one.ask(_REQUEST)
        assert (response.status, json.loads(body)["error"]["code"]) == (502, "engine_failed")
        assert response.headers["x-request-id"]
        one.settled()
        wait_for(lambda: one.engine.num_left == one.engine.num_connections)


@pytest.mark.parametrize("then", [socket.socket.close, reset])
def test_a_plain_answer_that_breaks_off_does_not_look_whole(
    fleet: Fleet, then: Callable[[socket.socket], None]
) -> None:
    with door(fleet, sends(_OK + b"content-length: 10\r\n\r\nabc", then)) as one:
        with pytest.raises((IncompleteRead, ConnectionResetError)):
            one.ask(_REQUEST)
        with pytest.raises(ConnectionResetError):
            one.exchange(_REQUEST.replace(b"1.1", b"1.0", 1))
        one.settled()


@pytest.mark.parametrize(
    "rest", [b"", b"zz\r\n", b"5\r\nabc"], ids=["it closes", "it sends garbage", "it closes inside a chunk"]
)
def test_a_stream_that_breaks_off_ends_with_an_error_event(fleet: Fleet, rest: bytes) -> None:
    with door(fleet, sends(_EVENTS + chunk(_EVENT) * 2 + rest)) as one:
        response, body = one.ask(_REQUEST)
        assert response.status == 200
        assert body.startswith(_EVENT * 2)
        last = body.rstrip().rpartition(b"\n\n")[2]  # by itself, even if half an event came before
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
        one.settled()


@pytest.mark.parametrize(
    ("answer", "limit", "code"),
    [
        (b"", "first_byte_s", "engine_timeout"),
        (_OK, "first_byte_s", "engine_timeout"),
        (b"", "total_s", "engine_timeout"),
    ],
)
def test_an_engine_that_hangs_is_given_up_with_a_504(
    fleet: Fleet, answer: bytes, limit: str, code: str
) -> None:
    with door(fleet, sends(answer, stay), limited(**{limit: 0.3})) as one:
        response, body = one.ask(_REQUEST)
        assert (response.status, json.loads(body)["error"]["code"]) == (504, code)
        wait_for(lambda: one.engine.num_left == 1)
        one.settled()


@pytest.mark.parametrize("limit", ["between_bytes_s", "total_s"])
def test_a_stream_that_stalls_is_given_up_with_an_error_event(fleet: Fleet, limit: str) -> None:
    with door(fleet, sends(_EVENTS + chunk(_EVENT), stay), limited(**{limit: 0.3})) as one:
        _, body = one.ask(_REQUEST)
        assert json.loads(body.rpartition(b"data: ")[2])["error"]["code"] == "engine_timeout"
        wait_for(lambda: one.engine.num_left == 1)
        one.settled()


def test_a_slow_stream_may_take_longer_than_each_of_its_gaps(fleet: Fleet) -> None:
    def slow(connection: socket.socket, _: int) -> None:
        connection.sendall(_EVENTS)
        for _ in range(8):
            time.sleep(0.1)
            connection.sendall(chunk(_EVENT))
        connection.sendall(b"0\r\n\r\n")

    with door(fleet, slow, limited(between_bytes_s=0.6, first_byte_s=0.6)) as one:
        assert one.ask(_REQUEST)[1] == _EVENT * 8


@pytest.mark.parametrize("limit", ["connect_s", "total_s"])
def test_an_engine_that_never_accepts_is_given_up(fleet: Fleet, limit: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:  # fill the kernel's queue, so that the next one waits
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        engine = Engine(f"http://127.0.0.1:{port}", "x")
        dispatcher = Dispatcher(fleet, RoundRobin(), ((engine, engine), (engine,)))
        with (
            routing(dispatcher, limited(**{limit: 0.3})) as url,
            socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as client,
        ):
            client.sendall(_REQUEST)
            response, body = read_response(client)
            said = {"connect_s": "no connection within 0.3 s", "total_s": "not done within 0.3 s"}
            assert (response.status, said[limit] in body.decode()) == (504, True)
        for one in waiting:
            one.close()


def test_a_port_where_nobody_listens_gives_a_502_at_once(fleet: Fleet) -> None:
    engine = Engine(f"http://127.0.0.1:{free_port()}", "x")
    dispatcher = Dispatcher(fleet, RoundRobin(), ((engine, engine), (engine,)))
    with (
        routing(dispatcher) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as client,
    ):
        for _ in range(3):  # on one connection of the client's
            client.sendall(_REQUEST)
            assert read_response(client)[0].status == 502
    assert dispatcher.in_flight == [[0, 0], [0]]


def test_a_router_without_files_left_says_so_and_blames_no_engine(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        door(fleet, lambda connection, _: connection.sendall(plain_answer())) as one,
        one.connect() as client,
    ):
        client.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")  # it is let in
        assert read_response(client)[0].status == 200
        with no_files_left():
            for _ in range(5):
                client.sendall(_REQUEST)
                response, body = read_response(client)
                assert (response.status, response.headers["retry-after"]) == (503, "1")
                assert json.loads(body)["error"]["code"] == "overloaded"
        client.sendall(_REQUEST)
        assert read_response(client)[0].status == 200
        openings = [line for line in metrics_of(one) if line.startswith("besteffort_breaker_openings_total{")]
        assert {line.rpartition(" ")[2] for line in openings} == {"0.0"}
        one.settled()
    (told,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert "Too many open files" in told.getMessage()


@contextlib.contextmanager
def no_files_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def shuts_down(data: bytes) -> Callable[..., None]:
    """Writes no more, but reads on until the router ends it."""
    return sends(data, lambda connection: (connection.shutdown(socket.SHUT_WR), stay(connection)))  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (_OK + b"content-length: 3\r\n\r\nabc", b"abc"),
        (_OK + b"\r\nuntil the end", b"until the end"),
        (_EVENTS + chunk(_EVENT) + b"0\r\n\r\n", _EVENT),
        (_OK + b"content-type: text/event-stream\r\n\r\n" + _EVENT, _EVENT),
        (b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}", b"{}"),
    ],
    ids=lambda value: repr(value)[2:60],
)
def test_an_engine_that_closes_its_side_after_an_answer_is_asked_the_next_on_a_new_connection(
    fleet: Fleet, answer: bytes, body: bytes
) -> None:
    with door(fleet, shuts_down(answer)) as one, one.connect() as client:
        for number in range(1, 4):
            client.sendall(_REQUEST)
            assert read_response(client)[1] == body
            assert one.engine.num_connections == number
        wait_for(lambda: one.engine.num_left == 3)
        outcomes = [line for line in metrics_of(one) if line.startswith("besteffort_requests_total{")]
        assert len(outcomes) == 1, "all alike"
        assert 'outcome="failed"' not in outcomes[0]
        assert not [line for line in metrics_of(one) if line.startswith("besteffort_retries_total{")]


@pytest.mark.parametrize(
    "answer",
    [b"", b"HTTP/1.1 2", _OK + b"content-le", _EVENTS, _EVENTS + b"5\r\nda"],
    ids=lambda value: repr(value)[2:60],
)
def test_an_engine_that_closes_its_side_before_an_answer_has_failed(fleet: Fleet, answer: bytes) -> None:
    request = completion(b'{"stream":true}')
    with door(fleet, shuts_down(answer)) as one:
        response, body = one.ask(request)
        assert (response.status, json.loads(body)["error"]["code"]) == (502, "engine_failed")
        assert len(one.engine.requests) == 3, "each of the three replicas was asked"
        wait_for(lambda: one.engine.num_left == 3)
        one.settled()


def test_an_engine_that_closes_its_side_in_the_middle_of_an_answer_has_failed(fleet: Fleet) -> None:
    with door(fleet, shuts_down(_OK + b"content-length: 10\r\n\r\nabc")) as one:
        with pytest.raises((IncompleteRead, ConnectionResetError)):
            one.ask(_REQUEST)
        wait_for(lambda: one.engine.num_left == 1)
        one.settled()
    with door(fleet, shuts_down(_EVENTS + chunk(_EVENT) + b"5\r\nda")) as one:
        _, body = one.ask(_REQUEST)
        assert body.startswith(_EVENT)
        assert json.loads(body.rpartition(b"data: ")[2])["error"]["code"] == "engine_failed"
        wait_for(lambda: one.engine.num_left == 1)
        one.settled()


@dataclass
class Heard:
    """What a call brought."""

    num_asked: int | None = None  # zeros; None: a request as any other
    body: bytes = b""
    ended: bool = False

    def request(self, upstream: Upstream) -> list[bytes]:
        return [_REQUEST if self.num_asked is None else bytes(self.num_asked)]

    def on_head(self, *_: object) -> None:
        pass

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_batch(self) -> None:
        pass

    def on_end(self) -> None:
        self.ended = True

    def on_answer(self, head: AnswerHead, body: bytes) -> None:
        self.on_body(body)
        self.on_end()

    def on_fault(self, fault: Fault) -> None:
        raise fault

    def on_crash(self) -> None:
        raise AssertionError("it was told of a fault")


@contextlib.contextmanager
def upstream_of(url: str) -> Iterator[Upstream]:
    """For the event loop that runs."""
    loop = asyncio.get_running_loop()
    upstream = Upstream(url, Limits(), Watch(loop), loop, Outbox(loop))
    try:
        yield upstream
    finally:
        upstream.close()


@contextlib.contextmanager
def ending(call: Call) -> Iterator[None]:
    try:
        yield
    finally:
        call.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 -- it comes about in another thread
            await asyncio.sleep(0.01)


def test_a_pause_that_comes_before_the_connection_is_there_holds() -> None:
    sent = threading.Event()

    def answer(connection: socket.socket, _: int) -> None:
        connection.sendall(_OK + b"content-length: 3\r\n\r\nabc")
        sent.set()

    async def play() -> None:
        with upstream_of(engine.url) as upstream:
            for _ in range(2):  # the second time on a connection that is there
                heard = Heard()
                sent.clear()
                call = upstream.send(heard)
                with ending(call):
                    call.pause()
                    await until(sent.is_set)
                    await asyncio.sleep(0.2)
                    assert heard.body == b""
                    call.resume()
                    await until(lambda: heard.ended)  # noqa: B023
                assert heard.body == b"abc"

    engine = RawEngine(answer)
    uvloop.run(play())
    engine.close()


def test_a_client_that_does_not_read_stops_the_next_engine_s_answer_too(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges: list[Exchange] = []
    start = Exchange.start

    def start_paused(exchange: Exchange) -> None:
        start(exchange)
        exchange.pause()
        exchanges.append(exchange)

    monkeypatch.setattr(Exchange, "start", start_paused)
    dead = Engine(f"http://127.0.0.1:{free_port()}", "x")
    with door(fleet, lambda connection, _: connection.sendall(plain_answer())) as one:
        dispatcher = Dispatcher(fleet, Static(0, "static:small"), ((dead, dead), one.dispatcher.engines[1]))
        with routing(dispatcher) as url, Door(url, one.engine, dispatcher).connect() as client:
            client.sendall(completion(b"{}"))
            wait_for(lambda: one.engine.requests)
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(1)
            client.settimeout(20)
            loop = exchanges[0]._proxy.upstream_of(exchanges[0]._route).loop
            loop.call_soon_threadsafe(exchanges[0].resume)
            assert read_response(client)[0].status == 200


def test_a_request_that_waits_for_its_answer_is_not_kept_a_second_time() -> None:
    size, received = 5_000_000, []

    def read_and_forget(connection: socket.socket) -> None:
        left = size
        with connection:
            while part := connection.recv(min(left, 65_536)):
                left -= len(part)
                if not left:
                    received.append(connection)
                    left = size
                    if len(received) == 1:
                        connection.sendall(_OK + b"content-length: 0\r\n\r\n")

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=read_and_forget, args=(listener.accept()[0],), daemon=True).start()

    async def play() -> None:
        with contextlib.ExitStack() as stack:
            upstream = stack.enter_context(upstream_of(f"http://127.0.0.1:{listener.getsockname()[1]}"))
            for number in range(1, 4):  # on a new connection, on the same once more, on a new one
                heard = Heard(num_asked=size)
                stack.callback(upstream.send(heard).cancel)
                await until(lambda: len(received) == number)  # noqa: B023
                await until(lambda: heard.ended or number > 1)  # noqa: B023
                assert tracemalloc.get_traced_memory()[0] < 1_000_000
        assert received[0] is received[1]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        tracemalloc.start()
        try:
            uvloop.run(play())
        finally:
            tracemalloc.stop()


def test_a_request_that_nobody_began_to_answer_goes_to_another_replica_and_then_to_another_model(
    fleet: Fleet,
) -> None:
    dead = [Engine(f"http://127.0.0.1:{free_port()}", "x") for _ in range(2)]
    with door(fleet, lambda connection, _: connection.sendall(plain_answer())) as one:
        alive = one.dispatcher.engines[1][0]
        for small in ((dead[0], alive), (dead[0], dead[1])):
            dispatcher = Dispatcher(fleet, Static(0, "static:small"), (small, (alive,)))
            with (
                routing(dispatcher) as url,
                socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as client,
            ):
                client.sendall(completion(b"{}"))
                response, _ = read_response(client)
                assert response.status == 200
                expected = ("small", "1") if alive in small else ("large", "0")
                told = response.headers
                assert (told["x-besteffort-model"], told["x-besteffort-replica"]) == expected
                client.sendall(b"GET /metrics HTTP/1.1\r\nhost: a\r\n\r\n")
                _, text = read_response(client)
                assert b'besteffort_retries_total{model="small",replica="0",task="copa"} 1.0' in text
            assert dispatcher.in_flight == [[0, 0], [0]]


def test_a_request_is_not_tried_for_ever(fleet: Fleet) -> None:
    with door(fleet, sends(b"garbage\r\n\r\n")) as one:
        assert one.ask(completion(b"{}"))[0].status == 502
        assert len(one.engine.requests) == 3
        one.settled()


def test_a_request_that_took_an_engine_too_long_is_not_put_on_the_next(fleet: Fleet) -> None:
    with door(fleet, sends(b"", stay), limited(first_byte_s=0.2)) as one:
        assert one.ask(completion(b"{}"))[0].status == 504
        assert sum(request.startswith(b"POST ") for request in one.engine.requests) == 1


def test_where_every_replica_hangs_clients_are_told_to_come_again(fleet: Fleet) -> None:
    with door(fleet, sends(b"")) as one:
        for model, replica in ((0, 0), (0, 1), (1, 0)):
            one.dispatcher.stand(model, replica, Standing.OUT)
        response, body = one.ask(_REQUEST)
        assert (response.status, json.loads(body)["error"]["code"]) == (503, "no_replica")
        assert response.headers["retry-after"] == "1"


def test_connections_are_used_again(fleet: Fleet) -> None:
    with door(fleet, lambda connection, _: connection.sendall(plain_answer())) as one:
        for _ in range(5):
            assert one.ask(_REQUEST)[0].status == 200
        assert one.engine.num_connections == 1


def test_a_connection_that_the_engine_closed_while_it_lay_idle_costs_no_request(fleet: Fleet) -> None:
    def once_each(connection: socket.socket, _: int) -> None:
        """As if it gave up the idle connection at the moment in which the next request was on its way."""
        connection.sendall(plain_answer())
        while not connection.recv(65_536, socket.MSG_PEEK):
            pass
        reset(connection)

    with door(fleet, once_each) as one, one.connect() as client:
        for number in range(1, 6):
            client.sendall(_REQUEST)
            assert read_response(client)[0].status == 200
            assert one.engine.num_connections == number


def test_what_follows_an_answer_is_nobody_s(fleet: Fleet) -> None:
    """A second answer that nobody asked for must not be taken for that of the next request."""
    poison = _OK + b"content-length: 6\r\n\r\npoison"

    def two(connection: socket.socket, number: int) -> None:
        connection.sendall(_OK + b"content-length: 1\r\n\r\n%d" % number + poison)

    with door(fleet, two) as one:
        assert [one.ask(_REQUEST)[1] for _ in range(3)] == [b"0", b"1", b"2"]
        assert one.engine.num_connections == 3


def test_headers_of_the_connection_stay_where_they_are(fleet: Fleet) -> None:
    answer = (
        _OK
        + b"connection: keep-alive, x-private\r\nkeep-alive: timeout=5\r\nx-private: 1\r\n"
        + b"server: uvicorn\r\nproxy-authenticate: Basic\r\nx-own: 1\r\nset-cookie: a=b\r\n"
        + b"set-cookie: c=d\r\ncontent-length: 0\r\n\r\n"
    )
    with door(fleet, lambda connection, _: connection.sendall(answer)) as one:
        response, _ = one.ask(_REQUEST)
        names = [name for name in response.headers if not name.startswith("x-besteffort-")]
        assert names == ["x-own", "set-cookie", "set-cookie", "date", "x-request-id", "content-length"]


def test_a_client_that_goes_away_takes_its_request_along(fleet: Fleet) -> None:
    for begun in (b"", _EVENTS + chunk(_EVENT)):
        with door(fleet, sends(begun, stay)) as one:
            client = one.connect()
            client.sendall(_REQUEST)
            if begun:
                assert client.recv(100)
            wait_for(lambda: len(one.engine.requests) == 1)
            reset(client)
            wait_for(lambda: one.engine.num_left == 1)
            one.settled()


def test_a_model_that_hangs_leaves_seats_for_the_others(fleet: Fleet) -> None:
    go_on = threading.Event()

    def large_hangs(connection: socket.socket, number: int) -> None:
        if b"hang" in one.engine.requests[number]:
            go_on.wait(20)
        connection.sendall(plain_answer())

    with door(fleet, large_hangs, limited(max_in_flight=8)) as one, contextlib.ExitStack() as stack:
        hanging = completion(b'{"model":"large","prompt":"hang"}')
        for number in range(7):
            stack.enter_context(one.connect()).sendall(hanging)
            wait_for(lambda: len(one.engine.requests) == number + 1)  # noqa: B023
        rate_per_s = one.dispatcher.arrival_rate_per_s
        for _ in range(20):
            response, body = one.ask(hanging)
            assert (response.status, json.loads(body)["error"]["code"]) == (429, "overloaded")
            assert response.headers["retry-after"] == "1"
        assert one.dispatcher.arrival_rate_per_s == rate_per_s, "who is turned away is no arrival"
        for body in (b'{"model":"small"}', b"{}", b"{}"):  # the latter by turns
            response, _ = one.ask(completion(body))
            assert (response.status, response.headers["x-besteffort-model"]) == (200, "small")
        go_on.set()
        one.settled()
        assert one.ask(_REQUEST)[0].status == 200


def test_beyond_what_may_be_in_flight_clients_are_told_to_come_again(fleet: Fleet) -> None:
    go_on = threading.Event()

    def wait(connection: socket.socket, _: int) -> None:
        go_on.wait(20)
        connection.sendall(plain_answer())

    with door(fleet, wait, limited(max_in_flight=3)) as one:
        clients = [one.connect() for _ in range(3)]
        for client in clients:
            client.sendall(_REQUEST)
        wait_for(lambda: len(one.engine.requests) == 3)
        rate_per_s = one.dispatcher.arrival_rate_per_s
        for _ in range(20):
            response, body = one.ask(_REQUEST)
            assert (response.status, response.headers["retry-after"]) == (429, "1")
            assert json.loads(body)["error"]["code"] == "overloaded"
        assert one.dispatcher.arrival_rate_per_s == rate_per_s, "who is turned away is no arrival"
        go_on.set()
        for client in clients:
            assert read_response(client)[0].status == 200
            client.close()
        assert one.ask(_REQUEST)[0].status == 200
        assert len(one.engine.requests) == 4


def test_counts_end_at_zero_after_any_mixture_of_ends(fleet: Fleet) -> None:
    """Thousands of requests that finish, fail, break off, hang, or lose their client anywhere on the way."""
    ways = random.Random(5)
    faults = [
        plain_answer(),
        _EVENTS + chunk(_EVENT) * 3 + b"0\r\n\r\n",
        b"HTTP/1.1 400 Bad\r\ncontent-length: 2\r\n\r\n{}",
        b"",
        b"garbage\r\n",
        _EVENTS + chunk(_EVENT),
        _OK + b"content-length: 10\r\n\r\nabc",
    ]

    def engine(connection: socket.socket, number: int) -> None:
        kind = random.Random(number).random()
        connection.sendall(faults[int(kind * len(faults))])
        if kind * len(faults) % 1 < 0.3:
            reset(connection)
        elif kind * len(faults) % 1 < 0.5:
            connection.close()

    def client(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(150):
            with one.connect() as connection:
                num_requests, kind = choice.randrange(1, 4), choice.random()
                connection.settimeout(choice.choice((0.001, 0.05, 1.0)))
                try:  # the router breaks off a connection whose answer is only half an answer
                    for _ in range(num_requests):
                        connection.sendall(_REQUEST)
                    while kind < 0.8 and connection.recv(choice.randrange(1, 2000)):
                        kind += 0.1
                except OSError:
                    pass
                if choice.random() < 0.3:
                    reset(connection)

    limits = limited(between_bytes_s=0.2, first_byte_s=0.2, max_in_flight=40, faults_to_open=10**9)
    with door(fleet, engine, limits) as one:
        threads = [threading.Thread(target=client, args=(ways.randrange(10**9),)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(one.engine.requests) > 200
        # The last clients are gone, but the router may not have read yet what they sent.
        wait_for(lambda: nothing_in_flight(metrics_of(one)))
        outcomes = [line for line in metrics_of(one) if line.startswith("besteffort_requests_total")]
        assert {line.split('outcome="')[1].split('"')[0] for line in outcomes} == {
            "ok",
            "refused",
            "failed",
            "cancelled",
        }


def metrics_of(one: Door) -> list[str]:
    answer = one.exchange(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    return answer.decode().splitlines()


def nothing_in_flight(metrics: list[str]) -> bool:
    in_flight = [line for line in metrics if line.startswith("besteffort_in_flight{")]
    assert len(in_flight) == 3
    return all(line.endswith(" 0.0") for line in in_flight)
