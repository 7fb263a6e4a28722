"""The servers of a whole fleet: started and stopped together, or attached to."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besteffort.engines.child import Child
from besteffort.engines.gpus import gpu_names
from besteffort.engines.reserved_port import ReservedPort
from besteffort.engines.supervisor import Supervisor
from besteffort.engines.vllm import start_server
from besteffort.errors import EngineError, UsageError
from besteffort.fleet import Fleet, Model
from besteffort.progress import Bar, Progress

_POLL_S = 0.25
_FIRST_ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Engine:
    """One replica that answers: where, and under which name its server knows the model."""

    url: str
    served_name: str


# By model, then by replica.
Engines = tuple[tuple[Engine, ...], ...]
Urls = Mapping[str, Sequence[str]]  # of servers that already run, by model name


@contextmanager
def running_engines(
    fleet: Fleet, fleet_dir: Path, attached: Urls, progress: Progress, *, supervised: bool = False
) -> Iterator[Engines]:
    """Every replica of the fleet, ready to answer; those started here are stopped at the end.

    If `supervised`, one that was started here and dies is started again, at the same URL.

    Raises:
        UsageError: `attached` names a model or a number of replicas that the fleet does not have,
            or servers would have to be started for which this machine has too few GPUs.
        EngineError: a server died at its start, or did not get ready in time, or does not answer.
    """
    urls = _attached_urls(fleet, attached)
    if len(urls) < len(fleet.models):
        _check_hardware(fleet)
    children: list[tuple[Child, str]] = []
    ports: list[ReservedPort] = []
    supervisor = Supervisor(progress)
    try:
        by_model = []
        for model in fleet.models:
            if model.name in urls:
                by_model.append(urls[model.name])
                continue
            its_ports = [ReservedPort() for _ in range(model.replicas)]
            ports += its_ports
            started = _start(fleet, fleet_dir, model, its_ports)
            children += started
            if fleet.num_gpus and model is not fleet.models[-1]:
                # A server takes what memory others take meanwhile for its own: one after the other.
                with progress.bar(f"Starting {model.name}", len(started)) as bar:
                    wait_until_healthy(started, fleet.engine.start_timeout_s, bar)
            by_model.append([url for _, url in started])
        if children:
            with progress.bar(f"Starting {len(children)} vLLM servers", len(children)) as bar:
                wait_until_healthy(children, fleet.engine.start_timeout_s, bar)
        engines = tuple(tuple(_engine(url) for url in of_model) for of_model in by_model)
        if supervised:
            supervisor.start([child for child, _ in children])
        yield engines
    finally:
        supervisor.rest()
        for child, _ in children:
            child.ask_to_stop()
        for child, _ in children:
            child.stop()
        for port in ports:
            port.close()


def _attached_urls(fleet: Fleet, attached: Urls) -> dict[str, list[str]]:
    urls = {model.name: list(model.urls) for model in fleet.models if model.urls is not None}
    for name, given in attached.items():
        if name not in fleet.model_names:
            raise UsageError(
                f"--engine {name}=...: fleet {fleet.name!r} has no model {name!r}; "
                f"its models are {', '.join(fleet.model_names)}"
            )
        replicas = fleet.models[fleet.model_names.index(name)].replicas
        if len(given) != replicas:
            raise UsageError(
                f"--engine {name}=...: given {len(given)} times, but fleet.toml says "
                f"replicas = {replicas}; give one URL per replica"
            )
        urls[name] = list(given)
    return {name: [url.rstrip("/") for url in of_model] for name, of_model in urls.items()}


def _check_hardware(fleet: Fleet) -> None:
    """Before servers are started that would fight for what is not there."""
    num_gpus = len(gpu_names()) if fleet.num_gpus else 0
    if num_gpus < fleet.num_gpus:
        raise UsageError(
            f"fleet {fleet.name!r} needs {fleet.num_gpus} GPUs and this machine has {num_gpus}: attach to "
            "servers elsewhere with --engine MODEL=URL, or choose another fleet"
        )


def _start(
    fleet: Fleet, fleet_dir: Path, model: Model, ports: Sequence[ReservedPort]
) -> list[tuple[Child, str]]:
    """All replicas of a model, with their URLs."""
    return [
        (start_server(fleet, fleet_dir, model, replica, port.number), f"http://127.0.0.1:{port.number}")
        for replica, port in enumerate(ports)
    ]


def wait_until_healthy(children: Sequence[tuple[Child, str]], timeout_s: float, bar: Bar) -> None:
    """Return when every server answers `/health`.

    Raises:
        EngineError: one died, or did not answer in time; the message ends with the end of its log.
    """
    give_up_at = time.monotonic() + timeout_s
    waiting = list(children)
    while waiting:
        bar.describe("waiting for " + ", ".join(child.title for child, _ in waiting))
        for child, url in list(waiting):
            child.check()
            if _is_healthy(url):
                waiting.remove((child, url))
                bar.advance()
        if waiting and time.monotonic() > give_up_at:
            child = waiting[0][0]
            raise EngineError(
                f"{child.title} was not ready after {timeout_s:.0f} s; the end of its log, "
                f"{child.log}:\n{child.log_tail()}"
            )
        time.sleep(_POLL_S)


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:  # noqa: S310
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _engine(url: str) -> Engine:
    """Ask a server for the name of its model, and have it answer once, since a first answer is slow.

    Raises:
        EngineError: nobody answers there, or not as an OpenAI-compatible server does.
    """
    try:
        name = str(_json(f"{url}/v1/models")["data"][0]["id"])
        _json(f"{url}/v1/completions", {"model": name, "prompt": [100] * 16, "max_tokens": 4})
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(
            f"{url}: no OpenAI-compatible server answers there ({error}); "
            "start it, or mend the URL in fleet.toml or --engine"
        ) from None
    return Engine(url, name)


def _json(url: str, body: Mapping[str, Any] | None = None) -> Any:
    request = urllib.request.Request(url, headers={"content-type": "application/json"})  # noqa: S310
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(request, data, timeout=_FIRST_ANSWER_TIMEOUT_S) as response:  # noqa: S310
        return json.loads(response.read())
