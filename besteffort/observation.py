"""What a policy sees of the world, and how a network reads it: one place for training and serving.

The paper's state (Sec. 3.2): the task, the batch size at each model, the current arrival rate. Beside
it what the router knows as well: what surrounds the replica that a request would get, and the rate of
arrivals over longer spans.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec
import numpy as np
from numba import njit
from numpy.typing import NDArray


class Observation(msgspec.Struct):  # no dataclass: it would take twice as long to make
    """The state at one arrival, before it is routed.

    The router writes the next one into the same arrays: who keeps one has to copy them.
    """

    task: int
    batch_sizes: NDArray[np.float64]  # (M,) requests in flight per replica of each model, their mean
    arrival_rate_per_s: float
    arrived_at: float = 0.0  # s, by any clock that does not jump
    neighbours: NDArray[np.float64] | None = None
    """(M, M), row m: requests in flight around the replica that a request to model m would get: at that
    replica itself on the diagonal, else at each other model on its device"""
    closed: tuple[int, ...] = ()
    """Models of which no replica can take a request; a policy that knows a second choice passes them over"""
    deadline_ms_per_token: float | None = None
    """The request's own, for policies that predict; None: its task's, which is all that networks know"""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Turns observations into network inputs; part of a policy, so that both always agree.

    One-hot of the task, then batch sizes and arrival rate divided by a scale that brings them to
    about 1. Values past `CLIP` times the scale look alike to the network.
    """

    num_tasks: int
    num_models: int
    batch_scale: float  # requests
    rate_scale_per_s: float

    CLIP = 4.0

    @property
    def size(self) -> int:
        return self.num_tasks + self.num_models + 1

    def encode(
        self,
        tasks: NDArray[np.integer],  # (N,)
        batch_sizes: NDArray[np.floating],  # (N, M)
        arrival_rates_per_s: NDArray[np.floating],  # (N,)
    ) -> NDArray[np.float32]:
        """Network inputs, shape `(N, T + M + 1)`."""
        inputs = np.zeros((len(tasks), self.size), dtype=np.float32)
        inputs[np.arange(len(tasks)), tasks] = 1.0
        scaled = inputs[:, self.num_tasks :]
        scaled[:, :-1] = batch_sizes / self.batch_scale
        scaled[:, -1] = arrival_rates_per_s / self.rate_scale_per_s
        np.minimum(scaled, self.CLIP, out=scaled)
        return inputs

    def encode_one(self, seen: Observation, row: NDArray[np.float32]) -> None:
        """Write the row that `encode` gives for one observation, `(T + M + 1,)`, without a dozen calls."""
        scales = self.batch_scale, self.rate_scale_per_s, self.CLIP
        _write_paper_row(row, self.num_tasks, scales, seen.task, seen.batch_sizes, seen.arrival_rate_per_s)

    def to_dict(self) -> dict[str, Any]:
        return {"reads": "paper", **asdict(self)}


@dataclass(frozen=True, slots=True)
class FleetEncoding:
    """The paper's state, and around it the neighbours and the rates over several spans.

    First what tells of the fleet, then what tells of the request. Counts are there as logarithms too: one
    request more at an idle model matters as much as ten more at a busy one.
    """

    num_tasks: int
    num_models: int
    in_flight_scale: tuple[float, ...]  # (M,) requests per replica
    rate_scale_per_s: float
    spans_s: tuple[float, ...]  # of `RecentRates`

    CLIP = 4.0
    NUM_LEVELS = 24.0  # of rates: below `rate_scale_per_s` over this they hardly differ

    @property
    def num_fleet_inputs(self) -> int:
        return 2 * self.num_models + self.num_models**2

    @property
    def size(self) -> int:
        return self.num_fleet_inputs + self.num_tasks + 2 * (1 + len(self.spans_s))

    def encode_fleet(
        self, batch_sizes: NDArray[np.floating], neighbours: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """From shapes `(N, M)` and `(N, M, M)`; the simulator has a compiled twin of this."""
        linear = np.minimum(batch_sizes / np.array(self.in_flight_scale), self.CLIP)
        around = neighbours.reshape(len(neighbours), -1)
        parts = [linear, 0.5 * np.log1p(batch_sizes), 0.5 * np.log1p(around)]
        inputs: NDArray[np.float32] = np.concatenate(parts, axis=1, dtype=np.float32)
        return inputs

    def encode_request(
        self,
        tasks: NDArray[np.integer],  # (N,)
        arrival_rates_per_s: NDArray[np.floating],  # (N,)
        recent_rates_per_s: NDArray[np.floating],  # (N, S)
    ) -> NDArray[np.float32]:
        inputs = np.zeros((len(tasks), self.size - self.num_fleet_inputs), dtype=np.float32)
        inputs[np.arange(len(tasks)), tasks] = 1.0
        rates = np.concatenate([arrival_rates_per_s[:, None], recent_rates_per_s], axis=1)
        scaled = rates / self.rate_scale_per_s
        num_rates = scaled.shape[1]
        inputs[:, self.num_tasks : self.num_tasks + num_rates] = np.minimum(scaled, self.CLIP)
        levels = np.minimum(self.NUM_LEVELS * scaled, 1000.0)
        inputs[:, self.num_tasks + num_rates :] = 0.5 * np.log(levels + 0.1)
        return inputs

    @property
    def scales(self) -> NDArray[np.float64]:
        """For `kernels.write_fleet_row`, which writes a row as both methods above do, to rounding."""
        scales = self.CLIP, self.rate_scale_per_s, self.NUM_LEVELS
        return np.array([*scales, *self.in_flight_scale], dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        return {"reads": "fleet", **asdict(self)}


def encoding_from_dict(given: Mapping[str, Any]) -> Encoding | FleetEncoding:
    """What `to_dict` gave, through JSON.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    facts = dict(given)
    reads = facts.pop("reads")
    if reads == "paper":
        return Encoding(**facts)
    if reads == "fleet":
        scales, spans_s = (tuple(facts.pop(name)) for name in ("in_flight_scale", "spans_s"))
        return FleetEncoding(in_flight_scale=scales, spans_s=spans_s, **facts)
    raise ValueError(f"no encoding {reads!r}")


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _write_paper_row(
    row: NDArray[np.float32],
    num_tasks: int,
    scales: tuple[float, float, float],
    task: int,
    batch_sizes: NDArray[np.float64],
    rate_per_s: float,
) -> None:
    batch_scale, rate_scale_per_s, clip = scales
    row[:num_tasks] = 0.0
    row[task] = 1.0
    for model in range(len(batch_sizes)):
        row[num_tasks + model] = min(batch_sizes[model] / batch_scale, clip)
    row[num_tasks + len(batch_sizes)] = min(rate_per_s / rate_scale_per_s, clip)
