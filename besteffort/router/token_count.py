"""How many tokens an answer held, from its bytes, without decoding every event of a stream."""

import json


class TokenCount:
    """Fed with an answer's bytes as they pass; `total` is right once all have passed.

    A stream counts its events that carry a choice (the engine sends one a token, and one with the
    role first in a chat); a plain answer states its count under `usage`.
    """

    def __init__(self, *, stream: bool, chat: bool) -> None:
        self._stream = stream
        self._num_events = -1 if chat else 0
        self._tail = b""

    def feed(self, chunk: bytes) -> None:
        if not self._stream:
            self._tail += chunk
            return
        *events, self._tail = (self._tail + chunk).split(b"\n\n")
        self._num_events += sum(b'"choices":[{' in event for event in events)

    @property
    def total(self) -> int:
        if self._stream:
            return max(0, self._num_events)
        try:
            return int(json.loads(self._tail)["usage"]["completion_tokens"])
        except (ValueError, KeyError, TypeError):
            return 0
