"""The arrival rate as the router sees it: a running average over the last 5 arrivals (paper, App. B).

Once for a whole trace, for the simulator, and once as arrivals come, for the router; the two agree.
"""

from collections import deque
from collections.abc import Sequence
from math import exp

import numpy as np
from numba import njit
from numpy.typing import NDArray

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
        self._spans_s = np.array(spans_s, dtype=np.float64)
        self._counts = np.zeros(len(self._spans_s))
        self._rates_per_s = np.zeros(len(self._spans_s))
        self._last_at = 0.0
        _count_arrival(self._counts, self._rates_per_s, self._spans_s, np.inf)  # compiled now
        self._counts[:] = 0.0

    def observe(self, arrived_at: float) -> NDArray[np.float64]:
        """Note an arrival (seconds, not before the last one).

        Returns:
            One rate per second for each span, `(S,)`, good until the next call.
        """
        elapsed_s, self._last_at = arrived_at - self._last_at, arrived_at
        _count_arrival(self._counts, self._rates_per_s, self._spans_s, elapsed_s)
        return self._rates_per_s

    def remember(self, arrived_at: NDArray[np.float64]) -> None:
        """Begin as if these arrivals, `(N,)` seconds, had been observed, and none before; at least one."""
        self._last_at = float(arrived_at[-1])
        ages_s = self._last_at - arrived_at
        self._counts[:] = [np.exp(-ages_s / span_s).sum() for span_s in self._spans_s]


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _count_arrival(
    counts: NDArray[np.float64],
    rates_per_s: NDArray[np.float64],
    spans_s: NDArray[np.float64],
    elapsed_s: float,
) -> None:
    for nth in range(len(counts)):
        counts[nth] = counts[nth] * exp(-elapsed_s / spans_s[nth]) + 1.0
        rates_per_s[nth] = counts[nth] / spans_s[nth]


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
        span_s = arrived_at - self._arrived_at[0]
        return num_gaps / max(span_s, num_gaps / MAX_RATE_PER_S)
