"""The GPUs of this machine."""

import shutil
import subprocess


def gpu_names() -> list[str]:
    """What `nvidia-smi` lists, with memory; empty where it is missing or finds none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return [line.strip() for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
