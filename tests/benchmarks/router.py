"""This router beside others, on this machine, in one run: what each adds to a request.

`make bench-router` runs it. Each router has one core to itself, with all its features on and, here, the
trained policy deciding; three engines that answer at once and the load share another core. Rounds are
interleaved, so that what else the machine does hits all alike, and medians count: read the ratios. Rust
routers come from PyPI into a throwaway environment, `.bench/`; nginx is measured where it is on the PATH,
in /usr/sbin, or under `.bench/usr/sbin`, and left out where it is not, which is said.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvloop

from besteffort.engines.child import free_port
from besteffort.fleet import Fleet, load_fleet
from besteffort.policies import Policy, load_named_policy
from tests.benchmarks.load import drive
from tests.benchmarks.processes import BENCH_DIR, ROOT, cpu_s, running

FLEET_DIR = ROOT / "artifacts" / "titan-rtx-opt"
POLICY = FLEET_DIR / "policies" / "hard.safetensors"
RUST_ROUTERS = ("vllm-router==0.1.17", "sglang-router==0.3.2")
REFERENCE = "vllm-router"
NUM_CONNECTIONS = 64


def load(fleet_dir: Path, policy: Path) -> tuple[Fleet, Policy]:
    fleet = load_fleet(fleet_dir)
    rng = np.random.default_rng(0)
    profile, rewards = fleet_dir / "profile.parquet", fleet_dir / "rewards.parquet"
    return fleet, load_named_policy(str(policy), fleet, profile=profile, rewards=rewards, rng=rng)


@dataclass
class Figures:
    """One per round: seconds, or requests a second."""

    per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)  # per request
    p50_s: list[float] = field(default_factory=list)
    p99_s: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    transit_s: list[float] = field(default_factory=list)
    num_failed: int = 0


@dataclass
class Contender:
    name: str
    ports: tuple[int, ...]
    pid: int | None  # None: no router at all, but the engines themselves
    figures: Figures = field(default_factory=Figures)


def _besteffort(port: int, urls: list[str], policy: str = str(POLICY)) -> list[str]:
    command = [sys.executable, "-m", "besteffort", "serve", str(FLEET_DIR), "--policy", policy]
    fleet = load_fleet(FLEET_DIR)
    for model, url in zip(fleet.models, urls, strict=True):
        command += ["--engine", f"{model.name}={url}"] * model.replicas
    return [*command, "--port", str(port)]


def _round_robin(port: int, urls: list[str]) -> list[str]:
    return _besteffort(port, urls, "round-robin")


def _with_log(port: int, urls: list[str]) -> list[str]:
    folder = BENCH_DIR / "decisions"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return [*_besteffort(port, urls), "--decision-log", str(folder)]


def _behind_uvicorn(port: int, urls: list[str]) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.behind_uvicorn", str(port), *urls]


def _vllm_router(port: int, urls: list[str]) -> list[str]:
    command = [str(BENCH_DIR / "venv" / "bin" / "vllm-router"), "--worker-urls", *urls]
    return [*command, "--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port),
            "--prometheus-port", str(free_port()), "--log-level", "error"]  # fmt: skip


def _sglang_router(port: int, urls: list[str]) -> list[str]:
    command = [str(BENCH_DIR / "venv" / "bin" / "python"), "-m", "sglang_router.launch_router"]
    return [*command, "--worker-urls", *urls, "--policy", "round_robin", "--host", "127.0.0.1",
            "--port", str(port), "--prometheus-port", str(free_port()), "--log-level", "error"]  # fmt: skip


def _nginx(port: int, urls: list[str]) -> list[str]:
    folder = BENCH_DIR / "nginx"
    folder.mkdir(parents=True, exist_ok=True)
    servers = " ".join(f"server {url.removeprefix('http://')};" for url in urls)
    temporary = " ".join(
        f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = f"""
        daemon off; worker_processes 1; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{ worker_connections 4096; }}
        http {{
          access_log off; {temporary}
          upstream engines {{ {servers} keepalive 256; }}
          server {{ listen 127.0.0.1:{port}; keepalive_requests 100000000;
            location / {{ proxy_pass http://engines; proxy_http_version 1.1;
              proxy_set_header Connection ""; proxy_buffering off; }} }}
        }}"""
    (folder / "nginx.conf").write_text(config)
    return [str(_nginx_program()), "-p", str(folder), "-c", str(folder / "nginx.conf")]


def _nginx_program() -> str | None:
    return shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:{BENCH_DIR}/usr/sbin")


def _contenders(names: list[str]) -> dict[str, Callable[[int, list[str]], list[str]]]:
    known = {
        "besteffort": _besteffort,
        "with its decision log": _with_log,
        "besteffort, round robin": _round_robin,
        "the same behind uvicorn": _behind_uvicorn,
        "vllm-router": _vllm_router,
        "sglang-router": _sglang_router,
        "nginx": _nginx,
    }
    missing = {"nginx": _nginx_program() is None}
    missing |= dict.fromkeys(("vllm-router", "sglang-router"), not _has_rust_routers())
    wanted = [name for name in known if not names or name in names]
    for name in wanted:
        if missing.get(name):
            sys.stderr.write(f"{name} is not here, and is left out\n")
    return {name: known[name] for name in wanted if not missing.get(name)}


def _has_rust_routers() -> bool:
    return (BENCH_DIR / "venv" / "bin" / "vllm-router").exists()


def _install_rust_routers() -> None:
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    python = str(BENCH_DIR / "venv" / "bin" / "python")
    subprocess.run([uv, "venv", "-q", "-p", "3.11", str(BENCH_DIR / "venv")], check=True)
    subprocess.run([uv, "pip", "install", "-q", "-p", python, *RUST_ROUTERS], check=True)


async def _measure(contender: Contender, seconds: float) -> None:
    figures, ports = contender.figures, contender.ports
    await drive(ports, num_connections=NUM_CONNECTIONS, duration_s=seconds / 10)  # warm
    cpu_before = 0.0 if contender.pid is None else cpu_s(contender.pid)
    began_at = time.perf_counter()
    full = await drive(ports, num_connections=NUM_CONNECTIONS, duration_s=seconds)
    figures.per_s.append(len(full.latency_s) / (time.perf_counter() - began_at))
    if contender.pid is not None:
        figures.cpu_s.append((cpu_s(contender.pid) - cpu_before) / len(full.latency_s))
    alone = await drive(ports, num_connections=1, duration_s=seconds)
    figures.p50_s.append(float(np.percentile(alone.latency_s, 50)))
    figures.p99_s.append(float(np.percentile(alone.latency_s, 99)))
    streams = await drive(ports, num_connections=NUM_CONNECTIONS, duration_s=seconds, stream=True)
    figures.ttft_s.append(statistics.median(streams.ttft_s))
    figures.transit_s.append(statistics.median(streams.transit_s))
    figures.num_failed += sum(sample.num_failed for sample in (full, alone, streams))


def _print(contenders: list[Contender]) -> None:
    direct, *routers = contenders

    def middle(values: list[float]) -> float:
        return statistics.median(values) if values else float("nan")

    def added_ms(name: str, one: Contender) -> float:
        pairs = zip(getattr(one.figures, name), getattr(direct.figures, name), strict=True)
        return 1000.0 * middle([mine - without for mine, without in pairs])

    reference = next((one for one in routers if one.name == REFERENCE), None)
    out = sys.stdout.write
    out(f"{'':24} {'requests/s':>10} {'ratio':>6} {'p50 ms':>7} {'p99 ms':>7} {'CPU s/1000':>10} ")
    out(f"{'ratio':>6} {'ttft ms':>8} {'token ms':>8} {'failed':>6}\n")

    def ratio(name: str, one: Contender) -> float:
        if reference is None or not getattr(one.figures, name):
            return float("nan")
        pairs = zip(getattr(one.figures, name), getattr(reference.figures, name), strict=True)
        return middle([mine / of_reference for mine, of_reference in pairs])

    for one in contenders:
        of = one.figures
        out(f"{one.name:24} {middle(of.per_s):10.0f} {ratio('per_s', one):5.2f}x ")
        out(f"{added_ms('p50_s', one):7.3f} {added_ms('p99_s', one):7.3f} ")
        out(f"{1000 * middle(of.cpu_s):10.4f} {ratio('cpu_s', one):5.2f}x ")
        out(f"{added_ms('ttft_s', one):8.3f} {added_ms('transit_s', one):8.3f} {of.num_failed:6d}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load, in each round")
    parser.add_argument("--only", action="append", default=[], help="this contender; may be repeated")
    parser.add_argument("--no-install", action="store_true", help="only what is here already")
    options = parser.parse_args()
    if not (options.no_install or _has_rust_routers()):
        _install_rust_routers()
    router_core, load_core = 0, (os.cpu_count() or 1) - 1
    os.sched_setaffinity(0, {load_core})
    with ExitStack() as stack:
        urls = []
        for _ in range(3):
            port = free_port()
            command = [sys.executable, "-m", "tests.benchmarks.mock_engine", str(port)]
            urls.append(f"http://127.0.0.1:{port}")
            stack.enter_context(running(command, urls[-1], core=load_core))
        contenders = [Contender("no router", tuple(int(url.rpartition(":")[2]) for url in urls), None)]
        for name, command_of in _contenders(options.only).items():
            port = free_port()
            command = command_of(port, urls)
            pid = stack.enter_context(running(command, f"http://127.0.0.1:{port}", core=router_core))
            contenders.append(Contender(name, (port,), pid))
        for number in range(options.rounds):
            for contender in contenders:
                uvloop.run(_measure(contender, options.seconds))
            sys.stderr.write(f"round {number + 1} of {options.rounds}\n")
        _print(contenders)


if __name__ == "__main__":
    main()
