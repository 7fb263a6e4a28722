"""Which task a request belongs to, and whether it insists on a model: read from header and body."""

from dataclasses import dataclass
from typing import Any

from besteffort.fleet import RESERVED_NAME, Fleet

TASK_HEADER = "x-besteffort-task"
PREFIX = RESERVED_NAME


@dataclass(frozen=True, slots=True)
class Address:
    task: int
    pinned: int | None  # a model asked for by its own name


class UnknownAddressError(Exception):
    """A task or a model that the fleet does not have; `param` is where the client said it."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def model_ids(fleet: Fleet) -> list[str]:
    """All that a client may give as `model`: routed, routed for a task, or one of the fleet's own."""
    return [PREFIX, *(f"{PREFIX}/{task}" for task in fleet.task_names), *fleet.model_names]


def read_address(fleet: Fleet, header: str | None, model: Any) -> Address:
    """The header goes before the model name; with neither, the fleet's first task is meant.

    Raises:
        UnknownAddressError: the header or the model name is none of those that the fleet has.
    """
    task, pinned = None, None
    if model in fleet.model_names:
        pinned = fleet.model_names.index(model)
    elif isinstance(model, str) and model.startswith(f"{PREFIX}/"):
        task = _task(fleet, model.removeprefix(f"{PREFIX}/"), "model")
    elif model is not None and model != PREFIX:
        raise UnknownAddressError(
            f"The model {model!r} does not exist; give one of {', '.join(model_ids(fleet))}", "model"
        )
    if header is not None:
        task = _task(fleet, header, TASK_HEADER)
    return Address(task=task or 0, pinned=pinned)


def _task(fleet: Fleet, name: str, param: str) -> int:
    if name not in fleet.task_names:
        raise UnknownAddressError(
            f"The task {name!r} does not exist; give one of {', '.join(fleet.task_names)}", param
        )
    return fleet.task_names.index(name)
