"""Rows of the decision log as bytes: packed where requests are served, made into columns elsewhere."""

import struct
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from besteffort.artifacts.decisions_file import RECORDED
from besteffort.router.dispatcher import Decision, Route

_MAX_REQUEST_ID = 128  # bytes
_NAMED = ("policy", "outcome", "error")  # of few values: a row has their numbers


class DecisionRows:
    """Packs rows, and unpacks many at once.

    A row is one flat piece of memory without any references: to keep the objects that it is made of would
    cost more, until they are columns, than to copy what they hold.
    """

    def __init__(self, num_models: int, epoch_s: float) -> None:
        self._epoch_s = epoch_s  # when the dispatcher's clock was 0
        self._numbers = _Numbers({None: 0})  # of names that come again and again
        fields = _fields(num_models)
        self._dtype = np.dtype([field for _, field in fields])
        # Native, since that is faster; the fields' order leaves no gaps.
        packer = struct.Struct("".join(code for code, _ in fields))
        assert packer.size == self._dtype.itemsize, "both read the same bytes"
        self._pack = packer.pack
        self.size = packer.size  # bytes of a row

    def pack(
        self,
        route: Route,
        decision: Decision | None,
        request_id: bytes,
        outcome: str,
        *,
        num_prompt_tokens: int,
        prompt_estimated: bool,
        num_output_tokens: int,
        num_tokens_received: int,
        num_retries: int,
        status: int,  # 0: none was sent
        error: str | None,
        began_at: float,  # s, by the dispatcher's clock; NaN: no stream
        ended_at: float,
        latency_ms_per_token: float,  # NaN: not answered
        deadline_ms_per_token: float,
    ) -> bytes:
        arrival_rate, chosen, policy = np.nan, 0, None
        batch_sizes = neighbours = q_values = b""  # which are filled up
        if decision is not None:
            chosen, policy = decision.chosen, decision.policy
            arrival_rate, batch_sizes = decision.arrival_rate_per_s, decision.batch_sizes
            neighbours, q_values = decision.neighbours, decision.q_values
        return self._pack(
            route.arrived_at,
            route.decision_s,
            began_at,
            ended_at,
            latency_ms_per_token,
            deadline_ms_per_token,
            arrival_rate,
            num_prompt_tokens,
            num_output_tokens,
            num_tokens_received,
            batch_sizes,
            neighbours,
            q_values,
            route.task,
            route.model,
            route.replica,
            chosen,
            num_retries,
            status,
            self._numbers[policy],
            self._numbers[outcome],
            self._numbers[error],
            prompt_estimated,
            neighbours != b"",
            q_values != b"",
            len(request_id),
            request_id,
        )

    def columns(self, data: bytes | bytearray) -> pa.Table:
        """By `RECORDED`, of rows one behind the other."""
        rows = np.frombuffer(data, self._dtype)
        seen, arrived_at = rows["policy"] > 0, rows["arrived_at"]
        made = {
            "received_at_s": self._epoch_s + arrived_at,
            "request_id": _strings(rows["request_id"], rows["len_request_id"]),
            "batch_sizes": _lists(rows["batch_sizes"], seen),
            "neighbours": _lists(rows["neighbours"], rows["has_neighbours"]),
            "q_values": _lists(rows["q_values"], rows["has_q_values"]),
            "chosen": pa.array(rows["chosen"].copy(), mask=~seen),
            "decision_ms": 1000.0 * rows["decision_s"],
            "status": pa.array(rows["status"].copy(), mask=rows["status"] == 0),
            "duration_ms": 1000.0 * (rows["ended_at"] - arrived_at),
            "ttft_ms": 1000.0 * (rows["began_at"] - arrived_at),
        }
        names = pa.array(list(self._numbers), pa.string())
        made |= {column: names.take(pa.array(rows[column].copy())) for column in _NAMED}
        columns = [made[field.name] if field.name in made else rows[field.name].copy() for field in RECORDED]
        pairs = zip(columns, RECORDED, strict=True)
        return pa.table([_array(*pair) for pair in pairs], schema=RECORDED)


class _Numbers(dict[str | None, int]):
    """Names in the order in which they were asked for, and the place of each."""

    def __missing__(self, name: str | None) -> int:
        self[name] = len(self)
        return self[name]


def _fields(num_models: int) -> list[tuple[str, tuple[Any, ...]]]:
    """Of a row: how it is packed and, by NumPy, how it is read. The larger come first: there are no gaps."""
    times = ("arrived_at", "decision_s", "began_at", "ended_at")
    reals = (*times, "latency_ms_per_token", "deadline_ms_per_token", "arrival_rate_per_s")
    tokens = ("num_prompt_tokens", "num_output_tokens", "num_tokens_received")
    numbers = ("task", "model", "replica", "chosen", "num_retries", "status", *_NAMED)
    flags = ("prompt_estimated", "has_neighbours", "has_q_values")
    return [
        *(("d", (name, np.float64)) for name in reals),
        *(("q", (name, np.int64)) for name in tokens),
        (f"{8 * num_models}s", ("batch_sizes", np.float64, (num_models,))),
        (f"{8 * num_models**2}s", ("neighbours", np.float64, (num_models**2,))),
        (f"{4 * num_models}s", ("q_values", np.float32, (num_models,))),
        *(("i", (name, np.int32)) for name in numbers),
        *(("?", (name, np.bool_)) for name in flags),
        ("B", ("len_request_id", np.uint8)),
        (f"{_MAX_REQUEST_ID}s", ("request_id", np.uint8, (_MAX_REQUEST_ID,))),
    ]


def _array(column: Any, field: pa.Field) -> pa.Array:
    """NaN is what is missing."""
    if isinstance(column, pa.Array):
        return column.cast(field.type)
    return pa.array(column, field.type, from_pandas=True)


def _lists(values: NDArray[np.floating], present: NDArray[np.bool_]) -> pa.Array:
    """Of each row's values (N, K) one list; null, and then without any values, where it is not present."""
    ends = np.cumsum(np.concatenate([[0], values.shape[1] * present]), dtype=np.int32)
    flat = pa.array(values[present].ravel(), pa.float64())
    return pa.ListArray.from_arrays(pa.array(ends), flat, mask=pa.array(~present))


def _strings(padded: NDArray[np.uint8], lengths: NDArray[np.uint8]) -> pa.Array:
    """Of each row's bytes (N, K), which are ASCII, as many as are its own."""
    ends = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int32)
    flat = padded[np.arange(padded.shape[1]) < lengths[:, np.newaxis]]
    return pa.StringArray.from_buffers(len(lengths), pa.py_buffer(ends), pa.py_buffer(flat))
