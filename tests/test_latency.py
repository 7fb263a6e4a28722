from dataclasses import replace

import numpy as np
import pytest

from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample, fit_latency
from besteffort.request import Requests
from besteffort.simulator import simulate_choices

SIZES = ("small", "large")


def sample(kind, model, batch_size=1, num_prompt_tokens=32, busy=(), ms=1.0):
    return Sample(kind, model, batch_size, num_prompt_tokens, busy, ms, 0.1, ms, ms, 10)


def alone(step_small=(2.0, 4.0), step_large=(10.0, 20.0)):
    steps = zip(SIZES, (step_small, step_large), strict=True)
    decode = [
        sample("decode", m, b, ms=ms)
        for m, row in steps
        for b, ms in zip((1, 9), row, strict=True)
    ]  # fmt: skip
    prefill = [sample("prefill", m, 1, n, ms=5 + 0.5 * n) for m in SIZES for n in (10, 20, 40)]
    return decode + prefill


def test_a_fit_gives_back_what_was_measured() -> None:
    latency = fit_latency(alone(), SIZES)
    np.testing.assert_array_equal(latency.batch_sizes, [1, 9])
    np.testing.assert_allclose(latency.step_ms, [[2, 4], [10, 20]])
    np.testing.assert_allclose(latency.prefill_base_ms, 5)
    np.testing.assert_allclose(latency.prefill_ms_per_token, 0.5)
    np.testing.assert_allclose(latency.slowdown, 1)


def test_steps_are_linear_between_measured_batches_and_rise_on_past_the_last() -> None:
    table = fit_latency(alone(), SIZES).step_table_ms(13)
    np.testing.assert_allclose(table[0, [0, 1, 5, 9, 13]], [2, 2, 3, 4, 5])


def test_a_larger_batch_that_seems_faster_is_level_with_the_smaller_unless_it_surely_is_faster() -> None:
    prefill = alone()[4:]

    def fitted(steps: tuple[float, ...], ci_ms: float | None) -> list[float]:
        small = [replace(sample("decode", "small", 2**n, ms=ms), ci_ms=ci_ms) for n, ms in enumerate(steps)]
        large = [replace(one, model="large") for one in small]
        return fit_latency([*small, *large, *prefill], SIZES).step_ms[0].tolist()

    assert fitted((4.0, 3.0), None) == [3.5, 3.5]  # nothing is known of how far off they are
    assert fitted((4.0, 3.0), 0.6) == [3.5, 3.5]
    assert fitted((4.0, 3.0), 0.1) == [4.0, 3.0]
    # A level counts as the sizes that it is made of, and takes up what comes if need be.
    assert fitted((2.0, 5.0, 4.0, 3.9, 9.0), 0.6) == pytest.approx([2.0, 4.3, 4.3, 4.3, 9.0])


def test_a_model_measured_at_fewer_batch_sizes_rises_on_rather_than_staying_flat() -> None:
    latency = fit_latency([*alone(), sample("decode", "small", 17, ms=6.0)], SIZES)
    np.testing.assert_allclose(latency.step_ms[1], [10, 20, 30])


@pytest.mark.parametrize(("found_ms", "overhead_ms", "base_ms"), [(3.0, 3.0, 5.0), (-2.0, 0.0, 3.0)])
def test_what_surrounds_steps_in_service_is_never_below_nothing_and_the_rest_comes_off_prefills(
    found_ms: float, overhead_ms: float, base_ms: float
) -> None:
    service = replace(sample("service", "small", 2), scale=1.0, overhead_ms=found_ms)
    latency = fit_latency([*alone(), service], SIZES)
    np.testing.assert_allclose(latency.overhead_ms, [overhead_ms, 0.0])
    np.testing.assert_allclose(latency.prefill_base_ms, [base_ms, 5.0])


def test_another_pace_makes_everything_take_longer_and_no_model_disturb_another_more(fleet: Fleet) -> None:
    latency = replace(
        fit_latency(alone(), SIZES),
        context_ms_per_token=np.array([0.01, 0.02]),
        overhead_ms=np.array([3.0, 4.0]),
        slowdown=np.array([[1.0, 1.0, 1.5, 1.5], [1.0, 1.2, 1.0, 1.2]]),
        bend_at_tokens=np.array([10, 40]),
        prefill_bend_ms=np.array([[2.0, 6.0], [0.0, 9.0]]),
    )
    requests = Requests(np.array([0.0, 0.001, 0.9]), np.zeros(3, int), np.full(3, 20), np.full(3, 30))
    choices = np.array([0, 1, 1])
    usual = simulate_choices(requests, fleet, latency, choices)
    slow = replace(requests, arrived_at=2.0 * requests.arrived_at)
    slowed = simulate_choices(slow, fleet, latency.slowed(np.array([2.0, 2.0])), choices)
    np.testing.assert_allclose(slowed.latency_ms_per_token, 2.0 * usual.latency_ms_per_token)
    np.testing.assert_allclose(slowed.ttft_ms, 2.0 * usual.ttft_ms)


def test_repeated_measurements_of_one_cell_are_averaged() -> None:
    extra = [sample("decode", "small", 1, ms=3.0)]
    extra += [sample("interference", "small", 1, busy=("large",), ms=ms) for ms in (3.75, 6.25)]
    latency = fit_latency([*alone(), *extra], SIZES)
    assert latency.step_ms[0, 0] == pytest.approx(2.5)
    assert latency.slowdown[0, 0b11] == pytest.approx(2.0)


def test_slowdown_is_the_measured_one_else_the_sum_of_pairs_and_never_below_one() -> None:
    names = (*SIZES, "huge")
    samples = alone()
    samples += [sample("decode", "huge", 1, ms=30.0)]
    samples += [sample("prefill", "huge", 1, n, ms=1.0 * n) for n in (10, 20)]
    samples += [
        sample("interference", "small", 1, busy=("large",), ms=3.0),  # 1.5
        sample("interference", "small", 1, busy=("huge",), ms=4.0),  # 2.0
        sample("interference", "large", 1, busy=("small",), ms=9.0),  # noise: 0.9
        sample("interference", "huge", 1, busy=("small", "large"), ms=90.0),  # 3.0
    ]
    slowdown = fit_latency(samples, names).slowdown
    np.testing.assert_allclose(slowdown[0], [1, 1, 1.5, 1.5, 2, 2, 2.5, 2.5])
    np.testing.assert_allclose(slowdown[1], 1)
    np.testing.assert_allclose(slowdown[2, [0b011, 0b111]], 3)


@pytest.mark.parametrize(
    ("kept", "message"), [("prefill", "decode samples"), ("decode", "two prompt lengths")]
)
def test_a_profile_with_a_gap_is_refused(kept: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_latency([s for s in alone() if s.kind == kept], SIZES)


def test_prefill_never_gets_cheaper_with_length() -> None:
    samples = [s for s in alone() if s.kind == "decode"]
    samples += [sample("prefill", m, 1, n, ms=ms) for m in SIZES for n, ms in ((10, 8.0), (20, 6.0))]
    latency = fit_latency(samples, SIZES)
    np.testing.assert_allclose(latency.prefill_ms(np.array([10, 100])), 7)


def test_a_jump_in_what_prompts_take_is_kept_and_what_may_be_chance_is_not() -> None:
    """Up to some number of tokens vLLM replays a graph on a GPU, and beyond it does not."""
    at_ms = {16: 5.0, 112: 6.0, 144: 20.0, 1000: 24.0}
    jumping = [
        replace(sample("prefill", m, 1, n, ms=ms), ci_ms=0.01) for m in SIZES for n, ms in at_ms.items()
    ]
    latency = fit_latency([*alone()[:4], *jumping], SIZES)
    wanted = np.array([16, 64, 112, 128, 144, 1000])
    np.testing.assert_allclose(latency.prefill_ms(wanted)[0], [5, 5.5, 6, 13, 20, 24], atol=0.02)
    slope = (latency.prefill_ms(np.array([2000])) - latency.prefill_ms(np.array([1000])))[0, 0] / 1000
    assert slope == pytest.approx(latency.prefill_ms_per_token[0])  # the line goes on
    for ci_ms in (30.0, None):
        doubtful = [replace(one, ci_ms=ci_ms) for one in jumping]
        assert not fit_latency([*alone()[:4], *doubtful], SIZES).prefill_bend_ms.any()


def test_the_prediction_of_a_prompt_beyond_a_jump_has_the_jump_in_it() -> None:
    straight = Latency(np.array([1]), np.array([[2.0]]), np.array([4.0]), np.array([0.1]), np.ones((1, 2)))
    bent = replace(straight, bend_at_tokens=np.array([10, 20]), prefill_bend_ms=np.array([[0.0, 30.0]]))
    for prompt, more_ms in ((5, 0.0), (15, 15.0), (50, 30.0)):
        there, here = (one.predicted_ms_per_token(np.zeros(1), prompt, 10)[0] for one in (bent, straight))
        assert there - here == pytest.approx(more_ms / 10)


def test_the_prediction_adds_the_request_itself_and_the_interference_of_busy_models() -> None:
    slowdown = np.ones((2, 4))
    slowdown[:, 0b11] = 2.0
    latency = Latency(
        batch_sizes=np.array([1, 3]),
        step_ms=np.array([[2.0, 4.0], [10.0, 30.0]]),
        prefill_base_ms=np.array([5.0, 7.0]),
        prefill_ms_per_token=np.array([0.1, 0.2]),
        slowdown=slowdown,
    )
    idle = latency.predicted_ms_per_token(np.zeros(2), 10, 5)
    np.testing.assert_allclose(idle, [(6 + 4 * 2) / 5, (9 + 4 * 10) / 5])
    # 1.5 in flight per replica count as 2, with this request 3; the small model slows the large one.
    busy = latency.predicted_ms_per_token(np.array([1.5, 0.0]), 10, 5)
    np.testing.assert_allclose(busy, [(6 + 4 * 4) / 5, 2 * (9 + 4 * 10) / 5])
