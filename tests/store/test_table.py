"""A table of objects reads like the list that it was made of, however it was cut, joined, sent or pickled."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.protocol import ObjectRows
from fastload.store.table import ROWS_AT_ONCE, ObjectTable, Texts
from fastload.store.types import ObjectInfo

texts = st.text(st.characters(codec="utf-8"), max_size=6)
infos = st.builds(ObjectInfo, texts, st.integers(0, 2**62), st.none() | texts, st.integers(-(2**62), 2**62))


@given(st.lists(infos, max_size=8), st.data())
def test_it_reads_like_a_list(objects: list[ObjectInfo], data: st.DataObject) -> None:
    table = ObjectTable.of(objects)
    start, stop = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    numbers = data.draw(st.lists(st.integers(0, len(objects) - 1), max_size=5)) if objects else []
    assert list(table) == objects
    assert [table[number] for number in range(-len(table), len(table))] == objects * 2
    cut = table[start:stop]
    for same in (
        cut,
        pickle.loads(pickle.dumps(cut)),
        ObjectRows.of(cut).table(),
        ObjectTable.joined([cut, table[:0]]),
    ):
        assert list(same) == objects[start:stop]
        assert same == cut
    assert list(table.take(np.array(numbers, np.int64))) == [objects[number] for number in numbers]
    assert list(ObjectTable.joined([cut, table])) == objects[start:stop] + objects
    assert (cut == table) == (objects[start:stop] == objects)
    with pytest.raises(IndexError):
        table[len(table)]


def test_more_rows_than_are_made_at_once() -> None:
    objects = [
        ObjectInfo(f"s3://b/é{number}", number, None if number % 3 else f'"{number}"') for number in range(25_000)
    ]
    table = ObjectTable.of(iter(objects))
    assert [len(rows) for rows in table.rows()] == [ROWS_AT_ONCE, ROWS_AT_ONCE, 5000]
    assert list(table) == objects
    assert table[12_345] == objects[12_345]


def test_a_piece_is_pickled_without_the_rest() -> None:
    table = ObjectTable.of([ObjectInfo("x" * 1000, 1)] * 1000)
    assert len(pickle.dumps(table[:1])) < 3000


def test_nothing_can_be_changed() -> None:
    table = ObjectTable.of([ObjectInfo("a", 1)])
    for column in (table.sizes, table.mtimes_ns):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 2


def test_what_tells_versions_apart() -> None:
    def identity(*fields: object) -> object:
        return next(ObjectTable.of([ObjectInfo("u", *fields)]).identities())  # type: ignore[arg-type]

    assert identity(1, '"e"', 5) == identity(1, "e", 6) != identity(2, "e", 5)
    assert identity(1, 'W/"e"', 5) != identity(1, 'W/"e"', 6)
    assert identity(1, None, 5) != identity(1, None, 6)
    assert identity(1, "", 5) == identity(1, None, 5)


@pytest.mark.parametrize("lengths", [[2, 2], [-2, 5], [4], [2, 1]])
def test_texts_that_do_not_fit_their_bytes(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="text"):
        Texts.checked("aé".encode(), np.array(lengths, np.int32))
