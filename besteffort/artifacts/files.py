"""Writing so that nobody ever sees half a file, and reading so that nobody uses a wrong one."""

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from besteffort import __version__
from besteffort.errors import InputError, UsageError

_KEY = b"besteffort"


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it into place.

    Raises:
        UsageError: the folder or the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # some writers make it readable by its owner alone
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{path}: cannot be written: {why}; free space there or choose another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):  # what stopped the write may stop this too
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def parts(folder: Path) -> list[Path]:
    """The Parquet files in a folder, by name."""
    return sorted(folder.glob("*.parquet"))


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, or of all Parquet files in a folder, by which inputs are known again."""
    if path.is_dir():
        return hashlib.sha256("".join(sha256(part) for part in parts(path)).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a file comes from: the time, the version, the machine, and what the caller adds."""
    return {
        "written_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "besteffort": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        **facts,
    }


def write_table(path: Path, table: pa.Table, *, kind: str, version: int, facts: Mapping[str, Any]) -> None:
    """Write a Parquet file that says what it is: its kind, schema version and provenance with `facts`."""
    label = {"kind": kind, "schema_version": version, "provenance": provenance(**facts)}
    labelled = table.replace_schema_metadata({_KEY: json.dumps(label).encode()})
    write_atomically(path, lambda temporary: pq.write_table(labelled, temporary))


def read_table(
    path: Path,
    schema: pa.Schema,
    *,
    kind: str,
    version: int,
    error: type[InputError],
    mend: str,
    also: Collection[str] = (),
    older: Collection[int] = (),
) -> tuple[pa.Table, dict[str, Any]]:
    """Read a Parquet file of a known kind; returns its table and its provenance.

    Columns of `schema` are checked and cast; further columns are kept as they are. A file that
    `besteffort` did not write has no label and no provenance; it is taken if its columns fit. So
    is one of the kinds `also`, whose columns hold this kind's. Files of the versions `older` are
    read too: a column that may be empty and that they do not have comes out empty.

    Raises:
        InputError: as the given class `error`; the message ends with `mend`.
    """
    try:
        # One file, as it lies there: `pq.read_table` would also take a folder of them.
        table = pq.ParquetFile(path).read()
    except FileNotFoundError:
        raise error(f"{path}: no such file; {mend}") from None
    except (pa.ArrowInvalid, OSError) as problem:
        first_line = str(problem).splitlines()[0]
        raise error(f"{path}: not a readable Parquet file ({first_line}); {mend}") from None
    label = _label(table)
    if label.get("kind", kind) not in (kind, *also):
        raise error(f"{path}: this is a {label['kind']} file, not a {kind} file; {mend}")
    if label.get("schema_version", version) not in (version, *older):
        known = " and ".join(str(number) for number in sorted((version, *older)))
        raise error(
            f"{path}: schema version {label['schema_version']} is unknown to "
            f"besteffort {__version__}, which reads version {known}; {mend}"
        )
    if label.get("schema_version", min((version, *older))) != version:
        table = _with_new_columns(table, schema)
    return _checked(table, schema, path, error, mend), dict(label.get("provenance", {}))


def _label(table: pa.Table) -> dict[str, Any]:
    """What `write_table` wrote about the file; nothing if another program wrote it."""
    try:
        return dict(json.loads((table.schema.metadata or {})[_KEY]))
    except (KeyError, ValueError, TypeError):
        return {}


def _with_new_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    for field in schema:
        if field.nullable and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def _checked(table: pa.Table, schema: pa.Schema, path: Path, error: type[InputError], mend: str) -> pa.Table:
    for field in schema:
        if field.name not in table.column_names:
            raise error(f"{path}: the column {field.name!r} is missing; {mend}")
        try:
            column = table.column(field.name).cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            found = table.schema.field(field.name).type
            raise error(
                f"{path}: the column {field.name!r} holds {found}, not {field.type}; {mend}"
            ) from None
        if not field.nullable and column.null_count:
            raise error(f"{path}: the column {field.name!r} has empty rows; {mend}")
        index = table.column_names.index(field.name)
        table = table.set_column(index, field, column)
    return table
