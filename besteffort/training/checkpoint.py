"""The file in which a training is kept, so that it goes on after an interruption."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from besteffort.artifacts.files import write_atomically

VERSION = 2
_KIND = "besteffort checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training is kept, and of what it is."""

    path: Path
    identity: Mapping[str, Any]  # recipe, seed, hashes of the inputs: another training is not continued

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Replace what was kept, whole or not at all.

        Raises:
            UsageError: the folder or the disk does not take it.
        """
        label = {"schema_version": VERSION, "identity": dict(self.identity), "facts": dict(facts)}
        metadata = {"kind": _KIND, "label": json.dumps(label, sort_keys=True)}
        write_atomically(self.path, lambda temporary: save_file(dict(tensors), temporary, metadata))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the same training; None if there are none, or none that can be read."""
        try:
            with safe_open(self.path, framework="pt") as file:
                label = json.loads((file.metadata() or {})["label"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        same = json.loads(json.dumps(dict(self.identity)))
        if (label.get("schema_version"), label.get("identity")) != (VERSION, same):
            return None
        return tensors, label["facts"]

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
