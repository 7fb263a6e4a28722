"""The Q-network as the router runs it: a small MLP, microseconds per decision, no torch."""

import itertools
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class QNetwork:
    """An MLP with ReLU between its layers (paper, Sec. 3.2: two hidden layers of 256)."""

    weights: tuple[NDArray[np.float32], ...]  # each (inputs, outputs)
    biases: tuple[NDArray[np.float32], ...]  # each (outputs,)

    def __post_init__(self) -> None:
        sizes = [layer.shape for layer in self.weights]
        chained = all(a[1] == b[0] for a, b in itertools.pairwise(sizes))
        paired = [bias.shape for bias in self.biases] == [(size[1],) for size in sizes]
        if not sizes or not chained or not paired:
            raise ValueError(f"layers do not fit together: weights {sizes}")

    @property
    def num_inputs(self) -> int:
        return int(self.weights[0].shape[0])

    @property
    def num_outputs(self) -> int:
        return int(self.weights[-1].shape[1])

    def __call__(self, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        """Q-values, shape `(N, M)`, for inputs of shape `(N, T + M + 1)`."""
        hidden = inputs
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = np.maximum(hidden @ weight + bias, 0.0)
        q_values: NDArray[np.float32] = hidden @ self.weights[-1] + self.biases[-1]
        return q_values


class Decider:
    """The same network for one input at a time, compiled: a fraction of numpy's time, and in one call.

    Values are those of `QNetwork` to float32 rounding, since sums run in another order. Not for several
    threads. Compiled when it is made, and not when it is first called.
    """

    def __init__(self, network: QNetwork) -> None:
        # One array for all layers: each argument of a compiled function costs time.
        pairs = zip(network.weights, network.biases, strict=True)
        layers = [np.ravel(part) for pair in pairs for part in pair]
        self._parameters = np.concatenate(layers, dtype=np.float32)
        self._sizes = np.array([network.num_inputs, *(len(bias) for bias in network.biases)])
        self._values = np.zeros(self._sizes.sum(), dtype=np.float32)
        self.inputs = self._values[: network.num_inputs]
        """(I,) to be written before each call"""
        self.q_values = self._values[-network.num_outputs :]
        """(M,) of the last call"""
        self()

    def __call__(self) -> NDArray[np.float32]:
        """Q-values `(M,)` of `inputs`, good until the next call."""
        _feed(self._sizes, self._parameters, self._values)
        return self.q_values


@njit(cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _feed(sizes: NDArray[np.int64], parameters: NDArray[np.float32], values: NDArray[np.float32]) -> None:
    """Inner loops run along rows, so that they are vectorised; half of the hidden values are 0."""
    last = len(sizes) - 2
    read, written = 0, 0
    for layer in range(last + 1):
        num_given, num_taken = sizes[layer], sizes[layer + 1]
        given = values[written : written + num_given]
        written += num_given
        taken = values[written : written + num_taken]
        weight = parameters[read : read + num_given * num_taken].reshape(num_given, num_taken)
        read += num_given * num_taken
        taken[:] = parameters[read : read + num_taken]
        read += num_taken
        for i in range(num_given):
            value = given[i]
            if value != 0.0:
                for j in range(num_taken):
                    taken[j] += value * weight[i, j]
        if layer < last:
            for j in range(num_taken):
                taken[j] = max(taken[j], np.float32(0.0))
