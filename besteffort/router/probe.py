"""A question of our own to an engine: is it well, and does it answer?"""

import json
from collections.abc import Callable, Sequence

from besteffort.router.loads import Standing
from besteffort.router.message import AnswerHead
from besteffort.router.upstream import Fault, Upstream


def health_question(upstream: Upstream) -> bytes:
    return b"GET %b/health HTTP/1.1\r\nhost: %b\r\n\r\n" % (upstream.base_path, upstream.authority)


def token_question(upstream: Upstream, served_name: str) -> bytes:
    """As `serve` asks it of every engine before it gives requests to it."""
    body = json.dumps({"model": served_name, "prompt": [100], "max_tokens": 1}).encode()
    head = (
        b"POST %b/v1/completions HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n"
    )
    return head % (upstream.base_path, upstream.authority, len(body)) + body


class Probe:
    """Asks at once; `hear` is called once with what the answer says, but never after `cancel`.

    Up is an engine that gives a whole answer below 500 within `wait_s`: one that has no such path is there
    too. Out is one that hangs. None says that it could not be asked, for want of something here.
    """

    def __init__(
        self, upstream: Upstream, question: bytes, wait_s: float, hear: Callable[[Standing | None], None]
    ) -> None:
        self._hear = hear
        self._status = 0
        self._question = question
        self._call = upstream.send(self)
        self._timer = upstream.loop.call_later(wait_s, self._give_up)

    def cancel(self) -> None:
        self._timer.cancel()
        self._call.cancel()

    def _give_up(self) -> None:
        self._call.cancel()
        self._hear(Standing.OUT)

    # What the engine's connection asks and says: see `Sink`.

    def request(self, upstream: Upstream) -> Sequence[bytes]:
        return [self._question]

    def on_head(self, head: AnswerHead, length: int | None) -> None:
        self._status = head.status

    def on_body(self, data: bytes) -> None:
        pass

    def on_batch(self) -> None:
        pass

    def on_end(self) -> None:
        self._timer.cancel()
        self._hear(Standing.UP if self._status < 500 else Standing.UNWELL)

    def on_answer(self, head: AnswerHead, body: bytes) -> None:
        self._status = head.status
        self.on_end()

    def on_crash(self) -> None:
        self._timer.cancel()
        self._hear(Standing.UNWELL)

    def on_fault(self, fault: Fault) -> None:
        self._timer.cancel()
        if fault.is_lack:
            self._hear(None)
        else:
            self._hear(Standing.OUT if fault.hangs else Standing.UNWELL)
