"""The Q-network as torch trains it, and its way to and from the one that is served."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from besteffort.q_network import QNetwork


def make_network(sizes: tuple[int, ...], rng: np.random.Generator) -> nn.Sequential:
    """An MLP with ReLU between its layers; weights as torch draws them, but from `rng`."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in itertools.pairwise(sizes):
        layer = nn.Linear(num_inputs, num_outputs, device="meta").to_empty(device="cpu")
        bound = num_inputs**-0.5
        with torch.no_grad():
            for parameter in (layer.weight, layer.bias):
                drawn = rng.uniform(-bound, bound, size=tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def import_network(network: QNetwork) -> nn.Sequential:
    """The torch twin of a trained network, to train it further."""
    sizes = (network.num_inputs, *(len(bias) for bias in network.biases))
    twin = make_network(sizes, np.random.default_rng(0))
    linear = [layer for layer in twin if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, weight, bias in zip(linear, network.weights, network.biases, strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T.copy()))
            layer.bias.copy_(torch.from_numpy(bias.copy()))
    return twin


def export_network(network: nn.Sequential) -> QNetwork:
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return QNetwork(
        weights=tuple(layer.weight.detach().numpy().T.copy() for layer in linear),
        biases=tuple(layer.bias.detach().numpy().copy() for layer in linear),
    )


def tensors_of(name: str, network: QNetwork) -> dict[str, Tensor]:
    """For a checkpoint, by names that begin with `name`."""
    tensors = {f"{name}.{i}.weight": torch.from_numpy(w.copy()) for i, w in enumerate(network.weights)}
    return tensors | {f"{name}.{i}.bias": torch.from_numpy(b.copy()) for i, b in enumerate(network.biases)}


def network_of(name: str, tensors: Mapping[str, Tensor]) -> QNetwork:
    """What `tensors_of` gave."""
    num_layers = sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in tensors)
    return QNetwork(
        weights=tuple(tensors[f"{name}.{i}.weight"].numpy() for i in range(num_layers)),
        biases=tuple(tensors[f"{name}.{i}.bias"].numpy() for i in range(num_layers)),
    )


def load_module(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give a torch network the tensors whose names begin with `name`."""
    own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    module.load_state_dict(own)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
