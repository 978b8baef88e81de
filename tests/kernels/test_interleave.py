"""Batches put together from parts, against plain Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels.interleave import interleave_offsets, interleave_rows, interleave_values
from fastload.kernels.yielding import yield_state

PARTS = st.lists(st.lists(st.binary(max_size=9), max_size=6), min_size=1, max_size=4)


def addresses(arrays: list[np.ndarray]) -> np.ndarray:
    return np.array([array.ctypes.data for array in arrays])


def zeros(parts: list) -> np.ndarray:
    return np.zeros(len(parts), np.int64)


def offsets_of(items: list[bytes]) -> np.ndarray:
    return np.cumsum([0, *map(len, items)])


def shuffled(parts: list[list[bytes]], seed: int) -> tuple[np.ndarray, list[bytes]]:
    """Which part each item of the whole is of, and the items."""
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    part_of = np.random.default_rng(seed).permutation(part_of).astype(np.int32)
    items = [iter(part) for part in parts]
    return part_of, [next(items[part]) for part in part_of]


@settings(max_examples=100, deadline=None)
@given(PARTS, st.integers(0, 99))
def test_items_of_any_length(parts: list[list[bytes]], seed: int) -> None:
    part_of, expected = shuffled(parts, seed)
    starts = [offsets_of(part) for part in parts]
    counts = np.array([len(part) for part in parts])
    offsets = np.empty(len(expected) + 1, np.int64)
    assert interleave_offsets(part_of, addresses(starts), counts, zeros(parts), offsets) == -1
    assert offsets.tolist() == offsets_of(expected).tolist()

    wide = [np.frombuffer(b"".join(part), np.uint8).astype(np.uint16) for part in parts]
    sizes = np.array([array.nbytes for array in wide])
    out = np.zeros(len(b"".join(expected)), np.uint16)
    wide_parts = part_of, addresses(wide), sizes
    assert interleave_values(yield_state, *wide_parts, offsets, 2, zeros(parts), out.view(np.uint8)) == -1
    assert out.tolist() == list(b"".join(expected))


@settings(max_examples=100, deadline=None)
@given(PARTS, st.integers(0, 99))
def test_rows_of_one_size(parts: list[list[bytes]], seed: int) -> None:
    padded = [[item.ljust(9) for item in part] for part in parts]
    part_of, expected = shuffled(padded, seed)
    arrays = [np.frombuffer(b"".join(part), np.uint8) for part in padded]
    out = np.zeros(9 * len(expected), np.uint8)
    assert interleave_rows(part_of, addresses(arrays), np.array(list(map(len, arrays))), 9, zeros(parts), out) == -1
    assert out.tobytes() == b"".join(expected)


def test_what_a_part_does_not_have_is_refused() -> None:
    rows = np.arange(6, dtype=np.uint8)  # two rows of three bytes
    where, sizes, out = addresses([rows]), np.array([6]), np.zeros(9, np.uint8)
    for part_of, wrong in (([0, 0, 0], 2), ([0, 1], 1), ([0, -1], 1)):
        order = np.array(part_of, np.int32)
        assert interleave_rows(order, where, sizes, 3, zeros([0]), out) == wrong
        assert interleave_values(yield_state, order, where, sizes, np.arange(4) * 3, 1, zeros([0]), out) == wrong
    assert interleave_rows(np.zeros(2, np.int32), where, sizes, 3, zeros([0]), out[:5]) == 1
    first = np.zeros(2, np.int32), where, sizes
    assert interleave_values(yield_state, *first, np.array([0, 3, 6]), 1, zeros([0]), out[:5]) == 1
    assert interleave_values(yield_state, *first, np.array([3, 0, 3]), 1, zeros([0]), out) == 0
    starts = np.array([0, 1, 2])
    assert (
        interleave_offsets(np.zeros(3, np.int32), addresses([starts]), np.array([2]), zeros([0]), np.zeros(4, np.int64))
        == 2
    )
