"""The paper's experiments in small, and the arithmetic behind its figures and tables."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from besteffort.artifacts.policy_file import TrainedPolicy, save_policy
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.environment import Service, encoding_for
from besteffort.errors import PolicyError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.observation import Encoding, FleetEncoding
from besteffort.paper import Effort, published
from besteffort.paper.experiments import HINDSIGHT, POLICY, Burst, Curves, Duel, Experiments, Sweep
from besteffort.paper.findings import (
    availability_per_s,
    hardware_utility,
    leads,
    mean_and_std,
    riemann_sum,
    soft_increase,
    window_ratio,
    window_verdict,
)
from besteffort.paper.routing import (
    Chooser,
    GreedyMany,
    LearnedMany,
    Seen,
    StaticMany,
    ThresholdsMany,
    runs_of,
    serve_many,
)
from besteffort.paper.tables import bound_tables
from besteffort.paper.variants import as_toml, doubled, variants, with_only
from besteffort.policies import Greedy, Policy, Thresholds, learned
from besteffort.progress import Silent
from besteffort.q_network import QNetwork
from besteffort.simulator import simulate
from besteffort.stages.paper import run_paper
from besteffort.thresholds import ThresholdTable
from besteffort.workload import stable, unpredictable_1
from tests.conftest import ROOT
from tests.test_cli import refused

TITAN = ROOT / "artifacts" / "titan-rtx-opt"
SMALL = Effort(
    num_seeds=2, rates_per_s=(1, 4, 16), num_runs=2, num_requests=150, hindsight_s=0.2, num_duel_traces=3
)  # fmt: skip


@pytest.fixture(scope="module")
def titan() -> Service:
    fleet = load_fleet(TITAN)
    latency = load_latency(TITAN / "profile.parquet", fleet)
    return Service(fleet, latency, load_rewards(TITAN / "rewards.parquet", fleet))


def _untrained(fleet: Fleet, encoding: Encoding | FleetEncoding | None = None) -> TrainedPolicy:
    """A network of the right shape, which prefers something else in every state."""
    encoding = encoding or encoding_for(fleet)
    rng = np.random.default_rng(0)
    sizes = [(encoding.size, 16), (16, len(fleet.models))]
    weights = tuple(rng.normal(size=size).astype(np.float32) for size in sizes)
    biases = tuple(np.zeros(size[1], dtype=np.float32) for size in sizes)
    return TrainedPolicy(QNetwork(weights, biases), encoding, {})


def _fleet_dir(folder: Path, fleet: Fleet) -> Path:
    for name in ("fleet.toml", "profile.parquet", "rewards.parquet"):
        (folder / name).symlink_to(TITAN / name)
    for name, variant in variants(fleet).items():
        save_policy(folder / "policies" / f"{name}.safetensors", _untrained(variant), variant)
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, titan: Service) -> Path:
    """A folder in which `paper` has been, with little effort."""
    folder = _fleet_dir(tmp_path_factory.mktemp("artifacts"), titan.fleet)
    run_paper(folder, docs_dir=folder / "docs", effort=SMALL, progress=Silent())
    return folder


def test_every_figure_is_on_both_pages(pages: Path) -> None:
    html, markdown = (pages / "paper/paper.html").read_text(), (pages / "docs/paper.md").read_text()
    for number in range(2, 15):
        assert f"<strong>Figure {number}</strong>" in html
        assert f"![Figure {number}," in markdown
    assert html.count("<svg") == 13
    plots = re.findall(r"\]\((paper/[^)]+)\)", markdown)
    assert len(plots) == 13
    assert all((pages / "docs" / plot).read_bytes().startswith(b"\x89PNG") for plot in plots)
    assert not re.search(r'(src|href)="(?!#|data:)', html)


def test_every_table_is_on_both_pages_beside_the_papers_numbers(pages: Path) -> None:
    html, markdown = (pages / "paper/paper.html").read_text(), (pages / "docs/paper.md").read_text()
    for page in (html, markdown):
        for number in range(1, 5):
            assert f"Table {number}: " in page
        for count in ("142", "1,264", "1,723", "4,740", "2,810", "1,497"):
            assert count in page
        for said in ("97.03%", "3.94x", "1.51x", "+52%", "4.11x", "28.21x"):
            assert said in page
        assert "simulated on a modelled profile" in page
        assert not re.search(r"\b(nan|inf)\b", page)


def test_the_numbers_of_every_experiment_are_finite(pages: Path) -> None:
    plain = json.loads((pages / "paper/paper.json").read_text())
    assert len(plain["stable"]) == 9
    assert len(plain["unpredictable"]) == 4
    for sweep in plain["stable"].values():
        for way in sweep["ways"].values():
            assert np.shape(way["performance"]) == (3,)
            assert np.all((np.array(way["performance"]) >= 0) & (np.array(way["performance"]) <= 1))
            assert np.allclose(np.sum(way["selection"], axis=1), 1, atol=1e-4)
    for duel in plain["duels"].values():
        assert all(np.shape(of_way) == (3,) for of_way in duel.values())
    for burst in plain["unpredictable"].values():
        assert all(0 <= value <= 1 for way in burst.values() for value in way["performance"])
    for name in ("unpredictable-1", "unpredictable-2"):
        ways = {way: np.array(of["performance"]) for way, of in plain["unpredictable"][name].items()}
        assert all(np.all(ways["hindsight"] >= reached - 1e-9) for reached in ways.values())
        windows = {way: np.array(of["windows"]["0.96"]) for way, of in plain["unpredictable"][name].items()}
        bounds = np.array(plain["most_windows"][name]["0.96"])
        assert all(np.all(reached <= bounds) for reached in windows.values())


def test_what_is_published_is_what_the_paper_prints() -> None:
    """The constants that its text repeats as ratios agree with its tables."""
    for table, ratios, medium in (
        (published.TABLE_2, published.RATIOS_1, published.RATIO_TO_MEDIUM_1),
        (published.TABLE_3, published.RATIOS_2, published.RATIO_TO_MEDIUM_2),
    ):
        for threshold, ratio in ratios.items():
            row = table[threshold]
            assert row.policy / row.large == pytest.approx(ratio, abs=0.011)
        assert table["0.94"].policy / table["0.94"].medium == pytest.approx(medium, abs=0.011)
    assert [tuple(row) for row in published.TABLE_2.values()] == [
        (142, 307, 0), (470, 307, 0), (713, 307, 0), (1264, 307, 0), (1723, 625, 154)
    ]  # fmt: skip
    assert [tuple(row) for row in published.TABLE_3.values()] == [
        (447, 1378, 0), (1977, 1378, 0), (3121, 1378, 0), (4141, 1378, 0), (4740, 2810, 168)
    ]  # fmt: skip
    assert [tuple(row) for row in published.TABLE_4.values()] == [
        (170, 369, 0), (551, 696, 0), (812, 727, 0), (1163, 727, 0), (1497, 1302, 0)
    ]  # fmt: skip
    assert published.REWARDS == {
        "hellaswag": (0.45, 0.78, 1.00),
        "copa": (0.80, 0.95, 1.00),
        "piqa": (0.82, 0.96, 1.00),
        "openbookqa": (0.70, 0.94, 1.00),
    }


def test_a_riemann_sum_by_hand() -> None:
    # From 1 to 3 at heights 1 and 0.5, from 3 to 7 at 0.5 and 0: 2 * 0.75 + 4 * 0.25.
    assert riemann_sum(np.array([1.0, 3.0, 7.0]), np.array([1.0, 0.5, 0.0])) == pytest.approx(2.5)


def _curves(performance: list[list[float]], met: list[list[float]], large_share: float) -> Curves:
    seeds, rates = np.shape(performance)
    selection = np.broadcast_to([1 - large_share, large_share], (seeds, rates, 2))
    by_task = np.broadcast_to(selection[:, :, None], (seeds, rates, 2, 2))
    return Curves(np.array(performance), np.array(met), selection, by_task)


def test_availability_ends_where_the_first_deadlines_are_missed(fleet: Fleet) -> None:
    met = [[1.0, 0.96, 0.5, 0.99], [0.9, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.95]]
    sweep = Sweep(fleet, np.array([1.0, 2.0, 4.0, 8.0]), {POLICY: _curves([[1.0] * 4] * 3, met, 0.5)})
    assert availability_per_s(sweep, POLICY).values.tolist() == [2.0, 0.0, 8.0]


def test_the_soft_increase_is_relative(fleet: Fleet) -> None:
    hard, soft = (
        Sweep(fleet, np.array([1.0, 2.0]), {POLICY: _curves([[1.0, 1.0]], [[1.0, 1.0]], share)})
        for share in (0.4, 0.5)
    )
    assert soft_increase(hard, soft)["copa"].mean == pytest.approx(0.25)


def _burst(fleet: Fleet, way: str, performance: list[float]) -> Burst:
    values = np.array([performance])
    return Burst(fleet, [], np.ones_like(values), {way: values}, {way: np.zeros(values.shape, dtype=int)})


def test_hardware_utility_is_per_gpu(titan: Service) -> None:
    narrow = titan.fleet
    wide = doubled(narrow)
    assert (wide.num_gpus, {model.replicas for model in wide.models}) == (8, {8})
    large = "static opt-6.7b"
    # Windows of the first 20 and the last 20 requests differ: .8 / 4 against 1 / 8, then against 0.
    ours, theirs = [0.8] * 40, [1.0] * 20 + [0.0] * 20
    empty = Sweep(narrow, np.array([1.0]), {})
    experiments = Experiments(
        hard=empty, soft=empty, deadlines=empty, alone={}, two_tasks=_burst(narrow, POLICY, ours),
        unpredictable={"unpredictable-1": _burst(narrow, POLICY, ours)},
        hard_8=empty, soft_8=empty, unpredictable_8=_burst(wide, large, theirs),
    )  # fmt: skip
    utility = hardware_utility(experiments)
    assert utility.above_share.mean == 1.0
    assert utility.ratio.mean == pytest.approx(2 * 0.8 / 0.5)
    assert utility.highest_ratio.mean == pytest.approx(2 * 1 / 0.5)
    assert utility.peak_ratio == 0.0


def test_a_lead_is_judged_by_the_differences_on_single_traces() -> None:
    policy = np.array([0.9, 0.5, 0.7])
    duel = Duel({POLICY: policy, "near": policy - [0.01, 0.02, 0.03], "far": policy - 0.4})
    near, far = leads(duel)
    assert (near.other, far.other) == ("near", "far")
    assert (near.mean, far.mean) == (pytest.approx(0.02), pytest.approx(0.4))
    assert near.half_width == pytest.approx(4.30 * 0.01 / np.sqrt(3))
    assert far.half_width == pytest.approx(0.0, abs=1e-12)


def test_a_ratio_of_windows_is_over_all_seeds(fleet: Fleet) -> None:
    performance = {"a": np.array([[1.0] * 21, [0.0] * 21]), "b": np.array([[0.0] * 21, [1.0] * 20 + [0.0]])}
    burst = Burst(fleet, [], np.ones((2, 21)), performance, {})
    assert window_ratio(burst, "a", "b", "1.00") == 2.0


def _bounded(fleet: Fleet, policy: int, plan: int, most: int) -> Burst:
    """So many of the first trace's 100 windows; the largest model has 10. The second trace has none."""
    performance = {}
    for way, num_windows in {"static opt-6.7b": 10, POLICY: policy, HINDSIGHT: plan}.items():
        performance[way] = np.zeros((2, 119))
        performance[way][0, : num_windows + 19] = 1.0
    bounds = {"0.96": np.array([most, 0])}
    traces = [stable(fleet, np.random.default_rng(0), 1.0)] * 2
    return Burst(fleet, traces, np.ones((2, 119)), performance, {}, bounds)


@pytest.mark.parametrize(
    ("policy", "plan", "most", "verdict", "said"),
    [
        (50, 30, 90, "reached", "The policy has the paper's 4.1x"),
        (30, 50, 90, "possible", "are possible here"),
        (20, 30, 40, "impossible", "impossible for any policy"),
        (20, 30, 41, "unknown", "is not known"),
    ],
)
def test_what_is_said_of_a_ratio_follows_from_the_bound(
    titan: Service, policy: int, plan: int, most: int, verdict: str, said: str
) -> None:
    burst = _bounded(titan.fleet, policy, plan, most)
    assert window_verdict(burst, "0.96", 4.1) == verdict
    (table,) = bound_tables(burst, {"0.96": 4.1})
    assert said in table.note
    assert table.rows[0] == ["seed 0", "10", *(f"{n} ({n / 10:.2f}x)" for n in (policy, plan, most))]
    assert table.rows[1][1:] == ["0"] + ["0 (–)"] * 3  # noqa: RUF001
    assert table.rows[2][0] == "all"


def test_a_task_without_requests_at_a_seed_is_left_out_of_the_mean() -> None:
    mean, std = mean_and_std(np.array([[0.5, np.nan], [0.7, 0.3]]))
    assert mean.tolist() == pytest.approx([0.6, 0.3])
    assert std.tolist() == pytest.approx([0.1, 0.0])


def test_policies_for_many_fleets_choose_as_those_for_one(titan: Service) -> None:
    fleet = titan.fleet
    rng = np.random.default_rng(3)
    table = ThresholdTable(np.array([4.0, 20.0]), rng.integers(-1, 9, (4, 3, 2)).astype(float), 4)
    trained, seeing_more = (
        _untrained(fleet),
        _untrained(fleet, FleetEncoding(4, 3, (9.0, 9.0, 4.0), 24.0, (1.0, 6.0))),
    )
    greedy = Greedy(titan.latency, titan.rewards.relative, fleet)
    pairs: list[tuple[Policy, Chooser]] = [
        (learned(trained, "x"), LearnedMany(trained)),
        (learned(seeing_more, "y"), LearnedMany(seeing_more)),
        (greedy, GreedyMany(titan)),
        (Thresholds(table), ThresholdsMany(table)),
    ]
    trace = unpredictable_1(fleet, np.random.default_rng(5), num_requests=400)
    runs = runs_of([trace])
    for policy, chooser in pairs:
        alone = simulate(trace, fleet, titan.latency, policy.choose)
        together = serve_many(runs, titan, chooser)
        assert together.model[0].tolist() == alone.model.tolist(), policy.name
        met = alone.latency_ms_per_token <= 40
        assert np.mean(together.deadline_met[0] == met) > 0.99  # one rounds in seconds, one in ms


def test_runs_of_unequal_length_do_not_disturb_each_other(titan: Service) -> None:
    workloads = [stable(titan.fleet, np.random.default_rng(seed), 3.0) for seed in range(4)]
    runs = runs_of(workloads, true_rate_per_s=3.0)
    assert runs.counts.sum(axis=1).tolist() == [len(workload) for workload in workloads]
    assert (runs.rates_per_s == 3.0).all()
    together = serve_many(runs, titan, GreedyMany(titan))
    for row, workload in enumerate(workloads):
        alone = serve_many(runs_of([workload], true_rate_per_s=3.0), titan, GreedyMany(titan))
        assert together.performance[row, : len(workload)].tolist() == alone.performance[0].tolist()


class _Large:
    """The same as `StaticMany(2)`, asked each time."""

    def choose_many(self, seen: Seen) -> NDArray[np.int64]:
        return np.full(len(seen.tasks), 2)


def test_a_static_way_is_served_as_any_other(titan: Service) -> None:
    runs = runs_of([stable(titan.fleet, np.random.default_rng(seed), 5.0) for seed in range(2)])
    asked, fixed = serve_many(runs, titan, _Large()), serve_many(runs, titan, StaticMany(2))
    assert asked.model.tolist() == fixed.model.tolist()
    assert asked.performance.tolist() == fixed.performance.tolist()


def test_variants_are_fleets_that_a_file_can_hold(titan: Service, tmp_path: Path) -> None:
    fleets = variants(titan.fleet)
    assert [fleet.deadline_kind for fleet in fleets.values()] == ["hard", "soft", "hard"]
    deadlines = {task.name: task.deadline_ms_per_token for task in fleets["deadlines"].tasks}
    assert deadlines == {"hellaswag": 40, "copa": 32, "piqa": 40, "openbookqa": 80}
    for fleet in fleets.values():
        (tmp_path / "fleet.toml").write_text(as_toml(fleet))
        assert load_fleet(tmp_path) == fleet
    assert with_only(titan.fleet, ["copa"]).task_shares == (0.0, 1.0, 0.0, 0.0)


def test_a_fleet_with_other_tasks_is_told_so(tmp_path: Path, fleet: Fleet) -> None:
    (tmp_path / "fleet.toml").write_text(as_toml(fleet))
    with pytest.raises(UsageError, match="exactly the tasks"):
        run_paper(tmp_path, progress=Silent())


def test_a_policy_that_is_missing_is_told_by_its_path(tmp_path: Path, titan: Service) -> None:
    _fleet_dir(tmp_path, titan.fleet)
    (tmp_path / "policies" / "soft.safetensors").unlink()
    with pytest.raises(PolicyError, match=r"soft\.safetensors"):
        run_paper(tmp_path, progress=Silent())


def test_what_goes_only_with_a_training_is_refused_without_one() -> None:
    refused("paper", TITAN, "--seed", 1, saying="--recipe and --seed go only with --train")
