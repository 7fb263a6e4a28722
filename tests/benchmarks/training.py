"""What the `paper` recipe costs and reaches, beside Stable-Baselines3's DQN on the same environment.

`make bench-training` runs it, and installs Stable-Baselines3 before. Both train in turns of a few
seconds, so that what else the machine does meanwhile hits both alike, and medians of the turns count.

Both get the same transitions. A reward is known only when its request completes, many decisions later,
and `RoutingEnvironment` hands a transition over then. Here such transitions go straight into
Stable-Baselines3's replay buffer. Its own way, a reward with every step, would credit a request to
whichever decision was made when it completed: another problem, and a harder one.

What stays different is the algorithm as Stable-Baselines3 has it: the target network's maximum instead
of Double Q-learning, gradients clipped at a norm of 10, and one draw for all fleets whether to explore.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import stable_baselines3
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv

from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.dqn import RECIPES, Recipe, Trainer, evaluation_workloads
from besteffort.environment import RoutingEnvironment, Service, Transitions, encoding_for, evaluate
from besteffort.fleet import load_fleet

FLEET_DIR = Path(__file__).parents[2] / "artifacts" / "titan-rtx-opt"
SEEDS = (0, 1, 2)
TURN = 100  # iterations
NUM_EVALUATIONS = 5
SCALE = 10_000  # iterations, to which times are scaled


class FleetsAsVecEnv(VecEnv):
    """`RoutingEnvironment` in Stable-Baselines3's words: `infos` bring the transitions, `rewards` nothing."""

    def __init__(self, environment: RoutingEnvironment, num_fleets: int, num_inputs: int, num_models: int):
        self._environment = environment
        inputs = spaces.Box(0.0, np.inf, (num_inputs,), np.float32)
        super().__init__(num_fleets, inputs, spaces.Discrete(num_models))
        self._nothing = np.zeros(num_fleets, dtype=np.float32)

    def reset(self) -> NDArray[np.float32]:
        return self._environment.reset()

    def step_async(self, actions: NDArray[np.int64]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[Any]]:
        observations, transitions = self._environment.step(self._actions)
        # Workloads only truncate, and the next observation of each transition is in it: nothing is done.
        return observations, self._nothing, self._nothing.astype(bool), [{"transitions": transitions}]

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs  # there is nothing to render

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


class LateReplayBuffer(ReplayBuffer):
    """Stable-Baselines3's, but it takes the transitions that `infos` bring, of whichever fleet."""

    def __init__(self, *args: Any, n_envs: int, **kwargs: Any) -> None:
        super().__init__(*args, n_envs=1, **kwargs)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[Any]) -> None:
        known: Transitions = infos[0]["transitions"]
        rows = (self.pos + np.arange(len(known))) % self.buffer_size
        self.observations[rows, 0] = known.observations
        self.actions[rows, 0, 0] = known.actions
        self.rewards[rows, 0] = known.rewards
        self.next_observations[rows, 0] = known.next_observations
        self.full |= self.pos + len(known) >= self.buffer_size
        self.pos = (self.pos + len(known)) % self.buffer_size


class Rival:
    """Stable-Baselines3's DQN by the same recipe, on fleets of its own."""

    def __init__(self, service: Service, recipe: Recipe, seed: int) -> None:
        self._service, self._recipe = service, recipe
        self._encoding = encoding_for(service.fleet)
        self._workloads = evaluation_workloads(service.fleet)
        self.curve: list[float] = []
        environment = RoutingEnvironment(
            service,
            self._encoding,
            np.random.default_rng([seed, 2]),
            num_fleets=recipe.num_fleets,
            num_requests=recipe.num_requests,
            mean_requests_per_rate=recipe.mean_requests_per_rate,
        )
        sizes = (recipe.num_fleets, self._encoding.size, self._encoding.num_models)
        self._dqn = DQN(
            "MlpPolicy",
            FleetsAsVecEnv(environment, *sizes),
            learning_rate=recipe.learning_rate,
            buffer_size=recipe.replay_buffer_size,
            learning_starts=recipe.num_first_transitions,
            batch_size=recipe.batch_size,
            gamma=recipe.discount,
            train_freq=1,  # steps of all fleets
            gradient_steps=1,
            replay_buffer_class=LateReplayBuffer,
            target_update_interval=recipe.target_update_every * recipe.num_fleets,  # it counts decisions
            policy_kwargs={"net_arch": list(recipe.hidden_sizes)},
            seed=seed,
            device="cpu",
        )
        # It would count the first decisions as part of the decay, and each call of `learn` as a training.
        self._dqn.exploration_schedule = lambda _: self._epsilon

    @property
    def num_iterations(self) -> int:
        return int(self._dqn._n_updates)

    @property
    def _epsilon(self) -> float:
        recipe = self._recipe
        decay = (0.0, recipe.epsilon_decay_share * recipe.num_iterations)
        return float(np.interp(self.num_iterations, decay, (recipe.first_epsilon, recipe.last_epsilon)))

    def go_on(self, num_iterations: int) -> None:
        """Train so much further; the first time it fills the replay buffer before."""
        first = 0 if self._dqn.num_timesteps else self._recipe.num_first_transitions
        num_decisions = first + num_iterations * self._recipe.num_fleets
        self._dqn.learn(num_decisions, log_interval=None, reset_num_timesteps=first > 0)

    def evaluate(self) -> None:
        reached = evaluate(self._service, self._encoding, self._workloads, self._best_actions)
        self.curve.append(float(reached.mean()))

    def _best_actions(self, inputs: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.asarray(self._dqn.predict(inputs, deterministic=True)[0])


@dataclass
class Stopwatch:
    """What each turn took, on the clock and of the CPU."""

    turns_s: list[tuple[float, float]] = field(default_factory=list)

    def start(self) -> None:
        self._began_at = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        wall_at, cpu_at = self._began_at
        self.turns_s.append((time.perf_counter() - wall_at, time.process_time() - cpu_at))

    @property
    def scaled_s(self) -> NDArray[np.float64]:
        """The median turn, for `SCALE` iterations; the first turn filled the replay buffer."""
        median: NDArray[np.float64] = np.median(self.turns_s[1:], axis=0) * SCALE / TURN
        return median


class InTurns:
    """Shows no progress: it lets the rival make its turn whenever the trainer has made one."""

    def __init__(self, rival: Rival, evaluate_every: int) -> None:
        self._rival, self._evaluate_every = rival, evaluate_every
        self.own, self.rivals = Stopwatch(), Stopwatch()
        self._iteration = 0

    @contextmanager
    def bar(self, title: str, num_steps: int) -> Iterator["InTurns"]:
        self.own.start()
        yield self

    def advance(self, num_steps: int = 1) -> None:
        self._iteration += num_steps
        if num_steps and self._iteration % TURN == 0:
            self.own.stop()
            self.rivals.start()
            self._rival.go_on(TURN)
            self.rivals.stop()
            if self._rival.num_iterations % self._evaluate_every == 0:
                self._rival.evaluate()
            self.own.start()

    def describe(self, text: str) -> None:
        pass

    def say(self, line: str) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """One seed: wall and CPU seconds, and the performance at each evaluation."""

    own_s: NDArray[np.float64]
    rivals_s: NDArray[np.float64]
    own_curve: Sequence[float]
    rivals_curve: Sequence[float]


def run(service: Service, recipe: Recipe, seed: int) -> Run:
    rival = Rival(service, recipe, seed)
    turns = InTurns(rival, recipe.evaluate_every)
    training = Trainer(service, recipe, seed).run(turns)
    if not rival.num_iterations == training.iteration == recipe.num_iterations:
        raise RuntimeError(f"{rival.num_iterations} iterations beside {training.iteration}")
    curve = [evaluation.performance for evaluation in training.curve]
    return Run(turns.own.scaled_s, turns.rivals.scaled_s, curve, rival.curve)


def told(values: Sequence[float] | NDArray[np.float64], digits: int) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def report(runs: Sequence[Run], recipe: Recipe) -> None:
    out = sys.stdout.write
    own_s, rivals_s = np.array([r.own_s for r in runs]), np.array([r.rivals_s for r in runs])
    out(f"\n{f's per {SCALE:,} iterations':24}{'besteffort':18}{'stable-baselines3':20}ratio\n")
    for column, clock in enumerate(("on the clock", "of the CPU")):
        own, rivals = own_s[:, column], rivals_s[:, column]
        out(f"{clock:24}{told(own, 1):18}{told(rivals, 1):20}{told(own / rivals, 2)}\n")
    out(f"\n{'performance after':24}{'besteffort':18}{'stable-baselines3':20}on the clock\n")
    own_curves, rivals_curves = ([getattr(r, name) for r in runs] for name in ("own_curve", "rivals_curve"))
    curves = zip(np.transpose(own_curves), np.transpose(rivals_curves), strict=True)
    for nth, (own, rivals) in enumerate(curves, start=1):
        iteration = nth * recipe.evaluate_every
        out(f"{f'{iteration:,} iterations':24}{told(own, 4):18}{told(rivals, 4):20}")
        own_at, rivals_at = (iteration / SCALE * took_s[:, 0].mean() for took_s in (own_s, rivals_s))
        out(f"{own_at:.0f} s and {rivals_at:.0f} s\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's recipe beside Stable-Baselines3's DQN.")
    parser.add_argument("--iterations", type=int, default=5000, help="of each training; a multiple of 500")
    num_iterations = parser.parse_args().iterations
    step = TURN * NUM_EVALUATIONS
    if num_iterations < 2 * step or num_iterations % step:
        parser.error(f"--iterations {num_iterations}: give a multiple of {step}, from {2 * step}")
    every = num_iterations // NUM_EVALUATIONS
    recipe = replace(RECIPES["paper"], num_iterations=num_iterations, evaluate_every=every)
    fleet = load_fleet(FLEET_DIR)
    latency = load_latency(FLEET_DIR / "profile.parquet", fleet)
    service = Service(fleet, latency, load_rewards(FLEET_DIR / "rewards.parquet", fleet))
    versions = f"torch {torch.__version__}, stable-baselines3 {stable_baselines3.__version__}"
    sys.stdout.write(
        f"Recipe `paper`, {fleet.name}, {recipe.num_threads} thread of torch; {versions}\n"
        f"An iteration: {recipe.num_fleets} fleets make 1 decision each, then 1 gradient step on "
        f"{recipe.batch_size:,} transitions\n"
        f"Before the first: {recipe.num_first_transitions:,} random decisions. Measured: "
        f"{num_iterations:,} iterations for each of {len(SEEDS)} seeds,\n"
        f"in turns of {TURN}; their median is scaled to {SCALE:,}; epsilon falls over the first "
        f"{recipe.epsilon_decay_share:.0%}\n"
    )
    report([run(service, recipe, seed) for seed in SEEDS], recipe)


if __name__ == "__main__":
    main()
