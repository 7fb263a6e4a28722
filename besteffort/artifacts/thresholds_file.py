"""`thresholds.parquet`: one row per band of arrival rates, task and model but the smallest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from besteffort.artifacts import files
from besteffort.artifacts.policy_file import contract
from besteffort.errors import PolicyError
from besteffort.fleet import Fleet
from besteffort.thresholds import ThresholdTable

VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("rate_from_per_s", pa.float64(), nullable=False),  # where the band begins; 0: the first
        pa.field("task", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("max_batch_size", pa.float64(), nullable=False),  # mean per replica; negative: never
    ]
)
_MEND = "run `besteffort tune FLEET_DIR`"


def save_thresholds(
    path: Path,
    table: ThresholdTable,
    fleet: Fleet,
    *,
    profile: Path,
    rewards: Path,
    facts: Mapping[str, Any],
) -> None:
    """Write the table, with hashes of the files it was tuned on."""
    rows = [
        {
            "rate_from_per_s": float(rate_from),
            "task": task.name,
            "model": model.name,
            "max_batch_size": float(table.max_batch_size[t, band, m]),
        }
        for band, rate_from in enumerate((0.0, *table.rate_edges_per_s))
        for t, task in enumerate(fleet.tasks)
        for m, model in enumerate(fleet.models[1:])
    ]
    known = {
        "contract": contract(fleet),
        "num_smoothed": table.num_smoothed,
        "rate_edges_per_s": table.rate_edges_per_s.tolist(),
        **_hashes(profile, rewards),
    }
    files.write_table(
        path,
        pa.Table.from_pylist(rows, schema=SCHEMA),
        kind="thresholds",
        version=VERSION,
        facts={**facts, **known},
    )


def _hashes(profile: Path, rewards: Path) -> dict[str, str | None]:
    """What the thresholds depend on beside the fleet; None where there is no such file."""
    paths = {"profile_sha256": profile, "rewards_sha256": rewards}
    return {name: files.sha256(path) if path.is_file() else None for name, path in paths.items()}


def load_thresholds(path: Path, fleet: Fleet, *, profile: Path, rewards: Path) -> ThresholdTable:
    """Read a table that was tuned for this fleet, on these very files.

    Raises:
        PolicyError: it is missing or malformed, or was tuned on others.
    """
    table, facts = files.read_table(
        path, SCHEMA, kind="thresholds", version=VERSION, error=PolicyError, mend=_MEND
    )
    needed = {"contract": contract(fleet), **_hashes(profile, rewards)}
    for what, value in needed.items():
        if facts.get(what) != value:
            raise PolicyError(f"{path}: {_difference(what, facts.get(what), value)}; {_MEND}")
    edges = np.array(facts["rate_edges_per_s"], dtype=np.float64)
    shape = (len(edges) + 1, len(fleet.tasks), len(fleet.models) - 1)
    values = np.asarray(table.column("max_batch_size").to_numpy(), dtype=np.float64)
    if len(values) != np.prod(shape) or np.isnan(values).any():
        raise PolicyError(f"{path}: it does not hold {np.prod(shape)} numbers; {_MEND}")
    by_task = np.ascontiguousarray(values.reshape(shape).transpose(1, 0, 2))
    return ThresholdTable(edges, by_task, int(facts["num_smoothed"]))


def _difference(what: str, tuned_for: Any, needed: Any) -> str:
    if what != "contract":
        return f"tuned on another {what.removesuffix('_sha256')} file than the one given"
    tuned_for = tuned_for if isinstance(tuned_for, dict) else {}
    for part, value in needed.items():
        if tuned_for.get(part) != value:
            return f"tuned for {part} = {tuned_for.get(part)}, but this fleet has {value}"
    return "tuned for another fleet"
