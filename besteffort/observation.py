"""What a policy sees of the world, and how a network reads it: one place for training and serving.

The paper's state (Sec. 3.2): the task, the batch size at each model, the current arrival rate.
"""

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Observation:
    """The state at one arrival, before it is routed."""

    task: int
    batch_sizes: NDArray[np.float64]  # (M,) requests in flight per replica of each model, their mean
    arrival_rate_per_s: float


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

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
