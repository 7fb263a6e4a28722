"""`besteffort serve`: what whoever runs the router may choose."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    parse_key,
)
from besteffort.errors import UsageError

if TYPE_CHECKING:
    from besteffort.router import ApiKey


def _count(help_text: str) -> Any:
    return typer.Option(metavar="N", min=1, help=help_text)


def _seconds(help_text: str) -> Any:
    return typer.Option(metavar="S", min=0.1, help=help_text)


def serve(
    fleet_dir: FleetDir,
    policy: PolicySpec,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    engine: Engine = None,
    profile: Profile = None,
    rewards: Rewards = None,
    seed: Seed = 0,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BESTEFFORT_API_KEY",
            help="Clients must show it. Better in the environment: others can see a command line.",
            show_envvar=True,
        ),
    ] = None,
    protect_metrics: Annotated[
        bool,
        typer.Option("--protect-metrics", help="/metrics needs the key too."),
    ] = False,
    forward_authorization: Annotated[
        bool,
        typer.Option("--forward-authorization", help="Pass clients' keys on to the engines."),
    ] = False,
    admin_api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="BESTEFFORT_ADMIN_API_KEY",
            help="Whoever shows it may see and change the policy, at /admin/policy. Not the clients' key.",
            show_envvar=True,
        ),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            min=0,
            max=65535,
            help="/metrics and /admin are here and no longer at --port. 0: any free one.",
        ),
    ] = None,
    admin_host: Annotated[str, typer.Option(help="The address for --admin-port.")] = "127.0.0.1",
    decision_log: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write what was seen, chosen and came of it here, as Parquet."),
    ] = None,
    decision_log_every_s: Annotated[float, _seconds("... a new file this often.")] = 60.0,
    ssl_certfile: Annotated[Path | None, typer.Option(metavar="FILE", help="Serve HTTPS by it.")] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="If it is not in the certificate's."),
    ] = None,
    max_in_flight: Annotated[int, _count("Requests at the engines; others get a 429.")] = 4096,
    max_connections: Annotated[int, _count("Connections of clients.")] = 16_384,
    max_body_mb: Annotated[int, _count("A request's body, in MiB.")] = 32,
    max_held_mb: Annotated[int, _count("The bodies of all requests together, in MiB.")] = 512,
    head_timeout_s: Annotated[float, _seconds("A client has this long to send a request's head.")] = 10.0,
    body_timeout_s: Annotated[float, _seconds("... and its body.")] = 60.0,
    send_timeout_s: Annotated[float, _seconds("A client may stop reading an answer for this long.")] = 60.0,
    keep_alive_s: Annotated[float, _seconds("A connection may lie idle for this long.")] = 75.0,
    connect_timeout_s: Annotated[float, _seconds("An engine has this long to accept a connection.")] = 5.0,
    first_byte_timeout_s: Annotated[float, _seconds("... to begin an answer.")] = 600.0,
    between_bytes_timeout_s: Annotated[float, _seconds("... between two parts of it.")] = 120.0,
    total_timeout_s: Annotated[float, _seconds("... for all of it.")] = 3600.0,
    grace_s: Annotated[
        float,
        typer.Option(metavar="S", min=0.0, help="How long requests in work may take to end."),
    ] = 10.0,
) -> None:
    """Run the router, with an OpenAI-compatible API, in front of the fleet's vLLM servers.

    \b
    Example:
      besteffort serve artifacts/tiny-opt-cpu --policy static:opt-22m --port 8000
      curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"model": "besteffort/copa", "prompt": "The man turned on the", "max_tokens": 8}'
    """
    from besteffort.router import Limits, Settings
    from besteffort.stages.serve import serve, tls_context

    clients_key, admin_key = _keys(api_key, admin_api_key)
    if protect_metrics and clients_key is None:
        raise UsageError("--protect-metrics goes only with --api-key")
    limits = Limits(
        max_connections=max_connections,
        max_in_flight=max_in_flight,
        max_body=max_body_mb * 1024 * 1024,
        max_held=max_held_mb * 1024 * 1024,
        head_s=head_timeout_s,
        body_s=body_timeout_s,
        keep_alive_s=keep_alive_s,
        send_s=send_timeout_s,
        connect_s=connect_timeout_s,
        first_byte_s=first_byte_timeout_s,
        between_bytes_s=between_bytes_timeout_s,
        total_s=total_timeout_s,
        grace_s=grace_s,
    )
    settings = Settings(
        limits=limits,
        api_key=clients_key,
        protect_metrics=protect_metrics,
        forward_authorization=forward_authorization,
        tls=tls_context(ssl_certfile, ssl_keyfile),
        admin_key=admin_key,
    )
    serve(
        fleet_dir,
        policy=policy,
        host=host,
        port=port,
        attached=parse_engines(engine),
        profile=profile or fleet_dir / "profile.parquet",
        rewards=rewards or fleet_dir / "rewards.parquet",
        seed=seed,
        settings=settings,
        progress=ConsoleProgress(),
        admin_host=admin_host,
        admin_port=admin_port,
        decision_log=decision_log,
        decision_log_every_s=decision_log_every_s,
    )


def _keys(of_clients: str | None, of_admin: str | None) -> "tuple[ApiKey | None, ApiKey | None]":
    """Raises UsageError: one cannot be used, or both are the same."""
    from besteffort.router import ApiKey

    keys = parse_key("--api-key", of_clients), parse_key("--admin-api-key", of_admin)
    if keys[0] is not None and keys[0] == keys[1]:
        raise UsageError("--admin-api-key: clients have this key too, as --api-key; give another one")
    clients, admin = (None if key is None else ApiKey(key) for key in keys)
    return clients, admin
