"""What training draws from: random rates or pieces of traces, the fleet's own mix of tasks or random ones.

The paper trains on random rates and a uniform mix, and says that developers may exploit what they know of
their workloads (Sec. 3.2); its Appendix E tries policies on mixes that they were not trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from besteffort.fleet import Fleet
from besteffort.request import Requests
from besteffort.training.trace_parts import TracePart, TrainingTrace

TASK_MIXES = ("fleet", "random")
# Of the Dirichlet distribution that random mixes come from: below 1, so that single tasks often prevail.
CONCENTRATION = 0.5
# Of the workloads, where there are traces, come from one of them; and that much they count in evaluations.
TRACE_SHARE = 0.5
# A piece of a trace is sped up by a factor from here, even on a logarithmic scale: no trace comes again as
# it was.
SPEEDS = (0.5, 2.0)
PIECES_PER_TRACE = 3  # on which networks are judged


class Shape(Protocol):
    """How long a workload is; where its rates are random, also how."""

    def draw(self, fleet: Fleet, rng: np.random.Generator) -> Requests:
        """At random rates."""

    def cut(self, part: TracePart, speed: float, rng: np.random.Generator) -> Requests:
        """At those of a trace, from a random place on."""


@dataclass(frozen=True)
class TrainingWorkloads:
    """Of one fleet, whatever the recipe."""

    fleet: Fleet
    task_mix: str = "fleet"  # one of `TASK_MIXES`
    traces: tuple[TrainingTrace, ...] = ()

    def draw(self, shape: Shape, rng: np.random.Generator) -> Requests:
        """One to train on."""
        if self.traces and rng.random() < TRACE_SHARE:
            trace = self.traces[rng.integers(len(self.traces))]
            speed = float(np.exp(rng.uniform(*np.log(SPEEDS))))
            return shape.cut(trace.trained_on, speed, rng)
        return shape.draw(self.mixed(rng), rng)

    def mixed(self, rng: np.random.Generator) -> Fleet:
        """The fleet, with the shares of its tasks drawn anew if the mix is random."""
        if self.task_mix == "fleet":
            return self.fleet
        shares = rng.dirichlet(np.full(len(self.fleet.tasks), CONCENTRATION))
        tasks = tuple(
            task.model_copy(update={"share": float(share)})
            for task, share in zip(self.fleet.tasks, shares, strict=True)
        )
        return self.fleet.model_copy(update={"tasks": tasks})

    @property
    def life_s(self) -> float:
        """How long a request may take that is in time: the longest of the fleet, nearly all of a trace."""
        deadlines = np.array([task.deadline_ms_per_token for task in self.fleet.tasks])
        lives = [self.fleet.request_life_s]
        for trace in self.traces:
            requests = trace.trained_on.requests
            lives.append(
                float(np.quantile(deadlines[requests.task] * requests.num_output_tokens, 0.99)) / 1e3
            )
        return max(lives)

    def pieces(
        self, parts: Sequence[TracePart], num_requests: int, rng: np.random.Generator
    ) -> list[Requests]:
        """To judge networks on: `PIECES_PER_TRACE` of each part, at their own speed."""
        return [
            part.from_request(int(rng.integers(len(part))), num_requests)
            for part in parts
            for _ in range(PIECES_PER_TRACE)
        ]

    def overall(self, at_random_rates: float, on_pieces: NDArray[np.float64]) -> float:
        """What networks are compared by: what they reach there, and on the `pieces` of all traces."""
        if not self.traces:
            return at_random_rates
        return (1.0 - TRACE_SHARE) * at_random_rates + TRACE_SHARE * float(on_pieces.mean())

    def by_trace(self, on_pieces: NDArray[np.float64]) -> dict[str, float]:
        means = on_pieces.reshape(len(self.traces), PIECES_PER_TRACE).mean(axis=1)
        return {trace.name: float(mean) for trace, mean in zip(self.traces, means, strict=True)}
