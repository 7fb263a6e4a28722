"""`paper`: a fleet's profile, rewards and three policies in; the paper's figures and tables out."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from besteffort.artifacts.files import sha256, write_text
from besteffort.artifacts.policy_file import load_policy
from besteffort.artifacts.profile_file import load_latency, load_samples
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.artifacts.thresholds_file import load_thresholds
from besteffort.fleet import Fleet, load_fleet
from besteffort.paper import Effort, run_experiments, write_pages
from besteffort.paper.experiments import Inputs
from besteffort.paper.page import Context
from besteffort.paper.variants import HARD, SOFT, as_toml, check_tasks, variants
from besteffort.progress import Progress
from besteffort.stages.train import train
from besteffort.thresholds import ThresholdTable


def run_paper(
    fleet_dir: Path, *, docs_dir: Path | None = None, effort: Effort | None = None, progress: Progress
) -> list[Path]:
    """Run all experiments and write the pages; returns their paths.

    Raises:
        InputError: the fleet is not one for the paper's tasks, or a file is missing or malformed.
    """
    effort = effort or Effort()
    fleet = load_fleet(fleet_dir)
    check_tasks(fleet)
    profile, rewards = fleet_dir / "profile.parquet", fleet_dir / "rewards.parquet"
    paths = {name: policy_path(fleet_dir, name) for name in variants(fleet)}
    policies = {name: load_policy(paths[name], variant) for name, variant in variants(fleet).items()}
    table = _tuned(fleet_dir, variants(fleet)[HARD], progress)
    inputs = Inputs(
        fleet=fleet,
        latency=load_latency(profile, fleet),
        rewards=load_rewards(rewards, fleet),
        policies=policies,
        table=table,
    )
    experiments = run_experiments(inputs, effort, progress)
    hashes = {path.name: sha256(path) for path in (profile, rewards, *paths.values())}
    context = Context(
        fleet=fleet,
        rewards=inputs.rewards,
        effort=effort,
        profile_source=_source(profile),
        policies=policies,
        facts={"stage": "paper", "fleet": fleet.name, **asdict(effort), "sha256": hashes},
    )
    return write_pages(fleet_dir / "paper", docs_dir, experiments, context)


def policy_path(fleet_dir: Path, name: str) -> Path:
    """Of the policy for a variant of the fleet: hard, soft or different deadlines."""
    return fleet_dir / "policies" / f"{name}.safetensors"


def _tuned(fleet_dir: Path, fleet: Fleet, progress: Progress) -> ThresholdTable | None:
    path = fleet_dir / "thresholds.parquet"
    if not path.exists():
        progress.say(f"no {path}, so thresholds are left out: `besteffort tune {fleet_dir}` makes them")
        return None
    return load_thresholds(
        path, fleet, profile=fleet_dir / "profile.parquet", rewards=fleet_dir / "rewards.parquet"
    )


def _source(profile: Path) -> str:
    samples, _ = load_samples(profile)
    return "modelled" if any(sample.source == "modelled" for sample in samples) else "measured"


def train_paper(
    fleet_dir: Path, *, recipe: str | None = None, seed: int = 0, progress: Progress
) -> list[Path]:
    """Train the three policies of the experiments; the soft one begins as the hard one (Sec. 4.3.2).

    Raises:
        InputError: the fleet is not one for the paper's tasks, or an input is missing or malformed.
    """
    fleet = load_fleet(fleet_dir)
    check_tasks(fleet)
    fleets: Mapping[str, Fleet] = variants(fleet)
    run = train if recipe is None else partial(train, recipe=recipe)
    for name, variant in fleets.items():
        progress.say(f"{name}: {policy_path(fleet_dir, name)}")
        workplace = fleet_dir / "train-paper" / name
        write_text(workplace / "fleet.toml", as_toml(variant))
        run(
            workplace,
            seed=seed,
            init=policy_path(fleet_dir, HARD) if name == SOFT else None,
            profile=fleet_dir / "profile.parquet",
            rewards=fleet_dir / "rewards.parquet",
            output=policy_path(fleet_dir, name),
            force=True,  # the page shows where it loses
            progress=progress,
        )
    return [policy_path(fleet_dir, name) for name in fleets]
