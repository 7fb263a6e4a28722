"""The Parquet file of a trace, written, and read with a check of every row."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from besteffort.artifacts import decisions_file, files
from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.request import Requests

VERSION = 1
SCHEMA = pa.schema(
    [
        pa.field("arrived_at", pa.float64()),  # s from the start, not falling
        pa.field("task", pa.string()),
        pa.field("num_prompt_tokens", pa.int64()),
        pa.field("num_output_tokens", pa.int64()),
    ]
)
_MEND = "make one with `besteffort trace generate` or `besteffort trace import`"


@dataclass(frozen=True)
class Trace:
    """A trace file in memory."""

    requests: Requests  # their `task` is an index into `task_names`
    task_names: tuple[str, ...]
    facts: Mapping[str, Any]  # its provenance; empty if `besteffort` did not write it
    further: pa.Table  # the columns that `besteffort` does not know, shape `(N, ...)`


def save_trace(
    path: Path,
    requests: Requests,
    task_names: Iterable[str],
    facts: Mapping[str, Any],
    further: pa.Table | None = None,
) -> None:
    """Write a Parquet trace; `further` holds additional columns of the same length.

    Raises:
        UsageError: the folder or the disk does not take it.
    """
    names = pa.array(list(task_names), pa.string())
    columns = [
        pa.array(requests.arrived_at, pa.float64()),
        names.take(pa.array(requests.task, pa.int64())),
        pa.array(requests.num_prompt_tokens, pa.int64()),
        pa.array(requests.num_output_tokens, pa.int64()),
    ]
    table = pa.table(columns, schema=SCHEMA)
    if further is not None:
        for name in further.column_names:
            table = table.append_column(name, further.column(name))
    files.write_table(path, table, kind="trace", version=VERSION, facts=facts)


def load_trace(path: Path, fleet: Fleet) -> Requests:
    """The requests of a trace, all of which this fleet can serve.

    Raises:
        TraceError: the file is missing or malformed, or a request is none for this fleet.
    """
    return read_trace(path, fleet).requests


def read_trace(path: Path, fleet: Fleet | None = None) -> Trace:
    """A trace with its provenance and its further columns; a folder is read as a decision log.

    Without a fleet, the tasks are those that occur in the file, by name, and any length is taken.

    Raises:
        TraceError: as for `load_trace`.
    """
    table, facts = _read_log(path) if path.is_dir() else _read_file(path)
    if len(table) == 0:
        raise TraceError(f"{path}: it holds no request; {_MEND}")
    for name in SCHEMA.names:
        _refuse_empty(path, name, table.column(name))
    task_names = tuple(sorted(table.column("task").unique().to_pylist()))
    task_names = task_names if fleet is None else fleet.task_names
    requests = Requests(
        # Copies: what Arrow hands out cannot be written to, and compiled loops tell the two apart.
        arrived_at=np.array(table.column("arrived_at").to_numpy()),
        task=_task_indices(path, table.column("task"), task_names, fleet),
        num_prompt_tokens=np.array(table.column("num_prompt_tokens").to_numpy()),
        num_output_tokens=np.array(table.column("num_output_tokens").to_numpy()),
    )
    _check_times(path, requests.arrived_at)
    _check_tokens(path, requests, fleet)
    return Trace(requests, task_names, facts, table.drop_columns(SCHEMA.names))


def _read_file(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    also = ("requests", decisions_file.KIND)
    return files.read_table(
        path, SCHEMA, kind="trace", version=VERSION, error=TraceError, mend=_MEND, also=also
    )


def _read_log(folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """All parts of a decision log as one trace, whose first request arrives at 0."""
    parts = files.parts(folder)
    if not parts:
        raise TraceError(
            f"{folder}: this is a folder without parts of a decision log; name a trace, or {_MEND}"
        )
    read = [
        files.read_table(
            part,
            decisions_file.SCHEMA,
            kind=decisions_file.KIND,
            version=decisions_file.VERSION,
            error=TraceError,
            mend="a folder is read as a decision log: leave nothing else in it",
        )
        for part in parts
    ]
    # A request may end, and so be written, long after others that came later.
    table = pa.concat_tables([table for table, _ in read], promote_options="default").sort_by("received_at")
    received_at = table.column("received_at").cast(pa.int64()).to_numpy()
    arrived_at = pa.array((received_at - received_at[0]) / 1e6)
    facts = {**read[-1][1], "source": f"decision log of {len(parts)} parts"}
    return table.set_column(0, SCHEMA.field("arrived_at"), arrived_at), facts


def _refuse_first(path: Path, bad: NDArray[np.bool_], problem: Callable[[int], str]) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise TraceError(f"{path}: row {row} (counted from 0): {problem(row)}")


def _refuse_empty(path: Path, name: str, column: Any) -> None:
    empty = column.is_null().to_numpy()
    _refuse_first(path, empty, lambda _: f"{name} is empty: fill it in or remove the row")


def _task_indices(
    path: Path, names: Any, task_names: tuple[str, ...], fleet: Fleet | None
) -> NDArray[np.int64]:
    index = pc.index_in(names, value_set=pa.array(task_names, pa.string()))
    _refuse_first(
        path,
        index.is_null().to_numpy(),
        lambda row: (
            f"{names[row].as_py()!r} is no task of fleet {fleet.name if fleet else ''!r} "
            f"(its tasks: {', '.join(task_names)}): rename it, or use another fleet"
        ),
    )
    return np.array(index.to_numpy(), dtype=np.int64)


def _check_times(path: Path, arrived_at: NDArray[np.float64]) -> None:
    _refuse_first(
        path,
        ~np.isfinite(arrived_at) | (arrived_at < 0),
        lambda row: (
            f"arrived_at is {float(arrived_at[row])}, not a time in seconds from the start: "
            "mend the value or remove the row"
        ),
    )
    _refuse_first(
        path,
        np.diff(arrived_at, prepend=0.0) < 0,
        lambda row: (
            f"arrived_at falls from {float(arrived_at[row - 1])} to {float(arrived_at[row])}: "
            "sort it by arrived_at"
        ),
    )


def _check_tokens(path: Path, requests: Requests, fleet: Fleet | None) -> None:
    prompt, output = requests.num_prompt_tokens, requests.num_output_tokens
    _refuse_below_one(path, "num_prompt_tokens", prompt)
    _refuse_below_one(path, "num_output_tokens", output)
    if fleet is None:
        return
    limit = fleet.engine.max_model_len
    _refuse_first(
        path,
        (prompt > limit) | (output > limit - np.minimum(prompt, limit)),  # a plain sum might overflow
        lambda row: (
            f"{prompt[row]} prompt and {output[row]} output tokens are more than engine.max_model_len = "
            f"{limit} of fleet {fleet.name!r}: shorten the request, or raise the limit in fleet.toml"
        ),
    )


def _refuse_below_one(path: Path, name: str, count: NDArray[np.int64]) -> None:
    _refuse_first(
        path,
        count < 1,
        lambda row: f"{name} is {count[row]}, but every request has at least 1: mend it or remove the row",
    )
