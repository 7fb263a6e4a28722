"""What the router knows, and whom it sends a request to. No HTTP here."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import msgspec
import numpy as np

from besteffort.arrivals import ArrivalRateEstimator
from besteffort.engines.running import Engine, Engines
from besteffort.errors import EngineError
from besteffort.fleet import Fleet
from besteffort.observation import Observation
from besteffort.policies import HasQValues, Policy, Remembers
from besteffort.router.forecast import Forecast
from besteffort.router.loads import Loads, Standing
from besteffort.router.seats import Seats

_NUM_REMEMBERED = 32_768  # arrivals, for a policy that is put in charge while requests come


class NoReplicaError(EngineError):
    """No replica that could take the request is one that anything may be sent to."""


class ModelFullError(EngineError):
    """The client insists on a model that has as many requests as it may have."""


class Route(msgspec.Struct, gc=False):  # no dataclass: it would take twice as long to make
    """Which replica a request went to, and by whose choice; once it is given out nothing of it changes."""

    task: int
    model: int
    replica: int
    engine: Engine
    arrived_at: float  # s, by the dispatcher's clock
    decision_s: float
    pinned: bool
    policy: str  # that decided; "pinned": the client did
    predicted_ms_per_token: float | None = None  # by the batch sizes at the decision


class Decision(msgspec.Struct):
    """What a policy saw, and what it made of it. Of arrays there are the bytes, since others are written into
    the same memory afterwards; none where there is none."""

    arrival_rate_per_s: float
    batch_sizes: bytes  # (M,) float64, as in `Observation`
    neighbours: bytes  # (M, M) float64
    chosen: int
    policy: str
    q_values: bytes  # (M,) float32


class Dispatcher:
    """Counts the requests in flight itself, since the engines' own gauges lag by seconds.

    Not for several threads.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        engines: Engines,
        clock: Callable[[], float] = time.perf_counter,
        forecast: Forecast | None = None,
    ) -> None:
        self.fleet = fleet
        self.policy = policy
        self.engines = engines
        self.clock = clock
        self.forecast = forecast
        self.seats: Seats | None = None  # there is no limit
        self.arrival_rate_per_s = 0.0
        self.keeps_decisions = False
        self.decision: Decision | None = None
        """The last one, if they are kept; None where the client chose"""
        self._estimator = ArrivalRateEstimator()
        self._arrivals = deque[float](maxlen=_NUM_REMEMBERED)
        self._loads = Loads([len(of_model) for of_model in engines], fleet.num_devices)

    @property
    def in_flight(self) -> list[list[int]]:
        """Requests by model, then by replica; to be read only."""
        return self._loads.in_flight

    @contextmanager
    def route(self, task: int, pinned: int | None = None) -> Iterator[Route]:
        """`begin`, and `end` when the block ends."""
        route = self.begin(task, pinned)
        try:
            yield route
        finally:
            self.end(route)

    def begin(
        self, task: int, pinned: int | None = None, deadline_ms_per_token: float | None = None
    ) -> Route:
        """Decide for a request that arrives now, and count it in flight until it is given to `end`.

        `pinned` is a model that the client insists on; its request counts all the same. Without a deadline
        it has its task's.

        Raises:
            NoReplicaError: every replica is out, or every one of the pinned model.
            ModelFullError: the pinned model has as many requests as it may have.
        """
        full = self._admit(pinned)
        arrived_at = self.clock()
        self.arrival_rate_per_s = self._estimator.observe(arrived_at)
        self._arrivals.append(arrived_at)
        if pinned is None:
            seen = self._observe(task, arrived_at, deadline_ms_per_token, full)
            chosen = self.policy.choose(seen)
            if self.keeps_decisions:
                self.decision = self._decision(seen, chosen)
        else:
            chosen, self.decision = pinned, None
        return self._send(task, chosen, arrived_at, pinned is not None, full)

    def begin_again(self, failed: Route, tried: Collection[tuple[int, int]]) -> Route:
        """Another replica for a request that has arrived before, which counts until it is given to `end` too.

        It is none of `tried`, pairs of model and replica, and of the same model if there is one; the failed
        route is not ended by this. The policy is not asked again, and sees no second arrival.

        Raises:
            NoReplicaError: as `begin`; those that were tried are as good as out.
        """
        before = {pair: self._loads.standing(*pair) for pair in tried}
        try:
            for pair in before:
                self._loads.stand(*pair, Standing.OUT)
            route = self._send(failed.task, failed.model, failed.arrived_at, failed.pinned)
        finally:
            for pair, standing in before.items():
                self._loads.stand(*pair, standing)
        route.decision_s, route.policy = failed.decision_s, failed.policy
        return route

    def end(self, route: Route) -> None:
        """Once for each route that began."""
        self._loads.add(route.model, route.replica, -1)

    def stand(self, model: int, replica: int, standing: Standing) -> None:
        """How the replica stands from now on. What is in flight there goes on until it is ended."""
        self._loads.stand(model, replica, standing)

    def put_in_charge(self, policy: Policy) -> None:
        """Let another policy decide from the next request on, as if it had seen the last arrivals."""
        if isinstance(policy, Remembers) and self._arrivals:
            policy.remember(np.array(self._arrivals))
        self.policy = policy

    def _decision(self, seen: Observation, chosen: int) -> Decision:
        policy = self.policy
        return Decision(
            seen.arrival_rate_per_s,
            seen.batch_sizes.tobytes(),
            b"" if seen.neighbours is None else seen.neighbours.tobytes(),
            chosen,
            policy.name,
            policy.q_values.tobytes() if isinstance(policy, HasQValues) else b"",
        )

    def _admit(self, pinned: int | None) -> tuple[int, ...]:
        """The models that are full. Who is refused here is no arrival: the rate is of what has to be placed.

        Raises as `begin`.
        """
        loads, seats = self._loads, self.seats
        if loads.closed:
            models = range(len(self.engines)) if pinned is None else (pinned,)
            if all(loads.best(model) is Standing.OUT for model in models):
                raise self._no_replica(pinned)
        if seats is None or sum(loads.totals) < seats.scarce_from:
            return ()
        full = seats.full(loads.totals, loads.closed)
        if pinned in full:
            raise ModelFullError("the model has as many requests as it may have")
        return full

    def _no_replica(self, pinned: int | None) -> NoReplicaError:
        missing = "of any model" if pinned is None else f"of {self.fleet.model_names[pinned]}"
        return NoReplicaError(f"no replica {missing} is up now")

    def _observe(
        self, task: int, arrived_at: float, deadline_ms_per_token: float | None, full: tuple[int, ...]
    ) -> Observation:
        loads = self._loads
        batch_sizes, neighbours = loads.seen()
        closed = tuple({*loads.closed, *full}) if full else loads.closed
        return Observation(
            task, batch_sizes, self.arrival_rate_per_s, arrived_at, neighbours, closed, deadline_ms_per_token
        )

    def _send(
        self, task: int, chosen: int, arrived_at: float, pinned: bool, full: tuple[int, ...] = ()
    ) -> Route:
        loads = self._loads
        is_open = chosen not in loads.closed and chosen not in full
        model = chosen if is_open else self._open_model(chosen, pinned, full)
        replica = loads.least[model]
        loads.add(model, replica, 1)
        engine = self.engines[model][replica]
        decision_s = self.clock() - arrived_at
        predicted = None
        if self.forecast is not None:
            predicted = self.forecast.latency_ms_per_token(
                task, model, loads.in_flight[model][replica], loads.on_device[replica]
            )
        policy = "pinned" if pinned else self.policy.name
        return Route(task, model, replica, engine, arrived_at, decision_s, pinned, policy, predicted)

    def _open_model(self, chosen: int, pinned: bool, full: tuple[int, ...]) -> int:
        """For one that is full, or of which no replica is up: the next smaller one, which is faster, or a
        larger one.

        Where none is up at all, one that stands best: what failed lately may have come back, and to try it is
        better than to refuse.
        """
        loads = self._loads
        models = [chosen] if pinned else range(len(self.engines))
        nearest = min(
            models,
            key=lambda model: (model in full, loads.best(model), model > chosen, abs(model - chosen)),
        )
        if loads.best(nearest) is Standing.OUT:
            raise self._no_replica(chosen if pinned else None)
        return nearest
