"""`train`: a profile and rewards in, `policy.safetensors` and the plot of its evaluation curve out."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from besteffort.advantages import AdvantageRecipe, AdvantageTrainer, AdvantageTraining
from besteffort.artifacts.files import provenance, write_atomically
from besteffort.artifacts.policy_file import TrainedPolicy, save_policy
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.artifacts.thresholds_file import load_thresholds
from besteffort.direct import DirectRecipe, DirectTrainer, DirectTraining, curves_of_policy
from besteffort.dqn import Trainer
from besteffort.environment import Service
from besteffort.errors import GateError, InputError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.gate import Effort, Row, compare, verdict
from besteffort.observation import Encoding
from besteffort.policies import learned, load_named_policy
from besteffort.progress import Progress
from besteffort.stages.staleness import warn_if_stale
from besteffort.stages.training_setup import Setup
from besteffort.thresholds import ThresholdTable
from besteffort.trace import load_trace
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.curve import plot_curve
from besteffort.training.start import load_start, reading_the_fleets_state, reading_the_papers_state
from besteffort.training.state import Training
from besteffort.training.trace_parts import TrainingTrace
from besteffort.training.workloads import TrainingWorkloads

BASELINES = ("random", "round-robin", "least-loaded", "greedy", "slackfit", "thresholds")
AnyTraining = Training[Encoding] | AdvantageTraining | DirectTraining


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
    task_mix: str = "fleet",
    traces: Sequence[Path] = (),
    gate: Effort | None = None,
    show: Callable[[list[Row]], None] | None = None,
    progress: Progress,
) -> TrainedPolicy:
    """Train a policy and write it to `output`, by default `fleet_dir/policy.safetensors`.

    The plot of its evaluation curve goes beside it, as `<stem>.png`. An interrupted training goes on where
    it was last saved, if all that `Setup` names is the same. `init` is a policy to start from, with either
    kind of deadline (paper, Sec. 4.3.2). A policy that loses against a simpler one is written beside
    `output`, as `*.lost.safetensors`, unless `force`d. `deadline_margin` is the share of every deadline
    that training keeps back, for what the simulator does not know of the real service; policies are
    compared by the deadlines themselves. `task_mix` and `traces` say what training draws from beside
    random rates (`TrainingWorkloads`).

    Raises:
        InputError: the recipe is unknown, an input is missing, malformed or of another fleet, or the output
            cannot be written.
        GateError: the policy loses.
    """
    setup = Setup(fleet_dir, recipe, seed, init, profile, rewards, deadline_margin, task_mix, tuple(traces))
    setup.check()
    output = output or fleet_dir / "policy.safetensors"
    kept_at = fleet_dir / "train" / f"{recipe}-{seed}.safetensors"
    fleet = load_fleet(fleet_dir)
    latency = load_latency(setup.profile_path, fleet)
    warn_if_stale(setup.profile_path, fleet, progress)
    service = Service(fleet, latency, load_rewards(setup.rewards_path, fleet))
    workloads = TrainingWorkloads(fleet, task_mix, _load_traces(traces, fleet))
    start = load_start(init, fleet) if init else None
    _check_writable(output)
    _check_writable(kept_at)
    tuned = _tuned(setup, fleet)
    identity = setup.identity(tuned=tuned is not None)
    checkpoint = Checkpoint(kept_at, identity)
    with _saying_how_to_go_on(checkpoint, progress):
        training = _run(service, setup, start, tuned, workloads, checkpoint, progress)
        policy = TrainedPolicy(training.best, training.encoding, {})
        rows = _compare(policy, service, setup, workloads, output.stem, gate, progress)
    if show:
        show(rows)
    comparison = [row.to_dict() for row in rows]
    facts = provenance(**identity, **_result(training), comparison=comparison)
    policy = replace(policy, facts=facts)
    title = f"{fleet.name}, recipe {recipe}: evaluation at steady arrival rates"
    plot = partial(plot_curve, training, title, fleet.rate_scale)
    write_atomically(output.with_suffix(".png"), plot)
    _write(policy, fleet, rows, output, force, progress)
    kept_at.unlink(missing_ok=True)
    return policy


def _check_writable(path: Path) -> None:
    """Now, not after minutes of training."""
    if path.is_dir():
        raise UsageError(
            f"{path}: this is a folder; name a file in it, such as {path / 'policy.safetensors'}"
        )
    if path.suffix == ".png":
        raise UsageError(f"{path}: the plot of the training goes there; call the policy *.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written: {error.strerror}; free space there or choose another place"
        ) from None


def _load_traces(paths: Sequence[Path], fleet: Fleet) -> tuple[TrainingTrace, ...]:
    return tuple(TrainingTrace.of(path.stem, load_trace(path, fleet), fleet) for path in paths)


def _tuned(setup: Setup, fleet: Fleet) -> ThresholdTable | None:
    """Thresholds for this very fleet, profile and rewards, if there are any and the recipe looks at them."""
    if not isinstance(setup.chosen, DirectRecipe):
        return None
    try:
        return load_thresholds(
            setup.thresholds_path, fleet, profile=setup.profile_path, rewards=setup.rewards_path
        )
    except InputError:
        return None


def _with_margin(fleet: Fleet, deadline_margin: float) -> Fleet:
    """The same fleet with every deadline that much earlier."""
    tasks = tuple(
        task.model_copy(
            update={"deadline_ms_per_token": task.deadline_ms_per_token * (1.0 - deadline_margin)}
        )
        for task in fleet.tasks
    )
    return fleet.model_copy(update={"tasks": tasks})


def _run(
    service: Service,
    setup: Setup,
    start: TrainedPolicy | None,
    tuned: ThresholdTable | None,
    workloads: TrainingWorkloads,
    checkpoint: Checkpoint,
    progress: Progress,
) -> AnyTraining:
    stricter = _with_margin(service.fleet, setup.deadline_margin)
    trainer = _trainer(
        replace(service, fleet=stricter), setup, start, tuned, replace(workloads, fleet=stricter), checkpoint
    )
    if trainer.resumed:
        progress.say(f"going on from iteration {trainer.training.iteration} of {checkpoint.path}")
    return trainer.run(progress)


@contextmanager
def _saying_how_to_go_on(checkpoint: Checkpoint, progress: Progress) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        if checkpoint.load() is not None:
            progress.say(f"interrupted; the same command goes on from {checkpoint.path}")
        else:
            progress.say("interrupted before anything was kept; the same command begins anew")
        raise


def _trainer(
    service: Service,
    setup: Setup,
    start: TrainedPolicy | None,
    tuned: ThresholdTable | None,
    workloads: TrainingWorkloads,
    checkpoint: Checkpoint,
) -> Trainer | AdvantageTrainer | DirectTrainer:
    recipe, seed = setup.chosen, setup.seed
    if isinstance(recipe, DirectRecipe):
        curves = curves_of_policy(start) if start else None
        return DirectTrainer(
            service, recipe, seed, init=curves, tuned=tuned, checkpoint=checkpoint, workloads=workloads
        )
    if isinstance(recipe, AdvantageRecipe):
        seeing_more = reading_the_fleets_state(start) if start else None
        return AdvantageTrainer(
            service, recipe, seed, init=seeing_more, checkpoint=checkpoint, workloads=workloads
        )
    init = reading_the_papers_state(start) if start else None
    return Trainer(service, recipe, seed, init=init, checkpoint=checkpoint, workloads=workloads)


def _compare(
    policy: TrainedPolicy,
    service: Service,
    setup: Setup,
    workloads: TrainingWorkloads,
    name: str,
    effort: Effort | None,
    progress: Progress,
) -> list[Row]:
    """Against all baselines; tuned thresholds where they have been tuned for these very files."""
    recipe, fleet = setup.chosen, service.fleet
    effort = effort or Effort(num_seeds=recipe.gate_num_seeds, num_requests=recipe.gate_num_requests)
    makers = [partial(learned, policy, name=f"trained:{name}")]
    for baseline in (*(f"static:{model}" for model in fleet.model_names), *BASELINES):
        make = partial(
            load_named_policy,
            baseline,
            fleet,
            profile=setup.profile_path,
            rewards=setup.rewards_path,
            rng=np.random.default_rng(0),
        )
        try:
            make()
        except InputError as error:
            progress.say(f"not compared with {baseline}: {error}")
        else:
            makers.append(make)
    return compare(makers, service, effort, progress, workloads)


def _write(
    policy: TrainedPolicy, fleet: Fleet, rows: list[Row], output: Path, force: bool, progress: Progress
) -> None:
    told = verdict(rows)
    if told is not None and not force:
        lost = output.with_name(f"{output.stem}.lost.safetensors")
        save_policy(lost, policy, fleet)
        raise GateError(
            f"{output} is not written, since {told}; the policy is in {lost}: "
            "train longer or with another seed, or write it with --force"
        )
    if told is not None:
        progress.say(f"written although {told}")
    save_policy(output, policy, fleet)


def _result(training: AnyTraining) -> Mapping[str, object]:
    best = training.best_evaluation
    return {
        "iterations": training.iteration,
        "best_iteration": best.iteration,
        "evaluation_performance": best.performance,
        "evaluation_by_rate": best.by_rate,
        "evaluation_by_trace": best.by_trace,
        "evaluation_curve": [[e.iteration, e.performance] for e in training.curve],
        "wall_s": round(training.wall_s, 1),
    }
