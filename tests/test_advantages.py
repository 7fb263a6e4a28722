"""Measured advantages: branches against whole simulations, and a tiny training from end to end."""

from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from besteffort.advantages import (
    ADVANTAGE_RECIPES,
    AdvantageRecipe,
    AdvantageTrainer,
    Sampler,
    fleet_encoding_for,
)
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.environment import Service
from besteffort.errors import PolicyError
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.observation import Encoding, Observation
from besteffort.offsets import Offsets
from besteffort.policies import learned
from besteffort.progress import Silent
from besteffort.q_network import QNetwork
from besteffort.request import Requests
from besteffort.rewards import Rewards
from besteffort.router.dispatcher import Dispatcher
from besteffort.simulator import Branching, simulate, simulate_choices
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.torch_network import export_network, make_network
from besteffort.workload import stable
from tests.test_dqn import StopsAt

TINY = AdvantageRecipe(
    num_rounds=2,
    num_searches=2,
    num_generations=1,
    search_num_requests=20,
    num_workloads=4,
    num_branchings=6,
    hidden_sizes=(8, 8),
    num_steps=20,
    batch_size=16,
    evaluation_num_requests=30,
)


def make_service(num_gpus: int = 2, kind: str = "hard") -> Service:
    """Two models; the good one makes its deadline only while it is not busy."""
    tasks = [
        {"name": "plain", "deadline_ms_per_token": 30, "lm_eval_task": "piqa"},
        {"name": "hard", "deadline_ms_per_token": 30, "lm_eval_task": "copa"},
    ]
    models = [
        {"name": "fast", "path": "x", "replicas": 2, "max_num_seqs": 8},
        {"name": "good", "path": "x", "replicas": 2, "max_num_seqs": 8},
    ]
    facts = {"schema_version": 1, "name": "test", "models": models, "tasks": tasks, "num_gpus": num_gpus}
    fleet = Fleet.model_validate({**facts, "deadline_kind": kind, "rate_scale": 0.5})
    steps_ms = np.array([[2.0, 4.0], [20.0, 60.0]])
    slowdown = np.ones((2, 4))
    slowdown[:, 3] = 1.3
    latency = Latency(np.array([1, 8]), steps_ms, np.array([2.0, 10.0]), np.array([0.1, 0.1]), slowdown)
    values = np.array([[0.4, 0.8], [0.6, 0.9]])
    unknown = np.full((2, 2), np.nan)
    rewards = Rewards(values, unknown, np.zeros((2, 2), dtype=np.int64), ("acc",) * 2, "given")
    return Service(fleet, latency, rewards)


def drawn_network(service: Service, seed: int) -> QNetwork:
    encoding = fleet_encoding_for(service.fleet)
    return export_network(make_network((encoding.size, 8, 8, 2), np.random.default_rng(seed)))


def make_branching(service: Service, requests: Requests, network: QNetwork | None = None) -> Branching:
    sampler = Sampler(service, fleet_encoding_for(service.fleet), TINY)
    return sampler._branching(requests, network, sampler._request_inputs(requests))


def draw(service: Service, seed: int, num_requests: int = 60, rate: float = 20.0) -> Requests:
    return stable(service.fleet, np.random.default_rng(seed), rate, num_requests=num_requests)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), at=st.integers(0, 59))
def test_branching_returns_exactly_what_whole_simulations_come_to(seed: int, at: int) -> None:
    service = make_service()
    requests = draw(service, seed)
    plan = np.random.default_rng(seed).integers(0, 2, len(requests))
    branching = make_branching(service, requests)
    branching.give(plan)
    _, worth = branching.branch(np.array([at]), np.array([len(requests)]), 0.0)
    totals = []
    for model in range(2):
        changed = plan.copy()
        changed[at] = model
        outcomes = simulate_choices(requests, service.fleet, service.latency, changed)
        totals.append(service.worth(requests.task, changed, outcomes.latency_ms_per_token).sum())
    assert worth[0, 1] - worth[0, 0] == pytest.approx(totals[1] - totals[0], abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), num_gpus=st.integers(0, 3))
def test_the_simulator_decides_as_the_served_policy_does(seed: int, num_gpus: int) -> None:
    service = make_service(num_gpus)
    requests, network = draw(service, seed), drawn_network(service, seed)
    _, models = make_branching(service, requests, network).serve()
    policy = learned(TrainedPolicy(network, fleet_encoding_for(service.fleet), {}), "test")
    outcomes = simulate(requests, service.fleet, service.latency, policy.choose)
    np.testing.assert_array_equal(models, outcomes.model)


def test_branches_leave_the_course_of_events_as_it_was() -> None:
    service = make_service()
    requests, network = draw(service, 1), drawn_network(service, 1)
    branching = make_branching(service, requests, network)
    before = branching.serve()
    every = np.arange(len(requests))
    branching.branch(every, np.minimum(every + 20, len(requests)), 0.0)
    for a, b in zip(before, branching.serve(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_better_model_of_an_idle_fleet_has_the_advantage() -> None:
    service = make_service()
    requests = draw(service, 2, num_requests=10, rate=0.02)
    every = np.arange(10)
    _, worth = make_branching(service, requests).branch(every, every + 1, 0.0)
    gain = np.array([0.5, 1 / 3])[requests.task]
    np.testing.assert_allclose(worth[:, 1] - worth[:, 0], gain)


def test_offsets_of_zero_change_nothing_and_others_prefer_a_model_for_one_task_at_some_rates() -> None:
    service = make_service()
    encoding, network = fleet_encoding_for(service.fleet), drawn_network(service, 4)
    room = Offsets(network, encoding)
    rates = np.array([0.01, 0.05, 4.0, 20.0])
    recent = np.repeat(rates[:, None], 3, axis=1)
    of_request = [encoding.encode_request(np.full(4, task), rates, recent) for task in range(2)]
    of_fleet = np.zeros((4, encoding.num_fleet_inputs), dtype=np.float32)
    inputs = [np.concatenate([of_fleet, of_task], axis=1) for of_task in of_request]
    same = room.added(np.zeros(room.size))
    np.testing.assert_allclose(same(inputs[0]), network(inputs[0]), rtol=1e-4, atol=1e-5)
    offsets = np.zeros(room.size)
    offsets[2] = 1.0  # of the first task, from the second bend on
    added = [room.added(offsets)(x) - network(x) for x in inputs]
    np.testing.assert_allclose(added[1], 0.0, atol=1e-5)
    np.testing.assert_allclose(added[0][:, 0], 0.0, atol=1e-5)
    np.testing.assert_allclose(added[0][:2, 1], 0.0, atol=1e-5)
    assert added[0][3, 1] > added[0][2, 1] > 0.5


class Recorded:
    name = "recorded"

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def choose(self, observation: Observation) -> int:
        self.seen.append(deepcopy(observation))  # the dispatcher writes the next one into the same arrays
        return (len(self.seen) * 7 // 3) % 2


def test_the_dispatcher_sees_what_the_simulator_sees() -> None:
    """Requests that never end, so that both have the same in flight at every arrival."""
    service = make_service()
    requests = draw(service, 3, num_requests=12, rate=1e6)
    simulated, served = Recorded(), Recorded()
    simulate(requests, service.fleet, service.latency, simulated.choose)
    now = iter(np.repeat(requests.arrived_at, 2))
    engines = [[None, None], [None, None]]
    dispatcher = Dispatcher(service.fleet, served, engines, clock=lambda: float(next(now)))  # type: ignore[arg-type]
    with ExitStack() as in_flight:
        for task in requests.task:
            in_flight.enter_context(dispatcher.route(int(task)))
    for a, b in zip(simulated.seen, served.seen, strict=True):
        np.testing.assert_array_equal(a.neighbours, b.neighbours)
        np.testing.assert_array_equal(a.batch_sizes, b.batch_sizes)
        assert (a.task, a.arrived_at, a.arrival_rate_per_s) == (b.task, b.arrived_at, b.arrival_rate_per_s)


def test_the_same_seed_gives_the_same_weights_however_many_threads() -> None:
    service = make_service()
    runs = [AdvantageTrainer(service, replace(TINY, num_threads=n), 1).run(Silent()) for n in (1, 3)]
    for a, b in zip(runs[0].best.weights, runs[1].best.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    assert runs[0].curve == runs[1].curve


@pytest.mark.parametrize("num_steps_done", [1, 3])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, num_steps_done: int) -> None:
    service = make_service()
    whole = AdvantageTrainer(service, TINY, 1).run(Silent())
    checkpoint = Checkpoint(tmp_path / "rounds.safetensors", {"seed": 1})
    first = AdvantageTrainer(service, TINY, 1, checkpoint=checkpoint)
    for _ in range(num_steps_done):
        first.step()
    first.save()
    again = AdvantageTrainer(service, TINY, 1, checkpoint=checkpoint)
    assert again.resumed
    assert again.training.iteration == num_steps_done
    resumed = again.run(Silent())
    assert resumed.curve == whole.curve
    for a, b in zip(resumed.best.weights, whole.best.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    other = Checkpoint(tmp_path / "rounds.safetensors", {"seed": 2})
    assert not AdvantageTrainer(service, TINY, 1, checkpoint=other).resumed


def test_offsets_that_were_added_to_a_network_come_off_it_again() -> None:
    service = make_service()
    encoding, network = fleet_encoding_for(service.fleet), drawn_network(service, 4)
    room = Offsets(network, encoding)
    offsets = np.random.default_rng(0).normal(size=room.size).astype(np.float32)
    core, found = Offsets.split(room.added(offsets), encoding)
    np.testing.assert_array_equal(found, offsets)
    for a, b in zip(core.weights + core.biases, network.weights + network.biases, strict=True):
        np.testing.assert_array_equal(a, b)
    without, none = Offsets.split(network, encoding)
    assert without is network
    assert not none.any()


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_training_goes_on_from_a_policy_with_offsets_without_growing_or_getting_worse(kind: str) -> None:
    trained = AdvantageTrainer(make_service(), replace(TINY, num_rounds=3, num_steps=100), 1).run(Silent())
    hard = trained.best
    assert hard.weights[1].shape[0] > 8  # offsets were added
    trainer = AdvantageTrainer(
        make_service(kind=kind), TINY.for_fine_tuning(), 2, init=(hard, trained.encoding)
    )
    training = trainer.run(Silent())
    start = training.curve[0]
    assert start.iteration == 0
    assert training.best.weights[1].shape == hard.weights[1].shape
    assert start.performance == trainer._evaluation.evaluate(hard, 0).performance
    assert trainer._evaluation.evaluate(training.best, 0).performance >= start.performance


def test_a_training_that_goes_on_reads_the_world_as_the_policy_did_that_it_began_with() -> None:
    """Whose scales may be others: those of a training with a margin, or of another `max_num_seqs`."""
    service = make_service()
    encoding = replace(fleet_encoding_for(service.fleet), spans_s=(0.1, 0.2, 0.3), in_flight_scale=(5.0, 6.0))
    training = AdvantageTrainer(service, TINY, 0, init=(drawn_network(service, 4), encoding)).run(Silent())
    assert training.encoding == encoding
    policy = learned(TrainedPolicy(training.best, encoding, {}), "test")
    requests = stable(service.fleet, np.random.default_rng(0), 20.0, num_requests=60)
    outcomes = simulate(requests, service.fleet, service.latency, policy.choose)
    sampler = Sampler(service, encoding, TINY)
    branching = sampler.branching_on(requests)
    branching.use(training.best)
    np.testing.assert_array_equal(branching.serve()[1], outcomes.model)


def test_searches_begin_at_the_offsets_of_the_policy_to_start_from() -> None:
    service, encoding = make_service(), fleet_encoding_for(make_service().fleet)
    room = Offsets(drawn_network(service, 4), encoding)
    offsets = np.random.default_rng(0).normal(size=room.size).astype(np.float32)
    recipe = replace(TINY, num_rounds=0, num_searches=1, num_generations=0)
    trainer = AdvantageTrainer(service, recipe, 0, init=(room.added(offsets), encoding))
    np.testing.assert_array_equal(trainer.run(Silent()).offsets, offsets)


def test_a_killed_fine_tuning_goes_on_and_keeps_what_the_start_reached(tmp_path: Path) -> None:
    service = make_service()
    init = (drawn_network(service, 4), fleet_encoding_for(service.fleet))
    whole = AdvantageTrainer(service, TINY, 1, init=init).run(Silent())
    checkpoint = Checkpoint(tmp_path / "rounds.safetensors", {"seed": 1})
    with pytest.raises(KeyboardInterrupt):
        AdvantageTrainer(service, TINY, 1, init=init, checkpoint=checkpoint).run(StopsAt(1))
    resumed = AdvantageTrainer(service, TINY, 1, init=init, checkpoint=checkpoint)
    assert resumed.resumed
    assert resumed.run(Silent()).curve == whole.curve


def test_a_short_training_beats_both_static_models() -> None:
    service = make_service()
    recipe = replace(ADVANTAGE_RECIPES["demo"], num_rounds=3, num_workloads=16)
    trainer = AdvantageTrainer(service, recipe, 0)
    training = trainer.run(Silent())
    workloads = [draw(service, seed, 400, rate) for seed, rate in ((1, 5.0), (2, 15.0), (3, 30.0))]

    def performance(models: np.ndarray | None, requests: Requests) -> float:
        branching = make_branching(service, requests, training.best)
        if models is not None:
            branching.give(models)
        return float(branching.serve()[0].mean())

    reached = np.mean([performance(None, w) for w in workloads])
    static = [np.mean([performance(np.full(400, m), w) for w in workloads]) for m in range(2)]
    assert reached > max(static) + 0.02


def test_the_encoding_comes_back_from_the_policy_file_and_an_old_file_is_refused(tmp_path: Path) -> None:
    service = make_service()
    encoding, path = fleet_encoding_for(service.fleet), tmp_path / "policy.safetensors"
    save_policy(path, TrainedPolicy(drawn_network(service, 0), encoding, {}), service.fleet)
    assert load_policy(path, service.fleet).encoding == encoding
    save_policy(path, TrainedPolicy(drawn_network(service, 0), Encoding(2, 2, 8.0, 10.0), {}), service.fleet)
    with pytest.raises(PolicyError, match="maps"):
        load_policy(path, service.fleet)
    with safe_open(path, framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {**metadata, "schema_version": "1"})
    with pytest.raises(PolicyError, match="schema version '1' is unknown"):
        load_policy(path, service.fleet)
