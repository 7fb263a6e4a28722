"""How the fleet is: a breaker for each engine, and what they come to together."""

import functools
import math
from collections.abc import Mapping

import numpy as np

from besteffort.engines.running import Engine
from besteffort.router.breaker import Breaker, State
from besteffort.router.dispatcher import Dispatcher, Route
from besteffort.router.loads import Standing
from besteffort.router.upstream import Upstream


class Health:
    """Tells the dispatcher how replicas stand, as their engines fail and return."""

    def __init__(
        self, dispatcher: Dispatcher, upstreams: Mapping[Engine, Upstream], rng: np.random.Generator
    ) -> None:
        self._dispatcher = dispatcher
        self._loop = next(iter(upstreams.values())).loop
        breakers = {
            engine: Breaker(upstream, functools.partial(self._turn, engine), rng, engine.served_name)
            for engine, upstream in upstreams.items()
        }
        self.breakers = [[breakers[engine] for engine in of_model] for of_model in dispatcher.engines]
        """By model, then by replica; one engine may be several of these."""

    def of(self, route: Route) -> Breaker:
        return self.breakers[route.model][route.replica]

    @property
    def status(self) -> str:
        """`ok`: every replica takes requests; `down`: none does; else `degraded`."""
        closed = [breaker.state is State.CLOSED for of_model in self.breakers for breaker in of_model]
        return "ok" if all(closed) else "degraded" if any(closed) else "down"

    @property
    def retry_after_s(self) -> int:
        """Whole seconds, at least 1, until an engine that is down is asked next how it is."""
        asks_at = [b.asks_at for of_model in self.breakers for b in of_model if b.state is State.OPEN]
        return max(1, math.ceil(min(asks_at, default=0.0) - self._loop.time()))

    @property
    def states(self) -> dict[str, list[str]]:
        """Of the breakers, by model, then by replica."""
        names = self._dispatcher.fleet.model_names
        return {
            name: [breaker.state.value for breaker in of_model]
            for name, of_model in zip(names, self.breakers, strict=True)
        }

    def close(self) -> None:
        for of_model in self.breakers:
            for breaker in of_model:
                breaker.close()

    def _turn(self, turned: Engine, standing: Standing) -> None:
        for model, of_model in enumerate(self._dispatcher.engines):
            for replica, engine in enumerate(of_model):
                if engine == turned:
                    self._dispatcher.stand(model, replica, standing)
