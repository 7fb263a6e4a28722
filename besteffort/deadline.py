"""`deadline_weight`: how much of an answer's utility is left when it comes late (paper, Sec. 4.3)."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

DeadlineKind = Literal["hard", "soft"]

SOFT_DECAY_PER_MS = 0.01
SOFT_LIMIT = 0.10  # of the deadline; a violation this large or larger is worth nothing


def deadline_weight(
    latency_ms_per_token: ArrayLike, deadline_ms_per_token: ArrayLike, kind: DeadlineKind
) -> NDArray[np.float64]:
    """`w` in [0, 1], elementwise; a latency of NaN (no answer) weighs 0.

    Hard (Sec. 3.1): 1 if the deadline is met, else 0. Soft (Sec. 4.3.2): falls by 0.01 for each
    millisecond per token past the deadline while the violation is under 10 % of it, then 0.
    """
    latency = np.asarray(latency_ms_per_token, dtype=np.float64)
    deadline = np.asarray(deadline_ms_per_token, dtype=np.float64)
    violation_ms = latency - deadline
    met = violation_ms <= 0
    if kind == "hard":
        return met.astype(np.float64)
    tolerated = violation_ms < SOFT_LIMIT * deadline
    decayed = np.clip(1.0 - SOFT_DECAY_PER_MS * violation_ms, 0.0, 1.0)
    return np.where(met, 1.0, np.where(tolerated, decayed, 0.0))
