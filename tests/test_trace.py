"""Trace files and other people's traces: what is kept, what is refused, and in which words."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from besteffort.cli.trace import app
from besteffort.errors import TraceError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.request import Requests
from besteffort.trace import (
    describe_trace,
    fit_to_fleet,
    import_azure_llm,
    import_mooncake,
    import_trace,
    load_trace,
    read_trace,
    save_trace,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces"
AZURE = DATA / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = DATA / "mooncake_conversation_trace.jsonl"
TINY = Path(__file__).resolve().parents[1] / "artifacts" / "tiny-opt-cpu"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the real traces are not at {DATA}")


def make_fleet(shares: tuple[float, ...] = (1.0, 1.0, 2.0), max_model_len: int = 100) -> Fleet:
    return Fleet.model_validate(
        {
            "schema_version": 1,
            "name": "little",
            "models": [{"name": "small", "path": "small"}],
            "tasks": [
                {"name": f"task-{t}", "deadline_ms_per_token": 40, "lm_eval_task": "copa", "share": share}
                for t, share in enumerate(shares)
            ],
            "engine": {"max_model_len": max_model_len},
        }
    )


FLEET = make_fleet()


def columns(**changes: Any) -> dict[str, Any]:
    good = {
        "arrived_at": [0.0, 0.5, 2.0],
        "task": ["task-0", "task-2", "task-1"],
        "num_prompt_tokens": [10, 20, 30],
        "num_output_tokens": [1, 2, 3],
    }
    return {**good, **changes}


def written(folder: Path, **changes: Any) -> Path:
    """A trace as a stranger might write it, without provenance."""
    path = folder / "trace.parquet"
    pq.write_table(pa.table({k: v for k, v in columns(**changes).items() if v is not None}), path)
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(TraceError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- save and load


@st.composite
def requests_of_fleet(draw: st.DrawFn) -> Requests:
    size = draw(st.integers(1, 30))

    def ints(low: int, high: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), dtype=np.int64)

    times = draw(st.lists(st.floats(0, 1e9), min_size=size, max_size=size))
    return Requests(np.sort(np.array(times)), ints(0, 2), ints(1, 60), ints(1, 40))


@settings(deadline=None)  # the machine may be busy
@given(requests_of_fleet())
def test_a_saved_trace_is_loaded_as_it_was(requests: Requests) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.parquet"
        save_trace(path, requests, FLEET.task_names, {"seed": 7})
        loaded = load_trace(path, FLEET)
        read = read_trace(path)
    for name in ("arrived_at", "task", "num_prompt_tokens", "num_output_tokens"):
        before, after = getattr(requests, name), getattr(loaded, name)
        assert after.dtype == before.dtype
        assert after.flags.writeable
        np.testing.assert_array_equal(after, before)
    assert [read.task_names[t] for t in read.requests.task] == [FLEET.task_names[t] for t in requests.task]
    assert read.facts["seed"] == 7


def test_a_trace_says_where_it_comes_from_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.parquet"
    save_trace(path, load_trace(written(tmp_path), FLEET), FLEET.task_names, {"workload": "stable"})
    assert {"written_at", "besteffort", "workload"} <= read_trace(path).facts.keys()
    assert [file.name for file in path.parent.iterdir()] == ["trace.parquet"]


def test_further_columns_are_kept(tmp_path: Path) -> None:
    read = read_trace(written(tmp_path, hash_ids=[[1], [2, 3], []], user=["a", "b", "c"]), FLEET)
    path = tmp_path / "again.parquet"
    save_trace(path, read.requests, FLEET.task_names, {}, read.further)
    assert read_trace(path).further.to_pydict() == {"hash_ids": [[1], [2, 3], []], "user": ["a", "b", "c"]}


def test_a_trace_that_others_wrote_with_narrower_types_is_taken(tmp_path: Path) -> None:
    tokens = pa.array([1, 2, 3], pa.int16())
    tasks = pa.array(["task-0", "task-2", "task-2"]).dictionary_encode()
    path = written(tmp_path, task=tasks, num_prompt_tokens=tokens, arrived_at=pa.array([0, 1, 2], pa.int32()))
    assert load_trace(path, FLEET).task.tolist() == [0, 2, 2]
    assert read_trace(path).facts == {}


def test_without_a_fleet_the_tasks_are_those_of_the_file_and_any_length_is_taken(tmp_path: Path) -> None:
    read = read_trace(written(tmp_path, task=["z", "a", "z"], num_prompt_tokens=[1, 2, 10**6]))
    assert read.task_names == ("a", "z")
    assert read.requests.task.tolist() == [1, 0, 1]


# --- what is refused


@pytest.mark.parametrize("name", list(columns()))
def test_a_trace_without_a_column_is_refused_with_its_name(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, **{name: None})
    message = refusal(lambda: load_trace(path, FLEET))
    assert message.startswith(f"{path}: the column {name!r} is missing")
    assert "besteffort trace generate" in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_trace_with_nan_times_is_refused_with_its_row(tmp_path: Path, bad: float) -> None:
    path = written(tmp_path, arrived_at=[0.0, bad, float("nan")])
    message = refusal(lambda: load_trace(path, FLEET))
    assert message.startswith(f"{path}: row 1 (counted from 0): arrived_at is {bad}")
    assert "mend the value or remove the row" in message


@pytest.mark.parametrize("name", list(columns()))
def test_a_trace_with_an_empty_cell_is_refused_with_its_row(tmp_path: Path, name: str) -> None:
    first, second, _ = columns()[name]
    path = written(tmp_path, **{name: [first, second, None]})
    assert f"row 2 (counted from 0): {name} is empty" in refusal(lambda: load_trace(path, FLEET))


def test_an_unsorted_trace_is_refused_with_the_row_where_it_falls(tmp_path: Path) -> None:
    path = written(tmp_path, arrived_at=[0.0, 3.0, 2.0])
    message = refusal(lambda: load_trace(path, FLEET))
    assert "row 2 (counted from 0): arrived_at falls from 3.0 to 2.0: sort it by arrived_at" in message


@pytest.mark.parametrize("name", ["num_prompt_tokens", "num_output_tokens"])
def test_a_request_without_tokens_is_refused_with_its_row(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, **{name: [5, 0, -1]})
    message = refusal(lambda: load_trace(path, FLEET))
    assert f"row 1 (counted from 0): {name} is 0, but every request has at least 1" in message


def test_an_unknown_task_is_refused_with_the_tasks_of_the_fleet(tmp_path: Path) -> None:
    path = written(tmp_path, task=["task-0", "chess", "task-1"])
    message = refusal(lambda: load_trace(path, FLEET))
    assert "row 1 (counted from 0): 'chess' is no task of fleet 'little'" in message
    assert "(its tasks: task-0, task-1, task-2)" in message


@pytest.mark.parametrize("output", [71, 2**63 - 1])
def test_a_request_longer_than_the_context_is_refused_with_the_limit(tmp_path: Path, output: int) -> None:
    path = written(tmp_path, num_output_tokens=[1, 80, output])
    message = refusal(lambda: load_trace(path, FLEET))
    assert f"row 2 (counted from 0): 30 prompt and {output} output tokens" in message
    assert "engine.max_model_len = 100 of fleet 'little'" in message


def test_a_request_that_just_fits_the_context_is_taken(tmp_path: Path) -> None:
    assert len(load_trace(written(tmp_path, num_output_tokens=[90, 80, 70]), FLEET)) == 3


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    none = np.array([], dtype=np.int64)
    nobody = Requests(np.array([], dtype=np.float64), none, none, none)
    save_trace(path, nobody, FLEET.task_names, {})
    assert f"{path}: it holds no request" in refusal(lambda: load_trace(path, FLEET))


def test_what_is_no_trace_at_all_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(lambda: load_trace(tmp_path / "nowhere", FLEET))
    assert "this is a folder" in refusal(lambda: load_trace(tmp_path, FLEET))
    (tmp_path / "text").write_text("arrived_at,task\n")
    assert "not a readable Parquet file" in refusal(lambda: load_trace(tmp_path / "text", FLEET))
    path = written(tmp_path, num_prompt_tokens=[1.0, 2.5, 3.0])
    assert "holds double, not int64" in refusal(lambda: load_trace(path, FLEET))


# --- other people's traces

AZURE_LINES = [
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:17:03.9799600,4808,10",
    "2023-11-16 18:17:04.0319600,3180,8",
    "2023-11-17 00:00:00.0000000,110,27",
]


def source(folder: Path, lines: list[str]) -> Path:
    path = folder / "source"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_azure_time_stamps_are_read_to_the_microsecond(tmp_path: Path) -> None:
    arrivals = import_azure_llm(source(tmp_path, AZURE_LINES))
    assert arrivals.arrived_at.tolist() == [0.0, 0.052, 20576.02004]
    assert arrivals.num_prompt_tokens.tolist() == [4808, 3180, 110]
    assert arrivals.num_output_tokens.tolist() == [10, 8, 27]


def test_azure_time_stamps_may_carry_a_zone_and_lines_may_be_blank(tmp_path: Path) -> None:
    lines = [AZURE_LINES[0], "2024-05-10 00:00:00+00:00,5,6", "", "2024-05-10 00:00:00.5+00:00,7,8", ""]
    assert import_azure_llm(source(tmp_path, lines)).arrived_at.tolist() == [0.0, 0.5]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("yesterday,1,2", "yesterday"),
        ("2023-11-16 18:17:05.0000000,1", "not enough values"),
        ("2023-11-16 18:17:05.0000000,1,2,3", "too many values"),
        ("2023-11-16 18:17:05.0000000,one,2", "'one'"),
        ("2023-11-16 18:17:05.0000000,1,0", "0 is not a number of tokens"),
        ("2023-11-16 18:17:05.0000000,1,99999999999999999999", "is not a number of tokens"),
    ],
)
def test_a_malformed_azure_line_is_refused_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = source(tmp_path, [*AZURE_LINES[:3], "", line])
    message = refusal(lambda: import_azure_llm(path))
    assert message.startswith(f"{path}: line 5 is malformed")
    assert words in message


MOONCAKE_LINES = [
    '{"timestamp": 1500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}',
    '{"timestamp": 1500, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}',
    '{"timestamp": 4503, "input_length": 12, "output_length": 1}',
]


def test_mooncake_times_are_milliseconds(tmp_path: Path) -> None:
    arrivals = import_mooncake(source(tmp_path, MOONCAKE_LINES))
    assert arrivals.arrived_at.tolist() == [0.0, 0.0, 3.003]
    assert arrivals.num_prompt_tokens.tolist() == [6758, 7322, 12]
    assert arrivals.num_output_tokens.tolist() == [500, 490, 1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"timestamp": 5000, "input_length": 12', "delimiter"),
        ('{"timestamp": 5000, "input_length": 12}', "no 'output_length'"),
        ('{"timestamp": NaN, "input_length": 12, "output_length": 1}', "timestamp is nan"),
        ('{"timestamp": null, "input_length": 12, "output_length": 1}', "NoneType"),
        ('{"timestamp": 5000, "input_length": "12", "output_length": 1}', "'12' is not a number"),
        ('{"timestamp": 5000, "input_length": 12, "output_length": -1}', "-1 is not a number"),
        ("[5000, 12, 1]", "list"),
    ],
)
def test_a_malformed_mooncake_line_is_refused_with_its_number(tmp_path: Path, line: str, words: str) -> None:
    path = source(tmp_path, [*MOONCAKE_LINES, line])
    message = refusal(lambda: import_mooncake(path))
    assert message.startswith(f"{path}: line 4 is malformed")
    assert words in message


def test_a_source_that_runs_backwards_is_refused_with_its_line(tmp_path: Path) -> None:
    path = source(tmp_path, [MOONCAKE_LINES[2], MOONCAKE_LINES[0]])
    assert "line 2 is earlier than the line before" in refusal(lambda: import_mooncake(path))


def test_a_source_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = source(tmp_path, MOONCAKE_LINES)
    assert "choose the --format that fits" in refusal(lambda: import_azure_llm(path))
    assert "holds no request" in refusal(lambda: import_azure_llm(source(tmp_path, AZURE_LINES[:1])))
    assert "cannot be read" in refusal(lambda: import_mooncake(tmp_path / "nowhere"))
    (tmp_path / "packed").write_bytes(b"\x1f\x8b\x08\xff\xfe")
    assert "not a text file" in refusal(lambda: import_mooncake(tmp_path / "packed"))


# --- fitting


def test_outputs_are_clipped_first_and_prompts_to_the_rest(tmp_path: Path) -> None:
    arrivals = import_mooncake(source(tmp_path, MOONCAKE_LINES))
    requests, facts = fit_to_fleet(arrivals, FLEET, np.random.default_rng(0))
    assert requests.num_output_tokens.tolist() == [25, 25, 1]
    assert requests.num_prompt_tokens.tolist() == [75, 75, 12]
    assert (facts["num_clipped_outputs"], facts["num_clipped_prompts"]) == (2, 2)


def test_an_import_states_its_rule_and_its_source(tmp_path: Path) -> None:
    path = source(tmp_path, MOONCAKE_LINES)
    requests, facts = import_trace(
        path, "mooncake", FLEET, 3, num_requests=2, time_stretch=4.0, max_output_tokens=10
    )
    assert len(requests) == 2
    assert facts["source"] == "source"
    assert re.fullmatch("[0-9a-f]{64}", facts["source_sha256"])
    assert (facts["seed"], facts["time_stretch"], facts["max_output_tokens"]) == (3, 4.0, 10)
    assert "time_stretch" in facts["rule"]


def test_time_is_stretched_and_starts_at_zero(tmp_path: Path) -> None:
    arrivals = import_mooncake(source(tmp_path, MOONCAKE_LINES))
    requests, _ = fit_to_fleet(arrivals, FLEET, np.random.default_rng(0), time_stretch=2.0)
    assert requests.arrived_at.tolist() == [0.0, 0.0, 6.006]


@pytest.mark.parametrize(
    "options",
    [
        {"time_stretch": 0.0},
        {"time_stretch": float("nan")},
        {"time_stretch": float("inf")},
        {"max_output_tokens": 0},
        {"max_output_tokens": 100},
        {"num_requests": 0},
        {"num_requests": 4},
        {"source_format": "sharegpt"},
    ],
)
def test_an_import_with_an_option_out_of_range_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    path = source(tmp_path, MOONCAKE_LINES)
    with pytest.raises(UsageError):
        import_trace(path, **{"source_format": "mooncake", "fleet": FLEET, "seed": 0, **options})


@needs_data
def test_the_azure_trace_is_read_whole() -> None:
    requests, _ = import_trace(AZURE, "azure-llm", make_fleet(max_model_len=8192), 0)
    figures = describe_trace(requests, FLEET.task_names)
    assert figures["num_requests"] == 8819
    assert figures["mean_rate_per_s"] == pytest.approx(2.57, abs=0.01)
    assert figures["peak_rate_per_s"] == 67
    assert figures["gap_cv"] == pytest.approx(13, abs=0.5)


@needs_data
def test_the_mooncake_trace_is_read_whole() -> None:
    requests, facts = import_trace(MOONCAKE, "mooncake", make_fleet(max_model_len=8192), 0)
    figures = describe_trace(requests, FLEET.task_names)
    assert figures["num_requests"] == 12_031
    assert figures["duration_s"] == pytest.approx(0.98 * 3600, rel=0.01)
    assert figures["zero_gap_share"] == pytest.approx(0.9, abs=0.01)
    assert facts["num_clipped_prompts"] > 0
    assert (requests.num_prompt_tokens + requests.num_output_tokens).max() <= 8192


@needs_data
def test_tasks_of_an_import_follow_the_shares_of_the_fleet_and_the_seed_alone() -> None:
    one, _ = import_trace(AZURE, "azure-llm", make_fleet(), 5)
    same, _ = import_trace(AZURE, "azure-llm", make_fleet(), 5, time_stretch=3.0)
    other, _ = import_trace(AZURE, "azure-llm", make_fleet(), 6)
    np.testing.assert_array_equal(one.task, same.task)
    assert (one.task != other.task).any()
    np.testing.assert_allclose(np.bincount(one.task) / len(one), [0.25, 0.25, 0.5], atol=0.02)


# --- describe


def test_a_description_of_a_known_trace() -> None:
    requests = Requests(
        np.array([0.0, 0.0, 0.5, 1.5, 4.0]),
        np.array([0, 1, 1, 1, 0]),
        np.array([1, 2, 3, 4, 5]),
        np.array([7, 7, 7, 7, 7]),
    )
    figures = describe_trace(requests, ("a", "b", "c"))
    assert figures["num_requests"] == 5
    assert figures["duration_s"] == 4.0
    assert figures["mean_rate_per_s"] == 1.0
    assert figures["peak_rate_per_s"] == 3
    assert figures["zero_gap_share"] == 0.25
    assert figures["gap_cv"] == pytest.approx(np.std([0, 0.5, 1, 2.5]))
    assert figures["num_prompt_tokens"] == {"p50": 3.0, "p95": 4.8, "max": 5}
    assert figures["num_output_tokens"] == {"p50": 7.0, "p95": 7.0, "max": 7}
    assert figures["task_shares"] == {"a": 0.4, "b": 0.6, "c": 0.0}


@pytest.mark.parametrize("times", [[3.0], [3.0, 3.0]])
def test_what_an_instant_leaves_open_is_none(times: list[float]) -> None:
    ones = np.ones(len(times), dtype=np.int64)
    figures = describe_trace(Requests(np.array(times), ones - 1, ones, ones), ["a"])
    assert figures["mean_rate_per_s"] is None
    assert figures["gap_cv"] is None
    json.dumps(figures, allow_nan=False)


# --- the commands


def invoke(*args: object) -> tuple[str, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout, result.stderr


def test_a_trace_is_generated_and_described(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "stable.parquet"
    out, err = invoke("generate", "stable", TINY, "-o", path, "--seed", 1, "--rate", 8, "--num-requests", 50)
    assert out == ""
    assert f"wrote {path}: 50 requests over" in err
    out, err = invoke("describe", path, TINY, "--json")
    figures = json.loads(out)
    assert err == ""
    assert figures["num_requests"] == 50
    assert figures["provenance"]["workload"] == "stable"
    assert figures["provenance"]["rate_per_s"] == pytest.approx(8 * load_fleet(TINY).rate_scale)
    assert list(figures["task_shares"]) == ["hellaswag", "copa", "piqa", "openbookqa"]
    out, _ = invoke("describe", path)
    assert "mean_rate_per_s" in out


def test_a_trace_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.parquet"
    origin = source(tmp_path, MOONCAKE_LINES)
    out, err = invoke("import", origin, TINY, "-o", path, "--format", "mooncake", "--seed", 1)
    assert out == ""
    assert "clipped 2 outputs to 128 tokens" in err
    assert read_trace(path).facts["format"] == "mooncake"


def test_the_same_seed_gives_the_same_trace(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        invoke("generate", "unpredictable-1", TINY, "-o", path, "--seed", seed, "--num-requests", 30)
    first, again, other = (pq.read_table(path).to_pydict() for path in paths)
    assert first == again
    assert first != other


@pytest.mark.parametrize("command", ["generate", "import", "describe"])
def test_every_help_ends_its_text_with_an_example(command: str) -> None:
    out, _ = invoke(command, "--help")
    assert f"besteffort trace {command}" in out


def test_bad_input_is_left_to_the_command_line_to_explain(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["describe", str(tmp_path / "nowhere.parquet")])
    assert isinstance(result.exception, TraceError)
