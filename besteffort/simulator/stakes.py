"""What the requests of a workload are worth, and what became of that."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from besteffort.simulator.compiled import compiled
from besteffort.simulator.records import State


class Stakes(NamedTuple):
    """What the requests of one fleet are worth; of `F` fleets, with one more axis in front."""

    value: NDArray[np.float64]  # (K, M) of an answer in time
    deadline_ms_per_token: NDArray[np.float64]  # (K,)
    lateness: NDArray[np.float64]  # (2,) lost per ms past the deadline; share of it past which all is lost


@compiled
def worth_of(state: State, stakes: Stakes, request: int, with_latency: float) -> float:
    """Of a completed request, less `with_latency` for each deadline's length that it took."""
    took_ms = state.requests[request]["last_token_at_ms"] - state.requests[request]["arrived_at_ms"]
    latency = took_ms / state.requests[request]["num_output_tokens"]
    deadline = stakes.deadline_ms_per_token[request]
    model = state.replicas[state.requests[request]["replica"]]["model"]
    weight = 1.0
    if latency > deadline:
        weight = 0.0
        if latency - deadline < stakes.lateness[1] * deadline:
            weight = max(0.0, 1.0 - stakes.lateness[0] * (latency - deadline))
    return float(weight * stakes.value[request, model] - with_latency * min(latency / deadline, 10.0))
