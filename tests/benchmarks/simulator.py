"""How many routing decisions the simulator makes in a second, by the number of replicas.

`make bench-simulator` runs it. All sizes of the fleet `titan-rtx-opt` run side by side, in turns, and the
best of each counts, so that what else the machine does meanwhile hits all alike; time is that of the CPU
for this process. Everything is on: interference, prefill, waiting, differing lengths, deadlines;
thresholds decide.
"""

import sys
import time
from pathlib import Path

import numpy as np

from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.fleet import Fleet, load_fleet
from besteffort.latency import Latency
from besteffort.rewards import Rewards
from besteffort.simulator import ThresholdTrials
from besteffort.workload import stable

FLEET_DIR = Path(__file__).parents[2] / "artifacts" / "titan-rtx-opt"
NUM_REPLICAS = (12, 120, 1200, 10_000)
RATE_PER_S = 24.0  # with 12 replicas; more of them get more
NUM_REQUESTS = 100_000  # at least; and 100 for each replica, so that all fleets fill up
NUM_TURNS = 5
MAX_BATCH_SIZES = (40.0, 7.0)  # thresholds of the middle and the largest model


def enlarged(fleet: Fleet, num_replicas: int) -> Fleet:
    """The same models and tasks with as many replicas as wanted, and GPUs and traffic for these.

    Where they cannot be dealt out evenly, the smaller models have one more.
    """
    each, over = divmod(num_replicas, len(fleet.models))
    models = tuple(
        model.model_copy(update={"replicas": each + (nth < over)}) for nth, model in enumerate(fleet.models)
    )
    scale = fleet.rate_scale * num_replicas / 12
    num_gpus = models[0].replicas
    return fleet.model_copy(update={"models": models, "num_gpus": num_gpus, "rate_scale": scale})


def trials_of(fleet: Fleet, latency: Latency, rewards: Rewards) -> tuple[ThresholdTrials, np.ndarray]:
    num_replicas = sum(model.replicas for model in fleet.models)
    num_requests = max(NUM_REQUESTS, 100 * num_replicas)
    workload = stable(fleet, np.random.default_rng(0), RATE_PER_S, num_requests=num_requests)
    return ThresholdTrials([workload], fleet, latency, rewards.relative), workload.task[None]


def main() -> None:
    fleet = load_fleet(FLEET_DIR)
    latency = load_latency(FLEET_DIR / "profile.parquet", fleet)
    rewards = load_rewards(FLEET_DIR / "rewards.parquet", fleet)
    rows = np.tile(MAX_BATCH_SIZES, (len(fleet.tasks), 1))
    fleets = [trials_of(enlarged(fleet, number), latency, rewards) for number in NUM_REPLICAS]
    took_s = np.full((NUM_TURNS + 1, len(fleets)), np.inf)
    for turn in range(NUM_TURNS + 1):  # the first compiles, and does not count
        for size, (trials, row) in enumerate(fleets):
            began_at = time.process_time()
            trials.worth(row, rows)
            took_s[turn, size] = (time.process_time() - began_at) / row.size
    best_us = took_s[1:].min(axis=0) * 1e6
    out = sys.stdout.write
    out("Simulator, one core, every feature on: routing decisions per second by fleet size\n")
    out("replicas  decisions/s  us each   cost vs 12   log(replicas) vs log(12)\n")
    for number, each_us in zip(NUM_REPLICAS, best_us, strict=True):
        growth, log_growth = each_us / best_us[0], np.log(number) / np.log(NUM_REPLICAS[0])
        out(f"{number:8,}  {1e6 / each_us:11,.0f}  {each_us:7.2f}  {growth:11.2f}  {log_growth:25.2f}\n")


if __name__ == "__main__":
    main()
