"""What training draws from, and what it keeps: traces cut in parts, mixes of tasks, weights and deadlines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from besteffort.advantages import AdvantageRecipe, AdvantageTrainer, Sampler, fleet_encoding_for
from besteffort.advantages.sampling import RandomSpans
from besteffort.dqn import Recipe, Trainer, evaluation_workloads
from besteffort.environment import RoutingEnvironment, Service, SwitchingRates, encoding_for
from besteffort.errors import TraceError
from besteffort.fleet import Fleet
from besteffort.gate import Effort, compare, half_width
from besteffort.policies import Static
from besteffort.progress import Silent
from besteffort.request import Requests
from besteffort.training.checkpoint import Checkpoint
from besteffort.training.trace_parts import TracePart, TrainingTrace
from besteffort.training.workloads import SPEEDS, TrainingWorkloads
from tests.test_advantages import TINY, draw, drawn_network, make_branching, make_service

SHORT = Recipe(
    num_iterations=10,
    hidden_sizes=(8, 8),
    batch_size=8,
    replay_buffer_size=400,
    num_first_transitions=100,
    num_fleets=2,
    num_requests=50,
    evaluate_every=10,
)


def with_tasks(service: Service, **changes: tuple[float, float]) -> Service:
    """Other values of one key for the two tasks."""
    tasks = [
        task.model_copy(update={key: values[index] for key, values in changes.items()})
        for index, task in enumerate(service.fleet.tasks)
    ]
    return replace(service, fleet=service.fleet.model_copy(update={"tasks": tuple(tasks)}))


def make_trace(fleet: Fleet, num_requests: int = 2000, rate_per_s: float = 5.0) -> TrainingTrace:
    """Every request is of the second task, which tells it from all that is drawn."""
    at = np.random.default_rng(1).exponential(1 / rate_per_s, num_requests).cumsum()
    counts = np.arange(num_requests) % 20 + 8
    requests = Requests(at, np.ones(num_requests, dtype=np.int64), counts, counts)
    return TrainingTrace.of("mine", requests, fleet)


def is_piece(requests: Requests) -> bool:
    """Whether it comes from `make_trace`, whose lengths count up."""
    steps = np.diff(requests.num_output_tokens) % 20
    return bool(np.all(requests.task == 1) and np.all(steps == 1))


@settings(max_examples=50, deadline=None)
@given(first=st.integers(0, 400), count=st.integers(1, 900), speed=st.floats(0.5, 2.0))
def test_a_piece_of_a_trace_has_its_requests_in_order_and_their_gaps_by_its_speed(
    first: int, count: int, speed: float
) -> None:
    trace = make_trace(make_service().fleet)
    part = trace.held_out
    piece = part.from_request(first % len(part), count, speed)
    assert len(piece) == count
    assert piece.arrived_at[0] == 0
    rows = (first + np.arange(count)) % len(part)
    np.testing.assert_array_equal(piece.num_output_tokens, part.requests.num_output_tokens[rows])
    gaps = np.diff(part.requests.arrived_at, append=part.period_s)
    np.testing.assert_allclose(np.diff(piece.arrived_at), gaps[rows[:-1]] / speed, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(begin=st.floats(0, 79), duration_s=st.floats(1, 200), speed=st.floats(0.5, 2.0))
def test_a_piece_of_so_many_seconds_has_what_arrives_in_them(
    begin: float, duration_s: float, speed: float
) -> None:
    part = make_trace(make_service().fleet).held_out
    piece = part.from_second(begin, duration_s, speed)
    times = np.concatenate([part.requests.arrived_at + turn * part.period_s for turn in range(9)])
    wanted = times[(times >= begin) & (times < begin + duration_s * speed)]
    np.testing.assert_allclose(piece.arrived_at, (wanted - begin) / speed, atol=1e-9)


def test_the_three_parts_of_a_trace_share_no_request_and_leave_none_out() -> None:
    fleet = make_service().fleet
    trace = make_trace(fleet, 1999)
    lengths = [len(part) for part in (trace.trained_on, trace.chosen_on, trace.held_out)]
    assert lengths == [1399, 200, 400]
    assert sum(len(piece) for piece in trace.held_out.cut(3)) == 400


@pytest.mark.parametrize(
    ("num_requests", "rate_per_s", "saying"),
    [(999, 5.0, "mine: it holds 999 requests"), (1000, 1e4, r"mine: it lasts 0\.\d+ s")],
)
def test_a_trace_too_short_to_learn_from_is_refused(
    num_requests: int, rate_per_s: float, saying: str
) -> None:
    with pytest.raises(TraceError, match=saying):
        make_trace(make_service().fleet, num_requests, rate_per_s)


def test_a_trace_with_a_part_in_one_instant_is_refused() -> None:
    at = np.concatenate([np.linspace(0, 1e4, 700), np.full(300, 1e4)])
    ones = np.ones(1000, dtype=np.int64)
    with pytest.raises(TraceError, match="at one instant"):
        TrainingTrace.of("mine", Requests(at, ones, ones, ones), make_service().fleet)


@pytest.mark.parametrize("shape", [SwitchingRates(60, 10.0), RandomSpans(40.0, TINY)])
def test_about_half_of_the_workloads_are_pieces_of_traces_where_there_are_any(
    shape: SwitchingRates | RandomSpans,
) -> None:
    fleet = make_service().fleet
    workloads = TrainingWorkloads(fleet, traces=(make_trace(fleet),))
    drawn = [workloads.draw(shape, rng) for rng in np.random.default_rng(2).spawn(200)]
    pieces = [requests for requests in drawn if is_piece(requests) and len(requests) > 20]
    assert 70 < len(pieces) < 130
    assert len({int(piece.num_output_tokens[0]) for piece in pieces}) > 10  # from many places
    rates = [(len(piece) - 1) / np.ptp(piece.arrived_at) for piece in pieces]
    assert 5 * SPEEDS[0] * 0.5 < min(rates) < 5 < max(rates) < 5 * SPEEDS[1] * 1.7
    assert not any(
        is_piece(r)
        for r in (TrainingWorkloads(fleet).draw(shape, np.random.default_rng(s)) for s in range(9))
    )


@pytest.mark.parametrize("shape", [SwitchingRates(300, 10.0), RandomSpans(200.0, TINY)])
def test_random_mixes_have_any_share_of_a_task_and_the_fleets_mix_its_own(
    shape: SwitchingRates | RandomSpans,
) -> None:
    fleet = make_service().fleet

    def shares(task_mix: str) -> np.ndarray:
        workloads = TrainingWorkloads(fleet, task_mix)
        drawn = [workloads.draw(shape, rng) for rng in np.random.default_rng(3).spawn(60)]
        return np.array([requests.task.mean() for requests in drawn if len(requests) > 150])

    assert np.std(shares("fleet")) < 0.06
    assert shares("random").min() < 0.1
    assert shares("random").max() > 0.9


def test_both_trainings_draw_from_the_trace_and_are_judged_on_it(tmp_path: Path) -> None:
    service = make_service()
    workloads = TrainingWorkloads(service.fleet, "random", (make_trace(service.fleet),))
    dqn = Trainer(service, SHORT, 0, workloads=workloads).run(Silent())
    measured = AdvantageTrainer(service, TINY, 0, workloads=workloads).run(Silent())
    for training, alone in (
        (dqn, Trainer(service, SHORT, 0).run(Silent())),
        (measured, AdvantageTrainer(service, TINY, 0).run(Silent())),
    ):
        last = training.curve[-1]
        assert 0 < last.by_trace["mine"] <= 1
        assert alone.curve[-1].by_trace == {}
        assert not np.array_equal(training.best.weights[0], alone.best.weights[0])
    rates = np.mean(list(dqn.curve[-1].by_rate.values()))
    assert dqn.curve[-1].performance == pytest.approx((rates + dqn.curve[-1].by_trace["mine"]) / 2)


def test_the_environment_hands_out_requests_of_the_trace() -> None:
    service = make_service()
    workloads = TrainingWorkloads(service.fleet, traces=(make_trace(service.fleet),))
    rng = np.random.default_rng(0)
    environment = RoutingEnvironment(
        service, encoding_for(service.fleet), rng, num_fleets=40, num_requests=30, workloads=workloads
    )
    environment.reset()
    only_second = np.all(environment._episode.task == 1, axis=1).mean()
    assert 0.25 < only_second < 0.75


def test_the_gate_has_a_row_for_the_part_of_a_trace_that_was_held_out_and_for_random_mixes() -> None:
    service = make_service()
    workloads = TrainingWorkloads(service.fleet, "random", (make_trace(service.fleet),))
    makers = [lambda: Static(0, "fast"), lambda: Static(1, "good")]
    brief = Effort(num_seeds=2, duration_s=2.0, num_requests=30)
    names = [row.workload for row in compare(makers, service, brief, Silent(), workloads)]
    extra = ["unpredictable-1, random mixes", "unpredictable-2, random mixes", "trace mine, held out"]
    assert names[-3:] == extra
    plain = [row.workload for row in compare(makers, service, brief, Silent())]
    assert plain == names[:-3]


def test_evaluation_workloads_do_not_change_with_the_pieces_of_traces_behind_them() -> None:
    fleet = make_service().fleet
    plain = evaluation_workloads(fleet)
    more = evaluation_workloads(fleet, workloads=TrainingWorkloads(fleet, traces=(make_trace(fleet),)))
    assert len(more) == len(plain) + 3
    for a, b in zip(plain, more, strict=False):
        np.testing.assert_array_equal(a.arrived_at, b.arrived_at)
    assert all(is_piece(piece) for piece in more[len(plain) :])


def labels(service: Service, task: int, rate_per_s: float) -> np.ndarray:
    """What the good model is worth beyond the fast one, for requests of a task, shape `(N,)`."""
    requests = draw(service, 5, num_requests=120, rate=rate_per_s)
    starts = np.arange(10, 90)
    branching = make_branching(service, requests, drawn_network(service, 0))
    _, worth = branching.branch(starts, starts + 30, 0.0)
    return (worth[:, 1] - worth[:, 0])[requests.task[starts] == task]


def test_the_weight_of_a_task_counts_in_the_labels() -> None:
    """In an idle fleet the advantage is what the answer gains, times the weight over the mean weight."""
    weighted = with_tasks(make_service(), weight=(1.0, 3.0))
    for task, wanted in ((0, 0.5 * 1.0 / 2.0), (1, 3.0 / 2.0 / 3.0)):
        np.testing.assert_allclose(labels(weighted, task, 0.02), wanted)


def test_a_policy_gives_the_good_model_to_the_task_of_more_weight() -> None:
    """The two trainings differ in nothing but which of two equal tasks is paid for."""
    recipe = replace(TINY, num_rounds=4, num_searches=0, num_workloads=24, num_branchings=16, num_steps=400)

    def share_of_good(service: Service) -> np.ndarray:
        training = AdvantageTrainer(service, recipe, 0).run(Silent())
        requests = draw(service, 9, 1500, 24.0)
        _, models = make_branching(service, requests, training.best).serve()
        return np.array([models[requests.task == task].mean() for task in range(2)])

    equal = make_service()
    relative = np.array([[0.6, 0.9], [0.6, 0.9]])
    equal = replace(equal, rewards=replace(equal.rewards, values=relative))
    first, second = (share_of_good(with_tasks(equal, weight=w)) for w in ((5.0, 1.0), (1.0, 5.0)))
    assert first[0] > first[1] + 0.1
    assert second[1] > second[0] + 0.1


def test_a_looser_deadline_makes_the_good_model_worth_more_where_it_is_late_otherwise() -> None:
    """At this rate the good model's answers come after 30 ms per token, and before 300."""
    tight = make_service()
    loose = with_tasks(tight, deadline_ms_per_token=(300.0, 30.0))
    assert labels(loose, 0, 60.0).mean() > labels(tight, 0, 60.0).mean() + 0.2


def test_deadlines_of_tasks_count_in_the_rewards_of_the_environment() -> None:
    def late_share(service: Service) -> np.ndarray:
        environment = RoutingEnvironment(
            service, encoding_for(service.fleet), np.random.default_rng(4), num_fleets=4, num_requests=60
        )
        environment.reset()
        rewards, tasks = [], []
        for _ in range(60):
            _, done = environment.step(np.ones(4, dtype=np.int64))
            rewards.append(done.rewards)
            tasks.append(done.observations[:, :2].argmax(axis=1))
        reward, task = np.concatenate(rewards), np.concatenate(tasks)
        return np.array([np.mean(reward[task == t] == 0) for t in range(2)])

    tight = late_share(make_service())
    loose = late_share(with_tasks(make_service(), deadline_ms_per_token=(1e4, 30.0)))
    assert tight[0] > 0.1
    assert loose[0] == 0
    assert loose[1] == tight[1]


def test_a_checkpoint_comes_back_only_for_the_same_training(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    Checkpoint(path, {"recipe": (1, 2)}).save({"a": torch.ones(2)}, {"iteration": 3})
    kept = Checkpoint(path, {"recipe": (1, 2)}).load()
    assert kept is not None
    assert torch.equal(kept[0]["a"], torch.ones(2))
    assert kept[1] == {"iteration": 3}
    assert Checkpoint(path, {"recipe": (1, 3)}).load() is None
    path.write_bytes(path.read_bytes()[:50])
    assert Checkpoint(path, {"recipe": (1, 2)}).load() is None
    assert Checkpoint(tmp_path / "none", {}).load() is None


def test_the_horizon_of_the_measurements_follows_the_requests_of_a_trace() -> None:
    fleet = make_service().fleet
    part = make_trace(fleet).trained_on
    longer = replace(part.requests, num_output_tokens=part.requests.num_output_tokens * 10)
    trace = replace(make_trace(fleet), trained_on=TracePart(longer, part.period_s))
    assert TrainingWorkloads(fleet).life_s == fleet.request_life_s
    assert TrainingWorkloads(fleet, traces=(trace,)).life_s > 5 * fleet.request_life_s
    sampler = Sampler(make_service(), fleet_encoding_for(fleet), AdvantageRecipe(num_rounds=1))
    assert sampler._life_s == fleet.request_life_s


@pytest.mark.parametrize(("num", "t"), [(2, 12.71), (10, 2.262), (11, 2.228), (31, 2.042), (301, 1.968)])
def test_an_interval_is_student_s_however_many_seeds_there_are(num: int, t: float) -> None:
    values = np.random.default_rng(num).normal(size=num)
    assert half_width(values) == pytest.approx(t * values.std(ddof=1) / np.sqrt(num), rel=2e-3)
