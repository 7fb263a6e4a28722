"""`serve`: the fleet's engines with the router in front, until it is told to stop."""

import asyncio
import contextlib
import socket
from pathlib import Path

import numpy as np
import uvicorn

from besteffort.engines.running import Urls, running_engines
from besteffort.errors import UsageError
from besteffort.fleet import load_fleet
from besteffort.policies import load_named_policy
from besteffort.progress import Progress
from besteffort.router import Dispatcher, build_app

# Connections that the kernel holds for us while we are busy: a burst is not refused.
_BACKLOG = 2048
# Streams that still run when we are told to stop have this long to end.
GRACE_S = 10


def serve(
    fleet_dir: Path,
    *,
    policy: str,
    host: str,
    port: int,
    attached: Urls,
    profile: Path,
    rewards: Path,
    seed: int,
    progress: Progress,
) -> None:
    """Start (or attach to) the engines and serve until SIGINT or SIGTERM; then end all of it.

    All that can be wrong with the input is found before an engine starts.

    Raises:
        InputError: the fleet, the policy or the port cannot be used.
        EngineError: an engine did not start.
    """
    fleet = load_fleet(fleet_dir)
    chosen = load_named_policy(
        policy,
        fleet,
        profile=profile,
        rewards=rewards,
        rng=np.random.default_rng(seed),
        thresholds=fleet_dir / "thresholds.parquet",
    )
    with _listen(host, port) as listener:
        with running_engines(fleet, fleet_dir, attached, progress) as engines:
            app = build_app(Dispatcher(fleet, chosen, engines))
            url = f"http://{host}:{listener.getsockname()[1]}"
            progress.say(f"serving {fleet.name} by {chosen.name} at {url}/v1 (Ctrl-C ends it)")
            config = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
            )
            # uvicorn ends in order on SIGINT and SIGTERM, and then raises them again for its caller,
            # to whom being told to stop is no error.
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))
        progress.say("stopped; every engine started here has ended")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror}; "
            "choose another port, or --port 0 for any free one"
        ) from None
    return listener
