"""`make bench-decision` in its short form, and that a decision's work hardly grows with the fleet."""

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, SupportsIndex

import numpy as np
import pytest

from besteffort.engines.running import Engine
from besteffort.fleet import load_fleet
from besteffort.router import Dispatcher
from besteffort.router.loads import Loads
from tests.benchmarks.decision import FLEET_DIR, POLICIES, policy_of
from tests.benchmarks.simulator import enlarged
from tests.conftest import ROOT


def test_the_benchmark_of_decisions_has_a_figure_in_every_place_with_10_and_1000_replicas() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.decision", "--short", "--usual-priority"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ended.returncode == 0, ended.stderr
    rows = [(line[:24].strip(), line[24:].split()) for line in ended.stdout.splitlines()[3:-1]]
    assert [(name, figures[0]) for name, figures in rows] == [
        (name, number) for name in POLICIES for number in ("10", "1,000")
    ]
    for name, (number, *figures) in rows:
        assert len(figures) == 8, name
        assert all(float(figure) >= 0 for figure in figures), name
        growth, log_growth = map(float, figures[-2:])
        assert log_growth == (1.0 if number == "10" else 3.0)
        assert growth > 0


class Counted(list[Any]):
    """A list that counts how often one of its entries is read or written."""

    num_touched = 0

    def __getitem__(self, index: Any) -> Any:
        Counted.num_touched += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
        return super().__getitem__(index)

    def __setitem__(self, index: SupportsIndex | slice, value: Any) -> None:
        Counted.num_touched += 1
        super().__setitem__(index, value)

    def __iter__(self) -> Iterator[Any]:
        for entry in super().__iter__():
            Counted.num_touched += 1
            yield entry


def counted(nested: Sequence[Any]) -> Counted:
    return Counted(counted(entry) if isinstance(entry, list) else entry for entry in nested)


def count_in(loads: Loads) -> None:
    """Every list that is as long as there are replicas or devices, in the counts and in what orders them."""
    for one in (loads, *loads._orders):
        for name, value in vars(one).items():
            if isinstance(value, list):
                setattr(one, name, value if name == "_orders" else counted(value))


def most_touched(num_replicas: int) -> int:
    """Entries that one decision or one end of a request touched at most, of many at random places."""
    fleet = enlarged(load_fleet(FLEET_DIR), num_replicas)
    assert sum(model.replicas for model in fleet.models) == num_replicas
    engine = Engine("http://127.0.0.1:8001", "any")
    engines = tuple((engine,) * model.replicas for model in fleet.models)
    dispatcher = Dispatcher(fleet, policy_of("slackfit", load_fleet(FLEET_DIR)), engines)
    rng, running, most = np.random.default_rng(0), [], 0
    for pinned in range(len(fleet.models)):
        running += [dispatcher.begin(0, pinned) for _ in range(num_replicas)]
    count_in(dispatcher._loads)
    for task in rng.integers(len(fleet.tasks), size=500).tolist():
        Counted.num_touched = 0
        begun = dispatcher.begin(task)
        most, Counted.num_touched = max(most, Counted.num_touched), 0
        nth = int(rng.integers(len(running)))
        ended, running[nth] = running[nth], begun
        dispatcher.end(ended)
        most = max(most, Counted.num_touched)
    return most


@pytest.mark.parametrize("num_replicas", [100, 1000, 10_000])
def test_the_work_of_a_decision_grows_no_faster_than_the_logarithm_of_the_number_of_replicas(
    num_replicas: int,
) -> None:
    few, many = most_touched(10), most_touched(num_replicas)
    assert 0 < few <= many
    assert many / few <= math.log(num_replicas) / math.log(10)
