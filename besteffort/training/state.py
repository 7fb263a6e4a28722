"""How far a training has come, and what it has reached."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from besteffort.observation import Encoding, FleetEncoding
from besteffort.q_network import QNetwork

Reads = TypeVar("Reads", Encoding, FleetEncoding)


@dataclass(frozen=True)
class Evaluation:
    """The policy without exploration, on workloads held out from training; tasks count by their weight."""

    iteration: int
    performance: float
    by_rate: dict[str, float]  # the paper's rates per second, not yet times the fleet's `rate_scale`
    by_trace: dict[str, float] = field(default_factory=dict)


@dataclass
class Training(Generic[Reads]):
    """How far a training has come; in the end, its result."""

    encoding: Reads
    best: QNetwork  # of all evaluations
    iteration: int = 0
    curve: list[Evaluation] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def best_evaluation(self) -> Evaluation:
        """The first one of the best."""
        return max(self.curve, key=lambda evaluation: evaluation.performance)

    def judge(self, network: QNetwork, evaluation: Evaluation) -> None:
        """Note what a network has reached, and keep it if none was better."""
        self.curve.append(evaluation)
        if self.best_evaluation is evaluation:
            self.best = network

    def to_facts(self) -> dict[str, Any]:
        """For a checkpoint; the network goes in its tensors."""
        curve = [asdict(evaluation) for evaluation in self.curve]
        return {"iteration": self.iteration, "curve": curve, "wall_s": self.wall_s}

    def restore(self, facts: Mapping[str, Any], best: QNetwork) -> None:
        self.best, self.iteration, self.wall_s = best, facts["iteration"], facts["wall_s"]
        self.curve = [Evaluation(**evaluation) for evaluation in facts["curve"]]
