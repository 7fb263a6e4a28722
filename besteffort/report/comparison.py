"""Policies side by side, as text in rows and columns for whoever prints them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from besteffort.report.summary import WINDOW_THRESHOLDS

NOTHING = "–"  # noqa: RUF001


class ComparisonTable(NamedTuple):
    headers: list[str]
    rows: list[list[str]]  # one per policy, as long as `headers`


def comparison_table(summaries: Sequence[dict[str, Any]]) -> ComparisonTable:
    """One row per summary, in their order; `trace` and `failed` are columns only if they say something."""
    show_trace = len({summary["trace"] for summary in summaries}) > 1
    show_failed = any(summary["failed"] for summary in summaries)
    models = list(dict.fromkeys(name for summary in summaries for name in summary["selection"]))
    headers = [
        "policy",
        "engine",
        *(["trace"] if show_trace else []),
        "performance",
        "deadlines met",
        *(["failed"] if show_failed else []),
        *(f"windows ≥ {threshold}" for threshold in WINDOW_THRESHOLDS),
        *(f"share {name}" for name in models),
        *(f"latency {rank} ms/token" for rank in ("p50", "p95", "p99")),
    ]
    return ComparisonTable(headers, [_row(s, models, show_trace, show_failed) for s in summaries])


def _row(summary: dict[str, Any], models: Sequence[str], show_trace: bool, show_failed: bool) -> list[str]:
    latency = summary["latency_ms_per_token"]
    return [
        summary["policy"],
        summary["engine"],
        *([summary["trace"]] if show_trace else []),
        figure(summary["performance"], 3),
        percent(summary["deadline_met"]),
        *([count(summary["failed"])] if show_failed else []),
        *(count(summary["windows"][threshold]) for threshold in WINDOW_THRESHOLDS),
        *(percent(summary["selection"].get(name)) for name in models),
        *(figure(latency[rank], 1) for rank in ("p50", "p95", "p99")),
    ]


def figure(value: float | None, num_decimals: int = 1) -> str:
    return NOTHING if value is None else f"{value:,.{num_decimals}f}"


def percent(share: float | None) -> str:
    """Never rounded to a perfect 100 % or an empty 0 % that it is not."""
    if share is None:
        return NOTHING
    if 0 < share < 0.0005:
        return "< 0.1 %"
    if 0.9995 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f} %"


def count(number: int | None) -> str:
    return NOTHING if number is None else f"{number:,}"
