"""One vLLM server per replica: its command line, its environment, its log."""

import importlib.util
import os
import sys
from pathlib import Path

from besteffort.engines.child import Child
from besteffort.engines.opt_model import write_model
from besteffort.errors import EngineError
from besteffort.fleet import Fleet, Model


def start_server(fleet: Fleet, fleet_dir: Path, model: Model, replica: int, port: int) -> Child:
    """Start one replica listening on 127.0.0.1:`port`; it is ready when `/health` answers.

    Raises:
        EngineError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EngineError(
            "vLLM is not installed; run `make setup`, or attach to servers that run elsewhere "
            "with --engine MODEL=URL"
        )
    log = fleet_dir / "logs" / f"{model.name}-{replica}-{os.getpid()}.log"
    command = _command(fleet, fleet_dir, model, port)
    return Child(f"vLLM of {model.name}", command, log, _environment(fleet, replica))


def model_path(fleet: Fleet, fleet_dir: Path, model: Model) -> str:
    """What vLLM's `--model` and `--tokenizer` take; makes the folder of an `architecture` if need be."""
    if model.architecture is None:
        return str(model.path)
    folder = fleet_dir / "models" / model.name
    write_model(folder, model.architecture, fleet.engine.max_model_len)
    return str(folder.resolve())


def _command(fleet: Fleet, fleet_dir: Path, model: Model, port: int) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model_path(fleet, fleet_dir, model)]
    command += ["--served-model-name", model.name]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(fleet.engine.max_model_len)]
    command += ["--max-num-seqs", str(model.max_num_seqs)]
    command += ["--disable-uvicorn-access-log"]
    if fleet.num_gpus:
        command += ["--gpu-memory-utilization", str(model.gpu_memory_share)]
    return command + list(fleet.engine.args)


def _environment(fleet: Fleet, replica: int) -> dict[str, str]:
    env = {"VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1", **fleet.engine.env}
    if fleet.num_gpus:
        env["CUDA_VISIBLE_DEVICES"] = str(fleet.device_of(replica))
    return env
