"""The paper's three workloads (App. B): requests drawn at random, at a steady rate or at one that jumps.

The paper's rates are for its four GPUs. Every rate is multiplied by the fleet's `rate_scale`; how many
requests come at a rate depends on the paper's rate alone, so that two fleets see the same trace, one of
them stretched in time.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from besteffort.errors import UsageError
from besteffort.fleet import Fleet
from besteffort.request import Requests

STABLE_DURATION_S = 40.0
UNPREDICTABLE_NUM_REQUESTS = 10_000
MAX_NUM_REQUESTS = 10_000_000  # more is a slip of the keyboard, and would fill the memory


class Segment(NamedTuple):
    """A stretch of arrivals at one rate, before the next is drawn."""

    rate_per_s: float  # the paper's, not yet times `rate_scale`
    num_requests: int


Segments = Callable[[np.random.Generator], Iterator[Segment]]

# Probability, lowest and highest rate per second of each band of unpredictable-1.
BANDS = ((0.90, 0.25, 2.0), (0.08, 2.0, 40.0), (0.02, 40.0, 48.0))
# Every rate is expected to last this long in unpredictable-1 ...
MEAN_SEGMENT_S = 20.0
# ... and to serve this many requests in unpredictable-2.
MEAN_SEGMENT_REQUESTS = 500
RATES_2 = (1.0, 48.0)  # per second, in unpredictable-2


def unpredictable_1_segments(rng: np.random.Generator) -> Iterator[Segment]:
    """Without end: mostly calm, with rare bursts; each rate is expected to last 20 s (App. B)."""
    probabilities = [probability for probability, _, _ in BANDS]
    while True:
        _, low, high = BANDS[rng.choice(len(BANDS), p=probabilities)]
        rate_per_s = float(rng.uniform(low, high))
        yield Segment(rate_per_s, int(rng.geometric(1 / (MEAN_SEGMENT_S * rate_per_s))))


def unpredictable_2_segments(
    rng: np.random.Generator, requests_per_rate: float = MEAN_SEGMENT_REQUESTS
) -> Iterator[Segment]:
    """Without end: any rate is as likely as any other, each for 500 requests on average (App. B)."""
    while True:
        rate_per_s = float(rng.uniform(*RATES_2))
        yield Segment(rate_per_s, int(rng.geometric(1 / requests_per_rate)))


SEGMENTS: dict[str, Segments] = {
    "unpredictable-1": unpredictable_1_segments,
    "unpredictable-2": unpredictable_2_segments,
}
WORKLOADS = ("stable", *SEGMENTS)


def segments_of(segments: Iterator[Segment], num_requests: int) -> Iterator[Segment]:
    """The first segments that together have exactly `num_requests`; the last one is cut short."""
    while num_requests > 0:
        segment = next(segments)
        yield segment._replace(num_requests=min(segment.num_requests, num_requests))
        num_requests -= segment.num_requests


def generate_workload(
    name: str,
    fleet: Fleet,
    rng: np.random.Generator,
    *,
    rate_per_s: float | None = None,
    duration_s: float | None = None,
    num_requests: int | None = None,
    requests_per_rate: float | None = None,
) -> Requests:
    """The workload of that name, one of `WORKLOADS`.

    `requests_per_rate` is for unpredictable-2 alone: the mean, instead of 500, so that a short trace
    too sees many rates.

    Raises:
        UsageError: an unknown name, or an option that is out of range or of another workload.
    """
    if requests_per_rate is not None:
        if name != "unpredictable-2":
            raise UsageError("only unpredictable-2 takes a number of requests per rate: leave it out")
        _check_at_least_one("number of requests per rate", requests_per_rate)
    if name == "stable":
        if rate_per_s is None:
            raise UsageError("a stable workload needs a rate: give one, such as --rate 4")
        return stable(fleet, rng, rate_per_s, duration_s=duration_s, num_requests=num_requests)
    if name not in SEGMENTS:
        raise UsageError(f"{name!r} is no workload: choose one of {', '.join(WORKLOADS)}")
    if rate_per_s is not None or duration_s is not None:
        raise UsageError(f"{name} draws its own rates: leave out --rate and --duration, or choose stable")
    segments = SEGMENTS[name]
    if requests_per_rate is not None:
        segments = partial(unpredictable_2_segments, requests_per_rate=requests_per_rate)
    return _unpredictable(fleet, rng, segments, num_requests)


def stable(
    fleet: Fleet,
    rng: np.random.Generator,
    rate_per_s: float,
    *,
    duration_s: float | None = None,
    num_requests: int | None = None,
) -> Requests:
    """Poisson arrivals at `rate_per_s` times the fleet's `rate_scale`, from second 0 (App. B).

    They last `duration_s` (40 s as in the paper), or number exactly `num_requests` if that is given.

    Raises:
        UsageError: a parameter is out of range, or both are given, or no request came in the time.
    """
    _check_positive("rate", rate_per_s)
    rate_per_s *= fleet.rate_scale
    gap_rng, *other_rngs = rng.spawn(3)
    if num_requests is not None:
        if duration_s is not None:
            raise UsageError("give a duration or a number of requests, not both")
        _check_num_requests(num_requests)
        arrived_at = np.cumsum(gap_rng.standard_exponential(num_requests)) / rate_per_s
    else:
        duration_s = STABLE_DURATION_S if duration_s is None else duration_s
        arrived_at = _arrivals_within(gap_rng, rate_per_s, duration_s)
    return _with_tasks_and_lengths(fleet, arrived_at, *other_rngs)


def unpredictable_1(
    fleet: Fleet, rng: np.random.Generator, num_requests: int = UNPREDICTABLE_NUM_REQUESTS
) -> Requests:
    """Arrivals at the rates of `unpredictable_1_segments`, times the fleet's `rate_scale`.

    Raises:
        UsageError: `num_requests` is out of range.
    """
    return _unpredictable(fleet, rng, unpredictable_1_segments, num_requests)


def unpredictable_2(
    fleet: Fleet, rng: np.random.Generator, num_requests: int = UNPREDICTABLE_NUM_REQUESTS
) -> Requests:
    """Arrivals at the rates of `unpredictable_2_segments`, times the fleet's `rate_scale`.

    Raises:
        UsageError: `num_requests` is out of range.
    """
    return _unpredictable(fleet, rng, unpredictable_2_segments, num_requests)


def _unpredictable(
    fleet: Fleet, rng: np.random.Generator, segments: Segments, num_requests: int | None
) -> Requests:
    num_requests = UNPREDICTABLE_NUM_REQUESTS if num_requests is None else num_requests
    _check_num_requests(num_requests)
    # A stream each: other lengths leave the arrivals as they are, and a shorter trace is the
    # beginning of a longer one.
    segment_rng, gap_rng, *other_rngs = rng.spawn(4)
    rates, counts = zip(*segments_of(segments(segment_rng), num_requests), strict=True)
    gaps_s = gap_rng.standard_exponential(num_requests) / np.repeat(rates, counts)
    return _with_tasks_and_lengths(fleet, np.cumsum(gaps_s) / fleet.rate_scale, *other_rngs)


def _arrivals_within(rng: np.random.Generator, rate_per_s: float, duration_s: float) -> NDArray[np.float64]:
    """Poisson arrivals in [0, duration_s), at least one."""
    _check_positive("duration", duration_s)
    expected = rate_per_s * duration_s
    if expected > MAX_NUM_REQUESTS:
        raise UsageError(
            f"about {expected:.3g} requests are more than {MAX_NUM_REQUESTS}: lower the rate or the duration"
        )
    gaps = rng.standard_exponential(int(1.1 * expected) + 100)
    while gaps.sum() <= expected:
        gaps = np.append(gaps, rng.standard_exponential(100))
    elapsed = np.cumsum(gaps)
    arrived_at = elapsed[elapsed < expected] / rate_per_s
    if len(arrived_at) == 0:
        raise UsageError(
            f"no request came in {duration_s:g} s at {rate_per_s:g}/s: raise the rate or the duration, "
            "give a number of requests, or try another seed"
        )
    return arrived_at


def _with_tasks_and_lengths(
    fleet: Fleet,
    arrived_at: NDArray[np.float64],
    task_rng: np.random.Generator,
    length_rng: np.random.Generator,
) -> Requests:
    """Draw tasks by their shares, and lengths evenly from each task's inclusive ranges."""
    task = task_rng.choice(len(fleet.tasks), size=len(arrived_at), p=fleet.task_shares)
    ranges = np.array([(t.num_prompt_tokens, t.num_output_tokens) for t in fleet.tasks])[task]  # (N, 2, 2)
    low, high = ranges[:, :, 0], ranges[:, :, 1]
    # One uniform draw a count, whatever the range: changing one task's leaves the others' alone.
    draws = length_rng.random((len(arrived_at), 2))
    counts = low + np.floor(draws * (high - low + 1)).astype(np.int64)
    return Requests(
        arrived_at=arrived_at,
        task=task,
        num_prompt_tokens=counts[:, 0].copy(),
        num_output_tokens=counts[:, 1].copy(),
    )


def _check_positive(what: str, value: float) -> None:
    if not (0 < value < np.inf):  # also catches NaN
        raise UsageError(f"the {what} is {value}: it must be a finite number above 0")


def _check_at_least_one(what: str, value: float) -> None:
    if not (1 <= value < np.inf):  # also catches NaN
        raise UsageError(f"the {what} is {value}: it must be a finite number, at least 1")


def _check_num_requests(num_requests: int) -> None:
    if not 1 <= num_requests <= MAX_NUM_REQUESTS:
        raise UsageError(f"the number of requests is {num_requests}: it must be from 1 to {MAX_NUM_REQUESTS}")
