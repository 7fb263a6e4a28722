"""What each part of the default training is worth: trained without it, three seeds, side by side.

Every variant meets the same held-out traces, on which tuned thresholds serve too; figures are means over
training seeds with the standard deviation between them. Run it with `make ablations`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from besteffort.arrivals import arrival_rates_per_s
from besteffort.artifacts.policy_file import TrainedPolicy, load_policy
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.artifacts.thresholds_file import load_thresholds
from besteffort.direct import DIRECT_RECIPES, DirectRecipe, DirectTrainer
from besteffort.direct.trainer import branching_on
from besteffort.environment import Service
from besteffort.fleet import load_fleet
from besteffort.gate import RATES_PER_S
from besteffort.observation import FleetEncoding
from besteffort.progress import Silent
from besteffort.request import Requests
from besteffort.simulator import ThresholdTrials
from besteffort.thresholds import ThresholdTable, smoothed_rates_per_s
from besteffort.workload import stable, unpredictable_1, unpredictable_2

FLEET_DIR = Path("artifacts/titan-rtx-opt")
FIRST_SEED = 700_000  # nothing trains, tunes or is compared elsewhere by these and the next ones
DEFAULT = DIRECT_RECIPES["default"]
SMALL = replace(DEFAULT, num_passes=1, num_unpredictable=4)
# A recipe, and whether tuned thresholds are what it begins with.
VARIANTS = {
    "the default recipe, from tuned thresholds": (DEFAULT, True),
    "without the mean of the passes": (replace(DEFAULT, with_mean=False), True),
    "from nothing": (DEFAULT, False),
    "small: one pass, a third of the unpredictable workloads": (SMALL, True),
    "small, without thresholds of its own for a calm fleet": (replace(SMALL, with_calm=False), True),
    "small, without highest batch sizes": (replace(SMALL, with_highest=False), True),
    "small, without a check on other workloads": (replace(SMALL, with_check=False), True),
    "small, without unpredictable workloads": (replace(SMALL, num_unpredictable=0), True),
    "small, from nothing": (SMALL, False),
    "each knot alone, nothing together": (replace(SMALL, num_passes=0), False),
}
COLUMNS = ("stable", "3/s", "48/s", "unpredictable 1", "unpredictable 2")


class HeldOut:
    """Traces that no training has seen, column by column."""

    def __init__(self, service: Service, num_traces: int) -> None:
        self.service, fleet = service, service.fleet
        seeds = range(FIRST_SEED, FIRST_SEED + num_traces)

        def steady(rate: float) -> list[Requests]:
            num = max(10, round(40.0 * rate))
            return [stable(fleet, np.random.default_rng(seed), rate, num_requests=num) for seed in seeds]

        self.traces = {f"{rate:g}/s": steady(rate) for rate in RATES_PER_S}
        for name, generate in (("unpredictable 1", unpredictable_1), ("unpredictable 2", unpredictable_2)):
            self.traces[name] = [generate(fleet, np.random.default_rng(seed)) for seed in seeds]

    def means(self, serve: Callable[[Requests], float]) -> dict[str, NDArray[np.float64]]:
        """Of each column by trace, shape `(traces,)`; `stable` is the mean of all steady rates."""
        with ThreadPoolExecutor(2) as pool:
            reached = {name: np.array(list(pool.map(serve, traces))) for name, traces in self.traces.items()}
        steady = [of_rate for name, of_rate in reached.items() if name.endswith("/s")]
        return reached | {"stable": np.mean(steady, axis=0)}


def by_network(policy: TrainedPolicy, service: Service) -> Callable[[Requests], float]:
    def serve(requests: Requests) -> float:
        assert isinstance(policy.encoding, FleetEncoding)
        branching = branching_on(requests, service, policy.encoding)
        branching.use(policy.network)
        return float(branching.serve()[0].mean())

    return serve


def by_thresholds(service: Service) -> Callable[[Requests], float]:
    table = _tuned(service)

    def serve(requests: Requests) -> float:
        rates = smoothed_rates_per_s(arrival_rates_per_s(requests.arrived_at), table.num_smoothed)
        trials = ThresholdTrials([requests], service.fleet, service.latency, service.values)
        return float(trials.worth(table.row_of(requests.task, rates)[None], table.rows)[0])

    return serve


def _tuned(service: Service) -> ThresholdTable:
    paths = {name: FLEET_DIR / f"{name}.parquet" for name in ("profile", "rewards")}
    return load_thresholds(FLEET_DIR / "thresholds.parquet", service.fleet, **paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--traces", type=int, default=10)
    parser.add_argument("--only", default="", help="variants whose names contain this")
    parser.add_argument("--policies", type=Path, nargs="+", default=[], help="one more row: these")
    options = parser.parse_args()
    fleet = load_fleet(FLEET_DIR)
    latency = load_latency(FLEET_DIR / "profile.parquet", fleet)
    service = Service(fleet, latency, load_rewards(FLEET_DIR / "rewards.parquet", fleet))
    held_out = HeldOut(service, options.traces)
    against = held_out.means(by_thresholds(service))
    _write(f"mean performance, {options.traces} held-out traces each", COLUMNS, "CPU s")
    _write("---", ["---"] * len(COLUMNS), "---")
    _write("tuned thresholds", [f"{against[column].mean():.4f}" for column in COLUMNS], "")
    if options.policies:
        _row("the policies given", [load_policy(path, fleet) for path in options.policies], held_out, against)
    for name, (recipe, from_tuned) in VARIANTS.items():
        if options.only in name:
            tuned = _tuned(service) if from_tuned else None
            policies = (_train(recipe, service, seed, tuned) for seed in range(options.seeds))
            _row(name, policies, held_out, against)


def _train(recipe: DirectRecipe, service: Service, seed: int, tuned: ThresholdTable | None) -> TrainedPolicy:
    training = DirectTrainer(service, recipe, seed, tuned=tuned).run(Silent())
    return TrainedPolicy(training.best, training.encoding, {})


def _row(
    name: str,
    policies: Iterable[TrainedPolicy],
    held_out: HeldOut,
    against: dict[str, NDArray[np.float64]],
) -> None:
    ahead, began_s = [], time.process_time()
    took_s = []
    for policy in policies:
        took_s.append(time.process_time() - began_s)
        reached = held_out.means(by_network(policy, held_out.service))
        ahead.append([reached[column].mean() - against[column].mean() for column in COLUMNS])
        began_s = time.process_time()
    means, spread = np.mean(ahead, axis=0), np.std(ahead, axis=0, ddof=min(1, len(ahead) - 1))
    cells = [f"{mean:+.4f} ± {std:.4f}" for mean, std in zip(means, spread, strict=True)]
    _write(name, cells, f"{np.mean(took_s):.0f}")


def _write(first: str, cells: Sequence[str], last: str) -> None:
    sys.stdout.write(f"| {' | '.join((first, *cells, last))} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
