"""`profile --model-only`: a profile from public facts, for hardware that is not at hand."""

from pathlib import Path

from besteffort.artifacts import files
from besteffort.artifacts.profile_file import save_samples
from besteffort.errors import UsageError
from besteffort.fleet import load_fleet
from besteffort.latency import fit_latency
from besteffort.profiling.verdict import suggest_deadlines
from besteffort.progress import Progress
from besteffort.roofline import facts_of, gpu_named, model_samples

MODELS_OF_HARDWARE = ("roofline",)


def model_profile(
    fleet_dir: Path,
    *,
    output: Path,
    hardware_model: str,
    gpu_name: str,
    suggest_deadline: bool = False,
    progress: Progress,
) -> None:
    """Write `output`, every row of which says that it is modelled.

    Raises:
        FleetError: the fleet is missing or malformed, or the shape of one of its models is not known.
        UsageError: no such model of hardware, no such GPU, or a fleet without GPUs.
    """
    if hardware_model not in MODELS_OF_HARDWARE:
        raise UsageError(
            f"--model-only {hardware_model}: no such model of hardware; "
            f"choose one of {', '.join(MODELS_OF_HARDWARE)}"
        )
    gpu = gpu_named(gpu_name)
    fleet = load_fleet(fleet_dir)
    if fleet.num_gpus == 0:
        raise UsageError(f"fleet {fleet.name!r} has no GPU to model: measure it, or give it num_gpus")
    samples = model_samples(fleet, gpu)
    facts = {
        "stage": "profile",
        "source": "modelled",
        "hardware_model": hardware_model,
        "gpu": gpu_name,
        "fleet": fleet.name,
        "fleet_sha256": files.sha256(fleet_dir / "fleet.toml"),
        **facts_of(fleet, gpu),
    }
    save_samples(output, samples, facts)
    progress.say(f"wrote {output}: {len(samples)} samples, modelled for {gpu_name}; nothing was measured")
    if suggest_deadline:
        latency = fit_latency(samples, fleet.model_names)
        for line in suggest_deadlines(fleet, latency).lines:
            progress.say(line)
