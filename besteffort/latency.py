"""How long the models take: what the simulator and the predicting policies use of a profile."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Latency:
    """Latencies of `M` models that share each device.

    A step makes one token for every running request of a model, and reads the prompts that wait, which
    makes it longer. While other models of the same device are busy, all steps take longer by
    `slowdown`.
    """

    batch_sizes: NDArray[np.int64]  # (B,) rising, from 1: where `step_ms` was measured
    step_ms: NDArray[np.float64]  # (M, B) the model alone on its device
    prefill_base_ms: NDArray[np.float64]  # (M,) to the first token of an empty prompt, a step included
    prefill_ms_per_token: NDArray[np.float64]  # (M,)
    slowdown: NDArray[np.float64]  # (M, 2**M) by the bit set of busy models on the device; >= 1

    @property
    def num_models(self) -> int:
        return len(self.step_ms)

    def step_table_ms(self, max_batch_size: int) -> NDArray[np.float64]:
        """Step time at every batch size from 0 to `max_batch_size`, shape `(M, max_batch_size + 1)`.

        Linear between measured batch sizes; past the last one it rises on with the last slope.
        Entry 0 repeats entry 1, so that an idle model has a defined pace.
        """
        wanted = np.maximum(np.arange(max_batch_size + 1), 1)
        return np.stack([_interpolate(wanted, self.batch_sizes, row) for row in self.step_ms])

    def prefill_ms(self, num_prompt_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Prefill time alone on the device, shape `(M, N)` for lengths `(N,)`."""
        per_token = np.outer(self.prefill_ms_per_token, num_prompt_tokens)
        return np.asarray(self.prefill_base_ms[:, None] + per_token)

    @cached_property
    def _lists(self) -> tuple[list[list[float]], list[list[float]], list[float], list[float]]:
        """Steps, slowdowns and both parts of a prefill: a single entry of an array costs more."""
        arrays = self.step_table_ms(1024), self.slowdown, self.prefill_base_ms, self.prefill_ms_per_token
        steps_ms, slowdown, base_ms, ms_per_token = (array.tolist() for array in arrays)
        return steps_ms, slowdown, base_ms, ms_per_token

    def predicted_ms_per_token(
        self,
        batch_sizes: NDArray[np.floating],  # (M,) requests in flight per replica
        num_prompt_tokens: int,
        num_output_tokens: int,
    ) -> NDArray[np.float64]:
        """`latency_ms_per_token` of one more request at each model, shape `(M,)`.

        As if every batch stayed as it is until the request is done.
        """
        steps_ms, slowdown, base_ms, ms_per_token = self._lists
        sizes = np.asarray(batch_sizes).tolist()
        busy = sum(1 << model for model, size in enumerate(sizes) if size > 0)
        predicted = []
        for model, size in enumerate(sizes):
            decode_ms = steps_ms[model][min(math.ceil(size) + 1, 1024)] * (num_output_tokens - 1)
            prefill_ms = base_ms[model] + ms_per_token[model] * num_prompt_tokens
            slow = slowdown[model][busy | 1 << model]
            predicted.append(slow * (prefill_ms + decode_ms) / num_output_tokens)
        return np.array(predicted)


def _interpolate(
    wanted: NDArray[np.int64], batch_sizes: NDArray[np.int64], measured_ms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Linear between measured batch sizes, and past the last one on with the last slope."""
    inside = np.interp(wanted, batch_sizes, measured_ms)
    if len(batch_sizes) == 1:
        return np.asarray(inside)
    slope = max(0.0, (measured_ms[-1] - measured_ms[-2]) / (batch_sizes[-1] - batch_sizes[-2]))
    return np.asarray(inside + slope * np.maximum(wanted - batch_sizes[-1], 0))


@dataclass(frozen=True, slots=True)
class Sample:
    """One cell of a profile: repeated measurements of one quantity, with their spread."""

    kind: Literal["decode", "prefill", "interference"]
    model: str
    batch_size: int  # requests kept in flight at this model
    num_prompt_tokens: int
    busy_models: tuple[str, ...]  # the others on the device that were kept as busy meanwhile
    mean_ms: float  # decode and interference: between tokens; prefill: to the first token
    std_ms: float
    p50_ms: float
    p95_ms: float
    num_measurements: int
    source: Literal["measured", "modelled"] = "measured"


def fit_latency(samples: Iterable[Sample], model_names: Sequence[str]) -> Latency:
    """What the simulator uses, from a profile's samples.

    Raises:
        ValueError: a model lacks decode samples, or two prompt lengths.
    """
    by_kind: dict[str, list[Sample]] = {"decode": [], "prefill": [], "interference": []}
    for sample in samples:
        by_kind[sample.kind].append(sample)
    batch_sizes, step_ms = _fit_steps(by_kind["decode"], model_names)
    base_ms, ms_per_token = _fit_prefill(by_kind["prefill"], model_names)
    latency = Latency(
        batch_sizes=batch_sizes,
        step_ms=step_ms,
        prefill_base_ms=base_ms,
        prefill_ms_per_token=ms_per_token,
        slowdown=np.ones((len(model_names), 2 ** len(model_names))),
    )
    return replace(latency, slowdown=_fit_slowdown(by_kind["interference"], latency, model_names))


def _fit_steps(
    samples: list[Sample], model_names: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    batch_sizes = np.array(sorted({sample.batch_size for sample in samples}), dtype=np.int64)
    rows = []
    for name in model_names:
        measured = [(s.batch_size, s.mean_ms) for s in samples if s.model == name]
        if not measured:
            raise ValueError(f"no decode samples of model {name!r}")
        sizes = np.array(sorted({size for size, _ in measured}), dtype=np.int64)
        means = [np.mean([ms for size, ms in measured if size == wanted]) for wanted in sizes]
        # A larger batch is never faster: what falls is noise, and would make waiting look free.
        # So would a flat end where another model was measured at larger batches than this one.
        rows.append(_interpolate(batch_sizes, sizes, np.maximum.accumulate(means)))
    return batch_sizes, np.array(rows)


def _fit_prefill(
    samples: list[Sample], model_names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
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


def _fit_slowdown(samples: list[Sample], alone: Latency, model_names: Sequence[str]) -> NDArray[np.float64]:
    """Measured where a set of busy models was measured; else the sum of what each adds in a pair."""
    num_models = len(model_names)
    index = {name: m for m, name in enumerate(model_names)}
    steps_ms = alone.step_table_ms(max([1, *(s.batch_size for s in samples)]))
    ratios: dict[tuple[int, int], list[float]] = {}
    for sample in samples:
        model = index[sample.model]
        others = sum(1 << index[name] for name in sample.busy_models)
        ratio = sample.mean_ms / steps_ms[model, sample.batch_size]
        ratios.setdefault((model, others), []).append(ratio)
    measured = {key: max(1.0, float(np.mean(values))) for key, values in ratios.items()}
    slowdown = np.ones((num_models, 2**num_models))
    for model in range(num_models):
        for busy in range(2**num_models):
            others = busy & ~(1 << model)
            pairs = (measured.get((model, 1 << k), 1.0) - 1.0
                     for k in range(num_models) if others >> k & 1)  # fmt: skip
            slowdown[model, busy] = measured.get((model, others), 1.0 + sum(pairs))
    return slowdown
