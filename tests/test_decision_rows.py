"""Rows of the decision log as bytes, and the columns that are made of them."""

import math
from typing import Any

import numpy as np
import pytest

from besteffort.artifacts.decisions_file import RECORDED
from besteffort.engines.running import Engine
from besteffort.router.decision_rows import DecisionRows
from besteffort.router.dispatcher import Decision, Route

_ROUTE = Route(1, 2, 3, Engine("http://127.0.0.1:1", "served"), 10.0, 0.002, False, "ours")


def seen(*, q_values: bool) -> Decision:
    values = np.float32([0.5, -np.inf, 1.5]).tobytes() if q_values else b""
    return Decision(4.0, np.array([1.0, 2.0, 3.0]).tobytes(), np.arange(9.0).tobytes(), 2, "ours", values)


def packed(rows: DecisionRows, decision: Decision | None, request_id: bytes = b"id", **other: Any) -> bytes:
    given: dict[str, Any] = {
        "num_prompt_tokens": 10**18 - 1, "prompt_estimated": True, "num_output_tokens": 2**31 - 1,
        "num_tokens_received": 0, "num_retries": 1, "status": 200, "error": None, "began_at": math.nan,
        "ended_at": 10.5, "latency_ms_per_token": math.nan, "deadline_ms_per_token": 40.0,
    }  # fmt: skip
    return rows.pack(_ROUTE, decision, request_id, "ok", **(given | other))


def test_what_is_packed_comes_out_as_it_was() -> None:
    rows = DecisionRows(num_models=3, epoch_s=1000.0)
    data = packed(rows, seen(q_values=True), b"x" * 128, began_at=10.25, latency_ms_per_token=5.0)
    table = rows.columns(data)
    assert table.schema == RECORDED
    assert table.to_pylist() == [
        {
            "received_at_s": 1010.0, "request_id": "x" * 128, "task": 1, "num_prompt_tokens": 10**18 - 1,
            "prompt_estimated": True, "num_output_tokens": 2**31 - 1, "num_tokens_received": 0,
            "policy": "ours", "arrival_rate_per_s": 4.0, "batch_sizes": [1.0, 2.0, 3.0],
            "neighbours": list(range(9)), "q_values": [0.5, -math.inf, 1.5], "chosen": 2, "model": 2,
            "replica": 3, "num_retries": 1, "decision_ms": 2.0, "outcome": "ok", "status": 200, "error": None,
            "duration_ms": 500.0, "ttft_ms": 250.0, "latency_ms_per_token": 5.0,
            "deadline_ms_per_token": 40.0,
        }
    ]  # fmt: skip


def test_what_was_not_there_is_null_beside_rows_where_it_was() -> None:
    rows = DecisionRows(num_models=3, epoch_s=0.0)
    decisions = (seen(q_values=True), None, seen(q_values=False))
    data = b"".join(packed(rows, decision, b"y") for decision in decisions)
    found = rows.columns(data + packed(rows, None, b"zz", status=0, error="stall")).to_pydict()
    assert found["policy"] == ["ours", None, "ours", None]
    assert found["chosen"] == [2, None, 2, None]
    assert found["arrival_rate_per_s"] == [4.0, None, 4.0, None]
    assert found["batch_sizes"] == [[1.0, 2.0, 3.0], None, [1.0, 2.0, 3.0], None]
    assert [values is None for values in found["neighbours"]] == [False, True, False, True]
    assert found["q_values"] == [[0.5, -math.inf, 1.5], None, None, None]
    assert found["ttft_ms"] == found["latency_ms_per_token"] == [None] * 4
    assert found["status"] == [200, 200, 200, None]
    assert found["error"] == [None, None, None, "stall"]
    assert found["request_id"] == ["y", "y", "y", "zz"]


@pytest.mark.parametrize("num_models", range(1, 9))
def test_both_read_the_same_bytes_however_many_models_there_are(num_models: int) -> None:
    rows = DecisionRows(num_models, epoch_s=0.0)
    assert rows.columns(bytes(3 * rows.size)).num_rows == 3
