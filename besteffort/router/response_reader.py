"""Strict reading of an engine's answers."""

from typing import Protocol

import httptools

from besteffort.router.known_head import KnownHead, is_to_be_kept
from besteffort.router.message import AnswerHead, Header

_CHUNKED = b"chunked"
_MAX_INTERIM = 16


class BadResponseError(Exception):
    """Not an HTTP response, or one that cannot be passed on safely."""


class Taker(Protocol):
    def on_head(self, head: AnswerHead, length: int | None) -> None: ...

    def on_body(self, data: bytes) -> None: ...


class ResponseReader:
    """Fed with a connection's bytes, it tells of one response after the other; 1xx ones are skipped."""

    def __init__(self, max_head: int) -> None:
        self._max_head = max_head
        self._taker: Taker | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._known: KnownHead | None = None
        self.known_head: AnswerHead
        self._head: AnswerHead  # the last one that was parsed
        self._num_missed = 0  # heads in a row that were not known
        self.complete = self.reusable = self.has_begun = True
        self._untouched = False

    def expect(self, taker: Taker) -> None:
        self._taker = taker
        self._untouched = True  # not a byte of the answer has come
        self.complete = self.has_begun = self.reusable = False
        self._has_head = False

    def _clear(self) -> None:
        self._silent = 0
        self._interim = False
        self._num_interim = 0
        self._length: int | None = None
        self._chunked = self._bodiless = False
        self._headers: list[Header] = []
        self._num_head = 0

    def rest(self) -> None:
        """Let go of the taker: its answer is whole, or not wanted."""
        self._taker = None

    @property
    def ends_with_connection(self) -> bool:
        """A body without a length, which the end of the connection ends."""
        return self._has_head and self._length is None and not self._chunked and not self._bodiless

    def known_body(self, data: bytes) -> bytes | None:
        """Of an answer that is whole in these bytes and has `known_head`: its taker is told nothing.

        None where it is anything else, which is to be fed.
        """
        if self._known is None or not self._untouched:
            return None
        body = self._known.body_in(data)
        if body is not None:
            self._num_missed = 0
            self._untouched = False
            self.complete = self.reusable = True
        return body

    def feed(self, data: bytes) -> None:
        """Raises BadResponseError."""
        if not self._untouched:
            self._parse(data)
            return
        self._untouched = False
        self._clear()
        self._parse(data)
        # Others may have to go to another replica, or come in parts, and are told of step by step.
        if self.complete and self.reusable and not self._bodiless and self._head.is_plain_success:
            self._num_missed += 1
            if is_to_be_kept(self._num_missed):
                # Where all of these bytes are that answer's, one with the same head need not be parsed.
                self._known = KnownHead.of(data, self._max_head)
                self.known_head = self._head

    def _parse(self, data: bytes) -> None:
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, BadResponseError):
                raise
            if not self.complete:
                raise error.__context__ from None
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self.complete:
                raise BadResponseError(str(error)) from None
            self.reusable = False
        if self._silent > self._max_head:
            raise BadResponseError(f"more than {self._max_head} bytes of headers")

    # The following are called by httptools.

    def on_message_begin(self) -> None:
        if self.complete:  # stop: what comes after an answer is not ours
            self.reusable = False
            raise BadResponseError("an answer to nothing")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_head += len(name) + len(value) + 4
        if self._num_head > self._max_head:
            raise BadResponseError(f"more than {self._max_head} bytes of headers")
        if self._has_head:
            return  # a trailer
        name = name.lower()
        if name == b"content-length":
            self._length = int(value)
        elif name == b"transfer-encoding":
            self._chunked = True
            if value.lower() != _CHUNKED:
                raise BadResponseError("a transfer encoding other than chunked")
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self._silent = 0
        status = self._parser.get_status_code()
        if status < 200:
            if status == 101 or status < 100:
                raise BadResponseError(f"status {status}")
            self._num_interim += 1
            if self._num_interim > _MAX_INTERIM:
                raise BadResponseError("too many interim answers")
            self._interim = True
            self._headers = []
            return
        self._has_head = True
        self._head = AnswerHead(status, self._headers)
        self._bodiless = status in (204, 304)
        assert self._taker is not None, "an answer is somebody's"
        self._taker.on_head(self._head, self._length)

    def on_body(self, data: bytes) -> None:
        self._silent = 0
        self.has_begun = True
        if self._taker is not None:
            self._taker.on_body(data)

    def on_message_complete(self) -> None:
        self._silent = 0
        if self._interim:
            self._interim = False
            self._length, self._chunked = None, False
            return
        self.complete = True
        self.reusable = self._parser.should_keep_alive()
