"""The pages that a person reads: self-contained, without scripts, without anything from a network."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from besteffort.artifacts import files
from besteffort.artifacts.outcomes_file import judge, save_outcomes
from besteffort.fleet import Fleet
from besteffort.report import plots
from besteffort.report.comparison import comparison_table, count, figure, percent
from besteffort.report.summary import WINDOW_SIZE, WINDOW_THRESHOLDS
from besteffort.request import Outcomes
from besteffort.rewards import Rewards

VERSION = 1


def write_report(
    directory: Path,
    outcomes: Outcomes,
    summary: Mapping[str, Any],
    fleet: Fleet,
    rewards: Rewards,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write `requests.parquet`, `report.html` and, last, `summary.json`; `facts` go into the provenance.

    Raises:
        UsageError: the folder or the disk does not take them.
    """
    run = {key: summary[key] for key in ("policy", "trace", "engine", "fleet")}
    provenance = files.provenance(**run, **{k: v for k, v in (facts or {}).items() if k not in run})
    save_outcomes(directory / "requests.parquet", outcomes, fleet, rewards, {**run, **(facts or {})})
    page = _render_report(outcomes, dict(summary), fleet, rewards, provenance)
    files.write_text(directory / "report.html", page)
    files.write_text(directory / "summary.json", _labelled("summary", provenance, dict(summary)))


def write_comparison(
    directory: Path, summaries: Sequence[dict[str, Any]], facts: Mapping[str, Any] | None = None
) -> None:
    """Write `comparison.html` and `comparison.json`, with the summaries in the order given.

    Raises:
        UsageError: the folder or the disk does not take them.
    """
    provenance = files.provenance(**(facts or {}))
    page = _environment().get_template("comparison.html.jinja").render(
        summaries=summaries,
        table=comparison_table(summaries),
        engines=list(dict.fromkeys(summary["engine"] for summary in summaries)),
        traces=list(dict.fromkeys(summary["trace"] for summary in summaries)),
        window_size=WINDOW_SIZE,
        plot=plots.compared_performance(summaries),
        provenance=provenance,
    )  # fmt: skip
    files.write_text(directory / "comparison.html", page)
    content = {"summaries": list(summaries)}
    files.write_text(directory / "comparison.json", _labelled("comparison", provenance, content))


def _labelled(kind: str, provenance: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    """JSON that says what it is, as the Parquet files do."""
    labelled = {"kind": kind, "schema_version": VERSION, **content, "provenance": provenance}
    return json.dumps(labelled, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _render_report(
    outcomes: Outcomes,
    summary: dict[str, Any],
    fleet: Fleet,
    rewards: Rewards,
    provenance: Mapping[str, Any],
) -> str:
    verdicts = judge(outcomes, fleet, rewards)
    return _environment().get_template("report.html.jinja").render(
        summary=summary,
        thresholds=WINDOW_THRESHOLDS,
        window_size=WINDOW_SIZE,
        rewards=_reward_rows(fleet, rewards),
        performance_plot=plots.performance_over_time(outcomes, verdicts),
        latency_plot=plots.latency_over_time(outcomes, verdicts, fleet),
        cdf_plot=plots.latency_cdf(outcomes, verdicts, fleet),
        selection_plot=plots.selection_over_time(outcomes, fleet),
        tasks_plot=plots.selection_per_task(summary),
        provenance=provenance,
    )  # fmt: skip


def _reward_rows(fleet: Fleet, rewards: Rewards) -> dict[str, list[str]]:
    """The entries of `A` as text by task, in the order of the models, with their standard errors if known."""
    rows = {}
    for t, task in enumerate(fleet.tasks):
        entries = zip(rewards.values[t].tolist(), rewards.standard_errors[t].tolist(), strict=True)
        rows[task.name] = [
            f"{value:.3f}" if np.isnan(error) else f"{value:.3f} ± {error:.3f}" for value, error in entries
        ]
    return rows


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("besteffort.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, percent=percent, count=count)
    return environment
