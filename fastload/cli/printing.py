"""What verbs print: data as a table or as JSON on stdout, the same in a terminal, a pipe and a file.

Tables have no colours and cut nothing. Names come from buckets, programs and other people's files: no character of
theirs reaches a terminal that would obey it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
import typer
from rich.cells import cell_len

JsonOption = Annotated[bool, typer.Option("--json", help="As JSON, for programs.")]

# Cells that are wider do not widen their column, so that one long name does not push all others off the screen.
_COLUMN_CELLS_MAX = 60


def examples(*lines: str) -> str:
    """The end of a verb's help, as `epilog`. Each line is a command that works as it stands."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def plain(text: str) -> str:
    """The text on one line, with escapes for what a terminal would obey or not show: control characters, and marks that
    change the direction of writing.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


def as_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of text, one a row below the columns' names. A column whose name begins with ">" is set to the right."""
    is_right = [name.startswith(">") for name in columns]
    lines = [[name.removeprefix(">") for name in columns], *([plain(cell) for cell in row] for row in rows)]
    widths = [
        max((width for line in lines if (width := _cells(line[at])) <= _COLUMN_CELLS_MAX), default=0)
        for at in range(len(columns))
    ]
    return [
        "  ".join(
            _padded(cell, width, right) for cell, width, right in zip(line, widths, is_right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _cells(text: str) -> int:
    """How wide it is in a terminal. Of ASCII that is its length: tables may have 100,000 rows."""
    return len(text) if text.isascii() else cell_len(text)


def _padded(cell: str, width: int, right: bool) -> str:
    space = " " * (width - _cells(cell))
    return space + cell if right else cell + space


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout; see `as_table`."""
    for line in as_table(columns, rows):
        print(line)


def print_json(value: Any, indent: int | None = 1) -> None:
    """Data on stdout as JSON, in ASCII: of msgspec's types, or what `json` takes. What is not finite is null. With no
    indent it is one line.
    """
    print(json.dumps(_finite(msgspec.to_builtins(value)), indent=indent), flush=True)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(each) for name, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
        case _:
            return value
