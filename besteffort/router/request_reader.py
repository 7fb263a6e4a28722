"""Strict reading of requests: what two servers could understand in two ways is refused."""

from typing import Protocol

import httptools

from besteffort.router.known_head import KnownHead, is_to_be_kept
from besteffort.router.limits import Limits
from besteffort.router.message import Refusal, Reply, Request
from besteffort.router.openai_errors import error_reply

# A second one of these is never honest: one server would go by the first, another by the last.
_ONCE = frozenset((b"host", b"authorization", b"content-type", b"expect", b"x-besteffort-task"))


class Budget:
    """The bytes of all bodies that are held at this moment."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


class Owner(Protocol):
    def head_began(self) -> None: ...

    def head_ended(self, request: Request, *, expects_continue: bool) -> Reply | None:
        """A refusal, if the head is enough to tell: the body is then thrown away as it comes."""

    def request_ended(self, request: Request, refusal: Reply | None) -> None: ...


class RequestReader:
    """Fed with a connection's bytes, it tells its owner of each request in order.

    httptools (llhttp, strict) parses, and by itself refuses most of what is dangerous: both lengths at
    once, several or odd lengths, bare CR and LF, folded headers, NUL, a space before a colon.
    """

    def __init__(self, owner: Owner, limits: Limits, budget: Budget) -> None:
        self._owner = owner
        self._limits = limits
        self._budget = budget
        self._parser = httptools.HttpRequestParser(self)
        self._silent = 0  # bytes that have brought nothing yet: of a head, a chunk's size, a trailer
        self.in_message = False
        self._known: KnownHead | None = None
        self._first: Request  # with that head; it was not refused for it
        self._num_missed = 0  # heads in a row that were not known
        self._last: Request | None = None  # of those that were not refused
        self._clear()

    def _clear(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._num_head = self._num_body = 0
        # One that comes in parts is put together as it comes: each as an object of its own would cost far
        # more than it brings.
        self._body: bytes | bytearray = b""
        self._request: Request | None = None
        self._refusal: Reply | None = None

    def known(self, data: bytes) -> Request | None:
        """The request that is whole in these bytes, and whose head came before; its owner is told nothing.

        None where it is anything else, or goes over a limit: it is to be fed.
        """
        if self._known is None or self.in_message or (body := self._known.body_in(data)) is None:
            return None
        budget, num_held = self._budget, self._budget.held + len(body)
        if len(body) > self._limits.max_body or num_held > budget.limit:
            return None
        budget.held = num_held
        self._silent = self._num_missed = 0
        first = self._first
        return Request(first.method, first.target, first.headers, first.http_1_1, True, body, first.notes)

    def feed(self, data: bytes) -> None:
        """Take what has come.

        Raises:
            Refusal: nothing that comes after can be understood.
        """
        if self.in_message:
            self._parse(data)
            return
        last = self._last
        self._parse(data)
        if self._last is not None and self._last is not last and not self.in_message:
            self._num_missed += 1
            if is_to_be_kept(self._num_missed):
                self._remember(self._last, data)

    def _remember(self, request: Request, message: bytes) -> None:
        """Where all of these bytes are that request's, one with the same head need not be parsed."""
        if request.keep_alive and b"expect" not in request.headers:
            self._known = KnownHead.of(message, self._limits.max_head)
            request.headers.pop(b"content-length", None)  # which is another one's too from now on
            self._first = request

    def _parse(self, data: bytes) -> None:
        self._silent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, Refusal):
                raise error.__context__ from None
            raise
        except httptools.HttpParserUpgrade:
            raise _refusal(501, "Neither CONNECT nor an upgrade is served here", "not_implemented") from None
        except httptools.HttpParserError as error:
            raise _refusal(400, f"Not a request: {error}", "bad_request") from None
        if self._silent > self._limits.max_head:
            raise _refusal(431, f"More than {self._limits.max_head} bytes of headers", "head_too_large")

    @property
    def in_body(self) -> bool:
        return self._request is not None

    def release(self, request: Request) -> None:
        """Let go of a request's body, once it is of no use any more."""
        self._budget.held -= len(request.body)
        request.body = b""

    def close(self) -> None:
        """Note that the rest of a body will never come."""
        self._budget.held -= self._num_body
        self._clear()

    # The following are called by httptools.

    def on_message_begin(self) -> None:
        self._clear()
        self.in_message = True
        self._owner.head_began()

    def on_url(self, part: bytes) -> None:
        self._url += part
        if len(self._url) > self._limits.max_url:
            raise _refusal(414, f"The URL is longer than {self._limits.max_url} bytes", "url_too_long")

    def on_header(self, name: bytes, value: bytes) -> None:
        headers, limits = self._headers, self._limits
        self._num_head += len(name) + len(value) + 4
        if self._num_head > limits.max_head or len(headers) >= limits.max_headers:
            message = f"More than {limits.max_headers} headers, or {limits.max_head} bytes of them"
            raise _refusal(431, message, "head_too_large")
        if self._request is not None:
            return  # a trailer, which nobody asked for
        name = name.lower()
        if name not in headers:
            headers[name] = value
        elif name in _ONCE:
            raise _refusal(400, f"The header {name.decode()} is there twice", "bad_request")
        else:
            headers[name] += b", " + value

    def on_headers_complete(self) -> None:
        self._silent = 0
        version = self._parser.get_http_version()
        request = Request(self._parser.get_method(), self._url, self._headers, version == "1.1")
        self._check(request, version)
        request.target = request.target.partition(b"?")[0]
        self._request = request
        expectation = self._headers.get(b"expect")
        if expectation is not None and expectation.lower() != b"100-continue":
            raise _refusal(417, "Of expectations only 100-continue is met", "expectation_failed")
        self._refusal = self._owner.head_ended(
            request, expects_continue=expectation is not None and request.http_1_1
        )

    def on_body(self, part: bytes) -> None:
        self._silent = 0
        if self._refusal is not None:
            return
        self._num_body += len(part)
        self._budget.held += len(part)
        if self._num_body > self._limits.max_body:
            raise _refusal(413, f"The body is longer than {self._limits.max_body} bytes", "body_too_large")
        if self._budget.held > self._budget.limit:
            raise Refusal(error_reply(429, "Too many large requests at once", "overloaded", retry_after_s=1))
        if not self._body:
            self._body = part
        elif isinstance(self._body, bytearray):
            self._body += part
        else:
            self._body = bytearray(self._body + part)

    def on_message_complete(self) -> None:
        request = self._request
        assert request is not None, "its head has ended"
        self._silent = 0
        request.keep_alive = self._parser.should_keep_alive()  # true only in this very callback
        request.body, refusal = bytes(self._body), self._refusal
        self._clear()  # from here on all of it is the request's
        self.in_message = False
        if refusal is None:
            self._last = request
        self._owner.request_ended(request, refusal)

    def _check(self, request: Request, version: str) -> None:
        """What llhttp lets pass."""
        headers = request.headers
        if version not in ("1.1", "1.0"):
            raise _refusal(505, "Only HTTP/1.1 and HTTP/1.0 are served here", "http_version")
        if self._parser.should_upgrade() or request.method == b"CONNECT":
            raise _refusal(501, "Neither CONNECT nor an upgrade is served here", "not_implemented")
        if not request.target.startswith(b"/") or request.target.startswith(b"//"):
            raise _refusal(400, "The request target must be a path with one slash in front", "bad_request")
        if request.http_1_1 and b"host" not in headers:
            raise _refusal(400, "There is no Host header", "bad_request")
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (coding.lower() != b"chunked" or not request.http_1_1):
            raise _refusal(501, "The only transfer encoding here is chunked, in HTTP/1.1", "not_implemented")
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._limits.max_body:
            raise _refusal(413, f"The body is longer than {self._limits.max_body} bytes", "body_too_large")


def _refusal(status: int, message: str, code: str) -> Refusal:
    return Refusal(error_reply(status, message, code, closes=True))
