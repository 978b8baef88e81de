"""The snapshot is a contract with users: docs/operations.md lists each field, and what is written stays readable."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from fastload.snapshot import Histogram, Snapshot
from tests.snapshots import example

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations.md"


def fields(struct: type[msgspec.Struct], path: str = "") -> Iterator[str]:
    """The path of each that is no struct of fields itself."""
    for name, kind in typing.get_type_hints(struct).items():
        (inner,) = typing.get_args(kind) if typing.get_origin(kind) is list else (kind,)
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct) and inner is not Histogram:
            yield from fields(inner, f"{path}{name}{'[]' if inner is not kind else ''}.")
        else:
            yield path + name


def test_every_field_is_documented_and_no_other() -> None:
    section = OPERATIONS.read_text().partition("\n## Status, top, doctor\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
    documented = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(documented) == sorted(fields(Snapshot))


def test_a_snapshot_is_the_same_after_json() -> None:
    snapshot = example()
    assert msgspec.json.decode(msgspec.json.encode(snapshot), type=Snapshot) == snapshot


def test_a_reader_takes_fields_that_were_added_later() -> None:
    values: dict[str, Any] = msgspec.to_builtins(example())
    later = {**values, "more": 1, "node": {**values["node"], "more": [1]}}
    assert msgspec.convert(later, Snapshot) == example()
