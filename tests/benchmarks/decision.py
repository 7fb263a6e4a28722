"""How long the router takes to decide, by policy and number of replicas.

`make bench-decision` runs it. A decision is all of `Dispatcher.begin`: from reading the clock at the arrival
to having the replica, the request counted. It is taken in the form that `serve` uses, with garbage collection
on and the body of a request read and written before each, so that caches are no warmer than there. All
policies and sizes of the fleet `titan-rtx-opt` run side by side, in turns, and the median turn counts. Beside
how much longer a decision takes than in the smallest fleet is by how much the logarithm of the size grew.

What the machine itself adds is in the row of a loop that does nothing. It adds less at real-time priority,
which is taken for these seconds where the system allows it; `--usual-priority` leaves it as it is.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import besteffort.stages.serve  # noqa: F401  # the garbage collector walks what it walks in `serve`
from besteffort.artifacts.policy_file import TrainedPolicy
from besteffort.engines.running import Engine
from besteffort.fleet import Fleet, load_fleet
from besteffort.observation import Encoding, Observation
from besteffort.policies import Policy, learned, load_named_policy
from besteffort.q_network import QNetwork
from besteffort.router import Dispatcher
from besteffort.router.dispatcher import Route
from tests.benchmarks.simulator import enlarged

FLEET_DIR = Path(__file__).parents[2] / "artifacts" / "titan-rtx-opt"
NUM_REPLICAS = (10, 12, 120, 1000, 1200, 12_000)
IN_FLIGHT_PER_REPLICA = 2
NUM_TURNS = 7
NUM_DECISIONS = 2000  # a turn: so many that the first ones, for which the caches are cold, are few
TRAINED, PAPER = "trained, default recipe", "trained, paper's 2 x 256"
POLICIES = (TRAINED, PAPER, "thresholds", "greedy", "slackfit", "static:opt-6.7b")
BODY = json.dumps({"model": "besteffort/copa", "prompt": "word " * 300, "max_tokens": 200, "stream": True})


def policy_of(name: str, fleet: Fleet) -> Policy:
    if name == PAPER:  # with drawn weights: any take as long
        rng, sizes = np.random.default_rng(0), tuple(itertools.pairwise((8, 256, 256, 3)))
        weights = tuple((rng.normal(size=size) / np.sqrt(size[0])).astype(np.float32) for size in sizes)
        biases = tuple(np.zeros(size[1], dtype=np.float32) for size in sizes)
        return learned(TrainedPolicy(QNetwork(weights, biases), Encoding(4, 3, 8.0, 24.0), {}), name)
    return load_named_policy(
        str(FLEET_DIR / "policies" / "hard.safetensors") if name == TRAINED else name,
        fleet,
        profile=FLEET_DIR / "profile.parquet",
        rewards=FLEET_DIR / "rewards.parquet",
        rng=np.random.default_rng(0),
    )


@dataclass
class Timed:
    """A policy, and how long each of its choices took."""

    policy: Policy
    took_s: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.policy.name

    def choose(self, observation: Observation) -> int:
        began_at = time.perf_counter()
        model = self.policy.choose(observation)
        self.took_s.append(time.perf_counter() - began_at)
        return model


class Case:
    """A dispatcher with requests in flight, of which one ends whenever one begins."""

    def __init__(self, fleet: Fleet, name: str, num_replicas: int) -> None:
        fleet = enlarged(fleet, num_replicas)
        self._policy = Timed(policy_of(name, load_fleet(FLEET_DIR)))
        engine = Engine("http://127.0.0.1:8001", "any")
        engines = tuple((engine,) * model.replicas for model in fleet.models)
        self._dispatcher = Dispatcher(fleet, self._policy, engines)
        self._num_tasks = len(fleet.tasks)
        self._rng = np.random.default_rng(0)
        pinned = itertools.cycle(range(len(fleet.models)))
        number = IN_FLIGHT_PER_REPLICA * num_replicas
        self._running = [self._dispatcher.begin(0, next(pinned)) for _ in range(number)]

    def turn(self, num_decisions: int) -> NDArray[np.float64]:
        """Seconds that beginning, choosing and ending took, shape `(3, num_decisions)`."""
        self._policy.took_s.clear()
        ending = self._rng.integers(len(self._running), size=num_decisions).tolist()
        took = [self._replace(nth, task % self._num_tasks) for task, nth in enumerate(ending)]
        begins, ends = zip(*took, strict=True)
        return np.array([begins, self._policy.took_s, ends])

    def _replace(self, nth: int, task: int) -> tuple[float, float]:
        json.dumps(json.loads(BODY))
        began_at = time.perf_counter()
        route: Route = self._dispatcher.begin(task)
        begun_at = time.perf_counter()
        ended, self._running[nth] = self._running[nth], route
        ending_at = time.perf_counter()
        self._dispatcher.end(ended)
        return begun_at - began_at, time.perf_counter() - ending_at


def loop_turn(num_decisions: int) -> NDArray[np.float64]:
    """Seconds that a loop of about the same length took."""
    took = np.zeros(num_decisions)
    for nth in range(num_decisions):
        json.dumps(json.loads(BODY))
        began_at = time.perf_counter()
        for _ in range(700):
            pass
        took[nth] = time.perf_counter() - began_at
    return took


def take_priority(wanted: bool) -> str:
    """Ask not to be interrupted by other processes; what came of it, in words."""
    try:
        if wanted:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
            return "at real-time priority"
    except (AttributeError, PermissionError):
        pass
    return f"at the usual priority, load {os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--usual-priority", action="store_true")
    parser.add_argument("--short", action="store_true", help="two sizes, few decisions: figures of no worth")
    options = parser.parse_args()
    priority = take_priority(not options.usual_priority)
    turns, loops = measure(SHORT if options.short else FULL)
    sys.stdout.write(f"Decisions by Dispatcher.begin, us, {priority}: medians of {len(loops)} turns\n")
    sys.stdout.write(table(turns, loops))


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    num_replicas: tuple[int, ...]  # from the smallest fleet on
    num_turns: int
    num_decisions: int  # a turn


FULL, SHORT = Extent(NUM_REPLICAS, NUM_TURNS, NUM_DECISIONS), Extent((10, 1000), 1, 20)
Turns = dict[tuple[str, int], NDArray[np.float64]]  # by policy and size


def measure(extent: Extent) -> tuple[Turns, NDArray[np.float64]]:
    """Seconds, and those of the empty loop, shape `(turns, columns, decisions)`."""
    fleet, number = load_fleet(FLEET_DIR), extent.num_decisions
    keys = list(itertools.product(POLICIES, extent.num_replicas))
    cases = {key: Case(fleet, *key) for key in keys}
    turns = {key: np.zeros((extent.num_turns, 3, number)) for key in keys}
    loops = np.zeros((extent.num_turns, 1, number))
    for case in cases.values():  # the first warms up, and does not count
        case.turn(number)
    for turn in range(extent.num_turns):
        loops[turn, 0] = loop_turn(number)
        for key, case in cases.items():
            turns[key][turn] = case.turn(number)
    return turns, loops


def table(turns: Turns, loops: NDArray[np.float64]) -> str:
    smallest = min(number for _, number in turns)
    against = f"vs {smallest}"
    lines = [
        "                                    decision       choice alone   end of a request   p50   log(n)",
        "policy                    replicas   p50    p99      p50    p99      p50    p99   "
        f"{against:>7} {against:>7}",
    ]
    for (name, number), times in turns.items():
        (begin, begin99), (choice, choice99), (end, end99) = median_us(times)
        growth = begin / median_us(turns[name, smallest])[0][0]
        log_growth = np.log(number) / np.log(smallest)
        lines.append(
            f"{name:24}  {number:8,}  {begin:5.1f}  {begin99:5.1f}    {choice:5.1f}  {choice99:5.1f}    "
            f"{end:5.1f}  {end99:5.1f}     {growth:5.2f}   {log_growth:5.2f}"
        )
    loop, loop99 = median_us(loops)[0]
    lines.append(f"{'(an empty loop)':24}            {loop:5.1f}  {loop99:5.1f}")
    return "".join(f"{line}\n" for line in lines)


def median_us(times: NDArray[np.float64]) -> list[tuple[float, float]]:
    """The median turn's p50 and p99, for each column of `(turns, columns, decisions)`."""
    p50, p99 = (np.median(np.percentile(times, q, axis=2), axis=0) * 1e6 for q in (50, 99))
    return list(zip(p50.tolist(), p99.tolist(), strict=True))


if __name__ == "__main__":
    main()
