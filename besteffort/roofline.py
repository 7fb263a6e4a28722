"""A profile from public facts instead of measurements: bytes over bandwidth, operations over peak, overheads.

A step reads all weights once, and the keys and values of every running request; a prompt costs two
operations per parameter and token; around that the host launches kernels and samples. How near vLLM
comes to the peaks of the hardware is taken from a published fit on one GPU (`OVERHEADS`), so that a
named GPU and the shape of a network are all that is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from besteffort.errors import FleetError, UsageError
from besteffort.fleet import Architecture, Fleet, Model
from besteffort.latency import Sample

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT_LENGTHS = (16, 64, 256, 1024)  # tokens
INTERFERENCE_BATCH_SIZE = 4  # at every model, as where it is measured

_BYTES_PER_NUMBER = 2  # float16: weights, keys and values alike
_NUM_POSITIONS = 2050  # OPT's position embedding is two longer than its context
_MS_PER_S = 1000.0


@dataclass(frozen=True, slots=True)
class Constant:
    """A number, and its public source; or that it was calibrated, and to what."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Gpu:
    memory_bytes_per_s: Constant
    fp16_operations_per_s: Constant  # dense, by tensor cores


_TITAN = "NVIDIA, TITAN RTX product page (2018)"
_A100 = "NVIDIA, A100 80GB SXM datasheet (2021)"
_H100 = "NVIDIA, H100 SXM datasheet (2023), without sparsity"
_H200 = "NVIDIA, H200 SXM datasheet (2024), without sparsity"
GPUS: Mapping[str, Gpu] = {
    "titan-rtx": Gpu(
        Constant(672e9, f"{_TITAN}: 24 GB of GDDR6, 384 bits at 14 Gbit/s"),
        Constant(
            130.5e12,
            f"{_TITAN}: 130 TFLOP/s; NVIDIA, Quadro RTX 8000 datasheet, the same full TU102: "
            "130.5 TFLOP/s with fp16 or fp32 accumulation",
        ),
    ),
    "a100-sxm-80gb": Gpu(Constant(2039e9, _A100), Constant(312e12, _A100)),
    "h100-sxm": Gpu(Constant(3350e9, _H100), Constant(989.4e12, _H100)),
    "h200-sxm": Gpu(Constant(4800e9, _H200), Constant(989.4e12, _H200)),
}


@dataclass(frozen=True, slots=True)
class Overheads:
    """What lies between the peaks of a GPU and what vLLM makes of them."""

    weight_bandwidth_share: Constant  # of the peak bandwidth, while weights are read
    kv_bandwidth_share: Constant  # while keys and values are
    compute_share: Constant  # of the peak operations, in a prefill
    host_ms: Constant  # of a step, while the GPU waits: scheduling, sampling, answering
    host_ms_per_layer: Constant  # gaps between kernels
    host_ms_per_request: Constant  # running in the batch
    time_slicing: Constant  # 1: engines of one GPU take turns at every kernel; 0: they do not notice


_DISTSERVE = "vLLM, OPT-13B on an A100-80G, as fitted by DistServe (Zhong et al., OSDI 2024; Apache-2.0)"
OVERHEADS = Overheads(
    weight_bandwidth_share=Constant(
        0.85,
        "calibrated: OPT-6.7B on a TITAN RTX takes 31 ms alone, below the deadlines of 40 and 32 ms/token "
        "for which Jha et al. (2024, App. D) still use it",
    ),
    kv_bandwidth_share=Constant(0.68, f"{_DISTSERVE}: 0.000593 ms per context token; 819,200 bytes each"),
    compute_share=Constant(0.59, f"{_DISTSERVE}: prefill 0.1405 ms per token; 25.7 GFLOP each"),
    host_ms=Constant(2.0, "calibrated: the part of host_ms_per_layer's 8.6 ms that no layer causes"),
    host_ms_per_layer=Constant(
        0.165, f"{_DISTSERVE}: a step of 23.48 ms is 14.9 ms of weights and 8.6 ms of host_ms and 40 layers"
    ),
    host_ms_per_request=Constant(0.0607, f"{_DISTSERVE}: 0.0607 ms per request of the batch, below 95"),
    time_slicing=Constant(
        0.2,
        "calibrated: mixing models on one GPU beats every static model from 6 to 24 requests/s "
        "(Jha et al. 2024, Fig. 2); time slices without overlap (NVIDIA, MPS documentation) would be 1",
    ),
)


def _opt(num_layers: int, num_heads: int, hidden_size: int) -> Architecture:
    return Architecture(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        ffn_dim=4 * hidden_size,
        vocab_size=50272,
    )


# Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (2022), Table 1. Without OPT-350M,
# whose embedding is narrower than its layers.
OPT_SHAPES: Mapping[str, Architecture] = {
    "facebook/opt-125m": _opt(12, 12, 768),
    "facebook/opt-1.3b": _opt(24, 32, 2048),
    "facebook/opt-2.7b": _opt(32, 32, 2560),
    "facebook/opt-6.7b": _opt(32, 32, 4096),
    "facebook/opt-13b": _opt(40, 40, 5120),
    "facebook/opt-30b": _opt(48, 56, 7168),
    "facebook/opt-66b": _opt(64, 72, 9216),
}


def num_parameters(shape: Architecture) -> int:
    """Of an OPT network whose output layer is its input embedding."""
    hidden, ffn = shape.hidden_size, shape.ffn_dim
    attention = 4 * (hidden * hidden + hidden)
    feed_forward = 2 * hidden * ffn + hidden + ffn
    norms = 4 * hidden
    per_layer = attention + feed_forward + norms
    return shape.num_hidden_layers * per_layer + (shape.vocab_size + _NUM_POSITIONS + 2) * hidden


def kv_bytes_per_token(shape: Architecture) -> int:
    return 2 * _BYTES_PER_NUMBER * shape.num_hidden_layers * shape.hidden_size


@dataclass(frozen=True, slots=True)
class Roofline:
    """One network on one GPU, alone."""

    gpu: Gpu
    shape: Architecture
    overheads: Overheads = OVERHEADS

    @property
    def weights_ms(self) -> float:
        """Time in which the GPU reads every weight once: the floor of a step."""
        bytes_per_s = self.gpu.memory_bytes_per_s.value * self.overheads.weight_bandwidth_share.value
        return _MS_PER_S * num_parameters(self.shape) * _BYTES_PER_NUMBER / bytes_per_s

    @property
    def compute_ms_per_token(self) -> float:
        """Time of the operations on one token: a multiplication and an addition per parameter."""
        per_s = self.gpu.fp16_operations_per_s.value * self.overheads.compute_share.value
        return _MS_PER_S * 2 * num_parameters(self.shape) / per_s

    def gpu_ms(self, batch_size: int, context_tokens: float) -> float:
        """The part of a step in which the GPU works."""
        kv_bytes = batch_size * context_tokens * kv_bytes_per_token(self.shape)
        kv_bytes_per_s = self.gpu.memory_bytes_per_s.value * self.overheads.kv_bandwidth_share.value
        compute_ms = batch_size * self.compute_ms_per_token
        return max(self.weights_ms, compute_ms) + _MS_PER_S * kv_bytes / kv_bytes_per_s

    def step_ms(self, batch_size: int, context_tokens: float) -> float:
        """One token for each request of a batch, each with `context_tokens` before it."""
        host_ms = self.overheads.host_ms.value
        host_ms += self.overheads.host_ms_per_layer.value * self.shape.num_hidden_layers
        host_ms += self.overheads.host_ms_per_request.value * batch_size
        return self.gpu_ms(batch_size, context_tokens) + host_ms

    def prefill_ms(self, num_prompt_tokens: int) -> float:
        """To the first token: a step, and the operations on the prompt.

        Their sum, not the larger of the two, as the published fit on an A100 has it.
        """
        return self.step_ms(1, 0.0) + num_prompt_tokens * self.compute_ms_per_token

    def busy_share(self, context_tokens: float) -> float:
        """The part of a step's time in which the GPU works, at the batch size of interference."""
        batch_size = INTERFERENCE_BATCH_SIZE
        return self.gpu_ms(batch_size, context_tokens) / self.step_ms(batch_size, context_tokens)


def slowdown(model: Roofline, others: Sequence[Roofline], context_tokens: float) -> float:
    """How much longer a step takes while all of `others` are busy on the same GPU.

    Whenever this model wants the GPU, each other one wants it too for its own busy share of the time;
    if they took turns at every kernel (`time_slicing` = 1), they would lengthen this one's work on the
    GPU, and not that of its host, by these shares. Independent of how long the batches are.
    """
    shares = sum(other.busy_share(context_tokens) for other in others)
    return 1.0 + model.overheads.time_slicing.value * model.busy_share(context_tokens) * shares


def gpu_named(name: str) -> Gpu:
    """One of `GPUS`.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in GPUS:
        raise UsageError(f"--gpu {name}: no known GPU; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def shape_of(model: Model) -> Architecture:
    """As the fleet gives it, or from the table of OPT's shapes.

    Raises:
        FleetError: neither knows it.
    """
    if model.architecture is not None:
        return model.architecture
    if model.path is None or model.path not in OPT_SHAPES:
        raise FleetError(
            f"model {model.name!r}: the shape of {model.path or 'a server at a URL'} is not known; "
            f"give an architecture, or a path among {', '.join(OPT_SHAPES)}"
        )
    return OPT_SHAPES[model.path]


def mean_context_tokens(fleet: Fleet) -> float:
    """Tokens before the present one, averaged over the time in which requests run.

    A request with a long output runs for longer, so it counts by its length.
    """
    num_tokens, total = 0.0, 0.0
    for task, share in zip(fleet.tasks, fleet.task_shares, strict=True):
        low, high = task.num_output_tokens
        output = (low + high) / 2
        output_squared = output**2 + ((high - low + 1) ** 2 - 1) / 12
        num_tokens += share * output
        total += share * (output * sum(task.num_prompt_tokens) / 2 + output_squared / 2)
    return total / num_tokens


def model_samples(fleet: Fleet, gpu: Gpu) -> list[Sample]:
    """A whole profile, every row of which says that it is modelled.

    Raises:
        FleetError: the shape of a model is not known.
    """
    context_tokens = mean_context_tokens(fleet)
    models = {model.name: Roofline(gpu, shape_of(model)) for model in fleet.models}
    samples = []
    for model in fleet.models:
        own = models[model.name]
        for batch_size in BATCH_SIZES:
            if batch_size <= max(model.max_num_seqs, INTERFERENCE_BATCH_SIZE):
                step_ms = own.step_ms(batch_size, context_tokens)
                samples.append(_sample("decode", model.name, batch_size, context_tokens, step_ms))
        for length in PROMPT_LENGTHS:
            samples.append(_sample("prefill", model.name, 1, length, own.prefill_ms(length)))
    return [*samples, *_interference(models, context_tokens)]


def _interference(models: Mapping[str, Roofline], context_tokens: float) -> Iterator[Sample]:
    """Every model beside every set of others."""
    batch_size = INTERFERENCE_BATCH_SIZE
    for name, own in models.items():
        others = [other for other in models if other != name]
        for busy in (group for n in range(len(others)) for group in combinations(others, n + 1)):
            slow = slowdown(own, [models[other] for other in busy], context_tokens)
            mean_ms = slow * own.step_ms(batch_size, context_tokens)
            yield _sample("interference", name, batch_size, context_tokens, mean_ms, busy)


def _sample(
    kind: Literal["decode", "prefill", "interference"],
    model: str,
    batch_size: int,
    num_prompt_tokens: float,
    mean_ms: float,
    busy_models: tuple[str, ...] = (),
) -> Sample:
    """Without spread; of decode and interference, `num_prompt_tokens` is the whole context."""
    return Sample(
        kind=kind,
        model=model,
        batch_size=batch_size,
        num_prompt_tokens=round(num_prompt_tokens),
        busy_models=busy_models,
        mean_ms=mean_ms,
        std_ms=0.0,
        p50_ms=mean_ms,
        p95_ms=mean_ms,
        num_measurements=0,
        source="modelled",
    )


def facts_of(fleet: Fleet, gpu: Gpu) -> dict[str, Any]:
    """For a file's provenance: every constant with its source."""
    return {
        "constants": {**asdict(gpu), **asdict(OVERHEADS)},
        "num_parameters": {model.name: num_parameters(shape_of(model)) for model in fleet.models},
        "shapes": "fleet.toml, or Zhang et al., OPT (2022), Table 1",
        "lengths and limits": "fleet.toml, which says what is calibrated",
        "mean_context_tokens": mean_context_tokens(fleet),
    }
