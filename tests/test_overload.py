"""`make overload` in its short form: what becomes of requests, and nothing of how long it takes."""

import copy
from collections.abc import Callable

import pytest
import uvloop

from tests.benchmarks import overload as benchmark
from tests.benchmarks.client import Answer
from tests.benchmarks.fleet import served
from tests.benchmarks.overload import (
    MAX_GROWTH_MIB,
    MAX_IN_FLIGHT,
    NUM_TOKENS,
    OPTIONS,
    SPEED,
    Overload,
    Phase,
    kind_of,
    overload,
    show,
)

ANSWERED = Answer(200, {}, b"@1@" * NUM_TOKENS, whole=True)
TURNED_AWAY = Answer(429, {b"retry-after": b"1"}, whole=True, took_s=0.003)


def test_beyond_capacity_each_request_is_answered_or_told_to_come_again() -> None:
    with served(speed=SPEED, options=OPTIONS) as router:
        result = uvloop.run(overload(router, 1.0, 3.0))
    assert result.faults() == []
    assert len(result.beyond.answered_at) >= MAX_IN_FLIGHT
    assert len(result.calm.answered_at) >= MAX_IN_FLIGHT
    assert "of the capacity" in show(result)


def made_up() -> Overload:
    """As it should go."""

    def phase(num_answered: int, num_turned_away: int = 0) -> Phase:
        made = Phase(1.0, num_sent=num_answered + num_turned_away)
        for answer in [ANSWERED] * num_answered + [TURNED_AWAY] * num_turned_away:
            made.note(answer)
        return made

    memory_mib = [150.0, 160.0, 170.0, 165.0]
    return Overload(phase(400), phase(400, 1600), phase(190, 10), phase(200), memory_mib, 160.0, 0.0)


def test_a_router_that_bears_an_overload_has_no_fault_however_long_it_takes() -> None:
    result = made_up()
    assert result.faults() == []
    assert "p99 within 10 ms: yes" in show(result)
    assert "growth over its capacity: 10.0 MiB" in show(result)
    result.beyond.turned_away_s = [0.5] * 1600
    assert result.faults() == []
    assert "p99 within 10 ms: no" in show(result)


def _turned_away(phase: Phase) -> None:
    phase.num_sent += 1
    phase.note(TURNED_AWAY)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda one: one.beyond.wrong.append(one.beyond.answered_at.pop()), "1 wrong answers"),
        (lambda one: one.after.answered_at.pop(), "a request had no answer"),
        (lambda one: setattr(one, "num_in_flight", 1.0), "1 in flight at the end"),
        (lambda one: _turned_away(one.capacity), "some were turned away before"),
        (lambda one: setattr(one, "beyond", one.capacity), "none was turned away"),
        (lambda one: _turned_away(one.calm), "1 turned away when all was over"),
        (lambda one: setattr(one, "calm", Phase(1.0)), "nobody asked when all was over"),
        (lambda one: one.memory_mib.insert(2, 160.1 + MAX_GROWTH_MIB), "memory grew by 16.1 MiB"),
    ],
)
def test_each_thing_that_goes_wrong_is_one_fault(spoil: Callable[[Overload], None], told: str) -> None:
    spoiled = copy.deepcopy(made_up())
    spoil(spoiled)
    (fault,) = spoiled.faults()
    assert told in fault


def test_a_fault_ends_the_benchmark_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = made_up()
    _turned_away(forgetful.calm)
    monkeypatch.setattr(benchmark, "played", lambda options: forgetful)
    monkeypatch.setattr("sys.argv", ["overload"])
    with pytest.raises(SystemExit, match="1 turned away when all was over"):  # a text: its status is 1
        benchmark.main()


def test_an_answer_without_retry_after_or_with_a_token_missing_is_wrong() -> None:
    tokens = b"@1@" * NUM_TOKENS
    assert kind_of(Answer(200, {}, tokens, whole=True)) == "answered"
    assert kind_of(Answer(200, {}, tokens[3:], whole=True)) == "wrong"
    assert kind_of(Answer(200, {}, tokens, whole=False)) == "wrong"
    assert kind_of(Answer(429, {b"retry-after": b"1"}, whole=True)) == "turned away"
    assert kind_of(Answer(429, {}, whole=True)) == "wrong"
    assert kind_of(Answer(503, {b"retry-after": b"1"}, whole=True)) == "wrong"
