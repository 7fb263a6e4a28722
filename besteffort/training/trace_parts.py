"""A trace to train on, cut in three: for training, for choosing the best network, and held out."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.request import Requests

# Of the requests, in order of arrival.
CHOSEN_FROM, HELD_OUT_FROM = 0.7, 0.8
MIN_NUM_REQUESTS = 1000  # so that 200 are held out
MIN_LIVES = 20.0  # of a request: shorter parts would end before they fill the fleet


@dataclass(frozen=True)
class TracePart:
    """Consecutive requests of a trace. After the last comes the first again: no piece is too long."""

    requests: Requests  # the first arrives at 0
    period_s: float  # until the first arrives again

    @classmethod
    def of(cls, requests: Requests, first: int, end: int) -> "TracePart":
        own = _rows(requests, np.arange(first, end))
        at = own.arrived_at - own.arrived_at[0]
        return cls(_at(own, at), float(at[-1]) * len(own) / max(1, len(own) - 1))

    def __len__(self) -> int:
        return len(self.requests)

    def from_request(self, first: int, num_requests: int, speed: float = 1.0) -> Requests:
        """So many from a request on, which arrives at 0; at `speed` 2 twice as many come in a second."""
        return self._piece(np.arange(first, first + num_requests), None, speed)

    def from_second(self, first_s: float, duration_s: float, speed: float = 1.0) -> Requests:
        """What arrives in `duration_s` from an instant on, which becomes 0; there may be nothing."""
        ends = [self._count_before(instant) for instant in (first_s, first_s + duration_s * speed)]
        return self._piece(np.arange(*ends), first_s, speed)

    def cut(self, num_pieces: int) -> list[Requests]:
        """All of it, in pieces of about one length."""
        edges = np.linspace(0, len(self), num_pieces + 1).astype(int)
        return [self.from_request(first, end - first) for first, end in itertools.pairwise(edges.tolist())]

    def _count_before(self, instant_s: float) -> int:
        rounds, rest_s = divmod(instant_s, self.period_s)
        return int(rounds) * len(self) + int(np.searchsorted(self.requests.arrived_at, rest_s))

    def _piece(self, places: NDArray[np.int64], first_s: float | None, speed: float) -> Requests:
        rounds, rows = np.divmod(places, len(self))
        drawn = _rows(self.requests, rows)
        at = drawn.arrived_at + rounds * self.period_s
        begin_s = at[0] if first_s is None else first_s
        return _at(drawn, np.maximum(at - begin_s, 0.0) / speed)


@dataclass(frozen=True)
class TrainingTrace:
    name: str
    trained_on: TracePart
    chosen_on: TracePart
    held_out: TracePart

    @classmethod
    def of(cls, name: str, requests: Requests, fleet: Fleet) -> "TrainingTrace":
        """Cut a trace of this fleet.

        Raises:
            TraceError: it has too few requests, or lasts too short a time.
        """
        num_requests = len(requests)
        if num_requests < MIN_NUM_REQUESTS:
            raise TraceError(
                f"{name}: it holds {num_requests} requests, and training on a trace takes {MIN_NUM_REQUESTS} "
                "or more: give a longer one, or train without it"
            )
        lasts_s, needed_s = float(np.ptp(requests.arrived_at)), MIN_LIVES * fleet.request_life_s
        if lasts_s < needed_s:
            raise TraceError(
                f"{name}: it lasts {lasts_s:.3g} s, and training on a trace takes {needed_s:.3g} s or more, "
                f"{MIN_LIVES:g} times the longest time that a request of fleet {fleet.name!r} may take: "
                "give a longer one, or train without it"
            )
        edges = [0, int(CHOSEN_FROM * num_requests), int(HELD_OUT_FROM * num_requests), num_requests]
        parts = [TracePart.of(requests, first, end) for first, end in itertools.pairwise(edges)]
        if min(part.period_s for part in parts) <= 0:
            raise TraceError(
                f"{name}: a whole part of it arrives at one instant, so that no rate can be learned from it: "
                "give another one, or train without it"
            )
        return cls(name, *parts)


def _rows(requests: Requests, rows: NDArray[np.int64]) -> Requests:
    return Requests(
        requests.arrived_at[rows],
        requests.task[rows],
        requests.num_prompt_tokens[rows],
        requests.num_output_tokens[rows],
    )


def _at(requests: Requests, arrived_at: NDArray[np.float64]) -> Requests:
    return Requests(arrived_at, requests.task, requests.num_prompt_tokens, requests.num_output_tokens)
