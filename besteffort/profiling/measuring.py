"""Measuring within a budget: every run once, then again where the figures are least sure."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from besteffort.engines.client import open_session
from besteffort.engines.measure import (
    Target,
    first_token_ms,
    joined_prompts,
    serve,
    wave_paces_ms,
)
from besteffort.fleet import Fleet
from besteffort.latency import Sample, Served
from besteffort.latency.samples import spread_of
from besteffort.profiling.design import SHORT_PROMPT, Run, mean_lengths
from besteffort.progress import Bar, Progress
from besteffort.workload import RATES_2

REQUEST_TIMEOUT_S = 120.0
_WAVE_S = 0.7  # how long a wave should take
_NUM_STEPS = (24, 96)  # of a wave, at least and at most
_MIN_WAVES = 3
_MAX_WAVES = 5  # of a run; more come by repeating it
_SERVICE_S = (5.0, 4.0, 7.0)  # each of two times, of one model, of two, and of more
_HURRIED_SERVICE_S = 2.0
_PAUSE_S = 30.0  # that is put between a service and its repetition
_NUM_PREFILLS = 5
_NUM_JOINING = 6
_TRIES = 3  # of letting prompts join, each with a batch twice as long
_HURRIED = 2  # prompts of a run that is needed when the budget is spent
_WARM_SHARE = 0.15  # of the budget, at most, for the first of all
_MOST_ROWS = 256  # tokens in one step, up to which each number of them is read once
_MAX_REPEATS = 8


@dataclass(frozen=True, slots=True)
class Effort:
    """How long and how exactly to measure."""

    budget_s: float
    precision: float  # half the width of the mean's 95 % interval over the mean, which is good enough
    ends_at: float  # time.monotonic() by which the budget is spent; repeats are begun only before


@dataclass
class Cell:
    """A run, and what was measured in it so far."""

    run: Run
    took_s: float = 0.0
    num_times: int = 0
    values: dict[tuple[str, int], list[float]] = field(default_factory=dict)  # by kind and model
    contexts: dict[int, float] = field(default_factory=dict)
    served: dict[int, list[Served]] = field(default_factory=dict)  # of a service, by model

    def samples(self, fleet: Fleet) -> list[Sample]:
        made = []
        for (kind, model), values in self.values.items():
            if not values:  # no prompt joined while the whole batch ran, however long
                continue
            others = [n for n, m in enumerate(self.run.models) if m != model]
            made.append(
                Sample(
                    kind=kind,  # type: ignore[arg-type]
                    model=fleet.model_names[model],
                    batch_size=self.run.batch_sizes[self.run.models.index(model)],
                    num_prompt_tokens=self.run.num_prompt_tokens,
                    busy_models=tuple(fleet.model_names[self.run.models[n]] for n in others),
                    busy_batch_sizes=tuple(self.run.batch_sizes[n] for n in others),
                    context_tokens=self.contexts.get(model, 0.0),
                    served=tuple(self.served.get(model, ())),
                    **spread_of(values, keep_all=kind == "service"),
                )
            )
        return made

    def width(self, fleet: Fleet) -> float:
        """The largest relative half-width among its figures; a stall is held against its step."""
        samples = self.samples(fleet)
        if self.run.kind == "stall":
            # How long a prompt waits is no spread of what is measured: it depends on the phase.
            whole = [s.mean_ms for s in samples if s.kind == "joining"]
            samples = [s for s in samples if s.kind == "stall"]
            return _half(samples[0]) / whole[0] if whole else np.inf
        if self.run.kind == "service":
            return 0.0  # its requests differ by nature; the simulator gets the same ones
        return max((_half(s) / s.mean_ms for s in samples), default=np.inf)


def served_twice(sample: Sample) -> bool:
    """Whether a service came to its second time before its run was cut off."""
    sent_at = [served.at_s for served in sample.served]
    return bool(np.any(np.diff(sent_at) >= _PAUSE_S))


def _half(sample: Sample) -> float:
    return np.inf if sample.ci_ms is None else sample.ci_ms


class Bench:
    """The fleet's models behind one URL, and what is known of their pace so far."""

    def __init__(self, targets: Sequence[Target], fleet: Fleet) -> None:
        self._targets = targets
        self._fleet = fleet
        self._step_ms: dict[tuple[int, int], float] = {}  # by model and batch size

    async def warm_up(self, ends_at: float) -> None:
        """First requests are slow: memory is laid out, kernels are chosen, on a CPU for each number of tokens
        in a step. Until `ends_at`, by `time.monotonic`, or a little longer."""
        if not self._fleet.num_gpus:
            most = min(_MOST_ROWS, self._room(0))
            await asyncio.gather(*(_read_each(target, most, ends_at) for target in self._targets))
        for model, target in enumerate(self._targets):
            waves = wave_paces_ms(target, 4, 16, 48, self._room(16))
            for _ in range(2):
                self._step_ms[model, 4] = await anext(waves)

    async def measure(self, cell: Cell, *, hurry: bool = False) -> None:
        """In a `hurry` just as much as gives a figure."""
        began_at = time.monotonic()
        run = cell.run
        if run.kind == "prefill":
            times = [await first_token_ms(self._targets[run.models[0]], run.num_prompt_tokens)
                     for _ in range(_HURRIED if hurry else _NUM_PREFILLS)]  # fmt: skip
            cell.values.setdefault(("prefill", run.models[0]), []).extend(times)
        elif run.kind == "stall":
            await self._join(cell, _HURRIED if hurry else _NUM_JOINING)
        elif run.kind == "service":
            await self._serve(cell, hurry)
        else:
            await self._decode(cell, hurry)
        cell.took_s += time.monotonic() - began_at
        cell.num_times += 1

    async def _join(self, cell: Cell, num_joining: int) -> None:
        model, batch_size = cell.run.models[0], cell.run.batch_sizes[0]
        step_ms, room = self._usual_step_ms(model, batch_size), self._room(SHORT_PROMPT)
        for _ in range(_TRIES):  # on a busy machine a batch may end before a prompt has joined it
            joined = await joined_prompts(
                self._targets[model], batch_size, cell.run.num_prompt_tokens, num_joining, step_ms, room
            )
            if joined:
                break
            num_joining *= 2
        cell.values.setdefault(("stall", model), []).extend(one.stall_ms for one in joined)
        cell.values.setdefault(("joining", model), []).extend(one.ttft_ms for one in joined)

    async def _decode(self, cell: Cell, hurry: bool) -> None:
        run = cell.run
        (model,), (batch_size,) = run.models, run.batch_sizes
        room = self._room(run.num_prompt_tokens)
        num_steps = self._num_steps(model, batch_size, room)
        cell.contexts[model] = _mean_context(run, num_steps)
        values = cell.values.setdefault(("decode", model), [])
        num_waves = 0
        async for pace_ms in wave_paces_ms(
            self._targets[model], batch_size, run.num_prompt_tokens, num_steps, room
        ):
            values.append(pace_ms)
            num_waves += 1
            if hurry or (num_waves >= _MIN_WAVES and (num_waves >= _MAX_WAVES or _sure(values))):
                break
        if run.num_prompt_tokens <= SHORT_PROMPT:
            self._step_ms[model, batch_size] = float(np.median(values))

    async def _serve(self, cell: Cell, hurry: bool) -> None:
        """Each model gets as many requests as the slowest can take with its batch, none more than the fleet.

        At higher rates a small model's service would be one of front ends that nobody asks for so much.
        """
        run = cell.run
        rates_per_s = [await self._rate_per_s(run, model) for model in run.models]
        rate_per_s = min(*rates_per_s, RATES_2[1] * self._fleet.rate_scale)
        duration_s = _HURRIED_SERVICE_S if hurry else _SERVICE_S[min(len(run.models), 3) - 1]
        targets = [self._targets[model] for model in run.models]
        found = await serve(targets, rate_per_s, self._lengths, duration_s)
        before_s = max((one.at_s + _PAUSE_S for of in cell.served.values() for one in of), default=0.0)
        for model, served in zip(run.models, found, strict=True):
            later = [replace(one, at_s=one.at_s + before_s) for one in served]
            cell.served.setdefault(model, []).extend(later)
            values = cell.values.setdefault(("service", model), [])
            values.extend(one.latency_ms_per_token for one in served)

    async def _rate_per_s(self, run: Run, model: int) -> float:
        """At which about so many requests are in flight (Little's law), going by one that is alone."""
        batch_size = run.batch_sizes[run.models.index(model)]
        _, num_steps = mean_lengths(self._fleet)
        first_ms = (await self._targets[model].ask(run.num_prompt_tokens, 1)).ttft_ms
        # While it stays, as many others come as leave, and each is read in a step of its own.
        stay_ms = first_ms * (1 + batch_size) + self._usual_step_ms(model, batch_size) * num_steps
        return 1000.0 * batch_size / stay_ms

    def _lengths(self, rng: np.random.Generator) -> tuple[int, int]:
        """Of a prompt and its answer, as the fleet's tasks have them."""
        task = self._fleet.tasks[int(rng.choice(len(self._fleet.tasks), p=self._fleet.task_shares))]
        low, high = zip(task.num_prompt_tokens, task.num_output_tokens, strict=True)
        prompt, output = rng.integers(np.array(low), np.array(high), endpoint=True)
        return int(prompt), int(output)

    def _usual_step_ms(self, model: int, batch_size: int) -> float:
        return self._step_ms.get((model, batch_size), self._step_ms[model, 4])

    def _room(self, num_prompt_tokens: int) -> int:
        return self._fleet.engine.max_model_len - num_prompt_tokens - 8

    def _num_steps(self, model: int, batch_size: int, room: int) -> int:
        """So many that a wave takes its time, and its requests fit into the engine."""
        low, high = _NUM_STEPS
        wanted = round(1000 * _WAVE_S / self._usual_step_ms(model, batch_size))
        return min(max(low, min(wanted, high)), room)


async def _read_each(target: Target, most: int, ends_at: float) -> None:
    """A prompt of each length once. vLLM's CPU kernels are compiled when a number of rows is first seen; that
    took 7 ms in each of three models, as long as three steps of the smallest."""
    for num_prompt_tokens in range(1, most + 1):
        if time.monotonic() >= ends_at:
            return
        await target.ask(num_prompt_tokens, 1)


def _mean_context(run: Run, num_steps: int) -> float:
    """Tokens before the present one: half a wave, of which the first token does not count."""
    return run.num_prompt_tokens + num_steps / 2 + 1


def _sure(values: Sequence[float]) -> bool:
    spread = spread_of(values)
    return bool(spread["ci_ms"] is not None and spread["ci_ms"] < 0.02 * spread["mean_ms"])


async def measure_fleet(
    fleet: Fleet,
    url: str,
    runs: Sequence[Run],
    effort: Effort,
    note: Callable[[list[Cell]], None],
    rng: np.random.Generator,
    progress: Progress,
) -> list[Cell]:
    """Measure `runs` through the router at `url`, in their order, then repeat the least sure.

    `note` is called with all cells so far after every run, so that a kill costs one run. Runs for which
    the budget does not last are left out, but for those that a fit needs.

    Raises:
        EngineError: an engine does not answer, or never runs as many requests as it should.
    """
    cells: list[Cell] = []
    async with open_session(REQUEST_TIMEOUT_S) as session:
        bench = Bench([Target(session, url, name, rng) for name in fleet.model_names], fleet)
        began_at = time.monotonic()
        with progress.bar("Profiling", max(1, round(effort.ends_at - began_at))) as bar:
            clock = _Clock(bar, began_at, effort.ends_at)
            if runs:
                bar.describe("warming up")
                await clock.along(bench.warm_up(began_at + _WARM_SHARE * (effort.ends_at - began_at)))
            left_out = 0
            for nth, run in enumerate(runs):
                if not run.needed and time.monotonic() >= effort.ends_at - _again_s(cells):
                    left_out += 1
                    continue
                cell = Cell(run)
                bar.describe(f"{run.title(fleet)} ({nth + 1} of {len(runs)}; {_outlook(cells, runs, clock)})")
                await clock.along(bench.measure(cell, hurry=time.monotonic() >= effort.ends_at))
                cells.append(cell)
                note(cells)

            async def again(cell: Cell, why: str) -> None:
                bar.describe(f"again {cell.run.title(fleet)}{why}")
                await clock.along(bench.measure(cell))
                note(cells)

            await _serve_again(cells, effort, again)
            await _repeat(cells, fleet, effort, again)
    _tell(cells, left_out if runs else 0, fleet, effort, progress)
    return cells


Again = Callable[[Cell, str], Awaitable[None]]  # measure a cell once more, and say why


def _again_s(cells: Sequence[Cell]) -> float:
    """How long all services would take a second time."""
    return sum(cell.took_s for cell in cells if cell.run.kind == "service")


async def _serve_again(cells: Sequence[Cell], effort: Effort, again: Again) -> None:
    """Each service a second time, minutes after the first: machines are slower now and then, for a while."""
    for cell in cells:
        if cell.run.kind == "service" and time.monotonic() < effort.ends_at:
            await again(cell, "")


async def _repeat(cells: Sequence[Cell], fleet: Fleet, effort: Effort, again: Again) -> None:
    while True:
        left_s = effort.ends_at - time.monotonic()
        wide = [(cell.width(fleet), nth) for nth, cell in enumerate(cells) if cell.num_times < _MAX_REPEATS]
        wide = [
            (width, nth)
            for width, nth in wide
            if width > effort.precision and cells[nth].took_s / cells[nth].num_times < left_s
        ]
        if not wide:
            return
        width, nth = max(wide)
        each_s = np.mean([cells[n].took_s / cells[n].num_times for _, n in wide])
        why = (
            f", now ± {100 * min(width, 9.99):.0f} %; {len(wide)} cells above "
            f"± {100 * effort.precision:g} %, {left_s:.0f} s buy about {left_s / each_s:.0f} more runs"
        )
        await again(cells[nth], why)


class _Clock:
    """Moves a bar whose steps are seconds."""

    def __init__(self, bar: Bar, began_at: float, ends_at: float) -> None:
        self.bar = bar
        self.began_at = began_at
        self.ends_at = ends_at
        self._shown_s = 0

    async def along(self, work: Awaitable[None]) -> None:
        await work
        passed_s = int(min(time.monotonic(), self.ends_at) - self.began_at)
        self.bar.advance(max(0, passed_s - self._shown_s))
        self._shown_s = max(self._shown_s, passed_s)


def _outlook(cells: Sequence[Cell], runs: Sequence[Run], clock: _Clock) -> str:
    """What the rest of the budget buys, going by the runs so far."""
    left_s = clock.ends_at - time.monotonic()
    if not cells:
        return f"{left_s:.0f} s left"
    kinds = {cell.run.kind: [c.took_s for c in cells if c.run.kind == cell.run.kind] for cell in cells}
    usual_s = float(np.mean([cell.took_s for cell in cells]))
    to_do = runs[len(cells) :]
    need_s = sum(float(np.mean(kinds.get(run.kind, [usual_s]))) for run in to_do)
    if need_s <= left_s:
        return f"{left_s:.0f} s left buy all {len(to_do)} more runs and {left_s - need_s:.0f} s of repeats"
    return f"{max(0.0, left_s):.0f} s left buy about {len(to_do) * max(0.0, left_s) / need_s:.0f} more runs"


def _tell(cells: Sequence[Cell], num_left_out: int, fleet: Fleet, effort: Effort, progress: Progress) -> None:
    if not cells:
        return
    widths = np.array([cell.width(fleet) for cell in cells])
    num_sure = int(np.sum(widths <= effort.precision))
    line = f"{num_sure} of {len(cells)} cells are sure to ± {100 * effort.precision:g} %"
    if num_sure < len(cells):
        widest = cells[int(np.argmax(widths))]
        line += f", the widest to ± {100 * min(widths.max(), 9.99):.0f} %: {widest.run.title(fleet)}"
    if num_left_out:
        line += f"; {num_left_out} runs were left out for want of time: give a larger --budget"
    progress.say(line)
