"""`rewards.parquet`: one row per task and model."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from besteffort.artifacts import files
from besteffort.errors import RewardsError
from besteffort.fleet import Fleet
from besteffort.rewards import Rewards

VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),  # utility in [0, 1]
        pa.field("standard_error", pa.float64()),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("num_documents", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # measured | given
    ]
)
_MEND = "run `besteffort score FLEET_DIR`, or name another file with --rewards"


def save_rewards(path: Path, rewards: Rewards, fleet: Fleet, facts: Mapping[str, Any]) -> None:
    rows = [
        {
            "task": task.name,
            "model": model.name,
            "value": float(rewards.values[t, m]),
            "standard_error": _none_if_nan(rewards.standard_errors[t, m]),
            "metric": rewards.metrics[t],
            "num_documents": int(rewards.num_documents[t, m]),
            "source": rewards.source,
        }
        for t, task in enumerate(fleet.tasks)
        for m, model in enumerate(fleet.models)
    ]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    files.write_table(path, table, kind="rewards", version=VERSION, facts=facts)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def load_rewards(path: Path, fleet: Fleet) -> Rewards:
    """Read `A` in the fleet's order; a model is found by its name or by its `stands_for`.

    Raises:
        RewardsError: the file is missing or malformed, lacks an entry, or one is not in [0, 1].
    """
    table, _ = files.read_table(path, SCHEMA, kind="rewards", version=VERSION, error=RewardsError, mend=_MEND)
    entries = {(row["task"], row["model"]): row for row in table.to_pylist()}
    grid = [[_entry(entries, t.name, (m.name, m.stands_for), path) for m in fleet.models]
            for t in fleet.tasks]  # fmt: skip
    return Rewards(
        values=np.array([[row["value"] for row in rows] for rows in grid]),
        standard_errors=np.array(
            [[row["standard_error"] for row in rows] for rows in grid], dtype=np.float64
        ),
        num_documents=np.array([[row["num_documents"] for row in rows] for rows in grid]),
        metrics=tuple(rows[0]["metric"] for rows in grid),
        source="measured" if all(r["source"] == "measured" for rows in grid for r in rows) else "given",
    )


def doubt(path: Path, rewards: Rewards, fleet: Fleet) -> str | None:
    """Why these rewards should not be routed by, if there is a reason."""
    random = [model.name for model in fleet.models if model.architecture is not None]
    if not random or rewards.source == "given":
        return None
    return (
        f"{path} was measured on random weights ({', '.join(random)}), so that what it says of them is "
        "chance; name other rewards with --rewards"
    )


def _entry(
    entries: Mapping[tuple[str, str], dict[str, Any]],
    task: str,
    models: tuple[str, str | None],
    path: Path,
) -> dict[str, Any]:
    for model in models:
        if model is not None and (task, model) in entries:
            row = entries[task, model]
            if not 0.0 <= row["value"] <= 1.0:  # also catches NaN
                raise RewardsError(
                    f"{path}: the value of task {task!r} with model {model!r} is {row['value']}, "
                    "not in [0, 1]; mend it, or score again"
                )
            return row
    raise RewardsError(
        f"{path}: no reward of task {task!r} with model {models[0]!r}: it is of another fleet; {_MEND}"
    )


def read_given_rewards(path: Path, fleet: Fleet) -> Rewards:
    """Read a CSV that a person wrote: columns task, model, value, and if known standard_error.

    Raises:
        RewardsError: it is missing, lacks a column, or an entry of the fleet, or is not numeric.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    except (OSError, UnicodeDecodeError) as error:
        raise RewardsError(f"{path}: cannot be read: {error}") from None
    try:
        entries = {
            (row["task"], row["model"]): {
                "value": float(row["value"]),
                "standard_error": float(row.get("standard_error") or "nan"),
            }
            for row in rows
        }
    except KeyError as error:
        raise RewardsError(
            f"{path}: the column {error} is missing; the header must be task,model,value"
        ) from None
    except (ValueError, TypeError) as error:
        raise RewardsError(f"{path}: a value is not a number: {error}") from None
    grid = [[_entry(entries, t.name, (m.name, m.stands_for), path) for m in fleet.models]
            for t in fleet.tasks]  # fmt: skip
    values = np.array([[row["value"] for row in row_of_task] for row_of_task in grid])
    errors = np.array([[row["standard_error"] for row in row_of_task] for row_of_task in grid])
    return Rewards(
        values=values,
        standard_errors=errors,
        num_documents=np.zeros(values.shape, dtype=np.int64),
        metrics=tuple("given" for _ in fleet.tasks),
        source="given",
    )
