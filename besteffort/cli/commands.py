"""The stages as commands. Each imports its stage only when it is called: `--help` stays instant."""

from pathlib import Path
from typing import Annotated

import typer

from besteffort.cli.console import ConsoleProgress
from besteffort.cli.options import (
    Engine,
    FleetDir,
    PolicySpec,
    Profile,
    Rewards,
    Seed,
    parse_engines,
)


def register(app: typer.Typer) -> None:
    for command in (profile, serve):
        app.command()(command)


def profile(
    fleet_dir: FleetDir,
    engine: Engine = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Instead of FLEET_DIR/profile.parquet.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure each model's latency on this machine: by batch size, prompt length, and side by side.

    A run that was cut off goes on where it stopped.

    \b
    Example:
      besteffort profile artifacts/tiny-opt-cpu
    """
    from besteffort.stages.profile import profile

    profile(
        fleet_dir,
        output=output or fleet_dir / "profile.parquet",
        attached=parse_engines(engine),
        seed=seed,
        progress=ConsoleProgress(),
    )


def serve(
    fleet_dir: FleetDir,
    policy: PolicySpec,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    engine: Engine = None,
    profile: Profile = None,
    rewards: Rewards = None,
    seed: Seed = 0,
) -> None:
    """Run the router, with an OpenAI-compatible API, in front of the fleet's vLLM servers.

    \b
    Example:
      besteffort serve artifacts/tiny-opt-cpu --policy greedy --port 8000
      curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "besteffort/copa", "prompt": "The man turned on the", "max_tokens": 8}'
    """
    from besteffort.stages.serve import serve

    serve(
        fleet_dir,
        policy=policy,
        host=host,
        port=port,
        attached=parse_engines(engine),
        profile=profile or fleet_dir / "profile.parquet",
        rewards=rewards or fleet_dir / "rewards.parquet",
        seed=seed,
        progress=ConsoleProgress(),
    )
