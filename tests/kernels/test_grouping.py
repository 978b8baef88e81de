"""Grouping members into samples against plain Python, for names of any bytes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels.grouping import group

PIECES = st.sampled_from([b".", b"/", b"_", b"__", b"a", b"A", b"b", b"\xff", b"\0", b"jpg", b"\xc3\x84"])
NAMES = st.lists(PIECES, max_size=7).map(b"".join)

Grouped = tuple[list[tuple[bytes, list[int]]], list[bytes], list[int]]


def plain(names: list[bytes]) -> Grouped | int:
    """Each sample's key and its members' columns, all columns, and which names are members of samples; or -1 - m where
    name m doubles a column.
    """
    samples: list[tuple[bytes, list[int]]] = []
    columns: list[bytes] = []
    kept = []
    for number, name in enumerate(names):
        base = name.rpartition(b"/")[2]
        stem, dot, ending = base.partition(b".")
        top = name.partition(b"/")[0]
        is_metadata = len(top) >= 4 and top.startswith(b"__") and top.endswith(b"__")
        if not stem or not dot or is_metadata:
            continue
        key, column = name[: len(name) - len(ending) - 1], ending.lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, []))
        if column not in columns:
            columns.append(column)
        if columns.index(column) in samples[-1][1]:
            return -1 - number
        samples[-1][1].append(columns.index(column))
        kept.append(number)
    return samples, columns, kept


def by_kernel(names: list[bytes], seed: int = 5) -> Grouped | int:
    """The same by `group`."""
    count, text = len(names), np.frombuffer(b"".join(names), np.uint8)
    key_bytes, column_bytes = np.empty_like(text), np.empty_like(text)
    key_offsets, member_start = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
    column_ends, last_seen = np.full(count + 2, -1, np.int64), np.full(count, -1, np.int64)
    member_column, kept = np.empty(count, np.int32), np.empty(count + 1, np.int64)
    table = np.full(1 << (2 * count + 1).bit_length(), -1, np.int32)
    found = group(
        text,
        np.cumsum([len(name) for name in names], dtype=np.int64),
        key_bytes,
        key_offsets,
        column_bytes,
        column_ends,
        last_seen,
        member_start,
        member_column,
        table,
        kept,
        seed,
    )
    if found < 0:
        return found
    ends = column_ends[: np.count_nonzero(column_ends >= 0)]
    samples = [
        (
            key_bytes[key_offsets[s] : key_offsets[s + 1]].tobytes(),
            member_column[member_start[s] : member_start[s + 1]].tolist(),
        )
        for s in range(found)
    ]
    columns = [column_bytes[a:b].tobytes() for a, b in pairwise(ends)]
    return samples, columns, kept[: kept[-1]].tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, max_size=10))
def test_the_kernel_is_its_plain_twin(names: list[bytes]) -> None:
    assert by_kernel(names) == plain(names)


def test_more_columns_than_a_few_and_all_in_one_sample() -> None:
    names = [b"key.column%d" % (number * 7919 % 1000) for number in range(1000)]
    assert by_kernel(names) == plain(names)
    assert by_kernel(names, seed=(1 << 62) + 12345) == plain(names)
    assert by_kernel([*names, b"key.COLUMN5"]) == -1001
