"""What is written down in `tests/golden` is so still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.golden import figures, formats, frames, orders, signatures, states, texts

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata with a newer torch

FORMATS = texts.texts_put_back(texts.load("formats"))
STATES = texts.texts_put_back(texts.load("states"))
TORCHDATA = texts.texts_put_back(texts.load("torchdata"))


def same(found: Any, recorded: Any) -> None:
    """Assert it entry by entry, so that the first that differs is named."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        assert set(found) == set(recorded)
        for name, each in recorded.items():
            assert found[name] == each, name
    assert found == recorded


def without(value: Any, name: str) -> Any:
    """The same without the entries of this name, however deep."""
    if isinstance(value, dict):
        return {key: without(each, name) for key, each in value.items() if key != name}
    return [without(each, name) for each in value] if isinstance(value, list) else value


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
    """But for what a worker says when it has read all: that may come before the state is asked for, or after."""
    said = {name: each["said"] for name, each in TORCHDATA.items()}
    resumed = {name: each["resumed"] for name, each in TORCHDATA.items()}
    same(without(states.resume_torchdata(said), "fetcher_ended"), without(resumed, "fetcher_ended"))


def test_what_was_recorded_goes_on_where_it_was() -> None:
    """But for an epoch that is over: what is loaded then is the next one."""
    recorded = [of for kind in STATES.values() for each in kind.values() for of in each.values()]
    for each in [*recorded, *TORCHDATA.values()]:
        said, resumed = each["said"], each["resumed"]
        if said["batches"]:
            assert [resumed[name] for name in ("rest", "batches", "first")] == [
                said[name] for name in ("rest", "batches", "first")
            ]


@pytest.mark.parametrize("side", frames.SIDES)
def test_frames(tmp_path: Path, side: str) -> None:
    recorded = texts.load("frames")
    same(frames.record(tmp_path), recorded)
    same(frames.read(side, recorded[side]), frames.messages(side))


@pytest.mark.parametrize("kind", formats.KINDS)
def test_files_are_what_they_were(tmp_path: Path, kind: str) -> None:
    found, recorded = formats.record_kind(tmp_path / "files", kind), dict(FORMATS[kind])
    if kind == "run":
        del found["file"], recorded["file"]
    same(found, recorded)


@pytest.mark.parametrize("kind", formats.KINDS)
def test_files_of_before_are_read(tmp_path: Path, kind: str) -> None:
    found, expected = formats.read_kind(tmp_path / "files", kind, FORMATS[kind])
    assert found == expected


def test_figures(tmp_path: Path) -> None:
    same(figures.record(tmp_path), texts.load("figures"))


@pytest.mark.parametrize("what", texts.load("signatures"))
def test_signatures(signatures_here: dict[str, Any], what: str) -> None:
    same(signatures_here[what], texts.load("signatures")[what])


@pytest.fixture(scope="module")
def signatures_here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return signatures.record(tmp_path_factory.mktemp("signatures"))


def test_everything_that_is_written_down_is_looked_at() -> None:
    assert set(texts.load("orders")) == set(orders.KINDS)
    assert set(STATES) == set(states.KINDS)
    assert set(FORMATS) == set(formats.KINDS)
    for side, (values, _, _) in frames.SIDES.items():
        assert set(frames.kinds(side)) == set(values)
