"""The states of a chunk: every event in every state, and that nothing but the chunk writes them."""

from __future__ import annotations

import ast
import enum
from collections.abc import Callable
from pathlib import Path

import pytest

from fastload import protocol, service
from fastload.service.state import (
    TRANSITIONS,
    Chunk,
    ChunkState,
    ConsumerState,
    ObjectEntry,
    RecallState,
    WriteState,
)
from fastload.store.types import ObjectInfo

FIELD_OF: dict[type[enum.Enum], str] = {ChunkState: "state", WriteState: "write", RecallState: "recalled"}
OCCUR: dict[str, Callable[[Chunk], None]] = {
    "begin_load": lambda chunk: chunk.begin_load(1, "options"),
    "finish_load": Chunk.finish_load,
    "abort_load": Chunk.abort_load,
    "evict": Chunk.evict,
    "queue_write": Chunk.queue_write,
    "begin_write": Chunk.begin_write,
    "cancel_write": Chunk.cancel_write,
    "abandon_write": Chunk.abandon_write,
    "finish_write": Chunk.finish_write,
    "recall": Chunk.recall,
    "pin": Chunk.pin,
    "end_recall": Chunk.end_recall,
}
CASES = [
    (event, before)
    for event, row in TRANSITIONS.items()
    for before in type(next(iter(row)))  # every state of the enum that the event is about
]


def consumer() -> ConsumerState:
    return ConsumerState(protocol.Hello(protocol.VERSION, 1, "", {}), "options", lambda message: None)


def chunk_in(before: enum.Enum) -> Chunk:
    """A chunk with one field in this state, and nothing else in the way of any event."""
    chunk = ObjectEntry(ObjectInfo("a", 100), b"a" * 16, 100, {}).chunk(0)
    if not isinstance(before, ChunkState):
        chunk.state = ChunkState.RESIDENT
    if isinstance(before, RecallState):
        chunk.lease((consumer(), 0), protocol.SOURCE_RAM)
    setattr(chunk, FIELD_OF[type(before)], before)
    return chunk


def states(chunk: Chunk) -> dict[str, enum.Enum]:
    return {field: getattr(chunk, field) for field in FIELD_OF.values()}


def test_every_event_is_tried() -> None:
    assert OCCUR.keys() == TRANSITIONS.keys()


@pytest.mark.parametrize(("event", "before"), CASES)
def test_an_event_changes_one_state_as_the_table_says_and_is_refused_elsewhere(event: str, before: enum.Enum) -> None:
    chunk = chunk_in(before)
    expected = states(chunk)
    after = TRANSITIONS[event].get(before)
    if after is None:
        with pytest.raises(AssertionError, match=event):
            OCCUR[event](chunk)
    else:
        OCCUR[event](chunk)
        expected[FIELD_OF[type(before)]] = after
    assert states(chunk) == expected


def test_every_state_is_reached_and_left() -> None:
    for kind in FIELD_OF:
        moves = [(a, b) for row in TRANSITIONS.values() for a, b in row.items() if isinstance(a, kind)]
        assert {type(after) for _, after in moves} == {kind}
        assert {before for before, _ in moves} == {after for _, after in moves} == {*kind}


@pytest.mark.parametrize("write", [state for state in WriteState if state is not WriteState.NONE])
def test_what_is_written_is_not_evicted(write: WriteState) -> None:
    chunk = chunk_in(write)
    with pytest.raises(AssertionError, match="written"):
        chunk.evict()


def test_what_is_leased_is_not_evicted() -> None:
    chunk, holder = chunk_in(ChunkState.RESIDENT), (consumer(), 0)
    chunk.lease(holder, protocol.SOURCE_RAM)
    with pytest.raises(AssertionError, match="leased"):
        chunk.evict()
    chunk.end_lease(holder)
    chunk.evict()


@pytest.mark.parametrize("state", [ChunkState.ABSENT, ChunkState.LOADING])
def test_only_what_is_in_ram_is_leased_or_written(state: ChunkState) -> None:
    chunk = chunk_in(state)
    with pytest.raises(AssertionError, match="RAM"):
        chunk.lease((consumer(), 0), protocol.SOURCE_RAM)
    with pytest.raises(AssertionError, match="RAM"):
        chunk.queue_write()
    with pytest.raises(AssertionError, match="leased"):
        chunk.recall()


def test_a_chunk_has_one_buffer() -> None:
    chunk = chunk_in(ChunkState.LOADING)
    chunk.place(3)
    with pytest.raises(AssertionError, match="one buffer"):
        chunk.place(4)
    assert chunk.displace() == 3
    chunk.place(4)


def test_nothing_else_in_the_service_writes_to_a_chunk() -> None:
    fields = {name for name in Chunk.__slots__ if name not in ("entry", "index")}
    folder = Path(str(service.__file__)).parent
    wrong = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if _writes(node) & fields:
                wrong.append(f"{path.name}:{getattr(node, 'lineno', 0)}")
    assert not wrong, f"a chunk's state is written outside of its class: {wrong}"


CHANGES = ("add", "clear", "discard", "pop", "remove", "setdefault", "update")


def _writes(node: ast.AST) -> set[str]:
    """The fields of something called a chunk that a statement writes or changes in place."""
    match node:
        case ast.Assign(targets=targets) | ast.Delete(targets=targets):
            return {name for target in targets for each in _flat(target) for name in _field(each)}
        case ast.AnnAssign(target=target) | ast.AugAssign(target=target):
            return _field(target)
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in CHANGES:
            return _field(value)
    return set()


def _flat(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple) else [target]


def _field(target: ast.expr) -> set[str]:
    if isinstance(target, ast.Subscript):
        target = target.value
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
        return {target.attr} if target.value.id in ("chunk", "held", "wanted") else set()
    return set()
