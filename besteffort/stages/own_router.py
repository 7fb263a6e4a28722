"""A router of our own over engines that run, for stages that measure what clients would see."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from besteffort.engines.child import Child, free_port
from besteffort.engines.running import Engines, wait_until_healthy
from besteffort.fleet import Fleet
from besteffort.progress import SilentBar

_START_TIMEOUT_S = 60.0


@contextmanager
def own_router(
    fleet: Fleet, fleet_dir: Path, engines: Engines, policy: str, options: Sequence[str] = ()
) -> Iterator[str]:
    """Its URL. A process of its own, as in production: it does not share our interpreter's lock.

    Raises:
        EngineError: it did not start.
    """
    port = free_port()
    command = [sys.executable, "-m", "besteffort", "serve", str(fleet_dir)]
    command += ["--policy", policy, "--port", str(port), *options]
    for name, of_model in zip(fleet.model_names, engines, strict=True):
        for engine in of_model:
            command += ["--engine", f"{name}={engine.url}"]
    log = fleet_dir / "logs" / f"router-{port}.log"
    # Keys meant for another router would keep our own client out.
    env = {"BESTEFFORT_API_KEY": "", "BESTEFFORT_ADMIN_API_KEY": ""}
    router = Child("the router", command, log, env)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy([(router, url)], _START_TIMEOUT_S, SilentBar())
        yield url
    finally:
        router.stop()
