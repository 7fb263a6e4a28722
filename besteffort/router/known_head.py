"""A head that is written again and again, but for the length of what follows it.

Clients and engines write the same bytes before each body. A strict parser has to see them once.
"""

import re
from typing import Self

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(\d{1,9})\r\n")
_MAX_DIGITS = 9
_MAX_HEAD = 2048  # bytes; of longer ones too much would be kept, one for each connection


def is_to_be_kept(num_missed: int) -> bool:
    """Whether to try with the next head, after so many in a row that were not known: less and less often.

    There are clients whose heads never come again, and keeping one costs as much as half of parsing it.
    """
    return num_missed & (num_missed - 1) == 0


class KnownHead:
    """The bytes before and after that length, from a message that a parser took.

    Bytes that differ from these only in the digits between them are the same head to the parser, so that what
    it said of the first message it would say of this one.
    """

    __slots__ = ("_begin", "_last", "_num_after", "_num_head", "_stating")

    def __init__(self, before: bytes, after: bytes) -> None:
        self._stating = before.replace(b"%", b"%%") + b"%d" + after.replace(b"%", b"%%")
        self._begin = len(before)  # of the digits
        self._last = self._begin + _MAX_DIGITS + 1
        self._num_after = len(after)
        self._num_head = 0  # bytes, of the last one

    @classmethod
    def of(cls, message: bytes, max_head: int) -> Self | None:
        """None where these bytes are not one message with a stated length, or its head is a long one."""
        end = message.find(b"\r\n\r\n") + 4
        found = _LENGTH.search(message, 0, end)
        if found is None or end + _MAX_DIGITS > min(max_head, _MAX_HEAD):
            return None
        if len(message) - end != int(found[1]):
            return None
        return cls(message[: found.start(1)], message[found.end(1) : end])

    def body_in(self, message: bytes) -> bytes | None:
        """None where these bytes are not this head and a body of the length that it states, or are more."""
        num_head = self._num_head  # most lengths have as many digits as the last one
        num_body = len(message) - num_head
        if num_body < 0 or message[:num_head] != self._stating % num_body:
            num_head = message.find(b"\r", self._begin, self._last) + self._num_after
            if not message.startswith(self._stating % (len(message) - num_head)):
                return None
            self._num_head = num_head
        return message[num_head:]
