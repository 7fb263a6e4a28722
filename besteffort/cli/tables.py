"""Results for a person, on standard output."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from besteffort.report import comparison_table, fidelity_table

if TYPE_CHECKING:
    from besteffort.gate import Row


def print_comparison(summaries: Sequence[dict[str, Any]]) -> None:
    """One row per figure and one column per replay: it fits where a row per replay would not."""
    table = comparison_table(summaries)
    first, *others = table.headers
    policies = [row[0] for row in table.rows]
    drawn = Table(first, *policies, title=_title(summaries), title_justify="left")
    for column in drawn.columns[1:]:
        column.justify = "right"
    for index, header in enumerate(others, start=1):
        drawn.add_row(header, *(row[index] for row in table.rows))
    # A width that no log folds: numbers are compared down a column or not at all.
    width = None if Console().is_terminal else 160
    Console(width=width, highlight=False).print(drawn)


def print_fidelity(found: dict[str, Any]) -> None:
    """A row per policy and model, the simulator's figure first; then what it comes to."""
    table = fidelity_table(found)
    drawn = Table(*table.headers, title="simulated / vLLM (error of the simulator)", title_justify="left")
    for row in table.rows:
        drawn.add_row(*row)
    width = None if Console().is_terminal else 200
    console = Console(width=width, highlight=False)
    console.print(drawn)
    tau, num_policies = found["kendall_tau"], len(found["policies"])
    console.print(
        f"performance at most {_points(found['performance_apart'])} points apart, deadlines met at most "
        f"{_points(found['deadline_met_apart'])}; Kendall's tau of the order of {num_policies}: "
        + ("none, they are all alike" if tau is None else f"{tau:.2f}")
    )


def print_marks(rows: Sequence[tuple[str, str, str, bool, str]]) -> None:
    """What was found, what was wanted, and whether it is so."""
    drawn = Table("", "error", "mark", "reached", "simulated and real")
    for what, shown, wanted, reached, remark in rows:
        drawn.add_row(escape(what), shown, wanted, "yes" if reached else "no", remark)
    width = None if Console().is_terminal else 160
    Console(width=width, highlight=False).print(drawn)


def _points(apart: Sequence[float]) -> str:
    return f"{100 * max(abs(value) for value in apart):.1f}"


def print_gate(rows: "Sequence[Row]") -> None:
    """A column per policy, and where the first one loses against one of the others."""
    names = [one.policy for one in rows[0].reached]
    drawn = Table("workload", *names, "loses to", title="Mean performance on held-out workloads")
    for column in drawn.columns[1:-1]:
        column.justify = "right"
    for row in rows:
        cells = [f"{one.performance:.4f}" for one in row.reached]
        cells[0] += f" ± {row.reached[0].half_width:.4f}"
        drawn.add_row(row.workload, *cells, ", ".join(one.policy for one in row.better))
    width = None if Console().is_terminal else 200
    Console(width=width, highlight=False).print(drawn)


def _title(summaries: Sequence[dict[str, Any]]) -> str:
    traces = ", ".join(dict.fromkeys(summary["trace"] for summary in summaries))
    first = summaries[0]
    about = (
        f"{first['fleet']}, trace {traces}, {first['num_requests']} requests, {first['num_windows']} windows"
    )
    return f"{about}, rewards {first['rewards_source']}"


def print_findings(findings: Sequence[tuple[str, str, str]]) -> None:
    drawn = Table("what", "found", "remark")
    for finding in findings:
        drawn.add_row(*(escape(cell) for cell in finding))
    Console(highlight=False).print(drawn)


def print_where(lines: Mapping[str, object]) -> None:
    """Name the files that a command leaves behind, or what to type next."""
    console = Console(highlight=False, soft_wrap=True)
    for what, path in lines.items():
        console.print(f"{what}: {path}", markup=False)
