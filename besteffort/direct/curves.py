"""How full each model may be for each task: curves over the arrival rate.

A request goes to the largest model whose batch size is under its curve. A curve is a line from knot to knot,
in the logarithms of rate and batch size. While the fleet is calm, by a long look and by a short one, each
task has a threshold of its own instead: to wait and see costs nothing then.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from besteffort.thresholds import ThresholdTable

# The paper's requests per second, times the fleet's `rate_scale`: close where queues begin to build up.
KNOTS_PER_S = (0.6, 2.1, 3.5, 5.0, 7.0, 10.0, 14.0, 19.0, 25.0, 32.0, 40.0, 48.0)
# Below which the search begins to call a fleet calm, by the long look and by the short one.
CALM_BELOW_PER_S = (3.4, 4.8)
BINS_PER_KNOT = 12  # in which a search reads the curves; the network reads them as they are
NO_RATE = -10.0  # below every logarithm of a rate
NEVER = -0.5  # a level at which a model is not used
Levels = NDArray[np.float64]  # log2(1 + batch size); below 0 a model is never used


def log_rate(rate_per_s: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """As `FleetEncoding` gives rates to a network, of the paper's rates per second."""
    return np.asarray(0.5 * np.log(np.asarray(rate_per_s) + 0.1))


LOG_KNOTS = log_rate(np.array(KNOTS_PER_S))


@dataclass(frozen=True)
class ThresholdCurves:
    """`K` knots, `T` tasks, and the models 1 to M - 1."""

    levels: Levels  # (K, T, M - 1)
    calm_levels: Levels  # (T, M - 1)
    calm_below: NDArray[np.float64]  # (2,) logarithms of rates: the long look's and the short one's
    highest: Levels  # (M - 1,) no curve is above; a batch that is larger is late whatever the rate

    @classmethod
    def starting_from(cls, levels: Levels, caps: NDArray[np.float64]) -> "ThresholdCurves":
        """The largest model takes all while the fleet is calm; `caps` `(M - 1,)` are the largest batches."""
        calm = np.full(levels.shape[1:], NEVER)
        calm[:, -1:] = np.log2(1.0 + caps[-1:])
        return cls(levels, calm, log_rate(np.array(CALM_BELOW_PER_S)), np.log2(1.0 + caps))

    def without_calm(self) -> "ThresholdCurves":
        """No rate is low enough."""
        return replace(self, calm_below=np.full(2, NO_RATE))

    def piece(self, index: int) -> NDArray[np.float64]:
        """What a search of one piece begins with, `(n,)`."""
        if index < len(self.levels):
            return np.array(self.levels[index].ravel())
        if index == len(self.levels):
            return np.concatenate([self.calm_levels.ravel(), 4.0 * self.calm_below])
        return np.asarray(4.0 * self.highest)

    def alternatives(self, index: int) -> list[NDArray[np.float64]]:
        """The piece as it is, and for a knot what its neighbours are."""
        near = (index - 1, index + 1) if index < len(self.levels) else ()
        return [self.piece(index), *(self.piece(knot) for knot in near if 0 <= knot < len(self.levels))]

    def with_piece(self, index: int, point: NDArray[np.float64]) -> "ThresholdCurves":
        if index < len(self.levels):
            levels = self.levels.copy()
            levels[index] = point.reshape(levels[index].shape)
            return replace(self, levels=levels)
        if index > len(self.levels):
            return replace(self, highest=point / 4.0)
        calm_levels, calm_below = point[:-2].reshape(self.calm_levels.shape), point[-2:] / 4.0
        return replace(self, calm_levels=calm_levels, calm_below=calm_below)

    def clipped(self, caps: NDArray[np.float64]) -> "ThresholdCurves":
        """No level above the highest or the largest batch of its model, none further below 0 than `NEVER`."""
        largest = np.log2(1.0 + caps)
        highest = np.minimum(self.highest, largest)
        return replace(
            self,
            levels=np.clip(self.levels, NEVER, highest),
            calm_levels=np.clip(self.calm_levels, NEVER, largest),
            highest=highest,
        )

    def towards(self, other: "ThresholdCurves", share: float) -> "ThresholdCurves":
        """So far on the way to others; `1 / n` adds an `n`th one to a mean."""
        parts = (
            (1.0 - share) * getattr(self, part.name) + share * getattr(other, part.name)
            for part in fields(self)
        )
        return ThresholdCurves(*parts)

    def bins(
        self, log_rates: NDArray[np.float64], looks: tuple[NDArray[np.float64], NDArray[np.float64]]
    ) -> NDArray[np.int64]:
        """Which of `bin_levels` holds at each request, in the shape of `log_rates` and of both `looks`."""
        edges = _bin_edges()
        calm = (looks[0] < self.calm_below[0]) & (looks[1] < self.calm_below[1])
        return np.where(calm, len(edges) + 1, np.searchsorted(edges, log_rates))

    @property
    def bin_levels(self) -> Levels:
        """Shape `(B, T, M - 1)`; the last bin is the calm fleet."""
        edges = _bin_edges()
        middles = np.concatenate([edges[:1], 0.5 * (edges[1:] + edges[:-1]), edges[-1:]])
        flat = self.levels.reshape(len(LOG_KNOTS), -1)
        columns = [np.interp(middles, LOG_KNOTS, column) for column in flat.T]
        of_bins = np.stack(columns, axis=1) if columns else np.zeros((len(middles), 0))
        return np.concatenate([of_bins.reshape(len(middles), *self.levels.shape[1:]), self.calm_levels[None]])

    def rows(self) -> NDArray[np.float64]:
        """Largest batch sizes, `(B * T, M - 1)`: row `bin * T + task`."""
        levels = self.bin_levels
        sizes = np.where(levels < 0, -1.0, np.exp2(levels) - 1.0)
        return np.ascontiguousarray(sizes.reshape(len(levels) * levels.shape[1], levels.shape[2]))


def levels_of_table(table: ThresholdTable, rate_scale: float) -> Levels:
    """What tuned thresholds say at each knot, `(K, T, M - 1)`."""
    sizes = np.moveaxis(table.max_batch_size[:, table.bands(np.array(KNOTS_PER_S) * rate_scale)], 1, 0)
    return np.where(sizes < 0, NEVER, np.log2(1.0 + np.maximum(sizes, 0.0)))


def _bin_edges() -> NDArray[np.float64]:
    places = np.arange((len(LOG_KNOTS) - 1) * BINS_PER_KNOT + 1) / BINS_PER_KNOT
    return np.interp(places, np.arange(len(LOG_KNOTS)), LOG_KNOTS)
