"""The figures of one replay, as plain data that JSON can hold: null, never NaN."""

from collections import Counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from besteffort.artifacts.outcomes_file import Verdicts, judge
from besteffort.fleet import Fleet
from besteffort.request import Outcomes
from besteffort.rewards import Rewards

WINDOW_SIZE = 20  # requests (paper, Sec. 4.4)
WINDOW_THRESHOLDS = ("1.00", "0.99", "0.98", "0.96", "0.94")  # paper, Table 2
_TOLERANCE = 1e-9  # the mean of twenty ones may come out as 0.9999999999999999
_NUM_ERRORS_SHOWN = 5

Engine = Literal["simulated", "vllm"]


def summarise(
    outcomes: Outcomes, fleet: Fleet, rewards: Rewards, *, policy: str, trace: str, engine: Engine
) -> dict[str, Any]:
    """What `replay --json` prints. Shares are in [0, 1]; other units are in the names.

    `selection` is over the requests that were routed. The percentiles are over those that were
    answered. `performance` and `deadline_met` are over all: a failed request counts as 0.
    """
    verdicts = judge(outcomes, fleet, rewards)
    answered = int(outcomes.answered.sum())
    everything = np.ones(len(outcomes), dtype=np.bool_)
    performance = _mean(verdicts.performance)
    windows = window_performance(verdicts.performance)
    return {
        "policy": policy,
        "trace": trace,
        "engine": engine,
        "fleet": fleet.name,
        "deadline_kind": fleet.deadline_kind,
        "rewards_source": rewards.source,
        "num_requests": len(outcomes),
        "sent": len(outcomes),
        "answered": answered,
        "failed": len(outcomes) - answered,
        "unrouted": int(np.sum(outcomes.model < 0)),
        "errors": _errors(outcomes),
        "performance": performance,
        "hardware_utility": _per_gpu(performance, fleet),
        "deadline_met": _mean(verdicts.deadline_met),
        "num_windows": len(windows),
        "windows": count_windows(windows),
        "selection": _selection(outcomes, everything, fleet),
        "latency_ms_per_token": percentiles(verdicts.latency_ms_per_token),
        "ttft_ms": percentiles(outcomes.ttft_ms),
        **_pace(outcomes),
        "tasks": _per_task(outcomes, verdicts, fleet),
        "models": _per_model(outcomes, verdicts, fleet),
    }


def window_performance(performance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each 20 consecutive of `N` requests, shape `(N - 19,)`, or `(0,)` if there are fewer.

    The windows slide by one request: the paper counts up to 4,740 of them in a trace of 10,000
    requests (Table 3), where only 500 would fit side by side.
    """
    if len(performance) < WINDOW_SIZE:
        return np.empty(0)
    windows = np.lib.stride_tricks.sliding_window_view(performance, WINDOW_SIZE)
    return np.asarray(windows.mean(axis=1))


def count_windows(windows: NDArray[np.float64]) -> dict[str, int]:
    """How many windows reach each threshold of the paper's Table 2."""
    return {t: int(np.sum(windows >= float(t) - _TOLERANCE)) for t in WINDOW_THRESHOLDS}


def percentiles(
    values: NDArray[np.float64], ranks: tuple[int, ...] = (50, 95, 99)
) -> dict[str, float | None]:
    """Of the finite values, in their unit; null where there are none."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return {f"p{rank}": None for rank in ranks}
    return {f"p{rank}": float(np.percentile(finite, rank)) for rank in ranks}


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _per_gpu(performance: float | None, fleet: Fleet) -> float | None:
    return performance / fleet.num_gpus if performance is not None and fleet.num_gpus else None


def _errors(outcomes: Outcomes) -> list[dict[str, Any]]:
    """The first few distinct messages, in the order in which they came."""
    counts = Counter(error for error in outcomes.error if error)
    return [{"message": message, "count": counts[message]} for message in list(counts)[:_NUM_ERRORS_SHOWN]]


def _selection(outcomes: Outcomes, which: NDArray[np.bool_], fleet: Fleet) -> dict[str, float | None]:
    routed = outcomes.model[which & (outcomes.model >= 0)]
    return {name: _mean(routed == m) for m, name in enumerate(fleet.model_names)}


def _pace(outcomes: Outcomes) -> dict[str, Any]:
    """How long it took, and how punctually an open loop sent what arrived."""
    arrived_at = outcomes.requests.arrived_at
    instants = np.concatenate([arrived_at, outcomes.last_token_at])
    instants = instants[np.isfinite(instants)]
    span_s = float(arrived_at[-1] - arrived_at[0]) if len(arrived_at) else 0.0
    return {
        "duration_s": float(instants.max() - arrived_at[0]) if len(arrived_at) else 0.0,
        "arrival_rate_per_s": (len(arrived_at) - 1) / span_s if span_s > 0 else None,
        "send_lag_ms": percentiles(1000.0 * (outcomes.sent_at - arrived_at), (50, 99)),
    }


def _per_task(outcomes: Outcomes, verdicts: Verdicts, fleet: Fleet) -> dict[str, dict[str, Any]]:
    blocks = {}
    for t, task in enumerate(fleet.tasks):
        which = outcomes.requests.task == t
        blocks[task.name] = {
            "deadline_ms_per_token": task.deadline_ms_per_token,
            **_block(outcomes, verdicts, which),
            "selection": _selection(outcomes, which, fleet),
        }
    return blocks


def _per_model(outcomes: Outcomes, verdicts: Verdicts, fleet: Fleet) -> dict[str, dict[str, Any]]:
    return {name: _block(outcomes, verdicts, outcomes.model == m) for m, name in enumerate(fleet.model_names)}


def _block(outcomes: Outcomes, verdicts: Verdicts, which: NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "count": int(which.sum()),
        "failed": int(np.sum(which & ~outcomes.answered)),
        "performance": _mean(verdicts.performance[which]),
        "deadline_met": _mean(verdicts.deadline_met[which]),
        "latency_ms_per_token": percentiles(verdicts.latency_ms_per_token[which]),
        "ttft_ms": percentiles(outcomes.ttft_ms[which]),
    }
