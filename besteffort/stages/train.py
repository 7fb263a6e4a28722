"""`train`: a profile and rewards in, `policy.safetensors` and the plot of its evaluation curve out."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from besteffort import __version__
from besteffort.advantages import (
    ADVANTAGE_RECIPES,
    AdvantageRecipe,
    AdvantageTrainer,
    AdvantageTraining,
    RoundCheckpoints,
    fleet_encoding_for,
)
from besteffort.artifacts.files import provenance, sha256, write_atomically
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.dqn import RECIPES, Checkpoints, Recipe, Trainer, Training
from besteffort.environment import Service
from besteffort.errors import GateError, InputError, PolicyError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.gate import Effort, Row, compare
from besteffort.observation import Encoding
from besteffort.policies import learned, load_named_policy
from besteffort.progress import Progress

BASELINES = ("random", "round-robin", "least-loaded", "greedy", "slackfit", "thresholds")


def train(
    fleet_dir: Path,
    *,
    recipe: str = "default",
    seed: int = 0,
    init: Path | None = None,
    profile: Path | None = None,
    rewards: Path | None = None,
    output: Path | None = None,
    force: bool = False,
    deadline_margin: float = 0.0,
    gate: Effort | None = None,
    show: Callable[[list[Row]], None] | None = None,
    progress: Progress,
) -> TrainedPolicy:
    """Train a policy and write it to `output`, by default `fleet_dir/policy.safetensors`.

    An interrupted training goes on where it was last saved, if recipe, seed and inputs are the
    same. `init` is a policy to start from, with either kind of deadline (paper, Sec. 4.3.2). A policy
    that loses against a simpler one is written beside `output`, as `*.lost.safetensors`, unless `force`d.
    `deadline_margin` is the share of every deadline that training keeps back, for what the simulator
    does not know of the real service; policies are compared by the deadlines themselves.

    Raises:
        InputError: the recipe is unknown, or an input is missing, malformed or of another fleet.
        GateError: the policy loses.
    """
    chosen = _recipe(recipe)
    if not 0.0 <= deadline_margin < 1.0:
        raise UsageError(
            f"--deadline-margin {deadline_margin}: give a share of the deadline, from 0 to below 1"
        )
    profile = profile or fleet_dir / "profile.parquet"
    rewards = rewards or fleet_dir / "rewards.parquet"
    output = output or fleet_dir / "policy.safetensors"
    fleet = load_fleet(fleet_dir)
    service = Service(fleet, load_latency(profile, fleet), load_rewards(rewards, fleet))
    start = _load_init(init, fleet) if init else None
    files = {"fleet": fleet_dir / "fleet.toml", "profile": profile, "rewards": rewards, "init": init}
    hashes = {what: sha256(path) for what, path in files.items() if path}
    identity = {"besteffort": __version__, "recipe": asdict(chosen), "seed": seed, "sha256": hashes}
    identity["deadline_margin"] = deadline_margin
    path = fleet_dir / "train" / f"{recipe}-{seed}.safetensors"
    stricter = replace(service, fleet=_with_margin(fleet, deadline_margin))
    training = _run(stricter, chosen, seed, start, path, identity, progress)
    policy = TrainedPolicy(training.best, training.encoding, {})
    rows = _compare(policy, service, profile, rewards, output, gate or _effort(chosen), progress)
    if show:
        show(rows)
    facts = provenance(recipe_name=recipe, **identity, **_result(training))
    policy = TrainedPolicy(
        training.best, training.encoding, {**facts, "comparison": [row.to_dict() for row in rows]}
    )
    write_atomically(fleet_dir / "train.png", lambda path: _plot(training, fleet, recipe, path))
    _write(policy, fleet, rows, output, force, progress)
    path.unlink(missing_ok=True)
    return policy


def _with_margin(fleet: Fleet, deadline_margin: float) -> Fleet:
    """The same fleet with every deadline that much earlier."""
    tasks = tuple(
        task.model_copy(
            update={"deadline_ms_per_token": task.deadline_ms_per_token * (1.0 - deadline_margin)}
        )
        for task in fleet.tasks
    )
    return fleet.model_copy(update={"tasks": tasks})


def _recipe(name: str) -> Recipe | AdvantageRecipe:
    recipes: dict[str, Recipe | AdvantageRecipe] = {**ADVANTAGE_RECIPES, **RECIPES}
    if name not in recipes:
        raise UsageError(f"{name!r} is no recipe: choose one of {', '.join(recipes)}")
    return recipes[name]


def _run(
    service: Service,
    recipe: Recipe | AdvantageRecipe,
    seed: int,
    start: TrainedPolicy | None,
    path: Path,
    identity: dict[str, object],
    progress: Progress,
) -> Training | AdvantageTraining:
    trainer: Trainer | AdvantageTrainer
    if isinstance(recipe, AdvantageRecipe):
        if start is not None and start.encoding != fleet_encoding_for(service.fleet):
            raise PolicyError("--init: trained on another state or scale than this recipe; train it anew")
        network = start.network if start else None
        trainer = AdvantageTrainer(
            service, recipe, seed, init=network, checkpoints=RoundCheckpoints(path, identity)
        )
    else:
        init = None
        if start is not None:
            if not isinstance(start.encoding, Encoding):
                raise PolicyError(
                    "--init: not trained on the paper's state, as this recipe needs; train it anew"
                )
            init = (start.network, start.encoding)
        trainer = Trainer(service, recipe, seed, init=init, checkpoints=Checkpoints(path, identity))
    if trainer.resumed:
        progress.say(f"going on from iteration {trainer.training.iteration} of {path}")
    return trainer.run(progress)


def _effort(recipe: Recipe | AdvantageRecipe) -> Effort:
    """As long as the training is worth: the demo has no minute for it."""
    if isinstance(recipe, AdvantageRecipe):
        return Effort(num_seeds=recipe.gate_num_seeds, num_requests=recipe.gate_num_requests)
    return Effort()


def _compare(
    policy: TrainedPolicy,
    service: Service,
    profile: Path,
    rewards: Path,
    output: Path,
    effort: Effort,
    progress: Progress,
) -> list[Row]:
    """Against all baselines; tuned thresholds where they have been tuned for these very files."""
    fleet = service.fleet
    makers = [partial(learned, policy, name=f"trained:{output.stem}")]
    for name in (*(f"static:{model}" for model in fleet.model_names), *BASELINES):
        make = partial(
            load_named_policy, name, fleet, profile=profile, rewards=rewards, rng=np.random.default_rng(0)
        )
        try:
            make()
        except InputError as error:
            progress.say(f"not compared with {name}: {error}")
        else:
            makers.append(make)
    return compare(makers, service, effort, progress)


def _write(
    policy: TrainedPolicy, fleet: Fleet, rows: list[Row], output: Path, force: bool, progress: Progress
) -> None:
    losses = sorted(
        ((one.ahead, one.policy, row.workload) for row in rows for one in row.better), reverse=True
    )
    if losses:
        ahead, policy_name, workload = losses[0]
        num_workloads = len({workload for _, _, workload in losses})
        told = (
            f"it loses on {num_workloads} of {len(rows)} workloads, most against {policy_name} "
            f"on {workload} (by {ahead:.4f})"
        )
        if not force:
            lost = output.with_name(f"{output.stem}.lost.safetensors")
            save_policy(lost, policy, fleet)
            raise GateError(
                f"{output} is not written, since {told}; the policy is in {lost}: "
                "train longer or with another seed, or write it with --force"
            )
        progress.say(f"written although {told}")
    save_policy(output, policy, fleet)


def _load_init(path: Path, fleet: Fleet) -> TrainedPolicy:
    """A policy of this fleet; the kind of its deadlines may differ, since it is trained further."""
    other = "soft" if fleet.deadline_kind == "hard" else "hard"
    try:
        return load_policy(path, fleet)
    except PolicyError as error:
        try:
            return load_policy(path, fleet.model_copy(update={"deadline_kind": other}))
        except PolicyError:
            raise error from None


def _result(training: Training | AdvantageTraining) -> dict[str, object]:
    best = training.best_evaluation
    return {
        "iterations": training.iteration,
        "best_iteration": best.iteration,
        "evaluation_performance": best.performance,
        "evaluation_by_rate": best.by_rate,
        "evaluation_curve": [[e.iteration, e.performance] for e in training.curve],
        "wall_s": round(training.wall_s, 1),
    }


def _plot(training: Training | AdvantageTraining, fleet: Fleet, recipe: str, path: Path) -> None:
    """The evaluation curve: the mean, and each arrival rate's."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    iterations = [evaluation.iteration for evaluation in training.curve]
    for rate in training.curve[0].by_rate:
        values = [evaluation.by_rate[rate] for evaluation in training.curve]
        axes.plot(iterations, values, linewidth=0.8, label=f"{float(rate) * fleet.rate_scale:g}/s")
    means = [evaluation.performance for evaluation in training.curve]
    axes.plot(iterations, means, color="black", marker="o", markersize=3, linewidth=2, label="mean")
    axes.axvline(training.best_evaluation.iteration, color="grey", linestyle=":", label="kept")
    axes.set_xlabel("training iteration")
    axes.set_ylabel("performance (share of the peak)")
    axes.set_title(f"{fleet.name}, recipe {recipe}: evaluation at steady arrival rates")
    axes.legend(title="arrival rate (requests/s)", fontsize="small", ncols=2)
    figure.savefig(path, format="png", dpi=120)
