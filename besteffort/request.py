"""What became of the requests of a trace: the one form in which a replay and a simulation report."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Requests:
    """A trace in memory, in order of arrival; every array has shape `(N,)`."""

    arrived_at: NDArray[np.float64]  # s from the start, not falling
    task: NDArray[np.int64]  # index into the fleet's tasks
    num_prompt_tokens: NDArray[np.int64]
    num_output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrived_at)


@dataclass(frozen=True)
class Outcomes:
    """One row per request; every array has shape `(N,)`. Instants are seconds from the start.

    A failed request has a non-empty `error`, and NaN where an instant never came.
    """

    requests: Requests
    model: NDArray[np.int64]  # index into the fleet's models; -1: never routed
    replica: NDArray[np.int64]  # -1: never routed
    sent_at: NDArray[np.float64]  # when it reached the router; ideally `requests.arrived_at`
    first_token_at: NDArray[np.float64]
    last_token_at: NDArray[np.float64]
    num_tokens_received: NDArray[np.int64]
    error: list[str]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def answered(self) -> NDArray[np.bool_]:
        return np.array([not error for error in self.error], dtype=np.bool_)

    @property
    def latency_ms_per_token(self) -> NDArray[np.float64]:
        """Time from the arrival at the router to the last token, per output token; NaN if failed."""
        with np.errstate(invalid="ignore", divide="ignore"):
            latency = 1000.0 * (self.last_token_at - self.sent_at) / self.num_tokens_received
        return np.where(self.answered, latency, np.nan)

    @property
    def ttft_ms(self) -> NDArray[np.float64]:
        """Time from the arrival at the router to the first token; NaN if failed."""
        return np.where(self.answered, 1000.0 * (self.first_token_at - self.sent_at), np.nan)
