"""`profile.parquet`: one row per cell that was measured (or modelled), with its spread."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from besteffort.artifacts import files
from besteffort.errors import ProfileError
from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample, fit_latency

VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # decode | prefill | interference
        pa.field("model", pa.string(), nullable=False),
        pa.field("batch_size", pa.int64(), nullable=False),  # requests kept in flight
        pa.field("num_prompt_tokens", pa.int64(), nullable=False),
        pa.field("busy_models", pa.list_(pa.string()), nullable=False),  # the others kept busy
        pa.field("mean_ms", pa.float64(), nullable=False),
        pa.field("std_ms", pa.float64(), nullable=False),
        pa.field("p50_ms", pa.float64(), nullable=False),
        pa.field("p95_ms", pa.float64(), nullable=False),
        pa.field("num_measurements", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # measured | modelled
    ]
)
_MEND = "run `besteffort profile FLEET_DIR`, or name another file with --profile"


def save_samples(path: Path, samples: Iterable[Sample], facts: Mapping[str, Any]) -> None:
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=SCHEMA)
    files.write_table(path, table, kind="profile", version=VERSION, facts=facts)


def load_samples(path: Path) -> tuple[list[Sample], dict[str, Any]]:
    """The samples and the provenance.

    Raises:
        ProfileError: the file is missing or malformed.
    """
    table, facts = files.read_table(
        path, SCHEMA, kind="profile", version=VERSION, error=ProfileError, mend=_MEND
    )
    rows = table.select(SCHEMA.names).to_pylist()
    for row in rows:
        if row["kind"] not in ("decode", "prefill", "interference") or not row["mean_ms"] > 0:
            raise ProfileError(f"{path}: a row makes no sense: {row}; {_MEND}")
    return [Sample(**{**row, "busy_models": tuple(row["busy_models"])}) for row in rows], facts


def load_latency(path: Path, fleet: Fleet) -> Latency:
    """What the simulator uses, fitted from the file's samples.

    Raises:
        ProfileError: the file is missing, malformed, or of other models than the fleet's.
    """
    samples, _ = load_samples(path)
    strangers = {s.model for s in samples} - set(fleet.model_names)
    if strangers:
        raise ProfileError(
            f"{path}: it profiles {sorted(strangers)[0]!r}, which is no model of fleet "
            f"{fleet.name!r}; {_MEND}"
        )
    try:
        return fit_latency(samples, fleet.model_names)
    except ValueError as error:
        raise ProfileError(f"{path}: {error}; {_MEND}") from None
