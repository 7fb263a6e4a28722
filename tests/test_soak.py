"""`make soak` in its short form, and that it would notice."""

import copy
from collections.abc import Callable

import pytest
import uvloop

from tests.benchmarks.client import Answer
from tests.benchmarks.fleet import served
from tests.benchmarks.soak import SHARES, SPEED, Soak, is_right, show, soak

# 20 MiB in 5,000 requests: what is held of each would have to be 4 KiB.
MAX_GROWTH_MIB = 400.0


@pytest.fixture(scope="module")
def result() -> Soak:
    with served(speed=SPEED) as router:
        return uvloop.run(soak(router, 5000))


def test_of_thousands_of_requests_none_is_lost_and_all_are_counted_as_what_they_were(result: Soak) -> None:
    assert result.faults(MAX_GROWTH_MIB) == []
    assert result.sent.total() == 5000
    assert min(result.sent[kind] for kind in SHARES) > 20
    assert f"{5000:,}" in show(result)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one.lost.update(["plain"]),
        lambda one: one.counted.update(ok=one.counted["ok"] - 1),
        lambda one: setattr(one, "num_retries", one.num_retries + 1),
        lambda one: setattr(one, "num_in_flight", 1),
        lambda one: one.engines.update(num_requests=one.engines["num_requests"] + 1),
        lambda one: one.engines.update(num_running=1),
        lambda one: setattr(one, "memory", [(at, mib + 0.005 * at) for at, mib in one.memory]),
        lambda one: setattr(one, "log", "Traceback (most recent call last):"),
    ],
)
def test_each_thing_that_goes_wrong_is_one_fault(result: Soak, spoil: Callable[[Soak], None]) -> None:
    spoiled = copy.deepcopy(result)
    spoil(spoiled)
    assert len(spoiled.faults(MAX_GROWTH_MIB)) == 1


def test_an_answer_is_right_only_if_it_is_whole_and_the_requests_own() -> None:
    stream = Answer(200, {}, b"@7@ @7@ data: [DONE]\n\n", whole=True)
    assert is_right("stream", 7, 2, stream)
    assert not is_right("stream", 8, 2, stream)
    assert not is_right("stream", 7, 3, stream)
    assert not is_right("stream", 7, 2, Answer(200, {}, stream.body, whole=False))
    assert not is_right("stream", 7, 2, Answer(502, {}, stream.body, whole=True))
    assert not is_right("plain", 7, 2, stream)
    assert not is_right("half-stream", 7, 4, stream)
