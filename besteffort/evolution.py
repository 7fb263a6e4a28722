"""CMA-ES (Hansen, arXiv 1604.00772, with its default constants): a search that needs no slopes."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

LARGEST_STEP = 2.0
SMALLEST_STEP = 0.02


class _Evolution:
    """CMA-ES that maximises over `n` real numbers."""

    def __init__(self, mean: NDArray[np.float64], step: float, rng: np.random.Generator) -> None:
        n = len(mean)
        self._mean, self._step, self._rng = mean, step, rng
        self._size = 4 + int(3 * np.log(n))
        num_parents = self._size // 2
        weights = np.log(num_parents + 0.5) - np.log(np.arange(1, num_parents + 1))
        self._weights = weights / weights.sum()
        effective = 1 / np.sum(self._weights**2)
        self._effective = effective
        self._path_rate = (4 + effective / n) / (n + 4 + 2 * effective / n)
        self._step_rate = (effective + 2) / (n + effective + 5)
        self._rank_one = 2 / ((n + 1.3) ** 2 + effective)
        rank_many = 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective)
        self._rank_many = min(1 - self._rank_one, rank_many)
        self._damping = 1 + 2 * max(0.0, np.sqrt((effective - 1) / (n + 1)) - 1) + self._step_rate
        self._expected = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self._covariance = np.eye(n)
        self._path, self._step_path = np.zeros(n), np.zeros(n)
        self._generation = 0

    @property
    def mean(self) -> NDArray[np.float64]:
        """Where it looks now, shape `(n,)`."""
        return self._mean

    @property
    def step(self) -> float:
        """How far it looks around."""
        return self._step

    def ask(self) -> NDArray[np.float64]:
        """The next candidates, shape `(P, n)`."""
        variances, self._axes = np.linalg.eigh(self._covariance)
        self._lengths = np.sqrt(np.maximum(variances, 1e-20))
        normal = self._rng.standard_normal((self._size, len(self._mean)))
        self._moves = (normal * self._lengths) @ self._axes.T
        return np.asarray(self._mean + self._step * self._moves)

    def tell(self, scores: NDArray[np.float64]) -> None:
        """What the candidates reached, shape `(P,)`."""
        parents = self._moves[np.argsort(-scores, kind="stable")[: len(self._weights)]]
        move = self._weights @ parents
        self._mean = self._mean + self._step * move
        self._generation += 1
        rate = self._step_rate
        white = self._axes @ ((self._axes.T @ move) / self._lengths)
        self._step_path = (1 - rate) * self._step_path + np.sqrt(rate * (2 - rate) * self._effective) * white
        length = np.linalg.norm(self._step_path)
        settled = length / np.sqrt(1 - (1 - rate) ** (2 * self._generation)) / self._expected
        self._adapt(parents, move, stalled=bool(settled > 1.4 + 2 / (len(move) + 1)))
        self._step *= float(np.exp(rate / self._damping * (length / self._expected - 1)))
        self._step = min(self._step, LARGEST_STEP)

    def _adapt(self, parents: NDArray[np.float64], move: NDArray[np.float64], stalled: bool) -> None:
        rate = self._path_rate
        self._path = (1 - rate) * self._path
        if not stalled:
            self._path = self._path + np.sqrt(rate * (2 - rate) * self._effective) * move
        kept = (1 - self._rank_one - self._rank_many) * self._covariance
        many = (parents.T * self._weights) @ parents
        self._covariance = kept + self._rank_one * np.outer(self._path, self._path) + self._rank_many * many


def settle(
    worth: Callable[[NDArray[np.float64]], float],
    start: NDArray[np.float64],
    num_generations: int,
    rng: np.random.Generator,
    *,
    step: float,
) -> tuple[NDArray[np.float64], float]:
    """Where the search settles, shape `(n,)`, and its worth; the start if that is worth more.

    The best of many points that are tried on one sample owes a part of its worth to chance; the middle of
    the good ones owes less.
    """
    if not len(start):
        return start, worth(start)
    evolution = _Evolution(start, step, rng)
    for _ in range(num_generations):
        evolution.tell(np.array([worth(point) for point in evolution.ask()]))
    settled, before = worth(evolution.mean), worth(start)
    return (evolution.mean, settled) if settled > before else (start, before)


def maximise(
    worth: Callable[[NDArray[np.float64]], float],
    start: NDArray[np.float64],
    num_generations: int,
    rng: np.random.Generator,
    *,
    step: float = 0.7,
    highest: float = np.inf,
    until: float = np.inf,
) -> tuple[NDArray[np.float64], float]:
    """The best point that is seen, shape `(n,)`, and its worth.

    The search ends early at the `highest` worth there can be, at the instant `until` of the monotonic
    clock, or when it has drawn together in one place.
    """
    best, best_worth = start, worth(start)
    evolution = _Evolution(start, step, rng)
    for _ in range(num_generations):
        if best_worth >= highest - 1e-12 or time.monotonic() >= until or evolution.step < SMALLEST_STEP:
            break
        points = evolution.ask()
        reached = np.array([worth(point) for point in points])
        evolution.tell(reached)
        if reached.max() > best_worth:
            best, best_worth = points[reached.argmax()], float(reached.max())
    return best, best_worth
