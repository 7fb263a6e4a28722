"""How many tokens an answer held, from its bytes, without decoding any of its JSON.

Inside a JSON string a quote is written `\\"`, so the patterns below, which hold bare quotes, only fit keys.
"""

import re
from typing import ClassVar, Protocol

import msgspec

# Patterns are bounded, so that no answer can make them hold on to more than this.
_USAGE = re.compile(rb'"completion_tokens"\s{0,64}:\s{0,64}(\d{1,18})\s{0,64}[,}]')
_USAGE_KEY = b'"completion_tokens"'
_OVERLAP = 256  # at least the longest match
_CHOICE = re.compile(rb'"choices"[ \t]{0,64}:[ \t]{0,64}\[[ \t]{0,64}\{')
_ROLE = re.compile(rb'"role"[ \t]{0,64}:')
_CONTENT = re.compile(rb'"(?:content|reasoning_content|reasoning|arguments)"[ \t]{0,64}:[ \t]{0,64}"[^"]')
_ROLE_KEY = b'"role"'
_ERROR_KEY = b'{"error"'
_ERROR = re.compile(rb'^data: ?\{"error"[ \t]{0,64}:', re.MULTILINE)
_MAX_EVENT = 1024 * 1024  # a longer one is passed on, but not looked at


class TokenCount(Protocol):
    """Fed with an answer's bytes as they pass; `total` is right once all have passed.

    `failed`: in the midst of a stream there was an error.
    """

    @property
    def failed(self) -> bool: ...

    def feed(self, data: bytes) -> None: ...

    @property
    def total(self) -> int: ...


class PlainCount(msgspec.Struct):
    """Of an answer that comes whole: what it states as its usage; 0 if it does not."""

    failed: ClassVar[bool] = False
    _tail: bytes = b""
    total: int = 0

    def feed(self, data: bytes) -> None:
        if self._tail:
            data = self._tail + data
        stated = stated_tokens(data)
        if stated is not None:
            self.total = stated
        self._tail = data[-_OVERLAP:]


def stated_tokens(data: bytes) -> int | None:
    """What an answer, or a part of it, states last as its usage."""
    at = data.rfind(_USAGE_KEY)
    while at >= 0:
        match = _USAGE.match(data, at)
        if match is not None:
            return int(match[1])
        at = data.rfind(_USAGE_KEY, 0, at)
    return None


class StreamCount:
    """Of server-sent events: the usage that the last one states, else how many brought a choice.

    An engine sends one event a token for each choice, and in a chat one with the role before them.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._num_events = 0
        self._usage: int | None = None
        self._too_long = False
        self.failed = False

    @property
    def total(self) -> int:
        return self._num_events if self._usage is None else self._usage

    def feed(self, data: bytes) -> None:
        end = data.rfind(b"\n") + 1
        if not end:
            self._keep(data)
            return
        lines = data[:end]
        if self._tail or self._too_long:
            lines = self._completed(lines)
        self._keep(data[end:])
        self._count(lines)

    def _keep(self, rest: bytes) -> None:
        self._tail += rest
        if len(self._tail) > _MAX_EVENT:
            self._tail = b""
            self._too_long = True

    def _completed(self, lines: bytes) -> bytes:
        first, _, others = lines.partition(b"\n")
        whole = self._tail + first
        skipped = self._too_long
        self._tail, self._too_long = b"", False
        return others if skipped else whole + b"\n" + others

    def _count(self, lines: bytes) -> None:
        # `in` takes ten times as long: it tries whether the bytes are a number before.
        if lines.find(_ERROR_KEY) >= 0 and _ERROR.search(lines) is not None:
            self.failed = True
        if lines.find(_USAGE_KEY) >= 0 and (found := _USAGE.findall(lines)):
            self._usage = int(found[-1])
        if lines.find(_ROLE_KEY) >= 0:
            self._num_events += sum(map(_brings_a_token, lines.split(b"\n")))
        else:
            self._num_events += len(_CHOICE.findall(lines))


def _brings_a_token(line: bytes) -> bool:
    if _CHOICE.search(line) is None:
        return False
    return _ROLE.search(line) is None or _CONTENT.search(line) is not None
