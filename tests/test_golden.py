"""What is written down in `tests/golden` is so still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.golden import orders, states, texts

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata with a newer torch

STATES = texts.texts_put_back(texts.load("states"))
TORCHDATA = texts.texts_put_back(texts.load("torchdata"))


def same(found: Any, recorded: Any) -> None:
    """Assert it entry by entry, so that the first that differs is named."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        assert list(found) == list(recorded)
        for name, each in recorded.items():
            assert found[name] == each, name
    assert found == recorded


def part_of(recorded: dict[str, Any], part: str) -> dict[str, Any]:
    return {name: {steps: of[part] for steps, of in each.items()} for name, each in recorded.items()}


@pytest.mark.parametrize("kind", orders.KINDS)
def test_orders(tmp_path: Path, kind: str) -> None:
    same(orders.record_kind(tmp_path, kind), texts.load("orders")[kind])


@pytest.mark.parametrize("kind", states.KINDS)
def test_states_are_what_they_were(tmp_path: Path, kind: str) -> None:
    same(states.say_kind(tmp_path, kind), part_of(STATES[kind], "said"))


@pytest.mark.parametrize("kind", states.KINDS)
def test_states_of_before_are_loaded_and_gone_on_from(tmp_path: Path, kind: str) -> None:
    said = part_of(STATES[kind], "said")
    same(states.resume_kind(tmp_path, kind, said), part_of(STATES[kind], "resumed"))


def test_states_of_torchdatas_loader_are_loaded_and_gone_on_from() -> None:
    said = {name: each["said"] for name, each in TORCHDATA.items()}
    same(states.resume_torchdata(said), {name: each["resumed"] for name, each in TORCHDATA.items()})


def test_what_was_recorded_goes_on_where_it_was() -> None:
    """But for an epoch that is over: what is loaded then is the next one."""
    recorded = [of for kind in STATES.values() for each in kind.values() for of in each.values()]
    for each in [*recorded, *TORCHDATA.values()]:
        said, resumed = each["said"], each["resumed"]
        if said["batches"]:
            assert [resumed[name] for name in ("rest", "batches", "first")] == [
                said[name] for name in ("rest", "batches", "first")
            ]


def test_everything_that_is_written_down_is_looked_at() -> None:
    assert set(texts.load("orders")) == set(orders.KINDS)
    assert set(STATES) == set(states.KINDS)
