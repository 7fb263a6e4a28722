"""The command line: parses, draws progress, prints errors; all else is in the library."""

import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from besteffort import __version__
from besteffort.cli import commands, trace
from besteffort.errors import BestEffortError

app = typer.Typer(
    name="besteffort",
    help="A learned router in front of several LLM sizes: the best answer that still meets its deadline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
commands.register(app)


@app.callback(epilog="Example: besteffort demo artifacts/tiny-opt-cpu")
def _options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


app.add_typer(trace.app, name="trace", help="Make, import and look at traces of arrivals.")

_TYPER_INTERRUPTED = 130  # what Typer makes of a KeyboardInterrupt


def main() -> None:
    """The entry point: one clear line for what can be explained, and its exit status."""
    # As Ctrl-C does, so that every `finally` runs and no server is left behind.
    signal.signal(signal.SIGTERM, _interrupt)
    # Python has none where it was closed before.
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "≥" is no reason to fail
    try:
        app(standalone_mode=True)
    except SystemExit as end:
        if end.code != _TYPER_INTERRUPTED:
            raise
        sys.stderr.write("besteffort: interrupted; what was started here has been stopped\n")
        sys.exit(BestEffortError.exit_status)
    except BestEffortError as error:
        sys.stderr.write(f"besteffort: {error}\n")
        sys.exit(error.exit_status)
    except OSError as error:  # the disk or the network, where nobody knew better what to say
        sys.stderr.write(f"besteffort: {error}\n")
        sys.exit(BestEffortError.exit_status)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
