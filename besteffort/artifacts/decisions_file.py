"""`decisions-*.parquet`: one row per request that a router took. Its first columns make it a trace."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from besteffort.artifacts import files
from besteffort.deadline import deadline_weight
from besteffort.fleet import Fleet

VERSION = 1
KIND = "decisions"
_INSTANT = pa.timestamp("us", tz="UTC")
_REALS = pa.list_(pa.float64())
# As the router hands rows over: tasks and models by index.
RECORDED = pa.schema(
    [
        pa.field("received_at_s", pa.float64()),  # since the epoch
        pa.field("request_id", pa.string()),
        pa.field("task", pa.int64()),
        pa.field("num_prompt_tokens", pa.int64()),
        pa.field("prompt_estimated", pa.bool_()),
        pa.field("num_output_tokens", pa.int64()),
        pa.field("num_tokens_received", pa.int64()),
        pa.field("policy", pa.string()),
        pa.field("arrival_rate_per_s", pa.float64()),
        pa.field("batch_sizes", _REALS),
        pa.field("neighbours", _REALS),
        pa.field("q_values", _REALS),
        pa.field("chosen", pa.int64()),
        pa.field("model", pa.int64()),
        pa.field("replica", pa.int64()),
        pa.field("num_retries", pa.int64()),
        pa.field("decision_ms", pa.float64()),
        pa.field("outcome", pa.string()),
        pa.field("status", pa.int64()),
        pa.field("error", pa.string()),
        pa.field("duration_ms", pa.float64()),
        pa.field("ttft_ms", pa.float64()),
        pa.field("latency_ms_per_token", pa.float64()),
        pa.field("deadline_ms_per_token", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("arrived_at", pa.float64(), nullable=False),  # s from the first arrival of this part
        pa.field("task", pa.string(), nullable=False),
        pa.field("num_prompt_tokens", pa.int64(), nullable=False),
        pa.field("num_output_tokens", pa.int64(), nullable=False),
        pa.field("received_at", _INSTANT, nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("prompt_estimated", pa.bool_(), nullable=False),
        pa.field("num_tokens_received", pa.int64(), nullable=False),
        pa.field("policy", pa.string()),  # null, as all that it saw and chose: the client chose the model
        pa.field("arrival_rate_per_s", pa.float64()),
        pa.field("batch_sizes", _REALS),  # (M,)
        pa.field("neighbours", _REALS),  # (M * M,), row by row
        pa.field("q_values", _REALS),  # (M,); null: the policy has none
        pa.field("chosen", pa.string()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("replica", pa.int64(), nullable=False),
        pa.field("num_retries", pa.int64(), nullable=False),
        pa.field("decision_ms", pa.float64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("status", pa.int64()),  # null: the client left before it got one
        pa.field("error", pa.string()),  # null: no engine failed
        pa.field("duration_ms", pa.float64(), nullable=False),
        pa.field("ttft_ms", pa.float64()),  # null: no stream, or nothing came
        pa.field("latency_ms_per_token", pa.float64()),  # null: not answered
        pa.field("deadline_ms_per_token", pa.float64(), nullable=False),
        pa.field("deadline_weight", pa.float64(), nullable=False),
    ]
)


def save_decisions(path: Path, recorded: pa.Table, fleet: Fleet, facts: Mapping[str, Any]) -> None:
    """Write one part, in order of arrival, from a table by `RECORDED` of at least one row.

    Lengths are cut to what the fleet takes, so that the part can be replayed.

    Raises:
        UsageError: the folder or the disk does not take it.
    """
    recorded = recorded.sort_by("received_at_s")
    columns = {name: recorded.column(name) for name in recorded.column_names}
    received_at_s = columns["received_at_s"].to_numpy()
    latency = columns["latency_ms_per_token"].to_numpy()
    deadline = columns["deadline_ms_per_token"].to_numpy()
    limit = fleet.engine.max_model_len
    num_output = np.clip(columns["num_output_tokens"].to_numpy(), 1, limit - 1)
    columns |= {
        "arrived_at": received_at_s - received_at_s[0],
        "task": _names(columns["task"], fleet.task_names),
        "num_prompt_tokens": np.clip(columns["num_prompt_tokens"].to_numpy(), 1, limit - num_output),
        "num_output_tokens": num_output,
        "received_at": pa.array(np.round(1e6 * received_at_s).astype(np.int64)).cast(_INSTANT),
        "chosen": _names(columns["chosen"], fleet.model_names),
        "model": _names(columns["model"], fleet.model_names),
        "deadline_weight": deadline_weight(latency, deadline, fleet.deadline_kind),
    }
    table = pa.table([columns[field.name] for field in SCHEMA], schema=SCHEMA)
    about = {"fleet": fleet.name, "models": list(fleet.model_names), **facts}
    files.write_table(path, table, kind=KIND, version=VERSION, facts=about)


def _names(indices: pa.ChunkedArray, names: Sequence[str]) -> Any:
    return pc.take(pa.array(names, pa.string()), indices)
