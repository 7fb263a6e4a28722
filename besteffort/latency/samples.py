"""What is measured: a cell of a profile, with its spread."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Kind = Literal["decode", "prefill", "stall", "joining", "interference", "service"]
_OUTLIER_MADS = 5.0  # median absolute deviations from the median
_LEAST_SPREAD = 0.04  # of the median: a few that are very near each other do not make a fourth an outlier
_NORMAL_95 = 1.96


@dataclass(frozen=True, slots=True)
class Served:
    """A request of a service that was measured."""

    at_s: float  # when it was sent, from the first one on
    num_prompt_tokens: int
    num_output_tokens: int
    latency_ms_per_token: float
    ttft_ms: float | None = None  # None: a profile of before it was noted


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell of a profile: repeated measurements of one quantity.

    `mean_ms` is, by `kind`: decode, the time between tokens while exactly `batch_size` requests decode;
    prefill, the time to the first token of a single request; stall, how much longer a step gets that
    also reads a prompt while `batch_size` requests decode; joining, the time to that prompt's first token;
    interference, as decode, while the others on the device are busy too; service, the
    `latency_ms_per_token` of requests that come and go at random, some `batch_size` at a time.
    """

    kind: Kind
    model: str
    batch_size: int  # requests kept in flight at this model
    num_prompt_tokens: int
    busy_models: tuple[str, ...]  # the others on the device that were kept busy meanwhile
    mean_ms: float  # without the outliers
    std_ms: float
    p50_ms: float
    p95_ms: float
    num_measurements: int  # with the outliers
    source: Literal["measured", "modelled"] = "measured"
    context_tokens: float = 0.0  # before each request's present token, on average; 0: not noted
    busy_batch_sizes: tuple[int, ...] = ()  # of `busy_models`; empty: as this model's
    ci_ms: float | None = None  # half the width of the mean's 95 % confidence interval
    outliers_ms: tuple[float, ...] = ()  # measured, and left out of the mean
    fitted_ms: float | None = None  # what the simulator makes of it
    served: tuple[Served, ...] = ()  # of a service, by the time at which they were sent
    # Of a service: how many times as long its steps are as those that were measured while nothing changed,
    # or, beside others, as those of the model alone; with it the simulator comes to the measured mean
    scale: float | None = None
    # Of a service of one model alone: what a request takes beside the steps, for the simulator to come to the
    # measured time to the first token
    overhead_ms: float | None = None


def spread_of(measured_ms: Sequence[float], *, keep_all: bool = False) -> dict[str, Any]:
    """Those fields of a `Sample` that come from the measurements.

    What lies more than five median absolute deviations from the median is kept apart, not thrown away:
    something else had the machine then. `keep_all` is for what differs by nature.
    """
    values = np.asarray(measured_ms, dtype=np.float64)
    median = float(np.median(values))
    spread = max(float(np.median(np.abs(values - median))), _LEAST_SPREAD * abs(median))
    far = (np.abs(values - median) > _OUTLIER_MADS * spread) & (not keep_all)
    kept = values[~far]
    p50, p95 = np.percentile(kept, [50, 95])
    std_ms = float(np.std(kept, ddof=1)) if len(kept) > 1 else 0.0
    return {
        "mean_ms": float(np.mean(kept)),
        "std_ms": std_ms,
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "num_measurements": len(values),
        "ci_ms": _NORMAL_95 * std_ms / math.sqrt(len(kept)) if len(kept) > 1 else None,
        "outliers_ms": tuple(float(value) for value in values[far]),
    }
