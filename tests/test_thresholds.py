"""The policies `slackfit` and `thresholds`, the table's file, and its tuning."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from besteffort.arrivals import arrival_rates_per_s
from besteffort.artifacts.files import write_text
from besteffort.artifacts.profile_file import save_samples
from besteffort.artifacts.rewards_file import save_rewards
from besteffort.artifacts.thresholds_file import load_thresholds, save_thresholds
from besteffort.errors import PolicyError
from besteffort.evolution import maximise
from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample
from besteffort.observation import Observation
from besteffort.policies import SlackFit, Thresholds, load_named_policy
from besteffort.rewards import Rewards
from besteffort.simulator import ThresholdTrials, simulate, simulate_choices
from besteffort.stages.tune import tune
from besteffort.thresholds import RateSmoother, ThresholdTable, smoothed_rates_per_s
from besteffort.tuning import EDGES_PER_S, Effort, tune_thresholds
from besteffort.workload import stable, unpredictable_2
from tests.test_environment import make_service
from tests.test_policies import _seen, _with_deadline

QUICK = Effort(
    num_generations=6,
    num_rates=2,
    num_requests=150,
    num_requests_held_out=300,
    num_generations_together=2,
    num_unpredictable=1,
    num_requests_unpredictable=300,
)
# Two bands, two tasks, three models.
TABLE = ThresholdTable(
    np.array([10.0]), np.array([[[5.0, 2.0], [3.0, -1.0]], [[0.0, 0.0], [-1.0, -1.0]]]), num_smoothed=3
)


def constant_latency() -> Latency:
    """10 ms a step for the small one whatever its batch; 30 ms rising by 2 per request for the large."""
    steps_ms = np.array([[10.0, 10.0], [30.0, 230.0]])
    return Latency(np.array([1, 101]), steps_ms, np.zeros(2), np.zeros(2), np.ones((2, 4)))


def test_slackfit_takes_the_largest_model_that_makes_the_deadline_and_else_the_fastest(fleet: Fleet) -> None:
    slackfit = SlackFit(constant_latency(), fleet)
    assert slackfit.choose(_seen(0, 0)) == 1
    assert slackfit.choose(_seen(0, 20)) == 0  # 70 ms a token misses copa's 40 ms
    assert slackfit.choose(_seen(0, 20, task=1)) == 1  # and makes piqa's 80 ms
    assert SlackFit(constant_latency(), _with_deadline(fleet, 5.0)).choose(_seen(0, 0)) == 0


def test_slackfit_goes_by_the_request_s_own_deadline_where_it_has_one(fleet: Fleet) -> None:
    slackfit = SlackFit(constant_latency(), fleet)
    seen = _seen(0, 0)  # copa, which has 40 ms; the large model takes 28.5, with prefills in no time
    chosen = [
        slackfit.choose(structs.replace(seen, deadline_ms_per_token=own)) for own in (None, 28.0, 29.0, 5.0)
    ]
    assert chosen == [1, 0, 1, 0]


def test_slackfit_asks_for_no_rewards_and_greedy_does(fleet: Fleet) -> None:
    # For equal worth greedy prefers neither; slackfit always the larger.
    slackfit = SlackFit(constant_latency(), fleet)
    assert slackfit.choose(Observation(0, np.zeros(2), 1000.0)) == 1


@pytest.mark.parametrize(
    ("task", "batch_sizes", "rate", "model"),
    [
        (0, (0, 0, 2), 1.0, 2),
        (0, (0, 0, 2.25), 1.0, 1),
        (0, (9, 5.25, 2.25), 1.0, 0),
        (0, (0, 0, 0), 10.0, 1),  # a band begins at its edge; a negative threshold is never met
        (1, (9, 0, 0), 1.0, 2),
        (1, (9, 0, 0), 11.0, 0),
    ],
)
def test_the_largest_model_that_is_not_too_full_is_taken(
    task: int, batch_sizes: tuple[float, ...], rate: float, model: int
) -> None:
    assert TABLE.choose(task, np.array(batch_sizes, dtype=np.float64), rate) == model


def test_a_table_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="for 0 edges"):
        ThresholdTable(np.empty(0), TABLE.max_batch_size)


def test_the_smoothed_rate_is_a_running_average_of_logarithms_and_begins_with_the_first_known() -> None:
    smoother = RateSmoother(2)
    assert smoother.observe(0.0) == 0.0
    assert smoother.observe(4.0) == pytest.approx(4.0)
    assert smoother.observe(16.0) == pytest.approx(8.0)
    assert smoother.observe(2.0) == pytest.approx(4.0)
    np.testing.assert_allclose(smoothed_rates_per_s(np.array([0.0, 4.0, 16.0, 2.0]), 2), [0, 4, 8, 4])
    np.testing.assert_allclose(smoothed_rates_per_s(np.array([3.0, 5.0]), 1), [3, 5])


@pytest.mark.parametrize("num_smoothed", [1, 4])
def test_thresholds_in_the_event_loop_decide_as_the_policy_that_serves(num_smoothed: int) -> None:
    service = make_service("soft", rate_scale=0.5)
    fleet, latency, values = service.fleet, service.latency, service.rewards.relative
    table = ThresholdTable(np.array([8.0]), np.array([[[2.0], [0.0]], [[4.0], [1.0]]]), num_smoothed)
    workloads = [unpredictable_2(fleet, np.random.default_rng(seed), 300) for seed in range(2)]
    rates = [smoothed_rates_per_s(arrival_rates_per_s(w.arrived_at), num_smoothed) for w in workloads]
    row = np.stack([table.row_of(w.task, r) for w, r in zip(workloads, rates, strict=True)])
    trials = ThresholdTrials(workloads, fleet, latency, values)
    for _ in range(2):  # the second time from where it began
        worth = trials.worth(row, table.rows)
    for f, workload in enumerate(workloads):
        outcomes = simulate(workload, fleet, latency, Thresholds(table).choose)
        np.testing.assert_array_equal(trials.models[f], outcomes.model)
        own = service.worth(workload.task, outcomes.model, outcomes.latency_ms_per_token)
        assert worth[f] == pytest.approx(own.mean())
        assert 0 < outcomes.model.mean() < 1


def test_trials_refuse_rows_that_are_not_there() -> None:
    service = make_service()
    workload = stable(service.fleet, np.random.default_rng(0), 1.0, num_requests=3)
    trials = ThresholdTrials([workload], service.fleet, service.latency, service.rewards.relative)
    with pytest.raises(ValueError, match="up to 2 into 2"):
        trials.worth(np.array([[0, 1, 2]]), np.zeros((2, 1)))


def test_the_evolution_finds_the_top_of_a_tilted_hill() -> None:
    tilt = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.3], [0.0, 0.3, 1.0]]) @ np.diag([1.0, 5.0, 1.0])
    top = np.array([1.0, -2.0, 0.5])
    point, worth = maximise(
        lambda x: -float(np.sum((tilt @ (x - top)) ** 2)), np.zeros(3), 150, np.random.default_rng(0)
    )
    np.testing.assert_allclose(point, top, atol=0.05)
    assert worth > -1e-3


def test_tuned_thresholds_beat_every_static_model_on_other_seeds_and_are_the_same_for_the_same_seed() -> None:
    service = make_service()
    tuned = [tune_thresholds(service.fleet, service.latency, service.rewards, effort=QUICK) for _ in range(2)]
    np.testing.assert_array_equal(tuned[0].table.max_batch_size, tuned[1].table.max_batch_size)
    assert tuned[0].table.num_smoothed == tuned[1].table.num_smoothed
    assert tuned[0].table.num_bands == len(tuned[0].worth_by_band) == len(EDGES_PER_S) + 1
    assert tuned[0].worth >= tuned[0].worth_before
    workload = unpredictable_2(service.fleet, np.random.default_rng(99), 2000)

    def performance(models: np.ndarray) -> float:
        outcomes = simulate_choices(workload, service.fleet, service.latency, models)
        return float(service.worth(workload.task, models, outcomes.latency_ms_per_token).mean())

    chosen = simulate(workload, service.fleet, service.latency, Thresholds(tuned[0].table).choose).model
    statics = [performance(np.full(len(workload), model)) for model in (0, 1)]
    assert performance(chosen) > max(statics)


def test_a_fleet_of_one_model_has_nothing_to_tune() -> None:
    service = make_service()
    fleet = service.fleet.model_copy(update={"models": service.fleet.models[:1]})
    latency = replace(
        service.latency,
        step_ms=service.latency.step_ms[:1],
        prefill_base_ms=service.latency.prefill_base_ms[:1],
        prefill_ms_per_token=service.latency.prefill_ms_per_token[:1],
        slowdown=np.ones((1, 2)),
        context_ms_per_token=np.zeros(1),
        overhead_ms=np.zeros(1),
        pressure=np.zeros((1, 1)),
    )
    values = service.rewards.values[:, :1]
    rewards = Rewards(values, values, np.zeros((2, 1), dtype=np.int64), ("acc",) * 2, "given")
    table = tune_thresholds(fleet, latency, rewards, effort=QUICK).table
    assert table.max_batch_size.shape[2] == 0
    assert table.choose(0, np.zeros(1), 3.0) == 0


@pytest.fixture
def fleet_dir(tmp_path: Path) -> Path:
    """The fleet of `make_service` in files."""
    lines = [
        'schema_version = 1\nname = "test"',
        *(f'[[models]]\nname = "{name}"\npath = "x"' for name in ("fast", "good")),
        *(f'[[tasks]]\nname = "{name}"\ndeadline_ms_per_token = 30\nlm_eval_task = "piqa"'
          for name in ("plain", "paid")),
    ]  # fmt: skip
    write_text(tmp_path / "fleet.toml", "\n".join(lines))
    samples = []
    rest = {"std_ms": 0.0, "p50_ms": 1.0, "p95_ms": 1.0, "num_measurements": 1, "busy_models": ()}
    for model, step_ms in (("fast", 2.0), ("good", 20.0)):
        samples += [Sample("decode", model, b, 16, mean_ms=step_ms * b**0.5, **rest) for b in (1, 8)]
        samples += [Sample("prefill", model, 1, n, mean_ms=step_ms + 0.1 * n, **rest) for n in (16, 64)]
    save_samples(tmp_path / "profile.parquet", samples, {})
    service = make_service()
    save_rewards(tmp_path / "rewards.parquet", service.rewards, service.fleet, {})
    return tmp_path


def files_of(fleet_dir: Path) -> dict[str, Path]:
    return {"profile": fleet_dir / "profile.parquet", "rewards": fleet_dir / "rewards.parquet"}


def test_the_policy_named_thresholds_serves_by_the_file_that_tune_wrote(fleet_dir: Path) -> None:
    from besteffort.fleet import load_fleet
    from besteffort.progress import Silent

    tuned = tune(fleet_dir, effort=QUICK, progress=Silent())
    fleet = load_fleet(fleet_dir)
    rng = np.random.default_rng(0)
    policy = load_named_policy("thresholds", fleet, rng=rng, **files_of(fleet_dir))
    assert isinstance(policy, Thresholds)
    np.testing.assert_array_equal(policy.table.max_batch_size, tuned.table.max_batch_size)
    np.testing.assert_array_equal(policy.table.rate_edges_per_s, tuned.table.rate_edges_per_s)
    assert policy.table.num_smoothed == tuned.table.num_smoothed
    assert policy.choose(_seen(0, 0)) in (0, 1)


def test_missing_thresholds_are_told_with_the_command_that_makes_them(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"thresholds\.parquet: no such file; run `besteffort tune"):
        load_named_policy("thresholds", fleet, rng=np.random.default_rng(0), **files_of(tmp_path))


def test_thresholds_of_other_inputs_are_refused(fleet_dir: Path) -> None:
    fleet = make_service().fleet
    table = ThresholdTable(np.empty(0), np.zeros((2, 1, 1)))
    path = fleet_dir / "thresholds.parquet"
    save_thresholds(path, table, fleet, **files_of(fleet_dir), facts={})
    assert load_thresholds(path, fleet, **files_of(fleet_dir)).num_bands == 1
    with pytest.raises(PolicyError, match="deadline_kind = hard, but this fleet has soft; run"):
        load_thresholds(path, fleet.model_copy(update={"deadline_kind": "soft"}), **files_of(fleet_dir))
    other = fleet_dir / "fleet.toml"
    with pytest.raises(PolicyError, match="tuned on another profile file"):
        load_thresholds(path, fleet, **{**files_of(fleet_dir), "profile": other})
    with pytest.raises(PolicyError, match="tuned on another rewards file"):
        load_thresholds(path, fleet, **{**files_of(fleet_dir), "rewards": other})


def test_a_file_of_thresholds_that_is_damaged_is_refused(fleet_dir: Path) -> None:
    path = fleet_dir / "thresholds.parquet"
    write_text(path, "no table")
    with pytest.raises(PolicyError, match="not a readable Parquet file"):
        load_thresholds(path, make_service().fleet, **files_of(fleet_dir))


def test_hindsight_is_refused_where_the_future_is_not_known(fleet: Fleet, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="needs to know the future"):
        load_named_policy("hindsight", fleet, rng=np.random.default_rng(0), **files_of(tmp_path))
