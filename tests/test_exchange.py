"""What a client hears, and what stays counted, when it is the router that fails in the midst of a request."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest

from besteffort.fleet import Fleet
from besteffort.policies import Static
from besteffort.router.breaker import Breaker
from besteffort.router.client_connection import ClientConnection
from besteffort.router.metrics import Metrics
from besteffort.router.receipt import Receipts
from besteffort.router.token_count import PlainCount, StreamCount
from besteffort.router.upstream import Upstream
from tests.fake_engine import plain_answer, wait_for
from tests.routing import Door, completion, door, limited, read_response
from tests.test_upstream import stay

_EVENT = b'22\r\ndata: {"choices":[{"text":"a"}]}\n\n\r\n'
_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n" + _EVENT
_PLAIN = completion(b'{"model":"large"}')
_STREAMED = completion(b'{"model":"large","stream":true}')


def fails(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("asked for")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[type, str], None]:
    return lambda owner, name: monkeypatch.setattr(owner, name, fails)


def is_whole_again(one: Door, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault was logged once, nothing is counted any more, and the one seat is free."""
    monkeypatch.undo()
    one.engine.script = lambda connection, _: connection.sendall(plain_answer())
    one.settled()
    assert one.ask(_PLAIN)[0].status == 200
    (record,) = (record for record in caplog.records if record.levelno >= logging.ERROR)
    assert record.exc_info is not None
    assert "asked for" in caplog.text


@pytest.mark.parametrize(
    ("owner", "name", "answer"),
    [
        (Receipts, "lines", plain_answer()),  # at its head
        (Breaker, "answered", plain_answer()),
        (Breaker, "failed", b""),  # at a fault
        (Metrics, "ended", b""),
        (Upstream, "send", b""),  # before anything is sent
    ],
)
def test_a_fault_of_ours_before_an_answer_is_a_500(
    fleet: Fleet,
    failing: Callable[[type, str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    name: str,
    answer: bytes,
) -> None:
    def script(connection: Any, _: int) -> None:
        connection.sendall(answer)
        connection.close()

    with door(fleet, script, limited(max_in_flight=1)) as one:
        failing(owner, name)
        response, body = one.ask(_PLAIN)
        error = json.loads(body)["error"]
        assert (response.status, error["type"], error["code"]) == (500, "server_error", "internal_error")
        is_whole_again(one, caplog, monkeypatch)


def test_a_fault_of_ours_in_a_stream_ends_it_with_an_error_event(
    fleet: Fleet,
    failing: Callable[[type, str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sockets: list[Any] = []

    def script(connection: Any, _: int) -> None:
        sockets.append(connection)
        connection.sendall(_STREAM)
        stay(connection)

    with door(fleet, script, limited(max_in_flight=1)) as one, one.connect() as client:
        client.sendall(_STREAMED)
        assert client.recv(10) == b"HTTP/1.1 2"
        failing(StreamCount, "feed")
        sockets[0].sendall(_EVENT)
        rest = b""
        while not rest.endswith(b"0\r\n\r\n"):
            rest += client.recv(65_536)
        last = rest.rpartition(b"data: ")[2].partition(b"\n")[0]
        assert json.loads(last)["error"]["code"] == "internal_error"
        wait_for(lambda: one.engine.num_left == 1)
        is_whole_again(one, caplog, monkeypatch)


@pytest.mark.parametrize(
    ("owner", "name"), [(PlainCount, "feed"), (Metrics, "ended"), (ClientConnection, "end")]
)
def test_a_fault_of_ours_in_a_plain_answer_breaks_it_off(
    fleet: Fleet,
    failing: Callable[[type, str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    name: str,
) -> None:
    with door(
        fleet, lambda connection, _: connection.sendall(plain_answer()), limited(max_in_flight=1)
    ) as one:
        failing(owner, name)
        with pytest.raises(ConnectionResetError):
            one.ask(_PLAIN)
        is_whole_again(one, caplog, monkeypatch)


@pytest.mark.parametrize(("owner", "name"), [(Metrics, "ended"), (ClientConnection, "answer")])
def test_a_fault_of_ours_in_an_answer_whose_head_came_before_breaks_it_off_too(
    fleet: Fleet,
    failing: Callable[[type, str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    owner: type,
    name: str,
) -> None:
    with (
        door(
            fleet, lambda connection, _: connection.sendall(plain_answer()), limited(max_in_flight=1)
        ) as one,
        one.connect() as client,
    ):
        one.dispatcher.policy = Static(0, "always")  # on one connection
        client.sendall(_PLAIN)
        assert read_response(client)[0].status == 200
        failing(owner, name)
        client.sendall(_PLAIN)
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        is_whole_again(one, caplog, monkeypatch)


def test_a_fault_of_ours_at_one_request_leaves_the_next_ones_alone(
    fleet: Fleet,
    failing: Callable[[type, str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        door(fleet, lambda connection, _: connection.sendall(plain_answer())) as one,
        one.connect() as client,
    ):
        failing(Receipts, "lines")
        client.sendall(_PLAIN)
        assert read_response(client)[0].status == 500
        monkeypatch.undo()
        client.sendall(_PLAIN)
        assert read_response(client)[0].status == 200
        is_whole_again(one, caplog, monkeypatch)
