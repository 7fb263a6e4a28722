"""Latencies as the simulator and the predicting policies use them."""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PRESSURE_AT = 4  # the batch size of the others for which `slowdown` stands


@dataclass(frozen=True)
class Latency:
    """Latencies of `M` models that share each device.

    A step makes one token for every running request of a model, and reads the prompts that wait, which
    makes it longer, as do the tokens before the present one. While other models of the same device are
    busy, all steps take longer by `slowdown`, and by how far their batches are from `PRESSURE_AT`.
    """

    batch_sizes: NDArray[np.int64]  # (B,) rising, from 1: where `step_ms` was measured
    step_ms: NDArray[np.float64]  # (M, B) the model alone on its device
    prefill_base_ms: NDArray[np.float64]  # (M,) to the first token of an empty prompt, a step included
    prefill_ms_per_token: NDArray[np.float64]  # (M,)
    slowdown: NDArray[np.float64]  # (M, 2**M) by the bit set of busy models on the device; >= 1
    # (M,) of a step, for each token before the present one, of all requests together
    context_ms_per_token: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    # (M,) of a request, beside the steps: HTTP, tokenizer and router
    overhead_ms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    # (M, M) what each doubling of the batch of the second model adds to the slow-down of the first
    pressure: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    # (P,) rising, and (M, P): by how much prompts of these lengths are off that line. An engine reads up to
    # some number of tokens by other kernels than more of them, and a first token's time jumps there.
    bend_at_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    prefill_bend_ms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    # Steps for which a prompt waits after the one that runs when it comes; None: it interrupts that one.
    lag_steps: int | None = None

    def __post_init__(self) -> None:
        """What is left out is zero."""
        num_models = self.num_models
        for name, shape in (
            ("context_ms_per_token", (num_models,)),
            ("overhead_ms", (num_models,)),
            ("pressure", (num_models, num_models)),
            ("prefill_bend_ms", (num_models, len(self.bend_at_tokens))),
        ):
            if not getattr(self, name).size:
                object.__setattr__(self, name, np.zeros(shape))

    @property
    def num_models(self) -> int:
        return len(self.step_ms)

    def step_table_ms(self, max_batch_size: int) -> NDArray[np.float64]:
        """Step time at every batch size from 0 to `max_batch_size`, shape `(M, max_batch_size + 1)`.

        Linear between measured batch sizes; past the last one it rises on with the last slope.
        Entry 0 repeats entry 1, so that an idle model has a defined pace.
        """
        wanted = np.maximum(np.arange(max_batch_size + 1), 1)
        return np.stack([interpolate(wanted, self.batch_sizes, row) for row in self.step_ms])

    def prefill_ms(self, num_prompt_tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Prefill time alone on the device, shape `(M, N)` for lengths `(N,)`.

        On a line, and off it by what was measured: linear between those lengths, level beyond them.
        """
        per_token = np.outer(self.prefill_ms_per_token, num_prompt_tokens)
        bends = [np.interp(num_prompt_tokens, self.bend_at_tokens, row) for row in self.prefill_bend_ms]
        return np.asarray(self.prefill_base_ms[:, None] + per_token + bends)

    def slowed(self, factors: NDArray[np.float64]) -> "Latency":
        """Everything takes so many times as long, `(M,)`, as on a machine of another pace."""
        return replace(
            self,
            step_ms=self.step_ms * factors[:, None],
            prefill_base_ms=self.prefill_base_ms * factors,
            prefill_ms_per_token=self.prefill_ms_per_token * factors,
            context_ms_per_token=self.context_ms_per_token * factors,
            overhead_ms=self.overhead_ms * factors,
            prefill_bend_ms=self.prefill_bend_ms * factors[:, None],
        )

    def slowdown_of(self, model: int, batch_sizes: dict[int, float]) -> float:
        """Of a model's steps while these others (index: requests in flight) are busy on its device."""
        busy = sum(1 << other for other in batch_sizes) | 1 << model
        slow = float(self.slowdown[model, busy])
        for other, size in batch_sizes.items():
            slow += float(self.pressure[model, other]) * math.log2(size / PRESSURE_AT)
        return max(1.0, slow)

    def pressure_table(self, max_in_flight: int) -> NDArray[np.float64]:
        """What each number of requests at another model adds to the slow-down of a model.

        Shape `(M, M, B)`; from `max_in_flight` on nothing more comes, and where there is no pressure B is 1.
        """
        if not self.pressure.any():
            return np.zeros((self.num_models, self.num_models, 1))
        doublings = np.zeros(max_in_flight + 1)
        doublings[1:] = np.log2(np.arange(1, max_in_flight + 1) / PRESSURE_AT)
        return np.asarray(self.pressure[:, :, None] * doublings)

    @cached_property
    def _lists(self) -> tuple[list[list[float]], list[list[float]], list[float], list[float], list[float]]:
        """Steps, slowdowns, both parts of a first token, context: an array's entry costs more."""
        base_ms = self.prefill_base_ms + self.overhead_ms
        steps_ms, slowdown = self.step_table_ms(1024).tolist(), self.slowdown.tolist()
        return (
            steps_ms,
            slowdown,
            base_ms.tolist(),
            self.prefill_ms_per_token.tolist(),
            self.context_ms_per_token.tolist(),
        )

    def _bend_ms(self, model: int, num_prompt_tokens: int) -> float:
        if len(self.bend_at_tokens) == 1:
            return float(self.prefill_bend_ms[model, 0])
        return float(np.interp(num_prompt_tokens, self.bend_at_tokens, self.prefill_bend_ms[model]))

    def predicted_ms_per_token(
        self,
        batch_sizes: NDArray[np.floating],  # (M,) requests in flight per replica
        num_prompt_tokens: int,
        num_output_tokens: int,
    ) -> NDArray[np.float64]:
        """`latency_ms_per_token` of one more request at each model, shape `(M,)`.

        As if every batch stayed as it is until the request is done.
        """
        steps_ms, slowdown, base_ms, ms_per_token, context_ms = self._lists
        context_tokens = num_prompt_tokens + num_output_tokens / 2
        sizes = np.asarray(batch_sizes).tolist()
        busy = sum(1 << model for model, size in enumerate(sizes) if size > 0)
        predicted = []
        for model, size in enumerate(sizes):
            step_ms = steps_ms[model][min(math.ceil(size) + 1, 1024)]
            step_ms += context_ms[model] * (size + 1) * context_tokens
            decode_ms = step_ms * (num_output_tokens - 1)
            prefill_ms = base_ms[model] + ms_per_token[model] * num_prompt_tokens
            prefill_ms += self._bend_ms(model, num_prompt_tokens)
            slow = slowdown[model][busy | 1 << model]
            predicted.append(slow * (prefill_ms + decode_ms) / num_output_tokens)
        return np.array(predicted)


def interpolate(
    wanted: NDArray[np.int64], batch_sizes: NDArray[np.int64], measured_ms: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Linear between measured batch sizes, and past the last one on with the last slope."""
    inside = np.interp(wanted, batch_sizes, measured_ms)
    if len(batch_sizes) == 1:
        return np.asarray(inside)
    slope = max(0.0, (measured_ms[-1] - measured_ms[-2]) / (batch_sizes[-1] - batch_sizes[-2]))
    return np.asarray(inside + slope * np.maximum(wanted - batch_sizes[-1], 0))
