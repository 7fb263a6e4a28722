"""`requests.parquet`: one row per request of a replay. Its first columns make it a trace again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from besteffort.artifacts import files
from besteffort.deadline import deadline_weight
from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.request import Outcomes, Requests
from besteffort.rewards import Rewards

VERSION = 1
KIND = "requests"
_RECORDED = [
    pa.field("arrived_at", pa.float64(), nullable=False),  # instants are s from the start
    pa.field("task", pa.string(), nullable=False),
    pa.field("num_prompt_tokens", pa.int64(), nullable=False),
    pa.field("num_output_tokens", pa.int64(), nullable=False),  # asked for
    pa.field("sent_at", pa.float64()),
    pa.field("model", pa.string()),  # null: never routed
    pa.field("replica", pa.int64()),  # null: never routed
    pa.field("first_token_at", pa.float64()),  # null: no token came
    pa.field("last_token_at", pa.float64()),
    pa.field("num_tokens_received", pa.int64(), nullable=False),
    pa.field("error", pa.string()),  # null: answered
]
_DERIVED = [
    pa.field("latency_ms_per_token", pa.float64()),  # null: not answered
    pa.field("ttft_ms", pa.float64()),
    pa.field("deadline_ms_per_token", pa.float64(), nullable=False),
    pa.field("deadline_weight", pa.float64(), nullable=False),
    pa.field("performance", pa.float64(), nullable=False),
]
SCHEMA = pa.schema([*_RECORDED[:-1], *_DERIVED, _RECORDED[-1]])
_MEND = "replay the trace again with `besteffort replay`"


@dataclass(frozen=True)
class Verdicts:
    """What each request was worth; every array has shape `(N,)`."""

    latency_ms_per_token: NDArray[np.float64]  # NaN: not answered
    deadline_ms_per_token: NDArray[np.float64]  # of the request's task
    deadline_met: NDArray[np.bool_]
    deadline_weight: NDArray[np.float64]
    performance: NDArray[np.float64]  # w * A[t, m] / max_m A[t, m]; 0 if failed or never routed


def judge(outcomes: Outcomes, fleet: Fleet, rewards: Rewards) -> Verdicts:
    """Hold each request against its task's deadline, and count what is left of its utility."""
    task, model = outcomes.requests.task, outcomes.model
    latency = outcomes.latency_ms_per_token
    deadline = np.array([t.deadline_ms_per_token for t in fleet.tasks])[task]
    weight = deadline_weight(latency, deadline, fleet.deadline_kind)
    relative = np.where(model >= 0, rewards.relative[task, model], 0.0)  # row -1 is read, then dropped
    return Verdicts(latency, deadline, latency <= deadline, weight, weight * relative)


def save_outcomes(
    path: Path, outcomes: Outcomes, fleet: Fleet, rewards: Rewards, facts: Mapping[str, Any]
) -> None:
    verdicts, requests = judge(outcomes, fleet, rewards), outcomes.requests
    columns: dict[str, Any] = {
        "arrived_at": requests.arrived_at,
        "task": _names(requests.task, fleet.task_names),
        "num_prompt_tokens": requests.num_prompt_tokens,
        "num_output_tokens": requests.num_output_tokens,
        "sent_at": outcomes.sent_at,
        "model": _names(outcomes.model, fleet.model_names),
        "replica": [r if r >= 0 else None for r in outcomes.replica.tolist()],
        "first_token_at": outcomes.first_token_at,
        "last_token_at": outcomes.last_token_at,
        "num_tokens_received": outcomes.num_tokens_received,
        "latency_ms_per_token": verdicts.latency_ms_per_token,
        "ttft_ms": outcomes.ttft_ms,
        "deadline_ms_per_token": verdicts.deadline_ms_per_token,
        "deadline_weight": verdicts.deadline_weight,
        "performance": verdicts.performance,
        "error": [error or None for error in outcomes.error],
    }
    # from_pandas: NaN, which is no number, becomes null.
    arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    files.write_table(path, table, kind=KIND, version=VERSION, facts=facts)


def _names(indices: NDArray[np.int64], names: Sequence[str]) -> list[str | None]:
    return [names[index] if index >= 0 else None for index in indices.tolist()]


def load_outcomes(path: Path, fleet: Fleet) -> Outcomes:
    """Read what was recorded; what was derived from it is left to be derived again.

    Raises:
        TraceError: the file is missing or malformed, or of another fleet.
    """
    table, _ = files.read_table(
        path, pa.schema(_RECORDED), kind=KIND, version=VERSION, error=TraceError, mend=_MEND
    )
    columns = {name: table.column(name) for name in table.column_names}
    floats = {name: _floats(columns[name]) for name in ("sent_at", "first_token_at", "last_token_at")}
    arrived_at = _floats(columns["arrived_at"])
    if np.any(np.diff(arrived_at) < 0):
        raise TraceError(f"{path}: arrived_at falls somewhere, but rows go in order of arrival; {_MEND}")
    return Outcomes(
        requests=Requests(
            arrived_at=arrived_at,
            task=_indices(path, columns["task"], "task", fleet.task_names, fleet),
            num_prompt_tokens=_ints(columns["num_prompt_tokens"]),
            num_output_tokens=_ints(columns["num_output_tokens"]),
        ),
        model=_indices(path, columns["model"], "model", fleet.model_names, fleet),
        replica=_ints(columns["replica"].fill_null(-1)),
        num_tokens_received=_ints(columns["num_tokens_received"]),
        error=[error or "" for error in columns["error"].to_pylist()],
        **floats,
    )


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Nulls become NaN."""
    return np.asarray(column.to_numpy(), dtype=np.float64)


def _ints(column: pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _indices(
    path: Path, column: pa.ChunkedArray, what: str, names: Sequence[str], fleet: Fleet
) -> NDArray[np.int64]:
    """Positions in `names`; null becomes -1."""
    position: dict[str | None, int] = {None: -1, **{name: index for index, name in enumerate(names)}}
    found = column.to_pylist()
    for name in found:
        if name not in position:
            raise TraceError(
                f"{path}: {name!r} is no {what} of fleet {fleet.name!r}; name the fleet that was "
                f"replayed, or {_MEND}"
            )
    return np.array([position[name] for name in found], dtype=np.int64)
