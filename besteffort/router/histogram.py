"""A histogram that is quick to add to, and only added up when Prometheus asks."""

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(map(float, bounds))  # a comparison with an integer takes twice as long
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def is_empty(self) -> bool:
        return not any(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """As prometheus_client takes them: upper bounds, and how many values are at most that."""
        names = [*(str(bound) for bound in self._bounds), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))
