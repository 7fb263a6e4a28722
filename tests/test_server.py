"""The side that faces clients: what they may send, how slowly, and what they get for it."""

import asyncio
import contextlib
import gc
import itertools
import json
import re
import select
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from besteffort.fleet import Fleet
from besteffort.policies import RoundRobin
from besteffort.router import ApiKey, Limits, PolicySource, Settings
from besteffort.router.app import App
from besteffort.router.endpoints import Endpoints
from besteffort.router.limits import MEBIBYTE
from besteffort.router.message import Reply, Request
from besteffort.router.metrics import Metrics
from besteffort.router.request_reader import Budget, RequestReader
from besteffort.router.tls_door import TlsDoor
from besteffort.stages.serve import tls_context
from tests.fake_engine import plain_answer, wait_for
from tests.routing import PATIENCE_S, Door, completion, door, limited, read_all, read_response


def answer(connection: socket.socket, _: int) -> None:
    connection.sendall(plain_answer())


@pytest.fixture(scope="module")
def plain(fleet: Fleet) -> Iterator[Door]:
    limits = {"max_body": 10_000, "max_url": 300, "max_headers": 20, "max_head": 4_000}
    settings = replace(limited(**limits), admin_key=ApiKey("admin"))
    source = PolicySource("round-robin", Path("/nowhere"), lambda name: RoundRobin())
    with door(fleet, answer, settings, source) as one:
        yield one


def statuses(data: bytes) -> list[int]:
    """Of all responses in a row; each must have a length or be chunked."""
    found = []
    while data:
        assert data.startswith(b"HTTP/1.1 "), data[:200]
        head, _, data = data.partition(b"\r\n\r\n")
        found.append(int(head[9:12]))
        if b"content-length: " in head:
            data = data[int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]) :]
    return found


_GET = b"GET /health HTTP/1.1\r\nhost: a\r\n"
_POST = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n"
_BODY = b'{"model":"large"}'
_CHUNKS = b"11\r\n" + _BODY + b"\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (_POST + b"content-length: 17\r\ntransfer-encoding: chunked\r\n\r\n" + _CHUNKS, 400),
        (_POST + b"transfer-encoding: chunked\r\ncontent-length: 17\r\n\r\n" + _CHUNKS, 400),
        (_POST + b"content-length: 17\r\ncontent-length: 17\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: 17\r\ncontent-length: 3\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: 17, 17\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: +17\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: 0x11\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: -1\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length:\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: 1 7\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length : 17\r\n\r\n" + _BODY, 400),
        (_POST + b"content-length: 99999999999999999999999\r\n\r\n", 400),
        (_POST + b"transfer-encoding: identity\r\n\r\n", 501),
        (_POST + b"transfer-encoding: xchunked\r\n\r\n" + _CHUNKS, 501),
        (_POST + b"transfer-encoding: chunked, identity\r\n\r\n" + _CHUNKS, 400),
        (_POST + b"transfer-encoding: gzip, chunked\r\n\r\n" + _CHUNKS, 501),
        (_POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n" + _CHUNKS, 400),
        (_POST + b"transfer-encoding : chunked\r\n\r\n" + _CHUNKS, 400),
        (_POST.replace(b"1.1", b"1.0") + b"transfer-encoding: chunked\r\n\r\n" + _CHUNKS, 501),
        (_POST + b"transfer-encoding: chunked\r\n\r\n11\n" + _BODY + b"\n0\n\n", 400),
        (_POST + b"transfer-encoding: chunked\r\n\r\n-1\r\n", 400),
        (_POST + b"transfer-encoding: chunked\r\n\r\n0x11\r\n" + _BODY + b"\r\n0\r\n\r\n", 400),
        (_POST + b"transfer-encoding: chunked\r\n\r\n" + b"f" * 17 + b"\r\n", 400),
        (_POST + b"transfer-encoding: chunked\r\n\r\n11;" + b"x" * 1_000_000, 431),
        (_POST + b"transfer-encoding: chunked\r\n\r\n0\r\nx: " + b"x" * 1_000_000, 431),
        (b"GET /health HTTP/1.1\nhost: a\n\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: a\nx: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: a\rx: b\r\n\r\n", 400),
        (_GET + b"x: b\r\n c\r\n\r\n", 400),
        (_GET + b"x: b\0c\r\n\r\n", 400),
        (_GET + b"x: b\x01c\r\n\r\n", 400),
        (_GET + b"x\0: b\r\n\r\n", 400),
        (_GET + b": b\r\n\r\n", 400),
        (_GET + b"nothing\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n host: a\r\n\r\n", 400),
        (_GET + b"host: b\r\n\r\n", 400),
        (_GET + b"authorization: a\r\nAuthorization: b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET http://engine/health HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET //health HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET health HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET /he\0alth HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET /he\xffalth HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"CONNECT engine:80 HTTP/1.1\r\nhost: a\r\n\r\n", 501),
        (b"TRACE /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", 405),
        (_GET + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n", 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /health HTTP/2.0\r\nhost: a\r\n\r\n", 505),
        (b"GET /health HTTP/1.2\r\nhost: a\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 505),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /" + b"x" * 1000 + b" HTTP/1.1\r\nhost: a\r\n\r\n", 414),
        (b"GET /" + b"x" * 1_000_000, 414),
        (_GET + b"".join(b"x%d: y\r\n" % number for number in range(100)) + b"\r\n", 431),
        (_GET + b"x: y\r\n" * 1000 + b"\r\n", 431),
        (_GET + b"x: " + b"y" * 5000 + b"\r\n\r\n", 431),
        (_GET + b"x: " + b"y" * 1_000_000, 431),
        (_GET + b"y" * 1_000_000, 431),
        (_POST + b"content-length: 10001\r\n\r\n", 413),
        (_POST + b"transfer-encoding: chunked\r\n\r\n2711\r\n" + b" " * 10_001, 413),
        (_POST + b"expect: 200-ok\r\ncontent-length: 17\r\n\r\n", 417),
    ],
    ids=lambda value: repr(value)[2:90],
)
def test_what_two_servers_could_understand_in_two_ways_is_refused_and_nothing_after_it_read(
    plain: Door, request_: bytes, status: int
) -> None:
    num_before = len(plain.engine.requests)
    smuggled = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
    assert statuses(plain.exchange(request_ + smuggled)) == [status]
    assert len(plain.engine.requests) == num_before


@pytest.mark.parametrize(
    "request_",
    [
        _POST + b"content-length: 17 \r\nconnection: close\r\n\r\n" + _BODY,
        _POST + b"Transfer-Encoding:\tChunked\r\nconnection: close\r\n\r\n" + _CHUNKS,
        _POST + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n11;a=b\r\n" + _CHUNKS[4:],
        _POST + b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n" + _CHUNKS[:-2] + b"a: b\r\n\r\n",
        b"\r\n\r\n" + _POST + b"content-length: 17\r\nconnection: close\r\n\r\n" + _BODY,
        _POST.replace(b"1.1", b"1.0") + b"content-length: 17\r\n\r\n" + _BODY,
        _POST.replace(b"completions ", b"completions?a=b ")
        + b"content-length: 17\r\nconnection: close\r\n\r\n"
        + _BODY,
    ],
)
def test_odd_but_clear_requests_reach_the_engine_as_plain_ones(plain: Door, request_: bytes) -> None:
    assert statuses(plain.exchange(request_)) == [200]
    head, _, body = plain.engine.requests[-1].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"transfer-encoding" not in head
    assert json.loads(body) == {"model": "served"}


def test_only_chosen_headers_reach_the_engine(plain: Door) -> None:
    given_ = (
        b"connection: close, x-secret",
        b"x-secret: 1",
        b"authorization: Bearer key",
        b"cookie: a=b",
        b"x-forwarded-for: 10.0.0.1",
        b"x-data-parallel-rank: 3",
        b"te: trailers",
        b"x-request-id: mine",
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    received = plain.exchange(completion(_BODY, *given_))
    assert b"\r\nx-request-id: mine\r\n" in received
    names = [line.split(b":")[0] for line in plain.engine.requests[-1].split(b"\r\n\r\n")[0].split(b"\r\n")]
    assert names[1:] == [
        b"host",
        b"content-type",
        b"accept-encoding",
        b"x-request-id",
        b"content-length",
        b"traceparent",
    ]


@pytest.mark.parametrize("given_", [b"", b"x" * 129, b"a b", b"caf\xc3\xa9"])
def test_a_request_id_is_made_where_none_can_be_used(plain: Door, given_: bytes) -> None:
    ids = set()
    for _ in range(2):
        response, _ = plain.ask(completion(_BODY, b"x-request-id: " + given_))
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 2
    assert given_.decode("latin-1") not in ids


def test_pipelined_requests_are_answered_in_order(plain: Door) -> None:
    requests = [
        completion(_BODY),
        _GET + b"\r\n",
        b"GET /nowhere HTTP/1.1\r\nhost: a\r\n\r\n",
        completion(b"[]"),
        completion(_BODY, b"connection: close"),
        _GET + b"\r\n",
    ]
    assert statuses(plain.exchange(b"".join(requests))) == [200, 200, 404, 400, 200]


def test_a_client_with_thousands_of_requests_that_need_no_engine_leaves_others_their_turn(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, heads, order = 2000, [], []
    began, other_asked = threading.Event(), threading.Event()

    def refuse(endpoints: Endpoints, request: Request) -> Reply | None:
        heads.append(request.target)

    def render(_: Metrics) -> bytes:
        order.append("many")
        began.set()
        other_asked.wait(20)
        return b""

    def say_health(_: App, __: Request, responder: Any) -> None:
        order.append("other")
        assert len(heads) < number, "all of them were read before"
        responder.reply(Reply(200))

    monkeypatch.setattr(Endpoints, "refuse", refuse)
    monkeypatch.setattr(Metrics, "render", render)
    monkeypatch.setattr(App, "_say_health", say_health)
    with door(fleet, answer) as one, one.connect() as many, one.connect() as other:
        metrics = b"GET /metrics HTTP/1.1\r\nhost: a\r\n"
        many.sendall((metrics + b"\r\n") * (number - 1) + metrics + b"connection: close\r\n\r\n")
        assert began.wait(20)
        other.sendall(_GET + b"\r\n")
        other_asked.set()
        assert read_response(other)[0].status == 200
        assert statuses(read_all(many)) == [200] * number
    assert order.index("other") < 100


def test_of_what_a_client_asked_before_it_closed_its_side_all_is_answered_that_needs_no_engine(
    fleet: Fleet,
) -> None:
    def hang(connection: socket.socket, _: int) -> None:
        connection.recv(1)

    with door(fleet, hang) as one:
        for behind in (b"", completion(_BODY) + _GET + b"\r\n"):
            assert statuses(one.exchange((_GET + b"\r\n") * 200 + behind, half_close=True)) == [200] * 200
        assert statuses(one.exchange((_GET + b"\r\n") * 200 + b"x\r\n", half_close=True)) == [200] * 200 + [
            400
        ]
        one.settled()


def test_a_good_request_is_answered_before_the_bad_one_behind_it_is_refused(plain: Door) -> None:
    assert statuses(plain.exchange(completion(_BODY) + b"nonsense\r\n\r\n")) == [200, 400]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.integers(0, 10**6), max_size=8))
def test_requests_are_understood_however_their_bytes_are_cut(plain: Door, places: list[int]) -> None:
    chunked = completion(_CHUNKS, b"transfer-encoding: chunked")
    data = completion(_BODY) + chunked + _GET + b"\r\n" + completion(b"{", b"connection: close")
    bounds = sorted({0, len(data), *(place % len(data) for place in places)})
    with plain.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in itertools.pairwise(bounds):
            client.sendall(data[begin:end])
            time.sleep(0.001)
        assert statuses(read_all(client)) == [200, 200, 200, 400]


_WORDS = st.sampled_from(
    [
        *(
            b"GET ",
            b"POST ",
            b"/health",
            b"/v1/completions",
            b"/v1/models/large",
            b"/admin/policy",
            b"Bearer admin\r\n",
            b'{"policy":"random"}',
            b"19\r\n",
            b" HTTP/1.1\r\n",
        ),
        b" HTTP/1.0\r\n",
        *(b"host: a\r\n", b"content-length: ", b"17\r\n", b"transfer-encoding: chunked\r\n", b"\r\n", b"\n"),
        *(
            b"0\r\n\r\n",
            b"11\r\n",
            _BODY,
            b"expect: 100-continue\r\n",
            b"connection: close\r\n",
            b": ",
            b"\0",
        ),
        *(
            b"authorization: ",
            b"content-type: application/json\r\n",
            b"{",
            b"\xff",
            b"x-besteffort-task: no\r\n",
        ),
        b"x-besteffort-deadline-ms-per-token: -1\r\n",
    ]
)


def _admin(body: bytes) -> bytes:
    posted = completion(body, b"authorization: Bearer admin")
    return posted.replace(b"/v1/completions", b"/admin/policy", 1)


# Whole requests and how they are answered: some at once, some when an engine or a thread is done.
_WHOLE = {
    _GET + b"\r\n": 200,
    completion(_BODY): 200,
    completion(_CHUNKS, b"transfer-encoding: chunked"): 200,
    completion(b"[]"): 400,
    _admin(b'{"policy":"random"}'): 200,
    _admin(b'{"policy":"unheard-of"}'): 400,
}
_LAST = completion(_BODY, b"connection: close")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    whole=st.lists(st.sampled_from(sorted(_WHOLE)), max_size=4),
    parts=st.lists(st.one_of(_WORDS, st.binary(max_size=40)), max_size=25),
)
def test_no_bytes_make_it_fail_or_hang_and_whole_requests_before_them_have_whole_answers(
    plain: Door, whole: list[bytes], parts: list[bytes]
) -> None:
    """The client closes its side only when those are there; without bytes after them the router closes."""
    wanted = [_WHOLE[request] for request in whole] + ([] if parts else [200])
    with plain.connect() as client:
        client.sendall(b"".join([*whole, *(parts or [_LAST])]))
        answers, after = read_answers(client, len(wanted))
        if parts:
            client.shutdown(socket.SHUT_WR)
        after += read_all(client)
    assert [status for status, _ in answers] == wanted
    assert all(json.loads(body) for _, body in answers)
    found = statuses(after.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))
    assert bool(found) <= bool(parts)
    # 501 and 505 are the client's fault; every other one would be the router's, for the engine is well.
    assert all(status < 500 or status in (501, 505) for status in found), found
    plain.settled()


def read_answers(client: socket.socket, number: int) -> tuple[list[tuple[int, bytes]], bytes]:
    """So many whole ones, and what came with the last; each must have a length."""
    found: list[tuple[int, bytes]] = []
    data = b""
    while len(found) < number:
        head, end, rest = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if end and length is not None and len(rest) >= int(length[1]):
            found.append((int(head[9:12]), rest[: int(length[1])]))
            data = rest[int(length[1]) :]
            continue
        part = client.recv(65_536)
        assert part, f"closed after {len(found)} of {number} answers and {data!r}"
        data += part
    return found, data


def test_a_client_is_told_to_go_on_before_it_sends_its_body(plain: Door) -> None:
    with plain.connect() as client:
        head, body = completion(_BODY, b"expect: 100-continue").split(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        response, _ = read_response(client)
        assert response.status == 200


def test_a_client_that_asks_first_is_refused_before_it_sends_its_body(plain: Door) -> None:
    request = b"POST /nowhere HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 17\r\n\r\n"
    assert statuses(plain.exchange(request)) == [404]


def test_http_1_0_gets_no_chunks_and_may_stay_if_it_asks(fleet: Fleet) -> None:
    def stream(connection: socket.socket, _: int) -> None:
        connection.sendall(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        )

    old = completion(_BODY).replace(b"1.1", b"1.0", 1)
    with door(fleet, stream) as one:
        head, _, body = one.exchange(old).partition(b"\r\n\r\n")
        assert body == b"abc"
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
    with door(fleet, answer) as one, one.connect() as client:
        for _ in range(2):
            client.sendall(completion(_BODY, b"connection: keep-alive").replace(b"1.1", b"1.0", 1))
            response, _ = read_response(client)
            assert (response.status, response.headers["connection"]) == (200, "keep-alive")


def test_a_head_request_has_no_body(plain: Door) -> None:
    received = plain.exchange(b"HEAD /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
    assert received.endswith(b"\r\n\r\n")
    assert b"content-length: " in received


def test_a_wrong_method_is_told_the_right_ones(plain: Door) -> None:
    response, _ = plain.ask(b"DELETE /v1/completions HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (response.status, response.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /heal", b"\r\n", _GET, _POST + b"content-length: 17\r\n\r\n{", _GET + b"\r\n" + _GET],
)
def test_a_client_that_stops_in_the_middle_is_shown_out(fleet: Fleet, sent: bytes) -> None:
    with door(fleet, answer, limited(head_s=0.3, body_s=0.3, keep_alive_s=0.3)) as one:
        found = statuses(one.exchange(sent))
        assert found in ([], [408], [200, 408])
        assert (found == []) == (sent in (b"", b"\r\n"))


@pytest.mark.parametrize("drop", [b"x", b"\r\n", b"x: y\r\n"])
def test_a_client_that_sends_drop_by_drop_is_shown_out_in_time(fleet: Fleet, drop: bytes) -> None:
    with door(fleet, answer, limited(head_s=0.5)) as one, one.connect() as client:
        client.sendall(b"" if drop == b"\r\n" else _GET)
        client.settimeout(0.05)
        for _ in range(200):
            try:
                client.sendall(drop)
                if client.recv(1000) in (b"",) or drop != b"\r\n":
                    return
            except TimeoutError:
                continue
            except OSError:
                return
        pytest.fail("it was let in for 10 s")


def test_the_rest_of_a_body_has_its_own_time_also_behind_another_request(fleet: Fleet) -> None:
    with door(fleet, answer, limited(head_s=0.3)) as one, one.connect() as client:
        request = completion(_BODY)
        client.sendall(_GET + b"\r\n" + request[:-5])
        assert read_response(client)[0].status == 200
        time.sleep(1.0)
        client.sendall(request[-5:])
        assert read_response(client)[0].status == 200


def test_an_idle_connection_is_closed(fleet: Fleet) -> None:
    with door(fleet, answer, limited(keep_alive_s=0.2)) as one:
        assert statuses(one.exchange(_GET + b"\r\n")) == [200]


def test_a_client_that_does_not_read_stops_the_engine_and_then_is_cut_off(fleet: Fleet) -> None:
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    sent = []

    def flood(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(2000):
            connection.sendall(chunk)
            sent.append(len(chunk))

    with door(fleet, flood, limited(send_s=1.5)) as one, one.connect(receive_buffer=4096) as client:
        client.sendall(completion(_BODY))
        wait_for(lambda: one.engine.num_left == 1)
        # What the kernel holds on the way is all that the engine got rid of.
        assert sum(sent) < 30_000_000
        one.settled()


def test_a_slow_reader_gets_every_byte(fleet: Fleet) -> None:
    size = 20_000_000

    def flood(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        connection.sendall(bytes(range(250)) * (size // 250))

    with door(fleet, flood) as one, one.connect(receive_buffer=4096) as client:
        client.sendall(completion(_BODY))
        time.sleep(0.3)
        _, body = read_response(client)
        assert body == bytes(range(250)) * (size // 250)


def test_large_bodies_go_both_ways(fleet: Fleet) -> None:
    def big(connection: socket.socket, _: int) -> None:
        connection.sendall(plain_answer(text="y" * 5_000_000))

    body = json.dumps({"model": "large", "prompt": "x" * 5_000_000}).encode()
    with door(fleet, big) as one:
        _, received = one.ask(completion(body))
        assert json.loads(received)["choices"][0]["text"] == "y" * 5_000_000
        sent = json.loads(one.engine.requests[0].partition(b"\r\n\r\n")[2])
        assert sent == {"model": "served", "prompt": "x" * 5_000_000}


def test_bodies_that_together_are_too_large_are_refused(fleet: Fleet) -> None:
    with door(fleet, answer, limited(max_held=150_000)) as one, one.connect() as client:
        body = json.dumps({"model": "large", "prompt": "x" * 100_000}).encode()
        client.sendall(completion(body)[:-10])
        time.sleep(0.1)
        assert statuses(one.exchange(completion(body))) == [429]
        client.sendall(completion(body)[-10:])
        assert read_response(client)[0].status == 200
        for _ in range(3):  # what was held is given back
            assert one.ask(completion(body))[0].status == 200


def test_the_body_of_a_stream_that_has_begun_is_held_no_longer(fleet: Fleet) -> None:
    def stream(connection: socket.socket, _: int) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n")

    body = json.dumps({"model": "large", "stream": True, "prompt": "x" * 100_000}).encode()
    with (
        door(fleet, stream, limited(max_held=150_000)) as one,
        one.connect() as first,
        one.connect() as second,
    ):
        for client in (first, second):
            client.sendall(completion(body))
            assert client.recv(12) == b"HTTP/1.1 200"


class Owner:
    """Takes requests from a reader."""

    def head_began(self) -> None:
        pass

    def head_ended(self, request: Request, *, expects_continue: bool) -> Reply | None:
        return None

    def request_ended(self, request: Request, refusal: Reply | None) -> None:
        self.request = request


def test_a_body_takes_no_more_memory_than_is_counted_for_it_and_none_when_it_is_done() -> None:
    owner, budget = Owner(), Budget(MEBIBYTE)
    reader = RequestReader(owner, Limits(), budget)
    tracemalloc.start()
    try:
        reader.feed(_POST + b"transfer-encoding: chunked\r\n\r\n")
        for _ in range(1000):
            reader.feed(b"2\r\nab\r\n" * 100)
        assert budget.held == 200_000
        assert tracemalloc.get_traced_memory()[0] < 300_000
        reader.feed(b"0\r\n\r\n")
        assert owner.request.body == b"ab" * 100_000
        assert budget.held == 200_000
        assert tracemalloc.get_traced_memory()[0] < 250_000
        reader.release(owner.request)
        assert budget.held == 0
        assert tracemalloc.get_traced_memory()[0] < 50_000
    finally:
        tracemalloc.stop()


def test_more_connections_than_allowed_are_turned_away(fleet: Fleet) -> None:
    with door(fleet, answer, limited(max_connections=2)) as one:
        with one.connect() as first, one.connect() as second:
            for client in (first, second):
                client.sendall(_GET + b"\r\n")
                assert read_response(client)[0].status == 200
            with one.connect() as third:
                assert statuses(read_all(third)) == [503]
        wait_for(lambda: one.exchange(completion(_BODY, b"connection: close")).startswith(b"HTTP/1.1 200"))


def test_a_client_that_closes_its_side_counts_as_gone(fleet: Fleet) -> None:
    def hang(connection: socket.socket, _: int) -> None:
        connection.recv(1)

    with door(fleet, hang) as one:
        assert one.exchange(completion(_BODY), half_close=True) == b""
        one.settled()
        wait_for(lambda: one.engine.num_left == 1)


def test_a_drained_router_answers_what_it_has_and_takes_no_more(fleet: Fleet) -> None:
    def slow(connection: socket.socket, _: int) -> None:
        time.sleep(0.5)
        connection.sendall(plain_answer())

    with door(fleet, slow) as one:
        client, idle = one.connect(), one.connect()
        client.sendall(completion(_BODY))
        wait_for(lambda: len(one.engine.requests) == 1)
    with client, idle:
        response, _ = read_response(client)
        assert (response.status, response.headers["connection"]) == (200, "close")
        assert read_all(idle) == b""


def test_who_has_just_connected_when_the_router_ends_is_answered(fleet: Fleet) -> None:
    with contextlib.ExitStack() as running:
        one = running.enter_context(door(fleet, answer))
        old = one.connect()
        time.sleep(0.4)
        new = one.connect()
        one.ask(completion(_BODY))  # by now both are accepted
        ending = threading.Thread(target=running.close)
        ending.start()
        with old, new:
            assert read_all(old) == b"", "it had its time to ask"
            new.sendall(completion(_BODY))
            response, _ = read_response(new)
        assert (response.status, response.headers["connection"]) == (200, "close")
        ending.join()


def test_a_drain_has_an_end(fleet: Fleet) -> None:
    def hang(connection: socket.socket, _: int) -> None:
        connection.recv(1)

    with door(fleet, hang, limited(grace_s=0.3)) as one:
        client = one.connect()
        client.sendall(completion(_BODY))
        wait_for(lambda: len(one.engine.requests) == 1)
    with client:
        assert client.recv(1) == b""
    assert sum(map(sum, one.dispatcher.in_flight)) == 0


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext"
    words = [*command.split(), "subjectAltName=IP:127.0.0.1", "-keyout", "both.pem", "-out", "cert.pem"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    both = tmp_path / "both.pem"
    both.write_text(both.read_text() + (tmp_path / "cert.pem").read_text())
    return both


def test_it_speaks_tls(fleet: Fleet, certificate: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate))
    with door(fleet, answer, Settings(tls=tls_context(certificate, None))) as one:
        with trusted.wrap_socket(one.connect(), server_hostname="127.0.0.1") as client:
            assert client.version() in ("TLSv1.2", "TLSv1.3")
            for _ in range(2):
                client.sendall(completion(_BODY))
                assert read_response(client)[0].status == 200
        with trusted.wrap_socket(one.connect(), server_hostname="127.0.0.1") as client:
            client.sendall(b"nonsense\r\n\r\n")
            assert statuses(read_all(client)) == [400]
        one.connect().close()  # no handshake at all
        one.settled()


@pytest.mark.parametrize("num_turns", [0, 1, 3])
def test_a_handshake_that_is_given_up_leaves_no_socket_open(certificate: Path, num_turns: int) -> None:
    """Not even one that has not begun; it would be a warning, and warnings are errors here."""

    async def give_up(client: socket.socket) -> None:
        entrance = TlsDoor(listener, tls_context(certificate, None), asyncio.Protocol, lambda: True, 9.0)
        client.connect(listener.getsockname())
        entrance._accept()
        assert entrance.num_handshakes == 1
        for _ in range(num_turns):
            await asyncio.sleep(0)
        entrance.close()
        for _ in range(5):
            await asyncio.sleep(0)
        assert entrance.num_handshakes == 0
        gc.collect()

    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.settimeout(PATIENCE_S)
        uvloop.run(give_up(client))
        assert closed(client)


def closed(client: socket.socket) -> bool:
    """By the other side, before a byte came."""
    with contextlib.suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


def test_handshakes_count_as_connections_and_end_in_time(fleet: Fleet, certificate: Path) -> None:
    settings = Settings(limits=Limits(max_connections=3, head_s=1.0), tls=tls_context(certificate, None))
    with door(fleet, answer, settings) as one, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(one.connect()) for _ in range(3)]
        assert closed(stack.enter_context(one.connect())), "there is no room for a fourth"
        assert not select.select(silent, [], [], 0.0)[0], "they have room, and time"
        assert all(map(closed, silent)), "the time for a handshake is over"


def test_handshakes_that_fail_leave_the_room_that_they_took(fleet: Fleet, certificate: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate))
    settings = Settings(limits=Limits(max_connections=3, head_s=600.0), tls=tls_context(certificate, None))
    with door(fleet, answer, settings) as one, contextlib.ExitStack() as stack:
        for _ in range(9):
            client = stack.enter_context(one.connect())
            client.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                read_all(client)
        clients: list[ssl.SSLSocket] = []

        def all_are_in() -> bool:
            with contextlib.suppress(OSError):
                clients.append(trusted.wrap_socket(one.connect(), server_hostname="127.0.0.1"))
            return len(clients) == 3

        wait_for(all_are_in)
        assert closed(stack.enter_context(one.connect()))
        for client in clients:
            client.sendall(completion(_BODY))
            assert read_response(client)[0].status == 200
            client.close()


def test_without_the_key_there_is_only_health(fleet: Fleet) -> None:
    with door(fleet, answer, Settings(api_key=ApiKey("sésame"), protect_metrics=True)) as one:
        for headers in ((), (b"authorization: Bearer wrong",), (b"authorization: Basic \xff",)):
            response, body = one.ask(completion(_BODY, *headers))
            assert (response.status, response.headers["www-authenticate"]) == (401, "Bearer")
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
        assert one.ask(completion(_BODY, "authorization: bearer sésame".encode()))[0].status == 200
        for path, status in (("/health", 200), ("/metrics", 401), ("/v1/models", 401), ("/nowhere", 401)):
            connection = HTTPConnection(urlsplit(one.url).netloc, timeout=20)
            connection.request("GET", path)
            assert connection.getresponse().status == status
            connection.close()
        assert len(one.engine.requests) == 1
        assert b"authorization" not in one.engine.requests[0]
    assert "sésame" not in repr(Settings(api_key=ApiKey("sésame")))


def test_keys_are_passed_on_only_if_that_is_chosen(fleet: Fleet) -> None:
    with door(fleet, answer, Settings(forward_authorization=True, limits=Limits())) as one:
        one.ask(completion(_BODY, b"authorization: Bearer theirs"))
        assert b"\r\nauthorization: Bearer theirs\r\n" in one.engine.requests[0]
