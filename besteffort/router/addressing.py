"""Which task a request belongs to, and whether it insists on a model: read from header and body."""

from dataclasses import dataclass
from typing import Any

from besteffort.fleet import RESERVED_NAME, Fleet

TASK_HEADER = "x-besteffort-task"
PREFIX = RESERVED_NAME
_MAX_SHOWN = 100  # characters of what a client gave


@dataclass(slots=True)  # not frozen, for speed; but requests share them
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


class Addresses:
    """Reads what a request says of itself."""

    def __init__(self, fleet: Fleet) -> None:
        self._tasks = {name: task for task, name in enumerate(fleet.task_names)}
        routed = {PREFIX: 0, **{f"{PREFIX}/{name}": task for name, task in self._tasks.items()}}
        self._by_model: dict[Any, Address] = {  # where no header names the task
            None: Address(0, None),
            **{name: Address(task, None) for name, task in routed.items()},
            **{name: Address(0, model) for model, name in enumerate(fleet.model_names)},
        }
        self._ids = model_ids(fleet)

    def read(self, header: str | None, model: Any) -> Address:
        """The header goes before the model name; with neither, the fleet's first task is meant.

        Raises:
            UnknownAddressError: the header or the model name is none of those that the fleet has.
        """
        found = self._by_model.get(model) if model is None or isinstance(model, str) else None
        if found is None:
            message = f"The model {_shown(model)} does not exist; give one of {', '.join(self._ids)}"
            raise UnknownAddressError(message, "model")
        if header is None:
            return found
        task = self._tasks.get(header)
        if task is None:
            message = f"The task {_shown(header)} does not exist; give one of {', '.join(self._tasks)}"
            raise UnknownAddressError(message, TASK_HEADER)
        return Address(task, found.pinned)


def _shown(given: Any) -> str:
    """Its beginning, where there is much of it."""
    text = repr(given[: _MAX_SHOWN + 1] if isinstance(given, str) else given)
    return text if len(text) <= _MAX_SHOWN + len("''") else f"{text[:_MAX_SHOWN]}..."
