"""The workloads of the paper's Appendix B, held against what the appendix says of them."""

from itertools import islice

import numpy as np
import pytest

from besteffort.errors import UsageError
from besteffort.fleet import Fleet
from besteffort.request import Requests
from besteffort.workload import (
    BANDS,
    MAX_NUM_REQUESTS,
    WORKLOADS,
    generate_workload,
    segments_of,
    stable,
    unpredictable_1,
    unpredictable_1_segments,
    unpredictable_2,
    unpredictable_2_segments,
)

ALL = pytest.mark.parametrize("name", WORKLOADS)


def make_fleet(rate_scale: float = 1.0, prompt: tuple[int, int] = (16, 64)) -> Fleet:
    return Fleet.model_validate(
        {
            "schema_version": 1,
            "name": "little",
            "models": [{"name": "small", "path": "small"}],
            "tasks": [
                {
                    "name": "often",
                    "deadline_ms_per_token": 40,
                    "lm_eval_task": "copa",
                    "share": 3,
                    "num_prompt_tokens": prompt,
                },
                {
                    "name": "rare",
                    "deadline_ms_per_token": 40,
                    "lm_eval_task": "piqa",
                    "num_prompt_tokens": (5, 5),
                    "num_output_tokens": (1, 3),
                },
                {"name": "never", "deadline_ms_per_token": 40, "lm_eval_task": "piqa", "share": 0},
            ],
            "rate_scale": rate_scale,
        }
    )


FLEET = make_fleet()


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


def generated(name: str, fleet: Fleet = FLEET, seed: int = 1, num_requests: int = 3000) -> Requests:
    rate_per_s = 4.0 if name == "stable" else None
    return generate_workload(name, fleet, rng(seed), rate_per_s=rate_per_s, num_requests=num_requests)


# --- arrivals


@pytest.mark.parametrize("rate", [0.25, 2.0, 48.0])
def test_a_stable_workload_is_poisson_at_its_rate(rate: float) -> None:
    requests = stable(FLEET, rng(), rate, num_requests=20_000)
    gaps = np.diff(requests.arrived_at, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.03)
    assert gaps.std() == pytest.approx(1 / rate, rel=0.05)
    assert gaps.max() > 7 / rate  # the tail is not clipped


def test_a_stable_workload_lasts_forty_seconds_unless_told_otherwise() -> None:
    counts = [len(stable(FLEET, rng(seed), 12.0)) for seed in range(50)]
    assert np.mean(counts) == pytest.approx(480, rel=0.03)
    assert np.std(counts) == pytest.approx(np.sqrt(480), rel=0.4)
    for duration_s in (1.0, 40.0, 400.0):
        last = stable(FLEET, rng(), 12.0, duration_s=duration_s).arrived_at[-1]
        assert 0.7 * duration_s < last < duration_s


def test_a_duration_ends_the_same_arrivals_that_a_number_counts() -> None:
    timed = stable(FLEET, rng(), 12.0)
    counted = stable(FLEET, rng(), 12.0, num_requests=len(timed) + 50)
    np.testing.assert_allclose(counted.arrived_at[: len(timed)], timed.arrived_at)
    assert counted.arrived_at[len(timed)] >= 40.0


def test_segments_of_unpredictable_1_are_mostly_calm_and_last_twenty_seconds() -> None:
    segments = list(islice(unpredictable_1_segments(rng()), 20_000))
    rates = np.array([segment.rate_per_s for segment in segments])
    counts = np.array([segment.num_requests for segment in segments])
    assert counts.min() >= 1
    for probability, low, high in BANDS:
        inside = (rates >= low) & (rates < high)
        assert inside.mean() == pytest.approx(probability, abs=0.01)
        assert rates[inside].mean() == pytest.approx((low + high) / 2, rel=0.05)
        assert (counts[inside] / rates[inside]).mean() == pytest.approx(20, rel=0.15)
    assert sum(probability for probability, _, _ in BANDS) == pytest.approx(1)


def test_segments_of_unpredictable_2_have_any_rate_and_five_hundred_requests() -> None:
    segments = list(islice(unpredictable_2_segments(rng()), 20_000))
    rates = np.array([segment.rate_per_s for segment in segments])
    counts = np.array([segment.num_requests for segment in segments])
    assert 1 <= rates.min() < 1.1
    assert 47.9 < rates.max() <= 48
    np.testing.assert_allclose(np.histogram(rates, bins=4, range=(1, 48))[0] / len(rates), 0.25, atol=0.02)
    assert counts.mean() == pytest.approx(500, rel=0.03)
    assert counts.std() == pytest.approx(500, rel=0.05)  # geometric, not fixed
    assert abs(np.corrcoef(rates, counts)[0, 1]) < 0.03


def test_the_last_segment_is_cut_to_the_number_of_requests() -> None:
    drawn = list(islice(unpredictable_2_segments(rng()), 100))
    cut = list(segments_of(unpredictable_2_segments(rng()), 10_000))
    assert sum(segment.num_requests for segment in cut) == 10_000
    assert cut[:-1] == drawn[: len(cut) - 1]
    assert cut[-1].rate_per_s == drawn[len(cut) - 1].rate_per_s


def test_unpredictable_workloads_have_ten_thousand_requests_and_the_papers_pace() -> None:
    durations_1 = [unpredictable_1(FLEET, rng(seed)).arrived_at[-1] for seed in range(20)]
    durations_2 = [unpredictable_2(FLEET, rng(seed)).arrived_at[-1] for seed in range(20)]
    # Each rate lasts 20 s: the mean rate is that of the bands. Each has as many requests: the
    # mean time between them is that of 1/rate over [1, 48], ln(48)/47 s.
    assert 10_000 / np.mean(durations_1) == pytest.approx(0.9 * 1.125 + 0.08 * 21 + 0.02 * 44, rel=0.15)
    assert np.mean(durations_2) / 10_000 == pytest.approx(np.log(48) / 47, rel=0.25)
    assert len(unpredictable_1(FLEET, rng())) == len(unpredictable_2(FLEET, rng())) == 10_000


@ALL
def test_a_slower_fleet_sees_the_same_trace_stretched(name: str) -> None:
    full, quarter = generated(name), generated(name, make_fleet(rate_scale=0.25))
    np.testing.assert_allclose(quarter.arrived_at, 4 * full.arrived_at)
    np.testing.assert_array_equal(quarter.task, full.task)
    np.testing.assert_array_equal(quarter.num_prompt_tokens, full.num_prompt_tokens)


# --- tasks, lengths and seeds


@ALL
def test_arrivals_do_not_fall_and_types_are_those_of_a_trace(name: str) -> None:
    requests = generated(name)
    assert requests.arrived_at[0] > 0
    assert (np.diff(requests.arrived_at) >= 0).all()
    assert requests.arrived_at.dtype == np.float64
    for counts in (requests.task, requests.num_prompt_tokens, requests.num_output_tokens):
        assert counts.dtype == np.int64
        assert counts.shape == requests.arrived_at.shape


def test_tasks_come_by_their_shares() -> None:
    requests = generated("unpredictable-2", num_requests=20_000)
    np.testing.assert_allclose(np.bincount(requests.task, minlength=3) / 20_000, [0.75, 0.25, 0], atol=0.01)


def test_lengths_are_even_over_the_inclusive_ranges_of_their_task() -> None:
    requests = generated("stable", make_fleet(prompt=(10, 13)), num_requests=20_000)
    often = requests.task == 0
    values, counts = np.unique(requests.num_prompt_tokens[often], return_counts=True)
    assert values.tolist() == [10, 11, 12, 13]
    np.testing.assert_allclose(counts / often.sum(), 0.25, atol=0.02)
    assert set(requests.num_prompt_tokens[~often]) == {5}
    assert set(requests.num_output_tokens[~often]) == {1, 2, 3}
    assert (requests.num_output_tokens[often].min(), requests.num_output_tokens[often].max()) == (8, 32)


@ALL
def test_other_lengths_leave_the_arrivals_and_the_other_task_alone(name: str) -> None:
    before, after = generated(name), generated(name, make_fleet(prompt=(1, 1000)))
    np.testing.assert_array_equal(before.arrived_at, after.arrived_at)
    np.testing.assert_array_equal(before.task, after.task)
    rare = before.task == 1
    np.testing.assert_array_equal(before.num_output_tokens[rare], after.num_output_tokens[rare])


@ALL
def test_a_short_workload_is_the_beginning_of_a_long_one(name: str) -> None:
    short, long = generated(name, num_requests=700), generated(name)
    for field in ("arrived_at", "task", "num_prompt_tokens", "num_output_tokens"):
        np.testing.assert_array_equal(getattr(short, field), getattr(long, field)[:700])


@ALL
def test_a_seed_decides_everything(name: str) -> None:
    one, same, other = generated(name, seed=1), generated(name, seed=1), generated(name, seed=2)
    np.testing.assert_array_equal(one.arrived_at, same.arrived_at)
    np.testing.assert_array_equal(one.num_output_tokens, same.num_output_tokens)
    assert (one.arrived_at != other.arrived_at).any()


# --- what is refused


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused_with_its_value(rate: float) -> None:
    with pytest.raises(UsageError, match=rf"the rate is {rate}: it must be a finite number above 0"):
        stable(FLEET, rng(), rate)


@pytest.mark.parametrize("duration_s", [0.0, -1.0, float("nan"), float("inf")])
def test_a_duration_that_is_none_is_refused_with_its_value(duration_s: float) -> None:
    with pytest.raises(UsageError, match=f"the duration is {duration_s}"):
        stable(FLEET, rng(), 1.0, duration_s=duration_s)


@pytest.mark.parametrize("num_requests", [0, -5, MAX_NUM_REQUESTS + 1])
@ALL
def test_a_number_of_requests_out_of_range_is_refused(name: str, num_requests: int) -> None:
    with pytest.raises(UsageError, match=f"the number of requests is {num_requests}: it must be from 1"):
        generated(name, num_requests=num_requests)


def test_more_requests_than_fit_the_memory_are_refused() -> None:
    with pytest.raises(UsageError, match="lower the rate or the duration"):
        stable(FLEET, rng(), 1e9)


def test_a_duration_in_which_nothing_comes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no request came in 1 s at 1e-09/s"):
        stable(FLEET, rng(), 1e-9, duration_s=1.0)


def test_options_of_another_workload_are_refused() -> None:
    with pytest.raises(UsageError, match="needs a rate"):
        generate_workload("stable", FLEET, rng())
    with pytest.raises(UsageError, match="not both"):
        generate_workload("stable", FLEET, rng(), rate_per_s=1.0, duration_s=1.0, num_requests=1)
    with pytest.raises(UsageError, match="draws its own rates"):
        generate_workload("unpredictable-1", FLEET, rng(), rate_per_s=1.0)
    with pytest.raises(UsageError, match="choose one of stable, unpredictable-1, unpredictable-2"):
        generate_workload("calm", FLEET, rng())
