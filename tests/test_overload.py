"""`make overload` in its short form: what becomes of requests, and nothing of how long it takes."""

import uvloop

from tests.benchmarks.client import Answer
from tests.benchmarks.fleet import served
from tests.benchmarks.overload import MAX_IN_FLIGHT, NUM_TOKENS, OPTIONS, SPEED, kind_of, overload, show


def test_beyond_capacity_each_request_is_answered_or_told_to_come_again() -> None:
    with served(speed=SPEED, options=OPTIONS) as router:
        result = uvloop.run(overload(router, 1.0, 3.0))
    assert result.faults() == []
    assert len(result.beyond.answered_at) >= MAX_IN_FLIGHT
    assert "of the capacity" in show(result)


def test_an_answer_without_retry_after_or_with_a_token_missing_is_wrong() -> None:
    tokens = b"@1@" * NUM_TOKENS
    assert kind_of(Answer(200, {}, tokens, whole=True)) == "answered"
    assert kind_of(Answer(200, {}, tokens[3:], whole=True)) == "wrong"
    assert kind_of(Answer(200, {}, tokens, whole=False)) == "wrong"
    assert kind_of(Answer(429, {b"retry-after": b"1"}, whole=True)) == "turned away"
    assert kind_of(Answer(429, {}, whole=True)) == "wrong"
    assert kind_of(Answer(503, {b"retry-after": b"1"}, whole=True)) == "wrong"
