"""Direct policy search: curves of thresholds, the network they are, and a tiny training from end to end."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.artifacts.files import sha256
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.direct import (
    DirectRecipe,
    DirectTrainer,
    DirectTraining,
    ThresholdCurves,
    curves_of_policy,
    direct_encoding_for,
    network_of_curves,
)
from besteffort.direct.curves import KNOTS_PER_S, NEVER, levels_of_table, log_rate
from besteffort.direct.objective import Objective, draw_groups
from besteffort.environment import Service
from besteffort.errors import PolicyError
from besteffort.policies import learned
from besteffort.progress import Silent
from besteffort.simulator import simulate
from besteffort.stages.training_setup import Setup
from besteffort.thresholds import ThresholdTable
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.trace_parts import TrainingTrace
from besteffort.training.workloads import TrainingWorkloads
from besteffort.workload import stable, unpredictable_2
from tests.conftest import ROOT
from tests.test_advantages import drawn_network, make_service
from tests.test_dqn import StopsAt

TINY = DirectRecipe(
    num_passes=1,
    num_fine_tuning_passes=1,
    num_generations_alone=1,
    num_generations=1,
    calm_num_requests=20,
    busy_num_requests=30,
    num_short=1,
    short_num_requests=10,
    num_unpredictable=2,
    unpredictable_num_requests=40,
    evaluation_num_requests=30,
)


def with_models(service: Service, num_models: int) -> Service:
    """The fast model alone, or both."""
    fleet = service.fleet.model_copy(update={"models": service.fleet.models[:num_models]})
    latency = replace(
        service.latency,
        step_ms=service.latency.step_ms[:num_models],
        prefill_base_ms=service.latency.prefill_base_ms[:num_models],
        prefill_ms_per_token=service.latency.prefill_ms_per_token[:num_models],
        slowdown=service.latency.slowdown[:num_models, : 2**num_models],
        context_ms_per_token=service.latency.context_ms_per_token[:num_models],
        overhead_ms=service.latency.overhead_ms[:num_models],
        pressure=service.latency.pressure[:num_models, :num_models],
    )
    rewards = replace(
        service.rewards,
        **{
            name: getattr(service.rewards, name)[:, :num_models]
            for name in ("values", "standard_errors", "num_documents")
        },
    )
    return Service(fleet, latency, rewards)


def drawn_curves(service: Service, seed: int) -> ThresholdCurves:
    rng, num_tasks = np.random.default_rng(seed), len(service.fleet.tasks)
    caps = np.array([float(model.max_num_seqs) for model in service.fleet.models[1:]])
    levels = rng.uniform(-0.5, 3.5, (len(KNOTS_PER_S), num_tasks, len(caps)))
    calm = rng.uniform(-0.5, 3.5, (num_tasks, len(caps)))
    return ThresholdCurves(levels, calm, log_rate(rng.uniform(1, 8, 2)), np.log2(1 + caps)).clipped(caps)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_network_takes_the_largest_model_under_its_curve(seed: int) -> None:
    service = make_service()
    encoding, curves = direct_encoding_for(service.fleet), drawn_curves(service, seed)
    rng, scale, num = np.random.default_rng(seed), service.fleet.rate_scale, 200
    task, batch = rng.integers(0, 2, num), rng.integers(0, 33, (num, 2)) / 4
    rates = np.exp(rng.uniform(np.log(0.1), np.log(70), (num, 3)))  # the paper's
    of_fleet = encoding.encode_fleet(batch, np.zeros((num, 2, 2)))
    of_request = encoding.encode_request(task, rng.uniform(0, 40, num), rates * scale)
    chosen = network_of_curves(curves, encoding)(np.concatenate([of_fleet, of_request], axis=1)).argmax(
        axis=1
    )
    logs, knots = log_rate(rates), log_rate(np.array(KNOTS_PER_S))
    level = np.array(
        [np.interp(log, knots, curves.levels[:, t, 0]) for log, t in zip(logs[:, 0], task, strict=True)]
    )
    away = np.abs(logs[:, [2, 1]] - curves.calm_below)
    calm = (logs[:, [2, 1]] < curves.calm_below).all(axis=1)
    room = np.where(calm, curves.calm_levels[task, 0], level) - np.log2(1 + batch[:, 1])
    told = (away > 0.01).all(axis=1) & (np.abs(room) > 1e-3)
    np.testing.assert_array_equal(chosen[told], (room > 0)[told])
    assert told.sum() > 100


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_search_judges_curves_nearly_as_the_served_network_does(seed: int) -> None:
    service = make_service()
    encoding, curves = direct_encoding_for(service.fleet), drawn_curves(service, seed)
    groups = draw_groups(TrainingWorkloads(service.fleet), TINY, np.random.default_rng(seed))
    judged = Objective(groups, service, encoding, 2).worth(curves)
    policy = TrainedPolicy(network_of_curves(curves, encoding), encoding, {})
    total = 0.0
    for group in groups:
        worth = []
        for requests in group.workloads:
            outcomes = simulate(requests, service.fleet, service.latency, learned(policy, "test").choose)
            worth.append(service.worth(requests.task, outcomes.model, outcomes.latency_ms_per_token).mean())
        total += group.weight * float(np.mean(worth))
    assert judged == pytest.approx(total / sum(group.weight for group in groups), abs=0.08)


def test_curves_come_back_from_a_written_policy(tmp_path: Path) -> None:
    service = make_service()
    encoding, curves = direct_encoding_for(service.fleet), drawn_curves(service, 3)
    save_policy(
        tmp_path / "p.safetensors",
        TrainedPolicy(network_of_curves(curves, encoding), encoding, {}),
        service.fleet,
    )
    back, again = curves_of_policy(load_policy(tmp_path / "p.safetensors", service.fleet))
    assert again == encoding
    for name in ("levels", "calm_levels", "calm_below"):
        np.testing.assert_allclose(getattr(back, name), getattr(curves, name), atol=1e-3)


def test_a_policy_of_another_recipe_is_refused_as_a_start() -> None:
    service = make_service()
    other = TrainedPolicy(drawn_network(service, 1), direct_encoding_for(service.fleet), {})
    with pytest.raises(PolicyError, match="--init: not trained by this recipe"):
        curves_of_policy(other)


def train_tiny(service: Service, **options: object) -> DirectTraining:
    return DirectTrainer(service, TINY, 0, **options).run(Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize("num_models", [1, 2])
def test_a_training_is_never_worse_than_its_first_evaluation(num_models: int) -> None:
    training = train_tiny(with_models(make_service(), num_models))
    assert training.best_evaluation.performance >= training.curve[0].performance > 0
    assert training.iteration == TINY.num_passes * (len(KNOTS_PER_S) + 2)


def test_tuned_thresholds_are_read_at_each_knot() -> None:
    sizes = np.array([[[3.0], [-1.0]], [[7.0], [0.0]]])  # two tasks, two bands
    edge_per_s = 0.5 * 9.0
    levels = levels_of_table(ThresholdTable(np.array([edge_per_s]), sizes), 0.5)
    calm = np.array(KNOTS_PER_S) < 9.0
    np.testing.assert_array_equal(levels[calm], np.broadcast_to([[2.0], [3.0]], levels[calm].shape))
    np.testing.assert_array_equal(levels[~calm], np.broadcast_to([[NEVER], [0.0]], levels[~calm].shape))


def test_a_search_begins_with_tuned_thresholds() -> None:
    """One that hardly moves ends where it began."""
    service = make_service()
    num_tasks, num_others = len(service.fleet.tasks), len(service.fleet.models) - 1
    table = ThresholdTable(np.empty(0), np.full((num_tasks, 1, num_others), 2.0))
    recipe = replace(TINY, first_step=1e-6, last_step=1e-6)
    training = DirectTrainer(service, recipe, 0, tuned=table).run(Silent())
    expected = np.broadcast_to(np.log2(3.0), training.curves.levels.shape)
    np.testing.assert_allclose(training.curves.levels, expected, atol=1e-3)


@pytest.mark.parametrize("with_mean", [True, False])
def test_the_policy_is_the_mean_of_all_passes_but_the_first(with_mean: bool) -> None:
    recipe, num_pieces = replace(TINY, num_passes=3, with_mean=with_mean), len(KNOTS_PER_S) + 2
    trainer, ends = DirectTrainer(make_service(), recipe, 0), []
    while trainer.training.iteration < recipe.num_passes * num_pieces:
        trainer.step()
        if trainer.training.iteration % num_pieces == 0:
            ends.append(trainer.training.curves)
    assert not np.array_equal(ends[1].levels, ends[2].levels)
    share = 0.5 if with_mean else 1.0
    for name in ("levels", "calm_levels", "calm_below", "highest"):
        expected = (1 - share) * getattr(ends[1], name) + share * getattr(ends[2], name)
        np.testing.assert_allclose(getattr(trainer.training.mean, name), expected)


def test_a_training_from_a_policy_on_is_kept_from_the_beginning(tmp_path: Path) -> None:
    service = make_service()
    curves, encoding = drawn_curves(service, 3), direct_encoding_for(service.fleet)
    kept = Checkpoint(tmp_path / "kept.safetensors", {})
    trainer = DirectTrainer(service, TINY, 0, init=(curves, encoding), checkpoint=kept)
    trainer.save()
    again = DirectTrainer(service, TINY, 0, init=(curves, encoding), checkpoint=kept)
    assert again.resumed
    np.testing.assert_array_equal(again.training.mean.levels, curves.levels)


def test_a_training_that_goes_by_tuned_thresholds_is_another_one() -> None:
    setup = Setup(ROOT / "artifacts" / "titan-rtx-opt")
    assert "thresholds" not in setup.identity()["sha256"]
    assert setup.identity(tuned=True)["sha256"]["thresholds"] == sha256(setup.thresholds_path)


def test_the_number_of_threads_does_not_change_the_result() -> None:
    both = [
        DirectTrainer(make_service(), replace(TINY, num_threads=num), 0).run(Silent()).curves
        for num in (1, 2)
    ]
    np.testing.assert_array_equal(both[0].levels, both[1].levels)


def test_an_interrupted_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    service, whole = make_service(), train_tiny(make_service())
    checkpoint = Checkpoint(tmp_path / "kept.safetensors", {"recipe": "tiny"})
    with pytest.raises(KeyboardInterrupt):
        DirectTrainer(service, TINY, 0, checkpoint=checkpoint).run(StopsAt(len(KNOTS_PER_S) + 5))
    trainer = DirectTrainer(service, TINY, 0, checkpoint=checkpoint)
    assert trainer.resumed
    assert 0 < trainer.training.iteration < whole.iteration
    again = trainer.run(Silent())
    np.testing.assert_array_equal(again.curves.levels, whole.curves.levels)
    assert [e.performance for e in again.curve] == [e.performance for e in whole.curve]


def test_a_training_goes_on_from_curves_with_soft_deadlines_too() -> None:
    hard, soft = make_service(), make_service(kind="soft")
    start = drawn_curves(hard, 5)
    training = DirectTrainer(soft, TINY, 0, init=(start, direct_encoding_for(hard.fleet))).run(Silent())
    assert training.curve[0].iteration == 0
    assert training.best_evaluation.performance >= training.curve[0].performance


def test_traces_and_random_mixes_are_searched_on() -> None:
    service = make_service()
    trace = TrainingTrace.of(
        "t", unpredictable_2(service.fleet, np.random.default_rng(1), 2000), service.fleet
    )
    workloads = TrainingWorkloads(service.fleet, "random", (trace,))
    groups = draw_groups(workloads, TINY, np.random.default_rng(0))
    plain = draw_groups(TrainingWorkloads(service.fleet), TINY, np.random.default_rng(0))
    assert len(groups) == len(plain) + 1
    assert groups[-1].weight == pytest.approx(sum(group.weight for group in plain))
    shares = [np.mean(w.task == 0) for group in groups[:-1] for w in group.workloads]
    assert min(shares) < 0.2
    assert max(shares) > 0.8
    training = train_tiny(service, workloads=workloads)
    assert set(training.best_evaluation.by_trace) == {"t"}


def test_a_calm_fleet_serves_all_by_the_largest_model() -> None:
    service = make_service()
    caps = np.array([float(model.max_num_seqs) for model in service.fleet.models[1:]])
    curves = ThresholdCurves.starting_from(np.full((len(KNOTS_PER_S), 2, 1), -0.5), caps)
    encoding = direct_encoding_for(service.fleet)
    policy = learned(TrainedPolicy(network_of_curves(curves, encoding), encoding, {}), "calm")
    calm = stable(service.fleet, np.random.default_rng(1), 0.5, num_requests=50)
    busy = stable(service.fleet, np.random.default_rng(1), 40.0, num_requests=400)
    assert simulate(calm, service.fleet, service.latency, policy.choose).model.min() == 1
    assert simulate(busy, service.fleet, service.latency, policy.choose).model[200:].max() == 0
