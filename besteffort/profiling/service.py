"""What a service makes of a profile: the simulator beside requests that came and went at random.

Cells are measured while nothing changes. Where requests come and go a server does more for each step than
there, and beside other servers still more; how much depends on the machine. So requests are served like
that too, and the simulator is given the same ones: steps, and slow-downs beside other models, are as long
as it takes for its means to be the measured ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample, Served, fit_latency
from besteffort.request import Requests
from besteffort.simulator import simulate_choices

NUM_ROUNDS = 15  # each brings the simulated means nearer to the measured ones
_LOWEST, _HIGHEST = 0.5, 2.0  # of steps: what lies beyond is not the same machine
_EAGERNESS = 0.7  # of a round: a longer step makes larger batches, which make longer steps


def with_scales(samples: Iterable[Sample], fleet: Fleet) -> list[Sample]:
    """All samples, those of services with the `scale` that they need, and what the simulator makes of them.

    First those of each model alone, whose steps those beside others go by.

    Raises:
        ValueError: there are too few samples for a fit.
    """
    found = [replace(one, scale=None, fitted_ms=None) for one in samples]
    for beside in (False, True):
        groups = _groups(found, beside=beside)
        for _ in range(NUM_ROUNDS):
            _improve(found, groups, fleet)
    return found


def _improve(samples: list[Sample], groups: Sequence[Sequence[int]], fleet: Fleet) -> None:
    """One round. Samples share what is fitted, so that each begins with what the fit made of them all."""
    latency = fit_latency(samples, fleet.model_names)
    bare = fit_latency([one for one in samples if one.kind != "service"], fleet.model_names)
    for group in groups:
        means_ms = _simulated_ms([samples[nth] for nth in group], latency, fleet)
        for nth, made_ms in zip(group, means_ms, strict=True):
            one = samples[nth]
            scale = _scale_of(one, latency, bare, fleet) * (one.mean_ms / made_ms) ** _EAGERNESS
            # Whoever shares a device gets a fair share of it at least.
            bounds = (1.0, 1.0 + len(one.busy_models)) if one.busy_models else (_LOWEST, _HIGHEST)
            samples[nth] = replace(one, scale=float(np.clip(scale, *bounds)), fitted_ms=made_ms)


def _scale_of(service: Sample, latency: Latency, bare: Latency, fleet: Fleet) -> float:
    model = fleet.model_names.index(service.model)
    if not service.busy_models:
        return float(latency.step_ms[model, 0] / bare.step_ms[model, 0])
    busy = [fleet.model_names.index(name) for name in service.busy_models]
    return latency.slowdown_of(model, dict(zip(busy, map(float, service.busy_batch_sizes), strict=True)))


def _groups(samples: Sequence[Sample], *, beside: bool) -> list[list[int]]:
    """Which samples come of one service."""
    groups: dict[frozenset[tuple[str, int]], list[int]] = {}
    for nth, one in enumerate(samples):
        if one.kind == "service" and one.served and bool(one.busy_models) is beside:
            others = zip(one.busy_models, one.busy_batch_sizes, strict=True)
            groups.setdefault(frozenset([(one.model, one.batch_size), *others]), []).append(nth)
    return list(groups.values())


def _simulated_ms(services: Sequence[Sample], latency: Latency, fleet: Fleet) -> list[float]:
    """The mean latency_ms_per_token of each, all served together."""
    requests, choices = _together(services, fleet)
    outcomes = simulate_choices(requests, fleet, latency, choices)
    models = [fleet.model_names.index(one.model) for one in services]
    return [float(np.mean(outcomes.latency_ms_per_token[choices == model])) for model in models]


def _together(services: Sequence[Sample], fleet: Fleet) -> tuple[Requests, NDArray[np.int64]]:
    """The requests of all of them in order of arrival, and the model of each."""
    rows: list[tuple[Served, int]] = [
        (served, fleet.model_names.index(one.model)) for one in services for served in one.served
    ]
    rows.sort(key=lambda row: row[0].at_s)
    requests = Requests(
        arrived_at=np.array([served.at_s for served, _ in rows]),
        task=np.zeros(len(rows), dtype=np.int64),
        num_prompt_tokens=np.array([served.num_prompt_tokens for served, _ in rows]),
        num_output_tokens=np.array([served.num_output_tokens for served, _ in rows]),
    )
    return requests, np.array([model for _, model in rows])
