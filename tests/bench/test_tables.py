"""Tables of figures with targets: what counts as a miss, and what comes of a run of questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.tables import Column, Table, answer, parser


def short(quick: bool) -> Table:
    """How much is done."""
    table = Table("what is done", "of", [Column("a", 1), Column("b")])
    table.add("met", 1, 9)
    if not quick:
        table.add("missed", 1.1, 9)
        table.add("for comparison", 2, 9, judged=False)
    return table


def test_only_what_is_judged_can_miss() -> None:
    assert short(quick=True).misses == 0
    assert short(quick=False).misses == 1


def test_a_missed_target_is_the_status_and_every_figure_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "found.json"
    assert answer([short], quick=True, json_file=file) == 0
    assert answer([short, short], quick=False, json_file=file) == 1
    written = json.loads(file.read_text())
    assert [table["title"] for table in written] == ["what is done"] * 2
    assert written[0]["rows"][1] == ["missed", [1.1, 9], True]
    assert "for comparison" in capsys.readouterr().out


def test_a_command_is_described_by_the_first_line_of_its_module() -> None:
    made = parser("plan", "What it costs.\n\nMore.")
    assert made.description == "What it costs."
    assert made.parse_args([]).json == Path("bench/results/plan.json")
