"""The paper's fleet, whose profile is modelled, behaves as the paper says of its static baselines."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from besteffort.artifacts.outcomes_file import judge
from besteffort.artifacts.profile_file import load_latency, load_samples
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.errors import UsageError
from besteffort.fleet import load_fleet
from besteffort.observation import Observation
from besteffort.progress import Silent
from besteffort.report.summary import count_windows, window_performance
from besteffort.request import Requests
from besteffort.simulator import simulate, simulate_choices
from besteffort.stages.model_profile import model_profile
from besteffort.workload import stable, unpredictable_1, unpredictable_2
from tests.conftest import ROOT
from tests.test_cli import refused, run

FLEET_DIR = ROOT / "artifacts" / "titan-rtx-opt"
FLEET = load_fleet(FLEET_DIR)
LATENCY = load_latency(FLEET_DIR / "profile.parquet", FLEET)
REWARDS = load_rewards(FLEET_DIR / "rewards.parquet", FLEET)
SMALL, MEDIUM, LARGE = range(3)
SEEDS = (0, 1, 2)
NUM_RUNS = 20  # of 40 s, each from an empty fleet


def performance_of_requests(requests: Requests, model: int) -> NDArray[np.float64]:
    choices = np.full(len(requests), model)
    return judge(simulate_choices(requests, FLEET, LATENCY, choices), FLEET, REWARDS).performance


@cache
def static(model: int, rate_per_s: float, seed: int) -> float:
    """Mean performance over many of the paper's 40 s of a stable rate."""
    rngs = [np.random.default_rng([seed, run]) for run in range(NUM_RUNS)]
    runs = [performance_of_requests(stable(FLEET, rng, rate_per_s), model) for rng in rngs]
    return float(np.mean(np.concatenate(runs)))


@pytest.mark.parametrize("seed", SEEDS)
def test_opt_6_7b_holds_098_up_to_2_per_second_and_falls_sharply_beyond(seed: int) -> None:
    for rate_per_s in (0.25, 0.5, 1, 2):
        assert static(LARGE, rate_per_s, seed) >= 0.99
    assert static(LARGE, 3, seed) < 0.9
    assert static(LARGE, 4, seed) < 0.5
    assert static(LARGE, 5, seed) < 0.3
    assert static(LARGE, 6, seed) < 0.2
    # The first 32 of its 320 requests find a seat, and are in time whatever comes after them.
    assert static(LARGE, 8, seed) < 0.11


@pytest.mark.parametrize("seed", SEEDS)
def test_opt_1_3b_holds_to_a_much_higher_rate_and_breaks_before_48(seed: int) -> None:
    peak = REWARDS.relative[:, MEDIUM].mean()
    for rate_per_s in (1, 8, 24, 32):
        assert static(MEDIUM, rate_per_s, seed) == pytest.approx(peak, abs=0.02)
    assert static(MEDIUM, 48, seed) < 0.4
    assert static(MEDIUM, 48, seed) < static(SMALL, 48, seed) - 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_opt_125m_still_serves_at_48_per_second(seed: int) -> None:
    peak = REWARDS.relative[:, SMALL].mean()
    for rate_per_s in (8, 32, 48):
        assert static(SMALL, rate_per_s, seed) == pytest.approx(peak, abs=0.02)


@pytest.mark.parametrize(("rate_per_s", "at_least"), [(6, 0.955), (12, 0.94), (24, 0.915)])
def test_mixing_models_on_each_gpu_beats_every_static_one(rate_per_s: float, at_least: float) -> None:
    """Figure 2: the policy is above the larger of the baselines, so interference must allow it."""

    def choose(seen: Observation) -> int:
        is_hellaswag = FLEET.task_names[seen.task] == "hellaswag"
        return LARGE if seen.batch_sizes[LARGE] < (8 if is_hellaswag else 4) else MEDIUM

    for seed in SEEDS:
        requests = stable(FLEET, np.random.default_rng(seed), rate_per_s, duration_s=120)
        mixed = judge(simulate(requests, FLEET, LATENCY, choose), FLEET, REWARDS)
        assert mixed.performance.mean() > at_least
        assert mixed.performance.mean() > max(static(model, rate_per_s, seed) for model in range(3))


@pytest.mark.parametrize(
    ("workload", "model", "lowest", "highest"),
    [
        (unpredictable_1, MEDIUM, 120, 250),  # the paper: 154
        (unpredictable_2, MEDIUM, 120, 250),  # 168
        (unpredictable_1, LARGE, 500, 2000),  # 625, in a single trace; docs/titan-rtx-opt.md
    ],
)
def test_windows_of_the_static_baselines_are_of_the_paper_s_order(
    workload: Callable[..., Requests], model: int, lowest: int, highest: int
) -> None:
    counts = [
        count_windows(
            window_performance(performance_of_requests(workload(FLEET, np.random.default_rng(seed)), model))
        )
        for seed in range(10)
    ]
    assert lowest < np.mean([count["0.94"] for count in counts]) < highest


def test_the_shipped_profile_is_what_the_model_gives_today(tmp_path: Path) -> None:
    fresh = tmp_path / "profile.parquet"
    model_profile(FLEET_DIR, output=fresh, hardware_model="roofline", gpu_name="titan-rtx", progress=Silent())
    shipped, facts = load_samples(FLEET_DIR / "profile.parquet")
    modelled, fresh_facts = load_samples(fresh)
    for ours, theirs in zip(modelled, shipped, strict=True):
        assert ours.mean_ms == pytest.approx(theirs.mean_ms)
        times = {"mean_ms": 1.0, "p50_ms": 1.0, "p95_ms": 1.0}
        assert dataclasses.replace(ours, **times) == dataclasses.replace(theirs, **times)
    assert facts["constants"] == fresh_facts["constants"]
    assert facts["source"] == "modelled"
    assert {sample.source for sample in shipped} == {"modelled"}


@pytest.mark.parametrize(
    ("fleet", "hardware_model", "saying"),
    [
        ("titan-rtx-opt", "oracle", "no such model of hardware"),
        ("tiny-opt-cpu", "roofline", "no GPU to model"),
    ],
)
def test_what_cannot_be_modelled_is_refused(
    tmp_path: Path, fleet: str, hardware_model: str, saying: str
) -> None:
    output = tmp_path / "profile.parquet"
    with pytest.raises(UsageError, match=saying):
        model_profile(
            ROOT / "artifacts" / fleet,
            output=output,
            hardware_model=hardware_model,
            gpu_name="titan-rtx",
            progress=Silent(),
        )
    assert not output.exists()


def test_the_command_writes_a_profile_for_a_named_gpu_and_says_that_it_is_modelled(tmp_path: Path) -> None:
    output = tmp_path / "profile.parquet"
    done = run("profile", FLEET_DIR, "--model-only", "roofline", "--gpu", "h100-sxm", "-o", output)
    assert done.returncode == 0, done.stderr
    assert "modelled for h100-sxm; nothing was measured" in done.stderr
    faster = load_latency(output, FLEET)
    assert np.all(faster.step_ms[LARGE] < LATENCY.step_ms[LARGE])


def test_options_that_do_not_fit_together_are_refused() -> None:
    refused("profile", FLEET_DIR, "--gpu", "h100-sxm", saying="--gpu goes only with --model-only")
    refused("profile", FLEET_DIR, "--model-only", "roofline", "--gpu", "abacus", saying="no known GPU")
