"""The command line: parses, draws progress, prints errors; all else is in the library."""

import signal
import sys
from types import FrameType

import typer

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
app.add_typer(trace.app, name="trace", help="Make, import and look at traces of arrivals.")

_INTERRUPTED = 130  # as shells report SIGINT


def main() -> None:
    """The entry point: one clear line for what can be explained, and its exit status."""
    # As Ctrl-C does, so that every `finally` runs and no server is left behind.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app(standalone_mode=True)
    except BestEffortError as error:
        sys.stderr.write(f"besteffort: {error}\n")
        sys.exit(error.exit_status)
    except OSError as error:  # the disk or the network, where nobody knew better what to say
        sys.stderr.write(f"besteffort: {error}\n")
        sys.exit(BestEffortError.exit_status)
    except KeyboardInterrupt:
        sys.stderr.write("besteffort: interrupted; what was started here has been stopped\n")
        sys.exit(_INTERRUPTED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
