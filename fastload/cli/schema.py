"""`fastload schema`: which columns a data set has."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastload.cli.cache_options import CachePath, FormatOption, SplitOption
from fastload.cli.printing import JsonOption, print_json, print_table


def schema(
    urls: Annotated[
        list[str],
        typer.Argument(help="Brace patterns, prefixes that end in '/', single shards, or lists (.json)."),
    ],
    format_name: FormatOption = "auto",
    split: SplitOption = None,
    cache: CachePath = None,
    as_json: JsonOption = False,
) -> None:
    """The columns of a data set, as its first shard has them: what a value is, and how it is stored."""
    import fastload

    columns = fastload.schema(urls, cache=cache, format=format_name, split=split)
    if as_json:
        print_json(
            {
                name: {"dtype": _name(each.dtype), "shape": each.shape, "encoding": each.encoding}
                for name, each in columns.items()
            }
        )
        return
    rows = (
        (name, _name(each.dtype), "differs" if each.shape is None else str(list(each.shape)), each.encoding)
        for name, each in columns.items()
    )
    print_table(("column", "dtype", "shape", "stored as"), rows)


def _name(dtype: Any) -> str:
    """Of a numpy dtype, or of a type."""
    return dtype.__name__ if isinstance(dtype, type) else str(dtype)
