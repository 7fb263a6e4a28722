"""A fleet: the models, the tasks and the hardware they share, as `fleet.toml` states them."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from besteffort.errors import FleetError
from besteffort.http_url import is_http_url

# Clients that give it as their model leave the choice to the policy.
RESERVED_NAME = "besteffort"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
# Inclusive bounds of a uniform draw, in tokens.
TokenRange = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Architecture(_Table):
    """The shape of an OPT network served with random weights: its speed is real, its answers are not."""

    hidden_size: int = Field(ge=16)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    ffn_dim: int = Field(ge=16)
    vocab_size: int = Field(default=4096, ge=512)

    @model_validator(mode="after")
    def _heads_divide_the_hidden_size(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        return self


class Model(_Table):
    """One model size. Exactly one of `architecture`, `path` and `urls` says where it comes from."""

    name: Name
    architecture: Architecture | None = None
    path: str | None = None  # a local folder or a hub name, handed to vLLM as it is
    urls: tuple[str, ...] | None = None  # servers that already run, one per replica
    tokenizer: str | None = None  # beside urls: a local folder or a hub name, for `score`
    replicas: int = Field(default=1, ge=1)
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    max_num_seqs: int = Field(default=64, ge=1)  # vLLM's limit of requests running at once
    kv_cache_tokens: int | None = Field(default=None, ge=1)  # that the cache of one replica holds
    stands_for: str | None = None  # read another fleet's rewards under this model's name

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [k for k in ("architecture", "path", "urls") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of architecture, path and urls (given: {', '.join(given) or 'none'})"
            )
        if self.tokenizer is not None and self.urls is None:
            raise ValueError("tokenizer goes only with urls: other models bring their own; remove it")
        wrong = [url for url in self.urls or () if not is_http_url(url)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no URL; give one such as http://127.0.0.1:8001")
        if self.name == RESERVED_NAME:
            raise ValueError(f"{RESERVED_NAME!r} is the router's own name: give the model another")
        if self.urls is not None and len(self.urls) != self.replicas:
            raise ValueError(f"{len(self.urls)} urls for {self.replicas} replicas: make them equal")
        return self


class Task(_Table):
    """One kind of request, and what is promised to it."""

    name: Name
    deadline_ms_per_token: float = Field(gt=0)
    lm_eval_task: str
    metric: str = "acc"
    weight: float = Field(default=1.0, gt=0)  # of its reward, e.g. for paying users (paper, Sec. 5)
    share: float = Field(default=1.0, ge=0)  # of the arrivals, relative to the other tasks
    num_prompt_tokens: TokenRange = (16, 64)
    num_output_tokens: TokenRange = (8, 32)

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for low, high in (self.num_prompt_tokens, self.num_output_tokens):
            if low > high:
                raise ValueError(f"a range of tokens must rise, not [{low}, {high}]")
        return self


class EngineFlags(_Table):
    """How the vLLM servers of this fleet are started, beside what `besteffort` sets itself."""

    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    max_model_len: int = Field(default=2048, ge=16)
    start_timeout_s: float = Field(default=300.0, gt=0)


class Fleet(_Table):
    """Models from the smallest to the largest, tasks in the order of `reward_matrix`."""

    schema_version: Literal[1]
    name: Name
    models: tuple[Model, ...] = Field(min_length=1, max_length=10)
    tasks: tuple[Task, ...] = Field(min_length=1)
    deadline_kind: Literal["hard", "soft"] = "hard"
    num_gpus: int = Field(default=0, ge=0)  # 0: the models share the CPU
    rate_scale: float = Field(default=1.0, gt=0)  # the paper's rates, times this, suit the hardware
    engine: EngineFlags = EngineFlags()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for what, names in (("model", self.model_names), ("task", self.task_names)):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"duplicate {what} {twice[0]!r}: give each {what} its own name")
        if not sum(task.share for task in self.tasks) > 0:
            raise ValueError("every task has share = 0: give at least one a share of the arrivals")
        for model in self.models:
            if model.kv_cache_tokens is not None and model.kv_cache_tokens < self.engine.max_model_len:
                raise ValueError(
                    f"model {model.name!r} has kv_cache_tokens = {model.kv_cache_tokens}, less than "
                    f"engine.max_model_len = {self.engine.max_model_len}: vLLM would not start; lower that"
                )
        for task in self.tasks:
            longest = task.num_prompt_tokens[1] + task.num_output_tokens[1]
            if longest > self.engine.max_model_len:
                raise ValueError(
                    f"task {task.name!r} may need {longest} tokens, more than "
                    f"engine.max_model_len = {self.engine.max_model_len}: shorten it or raise the limit"
                )
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def task_shares(self) -> tuple[float, ...]:
        """The part of the arrivals that each task makes up; they sum to 1."""
        total = sum(task.share for task in self.tasks)
        return tuple(task.share / total for task in self.tasks)

    @property
    def request_life_s(self) -> float:
        """How long the longest request may take that just makes its deadline."""
        return max(task.deadline_ms_per_token * task.num_output_tokens[1] for task in self.tasks) / 1000.0

    @property
    def num_devices(self) -> int:
        """The GPUs, or the one CPU."""
        return max(1, self.num_gpus)

    def device_of(self, replica: int) -> int:
        """Replicas of every model are dealt over the devices in turn (paper, Sec. 4.2)."""
        return replica % self.num_devices


def load_fleet(fleet_dir: Path) -> Fleet:
    """Read `fleet_dir/fleet.toml`.

    Raises:
        FleetError: it is missing, not TOML, or does not hold together.
    """
    path = fleet_dir / "fleet.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FleetError(
            f"{path}: no such file; FLEET_DIR must be a directory with a fleet.toml, "
            "such as artifacts/tiny-opt-cpu"
        ) from None
    except OSError as error:
        raise FleetError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}: not valid TOML: {error}") from None
    try:
        return Fleet.model_validate(table)
    except ValidationError as error:
        raise FleetError(f"{path}: {_first_problem(error)}") from None


def _first_problem(error: ValidationError) -> str:
    """One line about the first of pydantic's findings: where it is, what is wrong, what was given."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what = "unknown key; remove it or mend its spelling"
    elif first["type"] not in ("missing", "value_error"):
        what = f"{what} (it is {first['input']!r})"
    elif first["type"] == "missing":
        what = "this key is missing; add it"
    return f"{where}: {what}" if where else what
