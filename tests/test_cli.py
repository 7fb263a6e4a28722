"""The command line as users meet it: a process, its exit status, and what it prints where."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from besteffort.artifacts.profile_file import save_samples
from besteffort.latency import Sample
from tests.conftest import ROOT

TITAN = ROOT / "artifacts" / "titan-rtx-opt"
TABLE_1 = TITAN / "rewards.parquet"
NOBODY = "http://127.0.0.1:9"  # the discard port, where nobody answers
COMMANDS = ("profile", "score", "tune", "train", "serve", "replay", "demo", "doctor", "trace")


def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "besteffort", *map(str, words)]
    # Wide, so that no message is folded where a test looks for it.
    env = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, env=env, check=False)


def refused(*words: object, saying: str) -> None:
    """Exit status 2, and one clear line without a traceback."""
    done = run(*words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("besteffort: ")
    assert saying in last


@pytest.fixture(scope="module")
def fleet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped tiny fleet with a made-up profile: for all that needs no engine."""
    folder = tmp_path_factory.mktemp("artifacts") / "tiny-opt-cpu"
    folder.mkdir()
    shutil.copy(ROOT / "artifacts" / "tiny-opt-cpu" / "fleet.toml", folder)
    samples = []
    for model, step_ms, prefill_ms in (("opt-3m", 3.0, 0.05), ("opt-22m", 8.0, 0.2), ("opt-90m", 17.0, 1.0)):
        rest = {"std_ms": 0.0, "p50_ms": 1.0, "p95_ms": 1.0, "num_measurements": 1, "busy_models": ()}
        for batch in (1, 8, 32):
            samples.append(Sample("decode", model, batch, 16, mean_ms=step_ms * (1 + batch / 16), **rest))
        for length in (16, 256):
            mean_ms = step_ms + prefill_ms * length
            samples.append(Sample("prefill", model, 1, length, mean_ms=mean_ms, **rest))
    save_samples(folder / "profile.parquet", samples, {})
    return folder


@pytest.fixture(scope="module")
def trace(fleet_dir: Path) -> Path:
    path = fleet_dir / "trace.parquet"
    done = run("trace", "generate", "stable", fleet_dir, "-o", path, "--seed", 1, "--rate", 10)
    assert done.returncode == 0, done.stderr
    return path


def replay(trace: object, fleet_dir: object, *more: object) -> tuple[object, ...]:
    return ("replay", trace, fleet_dir, "--simulate", "--rewards", TABLE_1, "--policy", "greedy", *more)


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom besteffort.cli import main\nsys.argv = ['besteffort', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'vllm', 'numpy', 'numba', 'pyarrow', 'lm_eval', 'rich.console'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in COMMANDS:
        assert command in done.stdout
    assert done.stdout.splitlines()[-1] in ("[]", "['rich.console']")


@pytest.mark.parametrize(
    "command",
    [*((c,) for c in COMMANDS if c != "trace"), *(("trace", c) for c in ("generate", "import", "describe"))],
)
def test_every_command_has_help_with_an_example(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Example:" in done.stdout
    assert f"besteffort {' '.join(command)}" in done.stdout


def test_a_simulated_replay_prints_one_json_object_with_every_promised_figure(
    fleet_dir: Path, trace: Path
) -> None:
    done = run(*replay(trace, fleet_dir, "--json"))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["engine"] == "simulated"
    assert summary["policy"] == "greedy"
    assert summary["sent"] == summary["answered"] == summary["num_requests"] > 100
    assert set(summary["windows"]) == {"1.00", "0.99", "0.98", "0.96", "0.94"}
    assert set(summary["latency_ms_per_token"]) == {"p50", "p95", "p99"}
    assert sum(summary["selection"].values()) == pytest.approx(1)
    folder = fleet_dir / "replays" / "trace-greedy-simulated"
    assert {file.name for file in folder.iterdir()} == {"requests.parquet", "summary.json", "report.html"}


def test_hindsight_is_a_policy_of_simulated_replays_and_is_at_least_as_good_as_any_other(
    fleet_dir: Path, trace: Path
) -> None:
    done = run(*replay(trace, fleet_dir, "--json", "--policy", "hindsight", "--budget-s", 3))
    assert done.returncode == 0, done.stderr
    greedy = json.loads(run(*replay(trace, fleet_dir, "--json")).stdout)
    found = json.loads(done.stdout)
    assert found["policy"] == "hindsight"
    assert found["performance"] >= greedy["performance"]
    future = "it needs to know the future"
    words = ("--policy", "hindsight", "--rewards", TABLE_1)
    refused("serve", fleet_dir, "--port", 0, *words, saying=future)
    refused("replay", trace, fleet_dir, *words, saying=future)


def test_thresholds_that_nobody_has_tuned_are_told_with_the_mend(fleet_dir: Path, trace: Path) -> None:
    refused(*replay(trace, fleet_dir, "--policy", "thresholds"), saying="run `besteffort tune FLEET_DIR`")


def test_the_same_seed_gives_the_same_replay(fleet_dir: Path, trace: Path) -> None:
    words = replay(trace, fleet_dir, "--json", "--policy", "random", "--seed", 3)
    first, second = run(*words), run(*words)
    assert json.loads(first.stdout) == json.loads(second.stdout)


def test_a_replay_s_requests_can_be_replayed_as_a_trace(fleet_dir: Path, trace: Path) -> None:
    run(*replay(trace, fleet_dir, "--name", "once"))
    again = fleet_dir / "replays" / "once" / "requests.parquet"
    done = run(*replay(again, fleet_dir, "--json"))
    assert done.returncode == 0, done.stderr


def test_a_trained_policy_can_be_replayed_and_another_fleet_refuses_it(
    fleet_dir: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from besteffort import dqn
    from besteffort.progress import Silent
    from besteffort.stages.train import train

    short = dqn.Recipe(num_iterations=40, num_first_transitions=200, num_requests=100, evaluate_every=20)
    monkeypatch.setitem(dqn.RECIPES, "short", short)
    train(fleet_dir, recipe="short", seed=1, rewards=TABLE_1, force=True, progress=Silent())
    policy = fleet_dir / "policy.safetensors"
    done = run(*replay(trace, fleet_dir, "--policy", policy, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["policy"] == "trained:policy"
    other = tmp_path / "other"
    shutil.copytree(fleet_dir, other)
    toml = (other / "fleet.toml").read_text()
    (other / "fleet.toml").write_text(
        toml.replace("deadline_ms_per_token = 40", "deadline_ms_per_token = 41")
    )
    refused(*replay(trace, other, "--policy", policy), saying="trained for deadlines_ms_per_token")


@pytest.mark.parametrize(
    ("words", "saying"),
    [
        (("profile", "/nowhere"), "/nowhere/fleet.toml: no such file"),
        (("train", "FLEET"), "rewards.parquet: no such file"),
        (("train", "FLEET", "--recipe", "magic", "--rewards", TABLE_1), "'magic' is no recipe"),
        (("train", "FLEET", "--rewards", TABLE_1, "--init", "nope"), "name another policy of this fleet"),
        (("train", "FLEET", "--rewards", TABLE_1, "-o", "FLEET"), "this is a folder; name a file in it"),
        (("train", "FLEET", "--rewards", TABLE_1, "--task-mix", "odd"), "choose one of fleet, random"),
        (("train", "FLEET", "--rewards", TABLE_1, "--trace", "TRACE"), "training on a trace takes 1000"),
        (("train", "FLEET", "--rewards", TABLE_1, "--trace", "/nowhere.parquet"), "/nowhere.parquet"),
        (("serve", "FLEET", "--policy", "greedy"), "rewards.parquet: no such file"),
        (("serve", "FLEET", "--policy", "static:big"), "no model 'big'; its models are opt-3m"),
        (("serve", "FLEET", "--policy", "x.safetensors"), "x.safetensors: no such file"),
        (("serve", "FLEET", "--policy", "random", "--engine", "opt-3m"), "not MODEL=URL"),
        (("serve", "FLEET", "--policy", "random", "--port", 0, "--engine", "x=http://a"), "no model 'x'"),
        (("serve", "FLEET", "--policy", "random", "--engine", "opt-3m=http://bad:port:xx"), "not MODEL=URL"),
        (("serve", TITAN, "--policy", "random", "--port", 0), "needs 4 GPUs and this machine has"),
        (
            ("replay", "TRACE", "FLEET", "--policy", "random", "--rewards", TABLE_1, "--name", "../x"),
            "--name",
        ),
        (
            ("replay", "TRACE", "FLEET", "--url", "http://127.0.0.1:9", "--rewards", TABLE_1),
            "no besteffort router",
        ),
        (("replay", "/nowhere.parquet", "FLEET", "--policy", "greedy", "--simulate"), "/nowhere.parquet"),
        (("replay", "TRACE", "FLEET", "--rewards", TABLE_1), "--policy is missing"),
        (("replay", "TRACE", "FLEET", "--simulate", "--url", "http://a"), "exclude each other"),
        (("score", "FLEET", "--limit", 0), "--limit 0"),
        (("score", "FLEET", "--data-dir", "/nowhere"), "/nowhere"),
        (("trace", "generate", "wild", "FLEET", "-o", "x", "--seed", 1), "'wild' is no workload"),
    ],
)
def test_wrong_input_gets_one_clear_line_and_status_2(
    fleet_dir: Path, trace: Path, words: tuple[object, ...], saying: str
) -> None:
    real = {"FLEET": fleet_dir, "TRACE": trace}
    refused(*(real.get(str(word), word) for word in words), saying=saying)


@pytest.mark.parametrize(
    ("column", "values", "saying"),
    [
        ("task", None, "the column 'task' is missing"),
        ("arrived_at", [0.0, float("nan"), 2.0], "row 1"),
        ("arrived_at", [0.0, 5.0, 2.0], "sort it by arrived_at"),
        ("task", ["copa", "chess", "copa"], "'chess' is no task of fleet"),
        ("num_output_tokens", [4, 0, 4], "num_output_tokens is 0"),
        ("num_prompt_tokens", [4, 10_000, 4], "max_model_len"),
    ],
)
def test_a_trace_with_a_fault_is_refused_with_the_fault(
    fleet_dir: Path, tmp_path: Path, column: str, values: list[object] | None, saying: str
) -> None:
    columns: dict[str, object] = {
        "arrived_at": np.array([0.0, 1.0, 2.0]),
        "task": ["copa", "piqa", "copa"],
        "num_prompt_tokens": [4, 4, 4],
        "num_output_tokens": [4, 4, 4],
    }
    if values is None:
        del columns[column]
    else:
        columns[column] = values
    path = tmp_path / "faulty.parquet"
    pq.write_table(pa.table(columns), path)
    refused(*replay(path, fleet_dir), saying=saying)


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", b"arrived_at,task\n0,copa\n"])
def test_a_file_that_is_no_parquet_is_refused(fleet_dir: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trace.parquet"
    path.write_bytes(content)
    refused(*replay(path, fleet_dir), saying="not a readable Parquet file")


def test_a_fleet_with_a_duplicate_model_is_refused(fleet_dir: Path, trace: Path, tmp_path: Path) -> None:
    toml = (fleet_dir / "fleet.toml").read_text()
    (tmp_path / "fleet.toml").write_text(toml.replace('name = "opt-22m"', 'name = "opt-3m"'))
    refused(*replay(trace, tmp_path), saying="duplicate model 'opt-3m'")


def test_a_port_in_use_is_refused_before_any_engine_starts(fleet_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("serve", fleet_dir, "--policy", "random", "--port", port, saying=f"--port {port}")


def test_a_profile_of_other_models_is_refused(fleet_dir: Path, trace: Path, tmp_path: Path) -> None:
    shutil.copytree(fleet_dir, tmp_path / "f")
    toml = (tmp_path / "f" / "fleet.toml").read_text()
    (tmp_path / "f" / "fleet.toml").write_text(toml.replace('name = "opt-3m"', 'name = "opt-4m"'))
    refused(*replay(trace, tmp_path / "f"), saying="it profiles 'opt-3m'")


def test_a_place_that_cannot_be_written_is_told(fleet_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words = ("trace", "generate", "stable", fleet_dir, "-o", tmp_path / "file" / "t.parquet")
    refused(*words, "--seed", 1, "--rate", 5, saying="cannot be written")


def test_a_full_disk_is_told_in_one_line_and_leaves_no_half_file(full_disk: Path, fleet_dir: Path) -> None:
    words = ("trace", "generate", "unpredictable-1", fleet_dir, "-o", full_disk / "t.parquet", "--seed", 1)
    refused(*words, saying="No space left on device")
    assert list(full_disk.iterdir()) == []


def test_doctor_says_what_is_installed_and_what_would_run() -> None:
    done = run("doctor")
    assert done.returncode == 0
    for word in ("besteffort", "torch", "vllm", "lm-eval", "CPU", "memory", "make demo"):
        assert word in done.stdout


def test_wrong_usage_of_an_option_is_status_2() -> None:
    done = run("serve", "artifacts/tiny-opt-cpu")
    assert done.returncode == 2
    assert "--policy" in done.stderr
