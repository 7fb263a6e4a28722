"""The event loop against hand-computed cases, its promises, and a slow reference."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.latency import Latency
from besteffort.observation import Observation
from besteffort.request import Outcomes, Requests
from besteffort.simulator import (
    Branching,
    ParallelFleets,
    PlanSearch,
    Routing,
    ThresholdTrials,
    simulate,
    simulate_choices,
)

STEP_MS = np.array([[2.0, 3.0, 4.0, 5.0], [10.0, 14.0, 18.0, 22.0]])  # at batch sizes 1 to 4
PREFILL_BASE_MS = np.array([4.0, 20.0])
PREFILL_MS_PER_TOKEN = np.array([0.5, 1.0])
DEADLINE_MS_PER_TOKEN = 20.123  # which no sum of these is near, so that rounding decides nothing


def make_fleet(
    replicas: tuple[int, ...] = (1, 1),
    num_gpus: int = 1,
    max_num_seqs: int = 4,
    num_tasks: int = 1,
    kv_cache_tokens: int | None = None,
) -> Fleet:
    limits = {"max_num_seqs": max_num_seqs, "kv_cache_tokens": kv_cache_tokens}
    models = [{"name": f"m{m}", "path": "x", "replicas": count, **limits} for m, count in enumerate(replicas)]
    engine = {"max_model_len": min(2048, kv_cache_tokens or 2048)}
    tasks = [
        {"name": f"t{t}", "deadline_ms_per_token": DEADLINE_MS_PER_TOKEN, "lm_eval_task": "piqa"}
        for t in range(num_tasks)
    ]
    tables = {"models": models, "tasks": tasks, "engine": engine}
    return Fleet.model_validate({"schema_version": 1, "name": "test", "num_gpus": num_gpus, **tables})


def make_latency(together: float = 2.0) -> Latency:
    slowdown = np.ones((2, 4))
    slowdown[:, 0b11] = together
    return Latency(np.arange(1, 5), STEP_MS, PREFILL_BASE_MS, PREFILL_MS_PER_TOKEN, slowdown)


def make_requests(*rows: tuple[float, int, int]) -> Requests:
    """Rows of arrival in ms, prompt tokens, output tokens."""
    arrived_ms, prompts, outputs = zip(*rows, strict=True)
    return Requests(
        arrived_at=np.array(arrived_ms, dtype=np.float64) / 1000,
        task=np.zeros(len(rows), dtype=np.int64),
        num_prompt_tokens=np.array(prompts),
        num_output_tokens=np.array(outputs),
    )


def random_requests(rng: np.random.Generator, num_requests: int, mean_gap_ms: float) -> Requests:
    return Requests(
        arrived_at=np.cumsum(rng.exponential(mean_gap_ms, num_requests)) / 1000,
        task=np.zeros(num_requests, dtype=np.int64),
        num_prompt_tokens=rng.integers(1, 40, num_requests) * rng.choice([1, 30], num_requests),
        num_output_tokens=rng.integers(1, 30, num_requests),
    )


def first_and_last_ms(outcomes: Outcomes) -> NDArray[np.float64]:
    return 1000 * np.stack([outcomes.first_token_at, outcomes.last_token_at], axis=1)


def served(
    *rows: tuple[float, int, int],
    models: tuple[int, ...],
    fleet: Fleet | None = None,
    together: float = 2.0,
) -> NDArray[np.float64]:
    outcomes = simulate_choices(
        make_requests(*rows), fleet or make_fleet(), make_latency(together), np.array(models)
    )
    return first_and_last_ms(outcomes)


def test_a_request_alone_takes_its_prefill_and_a_step_for_each_further_token() -> None:
    # Prefill 4 + 0.5 * 10 = 9 ms, then 4 steps of 2 ms.
    np.testing.assert_allclose(served((100, 10, 5), models=(0,)), [[109, 117]])


def test_a_request_for_one_token_ends_with_its_prefill() -> None:
    np.testing.assert_allclose(served((100, 10, 1), models=(0,)), [[109, 109]])


def test_a_second_prompt_is_read_in_a_step_that_decodes_too_and_then_both_share_the_steps() -> None:
    # First token at 9. At 13, 2 of 10 steps are done. Reading the second prompt takes 5 ms, and 1 more
    # for a batch of 2 instead of 1: till 19, with one step more done for the first. Both then take
    # 3 ms steps: the second needs 2 (25), the first has 7 - 2 = 5 left, alone at 2 ms each (35).
    took = served((0, 10, 11), (13, 2, 3), models=(0, 0))
    np.testing.assert_allclose(took, [[9, 35], [19, 25]])


def test_prompts_that_wait_are_read_together_as_far_as_there_are_seats() -> None:
    # The first is read till 9, the two behind it in one step: 4 + 0.5 * 20 ms, and 2 more for a batch
    # of 3: till 25, when the first has its second token; then all need steps of 4 ms.
    took = served((0, 10, 3), (1, 10, 2), (2, 10, 2), models=(0, 0, 0))
    np.testing.assert_allclose(took, [[9, 29], [25, 29], [25, 29]])
    one_seat_left = make_fleet(max_num_seqs=2)
    took = served((0, 10, 9), (1, 10, 2), (2, 10, 2), models=(0, 0, 0), fleet=one_seat_left)
    assert took[1, 0] < took[2, 0]


@pytest.mark.parametrize("num_tokens", [1, 9, 10, 11, 17, 20, 30, 31, 500])
def test_a_step_takes_as_much_more_as_prompts_of_its_tokens_are_off_the_line(num_tokens: int) -> None:
    bends = {"bend_at_tokens": np.array([10, 20, 30]), "prefill_bend_ms": np.array([[1.0, 8.0, 5.0]] * 2)}
    latency = replace(make_latency(), **bends)
    outcomes = simulate_choices(make_requests((0, num_tokens, 1)), make_fleet(), latency, np.array([0]))
    expected_ms = latency.prefill_ms(np.array([num_tokens]))[0, 0]
    assert outcomes.latency_ms_per_token[0] == pytest.approx(expected_ms)
    assert expected_ms == 4 + 0.5 * num_tokens + np.interp(num_tokens, [10, 20, 30], [1.0, 8.0, 5.0])


def test_no_step_reads_more_prompt_tokens_than_the_engine_batches() -> None:
    took = served((0, 10, 2), (1, 1500, 1), (2, 1500, 1), models=(0, 0, 0))
    assert took[1, 0] < took[2, 0]


def test_a_step_with_a_prompt_never_takes_less_than_one_without() -> None:
    latency = Latency(np.array([1]), np.array([[10.0], [10.0]]), np.zeros(2), np.zeros(2), np.ones((2, 4)))
    outcomes = simulate_choices(make_requests((0, 1, 3)), make_fleet(), latency, np.array([0]))
    np.testing.assert_allclose(first_and_last_ms(outcomes), [[10, 30]])


def test_models_that_share_a_device_slow_each_other_down_while_both_are_busy() -> None:
    # The small one: 9 ms of prefill and 4 ms of steps at half speed: 18 and 26. The large one: 13 of
    # its 30 ms of prefill are done by then, 17 more: 43; then 2 steps of 10.
    took = served((0, 10, 3), (0, 10, 3), models=(0, 1))
    np.testing.assert_allclose(took, [[18, 26], [43, 63]])


def test_models_on_different_devices_do_not_slow_each_other_down() -> None:
    fleet = make_fleet(replicas=(1, 2), num_gpus=2)
    took = served((0, 10, 3), (0, 10, 3), (0, 10, 3), models=(1, 1, 0), fleet=fleet)
    np.testing.assert_allclose(took[1], [30, 50])  # the second replica of the large model has GPU 1
    assert took[0, 1] > 50


def test_no_more_than_max_num_seqs_run_and_the_next_begins_when_one_ends() -> None:
    fleet = make_fleet(max_num_seqs=1)
    took = served((0, 10, 3), (1, 10, 3), (2, 10, 1), models=(0, 0, 0), fleet=fleet)
    np.testing.assert_allclose(took, [[9, 13], [22, 26], [35, 35]])


def test_a_request_waits_until_its_prompt_and_its_answer_fit_into_the_kv_cache() -> None:
    rows = ((0, 40, 3), (1, 40, 3), (2, 40, 3))
    took = served(*rows, models=(0, 0, 0), fleet=make_fleet(kv_cache_tokens=3 * 43))
    np.testing.assert_allclose(took, [[24, 74], [70, 77], [70, 77]])
    # The second is read from 24 to 49, in a step with the second token of the first, which then has one
    # step of 3 ms left: at 52 the third fits. It is read till 77, in the last step of the second.
    took = served(*rows, models=(0, 0, 0), fleet=make_fleet(kv_cache_tokens=3 * 43 - 1))
    np.testing.assert_allclose(took, [[24, 52], [49, 77], [77, 81]])


def test_nobody_overtakes_a_request_that_does_not_fit_yet() -> None:
    fleet = make_fleet(kv_cache_tokens=100)
    took = served((0, 60, 9), (1, 80, 2), (2, 4, 2), models=(0, 0, 0), fleet=fleet)
    # The first is read till 34 and decodes alone till 50; then the others are read together, 4 + 42 + 1.
    np.testing.assert_allclose(took, [[34, 50], [97, 100], [97, 100]])


def test_a_request_that_no_kv_cache_holds_is_refused_before_anything_runs() -> None:
    requests = make_requests((0, 60, 9), (1, 80, 21))
    with pytest.raises(TraceError, match=r"request 1 needs 101 tokens.*'m0' holds \(100\).*kv_cache_tokens"):
        simulate_choices(requests, make_fleet(kv_cache_tokens=100), make_latency(), np.array([0, 0]))
    simulate_choices(requests, make_fleet(kv_cache_tokens=101), make_latency(), np.array([0, 0]))


def test_of_two_requests_that_arrive_together_the_first_is_read_alone() -> None:
    took = served((0, 10, 5), (0, 10, 5), models=(0, 0))
    # The first is read alone, till 9; the second till 19, with one token more for the first. Then
    # 3 steps of 3 ms for both (28), and 1 of 2 ms for the second.
    np.testing.assert_allclose(took, [[9, 28], [19, 30]])


def test_a_completion_at_the_instant_of_an_arrival_comes_first() -> None:
    seen: list[float] = []

    def choose(observation: Observation) -> int:
        seen.append(observation.batch_sizes[0])
        return 0

    # Everything is a multiple of 1/8 ms, so that the instants are equal to the last bit.
    simulate(make_requests((0, 8, 1), (8, 8, 1), (15, 8, 1)), make_fleet(), make_latency(), choose)
    assert seen == [0, 0, 1]


def test_the_replica_with_the_smallest_batch_is_chosen_and_ties_go_to_the_first() -> None:
    fleet = make_fleet(replicas=(3, 1), num_gpus=3)
    requests = make_requests((0, 4, 20), (0, 4, 2), (0, 4, 20), (0, 4, 20), (45, 4, 9))
    outcomes = simulate_choices(requests, fleet, make_latency(), np.zeros(5, dtype=np.int64))
    assert outcomes.replica.tolist() == [0, 1, 2, 0, 1]


def test_a_policy_sees_requests_in_flight_per_replica_and_the_rate_of_the_last_arrivals() -> None:
    seen: list[Observation] = []

    def choose(observation: Observation) -> int:
        seen.append(observation)
        return 1

    fleet = make_fleet(replicas=(1, 2), num_gpus=2)
    simulate(make_requests((0, 10, 20), (10, 10, 20), (20, 10, 20)), fleet, make_latency(), choose)
    assert [o.batch_sizes.tolist() for o in seen] == [[0, 0], [0, 0.5], [0, 1]]
    np.testing.assert_allclose([o.arrival_rate_per_s for o in seen], [0, 100, 100])


def test_a_policy_that_names_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="2 models"):
        simulate(make_requests((0, 10, 3)), make_fleet(), make_latency(), lambda _: 2)


def test_latencies_of_another_number_of_models_are_refused() -> None:
    with pytest.raises(ValueError, match="2 models for a fleet of 3"):
        simulate_choices(make_requests((0, 1, 1)), make_fleet((1, 1, 1)), make_latency(), np.zeros(1))


@dataclass
class SlowReplica:
    """The same rules, one object at a time: what is queued, being read, and being decoded."""

    model: int
    device: int
    waiting: list[int] = field(default_factory=list)
    prefilling: list[int] = field(default_factory=list)
    prefill_left_ms: float = 0.0
    steps_left: dict[int, float] = field(default_factory=dict)
    begins_in_steps: float | None = None  # a prompt that came while others decode waits for their steps
    may_begin: bool = True  # something has ended here

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.prefilling) + len(self.steps_left)


MEASURED = {
    "context_ms_per_token": np.array([0.002, 0.01]),
    "overhead_ms": np.array([3.0, 5.0]),
    "pressure": np.array([[0.0, 0.2], [0.1, 0.0]]),
}


class SlowFleet:
    """Looks at every request at every event; nothing is kept that could be computed."""

    def __init__(self, requests: Requests, fleet: Fleet, latency: Latency) -> None:
        self.requests, self.latency, self.fleet = requests, latency, fleet
        self.steps_ms = latency.step_table_ms(64)
        self.replicas = [
            SlowReplica(m, fleet.device_of(r))
            for m, model in enumerate(fleet.models)
            for r in range(model.replicas)
        ]
        self.now_ms = 0.0
        self.first_ms = np.full(len(requests), np.nan)
        self.last_ms = np.full(len(requests), np.nan)

    def slowdown(self, replica: SlowReplica) -> float:
        running = dict.fromkeys(range(len(self.fleet.models)), 0)
        # So many seats has one of the models on one device, and beyond that nothing gets slower.
        most = max(-(-m.replicas // self.fleet.num_devices) * m.max_num_seqs for m in self.fleet.models)
        for other in self.replicas:
            if other.device == replica.device:
                running[other.model] += other.in_flight
        busy = [m for m, number in running.items() if number]
        slow = self.latency.slowdown[replica.model, sum(1 << m for m in busy)]
        for m in busy:
            if m != replica.model:
                slow += self.latency.pressure[replica.model, m] * np.log2(min(running[m], most) / 4)
        return float(max(1.0, slow))

    def context_ms(self, replica: SlowReplica) -> float:
        prompts, outputs = self.requests.num_prompt_tokens, self.requests.num_output_tokens
        tokens = sum(prompts[r] + outputs[r] // 2 for r in replica.steps_left)
        return float(self.latency.context_ms_per_token[replica.model] * tokens)

    def step_ms(self, replica: SlowReplica) -> float:
        alone_ms = self.steps_ms[replica.model, len(replica.steps_left)] + self.context_ms(replica)
        return float(alone_ms * self.slowdown(replica))

    def waits_for_a_step(self, replica: SlowReplica) -> bool:
        """Vllm reads a prompt only when it begins a step, and may have begun others ahead."""
        if self.latency.lag_steps is None or not replica.steps_left or replica.may_begin:
            return False
        if replica.begins_in_steps is None:
            left = next(iter(replica.steps_left.values()))
            replica.begins_in_steps = left - np.floor(left + 1e-9) + self.latency.lag_steps
        return replica.begins_in_steps > 1e-9

    def start_prefills(self) -> None:
        for replica in self.replicas:
            if replica.prefilling or (replica.waiting and self.waits_for_a_step(replica)):
                continue
            replica.begins_in_steps, replica.may_begin = None, False
            room = self.fleet.models[replica.model].max_num_seqs - len(replica.steps_left)
            prompts = self.requests.num_prompt_tokens[replica.waiting[:room]]
            held = [*replica.steps_left]
            fits = [
                n
                for n in range(1, len(prompts) + 1)
                if (n == 1 or prompts[:n].sum() <= 2048)
                and self.kv_tokens(held + replica.waiting[:n]) <= self.kv_cache_tokens(replica)
            ]
            if fits:
                replica.prefilling = [replica.waiting.pop(0) for _ in range(max(fits))]
                replica.prefill_left_ms = self.prefill_ms(replica, prompts[: max(fits)].sum())

    def kv_tokens(self, requests: list[int]) -> int:
        return int((self.requests.num_prompt_tokens + self.requests.num_output_tokens)[requests].sum())

    def kv_cache_tokens(self, replica: SlowReplica) -> float:
        return self.fleet.models[replica.model].kv_cache_tokens or np.inf

    def prefill_ms(self, replica: SlowReplica, num_tokens: int) -> float:
        steps_ms = self.steps_ms[replica.model]
        alone_ms = self.latency.prefill_ms(np.array([num_tokens]))[replica.model, 0]
        batch = len(replica.prefilling) + len(replica.steps_left)
        return float(max(alone_ms, steps_ms[1]) + steps_ms[batch] - steps_ms[1] + self.context_ms(replica))

    def next_event_in_ms(self) -> float:
        waits = [np.inf]
        for replica in self.replicas:
            if replica.prefilling:
                waits.append(replica.prefill_left_ms * self.slowdown(replica))
            elif replica.steps_left:
                num_steps = [*replica.steps_left.values()]
                if replica.begins_in_steps is not None:
                    num_steps.append(replica.begins_in_steps)
                waits.append(min(num_steps) * self.step_ms(replica))
        return max(0.0, min(waits))

    def pass_time(self, elapsed_ms: float) -> None:
        self.now_ms += elapsed_ms
        paces = [(self.slowdown(replica), self.step_ms(replica)) for replica in self.replicas]
        for replica, (slowdown, step_ms) in zip(self.replicas, paces, strict=True):
            if replica.prefilling:
                replica.prefill_left_ms -= elapsed_ms / slowdown
            else:
                for request in replica.steps_left:
                    replica.steps_left[request] -= elapsed_ms / step_ms
                if replica.begins_in_steps is not None:
                    replica.begins_in_steps -= elapsed_ms / step_ms

    def finish_what_is_done(self) -> None:
        for replica in self.replicas:
            if replica.prefilling and replica.prefill_left_ms < 1e-9:
                for request in replica.steps_left:
                    replica.steps_left[request] -= 1
                replica.may_begin = True
                for request in replica.prefilling:
                    self.first_ms[request] = self.now_ms + self.latency.overhead_ms[replica.model]
                    replica.steps_left[request] = float(self.requests.num_output_tokens[request] - 1)
                replica.prefilling = []
            if not replica.prefilling:
                for request in [r for r, left in replica.steps_left.items() if left < 1e-9]:
                    replica.may_begin = True
                    self.last_ms[request] = self.now_ms + self.latency.overhead_ms[replica.model]
                    del replica.steps_left[request]

    def advance(self, until_ms: float) -> None:
        while self.now_ms + self.next_event_in_ms() <= until_ms:
            self.pass_time(self.next_event_in_ms())
            self.finish_what_is_done()
            self.start_prefills()
        if np.isfinite(until_ms):
            self.pass_time(until_ms - self.now_ms)

    def serve(self, models: NDArray[np.int64]) -> NDArray[np.float64]:
        for request, model in enumerate(models):
            self.advance(1000 * self.requests.arrived_at[request])
            candidates = [replica for replica in self.replicas if replica.model == model]
            min(candidates, key=lambda replica: replica.in_flight).waiting.append(request)
            self.start_prefills()
        while np.isfinite(self.next_event_in_ms()):
            self.advance(self.now_ms + self.next_event_in_ms())
        return np.stack([self.first_ms, self.last_ms], axis=1)


# The largest of `random_requests` needs 1,199 tokens.
kv_limits = st.none() | st.integers(1200, 4000)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    replicas=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    num_gpus=st.integers(1, 3),
    max_num_seqs=st.integers(1, 5),
    mean_gap_ms=st.floats(1.0, 100.0),
    together=st.floats(1.0, 3.0),
    kv_cache_tokens=kv_limits,
    lag_steps=st.sampled_from([None, 0, 1, 2]),
    measured=st.booleans(),
)
def test_the_event_loop_agrees_with_a_slow_reference(
    seed: int,
    replicas: tuple[int, int],
    num_gpus: int,
    max_num_seqs: int,
    mean_gap_ms: float,
    together: float,
    kv_cache_tokens: int | None,
    lag_steps: int | None,
    measured: bool,
) -> None:
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, 40, mean_gap_ms)
    models = rng.integers(0, 2, 40)
    fleet = make_fleet(replicas, num_gpus, max_num_seqs, kv_cache_tokens=kv_cache_tokens)
    latency = replace(make_latency(together), lag_steps=lag_steps)
    if measured:  # what a modelled profile knows nothing of
        latency = replace(latency, **MEASURED)
    fast = first_and_last_ms(simulate_choices(requests, fleet, latency, models))
    slow = SlowFleet(requests, fleet, latency).serve(models)
    np.testing.assert_allclose(fast, slow, rtol=1e-9, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    max_num_seqs=st.integers(1, 8),
    mean_gap_ms=st.floats(0.0, 50.0),
    kv_cache_tokens=kv_limits,
)
def test_work_is_conserved_in_order_and_never_faster_than_the_profile(
    seed: int, max_num_seqs: int, mean_gap_ms: float, kv_cache_tokens: int | None
) -> None:
    rng = np.random.default_rng(seed)
    requests = random_requests(rng, 200, mean_gap_ms)
    fleet = make_fleet((2, 3), 2, max_num_seqs, kv_cache_tokens=kv_cache_tokens)
    latency = make_latency(1.5)
    models = rng.integers(0, 2, 200)
    outcomes = simulate_choices(requests, fleet, latency, models)
    assert np.all(np.isfinite(outcomes.last_token_at))
    np.testing.assert_array_equal(outcomes.model, models)
    np.testing.assert_array_equal(outcomes.num_tokens_received, requests.num_output_tokens)
    prefill_ms = latency.prefill_ms(requests.num_prompt_tokens)[models, np.arange(200)]
    decode_ms = STEP_MS[models, 0] * (requests.num_output_tokens - 1)
    assert np.all(outcomes.ttft_ms >= prefill_ms - 1e-6)
    floor_ms = (prefill_ms + decode_ms) / requests.num_output_tokens
    assert np.all(outcomes.latency_ms_per_token >= floor_ms - 1e-6)
    assert_fifo_and_within_the_limits(outcomes, max_num_seqs, kv_cache_tokens or np.inf)


def assert_fifo_and_within_the_limits(outcomes: Outcomes, max_num_seqs: int, kv_cache_tokens: float) -> None:
    num_tokens = outcomes.requests.num_prompt_tokens + outcomes.requests.num_output_tokens
    for model, replica in set(zip(outcomes.model, outcomes.replica, strict=True)):
        here = (outcomes.model == model) & (outcomes.replica == replica)
        first, last = outcomes.first_token_at[here], outcomes.last_token_at[here]
        assert np.all(np.diff(first) >= 0)
        # A tolerance: requests that end with one token differ in the last bits of their times.
        decoding = [(first <= at) & (last > at + 1e-9) for at in first]
        assert max(np.sum(those) for those in decoding) <= max_num_seqs
        assert max(np.sum(num_tokens[here][those]) for those in decoding) <= kv_cache_tokens


def test_what_is_reserved_in_the_kv_cache_is_within_its_limit_and_given_back() -> None:
    rng = np.random.default_rng(6)
    latency, requests = make_latency(), random_requests(rng, 300, 2.0)
    models = rng.integers(0, 2, 300)
    most = {}
    for kv_cache_tokens in (None, 1500):
        fleet = make_fleet((2, 3), 2, max_num_seqs=8, kv_cache_tokens=kv_cache_tokens)
        fleets = ParallelFleets(fleet, latency, [requests])
        reserved = fleets._state.replicas["kv_tokens"]
        most[kv_cache_tokens] = 0
        for index in range(300):
            fleets.advance(index)
            fleets.route(index, models[[index]])
            most[kv_cache_tokens] = max(most[kv_cache_tokens], reserved.max())
        fleets.drain()
        assert not reserved.any()
    assert 1000 < most[1500] <= 1500 < most[None]


@pytest.mark.parametrize("kv_cache_tokens", [None, 1200])
def test_searches_and_courses_know_the_limit_of_the_kv_cache(kv_cache_tokens: int | None) -> None:
    rng = np.random.default_rng(7)
    latency, requests = make_latency(1.0), random_requests(rng, 200, 80.0)
    fleet = make_fleet((2, 2), 2, 8, kv_cache_tokens=kv_cache_tokens)
    plan, values, rows = rng.integers(0, 2, 200), np.array([[0.5, 1.0]]), np.array([[2.0]])

    trials = ThresholdTrials([requests], fleet, latency, values)
    worth = trials.worth(requests.task[None], rows)[0]
    alone = worth_of(simulate_choices(requests, fleet, latency, trials.models[0]), values)
    np.testing.assert_allclose(worth, alone.mean())

    inputs, scale = np.zeros((200, 1), dtype=np.float32), np.ones(2, dtype=np.float32)
    branching = Branching(requests, fleet, latency, values, Routing(scale, rows), inputs)
    branching.give(plan)
    alone = worth_of(simulate_choices(requests, fleet, latency, plan), values)
    np.testing.assert_array_equal(branching.serve()[0], alone)
    starts, until = np.array([0, 60, 120]), np.full(3, 200)
    branches = branching.branch(starts, until, 0.0)[1]
    np.testing.assert_allclose(branches[0, plan[0]], alone.sum())
    apart = [branching.branch(starts[[n]], until[[n]], 0.0)[1][0] for n in range(3)]
    np.testing.assert_array_equal(branches, apart)

    search = PlanSearch(requests, fleet, latency, values, requests.task, rows)
    search.begin(plan, horizon_s=1e6)
    assert search.improve(rng.random((50, 4, 4))) > 0
    better = worth_of(simulate_choices(requests, fleet, latency, search.plan), values)
    assert better.sum() > alone.sum()


def worth_of(outcomes: Outcomes, values: NDArray[np.float64]) -> NDArray[np.float64]:
    in_time = outcomes.latency_ms_per_token <= DEADLINE_MS_PER_TOKEN
    return np.where(in_time, values[outcomes.requests.task, outcomes.model], 0.0)


def test_the_same_trace_fares_the_same_twice() -> None:
    requests = random_requests(np.random.default_rng(1), 500, 5.0)
    models = np.random.default_rng(2).integers(0, 2, 500)
    runs = [simulate_choices(requests, make_fleet((2, 2)), make_latency(), models) for _ in range(2)]
    np.testing.assert_array_equal(first_and_last_ms(runs[0]), first_and_last_ms(runs[1]))


def test_times_scale_with_the_profile_and_the_arrivals() -> None:
    requests = random_requests(np.random.default_rng(3), 300, 8.0)
    models = np.random.default_rng(4).integers(0, 2, 300)
    slow = make_latency()
    fast = Latency(
        slow.batch_sizes,
        slow.step_ms / 2,
        slow.prefill_base_ms / 2,
        slow.prefill_ms_per_token / 2,
        slow.slowdown,
    )
    dense = Requests(
        requests.arrived_at / 2, requests.task, requests.num_prompt_tokens, requests.num_output_tokens
    )
    slow_ms = first_and_last_ms(simulate_choices(requests, make_fleet(), slow, models))
    fast_ms = first_and_last_ms(simulate_choices(dense, make_fleet(), fast, models))
    np.testing.assert_allclose(fast_ms, slow_ms / 2)


def test_parallel_fleets_fare_as_each_alone_and_report_each_completion_once() -> None:
    rng = np.random.default_rng(5)
    fleet, latency = make_fleet((2, 3), 2), make_latency()
    workloads = [random_requests(rng, 50, gap_ms) for gap_ms in (3.0, 20.0, 200.0)]
    models = rng.integers(0, 2, (3, 50))
    fleets = ParallelFleets(fleet, latency, workloads)
    completed: list[tuple[int, int]] = []
    for index in range(50):
        fleets.advance(index)
        fleets.route(index, models[:, index])
        completed += zip(*map(np.ndarray.tolist, fleets.collect_completed()), strict=True)
    fleets.drain()
    completed += zip(*map(np.ndarray.tolist, fleets.collect_completed()), strict=True)
    assert sorted(completed) == [(f, i) for f in range(3) for i in range(50)]
    for f, workload in enumerate(workloads):
        alone = simulate_choices(workload, fleet, latency, models[f])
        np.testing.assert_array_equal(first_and_last_ms(fleets.outcomes(f)), first_and_last_ms(alone))
        took = fleets.latency_ms_per_token(np.full(50, f), np.arange(50))
        np.testing.assert_allclose(took, alone.latency_ms_per_token)
