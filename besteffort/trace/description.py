"""The figures by which traces are compared."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from besteffort.request import Requests


def describe_trace(requests: Requests, task_names: Iterable[str]) -> dict[str, Any]:
    """Ready for JSON.

    Rates are per second; the mean is that of the gaps, the peak that of the fullest of the bins
    [0, 1), [1, 2), ... seconds. `gap_cv` is the standard deviation of the gaps over their mean.
    What a single instant leaves undefined is None. An empty trace is the caller's mistake.
    """
    gaps = np.diff(requests.arrived_at)
    duration_s = float(requests.arrived_at[-1] - requests.arrived_at[0])
    _, num_in_bin = np.unique(np.floor(requests.arrived_at), return_counts=True)
    names = tuple(task_names)
    num_of_task = np.bincount(requests.task, minlength=len(names))
    return {
        "num_requests": len(requests),
        "duration_s": duration_s,
        "mean_rate_per_s": len(gaps) / duration_s if duration_s > 0 else None,
        "peak_rate_per_s": int(num_in_bin.max()),
        "gap_cv": float(gaps.std() / gaps.mean()) if duration_s > 0 else None,
        "zero_gap_share": float((gaps == 0).mean()) if len(gaps) else None,
        "num_prompt_tokens": _spread(requests.num_prompt_tokens),
        "num_output_tokens": _spread(requests.num_output_tokens),
        "task_shares": {name: float(n / len(requests)) for name, n in zip(names, num_of_task, strict=True)},
    }


def _spread(counts: NDArray[np.int64]) -> dict[str, float]:
    p50, p95 = np.percentile(counts, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": int(counts.max())}
