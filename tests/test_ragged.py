"""`Ragged` is a sequence, and two arrays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged, presence

_bytes = st.lists(st.binary(max_size=8), max_size=8)
_rows = st.lists(hnp.arrays(np.int32, st.integers(0, 4)), min_size=1, max_size=6)
_shaped = st.lists(hnp.arrays(np.int16, hnp.array_shapes(min_side=0, max_side=3)), min_size=1, max_size=5)
_same_but_first = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(
    lambda lengths: [np.arange(6 * length).reshape(length, 2, 3) for length in lengths]
)
_index = st.integers(-10, 10) | st.none()


@settings(deadline=None)
@given(_bytes, _index, _index, st.sampled_from([None, 1, 2, -1, -3]))
def test_reads_as_the_list_of_its_bytes(
    items: list[bytes], start: int | None, stop: int | None, step: int | None
) -> None:
    batch = Ragged.from_items(items)
    assert len(batch) == len(items)
    assert list(batch) == batch.tolist() == items
    assert list(reversed(batch)) == items[::-1]
    assert batch == items
    assert batch[start:stop:step] == items[start:stop:step]
    assert all((item in batch) and batch[number] == item for number, item in enumerate(items))
    assert [batch[-number - 1] for number in range(len(items))] == items[::-1]
    assert b"not in there" not in batch
    assert batch.values.tobytes() == b"".join(items)
    assert batch.lengths.tolist() == list(map(len, items))


@settings(deadline=None)
@given(_rows | _shaped)
def test_reads_as_the_list_of_its_arrays(items: list[np.ndarray]) -> None:
    batch = Ragged.from_items(items)
    assert batch.kind == "array"
    for mine, theirs in zip(batch, items, strict=True):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.shape == theirs.shape
        assert mine.flags.writeable
    assert batch[::2] == Ragged.from_items(items[::2])
    assert Ragged.concatenate([batch, batch]) == [*batch, *batch]


_some_missing = st.lists(st.none() | st.binary(max_size=4), max_size=8)
_arrays_missing = st.lists(st.none() | hnp.arrays(np.int32, st.integers(0, 3)), min_size=1, max_size=6)
_shaped_missing = st.lists(st.none() | hnp.arrays(np.int16, st.tuples(st.integers(0, 2), st.just(2))), max_size=5)


@settings(deadline=None)
@given(_some_missing | _arrays_missing | _shaped_missing, _index, _index, st.sampled_from([None, 1, 2, -1, -3]))
def test_items_that_are_missing_are_empty_and_stay_marked(items: list[Any], start: Any, stop: Any, step: Any) -> None:
    batch = Ragged.from_items(items)
    there = [item is not None for item in items]
    assert (batch.present is None) == all(there)
    assert np.array_equal(presence(batch), there)
    for mine, item in zip(batch, items, strict=True):
        assert len(mine) == 0 if item is None else np.array_equal(mine, item)
    assert [item is not None for item in batch.tolist()] == there
    assert (None in batch) == (not all(there))
    assert batch == items
    assert batch == batch.tolist()
    assert batch == list(batch)
    for made, same in (
        (batch[start:stop:step], items[start:stop:step]),
        (Ragged.concatenate([batch, batch[:0], batch]), items * 2),
        (pickle.loads(pickle.dumps(batch)), items),
        (copy.deepcopy(batch), items),
    ):
        assert made == same
        assert np.array_equal(presence(made), [item is not None for item in same])
    if batch.present is not None:
        assert f", {there.count(False)} missing, " in repr(batch)
        filled = Ragged(batch.values, batch.offsets, batch.shapes, batch.kind)
        assert filled != batch
        assert filled == list(batch)
        assert filled != items
    if batch.shapes is None:
        arrow = batch.to_arrow()
        arrow.validate(full=True)
        assert arrow.to_pylist() == [item.tolist() if hasattr(item, "tolist") else item for item in batch.tolist()]
    if items:
        assert [len(part) for part in batch.to_nested().unbind()] == [0 if i is None else len(i) for i in items]


def test_a_pickle_from_before_there_was_a_mask() -> None:
    arguments = Ragged.from_items([b"a", b""]).__reduce__()[1]
    assert Ragged(*arguments[:4]).present is None


def test_what_is_spread_goes_where_it_is_said() -> None:
    batch = Ragged.from_items([b"a", None]).spread(np.array([False, True, False, True]))
    assert batch.tolist() == [None, b"a", None, None]
    assert np.shares_memory(batch.spread(np.ones(4, np.bool_)).values, batch.values)
    for present in ([True] * 3, [1, 1, 1, 1]):
        with pytest.raises(ConfigError, match="4 items"):
            batch.spread(np.array(present))


def test_array_items_are_views_and_bytes_items_are_not() -> None:
    batch = Ragged.from_items([np.arange(2), np.arange(3)])
    batch[1][0] = 7
    assert batch.values.tolist() == [0, 1, 7, 1, 2]
    assert np.shares_memory(batch[1:].values, batch.values)
    assert not np.shares_memory(batch[::2].values, batch.values)
    assert isinstance(Ragged.from_items([b"a"])[0], bytes)


def test_numbers_beyond_the_ends() -> None:
    batch = Ragged.from_items([b"a", b"b"])
    for number in (2, -3):
        with pytest.raises(IndexError, match="of 2 items"):
            batch[number]
    with pytest.raises((TypeError, AttributeError)):
        batch["a"]  # type: ignore[call-overload]
    assert batch[np.int64(1)] == b"b"


@settings(deadline=None)
@given(_bytes)
def test_pickles(items: list[bytes]) -> None:
    again = pickle.loads(pickle.dumps(Ragged.from_items(items)))
    assert again == items
    assert again.values.flags.writeable


def test_equality() -> None:
    batch = Ragged.from_items([b"a", b""])
    assert batch == (b"a", b"")
    assert batch != [b"a"]
    assert batch != [b"a", None]
    assert batch != "a"
    assert Ragged.from_items([np.arange(2)]) != [np.arange(3)]
    assert Ragged.from_items([np.arange(2)]) != batch[:1]
    with pytest.raises(TypeError):
        hash(batch)


@settings(deadline=None)
@given(_bytes, _index, _index)
def test_bytes_to_arrow_without_a_copy(items: list[bytes], start: int | None, stop: int | None) -> None:
    batch, items = Ragged.from_items(items)[start:stop], items[start:stop]
    arrow = batch.to_arrow()
    arrow.validate(full=True)
    assert arrow.type == pa.large_binary()
    assert arrow.to_pylist() == items
    if len(batch.values):
        assert arrow.buffers()[2].address == batch.values.ctypes.data


@settings(deadline=None)
@given(_rows, _index, _index)
def test_arrays_to_arrow_without_a_copy(items: list[np.ndarray], start: int | None, stop: int | None) -> None:
    batch, items = Ragged.from_items(items)[start:stop], items[start:stop]
    arrow = batch.to_arrow()
    arrow.validate(full=True)
    assert arrow.type == pa.large_list(pa.int32())
    assert arrow.to_pylist() == [item.tolist() for item in items]
    if len(batch.values):
        assert arrow.values.buffers()[1].address == batch.values.ctypes.data


def test_text_to_arrow_without_a_copy() -> None:
    batch = Ragged.from_items([text.encode() for text in ("é", "", "ab", "é")])[1:]
    arrow = batch.to_arrow(text=True)
    assert arrow.type == pa.large_string()
    assert arrow.to_pylist() == ["", "ab", "é"]
    assert arrow.buffers()[2].address == batch.values.ctypes.data
    with pytest.raises(DecodeError, match="string index 1; to_arrow\\(\\) gives the bytes"):
        Ragged.from_items([b"a", b"\xff"]).to_arrow(text=True)
    with pytest.raises(ConfigError, match="arrays of float64"):
        Ragged.from_items([np.zeros(2)]).to_arrow(text=True)


def test_what_has_no_arrow_type() -> None:
    for item in (np.zeros((2, 2)), np.zeros(2, complex)):
        with pytest.raises(ConfigError, match="several dimensions, and of complex"):
            Ragged.from_items([item]).to_arrow()


@settings(deadline=None)
@given(_bytes | _rows | _same_but_first, _index, _index)
def test_to_nested_without_a_copy(items: list[bytes] | list[np.ndarray], start: int | None, stop: int | None) -> None:
    batch = Ragged.from_items(items)[start:stop]
    nested = batch.to_nested()
    assert nested.is_nested
    assert nested.layout == torch.jagged
    parts = nested.unbind()
    assert len(parts) == len(batch)
    for mine, part in zip(batch.to_numpy(), parts, strict=True):
        np.testing.assert_array_equal(part.numpy(), mine)
        assert part.dtype == torch.from_numpy(batch.values).dtype
    if len(batch.values):
        assert nested.values().data_ptr() == batch.values.ctypes.data
        nested.values().fill_(1)
        assert (batch.values == 1).all()


@pytest.mark.parametrize("shapes", [[(2, 3), (2, 2)], [(2,), (1, 2)], [()], [(2, 0)]])
def test_what_is_no_nested_tensor(shapes: list[tuple[int, ...]]) -> None:
    batch = Ragged.from_items([*map(np.zeros, shapes), np.zeros((1, 1))])
    with pytest.raises(ConfigError, match="no nested tensor"):
        batch.to_nested()


@settings(deadline=None)
@given(_bytes | _rows | _shaped)
def test_to_numpy_without_a_copy(items: list[bytes] | list[np.ndarray]) -> None:
    batch = Ragged.from_items(items)
    arrays = batch.to_numpy()
    assert len(arrays) == len(items)
    for array, item in zip(arrays, items, strict=True):
        expected = np.frombuffer(item, np.uint8) if isinstance(item, bytes) else item
        np.testing.assert_array_equal(array, expected)
        assert not array.size or np.shares_memory(array, batch.values)


def test_items_of_one_shape_are_one_array_without_a_copy() -> None:
    batch = Ragged.from_items([b"ab", b"cd", b"ef"])
    whole = np.asarray(batch[1:])
    assert whole.tolist() == [[99, 100], [101, 102]]
    whole[:] = 65
    assert batch == [b"ab", b"AA", b"AA"]
    assert not np.shares_memory(np.array(batch), batch.values)
    assert np.asarray(batch, np.float32).dtype == np.float32
    assert np.asarray(Ragged.from_items([np.zeros((2, 3))] * 4)).shape == (4, 2, 3)
    assert np.asarray(Ragged.from_items([])).shape == (0, 0)
    with pytest.raises(ConfigError, match="2 shapes"):
        np.asarray(Ragged.from_items([b"a", b"bc"]))


@pytest.mark.parametrize(
    ("values", "offsets", "shapes", "kind", "message"),
    [
        (b"ab", [0, 2], None, "bytes", "not a bytes"),
        (np.zeros((2, 2), np.uint8), [0, 2], None, "bytes", r"shape \(2, 2\)"),
        (np.zeros(4, np.uint8)[::2], [0, 2], None, "bytes", "contiguous"),
        (np.zeros(2), [0, 2], None, "bytes", "must be uint8, not float64"),
        (np.zeros(2, np.uint8), [0, 3], None, "bytes", "not 0 ... 3"),
        (np.zeros(2, np.uint8), [1, 2], None, "bytes", "start at 0"),
        (np.zeros(0, np.uint8), [], None, "bytes", "offsets"),
        (np.zeros(2, np.uint8), [0, 3, 2], None, "bytes", "never fall"),
        (np.zeros(2, np.uint8), [0, 2], [(2,)], "bytes", "shapes"),
        (np.zeros(4), [0, 4], [(3, 1)], "array", "shapes"),
        (np.zeros(4), [0, 4], [(2, 2), (0,)], "array", "shapes"),
        (np.zeros(4), [0, 4], None, "strings", "kind="),
    ],
)
def test_what_does_not_fit_together(
    values: object, offsets: list[int], shapes: object, kind: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Ragged(values, np.array(offsets, np.int64), shapes, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("present", "message"),
    [([True], r"bool\[2\]"), ([1, 0], r"not int64\[2\]"), ([[True, True]], r"bool\[1, 2\]"), ([True, False], "empty")],
)
def test_masks_that_do_not_fit(present: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ragged(np.zeros(2, np.uint8), np.array([0, 1, 2]), present=np.array(present))


def test_items_and_parts_must_be_of_one_kind() -> None:
    with pytest.raises(ConfigError, match="dtypes"):
        Ragged.from_items([np.zeros(1), np.zeros(1, np.int8)])
    with pytest.raises(ConfigError, match="cannot join"):
        Ragged.concatenate([Ragged.from_items([b"a"]), Ragged.from_items([np.zeros(1)])])


def test_torchs_pinning_keeps_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *device: self.clone())
    batch = Ragged.from_items([b"a", None, b"bc"])
    pinned = pin_memory({"txt": batch})["txt"]
    assert isinstance(pinned, Ragged)
    assert pinned == batch
    assert not np.shares_memory(pinned.values, batch.values)


def test_repr() -> None:
    assert repr(Ragged.from_items([b"a", b"bc"])) == "Ragged(2 items, bytes, 3 bytes)"
    assert repr(Ragged.from_items([np.zeros(2)])) == "Ragged(1 items, array, float64, 16 bytes)"
