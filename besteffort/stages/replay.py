"""`replay`: a trace through the router over real engines, or through the simulator; one report for both."""

import asyncio
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from json import loads
from pathlib import Path
from typing import Any, Literal

import numpy as np

from besteffort.artifacts import files
from besteffort.artifacts.profile_file import load_latency
from besteffort.artifacts.rewards_file import doubt, load_rewards
from besteffort.artifacts.thresholds_file import load_thresholds
from besteffort.engines.open_loop import Ledger, send_open_loop
from besteffort.engines.running import Urls, running_engines
from besteffort.errors import UsageError
from besteffort.fleet import Fleet, load_fleet
from besteffort.hindsight import hindsight
from besteffort.policies import HINDSIGHT, Policy, load_named_policy
from besteffort.progress import Progress
from besteffort.report import summarise, write_report
from besteffort.request import Outcomes, Requests
from besteffort.rewards import Rewards
from besteffort.simulator import simulate, simulate_choices
from besteffort.stages.own_router import own_router
from besteffort.trace import load_trace

# A client that gives up; its request counts as failed.
REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Replay:
    """What to replay, where, and by which policy."""

    trace: Path
    fleet_dir: Path
    policy: str | None  # a name or a file; None where a router at `url` has its own
    profile: Path
    rewards: Path
    simulated: bool = False
    url: str | None = None  # of a router that runs already
    api_key: str | None = None  # which that router asks for
    attached: Urls | None = None
    name: str | None = None  # of the folder under replays/; by default made of the others
    seed: int = 0
    budget_s: float = 60.0  # for the search of `hindsight`
    slowed: tuple[float, ...] | None = None  # by model, how many times as long the simulator has it take


@dataclass(frozen=True)
class Replayed:
    """What became of the requests, what it came to, and the folder with the report."""

    outcomes: Outcomes
    summary: dict[str, Any]
    folder: Path


def replay(spec: Replay, progress: Progress) -> tuple[dict[str, Any], Path]:
    """`replay_once`, without the single requests: the summary and its folder."""
    replayed = replay_once(spec, progress)
    return replayed.summary, replayed.folder


def replay_once(spec: Replay, progress: Progress) -> Replayed:
    """Replay and write the report.

    On Ctrl-C what was answered so far is reported all the same, before the interrupt goes on.

    Raises:
        InputError: the fleet, the trace, the rewards or the policy cannot be used.
        EngineError: an engine or the router did not start.
    """
    if spec.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", spec.name):
        raise UsageError(f"--name {spec.name!r}: give a plain folder name, of letters, digits, '.', '_', '-'")
    fleet = load_fleet(spec.fleet_dir)
    requests = load_trace(spec.trace, fleet)
    rewards = load_rewards(spec.rewards, fleet)
    if reason := doubt(spec.rewards, rewards, fleet):
        progress.say(f"warning: {reason}")
    # Loaded before any engine starts, so that a wrong one is told at once.
    sees_the_future = spec.policy == HINDSIGHT and spec.simulated
    policy = None if sees_the_future else _policy(spec, fleet)
    policy_name = _name(spec, policy, fleet)
    interrupt = None
    if sees_the_future:
        outcomes = _in_hindsight(spec, fleet, requests, rewards, progress)
    elif policy is not None and spec.simulated:
        latency = load_latency(spec.profile, fleet)
        if spec.slowed is not None:  # not so the policy, which knows the profile alone
            latency = latency.slowed(np.array(spec.slowed))
        outcomes = simulate(requests, fleet, latency, policy.choose)
    else:
        outcomes, interrupt = _send(spec, fleet, requests, progress)
    if interrupt is not None and len(outcomes) == 0:
        raise interrupt
    engine: Literal["simulated", "vllm"] = "simulated" if spec.simulated else "vllm"
    trace_name = spec.trace.stem
    summary = summarise(outcomes, fleet, rewards, policy=policy_name, trace=trace_name, engine=engine)
    folder = _folder(spec, policy_name, engine)
    write_report(folder, outcomes, summary, fleet, rewards, _facts(spec, interrupt is not None))
    if interrupt is not None:
        progress.say(f"interrupted; what was answered so far is in {folder}")
        raise interrupt
    return Replayed(outcomes, summary, folder)


def _name(spec: Replay, policy: Policy | None, fleet: Fleet) -> str:
    if policy is not None:
        return policy.name
    if spec.url is None:
        return str(spec.policy)
    url = spec.url.rstrip("/")
    name = _policy_of_router(url, fleet)
    _check_key(url, spec.api_key)
    return name


def _in_hindsight(
    spec: Replay, fleet: Fleet, requests: Requests, rewards: Rewards, progress: Progress
) -> Outcomes:
    """By the best plan that a search finds which starts from what the policies do."""
    latency = load_latency(spec.profile, fleet)
    table = None
    names = [f"static:{name}" for name in fleet.model_names] + ["least-loaded", "greedy", "slackfit"]
    thresholds = spec.fleet_dir / "thresholds.parquet"
    if thresholds.exists():
        names.append("thresholds")
        table = load_thresholds(thresholds, fleet, profile=spec.profile, rewards=spec.rewards)
    else:
        progress.say(f"no {thresholds}: `besteffort tune {spec.fleet_dir}` would give a better start")
    starts = []
    for name in names:
        policy = _policy(replace(spec, policy=name), fleet)
        if policy is not None:
            starts.append(simulate(requests, fleet, latency, policy.choose).model)
    rng = np.random.default_rng(spec.seed)
    found = hindsight(
        requests,
        fleet,
        latency,
        rewards,
        starts,
        rng,
        table=table,
        budget_s=spec.budget_s,
        progress=progress,
    )
    return simulate_choices(requests, fleet, latency, found.models)


def _policy(spec: Replay, fleet: Fleet) -> Policy | None:
    """None where a router at a URL has its own."""
    if spec.url is not None:
        return None
    if spec.policy is None:
        raise UsageError("--policy is missing: name one, or attach to a router with --url")
    rng = np.random.default_rng(spec.seed)
    return load_named_policy(
        spec.policy,
        fleet,
        profile=spec.profile,
        rewards=spec.rewards,
        rng=rng,
        thresholds=spec.fleet_dir / "thresholds.parquet",
    )


def _policy_of_router(url: str, fleet: Fleet) -> str:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=10) as response:  # noqa: S310
            health = loads(response.read())
        served = (health["fleet"], tuple(health["tasks"]), tuple(health["models"]))
        policy = str(health["policy"])
    except (OSError, urllib.error.URLError, HTTPException, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"--url {url}: no besteffort router answers there ({error}); "
            "start one with `besteffort serve`, or leave --url out"
        ) from None
    if served != (fleet.name, fleet.task_names, fleet.model_names):
        raise UsageError(
            f"--url {url}: that router serves fleet {served[0]!r}, or other tasks or models than "
            f"{fleet.name!r} has; name its own fleet directory"
        )
    return policy


def _check_key(url: str, api_key: str | None) -> None:
    """Before every request of a trace is refused."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    request = urllib.request.Request(f"{url}/v1/models", headers=headers)  # noqa: S310
    try:
        urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            wrong = "no key was given" if api_key is None else "the key is not the one that it asks for"
            raise UsageError(
                f"--url {url}: {wrong} (HTTP {error.code}); give it as --api-key or BESTEFFORT_API_KEY"
            ) from None


def _send(
    spec: Replay, fleet: Fleet, requests: Requests, progress: Progress
) -> tuple[Outcomes, KeyboardInterrupt | None]:
    ledger = Ledger(requests, fleet)
    with _router(spec, fleet, progress) as url:
        title = f"Replaying {spec.trace.stem} by {spec.policy or url}"
        with progress.bar(title, len(requests)) as bar:
            rng = np.random.default_rng()  # the prompts of an earlier replay would be in the prefix cache
            sending = send_open_loop(
                requests,
                fleet,
                url,
                ledger,
                api_key=None if spec.url is None else spec.api_key,
                timeout_s=REQUEST_TIMEOUT_S,
                rng=rng,
                bar=bar,
            )
            try:
                asyncio.run(sending)
            except KeyboardInterrupt as interrupt:
                return ledger.outcomes(), interrupt
    return ledger.outcomes(), None


@contextmanager
def _router(spec: Replay, fleet: Fleet, progress: Progress) -> Iterator[str]:
    """The URL of the router: the one given, or one of our own over engines of our own."""
    if spec.url is not None:
        yield spec.url.rstrip("/")
        return
    options = ["--seed", str(spec.seed)]
    for option, path in (("--profile", spec.profile), ("--rewards", spec.rewards)):
        if path.exists():  # else it is the default, which not every policy needs
            options += [option, str(path)]
    with (
        running_engines(fleet, spec.fleet_dir, spec.attached or {}, progress) as engines,
        own_router(fleet, spec.fleet_dir, engines, str(spec.policy), options) as url,
    ):
        yield url


def _folder(spec: Replay, policy_name: str, engine: str) -> Path:
    name = spec.name or f"{spec.trace.stem}-{policy_name}-{engine}".replace(":", "-")
    return spec.fleet_dir / "replays" / name


def _facts(spec: Replay, interrupted: bool) -> dict[str, Any]:
    inputs = {"trace": spec.trace, "rewards": spec.rewards}
    if spec.simulated:
        inputs["profile"] = spec.profile
    if spec.policy is not None and Path(spec.policy).is_file():
        inputs["policy"] = Path(spec.policy)
    hashes = {f"{name}_sha256": files.sha256(path) for name, path in inputs.items()}
    return {"stage": "replay", "seed": spec.seed, "interrupted": interrupted, **hashes}
