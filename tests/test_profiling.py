"""What is measured, what is made of it, and what is said about it; the engines are only played."""

import asyncio
import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from besteffort.artifacts import files
from besteffort.artifacts.profile_file import SCHEMA, load_latency, load_samples, save_samples, with_fit
from besteffort.engines.client import Completion, complete, completion_body, open_session
from besteffort.engines.measure import Target, joined_prompts, serve, steady_pace_ms, wave_paces_ms
from besteffort.errors import ProfileError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.latency import Latency, Sample, Served, fit_latency, fitted_ms
from besteffort.latency.samples import spread_of
from besteffort.profiling import Run, doubts, measuring, origin_of, plan_runs
from besteffort.profiling.measuring import Cell
from besteffort.profiling.plot import plot_profile
from besteffort.profiling.service import with_scales
from besteffort.profiling.verdict import choice, crossings, suggest_deadlines
from besteffort.progress import Silent
from besteffort.request import Requests
from besteffort.simulator import simulate_choices
from besteffort.stages.gpu_fleet import gpu_fleet
from besteffort.stages.profile import _Notebook
from tests.conftest import ROOT
from tests.fake_engine import FakeEngine, serving
from tests.test_score import Lines

TINY = load_fleet(ROOT / "artifacts" / "tiny-opt-cpu")
NAMES = ("small", "large")
TRUTH = Latency(
    batch_sizes=np.array([1, 4, 16]),
    step_ms=np.array([[2.0, 3.0, 6.0], [16.0, 18.0, 30.0]]),
    prefill_base_ms=np.array([3.0, 20.0]),
    prefill_ms_per_token=np.array([0.05, 1.0]),
    slowdown=np.array([[1.0, 1.0, 1.4, 1.4], [1.0, 1.2, 1.0, 1.2]]),
    context_ms_per_token=np.array([0.001, 0.004]),
    overhead_ms=np.array([3.0, 4.0]),
    pressure=np.array([[0.0, 0.1], [0.05, 0.0]]),
    lag_steps=1,
)


def sample(kind: str, model: int, batch_size: int, prompt: int, **more: object) -> Sample:
    """As a run without any noise would give it."""
    blank = {"mean_ms": 1.0, "std_ms": 0.0, "p50_ms": 1.0, "p95_ms": 1.0, "num_measurements": 3}
    fields = {"busy_models": (), **blank, **more}
    made = Sample(kind, NAMES[model], batch_size, prompt, **fields)  # type: ignore[arg-type]
    return replace(made, mean_ms=fitted_ms(made, TRUTH, NAMES))


def every_kind() -> list[Sample]:
    samples = []
    for model in range(2):
        cells = [(b, c) for b in (1, 4, 16) for c in (40.0, 400.0)]
        samples += [sample("decode", model, b, 16, context_tokens=c) for b, c in cells]
        samples += [sample("prefill", model, 1, n) for n in (32, 256)]
        for kind in ("stall", "joining"):
            samples += [sample(kind, model, 4, n) for n in (32, 256)]
        for own, other in ((4, 4), (1, 16), (16, 1)):
            beside = {"busy_models": (NAMES[1 - model],), "busy_batch_sizes": (other,)}
            samples.append(sample("interference", model, own, 16, context_tokens=40.0, **beside))
    return samples


def test_the_fit_finds_again_what_the_samples_were_made_of() -> None:
    latency = fit_latency(every_kind(), NAMES)
    for name in (
        "step_ms",
        "prefill_base_ms",
        "prefill_ms_per_token",
        "context_ms_per_token",
        "overhead_ms",
        "slowdown",
        "pressure",
    ):
        np.testing.assert_allclose(getattr(latency, name), getattr(TRUTH, name), rtol=1e-6, err_msg=name)
    assert latency.lag_steps == 1


def test_prompts_on_a_gpu_are_measured_on_either_side_of_the_last_captured_graph() -> None:
    of_gpu = load_fleet(ROOT / "artifacts" / "one-gpu-opt")
    many_seats = of_gpu.model_copy(
        update={"models": tuple(m.model_copy(update={"max_num_seqs": 400}) for m in of_gpu.models)}
    )
    for fleet, edges in ((of_gpu, {112, 144}), (many_seats, {496, 528}), (TINY, set())):
        lengths = {run.num_prompt_tokens for run in plan_runs(fleet) if run.kind == "prefill"}
        longest = int(0.7 * fleet.engine.max_model_len)
        assert lengths - {longest} == {n for n in (16, 64, 256, 1024) if n < longest} | edges


def test_an_interrupted_run_serves_a_service_anew_that_was_served_once(tmp_path: Path, fleet: Fleet) -> None:
    served = services_of(fleet, TRUTH)[0]
    first = [one.at_s for one in served.served]
    again = tuple(replace(one, at_s=one.at_s + first[-1] + 30.0) for one in served.served)
    twice = replace(served, served=(*served.served, *again))
    decode = every_kind()[0]
    facts = {"fleet_sha256": "abc", "origin": {"vllm": "0"}}
    for service, kept in ((served, [decode]), (twice, [decode, twice])):
        path = tmp_path / "profile.partial.parquet"
        save_samples(path, [decode, service], facts)
        notebook = _Notebook(path, facts)
        notebook.take_up(Silent())
        assert notebook.samples == kept


def test_a_wait_of_some_ms_beside_short_steps_is_not_taken_for_steps() -> None:
    def later(sample: Sample) -> Sample:
        is_meant = sample.kind == "joining" and sample.model == NAMES[0]
        return replace(sample, mean_ms=sample.mean_ms + 5.0) if is_meant else sample

    assert fit_latency([later(sample) for sample in every_kind()], NAMES).lag_steps == TRUTH.lag_steps


def test_the_residuals_of_a_perfect_fit_are_nothing_and_those_of_noise_are_not(fleet: Fleet) -> None:
    exact, _ = with_fit(every_kind(), fleet)
    assert all(s.fitted_ms == pytest.approx(s.mean_ms, rel=1e-6) for s in exact)
    noisy = [replace(s, mean_ms=1.3 * s.mean_ms) if s.busy_batch_sizes == (16,) else s for s in exact]
    refitted, _ = with_fit(noisy, fleet)
    assert any(abs((s.fitted_ms or 0.0) / s.mean_ms - 1) > 0.01 for s in refitted)


def test_a_profile_comes_back_from_its_file_as_it_was(tmp_path: Path, fleet: Fleet) -> None:
    path = tmp_path / "profile.parquet"
    services = [replace(s, scale=1.1, overhead_ms=2.0) for s in services_of(fleet, TRUTH, timed=True)]
    every = [*(replace(s, ci_ms=0.1, outliers_ms=(9.0,)) for s in every_kind()), *services]
    samples, latency = with_fit(every, fleet)
    save_samples(path, samples, {"stage": "profile"})
    read, facts = load_samples(path)
    assert read == samples
    assert facts["stage"] == "profile"
    np.testing.assert_array_equal(load_latency(path, fleet).pressure, latency.pressure)


def test_a_file_of_version_1_is_read_and_one_of_version_5_is_refused_in_one_line(
    tmp_path: Path, fleet: Fleet
) -> None:
    import pyarrow as pa

    old = pa.schema([field for field in SCHEMA if not field.nullable])
    rows = [
        {name: getattr(s, name) for name in old.names}
        for s in every_kind()
        if s.kind in ("decode", "prefill")
    ]
    table = pa.Table.from_pylist(rows, schema=old)
    path = tmp_path / "profile.parquet"
    files.write_table(path, table, kind="profile", version=1, facts={})
    latency = load_latency(path, fleet)
    assert latency.lag_steps is None
    assert not latency.overhead_ms.any()
    files.write_table(path, table, kind="profile", version=5, facts={})
    with pytest.raises(ProfileError, match=r"schema version 5 is unknown .* reads version 1.* and 4"):
        load_samples(path)


def services_of(fleet: Fleet, latency: Latency, *, timed: bool = False) -> list[Sample]:
    """Each model alone and both together, at two loads, as these latencies would have it.

    If `timed`, with the times to first tokens.
    """
    rng = np.random.default_rng(3)
    made = []
    for group, rate_per_s in itertools.product([(0,), (1,), (0, 1)], (1.5, 3.0)):
        num = 60 * len(group)
        requests = Requests(
            arrived_at=np.sort(rng.uniform(0.0, 60.0 / rate_per_s, num)),
            task=np.zeros(num, dtype=np.int64),
            num_prompt_tokens=rng.integers(16, 65, num),
            num_output_tokens=rng.integers(8, 33, num),
        )
        choices = rng.choice(group, num)
        outcomes = simulate_choices(requests, fleet, latency, choices)
        for model in group:
            others = tuple(NAMES[m] for m in group if m != model)
            served = [
                Served(float(at), int(prompt), int(output), float(taken), float(first) if timed else None)
                for at, prompt, output, taken, first in zip(
                    requests.arrived_at, requests.num_prompt_tokens, requests.num_output_tokens,
                    outcomes.latency_ms_per_token, outcomes.ttft_ms, strict=True,
                )
            ]  # fmt: skip
            own = tuple(one for one, choice in zip(served, choices, strict=True) if choice == model)
            size = round(rate_per_s)
            about = {"busy_models": others, "busy_batch_sizes": (size,) * len(others), "served": own}
            spread = spread_of([one.latency_ms_per_token for one in own], keep_all=True)
            made.append(Sample("service", NAMES[model], size, 40, **{**about, **spread}))  # type: ignore[arg-type]
    return made


def test_services_tell_how_long_steps_and_slow_downs_really_are(fleet: Fleet) -> None:
    """The cells say nothing of what the machine does where requests come and go, and beside others."""
    alone = [s for s in every_kind() if s.kind != "interference"]
    bare = fit_latency(alone, NAMES)
    real = replace(
        bare,
        step_ms=bare.step_ms * np.array([[1.3], [0.9]]),
        context_ms_per_token=bare.context_ms_per_token * np.array([1.3, 0.9]),
        slowdown=np.array([[1.0, 1.0, 1.8, 1.8], [1.0, 1.5, 1.0, 1.5]]),
    )
    scaled = with_scales([*alone, *services_of(fleet, real)], fleet)
    found = fit_latency(scaled, NAMES)
    np.testing.assert_allclose(found.step_ms, real.step_ms, rtol=0.02)
    np.testing.assert_allclose(found.slowdown, real.slowdown, rtol=0.1)
    services = [s for s in scaled if s.kind == "service"]
    assert all(s.fitted_ms == pytest.approx(s.mean_ms, rel=0.02) for s in services)
    assert [replace(s, scale=None, fitted_ms=None) for s in services] == services_of(fleet, real)


def test_services_tell_what_surrounds_the_steps_from_the_steps(fleet: Fleet) -> None:
    """Answers are longer elsewhere than in the profile: one must not pass as the other."""
    alone = [s for s in every_kind() if s.kind != "interference"]
    bare = fit_latency(alone, NAMES)
    real = replace(bare, step_ms=bare.step_ms * 0.9, overhead_ms=bare.overhead_ms + np.array([5.0, -1.0]))
    scaled = with_scales([*alone, *services_of(fleet, real, timed=True)], fleet)
    found = fit_latency(scaled, NAMES)
    np.testing.assert_allclose(found.step_ms, real.step_ms, rtol=0.02)
    np.testing.assert_allclose(found.overhead_ms, real.overhead_ms, atol=0.2)
    assert all(s.overhead_ms is None for s in scaled if s.busy_models)


def test_one_load_that_contradicts_another_moves_both_by_half(fleet: Fleet) -> None:
    """What two samples share is fitted to both; none of them runs away."""
    alone = [s for s in every_kind() if s.kind != "interference"]
    services = [s for s in services_of(fleet, fit_latency(alone, NAMES)) if not s.busy_models]
    torn = [replace(s, mean_ms=s.mean_ms * (1.2 if s.batch_size == 2 else 1 / 1.2)) for s in services]
    scales = [s.scale for s in with_scales([*alone, *torn], fleet) if s.kind == "service"]
    assert all(scale is not None and 0.7 < scale < 1.4 for scale in scales)


def test_outliers_are_kept_and_marked_and_do_not_move_the_mean() -> None:
    spread = spread_of([10.0, 10.2, 9.8, 10.1, 40.0])
    assert spread["outliers_ms"] == (40.0,)
    assert spread["num_measurements"] == 5
    assert spread["mean_ms"] == pytest.approx(10.025)
    assert 0 < spread["ci_ms"] < 0.3
    assert spread_of([10.0, 10.0, 10.0, 11.0])["outliers_ms"] == ()


def test_what_a_fit_needs_is_planned_first_and_suffices_for_it() -> None:
    runs = plan_runs(TINY)
    needed = [run for run in runs if run.needed]
    assert runs[: len(needed)] == needed
    assert len(set(runs)) == len(runs)
    kinds = {kind: [run for run in needed if run.kind == kind] for kind in {run.kind for run in needed}}
    assert {len(run.models) for run in kinds["service"]} == {1, 2, 3}
    for model in range(3):
        own = [run for run in needed if run.models == (model,)]
        assert len({run.batch_sizes for run in own if run.kind == "decode"}) >= 3
        assert len({run.num_prompt_tokens for run in own if run.kind == "prefill"}) == 2
        assert any(run.kind == "stall" for run in own)
    assert all(b <= 32 for run in runs for b in run.batch_sizes)
    loads = {run.batch_sizes for run in runs if len(run.models) == 3}
    assert len(loads) == 2  # or nothing could be said of what more load does


def test_no_run_asks_for_more_tokens_than_the_engine_takes() -> None:
    for length in (64, 512, 2048):
        engine = TINY.engine.model_copy(update={"max_model_len": length})
        runs = plan_runs(TINY.model_copy(update={"engine": engine}))
        assert max(run.num_prompt_tokens for run in runs) <= length - 8
        varied = [run.num_prompt_tokens for run in runs if run.kind in ("prefill", "stall")]
        assert max(varied) + 16 <= length - 8


def test_a_cell_says_how_sure_it_is() -> None:
    run = plan_runs(TINY)[0]
    cell = Cell(run, values={("decode", run.models[0]): [10.0, 10.1, 9.9]})
    assert 0 < cell.width(TINY) < 0.02
    cell.values["decode", run.models[0]] = [10.0]
    assert cell.width(TINY) == np.inf


def completion(sent_at: float, chunk_at: tuple[float, ...], tokens_at: tuple[int, ...]) -> Completion:
    return Completion(sent_at, chunk_at, tokens_at[-1], {}, tokens_at)


def test_a_pace_counts_tokens_where_one_event_carries_several() -> None:
    every_step = completion(0.0, tuple(0.01 * n for n in range(1, 11)), tuple(range(1, 11)))
    merged = completion(0.0, (0.02, 0.05, 0.1), (2, 5, 10))
    assert steady_pace_ms([merged]) == pytest.approx(10.0)
    assert steady_pace_ms([every_step, merged]) == pytest.approx(10.0)
    late = completion(0.0, (0.2, 0.3), (1, 11))
    assert steady_pace_ms([every_step, late]) is None


def test_waves_and_joining_prompts_are_measured_on_an_engine_that_is_played() -> None:
    async def measure(url: str) -> tuple[float, int]:
        async with open_session(20) as session:
            target = Target(session, url, "played", np.random.default_rng(0))
            waves = wave_paces_ms(target, 2, 8, 12, 100)
            pace_ms = await anext(waves)
            await waves.aclose()  # type: ignore[attr-defined]
            return pace_ms, len(await joined_prompts(target, 2, 8, 3, 30.0, 100))

    with serving(FakeEngine("played", 0.03, counts=True).app) as url:
        pace_ms, num_joined = asyncio.run(measure(url))
    assert pace_ms >= 30.0  # it sleeps that long for each token
    assert 0 < num_joined <= 3


def test_requests_come_and_go_and_each_is_noted() -> None:
    async def measure(url: str) -> list[list[Served]]:
        async with open_session(20) as session:
            targets = [Target(session, url, name, np.random.default_rng(0)) for name in ("one", "other")]
            return await serve(targets, 40.0, lambda rng: (8, int(rng.integers(2, 6))), 0.5)

    with serving(FakeEngine("played", 0.002, counts=True).app) as url:
        found = asyncio.run(measure(url))
    assert len(found) == 2
    for served in found:
        assert len(served) > 5
        assert [one.at_s for one in served] == sorted(one.at_s for one in served)
        assert all(one.latency_ms_per_token >= 2.0 for one in served)  # it sleeps that long for each token
        assert {one.num_output_tokens for one in served} <= {2, 3, 4, 5}


def test_each_service_is_measured_a_second_time_when_all_is_measured(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SERVICE_S", (0.3, 0.3, 0.3))
    runs = [Run("service", (0,), (2,), 8, needed=True), Run("prefill", (0,), (1,), 8, needed=True)]
    with serving(FakeEngine("played", 0.002, counts=True).app) as url:
        effort = measuring.Effort(60.0, precision=10.0, ends_at=time.monotonic() + 60.0)
        rng, noted = np.random.default_rng(0), list[int]()
        cells = asyncio.run(
            measuring.measure_fleet(
                fleet, url, runs, effort, lambda cells: noted.append(len(cells)), rng, Silent()
            )
        )
    assert [cell.num_times for cell in cells] == [2, 1]
    assert noted == [1, 2, 2]
    gaps_s = np.diff([one.at_s for one in cells[0].served[0]])
    assert gaps_s.max() > 20.0  # for the simulator they are two services


def test_no_service_gets_more_requests_than_the_fleet_at_its_highest_rate(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SERVICE_S", (1.0, 1.0, 1.0))
    calm = fleet.model_copy(update={"rate_scale": 10.0 / 48.0})
    cell = Cell(Run("service", (0,), (5,), 8, needed=True))

    async def measure(url: str) -> None:
        async with open_session(20) as session:
            targets = [Target(session, url, name, np.random.default_rng(0)) for name in NAMES]
            bench = measuring.Bench(targets, calm)
            await bench.warm_up(ends_at=0.0)
            await bench.measure(cell)

    with serving(FakeEngine("played", 0.002, counts=True).app) as url:
        asyncio.run(measure(url))
    assert 1 <= len(cell.served[0]) <= 20  # 10 a second on average; the engine could take ten times as many


def test_prompts_join_a_batch_of_a_fast_engine_too() -> None:
    async def measure(url: str) -> int:
        async with open_session(20) as session:
            target = Target(session, url, "played", np.random.default_rng(0))
            return len(await joined_prompts(target, 2, 8, 2, 2.0, 500))

    with serving(FakeEngine("played", 0.002, counts=True).app) as url:
        assert asyncio.run(measure(url)) > 0


def test_prompts_join_so_far_apart_that_no_event_of_the_batch_tells_of_two() -> None:
    step_s, tokens_per_event = 0.002, 8
    engine = FakeEngine("played", step_s, counts=True, tokens_per_event=tokens_per_event)

    async def measure(url: str) -> int:
        async with open_session(20) as session:
            target = Target(session, url, "played", np.random.default_rng(0))
            return len(await joined_prompts(target, 2, 8, 3, 1000 * step_s, 500))

    with serving(engine.app) as url:
        assert asyncio.run(measure(url)) > 1
    joined_at = [
        at for body, at in zip(engine.bodies, engine.came_at, strict=True) if body["max_tokens"] == 1
    ]
    # One event may hold the prompt's beginning, the next its end.
    assert np.diff(joined_at).min() > 2 * tokens_per_event * step_s


@pytest.mark.parametrize(("num_gpus", "num_prompts"), [(0, 6), (1, 0)])
def test_each_number_of_tokens_in_a_step_is_read_once_before_anything_is_measured_on_a_cpu(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, num_gpus: int, num_prompts: int
) -> None:
    monkeypatch.setattr(measuring, "_MOST_ROWS", 6)
    engine = FakeEngine("played", 0.001, counts=True)

    async def warm_up(url: str) -> None:
        async with open_session(20) as session:
            target = Target(session, url, "played", np.random.default_rng(0))
            bench = measuring.Bench([target], fleet.model_copy(update={"num_gpus": num_gpus}))
            await bench.warm_up(ends_at=time.monotonic() + 60)

    with serving(engine.app) as url:
        asyncio.run(warm_up(url))
    lengths = [len(body["prompt"]) for body in engine.bodies if body["max_tokens"] == 1]
    assert lengths == [*range(1, num_prompts + 1)]


def test_a_server_that_does_not_count_along_leaves_the_tokens_of_events_open() -> None:
    async def ask(url: str) -> Completion:
        async with open_session(20) as session:
            return await complete(session, url, completion_body("played", [100] * 4, 3, counted=True))

    with serving(FakeEngine("played", counts=True).app) as url:
        answered = asyncio.run(ask(url))
    assert answered.num_tokens == 3
    assert answered.tokens_at == ()


def test_a_profile_is_doubted_for_each_thing_that_is_another_now() -> None:
    path = Path("artifacts/x/profile.parquet")
    origin = origin_of(TINY)
    assert doubts(path, {"origin": origin}, TINY) == []
    assert doubts(path, {"source": "modelled"}, TINY) == []
    assert "does not say on what" in doubts(path, {}, TINY)[0]
    (line,) = doubts(path, {"origin": {**origin, "vllm": "0.1"}}, TINY)
    assert "vLLM's version was 0.1 and is" in line
    assert "besteffort profile artifacts/x" in line
    (line,) = doubts(path, {"origin": {**origin, "hardware": "2 abaci"}}, TINY)
    assert "the hardware was 2 abaci" in line
    engine = TINY.engine.model_copy(update={"args": ("--dtype", "float32")})
    (line,) = doubts(path, {"origin": origin}, TINY.model_copy(update={"engine": engine}))
    assert "fleet.toml's engine's args was" in line


def test_a_models_crossing_is_the_first_batch_that_misses_the_deadline() -> None:
    latency = Latency(
        batch_sizes=np.array([1, 32]),
        step_ms=np.array([[1.0, 10.0], [10.0, 72.0], [90.0, 95.0]]),
        prefill_base_ms=np.array([1.0, 10.0, 90.0]),
        prefill_ms_per_token=np.zeros(3),
        slowdown=np.ones((3, 8)),
    )
    small, medium, large = crossings(TINY, latency)
    assert "up to all of its 32 seats" in small.line
    # 20 tokens: 10 ms, then 19 steps of 10 + 2 (b - 1) ms: under 40 ms each up to batch 16.
    assert medium.last_batch_size == 16
    assert "crosses 40 ms/token (hellaswag, copa, piqa, openbookqa) at batch 17" in medium.line
    assert "never makes" in large.line


@pytest.mark.parametrize(
    ("factor", "says"), [(1.0, "something to decide"), (0.01, "is in time from"), (50.0, "only")]
)
def test_whether_there_is_anything_to_decide_depends_on_how_fast_the_models_are(
    factor: float, says: str
) -> None:
    titan = ROOT / "artifacts" / "titan-rtx-opt"
    fleet = load_fleet(titan)
    latency = load_latency(titan / "profile.parquet", fleet)
    slower = replace(
        latency,
        step_ms=latency.step_ms * np.array([1.0, 1.0 if factor < 2 else factor, factor])[:, None],
        prefill_ms_per_token=latency.prefill_ms_per_token * min(factor, 1.0),
        prefill_base_ms=latency.prefill_base_ms * min(factor, 1.0),
    )
    found = choice(fleet, slower)
    assert says in found.lines[-1]
    assert found.is_trivial is (factor != 1.0)


def test_the_suggested_deadline_is_near_the_papers_on_the_papers_fleet() -> None:
    titan = ROOT / "artifacts" / "titan-rtx-opt"
    fleet = load_fleet(titan)
    found = suggest_deadlines(fleet, load_latency(titan / "profile.parquet", fleet))
    assert 30 < found.deadlines_ms_per_token["copa"] < 45
    assert found.knee_per_s == 2.0
    assert found.in_time_beyond < 0.5
    assert "falls beyond" in found.lines[1]


def test_a_plot_is_drawn(tmp_path: Path, fleet: Fleet) -> None:
    samples, latency = with_fit(every_kind(), fleet)
    plot_profile(samples, latency, fleet, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def gpu_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    shipped = tmp_path / "artifacts" / "one-gpu-opt"
    shipped.mkdir(parents=True)
    (shipped / "fleet.toml").write_bytes((ROOT / "artifacts" / "one-gpu-opt" / "fleet.toml").read_bytes())
    return shipped


def test_a_gpu_gets_a_fleet_of_its_own_name(gpu_machine: Path) -> None:
    progress = Lines()
    folder = gpu_fleet(gpu_machine, progress)
    assert folder == gpu_machine.parent / "h100-80gb-hbm3-opt"
    assert load_fleet(folder).name == "h100-80gb-hbm3-opt"
    assert load_fleet(folder).models == load_fleet(gpu_machine).models
    assert origin_of(load_fleet(folder))["hardware"] == "NVIDIA H100 80GB HBM3, 81559 MiB"


def test_without_a_gpu_or_for_a_fleet_without_one_it_says_so(
    gpu_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="runs on the CPU"):
        gpu_fleet(ROOT / "artifacts" / "tiny-opt-cpu", Lines())
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UsageError, match="no GPU here"):
        gpu_fleet(gpu_machine, Lines())
