"""Double Q-learning by hand, and training from end to end with a tiny recipe."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from besteffort import dqn
from besteffort.advantages import fleet_encoding_for
from besteffort.artifacts.files import provenance, sha256
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.artifacts.profile_file import save_samples
from besteffort.artifacts.rewards_file import read_given_rewards, save_rewards
from besteffort.dqn import (
    RECIPES,
    Learner,
    Recipe,
    ReplayBuffer,
    Trainer,
    double_q_targets,
    evaluation_workloads,
)
from besteffort.environment import Policy, Service, Transitions, encoding_for, evaluate
from besteffort.errors import GateError, PolicyError, UsageError
from besteffort.fleet import load_fleet
from besteffort.gate import Effort
from besteffort.latency import Sample, fit_latency
from besteffort.progress import Silent
from besteffort.q_network import QNetwork
from besteffort.stages.train import train
from besteffort.trace import save_trace
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.torch_network import export_network, import_network, make_network
from besteffort.workload import generate_workload

REPO = Path(__file__).parent.parent
BRIEF = Effort(num_seeds=2, duration_s=10.0, num_requests=200)
TINY = Recipe(
    num_iterations=60,
    hidden_sizes=(16, 16),
    batch_size=32,
    replay_buffer_size=2000,
    num_first_transitions=200,
    target_update_every=10,
    num_fleets=4,
    num_requests=100,
    evaluate_every=30,
)
STEP_MS = {"opt-3m": (3.0, 4.0, 5.0), "opt-22m": (6.0, 12.0, 20.0), "opt-90m": (15.0, 35.0, 60.0)}
PREFILL_MS = {"opt-3m": (3.0, 0.05), "opt-22m": (8.0, 0.1), "opt-90m": (20.0, 0.4)}


def make_samples() -> list[Sample]:
    def cell(kind, model, batch_size, num_prompt_tokens, ms, busy=()):  # type: ignore[no-untyped-def]
        return Sample(kind, model, batch_size, num_prompt_tokens, busy, ms, 0.0, ms, ms, 1, "modelled")

    samples = []
    for model, steps in STEP_MS.items():
        samples += [cell("decode", model, b, 32, ms) for b, ms in zip((1, 8, 16), steps, strict=True)]
        base, per_token = PREFILL_MS[model]
        samples += [cell("prefill", model, 1, n, base + per_token * n) for n in (16, 64)]
        others = tuple(name for name in STEP_MS if name != model)
        samples.append(cell("interference", model, 8, 32, 1.5 * steps[1], others))
    return samples


@pytest.fixture(scope="module")
def fleet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU fleet with a made-up profile and the paper's rewards."""
    folder = tmp_path_factory.mktemp("tiny-opt-cpu")
    text = (REPO / "artifacts/tiny-opt-cpu/fleet.toml").read_text(encoding="utf-8")
    (folder / "fleet.toml").write_text(text, encoding="utf-8")
    fleet = load_fleet(folder)
    save_samples(folder / "profile.parquet", make_samples(), provenance())
    given = read_given_rewards(REPO / "artifacts/titan-rtx-opt/rewards.csv", fleet)
    save_rewards(folder / "rewards.parquet", given, fleet, {})
    return folder


@pytest.fixture(scope="module")
def service(fleet_dir: Path) -> Service:
    fleet = load_fleet(fleet_dir)
    rewards = read_given_rewards(REPO / "artifacts/titan-rtx-opt/rewards.csv", fleet)
    return Service(fleet, fit_latency(make_samples(), fleet.model_names), rewards)


def linear(weight: list[list[float]]) -> nn.Sequential:
    return import_network(
        QNetwork((np.array(weight, dtype=np.float32).T.copy(),), (np.zeros(len(weight), dtype=np.float32),))
    )


def assert_same_network(a: QNetwork, b: QNetwork) -> None:
    for left, right in zip(a.weights + a.biases, b.weights + b.biases, strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_action_comes_from_the_online_network_and_the_value_from_the_target_network() -> None:
    online = linear([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    target = linear([[10.0, 0.0], [3.0, 7.0], [90.0, 90.0]])
    following = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    # Online prefers action 0, then action 1. The target's own maximum would be 90, then 180.
    targets = double_q_targets(online, target, torch.tensor([1.0, 2.0]), following, 0.9)
    torch.testing.assert_close(targets, torch.tensor([1 + 0.9 * 10, 2 + 0.9 * 14]))


def test_the_target_network_follows_only_when_its_update_is_due() -> None:
    recipe = replace(TINY, target_update_every=3)
    learner = Learner(make_network((2, 4, 2), np.random.default_rng(0)), recipe)
    before = export_network(learner.target)
    rng = np.random.default_rng(1)
    for iteration in range(3):
        assert_same_network(export_network(learner.target), before)
        inputs = [torch.from_numpy(rng.random((8, 2), dtype=np.float32)) for _ in range(2)]
        actions = torch.from_numpy(rng.integers(0, 2, 8))
        learner.learn((inputs[0], actions, torch.ones(8), inputs[1]), iteration)
    assert_same_network(export_network(learner.target), export_network(learner.online))
    assert not np.array_equal(before.weights[0], export_network(learner.target).weights[0])


def test_q_values_come_to_the_discounted_sum_of_constant_rewards() -> None:
    recipe = replace(TINY, discount=0.5, learning_rate=0.01, num_iterations=600)
    learner = Learner(make_network((1, 8, 1), np.random.default_rng(0)), recipe)
    one = torch.ones((4, 1))
    for iteration in range(600):
        learner.learn((one, torch.zeros(4, dtype=torch.int64), torch.full((4,), 3.0), one), iteration)
    assert learner.online(one)[0].item() == pytest.approx(3.0 / (1 - 0.5), rel=0.02)


def test_the_exported_network_computes_what_the_torch_network_does() -> None:
    network = make_network((5, 16, 16, 3), np.random.default_rng(0))
    inputs = np.random.default_rng(1).random((10, 5), dtype=np.float32)
    expected = network(torch.from_numpy(inputs)).detach().numpy()
    exported = export_network(network)
    np.testing.assert_allclose(exported(inputs), expected, rtol=1e-5, atol=1e-6)
    assert_same_network(export_network(import_network(exported)), exported)


def test_the_replay_buffer_keeps_the_latest_transitions() -> None:
    buffer = ReplayBuffer(4, 1)
    for start in (0, 3):
        values = np.arange(start, start + 3)
        column = values[:, None].astype(np.float32)
        buffer.add(Transitions(column, values, values.astype(np.float32), column + 1))
    assert len(buffer) == 4
    observations, actions, rewards, following = buffer.sample(200, np.random.default_rng(0))
    assert set(actions.tolist()) == {2, 3, 4, 5}
    torch.testing.assert_close(observations[:, 0], rewards)
    torch.testing.assert_close(following[:, 0], rewards + 1)


def test_epsilon_falls_linearly_and_stays() -> None:
    recipe = replace(TINY, num_iterations=100, first_epsilon=1.0, last_epsilon=0.1, epsilon_decay_share=0.5)
    assert [recipe.epsilon_at(i) for i in (0, 25, 50, 100)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_the_paper_recipe_has_the_papers_numbers() -> None:
    recipe = RECIPES["paper"]
    assert (recipe.discount, recipe.learning_rate, recipe.batch_size) == (0.99, 1e-4, 1024)
    assert (recipe.target_update_every, recipe.num_iterations) == (500, 1_200_000)
    assert recipe.hidden_sizes == (256, 256)
    assert recipe.for_fine_tuning() == replace(recipe, num_iterations=685_000)


def test_the_same_seed_gives_the_same_weights_and_another_seed_does_not(service: Service) -> None:
    first, again, other = (Trainer(service, TINY, seed).run(Silent()) for seed in (1, 1, 2))
    assert_same_network(first.best, again.best)
    assert [e.performance for e in first.curve] == [e.performance for e in again.curve]
    assert not np.array_equal(first.best.weights[0], other.best.weights[0])


def test_training_leaves_the_global_generators_alone(service: Service) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Trainer(service, replace(TINY, num_iterations=5), 0).run(Silent())
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])


def test_a_short_training_beats_every_static_model(service: Service) -> None:
    recipe = replace(RECIPES["dqn"], num_iterations=1000, evaluate_every=250)
    training = Trainer(service, recipe, 0).run(Silent())
    workloads = [w for seed in (1, 2) for w in evaluation_workloads(service.fleet, seed)]

    def performance(policy: Policy) -> float:
        return float(evaluate(service, training.encoding, workloads, policy).mean())

    reached = performance(lambda inputs: training.best(inputs).argmax(axis=1))
    static = [performance(lambda inputs, m=m: np.full(len(inputs), m)) for m in range(3)]  # type: ignore[misc]
    assert reached > max(static) + 0.03


class StopsAt:
    """Interrupts a training at an iteration, as Ctrl-C does."""

    def __init__(self, iteration: int) -> None:
        self.left = iteration
        self.lines: list[str] = []

    def __enter__(self) -> "StopsAt":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def bar(self, title: str, num_steps: int) -> "StopsAt":
        return self

    def say(self, line: str) -> None:
        self.lines.append(line)

    def describe(self, text: str) -> None:
        pass

    def advance(self, num_steps: int = 1) -> None:
        self.left -= num_steps
        if self.left < 0:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_where_it_was(service: Service, tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "a.safetensors", {"seed": 1})
    stopped = Trainer(service, TINY, 1, checkpoint=checkpoint)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(StopsAt(45))
    resumed = Trainer(service, TINY, 1, checkpoint=checkpoint)
    assert resumed.resumed
    assert resumed.training.iteration == stopped.training.iteration == 46
    assert [e.iteration for e in resumed.training.curve] == [30]
    assert_same_network(resumed.training.best, stopped.training.best)
    for name, tensor in stopped._learner.tensors().items():
        assert torch.equal(tensor, resumed._learner.tensors()[name]), name
    assert [e.iteration for e in resumed.run(Silent()).curve] == [30, 60]


def test_a_checkpoint_of_other_inputs_or_a_damaged_one_is_not_continued(
    service: Service, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    Trainer(service, TINY, 1, checkpoint=Checkpoint(path, {"seed": 1})).run(Silent())
    assert Trainer(service, TINY, 1, checkpoint=Checkpoint(path, {"seed": 1})).resumed
    assert not Trainer(service, TINY, 1, checkpoint=Checkpoint(path, {"seed": 2})).resumed
    path.write_bytes(path.read_bytes()[:100])
    assert not Trainer(service, TINY, 1, checkpoint=Checkpoint(path, {"seed": 1})).resumed


def test_the_stage_writes_a_policy_that_says_where_it_comes_from(
    fleet_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    trained = train(fleet_dir, recipe="tiny", seed=3, force=True, gate=BRIEF, progress=Silent())
    loaded = load_policy(fleet_dir / "policy.safetensors", load_fleet(fleet_dir))
    assert_same_network(loaded.network, trained.network)
    facts = loaded.facts
    assert facts["recipe_name"] == "tiny"
    assert facts["recipe"]["batch_size"] == 32
    assert (facts["seed"], facts["iterations"]) == (3, 60)
    assert facts["sha256"]["profile"] == sha256(fleet_dir / "profile.parquet")
    assert [iteration for iteration, _ in facts["evaluation_curve"]] == [30, 60]
    assert (fleet_dir / "policy.png").read_bytes().startswith(b"\x89PNG")
    assert not list((fleet_dir / "train").iterdir())  # the checkpoint has served its purpose


def test_a_soft_policy_is_trained_further_from_a_hard_one(
    fleet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", replace(TINY, learning_rate=0.0))
    hard = tmp_path / "hard.safetensors"
    brief = {"force": True, "gate": BRIEF, "progress": Silent()}
    first = train(fleet_dir, recipe="tiny", output=hard, **brief)
    text = (fleet_dir / "fleet.toml").read_text(encoding="utf-8")
    (tmp_path / "fleet.toml").write_text(text.replace('"hard"', '"soft"'), encoding="utf-8")
    profile, rewards = fleet_dir / "profile.parquet", fleet_dir / "rewards.parquet"
    soft = train(tmp_path, recipe="tiny", init=hard, profile=profile, rewards=rewards, **brief)
    assert_same_network(soft.network, first.network)  # at a learning rate of 0 nothing changes
    assert soft.facts["sha256"]["init"] == sha256(hard)
    tighter = re.sub(r"deadline_ms_per_token = \d+", "deadline_ms_per_token = 7", text)
    (tmp_path / "fleet.toml").write_text(tighter, encoding="utf-8")
    with pytest.raises(PolicyError, match="trained for deadlines"):
        train(tmp_path, recipe="tiny", init=hard, profile=profile, rewards=rewards, progress=Silent())


def test_a_start_that_is_better_than_all_that_comes_of_it_is_kept(service: Service) -> None:
    brief = replace(RECIPES["dqn"], num_iterations=150, num_first_transitions=4000)
    start = Trainer(service, brief, 0).run(Silent())
    spoiled = replace(TINY, learning_rate=1.0, num_iterations=20, evaluate_every=10)
    training = Trainer(service, spoiled, 1, init=(start.best, start.encoding)).run(Silent())
    assert [e.iteration for e in training.curve] == [0, 10, 20]
    assert training.curve[0].performance == start.best_evaluation.performance
    assert max(e.performance for e in training.curve[1:]) < training.curve[0].performance
    assert_same_network(training.best, start.best)


def test_a_soft_policy_is_at_least_as_good_with_soft_deadlines_as_the_hard_one_it_was(
    service: Service,
) -> None:
    recipe = replace(RECIPES["dqn"], num_iterations=100, evaluate_every=50, num_first_transitions=2000)
    hard = Trainer(service, recipe, 0).run(Silent())
    soft_fleet = service.fleet.model_copy(update={"deadline_kind": "soft"})
    soft = replace(service, fleet=soft_fleet)
    tuned = Trainer(soft, recipe, 0, init=(hard.best, hard.encoding)).run(Silent())
    workloads = evaluation_workloads(soft_fleet)

    def reached(network: QNetwork) -> float:
        policy = lambda inputs: network(inputs).argmax(axis=1)  # noqa: E731
        return float(evaluate(soft, hard.encoding, workloads, policy).mean())

    assert reached(tuned.best) >= reached(hard.best)
    assert tuned.curve[0].performance == pytest.approx(reached(hard.best), abs=1e-3)


def test_an_interrupted_stage_says_how_to_go_on(
    fleet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    stopped = StopsAt(45)
    with pytest.raises(KeyboardInterrupt):
        train(fleet_dir, recipe="tiny", seed=8, output=tmp_path / "p.safetensors", progress=stopped)
    assert stopped.lines[-1].startswith("interrupted; the same command goes on from ")
    assert "tiny-8.safetensors" in stopped.lines[-1]
    again = StopsAt(0)
    with pytest.raises(KeyboardInterrupt):
        train(fleet_dir, recipe="tiny", seed=8, output=tmp_path / "p.safetensors", progress=again)
    assert any(line.startswith("going on from iteration 46 of") for line in again.lines)


def test_the_plot_goes_beside_the_policy_and_nothing_else_is_overwritten(
    fleet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    before = {path: path.read_bytes() for path in fleet_dir.iterdir() if path.is_file()}
    output = tmp_path / "elsewhere" / "mine.safetensors"
    train(fleet_dir, recipe="tiny", output=output, force=True, gate=BRIEF, progress=Silent())
    assert sorted(path.name for path in output.parent.iterdir()) == ["mine.png", "mine.safetensors"]
    assert {path: path.read_bytes() for path in fleet_dir.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("output", "saying"),
    [
        ("", "this is a folder; name a file in it"),
        ("file/policy.safetensors", "cannot be written"),
        ("x.png", "the plot of the training goes there"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_the_training(
    fleet_dir: Path, tmp_path: Path, output: str, saying: str
) -> None:
    """By the paper's recipe it would take hours to come that far."""
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UsageError, match=saying):
        train(fleet_dir, recipe="paper", output=tmp_path / output, progress=Silent())


def test_a_policy_to_start_from_that_is_not_there_is_told_with_the_mend(fleet_dir: Path) -> None:
    with pytest.raises(PolicyError, match=r"nope: no such file; name another policy .* with --init"):
        train(fleet_dir, init=Path("nope"), progress=Silent())


def test_a_policy_that_reads_another_state_than_the_recipe_is_no_start(
    fleet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    fleet, encoding = load_fleet(fleet_dir), encoding_for(load_fleet(fleet_dir))
    path = tmp_path / "papers.safetensors"
    network = export_network(make_network((encoding.size, 8, 8, 3), np.random.default_rng(0)))
    save_policy(path, TrainedPolicy(network, encoding, {}), fleet)
    with pytest.raises(PolicyError, match="--init: trained on the paper's state"):
        train(fleet_dir, recipe="advantages", init=path, progress=Silent())
    with pytest.raises(PolicyError, match="--init: not trained by this recipe"):
        train(fleet_dir, init=path, progress=Silent())
    encoding_of_fleet = fleet_encoding_for(fleet)
    network = export_network(make_network((encoding_of_fleet.size, 8, 8, 3), np.random.default_rng(0)))
    save_policy(path, TrainedPolicy(network, encoding_of_fleet, {}), fleet)
    with pytest.raises(PolicyError, match="not trained on the paper's state"):
        train(fleet_dir, recipe="tiny", init=path, progress=Silent())


def test_what_training_draws_from_is_in_the_policys_provenance(
    fleet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    fleet, trace = load_fleet(fleet_dir), tmp_path / "week.parquet"
    requests = generate_workload("unpredictable-2", fleet, np.random.default_rng(0), num_requests=1500)
    save_trace(trace, requests, fleet.task_names, {})
    output = tmp_path / "p.safetensors"
    options = {"recipe": "tiny", "output": output, "force": True, "gate": BRIEF, "progress": Silent()}
    train(fleet_dir, task_mix="random", traces=[trace], **options)  # type: ignore[arg-type]
    facts = load_policy(output, fleet).facts
    assert facts["task_mix"] == "random"
    assert facts["sha256"]["trace week"] == sha256(trace)
    assert set(facts["evaluation_by_trace"]) == {"week"}
    assert facts["comparison"][-1]["workload"] == "trace week, held out"
    with pytest.raises(UsageError, match="two traces are called 'week'"):
        train(fleet_dir, traces=[trace, trace], progress=Silent())
    with pytest.raises(UsageError, match="choose one of fleet, random"):
        train(fleet_dir, task_mix="mine", progress=Silent())


def test_a_policy_that_loses_is_not_written_unless_forced(
    fleet_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dqn.RECIPES, "tiny", TINY)
    output = tmp_path / "loser.safetensors"
    with pytest.raises(GateError, match=r"loser\.safetensors is not written, since it loses on \d+ of"):
        train(fleet_dir, recipe="tiny", output=output, gate=BRIEF, progress=Silent())
    assert not output.exists()
    lost = load_policy(tmp_path / "loser.lost.safetensors", load_fleet(fleet_dir))
    assert any(row["lost_to"] for row in lost.facts["comparison"])


def test_an_unknown_recipe_is_refused_with_those_there_are(fleet_dir: Path) -> None:
    with pytest.raises(UsageError, match="choose one of default, advantages, demo, paper, dqn"):
        train(fleet_dir, recipe="best", progress=Silent())
