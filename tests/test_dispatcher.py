"""Whom requests go to while replicas come and go, and that nothing is lost in the counting."""

from collections.abc import Callable
from contextlib import ExitStack
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.arrivals import ArrivalRateEstimator
from besteffort.engines.running import Engine
from besteffort.fleet import Fleet
from besteffort.observation import Observation
from besteffort.policies import Static
from besteffort.router import Dispatcher
from besteffort.router.dispatcher import ModelFullError, NoReplicaError, Route
from besteffort.router.loads import Standing
from besteffort.router.seats import Seats

NUM_REPLICAS = (3, 2, 4)
REPLICAS = [(model, replica) for model, number in enumerate(NUM_REPLICAS) for replica in range(number)]
TICK_S = 0.01
FLEET = Fleet.model_validate(
    {
        "schema_version": 1,
        "name": "three",
        "models": [{"name": name, "path": name} for name in ("small", "middle", "large")],
        "tasks": [{"name": "copa", "deadline_ms_per_token": 40, "lm_eval_task": "copa"}],
        "num_gpus": 2,
    }
)


class Turns:
    """Each model in turn, whether it is up or not."""

    name = "turns"

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def choose(self, observation: Observation) -> int:
        self.seen.append(observation)
        return (len(self.seen) - 1) % len(NUM_REPLICAS)


def make(policy: Turns | Static) -> Dispatcher:
    engines = tuple(
        tuple(Engine(f"http://127.0.0.1:{9000 + 10 * model + replica}", "x") for replica in range(number))
        for model, number in enumerate(NUM_REPLICAS)
    )
    ticks = count()
    return Dispatcher(FLEET, policy, engines, clock=lambda: TICK_S * next(ticks))


def take_down(dispatcher: Dispatcher, model: int, standing: Standing = Standing.OUT) -> None:
    for replica in range(NUM_REPLICAS[model]):
        dispatcher.stand(model, replica, standing)


class Books:
    """A dispatcher, and the same requests counted by going through all of them."""

    def __init__(self) -> None:
        self.policy = Turns()
        self.dispatcher = make(self.policy)
        self.running: list[Route] = []
        self.standings = dict.fromkeys(REPLICAS, Standing.UP)
        self.rate_per_s = 0.0
        self._estimator = ArrivalRateEstimator()

    @property
    def in_flight(self) -> list[list[int]]:
        places = [(route.model, route.replica) for route in self.running]
        return [[places.count((m, r)) for r in range(n)] for m, n in enumerate(NUM_REPLICAS)]

    def begin(self, pinned: int | None) -> None:
        wanted = len(self.policy.seen) % len(NUM_REPLICAS) if pinned is None else pinned
        place = self._place(wanted, pinned is not None, self.standings)
        # The clock moves on with each reading, and the next one is the arrival.
        if place is not None:  # who is refused is no arrival
            self.rate_per_s = self._estimator.observe(self.dispatcher.clock() + TICK_S)
        self._note(place, lambda: self.dispatcher.begin(0, pinned))

    def begin_again(self, nth: int) -> None:
        failed = self.running[nth]
        tried = {(failed.model, failed.replica)}
        out = dict.fromkeys(tried, Standing.OUT)
        place = self._place(failed.model, failed.pinned, self.standings | out)
        self._note(place, lambda: self.dispatcher.begin_again(failed, tried))

    def end(self, nth: int) -> None:
        self.dispatcher.end(self.running.pop(nth))

    def stand(self, place: tuple[int, int], standing: Standing) -> None:
        self.standings[place] = standing
        self.dispatcher.stand(*place, standing)

    def _place(
        self, wanted: int, pinned: bool, standings: dict[tuple[int, int], Standing]
    ) -> tuple[int, int] | None:
        """Where a request must go that should go to the model `wanted`."""
        nearest = [*range(wanted, -1, -1), *range(wanted + 1, len(NUM_REPLICAS))]
        for standing in (Standing.UP, Standing.SUSPECT, Standing.UNWELL):
            for model in nearest[:1] if pinned else nearest:
                counts = self.in_flight[model]
                such = [replica for replica in range(len(counts)) if standings[model, replica] is standing]
                if such:
                    return model, min(such, key=lambda replica: (counts[replica], replica))
        return None

    def _note(self, place: tuple[int, int] | None, begin: Callable[[], Route]) -> None:
        if place is None:
            with pytest.raises(NoReplicaError):
                begin()
            return
        route = begin()
        assert (route.model, route.replica) == place
        assert route.engine is self.dispatcher.engines[route.model][route.replica]
        self.running.append(route)


@settings(deadline=None)  # the machine may be busy
@given(data=st.data(), num_steps=st.integers(0, 60))
def test_whatever_begins_ends_and_fails_the_counts_are_exact_and_end_at_zero(
    data: st.DataObject, num_steps: int
) -> None:
    books = Books()
    for _ in range(num_steps):
        what = data.draw(st.sampled_from(["begin", "begin", "again", "end", "turn"]))
        if what == "begin":
            books.begin(data.draw(st.sampled_from([None, None, 0, 1, 2])))
        elif what == "turn":
            books.stand(data.draw(st.sampled_from(REPLICAS)), data.draw(st.sampled_from(Standing)))
        elif books.running:
            nth = data.draw(st.integers(0, len(books.running) - 1))
            (books.end if what == "end" else books.begin_again)(nth)
        assert books.dispatcher.in_flight == books.in_flight
        assert books.dispatcher.arrival_rate_per_s == pytest.approx(books.rate_per_s)
    for route in books.running:
        books.dispatcher.end(route)
    assert books.dispatcher.in_flight == [[0] * number for number in NUM_REPLICAS]


def test_a_request_that_fails_inside_its_block_is_no_longer_in_flight() -> None:
    dispatcher = make(Static(1, "static:middle"))

    def fail() -> None:
        with dispatcher.route(0):
            assert dispatcher.in_flight == [[0, 0, 0], [1, 0], [0, 0, 0, 0]]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dispatcher.in_flight == [[0, 0, 0], [0, 0], [0, 0, 0, 0]]


def test_a_policy_sees_which_models_are_closed_and_batches_without_what_is_down() -> None:
    policy = Turns()
    dispatcher = make(policy)
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(dispatcher.route(0, pinned=2))
        for _ in range(2):
            stack.enter_context(dispatcher.route(0, pinned=2))
        dispatcher.stand(2, 0, Standing.SUSPECT)  # with two requests; the others have 2, 1 and 1
        take_down(dispatcher, 1)
        stack.enter_context(dispatcher.route(0))
    assert policy.seen[-1].closed == (1,)
    np.testing.assert_allclose(policy.seen[-1].batch_sizes, [0.0, 0.0, 4 / 3])


def test_a_model_that_is_down_gives_way_to_the_next_smaller_and_then_to_a_larger() -> None:
    dispatcher = make(Static(1, "static:middle"))
    take_down(dispatcher, 1)
    with dispatcher.route(0) as route:
        assert route.model == 0
    take_down(dispatcher, 0)
    with dispatcher.route(0) as route:
        assert route.model == 2
    dispatcher.stand(1, 1, Standing.UP)
    with dispatcher.route(0) as route:
        assert (route.model, route.replica) == (1, 1)


def test_where_no_model_is_up_the_one_that_stands_best_is_tried() -> None:
    dispatcher = make(Static(1, "static:middle"))
    for model, standing in enumerate((Standing.UNWELL, Standing.OUT, Standing.SUSPECT)):
        take_down(dispatcher, model, standing)
    for expected in (2, 0):
        with dispatcher.route(0) as route:
            assert route.model == expected
        take_down(dispatcher, 2)


def test_a_pinned_request_goes_to_no_other_model() -> None:
    dispatcher = make(Turns())
    take_down(dispatcher, 2, Standing.SUSPECT)
    assert dispatcher.begin(0, pinned=2).model == 2
    take_down(dispatcher, 2)
    with pytest.raises(NoReplicaError, match="no replica of large is up"):
        dispatcher.begin(0, pinned=2)
    assert dispatcher.begin(0, pinned=1).model == 1


def test_a_model_that_is_full_gives_way_and_who_insists_on_it_is_refused_and_no_arrival() -> None:
    policy = Turns()
    dispatcher = make(policy)
    dispatcher.seats = Seats(24, len(NUM_REPLICAS))
    for _ in range(20):
        dispatcher.begin(0, pinned=2)
    rate_per_s = dispatcher.arrival_rate_per_s
    for _ in range(9):
        with pytest.raises(ModelFullError):
            dispatcher.begin(0, pinned=2)
    assert dispatcher.arrival_rate_per_s == rate_per_s
    dispatcher.put_in_charge(Static(2, "static:large"))
    assert [dispatcher.begin(0).model for _ in range(4)] == [1, 1, 0, 0]
    assert sum(map(sum, dispatcher.in_flight)) == 24
    dispatcher.put_in_charge(policy)
    dispatcher.begin(0)  # there is nobody to keep seats for; how many there may be is not ours to say
    assert policy.seen[-1].closed == ()


def test_a_policy_sees_which_models_are_full() -> None:
    policy = Turns()
    dispatcher = make(policy)
    dispatcher.seats = Seats(24, len(NUM_REPLICAS))
    take_down(dispatcher, 0)
    for _ in range(22):
        dispatcher.begin(0, pinned=2)
    dispatcher.begin(0)
    assert sorted(policy.seen[-1].closed) == [0, 2]


def test_a_replica_that_hangs_gets_no_more_requests_than_the_others_have_at_a_time() -> None:
    dispatcher = make(Static(2, "static:large"))
    others: list[Route] = []
    for _ in range(1000):
        route = dispatcher.begin(0)
        if route.replica != 0:
            others.append(route)
        if len(others) > 30:
            dispatcher.end(others.pop(0))
    assert dispatcher.in_flight[2][0] <= 12


def test_a_second_attempt_is_no_second_arrival_and_the_policy_does_not_see_it() -> None:
    policy = Turns()
    dispatcher = make(policy)
    first = dispatcher.begin(0)
    rate_per_s = dispatcher.arrival_rate_per_s
    dispatcher.put_in_charge(Static(2, "other"))
    second = dispatcher.begin_again(first, {(0, 0)})
    third = dispatcher.begin_again(first, {(0, 0), (0, 1), (0, 2)})
    assert [(route.model, route.replica) for route in (second, third)] == [(0, 1), (1, 0)]
    for route in (second, third):
        assert (route.arrived_at, route.decision_s, route.policy) == (
            first.arrived_at,
            first.decision_s,
            "turns",
        )
    assert (len(policy.seen), dispatcher.arrival_rate_per_s) == (1, rate_per_s)
    with pytest.raises(NoReplicaError, match="of any model"):
        dispatcher.begin_again(first, REPLICAS)
    # What was tried is open to others as before.
    assert dispatcher.begin(0, pinned=0).replica == 2


def test_a_decision_that_is_kept_stays_as_it_was_while_others_come() -> None:
    dispatcher = make(Turns())
    dispatcher.keeps_decisions = True
    dispatcher.begin(0)
    kept = dispatcher.decision
    dispatcher.begin(0)
    assert kept is not None
    assert kept is not dispatcher.decision
    num_models = len(NUM_REPLICAS)
    assert (kept.batch_sizes, kept.neighbours) == (bytes(8 * num_models), bytes(8 * num_models**2))
