"""`replay --compare`: one trace through real engines and through the simulator, by the same policies."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from besteffort.artifacts import files
from besteffort.engines.running import Urls, running_engines
from besteffort.errors import UsageError
from besteffort.fleet import load_fleet
from besteffort.policies import HINDSIGHT
from besteffort.progress import Progress
from besteffort.report import differences, fidelity, write_comparison
from besteffort.stages.replay import Replay, Replayed, replay_once

VERSION = 1


def compare(
    spec: Replay,
    policies: Sequence[str],
    progress: Progress,
    serve: Callable[[Callable[[], Replayed]], Replayed] = lambda replay: replay(),
) -> tuple[dict[str, Any], Path]:
    """Serve the trace both ways by each policy; returns what came of it and the folder it is in.

    The simulator's replays come first, so that what cannot be used is told before an engine starts. Each
    replay has a folder of its own as well. `serve` makes each of those by engines, and may look at the
    engines before and after.

    Raises:
        InputError: the fleet, the trace, the profile, the rewards or a policy cannot be used.
        EngineError: an engine or the router did not start.
    """
    if not policies:
        raise UsageError("--policy is missing: --compare takes one or, better, several")
    if HINDSIGHT in policies:
        raise UsageError("--policy hindsight: it knows the trace, so that no router can follow it")
    fleet = load_fleet(spec.fleet_dir)
    simulated = [_replay(spec, policy, None, progress) for policy in policies]
    with running_engines(fleet, spec.fleet_dir, spec.attached or {}, progress) as engines:
        urls = {
            name: [engine.url for engine in of_model]
            for name, of_model in zip(fleet.model_names, engines, strict=True)
        }
        real = [serve(partial(_replay, spec, policy, urls, progress)) for policy in policies]
    pairs = [
        {
            "policy": measured.summary["policy"],
            "vllm": measured.summary,
            "simulated": made.summary,
            "differences": differences(measured.outcomes, made.outcomes, fleet),
        }
        for measured, made in zip(real, simulated, strict=True)
    ]
    found = fidelity(pairs)
    folder = spec.fleet_dir / "replays" / (spec.name or f"{spec.trace.stem}-compared")
    facts = {"stage": "replay", "seed": spec.seed, "profile_sha256": files.sha256(spec.profile)}
    sides = [one.summary for pair in zip(real, simulated, strict=True) for one in pair]
    write_comparison(folder, sides, facts)
    label = {"kind": "fidelity", "schema_version": VERSION, "provenance": files.provenance(**facts)}
    files.write_text(folder / "fidelity.json", json.dumps({**label, **found}, indent=1))
    return found, folder


def _replay(spec: Replay, policy: str, urls: Urls | None, progress: Progress) -> Replayed:
    name = None
    if spec.name is not None:
        name = f"{spec.name}-{Path(policy).stem}-{'vllm' if urls else 'simulated'}".replace(":", "-")
    one = replace(spec, policy=policy, name=name, simulated=urls is None, attached=urls)
    return replay_once(one, progress)
