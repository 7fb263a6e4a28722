"""The shipped modelled fleet: its engines simulated in one process, and the real router in another."""

import json
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from besteffort.engines.reserved_port import ReservedPort
from besteffort.fleet import load_fleet
from tests.benchmarks import simulated_engine
from tests.benchmarks.processes import BENCH_DIR, ROOT, is_well, rss_mib, running

FLEET_DIR = ROOT / "artifacts" / "titan-rtx-opt"
POLICY = FLEET_DIR / "policies" / "hard.safetensors"


@dataclass(frozen=True)
class Served:
    """`port` and `pid` are the router's."""

    port: int
    pid: int
    log: Path
    engine_port: int

    def metric(self, name: str, label: str = "") -> dict[str, float]:
        """Values added up by one of their labels; all together under "" without one."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(_read(f"http://127.0.0.1:{self.port}/metrics")):
            for sample in family.samples:
                if sample.name == name:
                    key = sample.labels.get(label, "")
                    sums[key] = sums.get(key, 0.0) + sample.value
        return sums

    def engine_counts(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(_read(f"http://127.0.0.1:{self.engine_port}/counts"))
        return counts

    @property
    def rss_mib(self) -> float:
        return rss_mib(self.pid)


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
        return str(answer.read().decode())


@contextmanager
def served(
    *, speed: float, options: Sequence[str] = (), cores: tuple[int, int] | None = None
) -> Iterator[Served]:
    """Engines `speed` times as fast as their profile says, behind the router with the trained policy.

    `cores` are the engines' and the router's.
    """
    fleet = load_fleet(FLEET_DIR)
    with ExitStack() as reserved:

        def own_port() -> int:
            return reserved.enter_context(closing(ReservedPort())).number

        places = [(model.name, own_port()) for model in fleet.models for _ in range(model.replicas)]
        yield from _served(places, own_port(), speed, options, cores)


def _served(
    places: list[tuple[str, int]],
    port: int,
    speed: float,
    options: Sequence[str],
    cores: tuple[int, int] | None,
) -> Iterator[Served]:
    log = BENCH_DIR / f"router-{port}.log"
    router = [sys.executable, "-m", "besteffort", "serve", str(FLEET_DIR), "--policy", str(POLICY)]
    for name, engine_port in places:
        router += ["--engine", f"{name}=http://127.0.0.1:{engine_port}"]
    engines: Any = simulated_engine.command(FLEET_DIR, speed, places)
    of_engines, of_router = cores or (None, None)
    with running(engines, f"http://127.0.0.1:{places[-1][1]}", core=of_engines, is_ready=is_well):
        url, command = f"http://127.0.0.1:{port}", [*router, "--port", str(port), *options]
        with running(command, url, core=of_router, is_ready=is_well, log=log) as pid:
            yield Served(port, pid, log, places[0][1])
    log.unlink()
