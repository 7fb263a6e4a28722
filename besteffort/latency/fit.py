"""From a profile's samples to what the simulator uses, and back."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from besteffort.latency.model import PRESSURE_AT, Latency, interpolate
from besteffort.latency.samples import Sample

Floats = NDArray[np.float64]


def fit_latency(samples: Iterable[Sample], model_names: Sequence[str]) -> Latency:
    """What the simulator uses, from a profile's samples.

    Raises:
        ValueError: a model lacks decode samples, or two prompt lengths.
    """
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append(sample)
    decode, prefill = by_kind.get("decode", []), by_kind.get("prefill", [])
    context_ms = np.array([_fit_context([s for s in decode if s.model == name]) for name in model_names])
    batch_sizes, step_ms = _fit_steps(decode, context_ms, model_names)
    base_ms, ms_per_token = _fit_prefill(prefill, model_names)
    latency = Latency(
        batch_sizes=batch_sizes,
        step_ms=step_ms,
        prefill_base_ms=base_ms,
        prefill_ms_per_token=ms_per_token,
        slowdown=np.ones((len(model_names), 2 ** len(model_names))),
        context_ms_per_token=context_ms,
    )
    latency = _without_overhead(latency, prefill, by_kind.get("stall", []), model_names)
    latency = _with_bends(latency, prefill, by_kind.get("stall", []), model_names)
    latency = replace(latency, lag_steps=_fit_lag(latency, by_kind.get("joining", []), model_names))
    services = [s for s in by_kind.get("service", []) if s.scale is not None]
    beside = [s for s in services if s.busy_models] or by_kind.get("interference", [])
    slowdown, pressure = _fit_slowdown(beside, latency, model_names)
    latency = replace(latency, slowdown=slowdown, pressure=pressure)
    return _as_in_service(latency, [s for s in services if not s.busy_models], model_names)


def fitted_ms(sample: Sample, latency: Latency, model_names: Sequence[str]) -> float | None:
    """What the fit makes of a cell, to be held against its `mean_ms`; of a service a simulator must tell."""
    if sample.kind == "service":
        return sample.fitted_ms
    model = list(model_names).index(sample.model)
    step_ms = _step_ms(latency, model, sample)
    if sample.kind == "decode":
        return step_ms
    if sample.kind == "interference":
        busy = [list(model_names).index(name) for name in sample.busy_models]
        return step_ms * latency.slowdown_of(model, dict(zip(busy, _busy_sizes(sample), strict=True)))
    if sample.kind == "prefill":
        prompt = np.array([sample.num_prompt_tokens])
        return float(latency.prefill_ms(prompt)[model, 0] + latency.overhead_ms[model])
    stall_ms = _stall_ms(latency, model, sample)
    if sample.kind == "stall":
        return stall_ms
    wait_steps = 0.0 if latency.lag_steps is None else 0.5 + latency.lag_steps
    return float(latency.overhead_ms[model] + (1.0 + wait_steps) * step_ms + stall_ms)


def _step_ms(latency: Latency, model: int, sample: Sample) -> float:
    """Of the model alone, at this sample's batch size and context."""
    step_ms = latency.step_table_ms(sample.batch_size)[model, sample.batch_size]
    return float(step_ms + latency.context_ms_per_token[model] * sample.batch_size * sample.context_tokens)


def _stall_ms(latency: Latency, model: int, sample: Sample) -> float:
    """By how much the simulator's step with this prompt is longer than one without."""
    steps_ms = latency.step_table_ms(sample.batch_size + 1)[model]
    prefill_ms = latency.prefill_ms(np.array([sample.num_prompt_tokens]))[model, 0]
    longer_ms = steps_ms[sample.batch_size + 1] - steps_ms[sample.batch_size]
    return float(max(prefill_ms, steps_ms[1]) - steps_ms[1] + longer_ms)


def _busy_sizes(sample: Sample) -> Sequence[int]:
    return sample.busy_batch_sizes or (sample.batch_size,) * len(sample.busy_models)


def _fit_context(samples: Sequence[Sample]) -> float:
    """The slope of a step over the tokens before the present one, by cells that differ in those alone."""
    products = squares = 0.0
    for batch_size in {s.batch_size for s in samples}:
        cells = [(s.batch_size * s.context_tokens, s.mean_ms) for s in samples if s.batch_size == batch_size]
        tokens, ms = np.array(cells).T
        weight = 1.0 / ms.mean() ** 2
        products += weight * float(np.sum((tokens - tokens.mean()) * (ms - ms.mean())))
        squares += weight * float(np.sum((tokens - tokens.mean()) ** 2))
    return max(0.0, products / squares) if squares > 0 else 0.0


def _fit_steps(
    samples: list[Sample], context_ms: Floats, model_names: Sequence[str]
) -> tuple[NDArray[np.int64], Floats]:
    batch_sizes = np.array(sorted({sample.batch_size for sample in samples}), dtype=np.int64)
    rows = []
    for name, per_token_ms in zip(model_names, context_ms, strict=True):
        of_model = [s for s in samples if s.model == name]
        if not of_model:
            raise ValueError(f"no decode samples of model {name!r}")
        sizes = np.array(sorted({s.batch_size for s in of_model}), dtype=np.int64)
        steps = [
            _mean_step([s for s in of_model if s.batch_size == size], per_token_ms) for size in sizes.tolist()
        ]
        # A flat end where another model was measured at larger batches would make waiting look free.
        rows.append(interpolate(batch_sizes, sizes, _without_doubtful_falls(steps)))
    return batch_sizes, np.array(rows)


def _mean_step(samples: Sequence[Sample], context_ms_per_token: float) -> tuple[float, float]:
    """At one batch size: a step without its context, and how far off it may be."""
    bare = [s.mean_ms - context_ms_per_token * s.batch_size * s.context_tokens for s in samples]
    doubts = [np.inf if s.ci_ms is None else s.ci_ms for s in samples]
    return float(np.mean(bare)), float(np.mean(doubts))


def _without_doubtful_falls(steps: Sequence[tuple[float, float]]) -> Floats:
    """Steps by rising batch size, level where a larger batch seems faster and may be so by chance.

    A surely faster one is kept: at some sizes a matrix product takes another kernel, as that of two
    rows on a CPU, which is slower than that of four.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, doubt, number of sizes
    for mean, doubt in steps:
        blocks.append((mean, doubt, 1))
        while len(blocks) > 1 and 0.0 < blocks[-2][0] - blocks[-1][0] <= blocks[-2][1] + blocks[-1][1]:
            (one, doubt_of_one, num), (other, doubt_of_other, more) = blocks[-2:]
            level = (num * one + more * other) / (num + more)
            blocks[-2:] = [(level, max(doubt_of_one, doubt_of_other), num + more)]
    return np.repeat([mean for mean, _, _ in blocks], [num for *_, num in blocks])


def _fit_prefill(samples: list[Sample], model_names: Sequence[str]) -> tuple[Floats, Floats]:
    """A line through time to first token by prompt length, neither part below zero."""
    lines = []
    for name in model_names:
        points = [(s.num_prompt_tokens, s.mean_ms) for s in samples if s.model == name]
        lengths, means = np.array(points, dtype=np.float64).reshape(-1, 2).T
        if len(np.unique(lengths)) < 2:
            raise ValueError(f"fewer than two prompt lengths of model {name!r}")
        slope, _ = np.polyfit(lengths, means, 1)
        slope = max(0.0, float(slope))
        lines.append((max(0.0, float(np.mean(means - slope * lengths))), slope))
    base_ms, ms_per_token = np.array(lines).T
    return base_ms, ms_per_token


def _without_overhead(
    latency: Latency, prefill: list[Sample], stalls: list[Sample], model_names: Sequence[str]
) -> Latency:
    """Part a first token's time into what the engine's step takes and what surrounds it.

    A prompt that holds up a running batch shows its step without the rest: HTTP, tokenizer, router.
    """
    base_ms, ms_per_token = latency.prefill_base_ms.copy(), latency.prefill_ms_per_token.copy()
    overhead_ms = np.zeros(latency.num_models)
    for model, name in enumerate(model_names):
        alone = [(s.num_prompt_tokens, s.mean_ms) for s in prefill if s.model == name]
        steps_ms = latency.step_table_ms(1 + max([1, *(s.batch_size for s in stalls)]))[model]
        longer_ms = np.diff(steps_ms)  # by one more request in the batch
        shown = [
            (s.num_prompt_tokens, s.mean_ms + steps_ms[1] - longer_ms[s.batch_size])
            for s in stalls
            if s.model == name
        ]
        if not shown:
            continue
        rows = np.array([(1.0, n, 1.0) for n, _ in alone] + [(1.0, n, 0.0) for n, _ in shown])
        ms = np.array([ms for _, ms in [*alone, *shown]])
        weights = 1.0 / np.maximum(ms, steps_ms[1])
        base, slope, overhead = np.linalg.lstsq(rows * weights[:, None], ms * weights, rcond=None)[0]
        slope = max(0.0, float(slope))
        shortest_ms = min(ms - slope * n for n, ms in alone)
        overhead_ms[model] = min(max(0.0, float(overhead)), max(0.0, shortest_ms))
        base_ms[model] = max(0.0, float(base), shortest_ms - overhead_ms[model])
        ms_per_token[model] = slope
    return replace(
        latency, prefill_base_ms=base_ms, prefill_ms_per_token=ms_per_token, overhead_ms=overhead_ms
    )


def _with_bends(
    latency: Latency, prefill: list[Sample], stalls: list[Sample], model_names: Sequence[str]
) -> Latency:
    """With what is surely off the line of prefills by length, at the lengths that were measured.

    Both kinds of cells show it, and count alike. What may be chance counts as nothing.
    """
    lengths = sorted({s.num_prompt_tokens for s in prefill})
    bends_ms = np.zeros((len(model_names), len(lengths)))
    for model, name in enumerate(model_names):
        cells = [s for s in (*prefill, *stalls) if s.model == name]
        for nth, length in enumerate(lengths):
            off_ms = [_surely_off_ms(s, latency, model_names) for s in cells if s.num_prompt_tokens == length]
            bends_ms[model, nth] = np.mean(off_ms) if off_ms else 0.0
    if not bends_ms.any():
        return latency
    return replace(latency, bend_at_tokens=np.array(lengths), prefill_bend_ms=bends_ms)


def _surely_off_ms(sample: Sample, latency: Latency, model_names: Sequence[str]) -> float:
    """How far from the fit at least, going by the confidence interval."""
    made_ms = fitted_ms(sample, latency, model_names)
    if made_ms is None or sample.ci_ms is None:
        return 0.0
    off_ms = sample.mean_ms - made_ms
    return float(np.sign(off_ms) * max(0.0, abs(off_ms) - sample.ci_ms))


def _fit_lag(latency: Latency, samples: list[Sample], model_names: Sequence[str]) -> int | None:
    """Whole steps for which a prompt waits beside the one that runs, half of which it sees on average.

    By least squares in ms, so that long steps tell most: beside short ones a wait is what surrounds a
    request as much as steps.
    """
    if not samples:
        return None
    waits_ms, steps_ms = [], []
    for sample in samples:
        model = list(model_names).index(sample.model)
        step_ms = _step_ms(latency, model, sample)
        read_ms = latency.overhead_ms[model] + step_ms + _stall_ms(latency, model, sample)
        waits_ms.append(sample.mean_ms - read_ms)
        steps_ms.append(step_ms)
    return max(0, round(float(np.dot(waits_ms, steps_ms) / np.dot(steps_ms, steps_ms)) - 0.5))


def _fit_slowdown(samples: list[Sample], alone: Latency, model_names: Sequence[str]) -> tuple[Floats, Floats]:
    """Slow-down by the busy set, and what a doubling of each other batch adds.

    Measured where a set of busy models was measured; else the sum of what each adds in a pair.
    """
    num_models = len(model_names)
    index = {name: m for m, name in enumerate(model_names)}
    cells: dict[tuple[int, int], list[tuple[float, Floats]]] = {}
    for sample in samples:
        model = index[sample.model]
        doublings = np.zeros(num_models)
        for name, size in zip(sample.busy_models, _busy_sizes(sample), strict=True):
            # Where requests come and go batches do not stay: a slow-down is that of all of them.
            stays = sample.kind == "interference" and sample.busy_batch_sizes
            doublings[index[name]] = np.log2(size / PRESSURE_AT) if stays else 0.0
        others = sum(1 << index[name] for name in sample.busy_models)
        ratio = sample.scale or sample.mean_ms / _step_ms(alone, model, sample)
        cells.setdefault((model, others), []).append((ratio, doublings))
    pressure = np.array([_fit_pressure(model, cells) for model in range(num_models)])
    measured = {
        key: max(1.0, float(np.mean([ratio - pressure[key[0]] @ doublings for ratio, doublings in of_set])))
        for key, of_set in cells.items()
    }
    slowdown = np.ones((num_models, 2**num_models))
    for model in range(num_models):
        for busy in range(2**num_models):
            others = busy & ~(1 << model)
            pairs = (measured.get((model, 1 << k), 1.0) - 1.0
                     for k in range(num_models) if others >> k & 1)  # fmt: skip
            slowdown[model, busy] = measured.get((model, others), 1.0 + sum(pairs))
    return slowdown, pressure


def _as_in_service(latency: Latency, services: Sequence[Sample], model_names: Sequence[str]) -> Latency:
    """With steps as long as they are where requests come and go, and with what surrounds them there.

    Where that is less than nothing, it comes off the step that reads a prompt.
    """
    of_models = [[s for s in services if s.model == name] for name in model_names]
    scale = np.array([_mean([s.scale for s in those], 1.0) for those in of_models])
    in_cells_ms = latency.overhead_ms.tolist()
    overhead_ms = np.array(
        [
            _mean([s.overhead_ms for s in those], otherwise)
            for those, otherwise in zip(of_models, in_cells_ms, strict=True)
        ]
    )
    return replace(
        latency,
        step_ms=latency.step_ms * scale[:, None],
        context_ms_per_token=latency.context_ms_per_token * scale,
        prefill_base_ms=np.maximum(0.0, latency.prefill_base_ms + np.minimum(0.0, overhead_ms)),
        overhead_ms=np.maximum(0.0, overhead_ms),
    )


def _mean(values: Iterable[float | None], otherwise: float) -> float:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else otherwise


def _fit_pressure(model: int, cells: dict[tuple[int, int], list[tuple[float, Floats]]]) -> Floats:
    """By cells of one busy set, shape `(M,)`; zero where nothing differs, and never below."""
    rows, ratios = [], []
    for (of, _), of_set in cells.items():
        if of == model:
            doublings = np.array([row for _, row in of_set])
            values = np.array([ratio for ratio, _ in of_set])
            rows.append(doublings - doublings.mean(axis=0))
            ratios.append(values - values.mean())
    num_models = len(next(iter(cells.values()))[0][1]) if cells else 0
    if not rows:
        return np.zeros(num_models)
    all_rows = np.concatenate(rows)
    if not all_rows.any():
        return np.zeros(num_models)
    found = np.linalg.lstsq(all_rows, np.concatenate(ratios), rcond=None)[0]
    return np.asarray(np.maximum(found, 0.0))
