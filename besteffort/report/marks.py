"""Figures held against marks: how near a simulator is to real engines, and these to themselves."""

from collections.abc import Sequence
from dataclasses import dataclass

_HEAD = (
    "| | error | mark | reached | vLLM from itself | simulated and by vLLM; of three repeats the mean, "
    "lowest, highest | engines slower than while profiled | error at that pace |",
    "|---|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Pace:
    """What a figure comes to where the simulator's engines are as slow as the real ones were meanwhile."""

    figure: float | None  # as that of the row
    slower: float  # the engines, than while they were profiled; their mean: 0.1 is by a tenth


@dataclass(frozen=True)
class Row:
    """A figure, and the mark that it is held against."""

    what: str
    figure: float | None  # relative, or in points for shares
    mark: float
    unit: str  # "%", "points", "min" or "tau"
    remark: str = ""
    pace: Pace | None = None
    apart: float | None = None  # the real engines' own repeats, in `unit`; tau of two

    @property
    def reached(self) -> bool:
        return self._is_near(self.figure)

    @property
    def shown(self) -> str:
        return self._said(self.figure)

    @property
    def shown_at_pace(self) -> str:
        """What the simulator comes to with engines as fast as they were when these replays were made."""
        if self.pace is None:
            return ""
        return f"{self._said(self.pace.figure)}, {'yes' if self._is_near(self.pace.figure) else '**no**'}"

    @property
    def shown_apart(self) -> str:
        """How far the real engines are from themselves, and whether that is within the mark."""
        if self.apart is None:
            return ""
        said = f"{self.apart:.2f}" if self.unit == "tau" else f"{self.apart:.1f} {self.unit}"
        return f"{said}, {'yes' if self._is_near(self.apart) else '**no**'}"

    def _is_near(self, figure: float | None) -> bool:
        if figure is None:
            return False
        return figure >= self.mark if self.unit == "tau" else abs(figure) <= self.mark

    def _said(self, figure: float | None) -> str:
        if figure is None:
            return "all alike"
        if self.unit in ("tau", "min"):
            return f"{figure:.2f}"
        return f"{figure:+.1f} {self.unit}"

    @property
    def wanted(self) -> str:
        sign = {"tau": "at least", "min": "at most"}.get(self.unit, "within")
        unit = "" if self.unit == "tau" else f" {self.unit}"
        return f"{sign} {self.mark:g}{unit}"


def marks_table(rows: Sequence[Row]) -> list[str]:
    """In Markdown, a line each."""
    return [*_HEAD, *map(_line, rows)]


def _line(row: Row) -> str:
    slower = "" if row.pace is None else f"{100 * row.pace.slower:+.0f} %"
    reached = "yes" if row.reached else "**no**"
    cells = (
        *(row.what, row.shown, row.wanted, reached, row.shown_apart),
        *(row.remark, slower, row.shown_at_pace),
    )
    return f"| {' | '.join(cells)} |"
