from dataclasses import replace

import numpy as np
import pytest

from besteffort.environment import (
    RoutingEnvironment,
    Service,
    Transitions,
    encoding_for,
    evaluate,
    switching_requests,
)
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.simulator import simulate_choices


def make_service(kind: str = "hard", rate_scale: float = 1.0) -> Service:
    """Two models: a fast one of less worth, and a good one that takes 20 ms per token alone."""
    tasks = [
        {"name": "plain", "deadline_ms_per_token": 30, "lm_eval_task": "piqa"},
        {"name": "paid", "deadline_ms_per_token": 30, "lm_eval_task": "copa", "weight": 3.0, "share": 3.0},
    ]
    models = [{"name": "fast", "path": "x"}, {"name": "good", "path": "x"}]
    fleet = Fleet.model_validate(
        {
            "schema_version": 1,
            "name": "test",
            "models": models,
            "tasks": tasks,
            "deadline_kind": kind,
            "rate_scale": rate_scale,
        }
    )
    steps_ms = np.array([[2.0, 4.0], [20.0, 60.0]])
    latency = Latency(
        np.array([1, 8]), steps_ms, np.array([2.0, 10.0]), np.array([0.1, 0.1]), np.ones((2, 4))
    )
    values = np.array([[0.4, 0.8], [0.9, 0.9]])
    rewards = Rewards(
        values, np.full((2, 2), np.nan), np.zeros((2, 2), dtype=np.int64), ("acc",) * 2, "given"
    )
    return Service(fleet, latency, rewards)


def make_environment(service: Service, num_requests: int = 30, num_fleets: int = 4) -> RoutingEnvironment:
    return RoutingEnvironment(
        service,
        encoding_for(service.fleet),
        np.random.default_rng(7),
        num_fleets=num_fleets,
        num_requests=num_requests,
        mean_requests_per_rate=5.0,
    )


def play(environment: RoutingEnvironment, num_steps: int) -> tuple[list[np.ndarray], list, list[Transitions]]:
    rng = np.random.default_rng(8)
    seen, taken, handed_over = [environment.reset()], [], []
    for _ in range(num_steps):
        taken.append(rng.integers(0, 2, len(seen[-1])))
        observations, transitions = environment.step(taken[-1])
        seen.append(observations)
        handed_over.append(transitions)
    return seen, taken, handed_over


def test_every_decision_is_handed_over_once_with_the_observation_that_followed_it() -> None:
    seen, taken, handed_over = play(make_environment(make_service()), 30)
    expected = {
        (seen[i][f].tobytes(), int(taken[i][f]), seen[i + 1][f].tobytes())
        for i in range(29)
        for f in range(4)
    }
    got = [
        (t.observations[i].tobytes(), int(t.actions[i]), t.next_observations[i].tobytes())
        for t in handed_over
        for i in range(len(t))
    ]
    assert len(got) == 30 * 4  # the workloads have truncated, and the fleets run dry
    assert expected <= set(got)


def test_the_last_decision_of_a_workload_is_closed_by_an_arrival_of_the_same_workload() -> None:
    service = make_service()
    seen, _, handed_over = play(make_environment(service, num_requests=3, num_fleets=1), 3)
    followed = np.concatenate([t.next_observations for t in handed_over])
    # The step after the last decision returns a new workload's first arrival: nothing in flight, no rate.
    assert np.all(seen[3][:, 2:] == 0)
    assert len(followed) == 3
    assert np.all(followed[:, -1] > 0)


def test_a_reward_is_the_deadline_weight_times_relative_accuracy_times_the_weight_of_the_task() -> None:
    service = make_service()
    _, _, handed_over = play(make_environment(service), 30)
    actions = np.concatenate([t.actions for t in handed_over])
    rewards = np.concatenate([t.rewards for t in handed_over])
    task = np.concatenate([t.observations for t in handed_over])[:, :2].argmax(axis=1)
    mean_weight = 0.25 * 1.0 + 0.75 * 3.0
    full = np.array([[0.5, 1.0], [3.0, 3.0]])[task, actions] / mean_weight
    assert np.all(np.isclose(rewards, full) | (rewards == 0))
    assert np.all(rewards[actions == 0] > 0)  # the fast model is never late here
    assert {0.0, 0.4, 1.2} <= set(rewards[actions == 1].astype(float).round(6).tolist())


def test_soft_deadlines_are_rewarded_by_the_soft_weight() -> None:
    service = make_service("soft")
    late = service.worth(np.array([0, 0, 1]), np.array([1, 1, 0]), np.array([31.0, 34.0, 30.0]))
    np.testing.assert_allclose(late, [0.99, 0.0, 1.0])


def test_only_the_proportions_of_weights_matter_and_performance_leaves_them_out() -> None:
    service = make_service()
    routed = (np.array([0, 1]), np.array([0, 0]), np.array([10.0, 10.0]))
    np.testing.assert_allclose(service.worth(*routed), [0.5, 1.0])
    np.testing.assert_allclose(service.weighted_worth(*routed), [0.2, 1.2])
    tenfold = [task.model_copy(update={"weight": 10 * task.weight}) for task in service.fleet.tasks]
    heavier = replace(service, fleet=service.fleet.model_copy(update={"tasks": tuple(tenfold)}))
    np.testing.assert_allclose(heavier.values, service.values)


def test_the_same_generator_gives_the_same_transitions() -> None:
    runs = [play(make_environment(make_service()), 40)[2] for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.rewards, b.rewards)


def test_switching_rates_stay_in_the_papers_range_scaled_to_the_fleet() -> None:
    fleet = make_service(rate_scale=0.25).fleet
    requests = switching_requests(fleet, 40_000, 200.0, np.random.default_rng(0))
    assert np.all(np.diff(requests.arrived_at) >= 0)
    rates = 200 / (requests.arrived_at[200::200] - requests.arrived_at[:-200:200])
    assert np.quantile(rates, 0.98) < 48 * 0.25 * 1.2
    assert rates.max() > 8
    assert rates.min() < 3
    assert np.mean(requests.task == 1) == pytest.approx(0.75, abs=0.02)


def test_an_evaluation_is_the_mean_weighted_worth_of_simulated_requests() -> None:
    service = make_service(rate_scale=0.1)
    workloads = [
        switching_requests(service.fleet, 200, 20.0, rng) for rng in np.random.default_rng(1).spawn(3)
    ]
    reached = evaluate(
        service, encoding_for(service.fleet), workloads, lambda inputs: np.ones(len(inputs), dtype=np.int64)
    )
    expected = [performance_of_good_model(service, workload) for workload in workloads]
    np.testing.assert_allclose(reached, expected)
    assert 0 < min(expected) < max(expected) < 1.2


def performance_of_good_model(service: Service, workload: Requests) -> float:
    outcomes = simulate_choices(
        workload, service.fleet, service.latency, np.ones(len(workload), dtype=np.int64)
    )
    weight = np.array([1.0, 3.0])[workload.task] / (0.25 * 1.0 + 0.75 * 3.0)
    return float(np.mean(weight * (outcomes.latency_ms_per_token <= 30)))
