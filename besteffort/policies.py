"""Policies: which model the next request goes to.

A policy sees an `Observation` and nothing else; which replica of the model takes the request is
not its business.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import RecentRates, arrival_rates_per_s
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.artifacts.thresholds_file import load_thresholds
from besteffort.deadline import deadline_weight
from besteffort.errors import PolicyError
from besteffort.fleet import Fleet, Task
from besteffort.kernels import choose
from besteffort.latency import Latency
from besteffort.observation import Encoding, FleetEncoding, Observation
from besteffort.q_network import Decider, QNetwork
from besteffort.thresholds import RateSmoother, ThresholdTable

BUILT_IN = (
    "static:MODEL",
    "round-robin",
    "random",
    "least-loaded",
    "greedy",
    "slackfit",
    "thresholds",
    "hindsight",
)
_NUM_STEADYING = 8  # times the arrivals that are smoothed over: what came before weighs nothing
HINDSIGHT = "hindsight"  # no policy, since it sees the future; a simulated replay knows it


class Policy(Protocol):
    @property
    def name(self) -> str: ...

    def choose(self, observation: Observation) -> int:
        """The index of the model, from the fleet's smallest (0) to its largest."""


@runtime_checkable
class Remembers(Protocol):
    """A policy that goes by past arrivals too."""

    def remember(self, arrived_at: NDArray[np.float64]) -> None:
        """Take these arrivals, `(N,)` seconds by the clock of the observations, for the last ones; N > 0."""


class HasQValues:
    """A policy that goes by a network."""

    _decider: Decider

    @property
    def q_values(self) -> NDArray[np.float32]:
        """`(M,)` of the last choice, good until the next; -inf: the model was closed."""
        return self._decider.q_values


@dataclass(frozen=True)
class Static:
    """One model for everything: the paper's baselines (Sec. 4.1)."""

    model: int
    name: str

    def choose(self, observation: Observation) -> int:
        return self.model


@dataclass
class RoundRobin:
    name: str = "round-robin"
    _next: int = field(default=-1, init=False)

    def choose(self, observation: Observation) -> int:
        self._next = (self._next + 1) % len(observation.batch_sizes)
        return self._next


@dataclass(frozen=True)
class Random:
    rng: np.random.Generator
    name: str = "random"

    def choose(self, observation: Observation) -> int:
        return int(self.rng.integers(len(observation.batch_sizes)))


@dataclass(frozen=True)
class LeastLoaded:
    """The smallest batch; among equals the largest model."""

    name: str = "least-loaded"

    def choose(self, observation: Observation) -> int:
        reverse = observation.batch_sizes[::-1]
        return len(reverse) - 1 - int(np.argmin(reverse))


@dataclass(frozen=True)
class Greedy:
    """The highest `w * A` if all batches stayed as they are; the fastest if no model can make it."""

    latency: Latency
    relative_rewards: NDArray[np.float64]  # (T, M)
    fleet: Fleet
    name: str = "greedy"

    def choose(self, observation: Observation) -> int:
        task = self.fleet.tasks[observation.task]
        predicted = _predicted_ms_per_token(self.latency, task, observation)
        weight = deadline_weight(
            predicted, _deadline_ms_per_token(task, observation), self.fleet.deadline_kind
        )
        utility = weight * self.relative_rewards[observation.task]
        if not utility.any():
            return int(np.argmin(predicted))
        return int(np.argmax(utility))


def _predicted_ms_per_token(latency: Latency, task: Task, observation: Observation) -> NDArray[np.float64]:
    """Of a request of mean length at each model, shape `(M,)`, if all batches stayed as they are."""
    return latency.predicted_ms_per_token(
        observation.batch_sizes,
        num_prompt_tokens=round(sum(task.num_prompt_tokens) / 2),
        num_output_tokens=round(sum(task.num_output_tokens) / 2),
    )


def _deadline_ms_per_token(task: Task, observation: Observation) -> float:
    own = observation.deadline_ms_per_token
    return task.deadline_ms_per_token if own is None else own


@dataclass(frozen=True)
class SlackFit:
    """The largest model whose predicted latency fits the deadline; the fastest if none does.

    SuperServe's policy (Khare et al., arXiv 2312.16733): the largest that the slack allows.
    """

    latency: Latency
    fleet: Fleet
    name: str = "slackfit"

    def choose(self, observation: Observation) -> int:
        task = self.fleet.tasks[observation.task]
        predicted = _predicted_ms_per_token(self.latency, task, observation)
        fits = np.flatnonzero(predicted <= _deadline_ms_per_token(task, observation))
        return int(fits[-1]) if len(fits) else int(np.argmin(predicted))


@dataclass
class Thresholds:
    """The largest model that is not too full for the task at this arrival rate."""

    table: ThresholdTable
    name: str = "thresholds"
    _smoother: RateSmoother = field(init=False)

    def __post_init__(self) -> None:
        self._smoother = RateSmoother(self.table.num_smoothed)

    def choose(self, observation: Observation) -> int:
        rate_per_s = self._smoother.observe(observation.arrival_rate_per_s)
        return self.table.choose(observation.task, observation.batch_sizes, rate_per_s)

    def remember(self, arrived_at: NDArray[np.float64]) -> None:
        for rate_per_s in arrival_rates_per_s(arrived_at[-_NUM_STEADYING * self.table.num_smoothed :]):
            self._smoother.observe(float(rate_per_s))


class Learned(HasQValues):
    """The highest Q-value (paper, Sec. 3.2)."""

    def __init__(self, network: QNetwork, encoding: Encoding, name: str) -> None:
        self.name = name
        self._encoding = encoding
        self._decider = Decider(network)
        encoding.encode_one(_idle(encoding.num_models), self._decider.inputs)  # compiled now, not when asked

    def choose(self, observation: Observation) -> int:
        self._encoding.encode_one(observation, self._decider.inputs)
        return _highest(self._decider(), observation.closed)


class LearnedOnFleet(HasQValues):
    """The highest Q-value, by more than the paper's state."""

    def __init__(self, network: QNetwork, encoding: FleetEncoding, name: str) -> None:
        self.name = name
        self._scales = encoding.scales
        self._decider = Decider(network)
        self._rates = RecentRates(encoding.spans_s)
        self.choose(_idle(encoding.num_models))  # as above
        self._rates = RecentRates(encoding.spans_s)

    def choose(self, observation: Observation) -> int:
        """Raises ValueError: the observation lacks `neighbours`."""
        if observation.neighbours is None:
            raise ValueError("this policy needs to see the neighbours")
        rates, decider = self._rates, self._decider
        chosen = choose(
            rates.spans, rates.elapsed_s(observation.arrived_at), self._scales,
            observation.task, observation.arrival_rate_per_s, observation.batch_sizes, observation.neighbours,
            decider.sizes, decider.parameters, decider.values,
        )  # fmt: skip
        return _highest(decider.q_values, observation.closed) if observation.closed else int(chosen)

    def remember(self, arrived_at: NDArray[np.float64]) -> None:
        self._rates.remember(arrived_at)


def _idle(num_models: int) -> Observation:
    return Observation(0, np.zeros(num_models), 0.0, 0.0, np.zeros((num_models, num_models)))


def _highest(q_values: NDArray[np.float32], closed: tuple[int, ...]) -> int:
    for model in closed:
        q_values[model] = -np.inf
    return int(q_values.argmax())


def learned(trained: TrainedPolicy, name: str) -> Policy:
    """What a trained network does, by the encoding that it was trained with."""
    if isinstance(trained.encoding, FleetEncoding):
        return LearnedOnFleet(trained.network, trained.encoding, name)
    return Learned(trained.network, trained.encoding, name)


def load_named_policy(
    spec: str,
    fleet: Fleet,
    *,
    profile: Path,
    rewards: Path,
    rng: np.random.Generator,
    thresholds: Path | None = None,
) -> Policy:
    """A policy by its built-in name, or trained, from its file.

    `greedy`, `slackfit` and `thresholds` read the profile and the rewards; `thresholds` reads the file
    of that name too, by default the one beside the profile.

    Raises:
        PolicyError: no such name and no such file, or a policy for another fleet.
        ProfileError, RewardsError: what the policy needs is missing or of another fleet.
    """
    if spec.startswith("static:"):
        return _static(spec, fleet)
    simple: dict[str, Callable[[], Policy]] = {
        "round-robin": RoundRobin,
        "random": lambda: Random(rng),
        "least-loaded": LeastLoaded,
        "greedy": lambda: Greedy(load_latency(profile, fleet), load_rewards(rewards, fleet).relative, fleet),
        "slackfit": lambda: SlackFit(load_latency(profile, fleet), fleet),
        "thresholds": lambda: Thresholds(
            load_thresholds(
                thresholds or profile.with_name("thresholds.parquet"), fleet, profile=profile, rewards=rewards
            )
        ),
    }
    if spec == HINDSIGHT:
        raise PolicyError(
            f"--policy {spec}: it needs to know the future, so it only goes with `besteffort replay "
            "TRACE FLEET_DIR --simulate`; choose another policy here"
        )
    if spec in simple:
        return simple[spec]()
    path = Path(spec)
    if path.suffix == ".safetensors" or path.exists():
        return learned(load_policy(path, fleet), name=f"trained:{path.stem}")
    raise PolicyError(
        f"--policy {spec}: no built-in policy and no such file; give a .safetensors file "
        f"or one of {', '.join(BUILT_IN)}"
    )


def _static(spec: str, fleet: Fleet) -> Static:
    model = spec.removeprefix("static:")
    if model not in fleet.model_names:
        raise PolicyError(
            f"--policy {spec}: fleet {fleet.name!r} has no model {model!r}; "
            f"its models are {', '.join(fleet.model_names)}"
        )
    return Static(fleet.model_names.index(model), spec)
