"""`reward_matrix` A: the utility of serving a task with a model (paper, Sec. 3.1 and Table 1)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rewards:
    """`A` and how well it is known. Arrays have shape `(T, M)`, in the fleet's order."""

    values: NDArray[np.float64]  # utility in [0, 1], e.g. accuracy
    standard_errors: NDArray[np.float64]  # NaN where unknown
    num_documents: NDArray[np.int64]  # evaluated per entry; 0 where given rather than measured
    metrics: tuple[str, ...]  # (T,)
    source: Literal["measured", "given"]

    @property
    def relative(self) -> NDArray[np.float64]:
        """`A[t, m] / max_m A[t, m]`: 1.0 for each task's best model; what performance counts."""
        best = self.values.max(axis=1, keepdims=True)
        return np.asarray(np.divide(self.values, best, out=np.zeros_like(self.values), where=best > 0))
