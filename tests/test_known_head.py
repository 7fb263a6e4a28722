"""What is not parsed again is read as if it were: with and without known heads readers say the same."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.router.known_head import KnownHead
from besteffort.router.limits import Limits
from besteffort.router.message import AnswerHead, Refusal, Reply, Request
from besteffort.router.request_reader import Budget, RequestReader
from besteffort.router.response_reader import BadResponseError, ResponseReader

_LENGTHS = st.one_of(
    st.integers(0, 40).map(str),
    st.text("0123456789 +-_,.x\r\n\t", max_size=4),
    st.sampled_from(("007", "5\r\nTransfer-Encoding: chunked", "5\r\nContent-Length: 6", "1\r\n\r\n", "5,5")),
)
_NAMES = st.sampled_from(("Content-Length", "content-length", "CONTENT-LENGTH"))
_LINES = st.sampled_from(
    ("", "x-a: 1\r\n", "connection: close\r\n", "expect: 100-continue\r\n", "x-content-length: 3\r\n")
)


@st.composite
def _messages(draw: st.DrawFn, first_line: str) -> bytes:
    """Most are alike but for the stated length; it may be wrong, or no number."""
    length, name, before, after = draw(_LENGTHS), draw(_NAMES), draw(_LINES), draw(_LINES)
    body = b"b" * draw(st.one_of(st.integers(0, 40), st.just(int(length) if length.isdecimal() else 0)))
    head = f"{first_line}\r\nhost: a\r\n{before}{name}: {length}\r\n{after}\r\n"
    return draw(st.sampled_from((b"", b"", b"", b"\r\n"))) + head.encode() + body


def _pieces(messages: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[bytes]]:
    """Each whole, cut in two, or with the next one in one piece."""
    whole = messages.map(lambda one: [one])
    cut = st.tuples(messages, st.integers(0, 99)).map(lambda pair: [pair[0][: pair[1]], pair[0][pair[1] :]])
    two = st.tuples(messages, messages).map(lambda pair: [pair[0] + pair[1]])
    # The same again is what this is about.
    part = st.tuples(st.one_of(whole, cut, two), st.integers(1, 3)).map(lambda pair: pair[0] * pair[1])
    return st.lists(part, min_size=1, max_size=5).map(lambda parts: list(chain(*parts)))


@contextmanager
def _none_known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KnownHead, "of", lambda message, max_head: None)
        yield


class Client:
    """Writes down what a reader of requests says."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def head_began(self) -> None:
        pass

    def head_ended(self, request: Request, *, expects_continue: bool) -> Reply | None:
        return None

    def request_ended(self, request: Request, refusal: Reply | None) -> None:
        others = {name: value for name, value in request.headers.items() if name != b"content-length"}
        self.heard.append(
            (request.method, request.target, others, request.body, request.keep_alive, request.http_1_1)
        )


def _feed(reader: RequestReader, data: bytes) -> None:
    """As a connection does."""
    request = reader.known(data)
    if request is None:
        reader.feed(data)
    else:
        reader._owner.request_ended(request, None)


def _read_requests(pieces: Sequence[bytes]) -> tuple[list[object], int]:
    client, budget = Client(), Budget(100)
    reader = RequestReader(client, Limits(max_body=30, max_head=200), budget)
    for piece in pieces:
        try:
            _feed(reader, piece)
        except Refusal as refusal:
            client.heard.append(refusal.reply)
            break
        if client.heard and not client.heard[-1][4]:  # type: ignore[index]
            break  # nothing is read after a request that closes
    return client.heard, budget.held


@given(_pieces(_messages("POST /v1/completions?a=b HTTP/1.1")))
def test_requests_with_known_heads_are_read_as_all_are(pieces: list[bytes]) -> None:
    with _none_known():
        expected = _read_requests(pieces)
    assert _read_requests(pieces) == expected


class Taker:
    """Writes down what a reader of answers says."""

    def __init__(self) -> None:
        self.heard: list[object] = []

    def on_head(self, head: AnswerHead, length: int | None) -> None:
        # A known one states another answer's length among its headers, which nobody passes on.
        others = [header for header in head.headers if header[0] != b"content-length"]
        self.heard += [head.status, others, length]

    def on_body(self, data: bytes) -> None:
        self.heard.append(data)

    def take(self, head: AnswerHead, body: bytes) -> None:
        """Whole, with a head that is known."""
        self.on_head(head, len(body))
        if body:
            self.on_body(body)


def _read_answers(pieces: Sequence[bytes]) -> list[object]:
    taker = Taker()
    reader = ResponseReader(200)
    reader.expect(taker)
    for piece in pieces:
        try:
            body = reader.known_body(piece)
            if body is None:
                reader.feed(piece)
            else:
                taker.take(reader.known_head, body)
        except BadResponseError:
            taker.heard.append("bad")
            break
        if not reader.complete:
            taker.heard.append((reader.has_begun, reader.ends_with_connection))
        taker.heard.append((reader.complete, reader.reusable))
        if reader.complete:
            if not reader.reusable:
                break
            reader.expect(taker)
    return taker.heard


@given(_pieces(_messages("HTTP/1.1 200 OK")))
def test_answers_with_known_heads_are_read_as_all_are(pieces: list[bytes]) -> None:
    with _none_known():
        expected = _read_answers(pieces)
    assert _read_answers(pieces) == expected


def test_the_same_head_with_another_length_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    reader = RequestReader(client, Limits(), Budget(100))
    parsed: list[bytes] = []
    parse = reader._parse
    monkeypatch.setattr(reader, "_parse", lambda data: (parsed.append(data), parse(data)))
    head = b"POST /a?b=%%d HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\nx-c: %%s%%%%\r\n\r\n"
    for length in (3, 4, 12, 0, 3):
        _feed(reader, head % length + b"b" * length)
    assert parsed == [head % 3 + b"bbb"]
    assert [heard[3] for heard in client.heard] == [b"b" * length for length in (3, 4, 12, 0, 3)]  # type: ignore[index]


@pytest.mark.parametrize("length", [b"-5", b"00", b"+1", b" 1", b"1 ", b"1", b"-0"])
def test_a_length_that_is_not_that_of_the_rest_is_nothing_known(length: bytes) -> None:
    message = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: %b\r\n\r\n"
    for num_body in (0, 3, 1_000_000):  # of so many digits as are looked for first
        known = KnownHead.of(message % str(num_body).encode() + b"b" * num_body, 200)
        assert known is not None
        assert known.body_in(message % str(num_body).encode() + b"b" * num_body) == b"b" * num_body
        assert known.body_in(message % length) is None
        assert known.body_in(message % b"5" + b"b" * 5) == b"b" * 5


@pytest.mark.parametrize(
    ("first_lines", "is_known"),
    [
        ("HTTP/1.1 200 OK\r\ncontent-type: application/json", True),
        ("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8", False),
        ("HTTP/1.1 404 Not Found", False),
        ("HTTP/1.1 503 Service Unavailable", False),
    ],
)
def test_only_plain_answers_that_are_no_errors_are_known(first_lines: str, is_known: bool) -> None:
    reader, answer = ResponseReader(200), f"{first_lines}\r\ncontent-length: 2\r\n\r\nab".encode()
    reader.expect(Taker())
    assert reader.known_body(answer) is None
    reader.feed(answer)
    reader.expect(Taker())
    assert (reader.known_body(answer) == b"ab") is is_known
