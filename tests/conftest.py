"""What several test modules share: small fleets in memory, and one real fleet on vLLM for all."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from besteffort.engines.child import free_port
from besteffort.engines.running import Engines, running_engines
from besteffort.fleet import Fleet, load_fleet
from besteffort.progress import Silent
from tests.fake_engine import wait_for

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
STREAM_INTERVAL = '"--stream-interval", "8",'  # among the engines' arguments of the shipped fleet


@dataclass(frozen=True)
class TinyEngines:
    """The shipped fleet `tiny-opt-cpu`, running, in a folder of the tests' own."""

    fleet_dir: Path
    fleet: Fleet
    engines: Engines

    @property
    def urls(self) -> dict[str, list[str]]:
        return {
            name: [engine.url for engine in of_model]
            for name, of_model in zip(self.fleet.model_names, self.engines, strict=True)
        }

    @property
    def engine_options(self) -> list[str]:
        """As the command line takes them."""
        return [
            word for name, urls in self.urls.items() for url in urls for word in ("--engine", f"{name}={url}")
        ]


@pytest.fixture(scope="session")
def tiny_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngines]:
    """Three real vLLM servers, started once for the whole run, with an event for each token, as is usual."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    fleet_dir = tmp_path_factory.mktemp("artifacts") / "tiny-opt-cpu"
    fleet_dir.mkdir()
    shipped = (ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml").read_text(encoding="utf-8")
    assert shipped.count(STREAM_INTERVAL) == 1
    (fleet_dir / "fleet.toml").write_text(shipped.replace(STREAM_INTERVAL, ""), encoding="utf-8")
    fleet = load_fleet(fleet_dir)
    with running_engines(fleet, fleet_dir, {}, Silent()) as engines:
        yield TinyEngines(fleet_dir, fleet, engines)


@contextmanager
def serving(tiny_engines: TinyEngines, policy: str = "round-robin") -> Iterator[str]:
    """`besteffort serve` as its own process, attached to the engines that run; ends by SIGTERM."""
    port = free_port()
    words = ("serve", tiny_engines.fleet_dir, "--policy", policy, "--port", port)
    command = [sys.executable, "-m", "besteffort", *map(str, words), *tiny_engines.engine_options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert f"http://127.0.0.1:{port}/v1" in process.stderr.readline()
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(url))
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0


def answers(url: str) -> bool:
    """Whether a router serves there; while its engines start it says 503."""
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            client.models.list()
        return True
    except (openai.APIConnectionError, openai.InternalServerError):
        return False


@pytest.fixture(scope="module")
def routed(tiny_engines: TinyEngines) -> Iterator[str]:
    """Its URL: one router for all tests of a file."""
    with serving(tiny_engines) as url:
        yield url


@pytest.fixture(scope="session")
def fleet() -> Fleet:
    """Two models and two tasks; nobody starts it."""
    return Fleet.model_validate(
        {
            "schema_version": 1,
            "name": "pair",
            "models": [
                {"name": "small", "path": "small", "replicas": 2},
                {"name": "large", "path": "large"},
            ],
            "tasks": [
                {"name": "copa", "deadline_ms_per_token": 40, "lm_eval_task": "copa"},
                {"name": "piqa", "deadline_ms_per_token": 80, "lm_eval_task": "piqa"},
            ],
        }
    )


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mounted = ["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small file system")
    yield tmp_path
    subprocess.run(["/bin/umount", str(tmp_path)], check=True)
