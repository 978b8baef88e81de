"""Questions that are answered by a table each, with the targets beside the headings: the shape of `bench.plan` and
`bench.policy`. `bench.targets` is for figures that are taken round after round.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as Printed

from bench.targets import number


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and what its figures must not exceed."""

    name: str
    at_most: float | None = None


@dataclass(slots=True)
class Table:
    """One question's answer. A row that is not `judged` is shown for comparison."""

    title: str
    label: str
    columns: Sequence[Column]
    rows: list[tuple[str, list[float], bool]] = field(default_factory=list)

    def add(self, label: str, *values: float, judged: bool = True) -> None:
        """A row."""
        self.rows.append((label, list(values), judged))

    def is_missed(self, column: Column, value: float, judged: bool) -> bool:
        """Whether a figure is above its target."""
        return judged and column.at_most is not None and value > column.at_most

    @property
    def misses(self) -> int:
        """How many figures are above their targets."""
        cells = (
            (column, value, judged)
            for _, values, judged in self.rows
            for column, value in zip(self.columns, values, strict=True)
        )
        return sum(self.is_missed(*cell) for cell in cells)


Question = Callable[[bool], Table]
"""Measures, less of everything with `--quick`; its docstring says what."""


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """The arguments of `bench.<name>`, whose module's text is `text`."""
    made = argparse.ArgumentParser(prog=f"bench.{name}", description=(text or "").partition("\n")[0])
    made.add_argument("--quick", action="store_true", help="less of everything: a look, not a figure")
    made.add_argument("--json", type=Path, default=Path(f"bench/results/{name}.json"))
    return made


def answer(questions: Iterable[Question], *, quick: bool, json_file: Path) -> int:
    """Print a table for each question, and write the same as JSON; status 1 where a target is missed."""
    console, tables = Console(), list[Table]()
    for question in questions:
        with console.status(f"{question.__name__}: {question.__doc__}"):
            tables.append(question(quick))
        console.print(printed(tables[-1]))
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps([asdict(table) for table in tables], indent=1))
    console.print(f"every figure is in {json_file}")
    return int(any(table.misses for table in tables))


def printed(table: Table) -> Printed:
    """As the console shows it."""
    printed = Printed(title=table.title, title_justify="left")
    printed.add_column(table.label)
    for column in table.columns:
        target = "" if column.at_most is None else f"\n<= {column.at_most:g}"
        printed.add_column(column.name + target, justify="right")
    for label, values, judged in table.rows:
        cells = []
        for column, value in zip(table.columns, values, strict=True):
            colour = "red" if table.is_missed(column, value, judged) else "green"
            is_judged = judged and column.at_most is not None
            cells.append(f"[{colour}]{number(value)}[/]" if is_judged else number(value))
        printed.add_row(label, *cells)
    return printed
