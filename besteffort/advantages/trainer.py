"""One training run: rounds of measuring and fitting, then searches for what measuring cannot tell."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from besteffort.advantages.fitting import Fitter
from besteffort.advantages.recipe import AdvantageRecipe
from besteffort.advantages.sampling import Measured, Sampler, fleet_encoding_for, join
from besteffort.environment import Service
from besteffort.evolution import maximise
from besteffort.observation import FleetEncoding
from besteffort.offsets import Offsets
from besteffort.progress import Progress
from besteffort.q_network import QNetwork
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.state import Training
from besteffort.training.torch_network import (
    export_network,
    load_module,
    make_network,
    network_of,
    tensors_of,
    torch_threads,
)
from besteffort.training.trace_parts import TracePart
from besteffort.training.trials import EVALUATION_SEED, Trials
from besteffort.training.workloads import TrainingWorkloads


@dataclass
class AdvantageTraining(Training[FleetEncoding]):
    """An iteration is a round or, after all rounds, a search."""

    offsets: NDArray[np.float64] | None = None  # what the searches have found so far
    base: QNetwork | None = None  # to which they are added


class AdvantageTrainer:
    """A training, from the beginning or from where it was kept."""

    def __init__(
        self,
        service: Service,
        recipe: AdvantageRecipe,
        seed: int,
        *,
        init: tuple[QNetwork, FleetEncoding] | None = None,
        checkpoint: Checkpoint | None = None,
        workloads: TrainingWorkloads | None = None,
    ) -> None:
        self._recipe, self._seed, self._checkpoint = recipe, seed, checkpoint
        self._init = init[0] if init else None
        self._workloads = workloads or TrainingWorkloads(service.fleet)
        encoding = init[1] if init else fleet_encoding_for(service.fleet)
        rng = np.random.default_rng([seed, 0])
        if self._init is None:
            fitted = make_network((encoding.size, *recipe.hidden_sizes, encoding.num_models), rng)
            network = export_network(fitted)
        else:
            network, _ = Offsets.split(self._init, encoding)
        self._sampler = Sampler(service, encoding, recipe, self._workloads)
        self._fitter = Fitter(network, recipe, rng)
        self._kept: list[Measured] = []
        self.training = AdvantageTraining(encoding, self._init or network)
        self.resumed = self._restore()
        chosen_on = [trace.chosen_on for trace in self._workloads.traces]
        self._evaluation = self._trials(chosen_on, recipe.evaluation_num_requests, [EVALUATION_SEED, 1])
        self._search_on: Trials | None = None

    def run(self, progress: Progress) -> AdvantageTraining:
        recipe, training = self._recipe, self.training
        began_at = time.monotonic() - training.wall_s
        num_iterations = recipe.num_rounds + recipe.num_searches
        with torch_threads(1), progress.bar("train", num_iterations) as bar:
            bar.advance(training.iteration)
            if self._init is not None and not training.curve:
                self._evaluate(self._init)  # what is given may be better than all that comes of it
            while training.iteration < num_iterations:
                done = self.step()
                training.wall_s = time.monotonic() - began_at
                bar.describe(f"performance {training.curve[-1].performance:.4f}, {done}")
                bar.advance()
                self.save()
        return training

    def step(self) -> str:
        """A round or a search draws from its own seed, so that a continued training is the same training."""
        if self.training.iteration < self._recipe.num_rounds:
            return f"{self._round():.0%} of the variance unexplained"
        return f"{self._search():.4f} where it was searched"

    def _round(self) -> float:
        training = self.training
        *rngs, fit_rng = np.random.default_rng([self._seed, 1, training.iteration]).spawn(
            self._recipe.num_workloads + 1
        )
        now = export_network(self._fitter.network) if training.iteration else self._init
        self._kept.append(self._sampler.measure(now, rngs))
        self._kept = self._kept[-self._recipe.num_rounds_kept :]
        left = self._fitter.fit(join(self._kept), fit_rng)
        training.iteration += 1
        self._evaluate(export_network(self._fitter.network))
        return left

    def _search(self) -> float:
        """Measured advantages hold while all others go where they went; how the policy itself reacts to what
        it does, only whole workloads tell."""
        training, recipe, seed = self.training, self._recipe, self._seed
        if self._search_on is None:
            trained_on = [trace.trained_on for trace in self._workloads.traces]
            self._search_on = self._trials(trained_on, recipe.search_num_requests, [seed, 2])
        trials = self._search_on
        if training.base is None or training.offsets is None:
            training.base, training.offsets = Offsets.split(training.best, training.encoding)
        room = Offsets(training.base, training.encoding)
        nth = training.iteration - recipe.num_rounds

        def worth(offsets: NDArray[np.float64]) -> float:
            return trials.mean(trials.performance(room.added(offsets)))

        training.offsets, reached = maximise(
            worth,
            training.offsets,
            recipe.num_generations,
            np.random.default_rng([seed, 3, nth]),
            step=recipe.search_step / (1.0 + 0.5 * nth),
        )
        training.iteration += 1
        self._evaluate(room.added(training.offsets))
        return reached

    def _trials(self, parts: Sequence[TracePart], num_requests: int, seed: list[int]) -> Trials:
        rng, num_threads = np.random.default_rng(seed), self._recipe.num_threads
        return Trials(self._sampler.branching_on, self._workloads, parts, num_requests, num_threads, rng)

    def _evaluate(self, network: QNetwork) -> None:
        self.training.judge(network, self._evaluation.evaluate(network, self.training.iteration))

    def save(self) -> None:
        """Keep all that the next round or search needs."""
        if self._checkpoint is None:
            return
        training, tensors = self.training, tensors_of("best", self.training.best)
        for name, module in (("network", self._fitter.network), ("size", self._fitter.size)):
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        if training.base is not None and training.offsets is not None:
            tensors |= tensors_of("base", training.base) | {"offsets": torch.from_numpy(training.offsets)}
        for index, measured in enumerate(self._kept):
            tensors[f"kept.{index}.inputs"] = torch.from_numpy(measured.inputs)
            tensors[f"kept.{index}.worth"] = torch.from_numpy(measured.worth)
        self._checkpoint.save(tensors, {**training.to_facts(), "num_kept": len(self._kept)})

    def _restore(self) -> bool:
        kept = self._checkpoint.load() if self._checkpoint else None
        if kept is None:
            return False
        tensors, facts = kept
        load_module(self._fitter.network, "network", tensors)
        load_module(self._fitter.size, "size", tensors)
        self.training.restore(facts, network_of("best", tensors))
        if "offsets" in tensors:
            self.training.base, self.training.offsets = (
                network_of("base", tensors),
                tensors["offsets"].numpy(),
            )
        names = [f"kept.{index}" for index in range(facts["num_kept"])]
        self._kept = [_measured(name, tensors) for name in names]
        return True


def _measured(name: str, tensors: dict[str, Tensor]) -> Measured:
    return Measured(tensors[f"{name}.inputs"].numpy(), tensors[f"{name}.worth"].numpy())
