"""`tune`: a profile and rewards in, `thresholds.parquet` out."""

import time
from pathlib import Path

from besteffort.artifacts.files import sha256
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.artifacts.thresholds_file import save_thresholds
from besteffort.fleet import load_fleet
from besteffort.progress import Progress
from besteffort.tuning import Effort, Tuned, tune_thresholds


def tune(
    fleet_dir: Path,
    *,
    seed: int = 0,
    profile: Path | None = None,
    rewards: Path | None = None,
    output: Path | None = None,
    effort: Effort | None = None,
    progress: Progress,
) -> Tuned:
    """Tune the thresholds and write them to `output`, by default `fleet_dir/thresholds.parquet`.

    Raises:
        InputError: an input is missing, malformed or of another fleet.
    """
    profile = profile or fleet_dir / "profile.parquet"
    rewards = rewards or fleet_dir / "rewards.parquet"
    fleet = load_fleet(fleet_dir)
    latency, worths = load_latency(profile, fleet), load_rewards(rewards, fleet)
    began_at = time.monotonic()
    tuned = tune_thresholds(fleet, latency, worths, seed=seed, effort=effort, progress=progress)
    facts = {
        "stage": "tune",
        "seed": seed,
        "fleet_sha256": sha256(fleet_dir / "fleet.toml"),
        "worth_by_band": tuned.worth_by_band,
        "worth": tuned.worth,
        "wall_s": round(time.monotonic() - began_at, 1),
    }
    path = output or fleet_dir / "thresholds.parquet"
    save_thresholds(path, tuned.table, fleet, profile=profile, rewards=rewards, facts=facts)
    return tuned
