"""The search that knows the whole trace, against all there is to try on small traces."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from besteffort.environment import Service
from besteffort.hindsight import Hindsight, hindsight
from besteffort.request import Requests
from besteffort.simulator import PlanSearch, simulate_choices
from besteffort.workload import unpredictable_2
from tests.test_environment import make_service

NUM_CASES = 20


def performance(service: Service, requests: Requests, models: NDArray[np.int64]) -> float:
    outcomes = simulate_choices(requests, service.fleet, service.latency, models)
    return float(service.worth(requests.task, models, outcomes.latency_ms_per_token).mean())


def crowd(rng: np.random.Generator, num_requests: int) -> Requests:
    """So many at once that not all can have the good model in time."""
    return Requests(
        arrived_at=np.cumsum(rng.exponential(0.03, num_requests)),
        task=rng.integers(0, 2, num_requests),
        num_prompt_tokens=rng.integers(1, 60, num_requests),
        num_output_tokens=rng.integers(2, 20, num_requests),
    )


def search(service: Service, requests: Requests, seed: int = 0, **options: float) -> Hindsight:
    starts = [np.full(len(requests), model) for model in (0, 1)]
    rng = np.random.default_rng(seed)
    return hindsight(requests, service.fleet, service.latency, service.rewards, starts, rng, **options)


def best_of_all(service: Service, requests: Requests) -> float:
    plans = itertools.product(range(2), repeat=len(requests))
    return max(performance(service, requests, np.array(plan)) for plan in plans)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_on_small_traces_it_finds_the_best_of_all_plans_nearly_always(kind: str) -> None:
    service = make_service(kind)
    gaps = []
    for case in range(NUM_CASES):
        requests = crowd(np.random.default_rng(case), 8)
        found = search(service, requests, max_sweeps=20)
        assert found.performance == pytest.approx(performance(service, requests, found.models))
        gaps.append(best_of_all(service, requests) - found.performance)
    assert min(gaps) > -1e-9
    assert np.mean(np.array(gaps) < 1e-9) >= 0.9
    assert max(gaps) < 0.08  # of the performance: at most about one request of eight less well


def test_it_is_never_worse_than_its_best_start_and_better_where_there_is_room() -> None:
    service = make_service()
    requests = unpredictable_2(service.fleet, np.random.default_rng(3), 400)
    statics = [performance(service, requests, np.full(400, model)) for model in (0, 1)]
    found = search(service, requests, max_sweeps=2)
    assert found.curve[0][1] == pytest.approx(max(statics))
    assert found.performance > max(statics) + 0.01
    assert found.performance == max(value for _, value in found.curve)


def test_the_same_seed_finds_the_same_plan() -> None:
    service = make_service()
    requests = crowd(np.random.default_rng(5), 60)
    first, second = (search(service, requests, max_sweeps=2) for _ in range(2))
    np.testing.assert_array_equal(first.models, second.models)


def test_without_a_budget_it_hands_back_the_best_start() -> None:
    service = make_service()
    requests = crowd(np.random.default_rng(5), 30)
    found = search(service, requests, budget_s=0.0)
    assert found.num_sweeps == 0
    assert found.performance >= found.curve[0][1]


def test_a_trace_that_can_be_served_perfectly_needs_no_search() -> None:
    service = make_service()
    calm = crowd(np.random.default_rng(5), 10)
    calm = Requests(
        np.arange(10) * 100.0, calm.task, np.ones(10, dtype=np.int64), np.full(10, 20, dtype=np.int64)
    )
    found = search(service, calm)
    assert found.performance == pytest.approx(1.0)
    assert found.num_sweeps == 0


def test_a_trial_leaves_no_trace_in_the_state() -> None:
    """What the search believes of its plan's end is what a fresh simulation of it says."""
    service = make_service()
    requests = crowd(np.random.default_rng(8), 80)
    plans = PlanSearch(
        requests,
        service.fleet,
        service.latency,
        service.rewards.relative,
        requests.task,
        np.array([[3.0], [1.0]]),
    )
    plans.begin(np.ones(80, dtype=np.int64), horizon_s=1e6)
    before = performance(service, requests, plans.plan)
    for _ in range(3):  # with so far a horizon every change is judged by all that follows
        plans.begin(plans.plan, horizon_s=1e6)
        num_changes = plans.improve(np.random.default_rng(0).random((80, 7, 4)))
        after = performance(service, requests, plans.plan)
        assert after >= before - 1e-4  # less what quickness may weigh
        assert (num_changes == 0) <= (after == before)
        before = after
