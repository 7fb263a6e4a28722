"""Requests in flight at every replica, and which replica takes the next; no step costs more than log."""

import struct
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Standing(IntEnum):
    """How well a replica is thought to be: requests go to those that stand best, and to no other."""

    UP = 0
    SUSPECT = 1  # requests failed there
    UNWELL = 2  # and it does not say that it is well
    OUT = 3  # nothing goes there


_UP, _OUT = int(Standing.UP), int(Standing.OUT)  # plain numbers are quicker
_FEW = 8  # replicas; it takes less time to look at all of them than to climb a tree
_WORSE = 1 << 40  # requests: more than any count, so that what stands worse comes later


class Loads:
    """Counts by model, replica and device. Replicas are dealt over the devices in turn, as in `Fleet`."""

    def __init__(self, num_replicas: Sequence[int], num_devices: int) -> None:
        self.in_flight = [[0] * number for number in num_replicas]  # by model, then by replica
        self._standings = [[_UP] * number for number in num_replicas]
        self._num_up = list(num_replicas)
        self._num_worse = 0  # replicas that are not up
        self.closed: tuple[int, ...] = ()
        """The models of which no replica is up"""
        self.totals = [0] * len(num_replicas)  # in flight by model
        self._totals_up: list[int] = []  # of these at replicas that are up; kept while some are not
        self._batch_sizes = [0.0] * len(num_replicas)
        self._orders = [_few_or_many(number) for number in num_replicas]
        self.least = [0] * len(num_replicas)
        """Of each model's replicas that stand best the one with the smallest count, of equals the first"""
        # By model; as floats, which are packed in half the time.
        on_devices = [[0.0] * len(num_replicas) for _ in range(num_devices)]
        self.on_device = [on_devices[replica % num_devices] for replica in range(max(num_replicas))]
        """By replica: requests in flight by model, on its device; to be read only"""
        # A device may hold several replicas of one model.
        self._is_crowded = max(num_replicas) > num_devices
        self._around = [self.on_device[0]] * len(num_replicas)  # by model: what is on the device of `least`
        shape = 1 + len(num_replicas), len(num_replicas)
        self._packed = bytearray(8 * shape[0] * shape[1])  # what a policy sees, as doubles
        self._pack_into = struct.Struct(f"{shape[0] * shape[1]}d").pack_into
        packed = np.frombuffer(self._packed).reshape(shape)
        self._seen = packed[0], packed[1:]

    def add(self, model: int, replica: int, change: int) -> None:
        """Note that so many requests came to the replica, or left it."""
        counts = self.in_flight[model]
        count = counts[replica] = counts[replica] + change
        total = self.totals[model] = self.totals[model] + change
        self.on_device[replica][model] += change
        if self._num_worse:
            if self._standings[model][replica] == _UP:
                self._totals_up[model] += change
            self._settle(model, replica)
            return
        self._batch_sizes[model] = total / self._num_up[model]
        first = self._orders[model].put(replica, count)
        if first != self.least[model]:
            self._put_first(model, first)

    def stand(self, model: int, replica: int, standing: Standing) -> None:
        """From now on. What is in flight there goes on being counted."""
        if not self._num_worse:
            self._totals_up = self.totals.copy()
        change = (standing == _UP) - (self._standings[model][replica] == _UP)
        self._num_worse -= change
        self._standings[model][replica] = int(standing)
        self._num_up[model] += change
        self._totals_up[model] += change * self.in_flight[model][replica]
        self.closed = tuple(m for m, number in enumerate(self._num_up) if not number)
        self._settle(model, replica)

    def _settle(self, model: int, replica: int) -> None:
        """Bring all that follows from the counts up to date."""
        count = self.in_flight[model][replica]
        rank = count + self._standings[model][replica] * _WORSE
        self._put_first(model, self._orders[model].put(replica, rank))
        if self._num_up[model]:
            self._batch_sizes[model] = self._totals_up[model] / self._num_up[model]
        else:
            self._batch_sizes[model] = self.totals[model] / len(self._standings[model])

    def _put_first(self, model: int, replica: int) -> None:
        self.least[model] = replica
        self._around[model] = self.on_device[replica]

    def standing(self, model: int, replica: int) -> Standing:
        return Standing(self._standings[model][replica])

    def best(self, model: int) -> Standing:
        """How the best of the model's replicas stand."""
        return self.standing(model, self.least[model])

    def seen(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`Observation.batch_sizes`, of the replicas that are up or, where none is, of all; and
        `Observation.neighbours`. Good until the next call: one array is made once, and written again."""
        seen = self._batch_sizes.copy()
        for row in self._around_alone() if self._is_crowded else self._around:
            seen += row
        self._pack_into(self._packed, 0, *seen)
        return self._seen

    def _around_alone(self) -> list[list[float]]:
        """With each replica's own requests, and not those of others of its model on the same device."""
        around = [row.copy() for row in self._around]
        for model, replica in enumerate(self.least):
            around[model][model] = self.in_flight[model][replica]
        return around


class _Few:
    """Who is first among `size` replicas by count, then by index."""

    def __init__(self, size: int) -> None:
        self._size = size
        # A count and an index in one integer, since Python compares those faster than pairs.
        self._ranks = list(range(size))

    def put(self, replica: int, count: int) -> int:
        """Who is first from now on."""
        self._ranks[replica] = count * self._size + replica
        return min(self._ranks) % self._size


class _Many:
    """The same for many: a tree in which each node is the lesser of its two children."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._num_leaves = 1 << (size - 1).bit_length()
        self._nodes = [0] * (2 * self._num_leaves)
        last = (_OUT + 1) * _WORSE * size
        self._nodes[self._num_leaves :] = [leaf if leaf < size else last for leaf in range(self._num_leaves)]
        for node in range(self._num_leaves - 1, 0, -1):
            self._nodes[node] = min(self._nodes[2 * node], self._nodes[2 * node + 1])

    def put(self, replica: int, count: int) -> int:
        nodes = self._nodes
        node = self._num_leaves + replica
        nodes[node] = count * self._size + replica
        while node > 1:
            lesser, other = nodes[node], nodes[node ^ 1]
            if other < lesser:
                lesser = other
            node >>= 1
            if nodes[node] == lesser:
                break
            nodes[node] = lesser
        return nodes[1] % self._size


def _few_or_many(size: int) -> _Few | _Many:
    return _Few(size) if size <= _FEW else _Many(size)
