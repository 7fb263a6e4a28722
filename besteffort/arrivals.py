"""The arrival rate as the router sees it: a running average over the last 5 arrivals (paper, App. B).

Once for a whole trace, for the simulator, and once as arrivals come, for the router; the two agree.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from besteffort.kernels import count_arrival

NUM_GAPS = 5
# Real traces hold bursts with equal time stamps, whose rate has no bound; this is as fast as it gets.
MAX_RATE_PER_S = 10_000.0


def arrival_rates_per_s(arrived_at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The estimate at each arrival, itself included, shape `(N,)` for sorted times `(N,)` in seconds.

    The number of gaps between the last six arrivals over the time they span; fewer at the
    beginning, and 0 at the very first arrival, when nothing is known.
    """
    num_gaps = np.minimum(np.arange(len(arrived_at)), NUM_GAPS)
    span_s = arrived_at - arrived_at[np.arange(len(arrived_at)) - num_gaps]
    return np.asarray(num_gaps / np.maximum(span_s, np.maximum(num_gaps, 1) / MAX_RATE_PER_S))


class RecentRates:
    """Arrivals per second over several spans at once, older ones counting less and less."""

    def __init__(self, spans_s: Sequence[float]) -> None:
        self.spans = np.zeros((3, len(spans_s)))
        """As `count_arrival` takes them"""
        self.spans[0] = spans_s
        self._last_at = 0.0
        count_arrival(self.spans, np.inf)  # compiled now
        self.spans[1:] = 0.0

    def observe(self, arrived_at: float) -> NDArray[np.float64]:
        """Note an arrival (seconds, not before the last one).

        Returns:
            One rate per second for each span, `(S,)`, good until the next call.
        """
        count_arrival(self.spans, self.elapsed_s(arrived_at))
        rates_per_s: NDArray[np.float64] = self.spans[2]
        return rates_per_s

    def elapsed_s(self, arrived_at: float) -> float:
        """Since the last arrival; this one is the last from now on, and has to be counted."""
        elapsed_s, self._last_at = arrived_at - self._last_at, arrived_at
        return elapsed_s

    def remember(self, arrived_at: NDArray[np.float64]) -> None:
        """Begin as if these arrivals, `(N,)` seconds, had been observed, and none before; at least one."""
        self._last_at = float(arrived_at[-1])
        ages_s = self._last_at - arrived_at
        self.spans[1] = [np.exp(-ages_s / span_s).sum() for span_s in self.spans[0]]


def recent_rates_per_s(arrived_at: NDArray[np.float64], spans_s: Sequence[float]) -> NDArray[np.float64]:
    """The same for a whole trace, shape `(N, S)`."""
    rates = RecentRates(spans_s)
    return np.array([rates.observe(at).copy() for at in arrived_at.tolist()]).reshape(-1, len(spans_s))


class ArrivalRateEstimator:
    """The same estimate, one arrival at a time."""

    def __init__(self) -> None:
        self._arrived_at: deque[float] = deque(maxlen=NUM_GAPS + 1)

    def observe(self, arrived_at: float) -> float:
        """Note an arrival (seconds, not before the last one) and return the rate per second."""
        self._arrived_at.append(arrived_at)
        num_gaps = len(self._arrived_at) - 1
        if num_gaps == 0:
            return 0.0
        span_s, shortest_s = arrived_at - self._arrived_at[0], num_gaps / MAX_RATE_PER_S
        return num_gaps / (span_s if span_s > shortest_s else shortest_s)  # quicker than `max`
