"""`profile --on-this-gpu`: a fleet directory of its own for what is measured on the GPU that is here."""

import re
from pathlib import Path

from besteffort.artifacts import files
from besteffort.engines.gpus import gpu_names
from besteffort.errors import UsageError
from besteffort.fleet import load_fleet
from besteffort.progress import Progress


def gpu_fleet(fleet_dir: Path, progress: Progress) -> Path:
    """A directory beside `fleet_dir` with the same fleet.toml under the GPU's name, such as `h100-80gb-opt`.

    Raises:
        FleetError: the fleet is missing or malformed.
        UsageError: no NVIDIA GPU is here, or the fleet uses none.
    """
    fleet = load_fleet(fleet_dir)
    if fleet.num_gpus == 0:
        raise UsageError(f"--on-this-gpu: fleet {fleet.name!r} runs on the CPU; try artifacts/one-gpu-opt")
    names = gpu_names()
    if not names:
        raise UsageError("--on-this-gpu: nvidia-smi finds no GPU here; run this on a machine with one")
    folder = fleet_dir.parent / f"{_slug(names[0])}-{fleet.name.rpartition('-')[2]}"
    text = (fleet_dir / "fleet.toml").read_text(encoding="utf-8")
    renamed = re.sub(r'(?m)^name = ".*"$', f'name = "{folder.name}"', text, count=1)
    path = folder / "fleet.toml"
    if not path.exists():
        files.write_text(path, renamed)
    progress.say(f"{names[0]}: measuring into {folder}")
    load_fleet(folder)
    return folder


def _slug(gpu: str) -> str:
    """`NVIDIA H100 80GB HBM3, 81559 MiB` as `h100-80gb-hbm3`."""
    name = gpu.partition(",")[0].lower().removeprefix("nvidia").removeprefix(" geforce")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")
