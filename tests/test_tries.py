"""Answers that are none: what another replica may do better, and what that says of the first."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.policies import Static
from besteffort.router import Dispatcher
from besteffort.router.upstream import Call, Upstream
from tests.fake_engine import RawEngine, plain_answer, wait_for
from tests.routing import Door, completion, limited, read_response, routing
from tests.test_upstream import metrics_of, stay

Answer = Callable[[socket.socket], None]
_DEAD = b'{"error":{"message":"EngineCore encountered an issue","code":500}}'


def says(status: int, body: bytes = _DEAD) -> Answer:
    head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return lambda connection: connection.sendall(head % (status, len(body)) + body)


def well(connection: socket.socket) -> None:
    connection.sendall(plain_answer())


@dataclass
class Three:
    """Two small engines and a large one, and what each of them does with requests."""

    door: Door
    engines: list[RawEngine]
    answers: list[Answer]

    def ask(self, body: bytes = b"{}") -> tuple[int, str, bytes]:
        """Status, which model and replica answered, and the answer."""
        response, answer = self.door.ask(completion(body))
        told = response.headers
        return response.status, f"{told['x-besteffort-model']} {told['x-besteffort-replica']}", answer

    def counted(self, name: str) -> dict[str, float]:
        """A metric by its labels."""
        lines = (line.rpartition(" ") for line in metrics_of(self.door) if line.startswith(name + "{"))
        return {labels.removeprefix(name): float(value) for labels, _, value in lines if float(value)}

    @property
    def num_asked(self) -> list[int]:
        return [len(engine.requests) for engine in self.engines]


@contextlib.contextmanager
def three(fleet: Fleet, *answers: Answer, **limits: float) -> Iterator[Three]:
    """None of them says how it is, so that a breaker that opens stays open."""
    current = list(answers)
    engines = [
        RawEngine(lambda connection, _, at=at: current[at](connection))  # type: ignore[misc]
        for at in range(len(answers))
    ]
    small, other, large = (Engine(engine.url, "x") for engine in engines)
    dispatcher = Dispatcher(fleet, Static(0, "static:small"), ((small, other), (large,)))
    with contextlib.ExitStack() as stack:
        for engine in engines:
            stack.callback(engine.close)
        url = stack.enter_context(routing(dispatcher, limited(**{"probe_wait_s": 60.0} | limits)))
        yield Three(Door(url, engines[0], dispatcher), engines, current)


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_an_engine_that_says_that_it_failed_costs_no_request(fleet: Fleet, status: int) -> None:
    with three(fleet, says(status), well, well) as one:
        for number in range(1, 3):
            assert one.ask()[:2] == (200, "small 1")
            assert one.num_asked == [number, number, 0]
        assert one.counted("besteffort_retries_total") == {'{model="small",replica="0",task="copa"}': 2}
        assert one.counted("besteffort_requests_total") == {'{model="small",outcome="ok",task="copa"}': 2}
        one.door.settled()
        wait_for(lambda: one.engines[0].num_left == 2)  # nobody waits for the rest of what it says


def test_of_an_answer_that_is_not_passed_on_nothing_is_waited_for_and_nothing_is_read(fleet: Fleet) -> None:
    def begins(rest: bytes) -> Answer:
        def answer(connection: socket.socket) -> None:
            connection.sendall(b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n" + rest)
            stay(connection)

        return answer

    for rest in (b"", b"2\r\nno\r\n", b"garbage\r\n", b"2\r\nno\r\n0\r\n\r\n" + plain_answer(1, " poison")):
        with three(fleet, begins(rest), well, well) as one:
            status, at, answer = one.ask()
            assert (status, at, json.loads(answer)["choices"]) == (200, "small 1", [{"text": " a"}])
            wait_for(lambda: one.engines[0].num_left == 1)
            one.door.settled()


@pytest.mark.parametrize("status", [400, 404, 429, 501, 505])
def test_what_any_engine_would_say_is_passed_on(fleet: Fleet, status: int) -> None:
    with three(fleet, says(status), well, well) as one:
        assert one.ask() == (status, "small 0", _DEAD)
        assert one.num_asked == [1, 0, 0]


def test_where_all_fail_the_words_of_the_last_are_passed_on(fleet: Fleet) -> None:
    with three(fleet, says(500), says(503), says(502, b"the last one's")) as one:
        assert one.ask() == (502, "large 0", b"the last one's")
        assert one.num_asked == [1, 1, 1]
        assert one.counted("besteffort_requests_total") == {
            '{model="large",outcome="refused",task="copa"}': 1
        }
        assert sum(one.counted("besteffort_retries_total").values()) == 2
        assert one.ask(b'{"model":"large"}') == (502, "large 0", b"the last one's")
        assert one.num_asked == [1, 1, 2]
        one.door.settled()


def test_a_failure_of_one_kind_may_follow_one_of_another(fleet: Fleet) -> None:
    with three(fleet, says(500), socket.socket.close, well) as one:
        assert one.ask()[:2] == (200, "large 0")
        one.answers[2] = socket.socket.close
        assert one.ask()[0] == 502
        one.door.settled()


def test_an_engine_that_says_500_where_another_one_answers_gets_no_more_requests(fleet: Fleet) -> None:
    with three(fleet, says(500), well, well) as one:
        for _ in range(5):
            assert one.ask()[:2] == (200, "small 1")
        assert one.num_asked == [3, 5, 0]
        assert one.counted("besteffort_breaker_openings_total") == {'{model="small",replica="0"}': 1}


def test_a_request_that_no_engine_can_bear_takes_none_out_of_service(fleet: Fleet) -> None:
    with three(fleet, says(500), says(500), says(500)) as one:
        for _ in range(5):
            assert one.ask()[:2] == (500, "large 0")
        assert one.counted("besteffort_breaker_openings_total") == {}
        one.answers[1] = says(400)  # which is no better
        for _ in range(5):
            assert one.ask()[:2] == (400, "small 1")
        assert one.counted("besteffort_breaker_openings_total") == {}


def test_a_client_that_leaves_during_the_second_try_ends_that_one(fleet: Fleet) -> None:
    with three(fleet, says(500), stay, well) as one:
        with one.door.connect() as client:
            client.sendall(completion(b"{}"))
            wait_for(lambda: one.num_asked == [1, 1, 0])
        wait_for(lambda: one.engines[1].num_left == 1)
        one.door.settled()
        assert one.counted("besteffort_requests_total") == {
            '{model="small",outcome="cancelled",task="copa"}': 1
        }


_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_TOKEN = b'data: {"choices":[{"text":"a"}]}\n\n'


def streams(*events: bytes, then: Answer = lambda connection: connection.sendall(b"0\r\n\r\n")) -> Answer:
    def answer(connection: socket.socket) -> None:
        connection.sendall(_STREAM + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events))
        then(connection)

    return answer


def says_in_a_stream(code: int) -> bytes:
    """As vLLM does, which has sent its 200 when a request begins to wait."""
    error = {"error": {"message": "EngineCore", "type": "X", "param": None, "code": code}}
    return b"data: " + json.dumps(error).encode() + b"\n\n"


_STREAMED = b'{"stream":true}'


@pytest.mark.parametrize(
    "answer",
    [
        streams(then=socket.socket.close),
        streams(then=lambda connection: connection.sendall(b"garbage\r\n")),
        streams(says_in_a_stream(500)),
        streams(says_in_a_stream(503), b"data: [DONE]\n\n"),
    ],
    ids=["it breaks off", "garbage", "500", "503"],
)
def test_a_stream_of_which_only_the_head_came_has_not_begun(fleet: Fleet, answer: Answer) -> None:
    with three(fleet, answer, streams(_TOKEN, _TOKEN), well) as one:
        for _ in range(4):
            assert one.ask(_STREAMED) == (200, "small 1", _TOKEN * 2)
        assert one.counted("besteffort_breaker_openings_total") == {'{model="small",replica="0"}': 1}
        assert one.counted("besteffort_requests_total") == {'{model="small",outcome="ok",task="copa"}': 4}
        one.door.settled()


@pytest.mark.parametrize(
    ("events", "outcome"),
    [
        ((says_in_a_stream(400),), "failed"),
        ((_TOKEN, says_in_a_stream(500), b"data: [DONE]\n\n"), "failed"),
        ((b'data: {"choices":[{"text":"{\\"error\\":1}"}]}\n\n',), "ok"),
        ((), "ok"),
    ],
)
def test_any_other_stream_is_passed_on_as_it_is(
    fleet: Fleet, events: tuple[bytes, ...], outcome: str
) -> None:
    with three(fleet, streams(*events), well, well) as one:
        assert one.ask(_STREAMED) == (200, "small 0", b"".join(events))
        assert one.num_asked == [1, 0, 0]
        assert one.counted("besteffort_requests_total") == {
            f'{{model="small",outcome="{outcome}",task="copa"}}': 1
        }
        _, answer = one.door.ask(completion(_STREAMED, b"x-besteffort-receipt: stream"))
        assert (b'"besteffort"' in answer) == (outcome == "ok"), "what failed has no receipt"


def test_where_all_fail_in_a_stream_s_first_event_the_last_one_s_is_passed_on(fleet: Fleet) -> None:
    dead = streams(says_in_a_stream(500))
    with three(fleet, dead, dead, dead) as one:
        for _ in range(4):
            assert one.ask(_STREAMED) == (200, "large 0", says_in_a_stream(500))
        assert one.counted("besteffort_breaker_openings_total") == {}


def test_a_stream_may_wait_for_its_first_event_as_long_as_a_plain_answer(fleet: Fleet) -> None:
    with three(fleet, streams(then=stay), well, well, first_byte_s=0.3, between_bytes_s=60.0) as one:
        response, body = one.door.ask(completion(_STREAMED))
        assert (response.status, json.loads(body)["error"]["code"]) == (504, "engine_timeout")
        assert one.num_asked == [1, 0, 0]


@pytest.mark.parametrize("end", [b"\n\n", b""], ids=["", "not quite whole"])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_an_error_that_comes_in_pieces_is_one_all_the_same(fleet: Fleet, size: int, end: bytes) -> None:
    event = says_in_a_stream(503).rstrip() + end
    pieces = [event[at : at + size] for at in range(0, len(event), size)]
    with three(fleet, streams(*pieces), streams(_TOKEN, _TOKEN), well) as one:
        assert one.ask(_STREAMED) == (200, "small 1", _TOKEN * 2)
        one.answers[1] = one.answers[2] = streams(*pieces)
        assert one.ask(_STREAMED) == (200, "large 0", event)
        one.door.settled()


@pytest.mark.parametrize(
    ("begun", "is_passed_on"),
    [
        (b'data: {"ch', True),
        (b": ping", True),
        (b'data: {"error', False),
        (b'data: {"error"' + b"x" * 10_000, False),
        (b'data: {"error"' + b"x" * 20_000, True),
        (b'data: {"error"\n', True),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_of_a_stream_only_what_may_become_an_error_is_held_back(
    fleet: Fleet, begun: bytes, is_passed_on: bool
) -> None:
    with (
        three(fleet, streams(begun, then=stay), streams(_TOKEN), well, between_bytes_s=0.3) as one,
        one.door.connect() as client,
    ):
        client.sendall(completion(_STREAMED))
        response, body = read_response(client)
        assert (response.status, body.startswith(begun)) == ((200, True) if is_passed_on else (504, False))
        one.door.settled()


def test_an_error_of_which_only_a_part_came_before_it_broke_off_is_passed_on_to_nobody(fleet: Fleet) -> None:
    with three(fleet, streams(b'data: {"err', then=socket.socket.close), streams(_TOKEN), well) as one:
        assert one.ask(_STREAMED) == (200, "small 1", _TOKEN)


def test_all_tries_together_have_the_time_of_one(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    send = Upstream.send

    def remembered(upstream: Upstream, *args: Any) -> Call:
        calls.append(send(upstream, *args))
        time.sleep(0.05)
        return calls[-1]

    monkeypatch.setattr(Upstream, "send", remembered)
    with three(fleet, says(500), socket.socket.close, well) as one:
        for number in range(1, 3):
            assert one.ask()[:2] == (200, "large 0")
            assert len(calls) == 3 * number
        due_at = [call.total_due_at for call in calls]
        assert len(set(due_at[:3])) == len(set(due_at[3:])) == 1
        assert due_at[0] < due_at[3]
