"""What the router knows, and whom it sends a request to. No HTTP here."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import ArrivalRateEstimator
from besteffort.engines.running import Engine, Engines
from besteffort.fleet import Fleet
from besteffort.observation import Observation
from besteffort.policies import Policy


@dataclass(frozen=True, slots=True)
class Route:
    task: int
    model: int
    replica: int
    engine: Engine
    arrived_at: float  # s, by the dispatcher's clock
    decision_s: float
    pinned: bool


class Dispatcher:
    """Counts the requests in flight itself, since the engines' own gauges lag by seconds."""

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        engines: Engines,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.engines = engines
        self.clock = clock
        self.in_flight = [[0] * len(of_model) for of_model in engines]  # by model, then by replica
        self.arrival_rate_per_s = 0.0
        self._estimator = ArrivalRateEstimator()

    @contextmanager
    def route(self, task: int, pinned: int | None = None) -> Iterator[Route]:
        """Decide for a request that arrives now, and count it in flight until the block ends.

        `pinned` is a model that the client insists on; its request counts all the same.
        """
        arrived_at = self.clock()
        self.arrival_rate_per_s = self._estimator.observe(arrived_at)
        model = self.policy.choose(self._observe(task, arrived_at)) if pinned is None else pinned
        replica = self._least_loaded_replica(model)
        self.in_flight[model][replica] += 1
        try:
            yield Route(
                task=task,
                model=model,
                replica=replica,
                engine=self.engines[model][replica],
                arrived_at=arrived_at,
                decision_s=self.clock() - arrived_at,
                pinned=pinned is not None,
            )
        finally:
            self.in_flight[model][replica] -= 1

    def _observe(self, task: int, arrived_at: float) -> Observation:
        batch_sizes = np.array([sum(counts) / len(counts) for counts in self.in_flight])
        return Observation(task, batch_sizes, self.arrival_rate_per_s, arrived_at, self._neighbours())

    def _neighbours(self) -> NDArray[np.float64]:
        """What is in flight around the replica that the next request to each model gets, `(M, M)`."""
        num_devices = self.fleet.num_devices
        seen = []
        for model, counts in enumerate(self.in_flight):
            replica = counts.index(min(counts))
            # Replicas are dealt over the devices in turn: see `Fleet.device_of`.
            row = [sum(other[self.fleet.device_of(replica) :: num_devices]) for other in self.in_flight]
            row[model] = counts[replica]
            seen.append(row)
        return np.array(seen, dtype=np.float64)

    def _least_loaded_replica(self, model: int) -> int:
        counts = self.in_flight[model]
        return counts.index(min(counts))
