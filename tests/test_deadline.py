import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from besteffort.deadline import DeadlineKind, deadline_weight

latencies = st.floats(0.0, 1e6)
deadlines = st.floats(0.1, 1e4)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_an_answer_exactly_at_its_deadline_has_met_it(kind: DeadlineKind) -> None:
    assert deadline_weight(40.0, 40.0, kind) == 1.0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_no_answer_weighs_nothing(kind: DeadlineKind) -> None:
    assert deadline_weight(np.nan, 40.0, kind) == 0.0


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_an_answer_that_never_ended_weighs_nothing(kind: DeadlineKind) -> None:
    assert deadline_weight(np.inf, 40.0, kind) == 0.0


def test_past_a_hard_deadline_nothing_is_left() -> None:
    assert deadline_weight(40.001, 40.0, "hard") == 0.0


def test_past_a_soft_deadline_each_millisecond_costs_a_hundredth() -> None:
    weights = deadline_weight([41.0, 42.5, 43.0], 40.0, "soft")
    np.testing.assert_allclose(weights, [0.99, 0.975, 0.97])


def test_a_violation_just_under_ten_percent_still_counts() -> None:
    assert deadline_weight(40.0 * 1.0999, 40.0, "soft") == pytest.approx(1 - 0.01 * 3.996)


def test_a_violation_of_ten_percent_is_worth_nothing() -> None:
    assert deadline_weight(44.0, 40.0, "soft") == 0.0


def test_a_long_soft_deadline_falls_to_zero_before_its_limit_but_never_below() -> None:
    weights = deadline_weight([2050.0, 2100.0, 2150.0], 2000.0, "soft")
    np.testing.assert_allclose(weights, [0.5, 0.0, 0.0], atol=1e-12)


def test_every_request_is_held_against_its_own_deadline() -> None:
    np.testing.assert_array_equal(deadline_weight([50.0, 50.0], [40.0, 60.0], "hard"), [0.0, 1.0])


@given(latencies, deadlines)
def test_a_soft_deadline_is_never_harsher_than_a_hard_one(latency: float, deadline: float) -> None:
    soft = deadline_weight(latency, deadline, "soft")
    assert deadline_weight(latency, deadline, "hard") <= soft <= 1.0


@given(latencies, latencies, deadlines, st.sampled_from(["hard", "soft"]))
def test_coming_later_is_never_worth_more(a: float, b: float, deadline: float, kind: DeadlineKind) -> None:
    early, late = deadline_weight([min(a, b), max(a, b)], deadline, kind)
    assert early >= late
