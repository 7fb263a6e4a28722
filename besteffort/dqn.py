"""DQN with Double Q-learning (paper, Sec. 3.2 and App. A), and what `docs/dqn.md` lists beside it."""

import itertools
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from besteffort.artifacts.files import write_atomically
from besteffort.environment import RoutingEnvironment, Service, Transitions, encoding_for, evaluate
from besteffort.fleet import Fleet
from besteffort.observation import Encoding
from besteffort.progress import Bar, Progress
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.workload import stable

CHECKPOINT_VERSION = 1
CHECKPOINT_EVERY_S = 30.0


@dataclass(frozen=True)
class Recipe:
    """Everything that is free in the training."""

    num_iterations: int
    """gradient steps; the fleets take a step before each"""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """of the MLP (Sec. 3.2)"""
    discount: float = 0.99
    """per decision (App. A)"""
    learning_rate: float = 1e-4
    """of Adam (App. A)"""
    final_learning_rate_share: float = 1.0
    """the learning rate falls linearly to this share of itself; 1: it is constant"""
    batch_size: int = 1024
    """transitions per gradient step (App. A)"""
    target_update_every: int = 500
    """iterations between copies of the online network to the target network (App. A)"""
    replay_buffer_size: int = 1_000_000
    """transitions; the oldest are overwritten"""
    num_first_transitions: int = 20_000
    """decisions in the replay_buffer before the first gradient step, at the first epsilon"""
    first_epsilon: float = 1.0
    """share of random decisions at the first iteration"""
    last_epsilon: float = 0.05
    """and from the end of its linear decay"""
    epsilon_decay_share: float = 0.1
    """of the iterations, over which epsilon decays"""
    reward_baseline: float = 0.0
    """taken off every reward: it moves all Q-values alike, and brings those of low loads to about 0"""
    num_fleets: int = 16
    """simulated side by side; each makes one decision per iteration"""
    num_requests: int = 1000
    """per workload, before it truncates"""
    mean_requests_per_rate: float = 100.0
    """before the arrival rate is drawn anew"""
    evaluate_every: int = 5000
    """iterations between evaluations"""
    num_threads: int = 1
    """of torch"""


RECIPES = {
    "paper": Recipe(num_iterations=1_200_000),
    "dqn": Recipe(
        num_iterations=5000,
        discount=0.97,
        learning_rate=1e-3,
        final_learning_rate_share=0.05,
        batch_size=256,
        target_update_every=50,
        replay_buffer_size=200_000,
        epsilon_decay_share=0.3,
        reward_baseline=1.0,
        num_fleets=64,
        evaluate_every=500,
    ),
}

# A seed that no training draws from, and no table of results may use: the best network is chosen by it.
EVALUATION_SEED = 2**31
EVALUATION_RATES_PER_S = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0)
EVALUATION_NUM_REQUESTS = 400


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


def double_q_targets(
    online: nn.Module, target: nn.Module, rewards: Tensor, next_observations: Tensor, discount: float
) -> Tensor:
    """`r + discount * Q_target(s', argmax_a Q_online(s', a))`, shape `(B,)` (Van Hasselt et al., 2016).

    There is no terminal state: workloads only truncate.
    """
    with torch.no_grad():
        actions = online(next_observations).argmax(dim=1, keepdim=True)
        values: Tensor = target(next_observations).gather(1, actions)
    return rewards + discount * values.squeeze(1)


class ReplayBuffer:
    """The latest transitions, sampled evenly."""

    def __init__(self, size: int, num_inputs: int) -> None:
        self._observations = np.zeros((size, num_inputs), dtype=np.float32)
        self._next_observations = np.zeros((size, num_inputs), dtype=np.float32)
        self._actions = np.zeros(size, dtype=np.int64)
        self._rewards = np.zeros(size, dtype=np.float32)
        self._num_added = 0

    def __len__(self) -> int:
        return min(self._num_added, len(self._actions))

    def add(self, transitions: Transitions) -> None:
        rows = (self._num_added + np.arange(len(transitions))) % len(self._actions)
        self._observations[rows] = transitions.observations
        self._actions[rows] = transitions.actions
        self._rewards[rows] = transitions.rewards
        self._next_observations[rows] = transitions.next_observations
        self._num_added += len(transitions)

    def sample(self, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Observations, actions, rewards and next observations of `size` transitions."""
        rows = rng.integers(len(self), size=size)
        columns = (self._observations, self._actions, self._rewards, self._next_observations)
        observations, actions, rewards, following = (torch.from_numpy(c[rows]) for c in columns)
        return observations, actions, rewards, following


class Learner:
    """The networks and the optimizer."""

    def __init__(self, network: nn.Sequential, recipe: Recipe) -> None:
        self.recipe = recipe
        self.online = network
        self.target = import_network(export_network(network))
        self.optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)

    def learn(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], iteration: int) -> None:
        """One gradient step, and the target network's update when it is due."""
        observations, actions, rewards, following = batch
        share = iteration / self.recipe.num_iterations
        decay = 1 - share * (1 - self.recipe.final_learning_rate_share)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate * decay
        centred = rewards - self.recipe.reward_baseline
        wanted = double_q_targets(self.online, self.target, centred, following, self.recipe.discount)
        predicted = self.online(observations).gather(1, actions[:, None]).squeeze(1)
        loss = nn.functional.smooth_l1_loss(predicted, wanted)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if (iteration + 1) % self.recipe.target_update_every == 0:
            self.target.load_state_dict(self.online.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs, by name."""
        named = {f"online.{name}": value for name, value in self.online.state_dict().items()}
        named |= {f"target.{name}": value for name, value in self.target.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            named |= {f"adam.{index}.{name}": value for name, value in moments.items()}
        return named

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for prefix, network in (("online.", self.online), ("target.", self.target)):
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            network.load_state_dict(own)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})


@dataclass(frozen=True)
class Evaluation:
    """The policy without exploration, on workloads held out from training."""

    iteration: int
    performance: float
    by_rate: dict[str, float]  # the paper's rates per second, not yet times the fleet's `rate_scale`


@dataclass
class Training:
    """How far a training has come; in the end, its result."""

    encoding: Encoding
    best: QNetwork  # of all evaluations
    iteration: int = 0
    curve: list[Evaluation] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def best_evaluation(self) -> Evaluation:
        return max(self.curve, key=lambda evaluation: evaluation.performance)


@dataclass(frozen=True)
class Checkpoints:
    """Where a training is kept, so that it goes on after an interruption, and of what it is."""

    path: Path
    identity: Mapping[str, Any]  # recipe, seed, hashes of the inputs: others are not continued

    def save(self, learner: Learner, training: Training) -> None:
        tensors = learner.tensors()
        for layer, (weight, bias) in enumerate(zip(training.best.weights, training.best.biases, strict=True)):
            tensors[f"best.{layer}.weight"] = torch.from_numpy(weight)
            tensors[f"best.{layer}.bias"] = torch.from_numpy(bias)
        facts = {
            "schema_version": CHECKPOINT_VERSION,
            "identity": dict(self.identity),
            "iteration": training.iteration,
            "curve": [asdict(evaluation) for evaluation in training.curve],
            "wall_s": training.wall_s,
        }
        metadata = {"kind": "besteffort checkpoint", "facts": json.dumps(facts, sort_keys=True)}
        write_atomically(self.path, lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, learner: Learner, training: Training) -> bool:
        """Continue from the file if there is one of the same training."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return False
        known = (facts.get("schema_version"), facts.get("identity"))
        if known != (CHECKPOINT_VERSION, json.loads(json.dumps(dict(self.identity)))):
            return False
        learner.restore(tensors)
        num_layers = len(training.best.weights)
        training.best = QNetwork(
            tuple(tensors[f"best.{layer}.weight"].numpy() for layer in range(num_layers)),
            tuple(tensors[f"best.{layer}.bias"].numpy() for layer in range(num_layers)),
        )
        training.iteration, training.wall_s = facts["iteration"], facts["wall_s"]
        training.curve = [Evaluation(**evaluation) for evaluation in facts["curve"]]
        return True

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def epsilon_at(recipe: Recipe, iteration: int) -> float:
    """Share of random decisions: it falls linearly, then stays."""
    decayed = iteration / max(1.0, recipe.epsilon_decay_share * recipe.num_iterations)
    return recipe.first_epsilon + min(1.0, decayed) * (recipe.last_epsilon - recipe.first_epsilon)


def evaluation_workloads(fleet: Fleet, seed: int = EVALUATION_SEED) -> list[Requests]:
    """One steady workload for each of `EVALUATION_RATES_PER_S`."""
    rngs = np.random.default_rng(seed).spawn(len(EVALUATION_RATES_PER_S))
    return [
        stable(fleet, rng, rate, num_requests=EVALUATION_NUM_REQUESTS)
        for rng, rate in zip(rngs, EVALUATION_RATES_PER_S, strict=True)
    ]


class Trainer:
    """One training run: the fleets, the replay_buffer, the learner, and the evaluations."""

    def __init__(
        self,
        service: Service,
        recipe: Recipe,
        seed: int,
        *,
        init: tuple[QNetwork, Encoding] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._service, self._recipe, self._checkpoints = service, recipe, checkpoints
        encoding = init[1] if init else encoding_for(service.fleet)
        sizes = (encoding.size, *recipe.hidden_sizes, encoding.num_models)
        network = make_network(sizes, np.random.default_rng([seed, 0]))
        self._learner = Learner(import_network(init[0]) if init else network, recipe)
        self.training = Training(encoding, export_network(self._learner.online))
        self.resumed = checkpoints.load(self._learner, self.training) if checkpoints else False
        # A continued training draws anew: its replay_buffer is filled again, by other workloads.
        self._rng = np.random.default_rng([seed, 1, self.training.iteration])
        self._environment = RoutingEnvironment(
            service,
            encoding,
            self._rng.spawn(1)[0],
            num_fleets=recipe.num_fleets,
            num_requests=recipe.num_requests,
            mean_requests_per_rate=recipe.mean_requests_per_rate,
        )
        self._replay_buffer = ReplayBuffer(recipe.replay_buffer_size, encoding.size)
        self._workloads = evaluation_workloads(service.fleet)
        self._explores = init is None
        self._saved_at = time.monotonic()

    def run(self, progress: Progress) -> Training:
        """Train to the end; whatever interrupts it, what was learned is kept for the next time."""
        recipe, training = self._recipe, self.training
        began_at = time.monotonic() - training.wall_s
        with torch_threads(recipe.num_threads), progress.bar("train", recipe.num_iterations) as bar:
            bar.advance(training.iteration)
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
        return epsilon_at(recipe, self.training.iteration) if self._explores else recipe.last_epsilon

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
        reached = evaluate(self._service, training.encoding, self._workloads, self._best_actions)
        by_rate = {
            f"{rate:g}": float(value) for rate, value in zip(EVALUATION_RATES_PER_S, reached, strict=True)
        }
        training.curve.append(Evaluation(training.iteration, float(reached.mean()), by_rate))
        if training.best_evaluation is training.curve[-1]:
            training.best = export_network(self._learner.online)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self._checkpoints:
            self._checkpoints.save(self._learner, self.training)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
