"""Every stage on real vLLM servers, with real clients: what a person would do, in order.

The stages share one fleet and one folder; a later test uses what an earlier one made.
"""

import contextlib
import http.client
import importlib.util
import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import psutil
import pytest

from besteffort.artifacts.profile_file import load_latency, load_samples
from besteffort.engines.child import free_port
from besteffort.fleet import load_fleet
from besteffort.profiling import plan_runs
from besteffort.profiling.origin import vllm_version
from tests.conftest import ROOT, SHARED_DATA, TinyEngines, answers, serving
from tests.fake_engine import wait_for
from tests.test_cli import TABLE_1, run

pytestmark = pytest.mark.vllm

AZURE = SHARED_DATA / "traces" / "AzureLLMInferenceTrace_code.csv"


def test_a_profile_killed_half_way_goes_on_where_it_stopped(tiny_engines: TinyEngines) -> None:
    words = ("profile", tiny_engines.fleet_dir, "--budget", "30s", *tiny_engines.engine_options)
    partial = tiny_engines.fleet_dir / "profile.partial.parquet"
    with subprocess.Popen(
        [sys.executable, "-m", "besteffort", *map(str, words)], stderr=subprocess.DEVNULL
    ) as first:
        wait_for(lambda: partial.exists() and len(load_samples(partial)[0]) >= 5, timeout_s=120)
        first.kill()
    kept, _ = load_samples(partial)
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert f"going on after {len(kept)} samples" in done.stderr
    samples, facts = load_samples(tiny_engines.fleet_dir / "profile.parquet")
    assert [replace(sample, fitted_ms=None, scale=None) for sample in samples[: len(kept)]] == kept
    needed = [run for run in plan_runs(tiny_engines.fleet) if run.needed]
    # A prompt that joins a batch gives two samples: what the batch loses, and how long the prompt waits.
    assert len(samples) >= sum(len(run.models) * (1 + (run.kind == "stall")) for run in needed)
    assert facts["stage"] == "profile"
    assert facts["origin"]["vllm"] == vllm_version()
    assert not partial.exists()
    assert all(sample.fitted_ms is not None and sample.std_ms >= 0 for sample in samples)
    assert (tiny_engines.fleet_dir / "profile.png").exists()
    assert "opt-90m alone keeps" in done.stderr


def test_a_larger_model_takes_longer(tiny_engines: TinyEngines) -> None:
    """How much longer depends on what else the machine does; that there is an order does not."""
    latency = load_latency(tiny_engines.fleet_dir / "profile.parquet", tiny_engines.fleet)
    small, medium, large = latency.step_table_ms(8)[:, 8]
    assert small < medium < large


def test_the_simulator_and_vllm_serve_one_trace_by_the_same_policies_and_are_compared(
    tiny_engines: TinyEngines, tmp_path: Path
) -> None:
    """In short: how near they are depends on what else the machine does; `make fidelity` measures it."""
    fleet_dir, trace = tiny_engines.fleet_dir, tmp_path / "short.parquet"
    run("trace", "generate", "stable", fleet_dir, "-o", trace, "--seed", 2, "--rate", 6, "--duration", 12)
    policies = ("static:opt-3m", "static:opt-22m", "round-robin")
    words = [word for policy in policies for word in ("--policy", policy)]
    options = (*words, "--compare", "--rewards", TABLE_1, "--json", *tiny_engines.engine_options)
    done = run("replay", trace, fleet_dir, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["policies"] == list(policies)
    for pair in found["pairs"]:
        assert pair["vllm"]["answered"] == pair["simulated"]["answered"] > 0
        assert pair["vllm"]["selection"] == pair["simulated"]["selection"]
    # Who is worth more is not for the machine to decide where both are in time: by Table 1 it is the larger.
    simulated = [pair["simulated"]["performance"] for pair in found["pairs"]]
    assert simulated[0] < simulated[1]
    assert found["kendall_tau"] is not None


def test_the_first_300_requests_of_the_azure_code_trace_are_all_answered(
    tiny_engines: TinyEngines, tmp_path: Path
) -> None:
    if not AZURE.is_file():
        pytest.skip("the Azure trace is not at ../shared/data/traces")
    fleet_dir, trace = tiny_engines.fleet_dir, tmp_path / "azure.parquet"
    words = ("--format", "azure-llm", "--seed", 1, "--num-requests", 300, "--time-stretch", 0.4)
    imported = run("trace", "import", AZURE, fleet_dir, "-o", trace, *words)
    assert imported.returncode == 0, imported.stderr
    options = ("--policy", "greedy", "--rewards", TABLE_1, "--name", "azure", "--json")
    done = run("replay", trace, fleet_dir, *options, *tiny_engines.engine_options)
    assert done.returncode == 0, done.stderr
    summary = json.loads((fleet_dir / "replays" / "azure" / "summary.json").read_text())
    assert (summary["sent"], summary["answered"], summary["failed"]) == (300, 300, 0)
    assert summary["engine"] == json.loads(done.stdout)["engine"] == "vllm"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request_in_vllm(
    routed: str, tiny_engines: TinyEngines, stream: bool
) -> None:
    vllm, num_tokens = tiny_engines.urls["opt-90m"][0], 480  # which take it 8 s at least
    generated = _figure(vllm, "vllm:generation_tokens_total")
    body = {"model": "opt-90m", "prompt": "x", "max_tokens": num_tokens, "ignore_eos": True, "stream": stream}
    with contextlib.closing(http.client.HTTPConnection(urlsplit(routed).netloc, timeout=60)) as client:
        client.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        wait_for(lambda: _figure(vllm, "vllm:num_requests_running") == 1, timeout_s=60)
    wait_for(lambda: _figure(vllm, "vllm:num_requests_running") == 0, timeout_s=60)
    assert _figure(vllm, "vllm:generation_tokens_total") - generated < num_tokens / 2


def _figure(url: str, name: str) -> float:
    with openai.OpenAI(base_url=url, api_key="none") as client:
        lines = client.get("/metrics", cast_to=str).splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])


@pytest.fixture
def lone_fleet_dir(tmp_path: Path) -> Path:
    """A fleet of the smallest model alone: it starts in half the time."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: run `make setup`")
    fleet_dir = tmp_path / "lone"
    fleet_dir.mkdir()
    toml = (ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml").read_text()
    head, first, *_, tail = toml.split("[[models]]")
    tasks = tail[tail.index("[[tasks]]") :]
    (fleet_dir / "fleet.toml").write_text(f"{head}[[models]]{first}{tasks}")
    fleet = load_fleet(fleet_dir)
    assert fleet.model_names == ("opt-3m",)
    return fleet_dir


def _serve(fleet_dir: Path, port: int) -> list[str]:
    words = ("serve", fleet_dir, "--policy", "random", "--port", port)
    return [sys.executable, "-m", "besteffort", *map(str, words)]


def _starting(fleet_dir: Path, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(_serve(fleet_dir, port), stderr=subprocess.PIPE, text=True)


# The tether, the API server, its engine core and its resource tracker. From here on vLLM waits for the
# core, and would outlive a SIGTERM.
NUM_STARTING = 4


def _descendants(pid: int, at_least: int) -> list[psutil.Process]:
    wait_for(lambda: len(psutil.Process(pid).children(recursive=True)) >= at_least, 300)
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_serve_starts_its_engines_and_ctrl_c_or_sigterm_ends_everything(
    lone_fleet_dir: Path, told: signal.Signals
) -> None:
    port = free_port()
    with _starting(lone_fleet_dir, port) as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"), timeout_s=180)
        started = _descendants(process.pid, 1)
        process.send_signal(told)
        assert process.wait(40) == 0
    gone, alive = psutil.wait_procs(started, timeout=5)
    assert gone
    assert not alive


def test_sigterm_while_vllm_starts_leaves_nothing_behind(lone_fleet_dir: Path) -> None:
    with _starting(lone_fleet_dir, free_port()) as process:
        started = _descendants(process.pid, NUM_STARTING)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "interrupted; what was started here has been stopped" in said
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def test_a_terminal_that_is_closed_while_vllm_starts_leaves_nothing_behind(lone_fleet_dir: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, _serve(lone_fleet_dir, free_port()))  # noqa: S606
    os.set_blocking(terminal, False)

    def is_shown_to_start() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(terminal, 65_536)  # or it would be full, and whoever draws on it stuck
        return len(psutil.Process(pid).children(recursive=True)) >= NUM_STARTING

    wait_for(is_shown_to_start, 300)
    started = _descendants(pid, NUM_STARTING)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.WIFEXITED(status), "it ended by itself, and not by the signal"
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive


def test_sigterm_with_a_stream_open_ends_the_router_in_order(
    tiny_engines: TinyEngines,
) -> None:
    with serving(tiny_engines, "static:opt-90m") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        asked = {"model": "besteffort", "prompt": "x", "max_tokens": 480, "stream": True}
        stream = iter(client.completions.create(**asked))
        next(stream)
    # The router has ended, with status 0, as `router` asserts; the stream ended with it or before.
    with contextlib.suppress(openai.APIError, httpx.HTTPError):
        list(stream)
    client.close()


def test_kill_9_of_serve_leaves_no_engine_behind(lone_fleet_dir: Path) -> None:
    port = free_port()
    with _starting(lone_fleet_dir, port) as process:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}"), timeout_s=180)
        started = _descendants(process.pid, 1)
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=90)
    assert not alive


def test_kill_9_of_serve_while_vllm_starts_leaves_nothing_behind(lone_fleet_dir: Path) -> None:
    with _starting(lone_fleet_dir, free_port()) as process:
        started = _descendants(process.pid, NUM_STARTING)
        process.kill()
    _, alive = psutil.wait_procs(started, timeout=90)
    assert not alive


def test_a_vllm_server_that_dies_at_its_start_shows_the_end_of_its_log(lone_fleet_dir: Path) -> None:
    path = lone_fleet_dir / "fleet.toml"
    path.write_text(path.read_text().replace('"--enforce-eager"', '"--no-such-flag"'))
    done = run("serve", lone_fleet_dir, "--policy", "random", "--port", 0)
    assert done.returncode == 1
    assert "vLLM of opt-3m died with exit status 2" in done.stderr
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    assert "Traceback" not in done.stderr.partition("besteffort: ")[0]


def test_a_replay_that_is_interrupted_reports_what_was_answered(
    tiny_engines: TinyEngines, tmp_path: Path
) -> None:
    trace = tmp_path / "calm.parquet"
    run("trace", "generate", "stable", tiny_engines.fleet_dir, "-o", trace, "--seed", 1, "--rate", 10)
    words = ("replay", trace, tiny_engines.fleet_dir, "--policy", "static:opt-3m", "--name", "cut")
    command = [sys.executable, "-m", "besteffort", *map(str, words), "--rewards", str(TABLE_1)]
    env = {**os.environ, "COLUMNS": "200"}
    with subprocess.Popen(
        [*command, *tiny_engines.engine_options], stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        time.sleep(12)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "what was answered so far is in" in stderr
    summary = json.loads((tiny_engines.fleet_dir / "replays" / "cut" / "summary.json").read_text())
    assert summary["provenance"]["interrupted"] is True
    # Of 400 or so in 40 s, those of the first seconds, whether or not they were answered in time.
    assert 0 < summary["answered"] <= summary["sent"] < 300
