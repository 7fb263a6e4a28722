"""Fits a Q-network to measured advantages."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from besteffort.advantages.recipe import AdvantageRecipe
from besteffort.advantages.sampling import Measured
from besteffort.q_network import QNetwork
from besteffort.training.torch_network import import_network, make_network


class Fitter:
    """The network, and another one that knows how large advantages usually are in a state.

    Those of a busy fleet are a hundred times those of a calm one, and noisy. Divided by their usual size
    the small ones weigh as much; which model is best in a state does not change by it.
    """

    def __init__(self, network: QNetwork, recipe: AdvantageRecipe, rng: np.random.Generator) -> None:
        self._recipe = recipe
        self.network = import_network(network)
        self.size = make_network((network.num_inputs, 32, 32, 1), rng)

    def fit(self, measured: Measured, rng: np.random.Generator) -> float:
        """Returns the share of the advantages' variance that is left, noise included."""
        inputs = torch.from_numpy(measured.inputs)
        advantages = measured.advantages
        usual = self._fit_size(inputs, np.sqrt((advantages**2).mean(axis=1)), rng)
        largest = self._recipe.largest_advantage
        scaled = np.clip(advantages / usual[:, None], -largest, largest).astype(np.float32)
        return self._fit_advantages(inputs, torch.from_numpy(scaled), rng)

    def _fit_size(
        self, inputs: Tensor, sizes: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """The geometric mean: a few large ones shall not drown the small ones of the same state."""
        wanted = torch.from_numpy(np.log(sizes + 0.01).astype(np.float32))
        optimizer = torch.optim.Adam(self.size.parameters(), lr=5e-3)
        for _ in range(self._recipe.num_steps // 2):
            rows = torch.from_numpy(rng.integers(len(inputs), size=self._recipe.batch_size))
            loss = ((self.size(inputs[rows])[:, 0] - wanted[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            return np.asarray(np.exp(self.size(inputs)[:, 0].numpy().astype(np.float64)))

    def _fit_advantages(self, inputs: Tensor, wanted: Tensor, rng: np.random.Generator) -> float:
        recipe, parameters = self._recipe, list(self.network.parameters())
        optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
        averaged, losses = [p.detach().clone() for p in parameters], []
        for step in range(recipe.num_steps):
            share = step / recipe.num_steps
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 - 0.9 * share)
            rows = torch.from_numpy(rng.integers(len(inputs), size=recipe.batch_size))
            q_values = self.network(inputs[rows])
            centred = q_values - q_values.mean(dim=1, keepdim=True)
            loss = ((centred - wanted[rows]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mean, parameter in zip(averaged, parameters, strict=True):
                    mean.lerp_(parameter, 1.0 if share < 0.5 else 0.01)
        with torch.no_grad():
            for mean, parameter in zip(averaged, parameters, strict=True):
                parameter.copy_(mean)
        return float(np.mean(losses[len(losses) // 2 :]) / (wanted**2).mean())
