"""How full a model may be for a task to go there, by arrival rate: a small policy that can be read."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ThresholdTable:
    """A request goes to the largest model whose batch size is at most its threshold.

    The smallest model, index 0, has no threshold and takes what is left. A negative threshold is
    never met.
    """

    rate_edges_per_s: NDArray[np.float64]  # (B - 1,) rising; a band begins at its lower edge
    max_batch_size: NDArray[np.float64]  # (T, B, M - 1) of the models 1 to M - 1, mean per replica
    num_smoothed: int = 1  # arrivals over which the policy smooths the rate before it reads the table

    def __post_init__(self) -> None:
        if self.max_batch_size.ndim != 3 or self.max_batch_size.shape[1] != len(self.rate_edges_per_s) + 1:
            raise ValueError(
                f"thresholds of shape {self.max_batch_size.shape} for {len(self.rate_edges_per_s)} edges"
            )

    @property
    def num_bands(self) -> int:
        return int(self.max_batch_size.shape[1])

    def bands(self, arrival_rates_per_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """The band of each rate, shape `(N,)`."""
        return np.asarray(np.searchsorted(self.rate_edges_per_s, arrival_rates_per_s, side="right"))

    @property
    def rows(self) -> NDArray[np.float64]:
        """The table for compiled code, shape `(T * B, M - 1)`: row `task * B + band`."""
        num_tasks, num_bands, num_models = self.max_batch_size.shape
        return np.ascontiguousarray(self.max_batch_size.reshape(num_tasks * num_bands, num_models))

    def row_of(self, task: NDArray[np.int64], arrival_rates_per_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Which of `rows` each request goes by, shape `(N,)`."""
        return np.asarray(task * self.num_bands + self.bands(arrival_rates_per_s))

    def choose(self, task: int, batch_sizes: NDArray[np.float64], arrival_rate_per_s: float) -> int:
        """The model for one request; `batch_sizes` has shape `(M,)`."""
        band = int(np.searchsorted(self.rate_edges_per_s, arrival_rate_per_s, side="right"))
        fits = np.flatnonzero(batch_sizes[1:] <= self.max_batch_size[task, band])
        return int(fits[-1]) + 1 if len(fits) else 0


class RateSmoother:
    """Steadies the router's arrival rate, which jumps by half of itself from one arrival to the next.

    A running average of its logarithm, in which the latest of `num_arrivals` weighs one part: of the
    logarithm, since one long gap would otherwise hide a burst for long.
    """

    def __init__(self, num_arrivals: int) -> None:
        self._num_arrivals = num_arrivals
        self._num_seen = 0
        self._log_rate = 0.0

    def observe(self, arrival_rate_per_s: float) -> float:
        """Note the estimate at one more arrival and return the steadier one."""
        if arrival_rate_per_s <= 0:  # nothing is known at the very first arrival
            return arrival_rate_per_s
        self._num_seen = min(self._num_seen + 1, self._num_arrivals)
        self._log_rate += (math.log(arrival_rate_per_s) - self._log_rate) / self._num_seen
        return math.exp(self._log_rate)


def smoothed_rates_per_s(arrival_rates_per_s: NDArray[np.float64], num_arrivals: int) -> NDArray[np.float64]:
    """The same for a whole trace, shape `(N,)`."""
    smoother = RateSmoother(num_arrivals)
    return np.array([smoother.observe(rate) for rate in arrival_rates_per_s.tolist()], dtype=np.float64)
