"""The bound on windows, against what plans reach in the simulator: never above it, and not far below."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from besteffort.environment import Service
from besteffort.errors import UsageError
from besteffort.hindsight import hindsight
from besteffort.latency import Latency
from besteffort.request import Requests
from besteffort.simulator import simulate_choices
from besteffort.window_bound import window_bound, work_rows
from besteffort.workload import unpredictable_2
from tests.test_environment import make_service
from tests.test_hindsight import crowd

LARGE = 1


def random_service(rng: np.random.Generator) -> Service:
    """Two models and two deadlines; batches, prompts and other models all make steps longer, or not."""
    service = make_service()
    replicas = int(rng.integers(1, 4))
    models = tuple(
        model.model_copy(update={"replicas": replicas, "max_num_seqs": int(rng.integers(1, 12))})
        for model in service.fleet.models
    )
    tasks = tuple(
        task.model_copy(update={"deadline_ms_per_token": float(rng.uniform(22, 60))})
        for task in service.fleet.tasks
    )
    fleet = service.fleet.model_copy(
        update={"models": models, "tasks": tasks, "num_gpus": int(rng.integers(1, 3))}
    )
    steps_ms = np.array([[2.0, 3.0, 5.0], [20.0, *np.sort(rng.uniform(20, 60, 2))]])
    slowdown = 1.0 + np.array([[0, 0, 0, 0.1], [0, 0, 0, 0.1]]) * rng.integers(0, 2)
    base_ms, per_token_ms = np.array([2.0, rng.uniform(5, 25)]), np.array([0.1, rng.uniform(0, 2)])
    latency = Latency(np.array([1, 4, 8]), steps_ms, base_ms, per_token_ms, slowdown)
    return Service(fleet, latency, service.rewards)


def random_crowd(rng: np.random.Generator, num_requests: int) -> Requests:
    """More than the good model can serve, or hardly more; it is worth more to all of them."""
    requests = crowd(rng, num_requests)
    arrived_at = np.cumsum(rng.exponential(np.exp(rng.uniform(-5, -1.5)), num_requests))
    return replace(requests, arrived_at=arrived_at, task=np.zeros_like(requests.task))


def in_time(service: Service, requests: Requests, plan: NDArray[np.int64]) -> NDArray[np.bool_]:
    deadlines = np.array([task.deadline_ms_per_token for task in service.fleet.tasks])[requests.task]
    outcomes = simulate_choices(requests, service.fleet, service.latency, plan)
    return outcomes.latency_ms_per_token <= deadlines


def worth(service: Service, requests: Requests, plan: NDArray[np.int64]) -> NDArray[np.float64]:
    return in_time(service, requests, plan) * service.rewards.relative[requests.task, plan]


def num_reached(worth: NDArray[np.float64], threshold: float, size: int) -> int:
    """Windows of `size` requests that come to the threshold."""
    windows = np.lib.stride_tricks.sliding_window_view(worth, size).mean(axis=1)
    return int(np.sum(windows >= threshold - 1e-9))


def bound(service: Service, requests: Requests, threshold: float, size: int) -> int:
    return window_bound(
        requests, service.fleet, service.latency, service.rewards, threshold=threshold, window_size=size
    )


def test_no_interval_serves_more_than_the_rows_allow_and_some_nearly_as_much() -> None:
    rng = np.random.default_rng(0)
    highest = []
    for _ in range(200):
        service = random_service(rng)
        requests = random_crowd(rng, 60)
        plan = np.where(rng.random(60) < rng.uniform(0.1, 1.0), LARGE, 0)
        served = in_time(service, requests, plan) & (plan == LARGE)
        work = work_rows(requests, service.fleet, service.latency) @ served.astype(np.float64)
        highest.append(work.max(initial=0.0))
    assert max(highest) <= 1 + 1e-9
    assert max(highest) > 0.85


def test_no_plan_reaches_more_windows_than_the_bound_neither_random_nor_climbing() -> None:
    rng = np.random.default_rng(1)
    num_told = 0
    for _ in range(30):
        service, size = random_service(rng), int(rng.integers(2, 8))
        requests, threshold = random_crowd(rng, 60), float(rng.choice([0.8, 0.9, 1.0]))
        at_most = bound(service, requests, threshold, size)
        plan = np.where(rng.random(60) < rng.uniform(0, 1), LARGE, 0)
        best, most = 0.0, 0
        for _ in range(100):
            changed = np.where(rng.random(60) < 0.03, rng.integers(0, 2, 60), plan)
            reached = worth(service, requests, changed)
            most = max(most, num_reached(reached, threshold, size))
            merit = num_reached(reached, threshold, size) + reached.sum()
            plan, best = (changed, merit) if merit >= best else (plan, best)
        assert most <= at_most
        num_told += 0 < at_most < 61 - size  # elsewhere it says nothing
    assert num_told > 10


def test_one_seat_serves_every_second_request_and_the_bound_says_so() -> None:
    service = make_service()
    good = service.fleet.models[LARGE].model_copy(update={"max_num_seqs": 1})
    fleet = service.fleet.model_copy(update={"models": (service.fleet.models[0], good)})
    service = replace(service, fleet=fleet)
    plain = np.zeros(100, dtype=np.int64)
    # Each takes 20 steps of 20 ms, and comes 200 ms after the one before.
    requests = Requests(0.2 * np.arange(100), plain, np.ones_like(plain), np.full(100, 20))
    plan = np.arange(100) % 2
    assert num_reached(worth(service, requests, plan), 1.0, 1) == 50
    assert 50 <= bound(service, requests, 1.0, 1) <= 52


def test_the_plan_found_in_hindsight_is_under_the_bound() -> None:
    service = make_service()
    requests = unpredictable_2(service.fleet, np.random.default_rng(3), 400)
    starts = [np.full(400, model) for model in (0, 1)]
    plan = hindsight(
        requests,
        service.fleet,
        service.latency,
        service.rewards,
        starts,
        np.random.default_rng(0),
        max_sweeps=1,
    ).models
    reached = [num_reached(worth(service, requests, plan), threshold, 20) for threshold in (1.0, 0.94)]
    bounds = [bound(service, requests, t, 20) for t in (1.0, 0.94)]
    assert 0 < reached[0] <= bounds[0] < 381
    assert reached[1] <= bounds[1]
    assert bounds[0] <= bounds[1]


def test_a_calm_trace_can_have_all_windows_and_one_that_comes_at_once_nearly_none() -> None:
    service = make_service()
    plain = np.zeros(100, dtype=np.int64)
    calm = Requests(np.arange(100.0), plain, np.ones_like(plain), np.full(100, 20))
    assert bound(service, calm, 1.0, 20) == 81
    # In a batch of 8 a step takes 60 ms, twice the deadline: of 100 at once only a few can be in time.
    assert bound(service, replace(calm, arrived_at=np.zeros(100)), 1.0, 20) < 10
    assert bound(service, replace(calm, arrived_at=np.zeros(100)), 0.5, 20) == 81


def test_fewer_requests_than_a_window_have_none() -> None:
    service = make_service()
    assert bound(service, crowd(np.random.default_rng(0), 19), 0.5, 20) == 0


def test_soft_deadlines_are_refused() -> None:
    service = make_service("soft")
    with pytest.raises(UsageError, match="soft deadlines; windows are bounded for hard ones only"):
        bound(service, crowd(np.random.default_rng(0), 30), 0.96, 20)
