"""One training run: the fleets, the replay_buffer, the learner, and the evaluations."""

import time

import numpy as np
import torch
from numpy.typing import NDArray

from besteffort.dqn.learner import Learner
from besteffort.dqn.recipe import Recipe
from besteffort.dqn.replay_buffer import ReplayBuffer
from besteffort.environment import RoutingEnvironment, Service, encoding_for, evaluate
from besteffort.fleet import Fleet
from besteffort.observation import Encoding
from besteffort.progress import Bar, Progress
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.state import Evaluation, Training
from besteffort.training.torch_network import (
    export_network,
    import_network,
    make_network,
    network_of,
    tensors_of,
    torch_threads,
)
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import stable

CHECKPOINT_EVERY_S = 30.0
# A seed that no training draws from, and no table of results may use: the best network is chosen by it.
EVALUATION_SEED = 2**31
EVALUATION_RATES_PER_S = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0)
EVALUATION_NUM_REQUESTS = 400


def evaluation_workloads(
    fleet: Fleet, seed: int = EVALUATION_SEED, workloads: TrainingWorkloads | None = None
) -> list[Requests]:
    """One steady workload for each of `EVALUATION_RATES_PER_S`, then the pieces of each trace."""
    workloads = workloads or TrainingWorkloads(fleet)
    rngs = np.random.default_rng(seed).spawn(len(EVALUATION_RATES_PER_S) + 1)
    steady = [
        stable(workloads.mixed(rng), rng, rate, num_requests=EVALUATION_NUM_REQUESTS)
        for rng, rate in zip(rngs, EVALUATION_RATES_PER_S, strict=False)
    ]
    parts = [trace.chosen_on for trace in workloads.traces]
    return steady + workloads.pieces(parts, EVALUATION_NUM_REQUESTS, rngs[-1])


class Trainer:
    """A training, from the beginning or from where it was kept."""

    def __init__(
        self,
        service: Service,
        recipe: Recipe,
        seed: int,
        *,
        init: tuple[QNetwork, Encoding] | None = None,
        checkpoint: Checkpoint | None = None,
        workloads: TrainingWorkloads | None = None,
    ) -> None:
        self._service, self._recipe, self._checkpoint = service, recipe, checkpoint
        self._workloads = workloads or TrainingWorkloads(service.fleet)
        encoding = init[1] if init else encoding_for(service.fleet)
        sizes = (encoding.size, *recipe.hidden_sizes, encoding.num_models)
        network = make_network(sizes, np.random.default_rng([seed, 0]))
        self._learner = Learner(import_network(init[0]) if init else network, recipe)
        self.training = Training(encoding, export_network(self._learner.online))
        self.resumed = self._restore()
        # A continued training draws anew: its replay_buffer is filled again, by other workloads.
        self._rng = np.random.default_rng([seed, 1, self.training.iteration])
        self._environment = RoutingEnvironment(
            service,
            encoding,
            self._rng.spawn(1)[0],
            num_fleets=recipe.num_fleets,
            num_requests=recipe.num_requests,
            mean_requests_per_rate=recipe.mean_requests_per_rate,
            workloads=self._workloads,
        )
        self._replay_buffer = ReplayBuffer(recipe.replay_buffer_size, encoding.size)
        self._judged_on = evaluation_workloads(service.fleet, workloads=self._workloads)
        self._explores = init is None
        self._saved_at = time.monotonic()

    def run(self, progress: Progress) -> Training[Encoding]:
        """Train to the end; whatever interrupts it, what was learned is kept for the next time."""
        recipe, training = self._recipe, self.training
        began_at = time.monotonic() - training.wall_s
        with torch_threads(recipe.num_threads), progress.bar("train", recipe.num_iterations) as bar:
            bar.advance(training.iteration)
            if not self._explores and not training.curve:
                self._evaluate()  # what is given may be better than all that comes of it
            try:
                if training.iteration < recipe.num_iterations:
                    observations = self._fill(bar)
                while training.iteration < recipe.num_iterations:
                    observations = self._iterate(observations, training.iteration)
                    training.iteration += 1
                    training.wall_s = time.monotonic() - began_at
                    bar.advance()
                    self._report_and_save(bar)
            except KeyboardInterrupt:
                self._save()
                raise
        return training

    @property
    def _epsilon(self) -> float:
        """A given policy is not drowned in random decisions before it is trained further."""
        recipe = self._recipe
        return recipe.epsilon_at(self.training.iteration) if self._explores else recipe.last_epsilon

    def _fill(self, bar: Bar) -> NDArray[np.float32]:
        """Fill the replay_buffer so far that sampling from it makes sense."""
        bar.describe("filling the replay buffer")
        observations = self._environment.reset()
        wanted = min(self._recipe.num_first_transitions, self._recipe.replay_buffer_size)
        while len(self._replay_buffer) < wanted:
            observations = self._decide(observations, self._epsilon)
        return observations

    def _iterate(self, observations: NDArray[np.float32], iteration: int) -> NDArray[np.float32]:
        observations = self._decide(observations, self._epsilon)
        self._learner.learn(self._replay_buffer.sample(self._recipe.batch_size, self._rng), iteration)
        return observations

    def _decide(self, observations: NDArray[np.float32], epsilon: float) -> NDArray[np.float32]:
        """One step of every fleet, epsilon-greedy."""
        actions = self._best_actions(observations)
        explore = self._rng.random(len(actions)) < epsilon
        drawn = self._rng.integers(self.training.encoding.num_models, size=len(actions))
        observations, transitions = self._environment.step(np.where(explore, drawn, actions))
        self._replay_buffer.add(transitions)
        return observations

    def _best_actions(self, observations: NDArray[np.float32]) -> NDArray[np.int64]:
        with torch.no_grad():
            return np.asarray(self._learner.online(torch.from_numpy(observations)).argmax(dim=1).numpy())

    def _report_and_save(self, bar: Bar) -> None:
        training, recipe = self.training, self._recipe
        last = training.iteration == recipe.num_iterations
        if training.iteration % recipe.evaluate_every == 0 or last:
            self._evaluate()
        if training.iteration % 100 == 0 or last:
            reached = f"{training.curve[-1].performance:.3f}" if training.curve else "not yet known"
            rate = training.iteration / training.wall_s
            bar.describe(f"performance {reached}, epsilon {self._epsilon:.2f}, {rate:.0f} iterations/s")
        if last or time.monotonic() - self._saved_at > CHECKPOINT_EVERY_S:
            self._save()

    def _evaluate(self) -> None:
        training = self.training
        reached = evaluate(self._service, training.encoding, self._judged_on, self._best_actions)
        steady, on_pieces = np.split(reached, [len(EVALUATION_RATES_PER_S)])
        evaluation = Evaluation(
            iteration=training.iteration,
            performance=self._workloads.overall(float(steady.mean()), on_pieces),
            by_rate={f"{r:g}": float(p) for r, p in zip(EVALUATION_RATES_PER_S, steady, strict=True)},
            by_trace=self._workloads.by_trace(on_pieces),
        )
        training.judge(export_network(self._learner.online), evaluation)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self._checkpoint:
            tensors = self._learner.tensors() | tensors_of("best", self.training.best)
            self._checkpoint.save(tensors, self.training.to_facts())

    def _restore(self) -> bool:
        kept = self._checkpoint.load() if self._checkpoint else None
        if kept is None:
            return False
        tensors, facts = kept
        self._learner.restore(tensors)
        self.training.restore(facts, network_of("best", tensors))
        return True
