"""`profile.parquet`: one row per cell that was measured (or modelled), with its spread."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from besteffort.artifacts import files
from besteffort.errors import ProfileError
from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample, Served, fit_latency, fitted_ms

VERSION = 4
_OLDER = (1, 2, 3)  # without what came with later versions, which is optional
SERVED = pa.struct(
    [
        pa.field("at_s", pa.float64(), nullable=False),
        pa.field("num_prompt_tokens", pa.int64(), nullable=False),
        pa.field("num_output_tokens", pa.int64(), nullable=False),
        pa.field("latency_ms_per_token", pa.float64(), nullable=False),
        pa.field("ttft_ms", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),  # one of KINDS
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
        pa.field("context_tokens", pa.float64()),  # of each request, on average
        pa.field("busy_batch_sizes", pa.list_(pa.int64())),  # of `busy_models`
        pa.field("ci_ms", pa.float64()),  # half the width of the mean's 95 % confidence interval
        pa.field("outliers_ms", pa.list_(pa.float64())),  # measured, and left out of the mean
        pa.field("fitted_ms", pa.float64()),  # what the simulator makes of the cell
        pa.field("served", pa.list_(SERVED)),  # the requests of a service
        pa.field("scale", pa.float64()),  # that the simulator needs to come to a service's mean
        pa.field("overhead_ms", pa.float64()),  # and to its time to the first token
    ]
)
KINDS = ("decode", "prefill", "stall", "joining", "interference", "service")
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
        path, SCHEMA, kind="profile", version=VERSION, older=_OLDER, error=ProfileError, mend=_MEND
    )
    rows = table.select(SCHEMA.names).to_pylist()
    for row in rows:
        # A stall may come out at nothing, or by noise below.
        if row["kind"] not in KINDS or not (row["mean_ms"] > 0 or row["kind"] == "stall"):
            raise ProfileError(f"{path}: a row makes no sense: {row}; {_MEND}")
    return [_sample(row) for row in rows], facts


def _sample(row: dict[str, Any]) -> Sample:
    lists = {name: tuple(row[name] or ()) for name in ("busy_models", "busy_batch_sizes", "outliers_ms")}
    served = tuple(Served(**one) for one in row["served"] or ())
    return Sample(**{**row, **lists, "served": served, "context_tokens": row["context_tokens"] or 0.0})


def with_fit(samples: Iterable[Sample], fleet: Fleet) -> tuple[list[Sample], Latency]:
    """The samples with what the fit makes of each, and the fit.

    A cell is held against the fit to all cells, without what services make of it.

    Raises:
        ValueError: there are too few samples for a fit.
    """
    samples, names = list(samples), fleet.model_names
    of_cells = fit_latency([one for one in samples if one.kind != "service"], names)
    fitted = [replace(one, fitted_ms=fitted_ms(one, of_cells, names)) for one in samples]
    return fitted, fit_latency(samples, names)


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
