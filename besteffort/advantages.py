"""Policy iteration on measured advantages: how `train` learns by default (docs/training.md).

The simulator is so fast that the worth of a decision need not be estimated by bootstrapping: at states
that the policy comes to, each model is tried under the same future arrivals, for longer than a request
lives. A Q-network is fitted to the differences, and routes in the next round.
"""

import itertools
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from besteffort.arrivals import arrival_rates_per_s, recent_rates_per_s
from besteffort.artifacts.files import write_atomically
from besteffort.dqn import Evaluation, export_network, import_network, make_network, torch_threads
from besteffort.environment import HIGHEST_RATE_PER_S, Service
from besteffort.evolution import maximise
from besteffort.fleet import Fleet
from besteffort.observation import FleetEncoding
from besteffort.offsets import Offsets
from besteffort.progress import Progress
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.simulator import Branching, Routing
from besteffort.workload import stable, unpredictable_1, unpredictable_2

CHECKPOINT_VERSION = 1
# A seed that no training draws from, and no table of results may use: the best network is chosen by it.
EVALUATION_SEED = 2**31
EVALUATION_RATES_PER_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0)
# Somewhat beyond the paper's lowest and highest rate, so that these are not the edge.
SLOWEST_PER_S, FASTEST_PER_S = 0.12, 52.0


@dataclass(frozen=True)
class AdvantageRecipe:
    """Everything that is free in the training. A life is the longest time in which a request is in time."""

    num_rounds: int
    """of policy iteration"""
    num_workloads: int = 260
    """drawn anew in each round"""
    num_branchings: int = 24
    """in each workload, even in time; there every model is tried"""
    horizon_lives: float = 1.2
    """so long after a branching arrivals count, as far as they are in time"""
    fade_lives: float = 0.3
    """the last part of the horizon, in which they count less and less"""
    open_loop: bool = True
    """what arrives after a branching goes where it went without it; else the policy decides anew"""
    num_rounds_kept: int = 5
    """a network is fitted to the measurements of the latest rounds"""
    steady_share: float = 0.5
    """of the workloads; the others switch at random between random rates"""
    calm_share: float = 0.6
    """of the rates are even on a logarithmic scale, which is mostly calm; the others on a linear one"""
    explored_share: float = 0.3
    """of the workloads have random decisions in them"""
    epsilon: float = 0.1
    """share of random decisions in these"""
    hidden_sizes: tuple[int, int] = (64, 64)
    """of the MLP"""
    num_searches: int = 6
    """after the rounds, for offsets to the best network's values; a checkpoint is written after each"""
    num_generations: int = 12
    """of CMA-ES in each"""
    search_step: float = 0.3
    """how far the first one looks around, in units of the network's values; the others look less far"""
    search_num_requests: int = 3000
    """of each steady workload of the search; an unpredictable one has three times as many"""
    num_steps: int = 1200
    """of gradient descent in each round"""
    batch_size: int = 512
    """branchings in each step"""
    learning_rate: float = 2e-3
    """of Adam; it falls linearly to a tenth in each round"""
    largest_advantage: float = 6.0
    """in units of what is usual in such a state; what is beyond counts like this"""
    evaluation_num_requests: int = 4000
    """of each workload on which a round's network is judged"""
    gate_num_seeds: int = 3
    """of each workload on which the policy is held against others in the end"""
    gate_num_requests: int = 10_000
    """of an unpredictable one of these"""
    num_threads: int = 2
    """that simulate; the result does not depend on it"""


ADVANTAGE_RECIPES = {
    "default": AdvantageRecipe(num_rounds=7),
    "demo": AdvantageRecipe(
        num_rounds=6,
        num_workloads=120,
        num_steps=800,
        num_rounds_kept=4,
        evaluation_num_requests=1500,
        num_searches=2,
        num_generations=8,
        search_num_requests=800,
        gate_num_seeds=2,
        gate_num_requests=1000,
    ),
}


def fleet_encoding_for(fleet: Fleet) -> FleetEncoding:
    """Scales that bring a busy fleet's observations to about 1."""
    return FleetEncoding(
        num_tasks=len(fleet.tasks),
        num_models=len(fleet.models),
        in_flight_scale=tuple(model.max_num_seqs / 4 for model in fleet.models),
        rate_scale_per_s=HIGHEST_RATE_PER_S / 2 * fleet.rate_scale,
        spans_s=tuple(share * fleet.request_life_s for share in (0.125, 0.5, 2.0)),
    )


@dataclass(frozen=True)
class Measured:
    """Branchings, `N` of them."""

    inputs: NDArray[np.float32]  # (N, I)
    worth: NDArray[np.float64]  # (N, M) of all that a choice has an influence on

    @property
    def advantages(self) -> NDArray[np.float64]:
        """What each model is worth beyond the mean of all, shape `(N, M)`."""
        return np.asarray(self.worth - self.worth.mean(axis=1, keepdims=True))


def join(parts: list[Measured]) -> Measured:
    return Measured(np.concatenate([p.inputs for p in parts]), np.concatenate([p.worth for p in parts]))


class Sampler:
    """Draws workloads, and measures on them what each choice is worth."""

    def __init__(self, service: Service, encoding: FleetEncoding, recipe: AdvantageRecipe) -> None:
        self._service, self._encoding, self._recipe = service, encoding, recipe
        fleet = service.fleet
        self._life_s = fleet.request_life_s
        self._duration_s = max(9.0 * self._life_s, 150.0 / fleet.rate_scale)
        weights = np.array([task.weight for task in fleet.tasks])
        self._values = service.rewards.relative * (weights / (weights @ fleet.task_shares))[:, None]

    def measure(self, network: QNetwork | None, rngs: list[np.random.Generator]) -> Measured:
        """One workload for each generator, routed by the network; without one by simple thresholds."""
        with ThreadPoolExecutor(self._recipe.num_threads) as pool:
            return join(list(pool.map(lambda rng: self._measure_one(network, rng), rngs)))

    def _measure_one(self, network: QNetwork | None, rng: np.random.Generator) -> Measured:
        recipe, requests = self._recipe, self._draw(rng)
        at = requests.arrived_at
        horizon_s = recipe.horizon_lives * self._life_s
        # Early enough that nothing which counts lives beyond the last arrival.
        latest_s = self._duration_s - horizon_s - 0.7 * self._life_s
        wanted = np.searchsorted(at, np.sort(rng.uniform(0, latest_s, recipe.num_branchings)))
        starts = np.unique(np.minimum(wanted, len(at) - 1))
        until = np.maximum(np.searchsorted(at, at[starts] + horizon_s, side="right"), starts + 1)
        request_inputs = self._request_inputs(requests)
        branching = self._branching(requests, network, request_inputs)
        explored = np.full(len(at), -1)
        if rng.random() < recipe.explored_share:
            drawn = rng.random(len(at)) < recipe.epsilon
            explored[drawn] = rng.integers(0, self._encoding.num_models, drawn.sum())
        branching.give(explored)
        if recipe.open_loop:
            branching.give(branching.serve()[1])
        of_fleet, worth = branching.branch(starts, until, 1000.0 * recipe.fade_lives * self._life_s)
        return Measured(np.concatenate([of_fleet, request_inputs[starts]], axis=1), worth)

    def branching_on(self, requests: Requests) -> Branching:
        return self._branching(requests, None, self._request_inputs(requests))

    def _branching(
        self, requests: Requests, network: QNetwork | None, request_inputs: NDArray[np.float32]
    ) -> Branching:
        fleet, latency = self._service.fleet, self._service.latency
        scale = np.array(self._encoding.in_flight_scale, dtype=np.float32)
        routing = Routing(scale, self._first_thresholds(), network)
        return Branching(requests, fleet, latency, self._values, routing, request_inputs)

    def _first_thresholds(self) -> NDArray[np.float64]:
        """A good part of the largest batch with which a model makes the deadline alone, `(T, M - 1)`."""
        fleet = self._service.fleet
        deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
        steps_ms = self._service.latency.step_table_ms(max(model.max_num_seqs for model in fleet.models))
        rows = [
            [0.6 * (np.sum(steps[1 : model.max_num_seqs + 1] <= deadline) - 1.0)
             for model, steps in zip(fleet.models[1:], steps_ms[1:], strict=True)]
            for deadline in deadlines
        ]  # fmt: skip
        return np.array(rows, dtype=np.float64).reshape(len(fleet.tasks), -1)

    def _request_inputs(self, requests: Requests) -> NDArray[np.float32]:
        at = requests.arrived_at
        recent = recent_rates_per_s(at, self._encoding.spans_s)
        return self._encoding.encode_request(requests.task, arrival_rates_per_s(at), recent)

    def _draw(self, rng: np.random.Generator) -> Requests:
        """Poisson arrivals at a steady rate or at one that switches; drawn again while there is none."""
        while True:
            arrived_at = self._draw_arrivals(rng)
            if len(arrived_at):
                break
        drawn = stable(self._service.fleet, rng, 1.0, num_requests=len(arrived_at))
        return Requests(arrived_at, drawn.task, drawn.num_prompt_tokens, drawn.num_output_tokens)

    def _draw_arrivals(self, rng: np.random.Generator) -> NDArray[np.float64]:
        num_rates = 1 if rng.random() < self._recipe.steady_share else 1 + int(rng.integers(1, 12))
        cuts = np.sort(rng.uniform(0, self._duration_s, num_rates - 1))
        edges = np.concatenate([[0.0], cuts, [self._duration_s]])
        parts = []
        for begin, end in itertools.pairwise(edges):
            rate = self._draw_rate_per_s(rng) * self._service.fleet.rate_scale
            parts.append(np.sort(rng.uniform(begin, end, rng.poisson(rate * (end - begin)))))
        return np.concatenate(parts)

    def _draw_rate_per_s(self, rng: np.random.Generator) -> float:
        if rng.random() < self._recipe.calm_share:
            return float(np.exp(rng.uniform(np.log(SLOWEST_PER_S), np.log(FASTEST_PER_S))))
        return float(rng.uniform(SLOWEST_PER_S, FASTEST_PER_S))


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


class Trials:
    """The same workloads for one network after the other: steady ones, and three of each other kind."""

    def __init__(
        self, sampler: Sampler, fleet: Fleet, num_requests: int, num_threads: int, rng: np.random.Generator
    ) -> None:
        rngs = rng.spawn(len(EVALUATION_RATES_PER_S) + 6)
        workloads = [stable(fleet, own, rate, num_requests=num_requests)
                     for own, rate in zip(rngs, EVALUATION_RATES_PER_S, strict=False)]  # fmt: skip
        workloads += [unpredictable_1(fleet, own, 3 * num_requests) for own in rngs[-6:-3]]
        workloads += [unpredictable_2(fleet, own, 3 * num_requests) for own in rngs[-3:]]
        self._branchings = [sampler.branching_on(requests) for requests in workloads]
        self._num_threads = num_threads

    def performance(self, network: QNetwork) -> NDArray[np.float64]:
        """Mean worth of the requests of each workload, shape `(W,)`."""

        def one(branching: Branching) -> float:
            branching.use(network)
            return float(branching.serve()[0].mean())

        with ThreadPoolExecutor(self._num_threads) as pool:
            return np.array(list(pool.map(one, self._branchings)))

    def mean(self, reached: NDArray[np.float64]) -> float:
        """Each of the three kinds of workloads weighs the same."""
        return float(np.mean([reached[:-6].mean(), reached[-6:-3].mean(), reached[-3:].mean()]))


@dataclass
class AdvantageTraining:
    """How far a training has come; in the end, its result."""

    encoding: FleetEncoding
    best: QNetwork
    iteration: int = 0  # rounds, then searches
    offsets: NDArray[np.float64] | None = None  # what the searches have found so far
    base: QNetwork | None = None  # to which they are added
    curve: list[Evaluation] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def best_evaluation(self) -> Evaluation:
        return max(self.curve, key=lambda evaluation: evaluation.performance)


@dataclass(frozen=True)
class RoundCheckpoints:
    """Where a training is kept after each round; it goes on as if nothing had happened."""

    path: Path
    identity: Mapping[str, Any]  # recipe, seed, hashes of the inputs: others are not continued

    def save(self, fitter: Fitter, training: AdvantageTraining, kept: list[Measured]) -> None:
        tensors = {f"network.{n}": t for n, t in fitter.network.state_dict().items()}
        tensors |= {f"size.{n}": t for n, t in fitter.size.state_dict().items()}
        tensors |= _tensors("best", training.best)
        if training.base is not None and training.offsets is not None:
            tensors |= _tensors("base", training.base)
            tensors["offsets"] = torch.from_numpy(training.offsets)
        for index, measured in enumerate(kept):
            tensors[f"kept.{index}.inputs"] = torch.from_numpy(measured.inputs)
            tensors[f"kept.{index}.worth"] = torch.from_numpy(measured.worth)
        facts = {
            "schema_version": CHECKPOINT_VERSION,
            "identity": dict(self.identity),
            "iteration": training.iteration,
            "num_kept": len(kept),
            "curve": [asdict(evaluation) for evaluation in training.curve],
            "wall_s": training.wall_s,
        }
        metadata = {"kind": "besteffort rounds", "facts": json.dumps(facts, sort_keys=True)}
        write_atomically(self.path, lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, fitter: Fitter, training: AdvantageTraining) -> list[Measured] | None:
        """Continue from the file if there is one of the same training; what it kept, else None."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        known = (facts.get("schema_version"), facts.get("identity"))
        if known != (CHECKPOINT_VERSION, json.loads(json.dumps(dict(self.identity)))):
            return None
        for prefix, network in (("network.", fitter.network), ("size.", fitter.size)):
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            network.load_state_dict(own)
        training.best = _network(tensors, "best")
        if "offsets" in tensors:
            training.base, training.offsets = _network(tensors, "base"), tensors["offsets"].numpy()
        training.iteration, training.wall_s = facts["iteration"], facts["wall_s"]
        training.curve = [Evaluation(**evaluation) for evaluation in facts["curve"]]
        names = [f"kept.{index}" for index in range(facts["num_kept"])]
        return [Measured(tensors[f"{n}.inputs"].numpy(), tensors[f"{n}.worth"].numpy()) for n in names]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _tensors(name: str, network: QNetwork) -> dict[str, Tensor]:
    tensors = {f"{name}.{i}.weight": torch.from_numpy(w.copy()) for i, w in enumerate(network.weights)}
    return tensors | {f"{name}.{i}.bias": torch.from_numpy(b.copy()) for i, b in enumerate(network.biases)}


def _network(tensors: Mapping[str, Tensor], name: str) -> QNetwork:
    return QNetwork(
        weights=tuple(tensors[f"{name}.{i}.weight"].numpy() for i in range(3)),
        biases=tuple(tensors[f"{name}.{i}.bias"].numpy() for i in range(3)),
    )


class AdvantageTrainer:
    """Rounds of measuring, fitting and judging; then a search for what measuring cannot tell."""

    def __init__(
        self,
        service: Service,
        recipe: AdvantageRecipe,
        seed: int,
        *,
        init: QNetwork | None = None,
        checkpoints: RoundCheckpoints | None = None,
    ) -> None:
        self._recipe, self._seed, self._checkpoints = recipe, seed, checkpoints
        encoding = fleet_encoding_for(service.fleet)
        sizes = (encoding.size, *recipe.hidden_sizes, encoding.num_models)
        rng = np.random.default_rng([seed, 0])
        network = init or export_network(make_network(sizes, rng))
        self._sampler = Sampler(service, encoding, recipe)
        self._fitter = Fitter(network, recipe, rng)
        self._starts_from = init
        self.training = AdvantageTraining(encoding, network)
        kept = checkpoints.load(self._fitter, self.training) if checkpoints else None
        self.resumed = kept is not None
        self._kept = kept or []
        self._evaluation = self._trials(service, recipe.evaluation_num_requests, [EVALUATION_SEED, 1])
        self._search_on: Trials | None = None
        self._service = service

    def run(self, progress: Progress) -> AdvantageTraining:
        recipe, training = self._recipe, self.training
        began_at = time.monotonic() - training.wall_s
        num_iterations = recipe.num_rounds + recipe.num_searches
        with torch_threads(1), progress.bar("train", num_iterations) as bar:
            bar.advance(training.iteration)
            while training.iteration < num_iterations:
                done = self.step()
                training.wall_s = time.monotonic() - began_at
                bar.describe(f"performance {training.curve[-1].performance:.4f}, {done}")
                bar.advance()
                if self._checkpoints:
                    self._checkpoints.save(self._fitter, training, self._kept)
        return training

    def step(self) -> str:
        """A round or a search draws from its own seed, so that a continued training is the same training."""
        if self.training.iteration < self._recipe.num_rounds:
            return f"{self._round():.0%} of the variance unexplained"
        return f"{self._search():.4f} where it was searched"

    def _trials(self, service: Service, num_requests: int, seed: list[int]) -> Trials:
        rng = np.random.default_rng(seed)
        return Trials(self._sampler, service.fleet, num_requests, self._recipe.num_threads, rng)

    def _search(self) -> float:
        """Measured advantages hold while all others go where they went; how the policy itself reacts to what
        it does, only whole workloads tell."""
        training, recipe, seed = self.training, self._recipe, self._seed
        trials = self._search_on or self._trials(self._service, recipe.search_num_requests, [seed, 2])
        self._search_on = trials
        training.base = training.base or training.best
        room = Offsets(training.base, training.encoding)
        start = np.zeros(room.size) if training.offsets is None else training.offsets
        nth = training.iteration - recipe.num_rounds

        def worth(offsets: NDArray[np.float64]) -> float:
            return trials.mean(trials.performance(room.added(offsets)))

        training.offsets, reached = maximise(
            worth,
            start,
            recipe.num_generations,
            np.random.default_rng([seed, 3, nth]),
            step=recipe.search_step / (1.0 + 0.5 * nth),
        )
        training.iteration += 1
        self._evaluate(room.added(training.offsets))
        return reached

    def _round(self) -> float:
        training = self.training
        *rngs, fit_rng = np.random.default_rng([self._seed, 1, training.iteration]).spawn(
            self._recipe.num_workloads + 1
        )
        now = export_network(self._fitter.network) if training.iteration else self._starts_from
        self._kept.append(self._sampler.measure(now, rngs))
        self._kept = self._kept[-self._recipe.num_rounds_kept :]
        left = self._fitter.fit(join(self._kept), fit_rng)
        training.iteration += 1
        self._evaluate(export_network(self._fitter.network))
        return left

    def _evaluate(self, network: QNetwork) -> None:
        training = self.training
        reached = self._evaluation.performance(network)
        by_rate = {f"{rate:g}": float(p) for rate, p in zip(EVALUATION_RATES_PER_S, reached, strict=False)}
        training.curve.append(Evaluation(training.iteration, self._evaluation.mean(reached), by_rate))
        if training.best_evaluation is training.curve[-1]:
            training.best = network
