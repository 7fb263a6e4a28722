from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.artifacts.outcomes_file import SCHEMA, judge, load_outcomes, save_outcomes
from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.request import Outcomes, Requests
from besteffort.rewards import Rewards

FLEET = Fleet.model_validate(
    {
        "schema_version": 1,
        "name": "two-by-two",
        "models": [{"name": "small", "path": "s", "replicas": 4}, {"name": "large", "path": "l"}],
        "tasks": [
            {"name": "qa", "deadline_ms_per_token": 40, "lm_eval_task": "piqa"},
            {"name": "chat", "deadline_ms_per_token": 60, "lm_eval_task": "copa"},
        ],
    }
)
REWARDS = Rewards(
    values=np.array([[0.4, 0.8], [0.9, 0.6]]),
    standard_errors=np.full((2, 2), np.nan),
    num_documents=np.zeros((2, 2), dtype=np.int64),
    metrics=("acc", "acc"),
    source="given",
)
FIELDS = ("model", "replica", "sent_at", "first_token_at", "last_token_at", "num_tokens_received")
TRACE_FIELDS = ("arrived_at", "task", "num_prompt_tokens", "num_output_tokens")

instants = st.floats(0, 1e6) | st.just(float("nan"))
counts = st.integers(1, 5000)
routes = st.tuples(st.integers(0, 1), st.integers(0, 3)) | st.just((-1, -1))
errors = st.just("") | st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
rows = st.tuples(
    st.floats(0, 1e6), st.integers(0, 1), counts, counts, routes, instants, instants, instants, counts, errors
)


def make_outcomes(rows: list[Any]) -> Outcomes:
    """Rows of arrived_at, task, prompt, output, (model, replica), sent, first, last, received, error."""
    columns: list[Any] = [[row[i] for row in rows] for i in range(10)]
    floats = {i: np.array(columns[i], dtype=np.float64) for i in (0, 5, 6, 7)}
    ints = {i: np.array(columns[i], dtype=np.int64) for i in (1, 2, 3, 8)}
    model, replica = np.array(columns[4], dtype=np.int64).reshape(-1, 2).T
    requests = Requests(floats[0], ints[1], ints[2], ints[3])
    return Outcomes(requests, model, replica, floats[5], floats[6], floats[7], ints[8], columns[9])


NAN = float("nan")
THREE = make_outcomes(
    [
        (0.0, 0, 10, 10, (0, 3), 0.1, 0.2, 0.4, 10, ""),  # 30 ms/token of 40
        (1.0, 1, 20, 10, (1, 0), 1.0, 1.2, 1.7, 10, ""),  # 70 ms/token of 60
        (2.0, 1, 30, 10, (-1, -1), 2.0, NAN, NAN, 0, "no replica"),
    ]
)


@given(st.lists(rows, max_size=12))
def test_what_is_saved_is_read_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.parquet"
    outcomes = make_outcomes(sorted(rows, key=lambda row: row[0]))
    save_outcomes(path, outcomes, FLEET, REWARDS, {})
    loaded = load_outcomes(path, FLEET)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(outcomes, name), strict=True)
    for name in TRACE_FIELDS:
        np.testing.assert_array_equal(
            getattr(loaded.requests, name), getattr(outcomes.requests, name), strict=True
        )
    assert loaded.error == outcomes.error


def test_performance_is_the_weight_times_the_utility_relative_to_the_tasks_best_model() -> None:
    verdicts = judge(THREE, FLEET, REWARDS)
    np.testing.assert_array_equal(verdicts.deadline_ms_per_token, [40, 60, 60])
    np.testing.assert_allclose(verdicts.latency_ms_per_token, [30, 70, np.nan])
    np.testing.assert_array_equal(verdicts.deadline_met, [True, False, False])
    np.testing.assert_array_equal(verdicts.deadline_weight, [1, 0, 0])
    np.testing.assert_allclose(verdicts.performance, [0.4 / 0.8, 0, 0])


def test_a_soft_deadline_leaves_part_of_the_utility() -> None:
    fleet = FLEET.model_copy(update={"deadline_kind": "soft"})
    late = make_outcomes([(0.0, 1, 1, 100, (1, 0), 0.0, 1.0, 6.5, 100, "")])  # 65 ms/token of 60
    assert judge(late, fleet, REWARDS).performance == pytest.approx(0.95 * 0.6 / 0.9)


def test_an_answer_of_no_tokens_is_worth_nothing() -> None:
    empty = make_outcomes(
        [
            (0.0, 0, 1, 8, (1, 0), 0.0, 1.0, 1.0, 0, ""),
            (0.0, 0, 1, 8, (1, 0), 1.0, 1.0, 1.0, 0, ""),
        ]
    )
    np.testing.assert_array_equal(judge(empty, FLEET, REWARDS).performance, [0, 0])


def test_each_row_says_in_words_and_units_what_became_of_a_request(tmp_path: Path) -> None:
    save_outcomes(tmp_path / "requests.parquet", THREE, FLEET, REWARDS, {"policy": "random"})
    first, second, third = pq.read_table(tmp_path / "requests.parquet").to_pylist()
    assert (first["task"], first["model"], first["replica"], first["error"]) == ("qa", "small", 3, None)
    assert first["ttft_ms"] == pytest.approx(100)
    assert (second["deadline_ms_per_token"], second["deadline_weight"]) == (60, 0)
    nothing = ("model", "replica", "first_token_at", "last_token_at", "latency_ms_per_token", "ttft_ms")
    assert all(third[name] is None for name in nothing)
    assert (third["performance"], third["error"]) == (0, "no replica")


def test_the_file_begins_with_the_columns_of_a_trace(tmp_path: Path) -> None:
    save_outcomes(tmp_path / "requests.parquet", THREE, FLEET, REWARDS, {})
    assert pq.read_schema(tmp_path / "requests.parquet").names == SCHEMA.names
    assert SCHEMA.names[:4] == list(TRACE_FIELDS)
    assert not any(SCHEMA.field(name).nullable for name in TRACE_FIELDS)


@pytest.mark.parametrize(
    ("column", "values", "problem"),
    [
        ("task", ["qa", "poetry", "qa"], "'poetry' is no task of fleet 'two-by-two'"),
        ("model", ["small", "huge", None], "'huge' is no model of fleet 'two-by-two'"),
        ("arrived_at", [0.0, 2.0, 1.0], "rows go in order of arrival"),
        ("task", ["qa", None, "qa"], "the column 'task' has empty rows"),
        ("replica", ["a", "b", "c"], "the column 'replica' holds string, not int64"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tmp_path: Path, column: str, values: list[Any], problem: str
) -> None:
    path = tmp_path / "requests.parquet"
    save_outcomes(path, THREE, FLEET, REWARDS, {})
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(values)), path)
    with pytest.raises(TraceError, match=f"requests.parquet: .*{problem}.*besteffort replay"):
        load_outcomes(path, FLEET)


def test_a_file_without_a_recorded_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.parquet"
    save_outcomes(path, THREE, FLEET, REWARDS, {})
    pq.write_table(pq.read_table(path).drop_columns(["sent_at"]), path)
    with pytest.raises(TraceError, match="the column 'sent_at' is missing"):
        load_outcomes(path, FLEET)
