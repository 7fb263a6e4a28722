"""How soon there is room again."""

import math

_MAX_S = 60.0
_SMOOTHING = 32  # requests, about, whose time at the engines counts


class Turnover:
    """Of so many seats, all taken, one gets free each time that a request lives, divided by the seats."""

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._life_s = 0.0
        self._taken_until = 0.0  # by those who were told when to come again

    def ended(self, life_s: float) -> None:
        """A request had its seat for so long."""
        self._life_s += (life_s - self._life_s) / _SMOOTHING if self._life_s else life_s

    def retry_after_s(self, now_at: float) -> int:
        """When whoever is turned away now may find a seat, in whole seconds from 1 to 60.

        Each is told a seat of its own, the next one that is free, so that they do not all come at once.
        """
        free_at = max(self._taken_until, now_at) + self._life_s / self._num_seats
        self._taken_until = min(free_at, now_at + _MAX_S)
        return max(1, math.ceil(self._taken_until - now_at))
