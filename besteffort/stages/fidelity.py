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
from besteffort.profiling.pace import MachinePace, machine_pace
from besteffort.progress import Progress
from besteffort.report import differences
from besteffort.report.fidelity import EVERYTHING
from besteffort.request import Requests
from besteffort.stages.compare import compare
from besteffort.stages.profile import profile
from besteffort.stages.replay import Replay, replay_once
from besteffort.stages.train import train
from besteffort.trace import import_trace, save_trace
from besteffort.workload import generate_workload

SEED = 11
PROFILE_BUDGET_S = 290.0  # a profile may take 6 minutes, and its engines run already
# Other lengths than the profile's, and than each other.
PROMPT_TOKENS = (20, 200)
OUTPUT_TOKENS = (16, 80)
ALONE_S = 30.0
TOGETHER_S = 60.0
ALONE_BATCH = 3.0  # in flight on average, going by the profile
TOGETHER_BATCH = 1.5
NUM_REPEATS = 3  # of a trace on the real engines, which differ from themselves
NUM_REQUESTS = 200  # where policies are ranked
REQUESTS_PER_RATE = 20
# Of the fleet's rates: at all of them engines, router and clients together want more than two cores.
SHARE_OF_RATES = 0.5
AZURE_NUM_REQUESTS = 100
AZURE_STRETCH = 0.6
BEGIN, END = "<!-- fidelity -->", "<!-- end of fidelity -->"
Done = TypeVar("Done")
BUILT_IN = ("greedy", "least-loaded", "round-robin")


@dataclass(frozen=True)
class Spec:
    """Where it reads and writes."""

    fleet_dir: Path
    rewards: Path
    profile: Path | None  # None: measure one first
    azure: Path | None  # AzureLLMInferenceTrace_code.csv, if it is at hand
    short: bool = False  # one trace alone and one by policies that need no training
    attached: Urls | None = None


@dataclass(frozen=True)
class Row:
    """A figure, and the mark that it is held against."""

    what: str
    figure: float | None  # relative, or in points for shares
    mark: float
    unit: str  # "%", "points", "min" or "tau"
    remark: str = ""
    slower: float | None = None  # the machine meanwhile, than while it was profiled: 0.1 is by a tenth

    @property
    def reached(self) -> bool:
        if self.figure is None:
            return False
        return self.figure >= self.mark if self.unit == "tau" else abs(self.figure) <= self.mark

    @property
    def shown(self) -> str:
        if self.figure is None:
            return "all alike"
        if self.unit in ("tau", "min"):
            return f"{self.figure:.2f}"
        return f"{self.figure:+.1f} {self.unit}"

    @property
    def wanted(self) -> str:
        sign = {"tau": "at least", "min": "at most"}.get(self.unit, "within")
        unit = "" if self.unit == "tau" else f" {self.unit}"
        return f"{sign} {self.mark:g}{unit}"


def fidelity(spec: Spec, note: Callable[[list[Row]], None], progress: Progress) -> list[Row]:
    """Profile, then serve held-out traces by both, and hold the differences against the marks.

    `note` gets all rows so far after each part, so that whoever interrupts it keeps them.

    Raises:
        InputError: the fleet, the rewards or the trace cannot be used.
        EngineError: an engine or the router failed.
    """
    fleet = load_fleet(spec.fleet_dir)
    rows: list[Row] = []
    with (
        machine_pace() as pace,
        running_engines(fleet, spec.fleet_dir, spec.attached or {}, progress) as engines,
    ):
        urls = {
            name: [engine.url for engine in of_model]
            for name, of_model in zip(fleet.model_names, engines, strict=True)
        }
        watch = _Watch(pace)
        found, path = watch.during(lambda: _profile(spec, urls, progress))
        trials = _Trials(spec, fleet, load_latency(path, fleet), path, urls, progress)
        for part in itertools.chain([lambda: found], _parts(trials)):
            made, slower = watch.during(part), watch.slower
            rows += [replace(row, slower=slower) for row in made]
            note(rows)
    return rows


class _Watch:
    """How fast the machine is while something is done, beside how fast it was the first time."""

    def __init__(self, pace: MachinePace) -> None:
        self._pace = pace
        self._first_ms: float | None = None
        self.slower: float | None = None  # the last time

    def during(self, part: Callable[[], Done]) -> Done:
        began_at = time.monotonic()
        done = part()
        took_ms = self._pace.mean_ms(began_at, time.monotonic())
        self._first_ms = self._first_ms or took_ms
        self.slower = took_ms / self._first_ms - 1.0 if took_ms and self._first_ms else None
        return done


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


def _profile(spec: Spec, urls: Urls, progress: Progress) -> tuple[list[Row], Path]:
    if spec.profile is not None:
        return [], spec.profile
    path, began_at = spec.fleet_dir / "profile.parquet", time.monotonic()
    profile(
        spec.fleet_dir,
        output=path,
        attached=urls,
        budget_s=PROFILE_BUDGET_S,
        progress=progress,
    )
    took_min = (time.monotonic() - began_at) / 60
    return [Row("profile of all models, without the engines' start", took_min, 6.0, "min")], path


@dataclass(frozen=True)
class _Trials:
    spec: Spec
    fleet: Fleet
    latency: Latency
    profile: Path
    urls: Urls
    progress: Progress

    def alone(self, model: int) -> list[Row]:
        """One model, the others idle."""
        name = self.fleet.model_names[model]
        rate_per_s = ALONE_BATCH / self._stay_s(model, ALONE_BATCH)
        trace = self._save(f"alone-{name}", _steady(self.fleet, rate_per_s, ALONE_S, model))
        repeats = self._repeated(trace, f"static:{name}")
        return _latency_rows(f"{name} alone", [one[EVERYTHING] for one in repeats], 5.0)

    def together(self) -> list[Row]:
        """All models loaded at once, by turns, none by what the fleet looks like."""
        stays_s = [self._stay_s(m, TOGETHER_BATCH) for m in range(len(self.fleet.models))]
        rate_per_s = TOGETHER_BATCH * len(stays_s) / sum(stays_s)
        trace = self._save("together", _steady(self.fleet, rate_per_s, TOGETHER_S, 17))
        repeats = self._repeated(trace, "round-robin")
        rows = []
        for name in (EVERYTHING, *self.fleet.model_names):
            rows += _latency_rows(f"together, {name}", [one[name] for one in repeats], 10.0)
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
        rng = np.random.default_rng(SEED)
        slower = self.fleet.model_copy(update={"rate_scale": SHARE_OF_RATES * self.fleet.rate_scale})
        requests = generate_workload(
            "unpredictable-2",
            slower,
            rng,
            num_requests=num_requests,
            requests_per_rate=REQUESTS_PER_RATE,
        )
        return self._save("bursts", requests)

    def imported(self, source: Path) -> Path:
        requests, _ = import_trace(
            source,
            "azure-llm",
            self.fleet,
            SEED,
            num_requests=AZURE_NUM_REQUESTS,
            time_stretch=AZURE_STRETCH,
        )
        return self._save("azure-code", requests)

    def ranked(self, trace: Path, title: str, policies: Sequence[str]) -> list[Row]:
        found, _ = self._compare(trace, policies)
        rows = []
        for pair, performance, in_time in zip(
            found["pairs"], found["performance_apart"], found["deadline_met_apart"], strict=True
        ):
            about = f"{title}, {pair['policy']}"
            rows.append(
                Row(f"{about}: performance", 100 * performance, 2.0, "points", _both(pair, "performance"))
            )
            rows.append(
                Row(f"{about}: deadlines met", 100 * in_time, 3.0, "points", _both(pair, "deadline_met"))
            )
        tau = found["kendall_tau"]
        rows.append(Row(f"{title}: order of {len(policies)} policies", tau, 0.9, "tau"))
        return rows

    def _repeated(self, trace: Path, policy: str) -> list[dict[str, dict[str, Any]]]:
        """What the simulator differs by from the real engines, each time that these served the trace."""
        spec = replace(self._replay(trace), policy=policy)
        made = replay_once(replace(spec, simulated=True, attached=None), self.progress)
        times = 1 if self.spec.short else NUM_REPEATS
        real = [
            replay_once(replace(spec, name=f"{trace.stem}-{nth + 1}"), self.progress) for nth in range(times)
        ]
        return [differences(one.outcomes, made.outcomes, self.fleet) for one in real]

    def _stay_s(self, model: int, batch_size: float) -> float:
        """How long a request of middle lengths is with a model that runs so many."""
        step_ms = self.latency.step_table_ms(8)[model, round(batch_size)]
        prompt, output = sum(PROMPT_TOKENS) / 2, sum(OUTPUT_TOKENS) / 2
        prefill_ms = self.latency.prefill_base_ms[model] + self.latency.prefill_ms_per_token[model] * prompt
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

    def _compare(self, trace: Path, policies: Sequence[str]) -> tuple[dict[str, Any], Path]:
        return compare(self._replay(trace), policies, self.progress)

    def _save(self, name: str, requests: Requests) -> Path:
        path = self.spec.fleet_dir / "fidelity" / f"{name}.parquet"
        save_trace(path, requests, self.fleet.task_names, {"seed": SEED})
        return path


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


def _latency_rows(title: str, blocks: Sequence[dict[str, Any]], mark: float) -> list[Row]:
    """The simulator beside the mean of the real engines' repeats."""
    rows = []
    for rank in ("mean", "p95"):
        cells = [block["latency_ms_per_token"][rank] for block in blocks]
        measured, made = [cell["vllm"] for cell in cells], cells[0]["simulated"]
        usual = sum(measured) / len(measured)
        remark = f"{made:.2f} and {usual:.2f} ms/token"
        if len(measured) > 1:
            remark += f" ({min(measured):.2f} to {max(measured):.2f})"
        rows.append(Row(f"{title}: latency {rank}", 100 * (made / usual - 1), mark, "%", remark))
    return rows


def _both(pair: dict[str, Any], what: str) -> str:
    return f"{pair['simulated'][what]:.3f} and {pair['vllm'][what]:.3f}"


def _line(row: Row) -> str:
    slower = "" if row.slower is None else f"{100 * row.slower:+.0f} %"
    cells = (row.what, row.shown, row.wanted, "yes" if row.reached else "**no**", row.remark, slower)
    return f"| {' | '.join(cells)} |"


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
        "| | error | mark | reached | simulated and by vLLM; of repeats the mean, lowest, highest "
        "| CPU slower than while profiled |",
        "|---|---|---|---|---|---|",
        *map(_line, rows),
        END,
    ]  # fmt: skip
    before, _, after = (path.read_text() if path.is_file() else "").partition(BEGIN)
    files.write_text(path, before + "\n".join(lines) + (after.partition(END)[2] or "\n"))
