"""How the simulator is held against real engines, on outcomes that are made up."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from besteffort.fleet import Fleet
from besteffort.report import differences, fidelity, fidelity_table, kendall_tau
from besteffort.report.fidelity import EVERYTHING
from besteffort.report.marks import Pace, Row
from besteffort.request import Outcomes, Requests
from besteffort.stages import fidelity as stage
from besteffort.stages.fidelity import BEGIN, END, Spec, write_table
from besteffort.trace import SourceArrivals
from tests.conftest import ROOT
from tests.test_cli import refused


def outcomes(latency_ms_per_token: list[float], model: list[int]) -> Outcomes:
    num = len(model)
    requests = Requests(np.arange(num, dtype=float), np.zeros(num, int), np.full(num, 16), np.full(num, 10))
    last = requests.arrived_at + np.array(latency_ms_per_token) * 10 / 1000
    return Outcomes(
        requests=requests,
        model=np.array(model),
        replica=np.zeros(num, int),
        sent_at=requests.arrived_at,
        first_token_at=requests.arrived_at + 0.05,
        last_token_at=last,
        num_tokens_received=np.full(num, 10),
        error=[""] * num,
    )


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 2 / 3),
        ([1, 1, 2], [1, 2, 3], 2 / np.sqrt(6)),  # tau-b, by hand: two of three pairs, one of them tied
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_kendalls_tau_of_small_orders(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))


def test_errors_are_the_simulators_by_model_and_over_all(fleet: Fleet) -> None:
    real = outcomes([10.0, 20.0, 30.0, 40.0], [0, 0, 1, 1])
    simulated = outcomes([11.0, 22.0, 30.0, 60.0], [0, 0, 1, 1])
    found = differences(real, simulated, fleet)
    assert found["small"]["latency_ms_per_token"]["mean"]["error"] == pytest.approx(0.1)
    assert found["large"]["latency_ms_per_token"]["p95"]["error"] > 0.4
    assert found[EVERYTHING]["latency_ms_per_token"]["mean"]["simulated"] == pytest.approx(30.75)
    assert found["large"]["ttft_ms"]["mean"]["error"] == pytest.approx(0.0)
    assert "large" not in differences(real, outcomes([1.0], [0]), fleet)


def pair(policy: str, real: float, simulated: float, fleet: Fleet) -> dict[str, Any]:
    served = outcomes([10.0] * 40, [0] * 20 + [1] * 20)
    return {
        "policy": policy,
        "vllm": {"performance": real, "deadline_met": real},
        "simulated": {"performance": simulated, "deadline_met": simulated},
        "differences": differences(served, served, fleet),
    }


def test_policies_that_change_places_cost_the_order(fleet: Fleet) -> None:
    found = fidelity([pair("a", 0.9, 0.91, fleet), pair("b", 0.8, 0.7, fleet), pair("c", 0.75, 0.72, fleet)])
    assert found["kendall_tau"] == pytest.approx(1 / 3)
    assert found["performance_apart"] == pytest.approx([0.01, -0.1, -0.03])
    table = fidelity_table(found)
    assert [row[0] for row in table.rows][:3] == ["a", "  small", "  large"]
    assert all(len(row) == len(table.headers) for row in table.rows)
    assert table.rows[0][2] == "0.910 / 0.900"


@pytest.mark.parametrize(
    ("row", "reached"),
    [
        (Row("mean", -4.9, 5.0, "%"), True),
        (Row("mean", 5.1, 5.0, "%"), False),
        (Row("order", 0.89, 0.9, "tau"), False),
        (Row("order", 1.0, 0.9, "tau"), True),
        (Row("order", None, 0.9, "tau"), False),
        (Row("time", 6.1, 6.0, "min"), False),
    ],
)
def test_a_mark_is_reached_or_not(row: Row, reached: bool) -> None:
    assert row.reached is reached


def test_at_another_pace_a_row_may_reach_its_mark_or_not() -> None:
    assert Row("mean", 7.2, 5.0, "%", pace=Pace(-0.9, 0.08)).shown_at_pace == "-0.9 %, yes"
    assert Row("share", 1.0, 2.0, "points", pace=Pace(-2.1, 0.08)).shown_at_pace == "-2.1 points, **no**"
    assert Row("order", 0.8, 0.9, "tau", pace=Pace(0.95, 0.08)).shown_at_pace == "0.95, yes"
    assert Row("time", 5.0, 6.0, "min").shown_at_pace == ""


def test_what_is_done_is_held_against_the_pace_of_the_cores_while_profiled(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    works_us = iter([200.0, 250.0])

    @contextmanager
    def watched() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(work_us=next(works_us))

    monkeypatch.setattr(stage, "watched_pace", watched)
    watch = stage._Watch(fleet.model_copy(update={"num_gpus": 0}))
    assert watch.replaying(lambda: "unknown") == ("unknown", None)
    assert watch.profiling(lambda: "profile") == "profile"
    assert watch.replaying(lambda: "replay") == ("replay", pytest.approx(1.25**stage.ENGINES_SHARE))


def test_the_pace_of_cores_says_nothing_of_engines_on_a_gpu(fleet: Fleet) -> None:
    watch = stage._Watch(fleet.model_copy(update={"num_gpus": 1}))
    assert watch.profiling(lambda: "profile") == "profile"
    assert watch.replaying(lambda: "replay") == ("replay", None)


def test_bursts_follow_upon_calm_and_are_another_trace_for_another_fleet_only_in_time(fleet: Fleet) -> None:
    usual = stage._calm_and_bursts(fleet, 300)
    slower = stage._calm_and_bursts(fleet.model_copy(update={"rate_scale": fleet.rate_scale / 2}), 300)
    np.testing.assert_allclose(slower.arrived_at, 2 * usual.arrived_at)
    np.testing.assert_array_equal(slower.num_output_tokens, usual.num_output_tokens)
    gaps_s = np.diff(usual.arrived_at) * fleet.rate_scale
    long_ago = np.convolve(gaps_s, np.ones(8) / 8, mode="valid")  # the mean of 8 gaps
    assert long_ago.max() > 2 / 3 / stage.PHASES[0][0]
    assert long_ago.min() < 1.5 / stage.PHASES[1][0]


def test_a_production_trace_begins_after_its_silence_with_prompts_that_fit() -> None:
    num = stage.AZURE_BEGIN + 3
    arrivals = SourceArrivals(np.arange(num) + 5.0, np.full(num, 1600), np.arange(num))
    scaled = stage._scaled(replace(arrivals, num_prompt_tokens=np.array([1600] * (num - 1) + [3])))
    assert scaled.arrived_at[0] == stage.AZURE_BEGIN + 5.0
    assert scaled.num_prompt_tokens.tolist() == [100, 100, 1]
    assert scaled.num_output_tokens.tolist() == [num - 3, num - 2, num - 1]


def test_the_table_goes_between_its_marks_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    fleet_dir = ROOT / "artifacts" / "titan-rtx-opt"
    spec = Spec(fleet_dir, fleet_dir / "rewards.parquet", None, None)
    write_table(page, [Row("a mean", 7.25, 5.0, "%", "a remark", Pace(-0.9, 0.08), 5.01)], spec)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| a mean | +7.2 % | within 5 % | **no** | 5.0 %, **no** | a remark | +8 % | -0.9 %, yes |" in text


def test_compare_wants_policies_that_a_router_can_follow_and_does_both_itself(tmp_path: Path) -> None:
    words = ("replay", tmp_path / "t", ROOT / "artifacts" / "tiny-opt-cpu", "--compare")
    refused(*words, saying="--policy is missing")
    refused(*words, "--policy", "hindsight", saying="knows the trace")
    refused(*words, "--policy", "random", "--simulate", saying="leave out --simulate")
