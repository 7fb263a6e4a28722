import pytest

from besteffort.router.turnover import Turnover


def test_who_is_turned_away_is_told_when_the_next_seat_is_free_each_a_seat_of_its_own() -> None:
    turnover = Turnover(4)
    for _ in range(100):
        turnover.ended(10.0)
    # A seat each 2.5 s.
    assert [turnover.retry_after_s(100.0) for _ in range(4)] == [3, 5, 8, 10]
    assert turnover.retry_after_s(110.0) == 3  # those have been free since
    assert turnover.retry_after_s(110.5) == 5


def test_it_follows_how_long_requests_take() -> None:
    turnover = Turnover(1)
    for _ in range(200):
        turnover.ended(20.0)
    assert turnover.retry_after_s(0.0) == 20
    for _ in range(200):
        turnover.ended(4.0)
    assert turnover.retry_after_s(100.0) == pytest.approx(4, abs=1)


def test_it_is_never_under_a_second_nor_over_a_minute() -> None:
    turnover = Turnover(2)
    assert turnover.retry_after_s(5.0) == 1  # nothing is known
    turnover.ended(0.001)
    assert turnover.retry_after_s(5.0) == 1
    turnover.ended(10_000.0)
    assert [turnover.retry_after_s(5.0) for _ in range(3)] == [60, 60, 60]
