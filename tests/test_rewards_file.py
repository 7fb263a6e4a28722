from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from besteffort.artifacts.rewards_file import load_rewards, read_given_rewards, save_rewards
from besteffort.errors import RewardsError
from besteffort.fleet import Fleet
from besteffort.rewards import Rewards


def make_fleet(**model: str) -> Fleet:
    return Fleet.model_validate(
        {
            "schema_version": 1,
            "name": "two-by-two",
            "models": [{"name": "small", "path": "s", **model}, {"name": "large", "path": "l"}],
            "tasks": [
                {"name": "qa", "deadline_ms_per_token": 40, "lm_eval_task": "piqa"},
                {"name": "chat", "deadline_ms_per_token": 60, "lm_eval_task": "copa"},
            ],
        }
    )


def make_rewards(values: object = ((0.5, 1.0), (0.6, 0.8))) -> Rewards:
    return Rewards(
        values=np.array(values),
        standard_errors=np.array([[0.01, 0.02], [np.nan, 0.04]]),
        num_documents=np.array([[100, 100], [0, 50]]),
        metrics=("acc", "acc_norm"),
        source="measured",
    )


def rewrite(path: Path, **columns: list[object]) -> None:
    """Replace columns of a rewards file; an empty list drops one. The label stays."""
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.column_names.index(name)
        table = table.set_column(index, name, pa.array(values)) if values else table.drop_columns([name])
    pq.write_table(table, path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.parquet"
    save_rewards(path, make_rewards(), make_fleet(), {"seed": 1})
    return path


@given(values=arrays(np.float64, (2, 2), elements=st.floats(0, 1)))
def test_what_is_saved_is_read_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.parquet"
    rewards = make_rewards(values)
    save_rewards(path, rewards, make_fleet(), {})
    loaded = load_rewards(path, make_fleet())
    np.testing.assert_array_equal(loaded.values, rewards.values)
    np.testing.assert_array_equal(loaded.standard_errors, rewards.standard_errors)
    np.testing.assert_array_equal(loaded.num_documents, rewards.num_documents)
    assert (loaded.metrics, loaded.source) == (rewards.metrics, "measured")


def test_a_model_reads_the_rewards_of_the_model_it_stands_for(saved: Path) -> None:
    fleet = make_fleet(name="tiny", stands_for="small")
    np.testing.assert_array_equal(load_rewards(saved, fleet).values, make_rewards().values)


def test_a_models_own_rewards_come_before_those_it_stands_for(saved: Path) -> None:
    fleet = make_fleet(name="small", stands_for="large")
    np.testing.assert_array_equal(load_rewards(saved, fleet).values, make_rewards().values)


def test_a_model_without_rewards_is_refused_with_its_name(saved: Path) -> None:
    with pytest.raises(RewardsError, match=r"rewards\.parquet: no reward of task 'qa' with model 'tiny'"):
        load_rewards(saved, make_fleet(name="tiny"))


def test_a_file_of_other_tasks_is_refused(saved: Path) -> None:
    rewrite(saved, task=["qa", "qa", "other", "other"])
    with pytest.raises(RewardsError, match=r"no reward of task 'chat' with model 'small'.*besteffort score"):
        load_rewards(saved, make_fleet())


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_value_that_is_no_utility_is_refused(saved: Path, value: float) -> None:
    rewrite(saved, value=[0.5, value, 0.6, 0.8])
    with pytest.raises(RewardsError, match=f"task 'qa' with model 'large' is {value}, not in"):
        load_rewards(saved, make_fleet())


def test_a_missing_column_is_named(saved: Path) -> None:
    rewrite(saved, metric=[])
    with pytest.raises(RewardsError, match="the column 'metric' is missing"):
        load_rewards(saved, make_fleet())


def test_a_column_of_words_where_numbers_belong_is_refused(saved: Path) -> None:
    rewrite(saved, value=["good", "better", "best", "none"])
    with pytest.raises(RewardsError, match="the column 'value' holds string, not double"):
        load_rewards(saved, make_fleet())


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(RewardsError, match="no such file; run `besteffort score FLEET_DIR`"):
        load_rewards(tmp_path / "rewards.parquet", make_fleet())


def test_one_given_entry_makes_the_whole_matrix_given(saved: Path) -> None:
    rewrite(saved, source=["measured", "measured", "given", "measured"])
    assert load_rewards(saved, make_fleet()).source == "given"


def test_relative_utility_is_one_for_each_tasks_best_model() -> None:
    np.testing.assert_allclose(make_rewards().relative, [[0.5, 1.0], [0.75, 1.0]])


def test_a_task_that_no_model_can_do_has_relative_utility_zero() -> None:
    assert not make_rewards([[0.0, 0.0], [0.5, 1.0]]).relative[0].any()


CSV = "# from a paper\ntask,model,value\nqa,small,0.5\nqa,large,1\nchat,small,0.6\nchat,large,0.8\n"


def given_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "rewards.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_csv_of_given_rewards_is_read_in_the_fleets_order(tmp_path: Path) -> None:
    rewards = read_given_rewards(given_file(tmp_path, CSV), make_fleet())
    np.testing.assert_array_equal(rewards.values, [[0.5, 1.0], [0.6, 0.8]])
    assert np.isnan(rewards.standard_errors).all()
    assert not rewards.num_documents.any()
    assert rewards.source == "given"


def test_a_csv_may_give_standard_errors(tmp_path: Path) -> None:
    text = (
        "task,model,value,standard_error\nqa,small,0.5,0.1\nqa,large,1,\nchat,small,0,0\nchat,large,1,0.2\n"
    )
    rewards = read_given_rewards(given_file(tmp_path, text), make_fleet())
    np.testing.assert_array_equal(rewards.standard_errors, [[0.1, np.nan], [0.0, 0.2]])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (CSV.replace("value", "score"), "the column 'value' is missing"),
        (CSV.replace("0.6", "good"), "a value is not a number"),
        (CSV.replace("0.6", "1.6"), "task 'chat' with model 'small' is 1.6, not in"),
        (CSV.replace("chat,large,0.8\n", ""), "no reward of task 'chat' with model 'large'"),
        (CSV.replace("chat,large,0.8", "chat,large"), "a value is not a number"),
        ("", "no reward of task 'qa'"),
    ],
)
def test_a_csv_that_does_not_fit_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(RewardsError, match=problem):
        read_given_rewards(given_file(tmp_path, text), make_fleet())


def test_a_csv_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardsError, match=r"rewards\.csv: cannot be read"):
        read_given_rewards(tmp_path / "rewards.csv", make_fleet())
