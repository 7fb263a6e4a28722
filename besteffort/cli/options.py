"""Arguments and options that several commands share, and what they stand for when left out."""

import re
from pathlib import Path
from typing import Annotated

import typer

from besteffort.errors import UsageError
from besteffort.http_url import is_http_url

FleetDir = Annotated[
    Path, typer.Argument(metavar="FLEET_DIR", help="The fleet, such as artifacts/tiny-opt-cpu.")
]
POLICY_HELP = (
    "A policy file, or static:MODEL, round-robin, random, least-loaded, greedy, slackfit, thresholds."
)
PolicySpec = Annotated[str, typer.Option("--policy", metavar="POLICY", help=POLICY_HELP)]
Engine = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="MODEL=URL",
        help="Attach to a server that runs already instead of starting one; once per replica.",
    ),
]


def is_there(option: typer.CallbackParam, given: Path | None) -> Path | None:
    """What an option names that is only read: without it some stages would go on, with less than was meant.

    Raises:
        UsageError: there is no such file.
    """
    if given is not None and not given.is_file():
        raise UsageError(f"{option.opts[0]} {given}: no such file; mend the path, or leave the option out")
    return given


Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile", metavar="FILE", callback=is_there, help="Instead of FLEET_DIR/profile.parquet."
    ),
]
Rewards = Annotated[
    Path | None,
    typer.Option(
        "--rewards", metavar="FILE", callback=is_there, help="Instead of FLEET_DIR/rewards.parquet."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The same seed, the same result.")]


def parse_engines(given: list[str] | None) -> dict[str, list[str]]:
    """`["m=http://a", "m=http://b"]` as `{"m": ["http://a", "http://b"]}`.

    Raises:
        UsageError: one is not of the form MODEL=URL.
    """
    urls: dict[str, list[str]] = {}
    for item in given or []:
        model, equals, url = item.partition("=")
        if not (equals and model and is_http_url(url)):
            raise UsageError(f"--engine {item}: not MODEL=URL, as in opt-3m=http://127.0.0.1:8001")
        urls.setdefault(model, []).append(url)
    return urls


def parse_key(option: str, given: str | None) -> str | None:
    """A key without what an editor or a shell left around it.

    Raises:
        UsageError: nothing is left of it, or it is one that no header can carry.
    """
    if given is None:
        return None
    key = given.strip()
    if not (key and key.isprintable()):
        raise UsageError(f"{option}: empty, or with characters that no header can carry; give another key")
    return key


def parse_duration_s(option: str, given: str) -> float:
    """`90s`, `5m`, `1.5h` or a plain number of seconds.

    Raises:
        UsageError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", given.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{option} {given}: not a time, such as 90s, 5m or 1h")
    return seconds
