"""`besteffort trace`: make traces, take them from elsewhere, and look at them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from besteffort.cli.options import FleetDir, Seed

# What takes long to import is imported by the command that needs it: `--help` must answer at once.
if TYPE_CHECKING:
    from rich.table import Table

    from besteffort.request import Requests

app = typer.Typer(
    help="Make traces, import them from production logs, and describe them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The Parquet trace to write.")]


@app.command()
def generate(
    workload: Annotated[
        str, typer.Argument(metavar="WORKLOAD", help="stable, unpredictable-1 or unpredictable-2.")
    ],
    fleet_dir: FleetDir,
    output: Output,
    seed: Seed,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second of a stable workload, times the fleet's rate_scale."),
    ] = None,
    num_requests: Annotated[
        int | None, typer.Option(help="How many. [10000; stable: as many as come in the duration]")
    ] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds that a stable workload lasts. [40]")] = None,
    requests_per_rate: Annotated[
        float | None, typer.Option(help="Mean number at each rate of unpredictable-2. [500]")
    ] = None,
) -> None:
    """Draw one of the paper's workloads at random.

    stable is a Poisson process at one rate. The rate of the unpredictable ones jumps: 1 is calm
    with rare bursts, 2 has every rate equally often. All rates are the paper's, for four GPUs,
    times the rate_scale in fleet.toml.

    \b
    Example:
      besteffort trace generate stable artifacts/tiny-opt-cpu -o traces/stable.parquet --seed 1 --rate 4
    """
    import numpy as np

    from besteffort.fleet import load_fleet
    from besteffort.trace import save_trace
    from besteffort.workload import generate_workload

    fleet = load_fleet(fleet_dir)
    requests = generate_workload(
        workload,
        fleet,
        np.random.default_rng(seed),
        rate_per_s=rate,
        duration_s=duration,
        num_requests=num_requests,
        requests_per_rate=requests_per_rate,
    )
    if fleet.rate_scale != 1:
        typer.echo(
            f"all rates are times {fleet.rate_scale:g}, the rate_scale of fleet {fleet.name}", err=True
        )
    facts = {
        "workload": workload,
        "seed": seed,
        "fleet": fleet.name,
        "rate_scale": fleet.rate_scale,
        "rate_per_s": None if rate is None else rate * fleet.rate_scale,
        "duration_s": duration,
        "requests_per_rate": requests_per_rate,
        "num_requests": len(requests),
    }
    save_trace(output, requests, fleet.task_names, facts)
    _say_written(output, requests)


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The file to import.")],
    fleet_dir: FleetDir,
    output: Output,
    source_format: Annotated[str, typer.Option("--format", help="azure-llm or mooncake.")],
    seed: Seed,
    num_requests: Annotated[int | None, typer.Option(help="Keep only the first so many. [all]")] = None,
    time_stretch: Annotated[
        float, typer.Option(help="Multiply all times: 2 lasts twice as long, at half the rate.")
    ] = 1.0,
    max_output_tokens: Annotated[
        int | None, typer.Option(help="Clip outputs to so many. [a quarter of the fleet's max_model_len]")
    ] = None,
) -> None:
    """Fit a production trace to a fleet.

    Arrival times and lengths come from SOURCE, tasks are drawn by the fleet's shares. Outputs are
    clipped, and then prompts to what is left of max_model_len; how many is written into FILE.

    \b
    Example:
      besteffort trace import AzureLLMInferenceTrace_code.csv artifacts/tiny-opt-cpu \\
        -o traces/azure.parquet --format azure-llm --seed 1 --time-stretch 4
    """
    from besteffort.fleet import load_fleet
    from besteffort.trace import import_trace, save_trace

    fleet = load_fleet(fleet_dir)
    requests, facts = import_trace(
        source,
        source_format,
        fleet,
        seed,
        num_requests=num_requests,
        time_stretch=time_stretch,
        max_output_tokens=max_output_tokens,
    )
    save_trace(output, requests, fleet.task_names, facts)
    typer.echo(
        f"clipped {facts['num_clipped_outputs']} outputs to {facts['max_output_tokens']} tokens, and "
        f"{facts['num_clipped_prompts']} prompts to the rest of {facts['max_model_len']}",
        err=True,
    )
    _say_written(output, requests)


@app.command()
def describe(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A Parquet trace.")],
    fleet_dir: Annotated[
        Path | None, typer.Argument(metavar="FLEET_DIR", help="Also check that this fleet can serve it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how many requests a trace holds, how fast they come, and how long they are.

    \b
    Example:
      besteffort trace describe traces/azure.parquet
    """
    from besteffort.fleet import load_fleet
    from besteffort.trace import describe_trace, read_trace

    read = read_trace(trace, None if fleet_dir is None else load_fleet(fleet_dir))
    figures = describe_trace(read.requests, read.task_names)
    if as_json:
        typer.echo(json.dumps({"trace": str(trace), **figures, "provenance": dict(read.facts)}))
        return
    from rich.console import Console

    Console().print(_table(trace, figures, read.facts.get("workload") or read.facts.get("source")))


def _table(trace: Path, figures: dict[str, Any], origin: str | None) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "value", title=escape(str(trace)), title_justify="left")
    if origin:
        table.add_row("from", escape(origin))
    for name, value in figures.items():
        if isinstance(value, dict):
            for part, number in value.items():
                table.add_row(f"{name} {escape(part)}", _shown(number))
        else:
            table.add_row(name, _shown(value))
    return table


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.3f}".rstrip("0").rstrip(".")


def _say_written(output: Path, requests: "Requests") -> None:
    """One line on stderr; the duration is that from the first to the last arrival."""
    duration_s = float(requests.arrived_at[-1] - requests.arrived_at[0])
    mean = f"{(len(requests) - 1) / duration_s:.3g}/s" if duration_s > 0 else "undefined"
    typer.echo(
        f"wrote {output}: {len(requests)} requests over {duration_s:.1f} s, mean {mean}; "
        f"look at it with `besteffort trace describe {output}`",
        err=True,
    )
