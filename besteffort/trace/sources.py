"""Other people's traces: the Azure LLM inference traces, and Mooncake's."""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from besteffort.errors import TraceError

_MAX_TOKENS_IN_A_SOURCE = 1_000_000_000


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
