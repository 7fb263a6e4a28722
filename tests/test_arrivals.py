"""The arrival rate for a whole trace and as arrivals come: the same, and what the paper calls it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.arrivals import (
    MAX_RATE_PER_S,
    NUM_GAPS,
    ArrivalRateEstimator,
    RecentRates,
    arrival_rates_per_s,
)

# Times with many ties, as in traces with coarse clocks, and gaps from nanoseconds to hours.
GAPS_S = st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e4)), max_size=40)


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, 1e6), GAPS_S)
def test_the_estimates_online_and_offline_are_the_same(start: float, gaps_s: list[float]) -> None:
    arrived_at = np.cumsum([start, *gaps_s])
    estimator = ArrivalRateEstimator()
    online = [estimator.observe(float(instant)) for instant in arrived_at]
    np.testing.assert_array_equal(arrival_rates_per_s(arrived_at), online)


@settings(deadline=None)  # the machine may be busy
@given(st.floats(0, 1e6), GAPS_S)
def test_estimates_are_finite_and_bounded(start: float, gaps_s: list[float]) -> None:
    rates = arrival_rates_per_s(np.cumsum([start, *gaps_s]))
    assert rates[0] == 0
    assert (rates >= 0).all()
    assert (rates <= MAX_RATE_PER_S * (1 + 1e-12)).all()


def test_even_arrivals_give_their_rate_from_the_second_on() -> None:
    rates = arrival_rates_per_s(np.arange(20) / 4.0)
    assert rates[0] == 0
    np.testing.assert_allclose(rates[1:], 4.0)


def test_the_estimate_forgets_what_is_more_than_five_gaps_ago() -> None:
    arrived_at = np.cumsum([0.0, 100.0, *[1.0] * 10])
    rates = arrival_rates_per_s(arrived_at)
    assert rates[1] == pytest.approx(0.01)
    assert rates[NUM_GAPS] == pytest.approx(NUM_GAPS / (100.0 + NUM_GAPS - 1))
    np.testing.assert_allclose(rates[NUM_GAPS + 1 :], 1.0)


def test_a_burst_of_equal_time_stamps_is_as_fast_as_it_gets() -> None:
    np.testing.assert_allclose(arrival_rates_per_s(np.full(10, 3.0))[1:], MAX_RATE_PER_S)


def test_no_arrivals_have_no_rates() -> None:
    assert arrival_rates_per_s(np.array([])).shape == (0,)


def test_the_estimate_of_a_poisson_process_is_near_its_rate() -> None:
    arrived_at = np.cumsum(np.random.default_rng(0).exponential(1 / 12.0, 20_000))
    # Five over a gamma of shape five: the mean of the estimate is 5/4 of the rate.
    assert arrival_rates_per_s(arrived_at).mean() == pytest.approx(12.0 * 5 / 4, rel=0.05)


@settings(deadline=None)  # the machine may be busy
@given(GAPS_S, st.integers(1, 30))
def test_rates_that_remember_arrivals_go_on_as_those_that_observed_them(
    gaps_s: list[float], num_after: int
) -> None:
    arrived_at = 100.0 + np.cumsum([0.0, *gaps_s, *[0.1] * num_after])
    observed, remembering = (RecentRates((0.5, 8.0)) for _ in range(2))
    rates = [observed.observe(at).copy() for at in arrived_at.tolist()]
    remembering.remember(arrived_at[:-num_after])
    remembered = [remembering.observe(at).copy() for at in arrived_at[-num_after:].tolist()]
    np.testing.assert_allclose(remembered, rates[-num_after:], rtol=1e-9)
