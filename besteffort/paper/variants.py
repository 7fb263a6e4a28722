"""The fleets of the paper's experiments, made from one: other deadlines, other tasks, more GPUs."""

import json
from collections.abc import Collection
from typing import Any

from besteffort.errors import UsageError
from besteffort.fleet import Fleet, Task
from besteffort.paper import published

# The policies that the experiments need: a policy is bound to the deadlines it was trained for.
HARD, SOFT, DEADLINES = "hard", "soft", "deadlines"


def check_tasks(fleet: Fleet) -> None:
    """Raises:
    UsageError: the fleet's tasks are not the paper's.
    """
    if set(fleet.task_names) != set(published.TASKS) or len(fleet.models) < 2:
        raise UsageError(
            f"fleet {fleet.name!r}: the paper's experiments need two models or more and exactly the tasks "
            f"{', '.join(published.TASKS)}, and it has {', '.join(fleet.task_names)}: choose another fleet"
        )


def variants(fleet: Fleet) -> dict[str, Fleet]:
    """By the name of the policy that serves it."""
    return {
        HARD: fleet.model_copy(update={"deadline_kind": "hard"}),
        SOFT: fleet.model_copy(update={"deadline_kind": "soft"}),
        DEADLINES: _with_tasks(
            fleet.model_copy(update={"deadline_kind": "hard"}),
            [_loosened(task) for task in fleet.tasks],
        ),
    }


def _loosened(task: Task) -> Task:
    deadline = task.deadline_ms_per_token * published.LOOSER.get(task.name, 1.0)
    return task.model_copy(update={"deadline_ms_per_token": deadline})


def with_only(fleet: Fleet, names: Collection[str]) -> Fleet:
    """Requests come of these tasks alone, evenly; a policy does not notice (App. E)."""
    return _with_tasks(
        fleet, [task.model_copy(update={"share": float(task.name in names)}) for task in fleet.tasks]
    )


def _with_tasks(fleet: Fleet, tasks: list[Task]) -> Fleet:
    return fleet.model_copy(update={"tasks": tuple(tasks)})


def doubled(fleet: Fleet) -> Fleet:
    """Twice the GPUs and twice the replicas (App. F). A model that nobody uses takes no time there."""
    models = [model.model_copy(update={"replicas": 2 * model.replicas}) for model in fleet.models]
    return fleet.model_copy(update={"num_gpus": 2 * fleet.num_devices, "models": tuple(models)})


def as_toml(fleet: Fleet) -> str:
    """A `fleet.toml` of the fleet, for the stages that read one."""
    table = fleet.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {_literal(value)}\n" for key, value in table.items())


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return json.dumps(value)
