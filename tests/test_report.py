import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.artifacts.outcomes_file import load_outcomes
from besteffort.errors import UsageError
from besteffort.fleet import Fleet
from besteffort.report import comparison_table, summarise, write_comparison, write_report
from besteffort.report.summary import count_windows, percentiles, window_performance
from besteffort.request import Outcomes, Requests
from besteffort.rewards import Rewards

FLEET = Fleet.model_validate(
    {
        "schema_version": 1,
        "name": "two-by-two",
        "num_gpus": 4,
        "models": [{"name": "small", "path": "s"}, {"name": "large", "path": "l"}],
        "tasks": [
            {"name": "qa", "deadline_ms_per_token": 40, "lm_eval_task": "piqa"},
            {"name": "chat", "deadline_ms_per_token": 60, "lm_eval_task": "copa"},
        ],
    }
)
REWARDS = Rewards(
    values=np.array([[0.4, 0.8], [0.6, 0.8]]),
    standard_errors=np.array([[0.01, np.nan], [0.01, 0.02]]),
    num_documents=np.full((2, 2), 100),
    metrics=("acc", "acc"),
    source="measured",
)
NUM_TOKENS = 10


def replayed(
    latencies_ms_per_token: list[float],
    *,
    model: list[int] | None = None,
    task: list[int] | None = None,
    errors: dict[int, str] | None = None,
    send_lag_s: float = 0.0,
) -> Outcomes:
    """One request a second, of 10 tokens, by default for `qa` at `large`; errors by row."""
    n = len(latencies_ms_per_token)
    at = np.arange(n, dtype=np.float64)
    error = [(errors or {}).get(i, "") for i in range(n)]
    failed = np.array([bool(e) for e in error], dtype=np.bool_)
    sent_at = at + send_lag_s
    last_at = np.where(failed, np.nan, sent_at + np.array(latencies_ms_per_token) * NUM_TOKENS / 1000)
    counts = np.full(n, NUM_TOKENS)
    models = np.array(model if model is not None else [1] * n, dtype=np.int64)
    return Outcomes(
        requests=Requests(at, np.array(task or [0] * n, dtype=np.int64), counts, counts),
        model=models,
        replica=np.where(models >= 0, 0, -1),
        sent_at=sent_at,
        first_token_at=np.where(failed, np.nan, sent_at + 0.1),
        last_token_at=last_at,
        num_tokens_received=np.where(failed, 0, NUM_TOKENS),
        error=error,
    )


def summary_of(outcomes: Outcomes, policy: str = "random", **names: Any) -> dict[str, Any]:
    labels = {"trace": "t.parquet", "engine": "simulated", **names}
    return summarise(outcomes, FLEET, REWARDS, policy=policy, **labels)


# Windows


def test_one_miss_at_the_end_of_21_requests_spoils_one_of_two_windows() -> None:
    summary = summary_of(replayed([10.0] * 20 + [50.0]))
    assert summary["num_windows"] == 2
    # 1.00, and 19/20 = 0.95
    assert summary["windows"] == {"1.00": 1, "0.99": 1, "0.98": 1, "0.96": 1, "0.94": 2}


def test_one_miss_in_the_middle_of_21_requests_spoils_both_windows() -> None:
    summary = summary_of(replayed([10.0] * 10 + [50.0] + [10.0] * 10))
    assert summary["windows"] == {"1.00": 0, "0.99": 0, "0.98": 0, "0.96": 0, "0.94": 2}


def test_a_window_exactly_at_a_threshold_reaches_it() -> None:
    # The small model is worth 0.75 for `chat`: 19 x 1 + 0.75, over 20, is 0.9875; four make 0.95.
    one = summary_of(replayed([10.0] * 20, task=[1] * 20, model=[0] + [1] * 19))
    assert one["windows"] == {"1.00": 0, "0.99": 0, "0.98": 1, "0.96": 1, "0.94": 1}
    performance = np.array([1.0] * 16 + [0.8] * 4)  # mean 0.96, which no double is
    assert count_windows(window_performance(performance))["0.96"] == 1


def test_nineteen_requests_make_no_window() -> None:
    summary = summary_of(replayed([10.0] * 19))
    assert summary["num_windows"] == 0
    assert set(summary["windows"].values()) == {0}


@given(st.lists(st.floats(0, 1), min_size=20, max_size=60))
def test_windows_are_the_means_of_every_20_in_a_row(performance: list[float]) -> None:
    expected = [np.mean(performance[i : i + 20]) for i in range(len(performance) - 19)]
    np.testing.assert_allclose(window_performance(np.array(performance)), expected, atol=1e-12)


@given(st.lists(st.floats(0, 1), max_size=60))
def test_a_higher_threshold_is_never_reached_more_often(performance: list[float]) -> None:
    counts = list(count_windows(window_performance(np.array(performance))).values())
    assert counts == sorted(counts)


# The other figures

MIXED = replayed(
    [10.0, 50.0, 50.0, 70.0, 0.0, 0.0],
    model=[0, 1, 1, 1, 1, -1],
    task=[0, 0, 1, 1, 0, 1],
    errors={4: "engine died", 5: "no replica"},
    send_lag_s=0.002,
)


def test_a_mixed_replay_adds_up_as_it_does_by_hand() -> None:
    summary = summary_of(MIXED)
    assert (summary["num_requests"], summary["sent"], summary["answered"], summary["failed"]) == (6, 6, 4, 2)
    assert summary["unrouted"] == 1
    assert summary["performance"] == pytest.approx((0.5 + 0 + 1 + 0 + 0 + 0) / 6)
    assert summary["hardware_utility"] == pytest.approx(summary["performance"] / 4)
    assert summary["deadline_met"] == pytest.approx(2 / 6)
    assert summary["selection"] == {"small": pytest.approx(1 / 5), "large": pytest.approx(4 / 5)}
    assert summary["latency_ms_per_token"]["p50"] == pytest.approx(50)
    assert summary["ttft_ms"]["p50"] == pytest.approx(100)
    assert summary["send_lag_ms"] == {"p50": pytest.approx(2), "p99": pytest.approx(2)}
    assert summary["arrival_rate_per_s"] == pytest.approx(1)
    assert summary["duration_s"] == pytest.approx(5)


def test_tasks_and_models_have_their_own_figures() -> None:
    summary = summary_of(MIXED)
    qa, large = summary["tasks"]["qa"], summary["models"]["large"]
    assert (qa["count"], qa["failed"], qa["deadline_ms_per_token"]) == (3, 1, 40)
    assert qa["performance"] == pytest.approx(0.5 / 3)
    assert qa["selection"] == {"small": pytest.approx(1 / 3), "large": pytest.approx(2 / 3)}
    assert (large["count"], large["failed"]) == (4, 1)
    assert large["deadline_met"] == pytest.approx(1 / 4)
    assert large["latency_ms_per_token"]["p50"] == pytest.approx(50)


def test_every_request_that_was_sent_was_answered_or_failed() -> None:
    for outcomes in (MIXED, replayed([10.0] * 3), replayed([0.0], errors={0: "x"}), replayed([])):
        summary = summary_of(outcomes)
        assert summary["sent"] == summary["answered"] + summary["failed"]


def test_the_first_few_distinct_errors_are_counted() -> None:
    errors = {i: f"error {i % 7}" for i in range(14)}
    shown = summary_of(replayed([0.0] * 14, errors=errors))["errors"]
    assert shown == [{"message": f"error {i}", "count": 2} for i in range(5)]


@pytest.mark.parametrize(
    "outcomes",
    [replayed([]), replayed([0.0, 0.0], model=[-1, -1], errors={0: "a", 1: "b"}), replayed([10.0])],
    ids=["no requests", "all failed", "one request"],
)
def test_a_summary_holds_null_and_never_nan(outcomes: Outcomes) -> None:
    json.dumps(summary_of(outcomes), allow_nan=False)


def test_nothing_answered_has_no_latency_and_no_selection() -> None:
    summary = summary_of(replayed([0.0], model=[-1], errors={0: "no replica"}))
    assert summary["latency_ms_per_token"] == {"p50": None, "p95": None, "p99": None}
    assert summary["selection"] == {"small": None, "large": None}
    assert summary["performance"] == 0


def test_a_performance_of_zero_has_a_hardware_utility_of_zero() -> None:
    assert summary_of(replayed([50.0]))["hardware_utility"] == 0


def test_percentiles_leave_out_what_never_ended() -> None:
    assert percentiles(np.array([1.0, np.nan, 3.0, np.inf]), (50,)) == {"p50": 2.0}


# Policies side by side


def test_a_comparison_has_one_row_per_policy_and_a_cell_per_header() -> None:
    good = summary_of(replayed([10.0] * 21), "static:large")
    poor = summary_of(replayed([10.0] * 20 + [50.0], model=[0] * 21), "static:small", engine="vllm")
    table = comparison_table([good, poor])
    assert [len(row) for row in table.rows] == [len(table.headers)] * 2
    first, second = (dict(zip(table.headers, row, strict=True)) for row in table.rows)
    assert (first["policy"], first["engine"], second["engine"]) == ("static:large", "simulated", "vllm")
    assert (first["performance"], first["deadlines met"], first["windows ≥ 1.00"]) == (
        "1.000",
        "100.0 %",
        "2",
    )
    assert (second["performance"], second["deadlines met"]) == ("0.476", "95.2 %")
    assert (first["share large"], second["share large"]) == ("100.0 %", "0.0 %")
    assert first["latency p95 ms/token"] == "10.0"


def test_a_comparison_shows_failures_and_traces_only_if_they_say_something() -> None:
    plain = comparison_table([summary_of(replayed([10.0]))])
    assert not {"failed", "trace"} & set(plain.headers)
    telling = comparison_table([summary_of(MIXED), summary_of(MIXED, trace="other.parquet")])
    assert {"failed", "trace"} <= set(telling.headers)


def test_almost_all_deadlines_are_not_printed_as_all() -> None:
    summary = {**summary_of(replayed([10.0])), "deadline_met": 0.99999}
    table = comparison_table([summary])
    assert table.rows[0][table.headers.index("deadlines met")] == "> 99.9 %"


# Files


class Page(HTMLParser):
    """The visible text, the ids, and every address that a browser would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "xlink:href"):
                self.loads.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def write(directory: Path, outcomes: Outcomes, **labels: Any) -> dict[str, Any]:
    summary = summary_of(outcomes, **labels)
    write_report(directory, outcomes, summary, FLEET, REWARDS, {"seed": 7})
    return summary


def test_a_report_is_three_files_that_agree(tmp_path: Path) -> None:
    summary = write(tmp_path / "replays" / "r", MIXED)
    directory = tmp_path / "replays" / "r"
    assert sorted(p.name for p in directory.iterdir()) == ["report.html", "requests.parquet", "summary.json"]
    written = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert (written["kind"], written["schema_version"], written["provenance"]["seed"]) == ("summary", 1, 7)
    assert {key: written[key] for key in summary} == summary
    assert summary_of(load_outcomes(directory / "requests.parquet", FLEET)) == summary
    label = json.loads(pq.read_schema(directory / "requests.parquet").metadata[b"besteffort"])
    assert (label["provenance"]["policy"], label["provenance"]["seed"]) == ("random", 7)


def test_a_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write(tmp_path, replayed([10.0] * 2000))
    page = Page(tmp_path / "report.html")
    assert all(address.startswith(("#", "data:image/png")) for address in page.loads)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 5


def test_the_ids_of_the_plots_do_not_clash(tmp_path: Path) -> None:
    write(tmp_path, MIXED)
    page = Page(tmp_path / "report.html")
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.loads if address.startswith("#")} <= set(page.ids)


@pytest.mark.parametrize("engine", ["simulated", "vllm"])
def test_a_page_says_which_engine_answered(tmp_path: Path, engine: str) -> None:
    summary = write(tmp_path, MIXED, engine=engine)
    write_comparison(tmp_path, [summary])
    for name in ("report.html", "comparison.html"):
        text = Page(tmp_path / name).text
        assert f"engine: {engine}" in text
        assert ("every latency comes from the simulator" in text) == (engine == "simulated")


def test_failures_stand_out_on_the_page(tmp_path: Path) -> None:
    write(tmp_path, MIXED)
    page = Page(tmp_path / "report.html")
    assert "2 of 6 requests failed." in page.text
    assert "engine died" in page.text


def test_a_page_without_failures_raises_no_alarm(tmp_path: Path) -> None:
    write(tmp_path, replayed([10.0] * 25))
    assert "requests failed." not in Page(tmp_path / "report.html").text


def test_what_others_wrote_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    rude = "<script>alert('x')</script>$\\frac{"
    outcomes = replayed([10.0, 0.0], errors={1: rude})
    write(tmp_path, outcomes, policy=rude, trace=rude)
    write_comparison(tmp_path, [summary_of(outcomes, rude)])
    for name in ("report.html", "comparison.html"):
        page = Page(tmp_path / name)
        assert "script" not in page.tags
        assert rude in page.text


@pytest.mark.parametrize(
    "outcomes",
    [
        replayed([]),
        replayed([10.0]),
        replayed([0.0, 0.0], model=[-1, -1], errors={0: "a", 1: "b"}),
        replayed([1.0, 1000.0] * 15),
    ],
    ids=["no requests", "one request", "all failed", "a wide spread"],
)
def test_a_page_can_be_made_of_any_replay(tmp_path: Path, outcomes: Outcomes) -> None:
    write(tmp_path, outcomes)
    assert "Performance" in Page(tmp_path / "report.html").text


def test_policies_compared_under_different_conditions_carry_a_warning(tmp_path: Path) -> None:
    one, other = summary_of(MIXED), summary_of(MIXED, engine="vllm")
    write_comparison(tmp_path / "same", [one, one])
    write_comparison(tmp_path / "mixed", [one, other])
    warning = "Not the same conditions."
    assert warning not in Page(tmp_path / "same" / "comparison.html").text
    assert warning in Page(tmp_path / "mixed" / "comparison.html").text


def test_a_comparison_keeps_the_summaries_for_machines(tmp_path: Path) -> None:
    summaries = [summary_of(MIXED, "a"), summary_of(MIXED, "b")]
    write_comparison(tmp_path, summaries)
    written = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert (written["kind"], written["schema_version"]) == ("comparison", 1)
    assert written["summaries"] == summaries


def test_a_place_that_takes_no_report_is_named(tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UsageError, match=r"report\.html: cannot be written"):
        write(tmp_path, MIXED)
    assert not (tmp_path / "summary.json").exists()  # it comes last, so it vouches for the others
