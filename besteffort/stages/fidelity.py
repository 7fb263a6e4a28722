"""`fidelity`: how near the simulator comes to vLLM here, on traces that the profile has not seen."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from besteffort.artifacts import files
from besteffort.artifacts.profile_file import load_latency, load_samples
from besteffort.engines.running import Urls, running_engines
from besteffort.fleet import Fleet, load_fleet
from besteffort.latency import Latency
from besteffort.profiling import origin_of
from besteffort.profiling.pace import watched_pace
from besteffort.progress import Progress
from besteffort.report import differences, kendall_tau
from besteffort.report.fidelity import EVERYTHING
from besteffort.report.marks import Pace, Row, marks_table
from besteffort.request import Outcomes, Requests
from besteffort.stages.compare import compare
from besteffort.stages.profile import profile
from besteffort.stages.replay import Replay, Replayed, replay_once
from besteffort.stages.train import train
from besteffort.trace import SourceArrivals, fit_to_fleet, import_azure_llm, save_trace
from besteffort.workload import Segment, generate_workload, segments_of

SEED = 11
PROFILE_BUDGET_S = 335.0  # a profile may take 6 minutes, and its engines run already
# Other lengths than the profile's, and than each other.
PROMPT_TOKENS = (20, 200)
OUTPUT_TOKENS = (16, 80)
ALONE_S = 30.0
TOGETHER_S = 90.0
ALONE_BATCH = 3.0  # in flight on average, going by the profile
TOGETHER_BATCH = 1.5
NUM_REPEATS = 3  # of a trace on the real engines, which differ from themselves
NUM_REQUESTS = 400  # where policies are ranked
# The paper's lowest and highest rates, by turns, and so many requests at each on average: the largest model
# does well at the first and not at all at the second, and both last. At rates between them, or by turns in
# seconds, half of its requests are so near to their deadline that a machine which is slower by a percent has
# one more in a hundred late.
PHASES = ((5.0, 60), (48.0, 120))
AZURE_BEGIN = 63  # after the trace's first minute, which is followed by three in which nothing comes
AZURE_NUM_REQUESTS = 220
AZURE_STRETCH = 3.0  # the largest model alone is late for most, the middle one for a few
AZURE_PROMPTS_SHORTER = 16  # so the longest, of 7,436 tokens, fits into the fleet's context, and none is cut
# Steps follow the pace of the cores not quite: where a loop of Python took a tenth longer for 6 s, those
# of opt-3m, opt-22m and opt-90m did by 10, 9 and 7 percent.
ENGINES_SHARE = 0.85
BEGIN, END = "<!-- fidelity -->", "<!-- end of fidelity -->"
Done = TypeVar("Done")
BUILT_IN = ("greedy", "least-loaded", "round-robin", "random")


@dataclass(frozen=True)
class Spec:
    """Where it reads and writes."""

    fleet_dir: Path
    rewards: Path
    profile: Path | None  # None: measure one first
    azure: Path | None  # AzureLLMInferenceTrace_code.csv, if it is at hand
    short: bool = False  # one trace alone and one by policies that need no training
    attached: Urls | None = None


def fidelity(spec: Spec, note: Callable[[list[Row]], None], progress: Progress) -> list[Row]:
    """Profile, then serve held-out traces by both, and hold the differences against the marks.

    `note` gets all rows so far after each part, so that whoever interrupts it keeps them.

    Raises:
        InputError: the fleet, the rewards or the trace cannot be used.
        EngineError: an engine or the router failed.
    """
    fleet = load_fleet(spec.fleet_dir)
    with running_engines(fleet, spec.fleet_dir, spec.attached or {}, progress) as engines:
        urls = {
            name: [engine.url for engine in of_model]
            for name, of_model in zip(fleet.model_names, engines, strict=True)
        }
        watch = _Watch(fleet)
        rows, path = _profile(spec, urls, watch, progress)
        trials = _Trials(spec, fleet, load_latency(path, fleet), path, urls, watch, progress)
        for part in itertools.chain([lambda: []], _parts(trials)):
            rows += part()
            note(rows)
    return rows


class _Watch:
    """How fast the cores were meanwhile, beside how fast they were while a profile was measured."""

    def __init__(self, fleet: Fleet) -> None:
        self._counts = not fleet.num_gpus  # where models run on these cores
        self._profiled_us: float | None = None

    def profiling(self, part: Callable[[], Done]) -> Done:
        done, self._profiled_us = self._meanwhile(part)
        return done

    def replaying(self, part: Callable[[], Done]) -> tuple[Done, float | None]:
        """And how many times as long engines take as while profiled; None: there was no profile to watch."""
        if self._profiled_us is None:
            return part(), None
        done, work_us = self._meanwhile(part)
        return done, None if work_us is None else (work_us / self._profiled_us) ** ENGINES_SHARE

    def _meanwhile(self, part: Callable[[], Done]) -> tuple[Done, float | None]:
        if not self._counts:
            return part(), None
        with watched_pace() as pace:
            done = part()
        return done, pace.work_us


def _parts(trials: "_Trials") -> Iterator[Callable[[], list[Row]]]:
    if trials.spec.short:
        yield partial(trials.alone, 1)
        yield lambda: trials.ranked(trials.bursts(NUM_REQUESTS // 2), "bursts", BUILT_IN[:2])
        return
    for model in range(len(trials.fleet.models)):
        yield partial(trials.alone, model)
    yield trials.together
    policies = trials.policies()  # trained while the engines are idle
    yield lambda: trials.ranked(trials.bursts(NUM_REQUESTS), "bursts", policies)
    if (azure := trials.spec.azure) is not None:
        yield lambda: trials.ranked(trials.imported(azure), "Azure code", policies)


def _profile(spec: Spec, urls: Urls, watch: _Watch, progress: Progress) -> tuple[list[Row], Path]:
    if spec.profile is not None:
        return [], spec.profile
    path = spec.fleet_dir / "profile.parquet"

    def measured() -> float:
        began_at = time.monotonic()
        profile(
            spec.fleet_dir,
            output=path,
            attached=urls,
            budget_s=PROFILE_BUDGET_S,
            progress=progress,
        )
        return (time.monotonic() - began_at) / 60

    took_min = watch.profiling(measured)
    return [Row("profile of all models, without the engines' start", took_min, 6.0, "min")], path


@dataclass(frozen=True)
class _Trials:
    spec: Spec
    fleet: Fleet
    latency: Latency
    profile: Path
    urls: Urls
    watch: _Watch
    progress: Progress

    def alone(self, model: int) -> list[Row]:
        """One model, the others idle."""
        name = self.fleet.model_names[model]
        rate_per_s = ALONE_BATCH / self._stay_s(model, ALONE_BATCH)
        trace = self._save(f"alone-{name}", _steady(self.fleet, rate_per_s, ALONE_S, model))
        repeats = self._repeated(trace, f"static:{name}")
        return repeats.rows(f"{name} alone", EVERYTHING, 5.0)

    def together(self) -> list[Row]:
        """All models loaded at once, by turns, none by what the fleet looks like."""
        stays_s = [self._stay_s(m, TOGETHER_BATCH) for m in range(len(self.fleet.models))]
        rate_per_s = TOGETHER_BATCH * len(stays_s) / sum(stays_s)
        trace = self._save("together", _steady(self.fleet, rate_per_s, TOGETHER_S, 17))
        repeats = self._repeated(trace, "round-robin")
        rows = []
        for name in (EVERYTHING, *self.fleet.model_names):
            rows += repeats.rows(f"together, {name}", name, 10.0)
        return rows

    def policies(self) -> list[str]:
        """Simple ones that differ from each other, and one that is trained here."""
        path = self.spec.fleet_dir / "fidelity" / "trained.safetensors"
        train(
            self.spec.fleet_dir,
            recipe="demo",
            seed=SEED,
            profile=self.profile,
            rewards=self.spec.rewards,
            output=path,
            force=True,
            progress=self.progress,
        )
        return [*(f"static:{name}" for name in self.fleet.model_names), *BUILT_IN, str(path)]

    def bursts(self, num_requests: int) -> Path:
        return self._save("bursts", _calm_and_bursts(self.fleet, num_requests))

    def imported(self, source: Path) -> Path:
        arrivals = _scaled(import_azure_llm(source, AZURE_BEGIN + AZURE_NUM_REQUESTS))
        rng = np.random.default_rng(SEED)
        requests, _ = fit_to_fleet(arrivals, self.fleet, rng, time_stretch=AZURE_STRETCH)
        return self._save("azure-code", requests)

    def ranked(self, trace: Path, title: str, policies: Sequence[str]) -> list[Row]:
        """All policies once, then again, since real engines differ from themselves."""
        names = [f"{trace.stem}-compared"] if self.spec.short else [f"{trace.stem}-{n}" for n in (1, 2)]
        rounds = [self._round(trace, name, policies) for name in names]
        at_pace = [
            self._at_pace(replace(self._replay(trace), policy=policy), [each.slowed[nth] for each in rounds])
            for nth, policy in enumerate(policies)
        ]
        rows = []
        for nth, other in enumerate(at_pace):
            pairs = [each.pairs[nth] for each in rounds]
            for what, key, mark in (
                ("performance", "performance", 2.0),
                ("deadlines met", "deadline_met", 3.0),
            ):
                made = pairs[0]["simulated"][key]
                real = [pair["vllm"][key] for pair in pairs]
                measured, pace = sum(real) / len(real), None
                if other is not None:
                    pace = Pace(100 * (other.replayed.summary[key] - measured), other.slower)
                about = f"{title}, {pairs[0]['policy']}: {what}"
                remark = f"{made:.3f} and {' and '.join(f'{one:.3f}' for one in real)}"
                apart = 100 * (max(real) - min(real)) if len(real) > 1 else None
                rows.append(Row(about, 100 * (made - measured), mark, "points", remark, pace, apart))
        return [*rows, _order(title, rounds, at_pace)]

    def _round(self, trace: Path, name: str, policies: Sequence[str]) -> "_Round":
        slowed: list[float | None] = []

        def serve(part: Callable[[], Replayed]) -> Replayed:
            done, factors = self.watch.replaying(part)
            slowed.append(factors)
            return done

        found, _ = compare(replace(self._replay(trace), name=name), policies, self.progress, serve)
        return _Round(found["pairs"], slowed)

    def _repeated(self, trace: Path, policy: str) -> "_Repeats":
        """The trace served several times by the real engines, which differ from themselves."""
        spec = replace(self._replay(trace), policy=policy)
        made = replay_once(replace(spec, simulated=True, attached=None), self.progress)
        times = 1 if self.spec.short else NUM_REPEATS
        real = [
            self.watch.replaying(
                partial(replay_once, replace(spec, name=f"{trace.stem}-{nth + 1}"), self.progress)
            )
            for nth in range(times)
        ]
        return _Repeats(
            self.fleet,
            made.outcomes,
            [one.outcomes for one, _ in real],
            self._at_pace(spec, [slowed for _, slowed in real]),
        )

    def _at_pace(self, spec: Replay, slowed: Sequence[float | None]) -> "_AtPace | None":
        """By the mean of how many times as slow cores were in each replay, if they were watched."""
        known = [one for one in slowed if one is not None]
        if not known:
            return None
        factor = sum(known) / len(known)
        name = f"{spec.trace.stem}-{Path(str(spec.policy)).stem}-at-pace".replace(":", "-")
        slower = (factor,) * len(self.fleet.models)
        one = replace(spec, simulated=True, attached=None, name=name, slowed=slower)
        return _AtPace(replay_once(one, self.progress), factor - 1.0)

    def _stay_s(self, model: int, batch_size: float) -> float:
        """How long a request of middle lengths is with a model that runs so many."""
        step_ms = self.latency.step_table_ms(8)[model, round(batch_size)]
        prompt, output = sum(PROMPT_TOKENS) / 2, sum(OUTPUT_TOKENS) / 2
        prefill_ms = self.latency.prefill_ms(np.array([round(prompt)]))[model, 0]
        # While it stays, as many others come as leave, and each is read in a step of its own.
        return float((prefill_ms * (1 + batch_size) + step_ms * output) / 1000.0)

    def _replay(self, trace: Path) -> Replay:
        return Replay(
            trace=trace,
            fleet_dir=self.spec.fleet_dir,
            policy=None,
            profile=self.profile,
            rewards=self.spec.rewards,
            attached=self.urls,
            seed=SEED,
        )

    def _save(self, name: str, requests: Requests) -> Path:
        path = self.spec.fleet_dir / "fidelity" / f"{name}.parquet"
        save_trace(path, requests, self.fleet.task_names, {"seed": SEED})
        return path


def _scaled(arrivals: SourceArrivals) -> SourceArrivals:
    """From `AZURE_BEGIN` on, with prompts that fit."""
    return SourceArrivals(
        arrived_at=arrivals.arrived_at[AZURE_BEGIN:],
        num_prompt_tokens=np.maximum(1, arrivals.num_prompt_tokens[AZURE_BEGIN:] // AZURE_PROMPTS_SHORTER),
        num_output_tokens=arrivals.num_output_tokens[AZURE_BEGIN:],
    )


def _phases(rng: np.random.Generator) -> Iterator[Segment]:
    """Without end, calm and bursts by turns."""
    for rate_per_s, num_requests in itertools.cycle(PHASES):
        yield Segment(rate_per_s, int(rng.geometric(1 / num_requests)))


def _calm_and_bursts(fleet: Fleet, num_requests: int) -> Requests:
    """Tasks and lengths as in the paper's workloads, at the rates of `PHASES`."""
    gap_rng, rng = np.random.default_rng(SEED).spawn(2)
    requests = generate_workload("stable", fleet, rng, rate_per_s=1.0, num_requests=num_requests)
    rates, counts = zip(*segments_of(_phases(gap_rng), num_requests), strict=True)
    gaps_s = gap_rng.standard_exponential(num_requests) / (np.repeat(rates, counts) * fleet.rate_scale)
    return replace(requests, arrived_at=np.cumsum(gaps_s))


def _steady(fleet: Fleet, rate_per_s: float, duration_s: float, seed: int) -> Requests:
    """Poisson arrivals with the lengths of this page."""
    rng = np.random.default_rng((SEED, seed))
    num = max(20, round(rate_per_s * duration_s))
    longest = fleet.engine.max_model_len - OUTPUT_TOKENS[1]
    return Requests(
        arrived_at=np.cumsum(rng.exponential(1 / rate_per_s, num)),
        task=rng.integers(0, len(fleet.tasks), num),
        num_prompt_tokens=rng.integers(PROMPT_TOKENS[0], min(PROMPT_TOKENS[1], longest) + 1, num),
        num_output_tokens=rng.integers(OUTPUT_TOKENS[0], OUTPUT_TOKENS[1] + 1, num),
    )


@dataclass(frozen=True)
class _AtPace:
    """The simulator with engines as slow as the cores were meanwhile."""

    replayed: Replayed
    slower: float


@dataclass(frozen=True)
class _Round:
    """All policies served one after the other, both ways."""

    pairs: list[dict[str, Any]]
    slowed: list[float | None]  # by policy


@dataclass(frozen=True)
class _Repeats:
    """One trace, by the simulator and several times by the real engines."""

    fleet: Fleet
    made: Outcomes
    real: Sequence[Outcomes]
    at_pace: "_AtPace | None"

    def rows(self, title: str, of: str, mark: float) -> list[Row]:
        """The simulator beside the mean of the real engines, for one model or over all."""
        rows = []
        for rank in ("mean", "p95"):
            cells = [self._cell(one, self.made, of, rank) for one in self.real]
            measured, made = [cell["vllm"] for cell in cells], cells[0]["simulated"]
            usual, pace = sum(measured) / len(measured), None
            if (other := self.at_pace) is not None:
                at_pace = self._cell(self.real[0], other.replayed.outcomes, of, rank)["simulated"]
                pace = Pace(100 * (at_pace / usual - 1), other.slower)
            remark = f"{made:.2f} and {usual:.2f} ms/token"
            apart = None
            if len(measured) > 1:
                remark += f" ({min(measured):.2f} to {max(measured):.2f})"
                apart = 100 * (max(measured) - min(measured)) / usual
            error = 100 * (made / usual - 1)
            rows.append(Row(f"{title}: latency {rank}", error, mark, "%", remark, pace, apart))
        return rows

    def _cell(self, real: Outcomes, made: Outcomes, of: str, rank: str) -> dict[str, float]:
        cell: dict[str, float] = differences(real, made, self.fleet)[of]["latency_ms_per_token"][rank]
        return cell


def _order(
    title: str,
    rounds: "Sequence[_Round]",
    at_pace: "Sequence[_AtPace | None]",
) -> Row:
    """Whether the policies come in the same order both ways, and in both rounds of the real engines."""
    real = [[pair["vllm"]["performance"] for pair in each.pairs] for each in rounds]
    measured = np.mean(real, axis=0).tolist()
    made = [pair["simulated"]["performance"] for pair in rounds[0].pairs]
    pace, others = None, [one for one in at_pace if one is not None]
    if len(others) == len(made):
        tau = kendall_tau(measured, [one.replayed.summary["performance"] for one in others])
        pace = Pace(tau, float(np.mean([one.slower for one in others])))
    apart = kendall_tau(*real) if len(real) > 1 else None
    about = f"{title}: order of {len(made)} policies"
    return Row(about, kendall_tau(measured, made), 0.9, "tau", pace=pace, apart=apart)


def write_table(path: Path, rows: Sequence[Row], spec: Spec) -> None:
    """Put the table, and what it was measured on, between the marks in a page; or make a page of it."""
    fleet = load_fleet(spec.fleet_dir)
    facts = load_samples(spec.profile or spec.fleet_dir / "profile.parquet")[1]
    origin = facts.get("origin") or origin_of(fleet)
    lines = [
        BEGIN,
        f"`make fidelity` wrote this on {time.strftime('%Y-%m-%d', time.gmtime())}: fleet `{fleet.name}` on "
        f"{origin['hardware']}, {origin['driver']}, vLLM {origin['vllm']}.",
        "",
        *marks_table(rows),
        END,
    ]
    before, _, after = (path.read_text() if path.is_file() else "").partition(BEGIN)
    files.write_text(path, before + "\n".join(lines) + (after.partition(END)[2] or "\n"))
