"""What a replay came to: figures for a machine, a page for a person, policies side by side."""

from besteffort.report.comparison import ComparisonTable, comparison_table
from besteffort.report.fidelity import differences, fidelity, fidelity_table, kendall_tau
from besteffort.report.page import write_comparison, write_report
from besteffort.report.summary import summarise

__all__ = [
    "ComparisonTable",
    "comparison_table",
    "differences",
    "fidelity",
    "fidelity_table",
    "kendall_tau",
    "summarise",
    "write_comparison",
    "write_report",
]
