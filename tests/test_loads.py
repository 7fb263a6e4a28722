"""What is in flight where, against counts taken anew each time."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.router.loads import Loads, Standing

NUM_REPLICAS = (5, 1, 11)  # few, and many
REPLICAS = [(model, replica) for model, number in enumerate(NUM_REPLICAS) for replica in range(number)]


class Naive:
    def __init__(self, num_devices: int) -> None:
        self.in_flight = [[0] * number for number in NUM_REPLICAS]
        self.standings = dict.fromkeys(REPLICAS, Standing.UP)
        self.num_devices = num_devices

    def least(self, model: int) -> int:
        def rank(replica: int) -> tuple[int, int, int]:
            return self.standings[model, replica], self.in_flight[model][replica], replica

        return min(range(NUM_REPLICAS[model]), key=rank)

    def is_up(self, model: int, replica: int) -> bool:
        return self.standings[model, replica] is Standing.UP

    def batch_size(self, model: int) -> float:
        counts = list(enumerate(self.in_flight[model]))
        up = [count for replica, count in counts if self.is_up(model, replica)]
        return float(np.mean(up or self.in_flight[model]))

    def neighbours(self, model: int) -> list[int]:
        replica = self.least(model)
        device = replica % self.num_devices
        row = [
            sum(count for other, count in enumerate(counts) if other % self.num_devices == device)
            for counts in self.in_flight
        ]
        row[model] = self.in_flight[model][replica]
        return row

    @property
    def closed(self) -> tuple[int, ...]:
        return tuple(m for m, n in enumerate(NUM_REPLICAS) if not any(self.is_up(m, r) for r in range(n)))


def assert_same(loads: Loads, naive: Naive) -> None:
    models = range(len(NUM_REPLICAS))
    assert loads.in_flight == naive.in_flight
    assert [loads.least[model] for model in models] == [naive.least(model) for model in models]
    best = [
        min(naive.standings[model, replica] for replica in range(NUM_REPLICAS[model])) for model in models
    ]
    assert [loads.best(model) for model in models] == best
    assert loads.closed == naive.closed
    batch_sizes, neighbours = loads.seen()
    np.testing.assert_array_equal(batch_sizes, [naive.batch_size(model) for model in models])
    np.testing.assert_array_equal(neighbours, [naive.neighbours(model) for model in models])


@settings(deadline=None)  # the machine may be busy
@given(
    num_devices=st.sampled_from([1, 2, 4, 7]),
    steps=st.lists(
        st.tuples(st.sampled_from(["more", "least", "less", *Standing]), st.sampled_from(REPLICAS))
    ),
)
def test_every_step_leaves_what_a_count_of_everything_gives(
    num_devices: int, steps: list[tuple[str | Standing, tuple[int, int]]]
) -> None:
    loads, naive = Loads(NUM_REPLICAS, num_devices), Naive(num_devices)
    for what, (model, replica) in steps:
        if isinstance(what, Standing):
            naive.standings[model, replica] = what
            loads.stand(model, replica, what)
        elif what != "less" or naive.in_flight[model][replica] > 0:
            place = naive.least(model) if what == "least" else replica
            change = -1 if what == "less" else 1
            naive.in_flight[model][place] += change
            loads.add(model, place, change)
        assert_same(loads, naive)
    for model, replica in REPLICAS:
        loads.add(model, replica, -naive.in_flight[model][replica])
        loads.stand(model, replica, Standing.UP)
    assert_same(loads, Naive(num_devices))


def test_what_a_replica_took_while_it_was_down_counts_when_it_is_back() -> None:
    loads = Loads((2,), 1)
    loads.stand(0, 0, Standing.SUSPECT)
    loads.add(0, 0, 6)
    assert loads.seen()[0] == [0.0]
    loads.stand(0, 0, Standing.UP)
    assert loads.seen()[0] == [3.0]
    assert loads.least[0] == 1


def test_what_was_seen_stays_as_it_was_seen_until_somebody_looks_again() -> None:
    loads = Loads((2,), 1)
    batch_sizes, neighbours = loads.seen()
    loads.add(0, 0, 1)
    loads.add(0, 1, 1)
    assert (batch_sizes.item(), neighbours.item()) == (0.0, 0.0)
    loads.seen()
    assert (batch_sizes.item(), neighbours.item()) == (1.0, 1.0)
