"""Stable-Baselines3 as a rival in training; skipped where `make bench-training` has not installed it."""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("stable_baselines3")

from gymnasium import spaces

from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.dqn import RECIPES
from besteffort.environment import Service, Transitions
from besteffort.fleet import load_fleet
from tests.benchmarks.training import FLEET_DIR, TURN, LateReplayBuffer, Rival, run

TINY = replace(
    RECIPES["paper"],
    num_iterations=2 * TURN,
    hidden_sizes=(8, 8),
    batch_size=16,
    replay_buffer_size=2000,
    num_first_transitions=320,
    num_fleets=4,
    num_requests=50,
    target_update_every=TURN,
    evaluate_every=TURN,
)


@pytest.fixture(scope="module")
def service() -> Service:
    fleet = load_fleet(FLEET_DIR)
    latency = load_latency(FLEET_DIR / "profile.parquet", fleet)
    return Service(fleet, latency, load_rewards(FLEET_DIR / "rewards.parquet", fleet))


def add(buffer: LateReplayBuffer, numbers: range) -> None:
    values = np.array(numbers)
    column = values[:, None].astype(np.float32)
    transitions = Transitions(column, values, values.astype(np.float32), column + 1)
    buffer.add(None, None, None, None, None, [{"transitions": transitions}])


def test_the_rivals_replay_buffer_keeps_the_latest_transitions_whole_and_takes_none_for_the_end() -> None:
    buffer = LateReplayBuffer(4, spaces.Box(0, np.inf, (1,)), spaces.Discrete(9), "cpu", n_envs=16)
    add(buffer, range(0))
    assert buffer.size() == 0
    for numbers in (range(0, 3), range(3, 6)):
        add(buffer, numbers)
    assert buffer.size() == 4
    sample = buffer.sample(200)
    seen = sample.actions[:, 0].numpy()
    assert set(seen.tolist()) == {2, 3, 4, 5}
    np.testing.assert_array_equal(sample.observations[:, 0].numpy(), seen)
    np.testing.assert_array_equal(sample.rewards[:, 0].numpy(), seen)
    np.testing.assert_array_equal(sample.next_observations[:, 0].numpy(), seen + 1)
    assert not sample.dones.any()


def test_the_rival_makes_as_many_decisions_per_gradient_step(service: Service) -> None:
    rival = Rival(service, TINY, 0)
    rival.go_on(10)
    rival.go_on(5)
    assert rival.num_iterations == 15
    assert rival._dqn.num_timesteps == TINY.num_first_transitions + 15 * TINY.num_fleets


def test_the_rival_copies_its_target_network_as_often(service: Service) -> None:
    rival = Rival(service, replace(TINY, num_first_transitions=40, target_update_every=10), 0)
    target = rival._dqn.q_net_target.state_dict()["q_net.0.weight"]  # a view: it changes with the network
    copies, before = 0, target.clone()
    for _ in range(30):
        rival.go_on(1)
        copies += int(not target.equal(before))
        before = target.clone()
    assert copies == 3


def test_both_are_evaluated_at_the_same_iterations(service: Service) -> None:
    result = run(service, TINY, 0)
    assert len(result.own_curve) == len(result.rivals_curve) == 2
    assert (result.own_s > 0).all()
    assert (result.rivals_s > 0).all()
