"""Traces: when requests arrive, of which task and how long; as files, and from other people's files."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from besteffort.artifacts import files
from besteffort.errors import TraceError, UsageError
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
_MAX_TOKENS_IN_A_SOURCE = 1_000_000_000


@dataclass(frozen=True)
class Trace:
    """A trace file in memory."""

    requests: Requests  # their `task` is an index into `task_names`
    task_names: tuple[str, ...]
    facts: Mapping[str, Any]  # its provenance; empty if `besteffort` did not write it
    further: pa.Table  # the columns that `besteffort` does not know, shape `(N, ...)`


# --- the file


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
    """A trace with its provenance and its further columns.

    Without a fleet, the tasks are those that occur in the file, by name, and any length is taken.

    Raises:
        TraceError: as for `load_trace`.
    """
    if path.is_dir():  # Arrow would read every file in it as one table
        raise TraceError(f"{path}: this is a folder; name one trace in it, or {_MEND}")
    table, facts = files.read_table(
        path, SCHEMA, kind="trace", version=VERSION, error=TraceError, mend=_MEND, also=("requests",)
    )
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


# --- other people's files


@dataclass(frozen=True)
class SourceArrivals:
    """What a production trace tells, before it is fitted to a fleet; every array has shape `(N,)`."""

    arrived_at: NDArray[np.float64]  # s from the first arrival, not falling
    num_prompt_tokens: NDArray[np.int64]
    num_output_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.arrived_at)


# Line number; instant, in a unit of the format's; prompt tokens; output tokens.
_SourceRow = tuple[int, float, int, int]
_AZURE_HEADER = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def import_azure_llm(path: Path, num_requests: int | None = None) -> SourceArrivals:
    """Read an Azure LLM inference trace: CSV with TIMESTAMP, ContextTokens, GeneratedTokens.

    Time stamps are ISO 8601, with or without a zone, and are read to the microsecond. Reading
    stops after `num_requests`.

    Raises:
        TraceError: the file or one of its lines is malformed; it names the line.
    """
    return _collect(path, _azure_rows(path), units_per_s=1_000_000, num_requests=num_requests)


def _azure_rows(path: Path) -> Iterator[_SourceRow]:
    lines = _numbered_lines(path)
    _, header = next(lines, (0, ""))
    if [name.strip() for name in header.split(",")] != _AZURE_HEADER:
        raise TraceError(
            f"{path}: line 1 is {header[:80]!r}, not {','.join(_AZURE_HEADER)}: "
            "choose the --format that fits the file"
        )
    for number, line in lines:
        try:
            stamp, prompt, output = next(csv.reader([line]))
            moment = datetime.fromisoformat(stamp.strip())
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            counts = _count(int(prompt)), _count(int(output))
        except (ValueError, csv.Error) as error:
            raise _malformed(path, number, line, error) from None
        yield number, (moment - _EPOCH) // timedelta(microseconds=1), *counts


def import_mooncake(path: Path, num_requests: int | None = None) -> SourceArrivals:
    """Read a Mooncake trace: one JSON object a line with timestamp (ms), input_length, output_length.

    Further fields are left out; reading stops after `num_requests`.

    Raises:
        TraceError: the file or one of its lines is malformed; it names the line.
    """
    return _collect(path, _mooncake_rows(path), units_per_s=1_000, num_requests=num_requests)


def _mooncake_rows(path: Path) -> Iterator[_SourceRow]:
    for number, line in _numbered_lines(path):
        try:
            row = json.loads(line)
            moment = row["timestamp"]
            if isinstance(moment, bool) or not math.isfinite(moment):
                raise ValueError(f"timestamp is {moment}")
            counts = _count(row["input_length"]), _count(row["output_length"])
        except KeyError as error:
            raise _malformed(path, number, line, f"no {error}") from None
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _malformed(path, number, line, error) from None
        yield number, moment, *counts


# The readers by the name that `--format` takes; each is given a file and how many requests to read.
FORMATS: Mapping[str, Callable[[Path, int | None], SourceArrivals]] = {
    "azure-llm": import_azure_llm,
    "mooncake": import_mooncake,
}


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise TraceError(f"{path}: not a text file: unpack it first, or choose another SOURCE") from None
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}; check the path of SOURCE") from None


def _count(tokens: object) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise ValueError(f"{tokens!r} is not a number of tokens")
    if not 1 <= tokens <= _MAX_TOKENS_IN_A_SOURCE:
        raise ValueError(f"{tokens} is not a number of tokens from 1 to {_MAX_TOKENS_IN_A_SOURCE}")
    return tokens


def _malformed(path: Path, number: int, line: str, why: object) -> TraceError:
    return TraceError(
        f"{path}: line {number} is malformed ({why}): {line[:80]!r}; mend it or remove the line"
    )


def _collect(
    path: Path, rows: Iterator[_SourceRow], units_per_s: int, num_requests: int | None
) -> SourceArrivals:
    moments: list[float] = []
    counts: list[tuple[int, int]] = []
    for number, moment, prompt, output in islice(rows, num_requests):
        if moments and moment < moments[-1]:
            raise TraceError(f"{path}: line {number} is earlier than the line before: sort the file by time")
        moments.append(moment)
        counts.append((prompt, output))
    if not moments:
        raise TraceError(f"{path}: it holds no request; choose another SOURCE")
    tokens = np.array(counts, dtype=np.int64)
    # Whole units are subtracted before they become floats: no digit of a time stamp is lost.
    from_the_first = np.array([moment - moments[0] for moment in moments], dtype=np.float64)
    return SourceArrivals(from_the_first / units_per_s, tokens[:, 0].copy(), tokens[:, 1].copy())


# --- fitting them to a fleet

RULE = (
    "the first num_requests of the source; times from the first arrival, times time_stretch; tasks drawn "
    "independently by the fleet's shares; outputs clipped to max_output_tokens, then prompts to what is "
    "left of max_model_len"
)


def import_trace(
    path: Path,
    source_format: str,
    fleet: Fleet,
    seed: int,
    *,
    num_requests: int | None = None,
    time_stretch: float = 1.0,
    max_output_tokens: int | None = None,
) -> tuple[Requests, dict[str, Any]]:
    """Read a production trace and fit it to a fleet; also the facts for its provenance.

    Raises:
        UsageError: an unknown format, or an option that is out of range.
        TraceError: the source is malformed.
    """
    if source_format not in FORMATS:
        raise UsageError(f"{source_format!r} is no known format: choose one of {', '.join(FORMATS)}")
    if num_requests is not None and num_requests < 1:
        raise UsageError(f"the number of requests is {num_requests}: it must be at least 1")
    arrivals = FORMATS[source_format](path, num_requests)
    if num_requests is not None and len(arrivals) < num_requests:
        raise UsageError(
            f"{path} holds {len(arrivals)} requests, not {num_requests}: ask for {len(arrivals)} or fewer"
        )
    rng = np.random.default_rng(seed)
    requests, facts = fit_to_fleet(
        arrivals, fleet, rng, time_stretch=time_stretch, max_output_tokens=max_output_tokens
    )
    source = {"source": path.name, "source_sha256": files.sha256(path), "format": source_format, "seed": seed}
    return requests, {**source, **facts}


def fit_to_fleet(
    arrivals: SourceArrivals,
    fleet: Fleet,
    rng: np.random.Generator,
    *,
    time_stretch: float = 1.0,
    max_output_tokens: int | None = None,
) -> tuple[Requests, dict[str, Any]]:
    """Make arrivals into requests that the fleet can serve, by `RULE`; also the facts about it.

    `time_stretch` 2 makes the trace last twice as long, at half the rate. `max_output_tokens` is a
    quarter of the fleet's `max_model_len` unless it is given.

    Raises:
        UsageError: an option is out of range.
    """
    limit = fleet.engine.max_model_len
    max_output_tokens = limit // 4 if max_output_tokens is None else max_output_tokens
    _check_options(time_stretch, max_output_tokens, limit)
    output = np.minimum(arrivals.num_output_tokens, max_output_tokens)
    prompt = np.minimum(arrivals.num_prompt_tokens, limit - output)
    requests = Requests(
        arrived_at=(arrivals.arrived_at - arrivals.arrived_at[0]) * time_stretch,
        task=rng.choice(len(fleet.tasks), size=len(arrivals), p=fleet.task_shares),
        num_prompt_tokens=prompt,
        num_output_tokens=output,
    )
    facts = {
        "fleet": fleet.name,
        "rule": RULE,
        "num_requests": len(arrivals),
        "time_stretch": time_stretch,
        "max_output_tokens": max_output_tokens,
        "max_model_len": limit,
        "num_clipped_outputs": int((output < arrivals.num_output_tokens).sum()),
        "num_clipped_prompts": int((prompt < arrivals.num_prompt_tokens).sum()),
    }
    return requests, facts


def _check_options(time_stretch: float, max_output_tokens: int, limit: int) -> None:
    if not 0 < time_stretch <= 1e6:  # also catches NaN
        raise UsageError(f"the time stretch is {time_stretch}: it must be above 0, and at most 1000000")
    if not 1 <= max_output_tokens < limit:
        raise UsageError(
            f"at most {max_output_tokens} output tokens: choose a number from 1 to {limit - 1}, "
            "so that a prompt fits into the fleet's engine.max_model_len beside them"
        )


# --- what a trace is like


def describe_trace(requests: Requests, task_names: Iterable[str]) -> dict[str, Any]:
    """The figures by which traces are compared; ready for JSON.

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
