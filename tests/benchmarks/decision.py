"""How long the router takes to decide, by policy and number of replicas.

`make bench-decision` runs it. A decision is all of `Dispatcher.begin`: from reading the clock at the arrival
to having the replica, the request counted. It is taken in the form that `serve` uses, with garbage collection
on and the body of a request read and written before each, so that caches are no warmer than there. All
policies and sizes of the fleet `titan-rtx-opt` run side by side, in turns, and the median turn counts.

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
NUM_REPLICAS = (12, 120, 1200, 12_000)
IN_FLIGHT_PER_REPLICA = 2
NUM_TURNS = 7
DECISIONS_PER_TURN = 2000  # so many that the first ones, for which the caches are cold, are few
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

    def turn(self) -> NDArray[np.float64]:
        """Seconds that beginning, choosing and ending took, shape `(3, DECISIONS_PER_TURN)`."""
        self._policy.took_s.clear()
        ending = self._rng.integers(len(self._running), size=DECISIONS_PER_TURN).tolist()
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


def loop_turn() -> NDArray[np.float64]:
    """Seconds that a loop of about the same length took."""
    took = np.zeros(DECISIONS_PER_TURN)
    for nth in range(DECISIONS_PER_TURN):
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
    priority = take_priority(not parser.parse_args().usual_priority)
    turns, loops = measure(load_fleet(FLEET_DIR))
    out = sys.stdout.write
    out(f"Decisions by Dispatcher.begin, us, {priority}: medians of {NUM_TURNS} turns\n")
    out("                                    decision       choice alone   end of a request   p50   log(n)\n")
    out("policy                    replicas   p50    p99      p50    p99      p50    p99     vs 12   vs 12\n")
    for (name, number), times in turns.items():
        (begin, begin99), (choice, choice99), (end, end99) = median_us(times)
        growth = begin / median_us(turns[name, NUM_REPLICAS[0]])[0][0]
        log_growth = np.log(number) / np.log(NUM_REPLICAS[0])
        out(
            f"{name:24}  {number:8,}  {begin:5.1f}  {begin99:5.1f}    {choice:5.1f}  {choice99:5.1f}    "
            f"{end:5.1f}  {end99:5.1f}     {growth:5.2f}   {log_growth:5.2f}\n"
        )
    loop, loop99 = median_us(loops)[0]
    out(f"{'(an empty loop)':24}            {loop:5.1f}  {loop99:5.1f}\n")


def measure(fleet: Fleet) -> tuple[dict[tuple[str, int], NDArray[np.float64]], NDArray[np.float64]]:
    """Seconds by policy and size, and those of the empty loop, shape `(turns, columns, decisions)`."""
    keys = list(itertools.product(POLICIES, NUM_REPLICAS))
    cases = {key: Case(fleet, *key) for key in keys}
    turns = {key: np.zeros((NUM_TURNS, 3, DECISIONS_PER_TURN)) for key in keys}
    loops = np.zeros((NUM_TURNS, 1, DECISIONS_PER_TURN))
    for case in cases.values():  # the first warms up, and does not count
        case.turn()
    for turn in range(NUM_TURNS):
        loops[turn, 0] = loop_turn()
        for key, case in cases.items():
            turns[key][turn] = case.turn()
    return turns, loops


def median_us(times: NDArray[np.float64]) -> list[tuple[float, float]]:
    """The median turn's p50 and p99, for each column of `(turns, columns, decisions)`."""
    p50, p99 = (np.median(np.percentile(times, q, axis=2), axis=0) * 1e6 for q in (50, 99))
    return list(zip(p50.tolist(), p99.tolist(), strict=True))


if __name__ == "__main__":
    main()
