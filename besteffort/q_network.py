"""The Q-network as the router runs it: a small MLP in numpy, microseconds per decision, no torch."""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ZERO = np.float32(0.0)  # numpy takes longer over a Python float


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
    """The same network for one input at a time, in buffers of its own: a third of the time.

    Biases are one more row of each layer's weights, which every layer's input meets with a 1. Values are
    those of `QNetwork` to float32 rounding, since sums run in another order. Not for several threads.
    """

    def __init__(self, network: QNetwork) -> None:
        layers = zip(network.weights, network.biases, strict=True)
        joined = [np.concatenate([weight, bias[None]], dtype=np.float32) for weight, bias in layers]
        fed = [np.ones(len(layer), dtype=np.float32) for layer in joined]
        self.inputs = fed[0][:-1]
        """(I,) to be written before each call"""
        self._q_values = np.zeros(network.num_outputs, dtype=np.float32)
        self._hidden = [
            (given, layer, taken[:-1])
            for given, layer, taken in zip(fed[:-1], joined[:-1], fed[1:], strict=True)
        ]
        self._last = fed[-1], joined[-1], self._q_values

    def __call__(self) -> NDArray[np.float32]:
        """Q-values `(M,)` of `inputs`, good until the next call."""
        for given, layer, taken in self._hidden:
            np.dot(given, layer, taken)
            np.maximum(taken, _ZERO, taken)
        np.dot(*self._last)
        return self._q_values
