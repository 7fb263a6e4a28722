"""What a client is told of its request: who answers it, by when, at which price, and how it came out."""

import json
import re
import time
from dataclasses import dataclass
from functools import lru_cache

from besteffort.router.dispatcher import Dispatcher, Route
from besteffort.router.message import header_lines

DEADLINE_HEADER = "x-besteffort-deadline-ms-per-token"
RECEIPT_HEADER = "x-besteffort-receipt"
STREAMED = b"stream"  # that header's only value

_NUM_KEPT = 4096  # heads of answers, less than 1 KiB each

_DONE = re.compile(rb"^data: ?\[DONE\]", re.MULTILINE)
_DONE_AS_WRITTEN = (b"data: [DONE]", b"data:[DONE]")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an answer came out. Without a token count nothing can be said of its latency."""

    num_tokens: int
    ttft_ms: float
    latency_ms_per_token: float | None


class Receipts:
    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        # Kept, since the same few replicas answer with the same few batch sizes.
        self._lines = lru_cache(_NUM_KEPT)(self._make_lines)

    def lines(self, route: Route, deadline_ms_per_token: float) -> bytes:
        """The headers of an answer, which say all that is known before it comes."""
        predicted = route.predicted_ms_per_token
        return self._lines(
            route.task, route.model, route.replica, route.policy, deadline_ms_per_token, predicted
        )

    def _make_lines(
        self,
        task: int,
        model: int,
        replica: int,
        policy: str,
        deadline_ms_per_token: float,
        predicted_ms_per_token: float | None,
    ) -> bytes:
        facts = {
            **self._facts(task, model, replica, policy),
            "deadline_ms_per_token": deadline_ms_per_token,
            "predicted_latency_ms_per_token": _rounded(predicted_ms_per_token),
        }
        return header_lines(
            (b"x-besteffort-" + name.replace("_", "-").encode(), _written(value))
            for name, value in facts.items()
            if value is not None
        )

    def event(
        self,
        route: Route,
        deadline_ms_per_token: float,
        outcome: Outcome,
        *,
        request_id: bytes,
        is_chat: bool,
    ) -> bytes:
        """The same and the outcome, as an event without a choice: clients know such from `include_usage`."""
        latency = outcome.latency_ms_per_token
        receipt = {
            **self._facts(route.task, route.model, route.replica, route.policy),
            "deadline_ms_per_token": deadline_ms_per_token,
            "predicted_latency_ms_per_token": _rounded(route.predicted_ms_per_token),
            "latency_ms_per_token": _rounded(latency),
            "deadline_met": None if latency is None else latency <= deadline_ms_per_token,
            "ttft_ms": _rounded(outcome.ttft_ms),
            "num_tokens": outcome.num_tokens,
        }
        event: dict[str, object] = {
            "id": request_id.decode(),
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": receipt["model"],
            "choices": [],
            "besteffort": receipt,
        }
        return b"data: " + json.dumps(event).encode() + b"\n\n"

    def _facts(self, task: int, model: int, replica: int, policy: str) -> dict[str, str | int | float | None]:
        fleet = self._dispatcher.fleet
        forecast = self._dispatcher.forecast
        given_up = None if forecast is None else forecast.utility_given_up(task, model)
        return {
            "model": fleet.model_names[model],
            "replica": replica,
            "task": fleet.task_names[task],
            "policy": policy,
            "utility_given_up": _rounded(given_up),
        }


class StreamEnd:
    """Finds the place before `data: [DONE]`, in a stream that comes in parts, cut anywhere."""

    def __init__(self) -> None:
        self._held = b""
        self._at_start_of_line = True

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What goes before that place, and, once it has come, what goes after; nothing is to be fed then."""
        data = self.rest() + data
        if (found := _DONE.search(data, 0 if self._at_start_of_line else 1)) is not None:
            return data[: found.start()], data[found.start() :]
        start = data.rfind(b"\n") + 1
        line = data[start:]
        is_whole = start > 0 or self._at_start_of_line
        if is_whole and any(done.startswith(line) for done in _DONE_AS_WRITTEN):
            self._held, self._at_start_of_line = line, True
            return data[:start], b""
        self._at_start_of_line = False
        return data, b""

    def rest(self) -> bytes:
        """What was held back, since it may begin the last event."""
        held, self._held = self._held, b""
        return held


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _written(value: str | float) -> bytes:
    return (value if isinstance(value, str) else f"{value:g}").encode()
