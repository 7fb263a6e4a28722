"""What a profile says of a fleet's deadlines: where they are crossed, and whether there is a choice."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from besteffort.fleet import Fleet, Task
from besteffort.latency import Latency
from besteffort.request import Outcomes
from besteffort.simulator import simulate_choices
from besteffort.workload import stable

# The paper's rates (its Figure 2), for four GPUs; `rate_scale` makes them the fleet's.
RATES_PER_S = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0)
KNEE_PER_S = 2.0  # up to here the paper's largest model holds its peak
AVAILABLE = 0.95  # share of the requests in time
_NUM_REQUESTS = 400  # at a rate
_SEED = 7
_LARGEST_BATCH = 1024


@dataclass(frozen=True)
class Crossing:
    """The last batch size at which a model alone on its device makes a task's deadline."""

    model: str
    deadline_ms_per_token: float
    tasks: tuple[str, ...]
    last_batch_size: int  # 0: not even a single request makes it
    max_num_seqs: int

    @property
    def line(self) -> str:
        tasks = ", ".join(self.tasks)
        promise = f"{self.deadline_ms_per_token:g} ms/token ({tasks})"
        if self.last_batch_size == 0:
            return f"{self.model}: never makes {promise}"
        if self.last_batch_size >= self.max_num_seqs:
            return f"{self.model}: makes {promise} up to all of its {self.max_num_seqs} seats"
        return f"{self.model}: crosses {promise} at batch {self.last_batch_size + 1}"


def crossings(fleet: Fleet, latency: Latency) -> list[Crossing]:
    """Of every model and deadline, for requests of the tasks' middle lengths that all run."""
    found = []
    steps_ms = latency.step_table_ms(_LARGEST_BATCH)
    deadlines = sorted(
        {(t.deadline_ms_per_token, t.num_prompt_tokens, t.num_output_tokens) for t in fleet.tasks}
    )
    for m, model in enumerate(fleet.models):
        for deadline, prompts, outputs in deadlines:
            prompt, output = sum(prompts) / 2, sum(outputs) / 2
            sizes = np.arange(1, model.max_num_seqs + 1)
            context_ms = latency.context_ms_per_token[m] * sizes * (prompt + output / 2)
            first_ms = latency.overhead_ms[m] + latency.prefill_ms(np.array([prompt]))[m, 0]
            taken = (first_ms + (steps_ms[m, sizes] + context_ms) * (output - 1)) / output
            tasks = [
                t.name
                for t in fleet.tasks
                if (t.deadline_ms_per_token, t.num_prompt_tokens, t.num_output_tokens)
                == (deadline, prompts, outputs)
            ]
            last = int(np.sum(np.logical_and.accumulate(taken <= deadline)))
            found.append(Crossing(model.name, deadline, tuple(tasks), last, model.max_num_seqs))
    return found


@dataclass(frozen=True)
class Choice:
    """Whether the router has anything to decide, going by how each model does alone at the paper's rates."""

    fleet: Fleet
    in_time: NDArray[np.float64]  # (M, R) share of the requests by model and rate

    def available_to_per_s(self, model: int) -> float:
        """The highest of the fleet's rates up to which 95 % of the requests are in time; 0: none."""
        num_good = int(np.sum(np.logical_and.accumulate(self.in_time[model] >= AVAILABLE)))
        return RATES_PER_S[num_good - 1] * self.fleet.rate_scale if num_good else 0.0

    @property
    def is_trivial(self) -> bool:
        """Always the largest, or always the smallest."""
        reach = [self.available_to_per_s(m) for m in range(len(self.fleet.models))]
        return len(reach) < 2 or reach[-1] >= max(reach) or not any(reach[1:])

    @property
    def lines(self) -> list[str]:
        names = self.fleet.model_names
        reach = [self.available_to_per_s(m) for m in range(len(names))]
        lines = [
            f"{name} alone keeps {100 * AVAILABLE:g} % of its deadlines up to {top:g} requests/s"
            if top
            else f"{name} alone keeps {100 * AVAILABLE:g} % of its deadlines at no rate"
            for name, top in zip(names, reach, strict=True)
        ]
        low, high = (RATES_PER_S[n] * self.fleet.rate_scale for n in (0, -1))
        if len(names) < 2:
            return [*lines, "one model: there is nothing to decide"]
        if reach[-1] >= high:
            return [*lines, f"nothing to decide: {names[-1]} is in time from {low:g} to {high:g} requests/s; "
                    "shorten the deadlines (--suggest-deadline) or raise rate_scale"]  # fmt: skip
        if not any(reach[1:]):
            return [*lines, f"nothing to decide: only {names[0]} is ever in time; "
                    "lengthen the deadlines (--suggest-deadline) or lower rate_scale"]  # fmt: skip
        if reach[-1] >= max(reach):
            return [*lines, f"nothing to decide: no smaller model lasts longer than {names[-1]}"]
        return [
            *lines,
            "there is something to decide: larger models do at low rates, smaller ones at high ones",
        ]


def choice(fleet: Fleet, latency: Latency) -> Choice:
    """Simulate each model alone at each of the paper's rates."""
    in_time = [
        [_in_time(_alone(fleet, latency, m, rate), fleet) for rate in RATES_PER_S]
        for m in range(len(fleet.models))
    ]
    return Choice(fleet, np.array(in_time))


@dataclass(frozen=True)
class Suggestion:
    """Deadlines that put the largest model's knee where the paper has it."""

    factor: float  # of every deadline
    deadlines_ms_per_token: dict[str, float]  # by task
    knee_per_s: float
    in_time_beyond: float  # share of the requests in time at twice the knee's rate

    @property
    def lines(self) -> list[str]:
        deadlines = ", ".join(f"{task} {ms:.3g}" for task, ms in self.deadlines_ms_per_token.items())
        lines = [
            f"suggested deadlines in ms/token: {deadlines} ({self.factor:.2f} times those of fleet.toml): "
            f"the largest model holds its peak up to {self.knee_per_s:g} requests/s"
        ]
        share = f"{100 * self.in_time_beyond:.0f} % in time at twice that rate"
        if self.in_time_beyond >= AVAILABLE:
            return [*lines, f"it does not fall beyond ({share}): raise rate_scale as well"]
        return [*lines, f"and falls beyond: {share}"]


def suggest_deadlines(fleet: Fleet, latency: Latency) -> Suggestion:
    """The shortest deadlines, all scaled alike, that 99 % make with the largest model at the knee's rate."""
    largest = len(fleet.models) - 1
    ratios = _ratios(_alone(fleet, latency, largest, KNEE_PER_S), fleet)
    factor = float(np.quantile(ratios, 0.99))
    beyond = _ratios(_alone(fleet, latency, largest, 2 * KNEE_PER_S), fleet)
    return Suggestion(
        factor=factor,
        deadlines_ms_per_token={task.name: _rounded_up(task, factor) for task in fleet.tasks},
        knee_per_s=KNEE_PER_S * fleet.rate_scale,
        in_time_beyond=float(np.mean(beyond <= factor)),
    )


def _rounded_up(task: Task, factor: float) -> float:
    """To three digits, so that what makes it still does."""
    exact = task.deadline_ms_per_token * factor
    unit = 10.0 ** (np.floor(np.log10(exact)) - 2)
    return float(np.ceil(exact / unit) * unit)


def _alone(fleet: Fleet, latency: Latency, model: int, rate_per_s: float) -> Outcomes:
    rng = np.random.default_rng(_SEED)
    requests = stable(fleet, rng, rate_per_s, num_requests=_NUM_REQUESTS)
    return simulate_choices(requests, fleet, latency, np.full(len(requests), model))


def _ratios(outcomes: Outcomes, fleet: Fleet) -> NDArray[np.float64]:
    deadlines = np.array([task.deadline_ms_per_token for task in fleet.tasks])
    return np.asarray(outcomes.latency_ms_per_token / deadlines[outcomes.requests.task])


def _in_time(outcomes: Outcomes, fleet: Fleet) -> float:
    return float(np.mean(_ratios(outcomes, fleet) <= 1.0))
