"""`train`: a profile and rewards in, `policy.safetensors` and the plot of its evaluation curve out."""

from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from besteffort import __version__
from besteffort.artifacts.files import provenance, sha256, write_atomically
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy, save_policy
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.dqn import EVALUATION_RATES_PER_S, RECIPES, Checkpoints, Recipe, Trainer, Training
from besteffort.environment import Service
from besteffort.errors import PolicyError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.progress import Progress


def train(
    fleet_dir: Path,
    *,
    recipe: str = "demo",
    seed: int = 0,
    init: Path | None = None,
    profile: Path | None = None,
    rewards: Path | None = None,
    output: Path | None = None,
    progress: Progress,
) -> TrainedPolicy:
    """Train a policy and write it to `output`, by default `fleet_dir/policy.safetensors`.

    An interrupted training goes on where it was last saved, if recipe, seed and inputs are the
    same. `init` is a policy to start from, with either kind of deadline (paper, Sec. 4.3.2).

    Raises:
        InputError: the recipe is unknown, or an input is missing, malformed or of another fleet.
    """
    chosen = _recipe(recipe)
    profile = profile or fleet_dir / "profile.parquet"
    rewards = rewards or fleet_dir / "rewards.parquet"
    fleet = load_fleet(fleet_dir)
    service = Service(fleet, load_latency(profile, fleet), load_rewards(rewards, fleet))
    start = _load_init(init, fleet) if init else None
    files = {"fleet": fleet_dir / "fleet.toml", "profile": profile, "rewards": rewards, "init": init}
    hashes = {what: sha256(path) for what, path in files.items() if path}
    identity = {"besteffort": __version__, "recipe": asdict(chosen), "seed": seed, "sha256": hashes}
    checkpoints = Checkpoints(fleet_dir / "train" / f"{recipe}-{seed}.safetensors", identity)
    trainer = Trainer(
        service,
        chosen,
        seed,
        init=(start.network, start.encoding) if start else None,
        checkpoints=checkpoints,
    )
    if trainer.resumed:
        progress.say(f"going on from iteration {trainer.training.iteration} of {checkpoints.path}")
    training = trainer.run(progress)
    facts = provenance(recipe_name=recipe, **identity, **_result(training))
    policy = TrainedPolicy(training.best, training.encoding, facts)
    save_policy(output or fleet_dir / "policy.safetensors", policy, fleet)
    write_atomically(fleet_dir / "train.png", lambda path: _plot(training, fleet, recipe, path))
    checkpoints.remove()
    return policy


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"{name!r} is no recipe: choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


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


def _result(training: Training) -> dict[str, object]:
    best = training.best_evaluation
    return {
        "iterations": training.iteration,
        "best_iteration": best.iteration,
        "evaluation_performance": best.performance,
        "evaluation_by_rate": best.by_rate,
        "evaluation_curve": [[e.iteration, e.performance] for e in training.curve],
        "wall_s": round(training.wall_s, 1),
    }


def _plot(training: Training, fleet: Fleet, recipe: str, path: Path) -> None:
    """The evaluation curve: the mean, and each arrival rate's."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    iterations = [evaluation.iteration for evaluation in training.curve]
    for rate in EVALUATION_RATES_PER_S:
        values = [evaluation.by_rate[f"{rate:g}"] for evaluation in training.curve]
        axes.plot(iterations, values, linewidth=0.8, label=f"{rate * fleet.rate_scale:g}/s")
    means = [evaluation.performance for evaluation in training.curve]
    axes.plot(iterations, means, color="black", marker="o", markersize=3, linewidth=2, label="mean")
    axes.axvline(training.best_evaluation.iteration, color="grey", linestyle=":", label="kept")
    axes.set_xlabel("training iteration")
    axes.set_ylabel("performance (share of the peak)")
    axes.set_title(f"{fleet.name}, recipe {recipe}: evaluation at steady arrival rates")
    axes.legend(title="arrival rate (requests/s)", fontsize="small", ncols=2)
    figure.savefig(path, format="png", dpi=120)
