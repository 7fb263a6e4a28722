"""The network for one input at a time against the network for many."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.q_network import Decider, QNetwork


def drawn(sizes: list[int], rng: np.random.Generator) -> QNetwork:
    shapes = list(itertools.pairwise(sizes))
    return QNetwork(
        tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes),
        tuple(rng.normal(size=shape[1]).astype(np.float32) for shape in shapes),
    )


@settings(deadline=None)  # the machine may be busy
@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5), seed=st.integers(0, 1000))
def test_one_input_gets_the_q_values_that_it_gets_among_many(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = drawn(sizes, rng)
    decider = Decider(network)
    inputs = rng.normal(size=(4, sizes[0])).astype(np.float32)
    many = network(inputs)
    for row, expected in zip(inputs, many, strict=True):
        decider.inputs[:] = row
        scale = float(np.prod([np.sqrt(size) for size in sizes]))
        np.testing.assert_allclose(decider(), expected, rtol=1e-5, atol=1e-6 * scale)


def test_layers_that_do_not_fit_are_refused() -> None:
    network = drawn([3, 4, 2], np.random.default_rng(0))
    with pytest.raises(ValueError, match="layers do not fit together"):
        QNetwork(network.weights[::-1], network.biases)
