"""The Q-network as the router runs it: a small MLP, microseconds per decision, no torch."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.kernels import feed


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
        self.parameters = np.concatenate(layers, dtype=np.float32)
        self.sizes = np.array([network.num_inputs, *(len(bias) for bias in network.biases)])
        self.values = np.zeros(self.sizes.sum(), dtype=np.float32)
        self.inputs = self.values[: network.num_inputs]
        """(I,) to be written before each call"""
        self.q_values = self.values[-network.num_outputs :]
        """(M,) of the last call"""
        self()

    def __call__(self) -> NDArray[np.float32]:
        """Q-values `(M,)` of `inputs`, good until the next call."""
        feed(self.sizes, self.parameters, self.values)
        return self.q_values
