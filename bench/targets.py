"""Figures, what is asked of them, and how they are shown: the median, the range, and the target beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from fastload.bench.measure import median


@dataclass(slots=True)
class Figure:
    """One figure with the values that were taken. Without a target it is shown for comparison."""

    what: str
    unit: str
    values: list[float] = field(default_factory=list)
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_missed(self) -> bool:
        """Whether the median is on the wrong side of the target, or was not taken."""
        low = self.at_least is not None and not median(self.values) >= self.at_least
        return low or (self.at_most is not None and not median(self.values) <= self.at_most)

    @property
    def target(self) -> str:
        """In words; empty where there is none."""
        if self.at_least is not None:
            return f">= {self.at_least:.3g}"
        return "" if self.at_most is None else f"<= {self.at_most:.3g}"


def show(title: str, figures: Sequence[Figure]) -> bool:
    """Print a table; whether a target is missed."""
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "median", "range", "target"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for figure in figures:
        lowest, highest = (number(end(figure.values)) for end in (min, max)) if figure.values else ("", "")
        verdict = "[red]missed[/]" if figure.is_missed else "[green]met[/]"
        table.add_row(
            f"{figure.what}, {figure.unit}" if figure.unit else figure.what,
            number(median(figure.values)),
            f"{lowest} to {highest}",
            f"{figure.target} {verdict}" if figure.target else "",
        )
    Console().print(table)
    return any(figure.is_missed for figure in figures)


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
