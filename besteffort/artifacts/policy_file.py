"""`policy.safetensors`: Q-network weights, and in the metadata all that tells a mismatch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from besteffort.artifacts import files
from besteffort.errors import PolicyError
from besteffort.fleet import Fleet
from besteffort.observation import Encoding, FleetEncoding, encoding_from_dict
from besteffort.q_network import QNetwork

VERSION = 2  # 1: the paper's state was the only encoding
_MEND = "train it for this fleet with `besteffort train FLEET_DIR`, or name another with --policy"


@dataclass(frozen=True)
class TrainedPolicy:
    network: QNetwork
    encoding: Encoding | FleetEncoding
    facts: Mapping[str, Any]  # provenance: hashes of its inputs, the recipe, the seed, the result


def contract(fleet: Fleet) -> dict[str, Any]:
    """What a policy was trained for; it serves no fleet in which any of this differs."""
    return {
        "fleet": fleet.name,
        "models": list(fleet.model_names),
        "tasks": list(fleet.task_names),
        "deadlines_ms_per_token": [task.deadline_ms_per_token for task in fleet.tasks],
        "deadline_kind": fleet.deadline_kind,
    }


def save_policy(path: Path, policy: TrainedPolicy, fleet: Fleet) -> None:
    tensors = {}
    for layer, (weight, bias) in enumerate(zip(policy.network.weights, policy.network.biases, strict=True)):
        tensors[f"layers.{layer}.weight"] = weight
        tensors[f"layers.{layer}.bias"] = bias
    metadata = {
        "kind": "besteffort policy",
        "schema_version": str(VERSION),
        "contract": json.dumps(contract(fleet)),
        "encoding": json.dumps(policy.encoding.to_dict()),
        "provenance": json.dumps(dict(policy.facts)),
    }
    files.write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_policy(path: Path, fleet: Fleet, *, mend: str = _MEND) -> TrainedPolicy:
    """Read a policy and check that it was trained for this fleet; messages end with `mend`.

    Raises:
        PolicyError: it is missing or malformed, of an unknown version, or for another fleet.
    """
    metadata, tensors = _read(path, mend)
    if metadata.get("schema_version") != str(VERSION):
        raise PolicyError(
            f"{path}: schema version {metadata.get('schema_version')!r} is unknown; this "
            f"besteffort reads version {VERSION}; {mend}"
        )
    try:
        trained_for = json.loads(metadata["contract"])
        encoding = encoding_from_dict(json.loads(metadata["encoding"]))
        facts = json.loads(metadata["provenance"])
        network = _network(tensors)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PolicyError(f"{path}: damaged: {error}; {mend}") from None
    _check_contract(path, trained_for, contract(fleet), mend)
    expected = (encoding.size, len(fleet.models))
    if (network.num_inputs, network.num_outputs) != expected:
        raise PolicyError(
            f"{path}: its network maps {network.num_inputs} inputs to {network.num_outputs} models, "
            f"this fleet needs {expected[0]} to {expected[1]}; {mend}"
        )
    return TrainedPolicy(network, encoding, facts)


def _read(path: Path, mend: str) -> tuple[dict[str, str], dict[str, Any]]:
    if not path.is_file():
        raise PolicyError(f"{path}: no such file; {mend}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != "besteffort policy":
                raise PolicyError(f"{path}: a safetensors file, but not a policy of besteffort; {mend}")
            for name in file.keys():  # noqa: SIM118
                dtype = file.get_slice(name).get_dtype()
                if dtype != "F32":  # of which numpy may know nothing
                    raise PolicyError(f"{path}: damaged: {name} is of {dtype}, not F32 (float32); {mend}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{path}: not a safetensors file ({error}); {mend}") from None


def _network(tensors: Mapping[str, Any]) -> QNetwork:
    """Raises ValueError: a tensor is missing, too many, or does not fit."""
    num_layers = max(1, sum(name.endswith(".weight") for name in tensors))
    pairs = [(f"layers.{layer}.weight", f"layers.{layer}.bias") for layer in range(num_layers)]
    names = [name for pair in pairs for name in pair]
    for name in names:
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
    for name in tensors:
        if name not in names:
            raise ValueError(f"the tensor {name} is no part of a network of {num_layers} layers")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} holds what is no number")
    num_given = None  # by the layer before
    for weight, bias in pairs:
        _check_shape(weight, tensors[weight], (num_given, None))
        num_given = tensors[weight].shape[1]
        _check_shape(bias, tensors[bias], (num_given,))
    return QNetwork(
        weights=tuple(tensors[weight] for weight, _ in pairs),
        biases=tuple(tensors[bias] for _, bias in pairs),
    )


def _check_shape(name: str, tensor: NDArray[Any], wanted: tuple[int | None, ...]) -> None:
    """None: any size."""
    found = [None if size is None else given for given, size in zip(tensor.shape, wanted, strict=False)]
    if tensor.ndim != len(wanted) or found != list(wanted):
        shape = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ValueError(f"{name} is of shape {tensor.shape}, and here only ({shape}) would fit")


def _check_contract(path: Path, trained_for: Mapping[str, Any], needed: Mapping[str, Any], mend: str) -> None:
    for what, value in needed.items():
        if trained_for.get(what) != value:
            raise PolicyError(
                f"{path}: trained for {what} = {trained_for.get(what)}, but this fleet has {value}; {mend}"
            )
