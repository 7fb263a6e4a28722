"""`serve`: the fleet's engines with the router in front, until it is told to stop."""

import os
import resource
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import load_rewards
from besteffort.engines.running import Urls, running_engines
from besteffort.errors import InputError, ProfileError, UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.policies import Policy, load_named_policy
from besteffort.progress import Progress
from besteffort.router import (
    DecisionLog,
    Dispatcher,
    Forecast,
    HangUp,
    Limits,
    PolicySource,
    Settings,
    run_router,
    waiting_room,
)
from besteffort.stages.staleness import warn_if_stale

T = TypeVar("T")

# Connections that the kernel holds for us while we are busy: a burst is not refused.
_BACKLOG = 2048
_OTHER_FILES = 200  # than clients' connections, at least
_LOOPBACK = ("127.", "::1", "localhost")


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
    settings: Settings,
    progress: Progress,
    admin_host: str = "127.0.0.1",
    admin_port: int | None = None,
    decision_log: Path | None = None,
    decision_log_every_s: float = 60.0,
) -> None:
    """Start (or attach to) the engines and serve until SIGINT or SIGTERM; then end all of it.

    With an `admin_port`, metrics and administration are there and no longer at `port`. All that can be wrong
    with the input is found before an engine starts.

    Raises:
        InputError: the fleet, the policy or the port cannot be used.
        EngineError: an engine did not start.
    """
    hang_up = HangUp()
    fleet = load_fleet(fleet_dir)

    def load(name: str) -> Policy:
        thresholds, rng = fleet_dir / "thresholds.parquet", np.random.default_rng(seed)
        return load_named_policy(
            name, fleet, profile=profile, rewards=rewards, rng=rng, thresholds=thresholds
        )

    chosen = load(policy)
    if profile.exists():
        with suppress(ProfileError):  # of which the forecast tells
            warn_if_stale(profile, fleet, progress)
    forecast = _forecast(fleet, profile, rewards, progress)
    if decision_log is not None:
        _check_writable(decision_log)
    _warn_of_open_doors(host, None if admin_port is None else admin_host, settings, progress)
    _raise_file_limit(settings.limits, progress)
    scheme = "http" if settings.tls is None else "https"
    with ExitStack() as stack:
        listener, url = stack.enter_context(_listening(scheme, host, port))
        admin_listener = None
        if admin_port is not None:
            inner = _listening(scheme, admin_host, admin_port, options="--admin-")
            admin_listener, admin_url = stack.enter_context(inner)
        with waiting_room([listener] if admin_listener is None else [listener, admin_listener], settings):
            running = running_engines(fleet, fleet_dir, attached, progress, supervised=True)
            engines = stack.enter_context(running)
        if admin_port is not None:
            progress.say(f"metrics and administration are at {admin_url}")
        progress.say(f"serving {fleet.name} by {chosen.name} at {url}/v1 (Ctrl-C ends it)")
        dispatcher = Dispatcher(fleet, chosen, engines, forecast=forecast)
        log = None
        if decision_log is not None:
            log = DecisionLog(
                decision_log, fleet, dispatcher.clock, progress.say, every_s=decision_log_every_s
            )
            stack.enter_context(closing(log))
        run_router(
            dispatcher,
            settings,
            listener,
            decision_log=log,
            admin_listener=admin_listener,
            source=PolicySource(policy, fleet_dir, load),
            hang_up=hang_up,
            say=progress.say,
        )
    progress.say("stopped; every engine started here has ended")


def _warn_of_open_doors(host: str, admin_host: str | None, settings: Settings, progress: Progress) -> None:
    if settings.api_key is None and not host.startswith(_LOOPBACK):
        progress.say(f"warning: whoever reaches {host} can use this router; give --api-key to change that")
    if admin_host is not None and not (settings.protect_metrics or admin_host.startswith(_LOOPBACK)):
        progress.say(
            f"warning: whoever reaches {admin_host} can read this router's metrics; "
            "give --protect-metrics to change that"
        )


def _forecast(fleet: Fleet, profile: Path, rewards: Path, progress: Progress) -> Forecast:
    """What receipts and metrics say of requests beforehand: less, where a file is missing or of no use."""

    def read(path: Path, load: Callable[[Path, Fleet], T]) -> T | None:
        try:
            return load(path, fleet) if path.exists() else None
        except InputError as error:
            progress.say(f"warning: receipts and metrics do without it: {error}")
            return None

    return Forecast(fleet, read(profile, load_latency), read(rewards, load_rewards))


def tls_context(certfile: Path | None, keyfile: Path | None) -> ssl.SSLContext | None:
    """What `--ssl-certfile` and `--ssl-keyfile` stand for; None without them.

    Raises:
        UsageError: one is missing or cannot be used.
    """
    if certfile is None:
        if keyfile is not None:
            raise UsageError("--ssl-keyfile goes only with --ssl-certfile")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # ssl.SSLError is one
        raise UsageError(
            f"--ssl-certfile {certfile}: cannot be used ({error.strerror or error}); "
            "give a certificate and its key in PEM"
        ) from None
    return context


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        raise UsageError(f"--decision-log {folder}: no folder that can be written to; choose another place")


def _raise_file_limit(limits: Limits, progress: Progress) -> None:
    """Every connection is an open file, and the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems say "infinity" and allow less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    # Requests for which there is no connection to an engine left are told to come again.
    num_needed = limits.max_connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < num_needed:
        progress.say(
            f"warning: {limits.max_connections} clients' connections and those to engines are open files, of "
            f"which this process may have {soft}: raise the limit (ulimit -Hn) or lower --max-connections"
        )


@contextmanager
def _listening(
    scheme: str, host: str, port: int, *, options: str = "--"
) -> Iterator[tuple[socket.socket, str]]:
    """A socket and its URL; `options` is how the command line's begin that name it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise UsageError(
                f"{options}host {host} {options}port {port}: cannot listen there: {error.strerror}; "
                f"choose another port, or {options}port 0 for any free one"
            ) from None
        at = f"[{host}]" if ":" in host else host
        yield listener, f"{scheme}://{at}:{listener.getsockname()[1]}"
