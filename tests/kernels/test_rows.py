"""Finding samples in windows, against plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels.rows import fill_places, find_rows, look_up, write_keys
from fastload.kernels.yielding import yield_state

COLUMNS = 3


class Shelf:
    """Windows of whole shards, as tables by object; object 0 lies in none."""

    def __init__(self, seed: int, shards_of: list[int], count: int) -> None:
        random = np.random.default_rng(seed)
        objects = random.permutation(np.arange(1, sum(shards_of) + 1))
        self.window_of = np.full(len(objects) + 1, -1)
        self.first_row_of = np.zeros(len(objects) + 1, np.int64)
        sizes = random.integers(1, 5, len(objects) + 1)
        for window, shards in enumerate(np.split(objects, np.cumsum(shards_of)[:-1])):
            self.window_of[shards] = window
            self.first_row_of[shards] = np.cumsum(sizes[shards]) - sizes[shards]
        self.object_no = random.choice(objects, count).astype(np.int32)
        self.sample_no = random.integers(0, sizes[self.object_no])

    def find(self, object_no: np.ndarray) -> tuple[int, list[int], list[int], np.ndarray]:
        windows = int(self.window_of.max(initial=-1)) + 1
        distinct, ends = np.empty((2, windows), np.int64)
        found = np.empty((2, len(object_no)), np.int64)
        tables = self.window_of, self.first_row_of
        count = find_rows(*tables, object_no, self.sample_no[: len(object_no)], distinct, ends, found)
        return count, distinct[: max(0, count)].tolist(), ends[: max(0, count)].tolist(), found


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 40))
def test_samples_are_sorted_by_their_windows(seed: int, shards_of: list[int], samples: int) -> None:
    shelf = Shelf(seed, shards_of, samples)
    count, distinct, ends, found = shelf.find(shelf.object_no)
    windows = shelf.window_of[shelf.object_no].tolist()
    assert distinct == list(dict.fromkeys(windows))  # as they first come
    assert count == len(distinct)
    for number, start, end in zip(distinct, [0, *ends], ends, strict=False):
        mine, rows = found[:, start:end]
        assert mine.tolist() == [i for i, window in enumerate(windows) if window == number]
        objects = shelf.object_no[mine]
        assert rows.tolist() == (shelf.first_row_of[objects] + shelf.sample_no[mine]).tolist()


@pytest.mark.parametrize("stranger", [0, -1, 2**31 - 1])
def test_a_sample_of_no_window_is_named(stranger: int) -> None:
    shelf = Shelf(1, [2, 2], 5)
    shelf.object_no[3] = stranger
    assert shelf.find(shelf.object_no)[0] == -1 - 3


def places(seed: int, samples: int) -> tuple[list[list[tuple[int, int, int]]], np.ndarray]:
    """The members (column of the shard, offset, size) of each sample of a shard; and its places in columns 4, 0, 2."""
    random = np.random.default_rng(seed)
    members = [
        [(int(c), *random.integers(0, 1000, 2).tolist()) for c in random.permutation(5)[: random.integers(1, 6)]]
        for _ in range(samples)
    ]
    flat = [member for sample in members for member in sample]
    column, offset, size = np.array(flat, np.int64).reshape(-1, 3).T.copy()
    start = np.cumsum([0, *map(len, members)])
    table = np.empty((samples, 1 + 2 * COLUMNS), np.int64)
    wanted = np.array([1, -1, 2, -1, 0])
    fill_places(start, column.astype(np.int32), offset, size, wanted, 77, table)
    return members, table


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 8), st.integers(0, 20))
def test_values_are_looked_up(seed: int, samples: int, count: int) -> None:
    members, table = places(seed, samples)
    random = np.random.default_rng(seed)
    rows = random.integers(0, samples, count if samples else 0)
    to = random.permutation(len(rows) + 2)[: len(rows)]
    first_chunk, offset, size = np.full((3, COLUMNS, len(rows) + 2), 9)
    missing = look_up(yield_state, table, rows, to, first_chunk, offset, size)
    nowhere = 0
    for row, sample in zip(rows.tolist(), to.tolist(), strict=True):
        there = {column: (at, length) for column, at, length in members[row]}
        expected = [there.get(column, (-1, 0)) for column in (4, 0, 2)]
        assert list(zip(offset[:, sample].tolist(), size[:, sample].tolist(), strict=True)) == expected
        assert (first_chunk[:, sample] == 77).all()
        nowhere += expected.count((-1, 0))
    assert missing == nowhere
    others = np.setdiff1d(np.arange(len(rows) + 2), to)
    assert (size[:, others] == 9).all(), "a sample of another window was written"


@pytest.mark.parametrize(("row", "sample"), [(-1, 0), (4, 0), (0, -1), (0, 5), (2**62, 0)])
def test_rows_that_are_none_are_refused(row: int, sample: int) -> None:
    _, table = places(5, 4)
    first_chunk, offset, size = np.zeros((3, COLUMNS, 5), np.int64)
    assert look_up(yield_state, table, np.array([1, row]), np.array([1, sample]), first_chunk, offset, size) == -2


KEYS = [b"a", b"", "é/ü.x".encode(), b"c" * 70, b"d"]
STARTS = np.cumsum([0, *map(len, KEYS)])
KEY_BYTES = np.frombuffer(b"".join(KEYS), np.uint8)


@given(st.lists(st.integers(0, 4), max_size=9))
def test_keys_are_written_with_a_nul_after_each(rows: list[int]) -> None:
    expected = b"".join(KEYS[row] + b"\0" for row in rows)
    text = np.full(len(expected) + 3, 7, np.uint8)
    assert write_keys(yield_state, KEY_BYTES, STARTS, np.array(rows, np.int64), text) == len(expected)
    assert text.tobytes() == expected + b"\7\7\7"


def test_keys_that_are_none_or_too_long_are_refused() -> None:
    for rows, room in (([0, 5], 99), ([0, -1], 99), ([0, 3], 72), ([0, 0], 3)):
        assert write_keys(yield_state, KEY_BYTES, STARTS, np.array(rows), np.zeros(room, np.uint8)) == -2
