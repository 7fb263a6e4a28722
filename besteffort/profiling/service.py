"""What a service makes of a profile: the simulator beside requests that came and went at random.

Cells are measured while nothing changes. Where requests come and go a server does more for each step than
there, and beside other servers still more; how much depends on the machine. So requests are served like
that too, and the simulator is given the same ones: steps, what surrounds them, and slow-downs beside other
models, are as long as it takes for its means to be the measured ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from besteffort.fleet import Fleet
from besteffort.latency import Latency, Sample, Served, fit_latency
from besteffort.request import Requests
from besteffort.simulator import simulate_choices

Floats = NDArray[np.float64]

NUM_ROUNDS = 15  # each brings the simulated means nearer to the measured ones
_LOWEST, _HIGHEST = 0.5, 2.0  # of steps: what lies beyond is not the same machine
_EAGERNESS = 0.7  # of a round: a longer step makes larger batches, which make longer steps


@dataclass(frozen=True, slots=True)
class _Means:
    """Over the requests of a service."""

    latency_ms_per_token: float
    ttft_ms: float | None  # None: not measured
    decode_ms_per_token: float | None  # after the first token; None: not measured, or all have but one


def with_scales(samples: Iterable[Sample], fleet: Fleet) -> list[Sample]:
    """All samples, those of services with the `scale` that they need, and what the simulator makes of them.

    First those of each model alone, whose steps those beside others go by, and with what surrounds their
    steps besides.

    Raises:
        ValueError: there are too few samples for a fit.
    """
    found = [replace(one, scale=None, overhead_ms=None, fitted_ms=None) for one in samples]
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
        means = _simulated([samples[nth] for nth in group], latency, fleet)
        for nth, made in zip(group, means, strict=True):
            one = samples[nth]
            measured = _measured(one)
            scale = _scale_of(one, latency, bare, fleet) * _longer(one, measured, made) ** _EAGERNESS
            # Whoever shares a device gets a fair share of it at least.
            bounds = (1.0, 1.0 + len(one.busy_models)) if one.busy_models else (_LOWEST, _HIGHEST)
            samples[nth] = replace(
                one,
                scale=float(np.clip(scale, *bounds)),
                overhead_ms=_overhead_ms(one, measured, made, latency, bare, fleet),
                fitted_ms=made.latency_ms_per_token,
            )


def _longer(one: Sample, measured: _Means, made: _Means) -> float:
    """How many times as long steps should be: of a model alone by what comes after first tokens."""
    if one.busy_models or measured.decode_ms_per_token is None or made.decode_ms_per_token is None:
        return measured.latency_ms_per_token / made.latency_ms_per_token
    return measured.decode_ms_per_token / made.decode_ms_per_token


def _overhead_ms(
    one: Sample, measured: _Means, made: _Means, latency: Latency, bare: Latency, fleet: Fleet
) -> float | None:
    """With which first tokens of a model that is alone come when they did; below zero: off its prefills."""
    if one.busy_models or measured.ttft_ms is None or made.ttft_ms is None:
        return None
    model = fleet.model_names.index(one.model)
    before_ms = latency.overhead_ms[model] + latency.prefill_base_ms[model] - bare.prefill_base_ms[model]
    return float(before_ms + _EAGERNESS * (measured.ttft_ms - made.ttft_ms))


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


def _simulated(services: Sequence[Sample], latency: Latency, fleet: Fleet) -> list[_Means]:
    """Of each, all served together."""
    requests, choices = _together(services, fleet)
    outcomes = simulate_choices(requests, fleet, latency, choices)
    found = []
    for one in services:
        rows = choices == fleet.model_names.index(one.model)
        latencies, ttfts = outcomes.latency_ms_per_token[rows], outcomes.ttft_ms[rows]
        found.append(_means(latencies, ttfts, requests.num_output_tokens[rows]))
    return found


def _measured(service: Sample) -> _Means:
    ttfts = [each.ttft_ms for each in service.served if each.ttft_ms is not None]
    if len(ttfts) < len(service.served):
        return _Means(service.mean_ms, None, None)
    latencies = np.array([each.latency_ms_per_token for each in service.served])
    return _means(latencies, np.array(ttfts), np.array([each.num_output_tokens for each in service.served]))


def _means(latency_ms_per_token: Floats, ttft_ms: Floats, num_output_tokens: NDArray[np.int64]) -> _Means:
    """Of requests, each array of shape `(N,)`."""
    later = num_output_tokens > 1
    decode_ms = (latency_ms_per_token * num_output_tokens - ttft_ms)[later] / (num_output_tokens[later] - 1)
    per_token_ms = float(np.mean(decode_ms)) if later.any() else None
    return _Means(float(np.mean(latency_ms_per_token)), float(np.mean(ttft_ms)), per_token_ms)


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
