"""The demo: every stage once on one fleet that is started once, and the policies side by side."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from besteffort.artifacts import files
from besteffort.artifacts.policy_file import load_policy
from besteffort.artifacts.profile_file import load_samples
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.engines.running import Engines, Urls, running_engines
from besteffort.errors import InputError
from besteffort.fleet import Fleet, load_fleet
from besteffort.profiling import doubts
from besteffort.progress import Progress
from besteffort.report import write_comparison
from besteffort.stages.profile import profile
from besteffort.stages.replay import Replay, replay
from besteffort.stages.score import score
from besteffort.stages.train import train
from besteffort.stages.training_setup import Setup
from besteffort.trace import save_trace
from besteffort.workload import generate_workload

SEED = 1
PROFILE_BUDGET_S = 100.0  # what a fit needs, and some of what refines it
NUM_DOCUMENTS = 20  # of each task, scored: enough to see it work
# Unpredictable-2 (paper, App. B) with the rate drawn anew so often that a minute sees many rates.
NUM_REQUESTS = 240
# The client and the router run on the engines' cores, and the profile knows nothing of them.
DEADLINE_MARGIN = 0.15
REQUESTS_PER_RATE = 24


@dataclass(frozen=True)
class Demo:
    """Where the demo reads and writes; what is there already and still fits is used again."""

    fleet_dir: Path
    rewards: Path  # that routing uses; those of random weights say nothing
    data_dir: Path | None  # local evaluation files; None: lm-eval takes them from the hub
    trace: Path
    fresh: bool  # measure and train anew, whatever is there

    @property
    def profile(self) -> Path:
        return self.fleet_dir / "profile.parquet"

    @property
    def measured_rewards(self) -> Path:
        return self.fleet_dir / "rewards.parquet"

    @property
    def policy(self) -> Path:
        return self.fleet_dir / "policy.safetensors"

    @property
    def comparison(self) -> Path:
        return self.fleet_dir / "replays" / "demo"


def run_demo(demo: Demo, progress: Progress) -> list[dict[str, Any]]:
    """Profile, score, train, serve and replay; returns a summary per policy, the trained one first.

    Raises:
        InputError: the fleet or the rewards cannot be used.
        EngineError: an engine or the router failed.
    """
    fleet = load_fleet(demo.fleet_dir)
    load_rewards(demo.rewards, fleet)
    _make_trace(demo, fleet, progress)
    with running_engines(fleet, demo.fleet_dir, {}, progress) as engines:
        attached = _urls(fleet, engines)
        _profile(demo, attached, progress)
        _score(demo, fleet, attached, progress)
        _train(demo, fleet, progress)
        policies = [str(demo.policy), *(f"static:{name}" for name in fleet.model_names), "greedy"]
        summaries = [_replay(demo, policy, attached, progress) for policy in policies]
    write_comparison(demo.comparison, summaries, {"stage": "demo", "seed": SEED})
    return summaries


def _urls(fleet: Fleet, engines: Engines) -> Urls:
    return {
        name: [engine.url for engine in of_model]
        for name, of_model in zip(fleet.model_names, engines, strict=True)
    }


def _make_trace(demo: Demo, fleet: Fleet, progress: Progress) -> None:
    requests = generate_workload(
        "unpredictable-2",
        fleet,
        np.random.default_rng(SEED),
        num_requests=NUM_REQUESTS,
        requests_per_rate=REQUESTS_PER_RATE,
    )
    facts = {"workload": "unpredictable-2", "seed": SEED, "requests_per_rate": REQUESTS_PER_RATE}
    save_trace(demo.trace, requests, fleet.task_names, facts)
    progress.say(f"wrote {demo.trace}: {len(requests)} requests over {requests.arrived_at[-1]:.0f} s")


def _profile(demo: Demo, attached: Urls, progress: Progress) -> None:
    if not demo.fresh and _is_of_fleet(demo):
        progress.say(f"{demo.profile}: measured before on this fleet; used again")
        return
    profile(
        demo.fleet_dir,
        output=demo.profile,
        attached=attached,
        budget_s=PROFILE_BUDGET_S,
        progress=progress,
    )


def _is_of_fleet(demo: Demo) -> bool:
    fleet_toml = demo.fleet_dir / "fleet.toml"
    try:
        _, facts = load_samples(demo.profile)
    except InputError:
        return False
    if facts.get("fleet_sha256") != files.sha256(fleet_toml):
        return False
    return not doubts(demo.profile, facts, load_fleet(demo.fleet_dir))


def _score(demo: Demo, fleet: Fleet, attached: Urls, progress: Progress) -> None:
    """Show that scoring works; where no documents are to be had the rest goes on without it."""
    if not demo.fresh and demo.measured_rewards.exists():
        progress.say(f"{demo.measured_rewards}: scored before; used again")
        return
    try:
        score(
            demo.fleet_dir,
            output=demo.measured_rewards,
            data_dir=demo.data_dir,
            limit=NUM_DOCUMENTS,
            given=None,
            attached=attached,
            progress=progress,
        )
    except InputError as error:
        if demo.data_dir is not None:
            raise
        progress.say(f"scoring is left out: {error}")
    if any(model.architecture is not None for model in fleet.models):
        progress.say(f"routing uses {demo.rewards} instead: the paper's Table 1")


def _train(demo: Demo, fleet: Fleet, progress: Progress) -> None:
    if not demo.fresh and _is_trained_as_now(demo, fleet):
        progress.say(f"{demo.policy}: trained before on these inputs and by this recipe; used again")
        return
    setup = _training(demo)
    train(
        demo.fleet_dir,
        recipe=setup.recipe,
        seed=setup.seed,
        profile=setup.profile,
        rewards=setup.rewards,
        output=demo.policy,
        deadline_margin=setup.deadline_margin,
        force=True,  # a small training on a noisy profile may lose; the demo shows what it does
        progress=progress,
    )


def _training(demo: Demo) -> Setup:
    return Setup(
        demo.fleet_dir,
        recipe="demo",
        seed=SEED,
        profile=demo.profile,
        rewards=demo.rewards,
        deadline_margin=DEADLINE_MARGIN,
    )


def _is_trained_as_now(demo: Demo, fleet: Fleet) -> bool:
    """On the same inputs, by the same recipe, seed, margin and version."""
    try:
        facts = load_policy(demo.policy, fleet).facts
    except InputError:
        return False
    identity = json.loads(json.dumps(_training(demo).identity()))
    return all(facts.get(name) == value for name, value in identity.items())


def _replay(demo: Demo, policy: str, attached: Urls, progress: Progress) -> dict[str, Any]:
    spec = Replay(
        trace=demo.trace,
        fleet_dir=demo.fleet_dir,
        policy=policy,
        profile=demo.profile,
        rewards=demo.rewards,
        attached=attached,
        seed=SEED,
    )
    summary, _ = replay(spec, progress)
    return summary
