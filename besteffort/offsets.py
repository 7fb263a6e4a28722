"""What is added to a Q-network's values, by task and arrival rate, without another kind of network.

Units that carry the task and pieces of the logarithm of the rate go through both hidden layers as they
are; what they add to each model's value is free. With nothing added the network is as it was.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.observation import FleetEncoding
from besteffort.q_network import QNetwork

# Of the paper's rates per second, where the slope may change; the first is below all of them.
BENDS_PER_S = (0.2, 1.7, 6.0, 13.0, 30.0)
_GATE = 20.0  # more than any logarithm: it shuts the units of the other tasks


@dataclass(frozen=True)
class Offsets:
    """Room for offsets around one network."""

    network: QNetwork  # with two hidden layers
    encoding: FleetEncoding

    @property
    def num_units(self) -> int:
        return self.encoding.num_tasks * (1 + len(BENDS_PER_S))

    @property
    def size(self) -> int:
        """How many numbers are free: the smallest model's value is left alone."""
        return self.num_units * (self.encoding.num_models - 1)

    def added(self, offsets: NDArray[np.float64]) -> QNetwork:
        """The network with these `size` offsets, in units of its own values."""
        weights, biases = self.network.weights, self.network.biases
        units, unit_biases = self._units()
        last = offsets.reshape(self.num_units, -1).astype(np.float32)
        through = np.eye(self.num_units, dtype=np.float32)
        hidden = weights[1].shape
        apart = np.zeros((hidden[0], self.num_units), dtype=np.float32)
        second = np.block([[weights[1], apart], [np.zeros((self.num_units, hidden[1]), np.float32), through]])
        return QNetwork(
            weights=(
                np.concatenate([weights[0], units], axis=1),
                np.ascontiguousarray(second, dtype=np.float32),
                np.concatenate([weights[2], np.pad(last, ((0, 0), (1, 0)))]),
            ),
            biases=(
                np.concatenate([biases[0], unit_biases]),
                np.concatenate([biases[1], np.zeros(self.num_units, dtype=np.float32)]),
                biases[2],
            ),
        )

    @classmethod
    def split(cls, network: QNetwork, encoding: FleetEncoding) -> tuple[QNetwork, NDArray[np.float64]]:
        """What `added` made of a network and its offsets: so it does not grow with each training.

        A network without such units is returned as it is, with `size` offsets of zero.
        """
        room = cls(network, encoding)
        if not room._has_units():
            return network, np.zeros(room.size)
        core = -room.num_units
        weights, biases = network.weights, network.biases
        own = (weights[0][:, :core], weights[1][:core, :core], weights[2][:core])
        last = weights[2][core:, 1:].astype(np.float64)
        return (
            QNetwork(tuple(weight.copy() for weight in own), (biases[0][:core], biases[1][:core], biases[2])),
            last.ravel(),
        )

    def _has_units(self) -> bool:
        weights, biases = self.network.weights, self.network.biases
        units, unit_biases = self._units()
        core = -self.num_units
        if len(weights[0][0]) <= self.num_units or len(weights[1][0]) <= self.num_units:
            return False
        through = np.eye(self.num_units, dtype=np.float32)
        return bool(
            np.array_equal(weights[0][:, core:], units)
            and np.array_equal(biases[0][core:], unit_biases)
            and np.array_equal(weights[1][core:, core:], through)
            and not weights[1][:core, core:].any()
            and not weights[1][core:, :core].any()
            and not biases[1][core:].any()
            and not weights[2][core:, 0].any()
        )

    def _units(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """First-layer weights `(I, U)` and biases `(U,)`: for each task a constant and hinges."""
        encoding, num_rates = self.encoding, 1 + len(self.encoding.spans_s)
        # Of the middle span: long enough to be steady, short enough to follow.
        rate = encoding.num_fleet_inputs + encoding.num_tasks + num_rates + 1 + len(encoding.spans_s) // 2
        units = np.zeros((encoding.size, self.num_units), dtype=np.float32)
        biases = np.zeros(self.num_units, dtype=np.float32)
        unit = 0
        for task in range(encoding.num_tasks):
            units[encoding.num_fleet_inputs + task, unit] = 1.0
            for bend_per_s in BENDS_PER_S:
                unit += 1
                units[rate, unit] = 1.0
                units[encoding.num_fleet_inputs + task, unit] = _GATE
                biases[unit] = -_GATE - 0.5 * np.log(bend_per_s + 0.1)
            unit += 1
        return units, biases
