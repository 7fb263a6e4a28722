"""Whole workloads, on which one network is judged after the other."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.simulator import Branching
from besteffort.training.state import Evaluation
from besteffort.training.trace_parts import TracePart
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import stable, unpredictable_1, unpredictable_2

# A seed that no training draws from, and no table of results may use: the best network is chosen by it.
EVALUATION_SEED = 2**31
RATES_PER_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 40.0, 48.0)


class Trials:
    """The same workloads for every network: steady ones, three of each other kind, and pieces of traces."""

    def __init__(
        self,
        branching_on: Callable[[Requests], Branching],
        workloads: TrainingWorkloads,
        parts: Sequence[TracePart],
        num_requests: int,
        num_threads: int,
        rng: np.random.Generator,
    ) -> None:
        """`parts` are one of each of the traces of `workloads`, in their order."""
        rngs = rng.spawn(len(RATES_PER_S) + 6)
        drawn = [stable(workloads.mixed(own), own, rate, num_requests=num_requests)
                 for own, rate in zip(rngs, RATES_PER_S, strict=False)]  # fmt: skip
        drawn += [unpredictable_1(workloads.mixed(own), own, 3 * num_requests) for own in rngs[-6:-3]]
        drawn += [unpredictable_2(workloads.mixed(own), own, 3 * num_requests) for own in rngs[-3:]]
        self._num_random = len(drawn)
        drawn += workloads.pieces(parts, num_requests, rng)
        self._workloads, self._num_threads = workloads, num_threads
        self._branchings = [branching_on(requests) for requests in drawn]

    def performance(self, network: QNetwork) -> NDArray[np.float64]:
        """Mean worth of the requests of each workload, shape `(W,)`."""

        def one(branching: Branching) -> float:
            branching.use(network)
            return float(branching.serve()[0].mean())

        with ThreadPoolExecutor(self._num_threads) as pool:
            return np.array(list(pool.map(one, self._branchings)))

    def mean(self, reached: NDArray[np.float64]) -> float:
        """Each of the three kinds of random workloads weighs the same."""
        kinds, on_pieces = reached[: self._num_random], reached[self._num_random :]
        at_random = float(np.mean([kinds[:-6].mean(), kinds[-6:-3].mean(), kinds[-3:].mean()]))
        return self._workloads.overall(at_random, on_pieces)

    def evaluate(self, network: QNetwork, iteration: int) -> Evaluation:
        reached = self.performance(network)
        by_rate = {f"{rate:g}": float(p) for rate, p in zip(RATES_PER_S, reached, strict=False)}
        by_trace = self._workloads.by_trace(reached[self._num_random :])
        return Evaluation(iteration, self.mean(reached), by_rate, by_trace)
