"""The samples of a batch, found in windows by compiled walks over tables, against plain Python over the indexes."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import MissingColumnError
from fastload.formats import ShardIndex
from fastload.pipeline.names import UrlTable
from fastload.pipeline.windows import LiveWindows, LocatedSamples, Window
from fastload.plan import BatchEntry
from tests.formats.archives import members_of

COLUMNS = ("jpg", "cls", "txt")
# Keys as they stand in shards: any bytes but NUL, also such as are no UTF-8, alone or across two keys.
KEYS = st.binary(max_size=6).filter(lambda key: b"\0" not in key) | st.just(b"a/0001") | st.just("ä".encode()[:1])
SAMPLES = st.tuples(KEYS, st.sets(st.sampled_from(COLUMNS), min_size=1))
SHARDS = st.lists(st.lists(SAMPLES, max_size=5), min_size=1, max_size=5)


def index_of(samples: list[tuple[bytes, set[str]]], columns: tuple[str, ...]) -> ShardIndex:
    """A shard of these samples, whose members follow one another and are as long as they have numbers."""
    members = [columns.index(name) for _, names in samples for name in sorted(names)]
    sizes = np.arange(len(members), dtype=np.int64)
    return ShardIndex(
        columns,
        np.frombuffer(b"".join(key for key, _ in samples), np.uint8).copy(),
        np.cumsum([0, *(len(key) for key, _ in samples)], dtype=np.int64),
        np.cumsum([0, *(len(names) for _, names in samples)], dtype=np.int64),
        np.array(members, np.int32),
        np.cumsum(sizes) - sizes,
        sizes,
        int(sizes.sum()),
    )


def entry_of(chosen: list[tuple[int, int]]) -> BatchEntry:
    objects, numbers = (np.array([pair[i] for pair in chosen], dtype) for i, dtype in ((0, np.int32), (1, np.int64)))
    return BatchEntry(0, objects, numbers, 0, (), 0)


def urls_of(object_nos: Any) -> list[str]:
    return [f"s3://b/{number}" for number in object_nos.tolist()]


def open_windows(indexes: list[ShardIndex], window_of: list[int]) -> LiveWindows:
    """Shard i is object i, begins with chunk 10 i, and lies in window `window_of[i]`, behind those before it."""
    live = LiveWindows(len(indexes))
    for key in sorted(set(window_of)):
        mine = np.flatnonzero(np.array(window_of) == key)[::-1]
        live.open(Window(key, mine, [indexes[number] for number in mine], 10 * mine, np.empty(0, np.int64)))
    return live


@settings(max_examples=100, deadline=None)
@given(SHARDS, st.data(), st.permutations(COLUMNS))
def test_they_are_those_of_the_indexes(shards: list[list[Any]], data: st.DataObject, order: list[str]) -> None:
    indexes = [index_of(samples, tuple(order if n % 2 else COLUMNS)) for n, samples in enumerate(shards)]
    live = open_windows(indexes, [data.draw(st.integers(0, 2)) for _ in shards])
    all_samples = [(shard, number) for shard, samples in enumerate(shards) for number in range(len(samples))]
    chosen = data.draw(st.lists(st.sampled_from(all_samples), max_size=12)) if all_samples else []
    located = LocatedSamples(entry_of(chosen), live, UrlTable(urls_of))
    for names in (located.names(), pickle.loads(pickle.dumps(located.names()))):
        assert names.keys() == [indexes[shard].key(number) for shard, number in chosen]
        assert names.urls() == [f"s3://b/{shard}" for shard, _ in chosen]
    assert set(located.present()) <= set(COLUMNS)
    names = (*data.draw(st.permutations(COLUMNS)), "not there")
    values, missing = located.values_of(names)
    assert missing == (values.offset < 0).sum()
    for column, first_chunk, offset, size in zip(names, values.first_chunk, values.offset, values.size, strict=True):
        assert first_chunk.tolist() == [10 * shard for shard, _ in chosen]
        members = [members_of(indexes[shard], column)[number] for shard, number in chosen]
        places = [
            (int(indexes[shard].member_offset[member]), int(indexes[shard].member_size[member]))
            if member >= 0
            else (-1, 0)
            for (shard, _), member in zip(chosen, members, strict=True)
        ]
        assert list(zip(offset.tolist(), size.tolist(), strict=True)) == places


def test_the_urls_of_very_many_shards_are_not_kept() -> None:
    asked: list[int] = []

    def counting(object_nos: Any) -> list[str]:
        asked.append(len(object_nos))
        return urls_of(object_nos)

    table = UrlTable(counting)
    for numbers in ([4999, 0, 4999], [0, 1], [4999]):
        urls = table.of(np.array(numbers))
        assert urls == urls_of(np.array(numbers))
    assert asked == [2, 1]  # each once
    assert urls[0] is table.of(np.array([4999]))[0]
    many = np.arange(5000)
    assert table.of(many) == urls_of(many)
    assert asked == [2, 1, 5000]
    table.of(many[:5])
    table.of(many[:5])
    assert sum(asked) < 5000 + 20


@pytest.mark.parametrize("number", [-1, 3, 1 << 40])
def test_a_sample_that_is_not_there_is_an_error(number: int) -> None:
    live = open_windows([index_of([(b"k", {"cls"})] * 3, COLUMNS)], [0])
    located = LocatedSamples(entry_of([(0, 2), (0, number)]), live, UrlTable(urls_of))
    for look in (located.names().keys, lambda: located.values_of(("cls",))):
        with pytest.raises(IndexError, match=f"row {number}"):
            look()


def test_a_batch_in_the_making_when_all_is_closed_finds_nothing() -> None:
    live = open_windows([index_of([(b"k", {"jpg"})], ("jpg",)) for _ in range(2)], [0, 1])
    live.close_all()
    with pytest.raises(AssertionError, match="in no open window"):
        live.find(np.array([0, 1], np.int32), np.zeros(2, np.int64))


def test_many_columns_take_no_longer_than_many_members() -> None:
    """A shard may have any number of columns. Looked up one in all the others, these take minutes."""
    columns = tuple(f"c{number}" for number in range(100_000))
    live = open_windows([index_of_columns(columns, 1)], [0])
    located = LocatedSamples(entry_of([(0, 0)]), live, UrlTable(urls_of))
    assert located.all_columns() == columns
    values, missing = located.values_of(columns)
    assert missing == 0
    assert values.offset.tolist() == [[number] for number in range(100_000)]


def test_columns_that_most_samples_lack_take_no_table_of_all() -> None:
    """Such as come from dots within keys: a table of all columns of all samples would have 10 ** 10 places."""
    columns = tuple(f"{number}.jpg" for number in range(100_000))
    live = open_windows([index_of_columns(columns, len(columns))], [0])
    located = LocatedSamples(entry_of([(0, 5)]), live, UrlTable(urls_of))
    with pytest.raises(
        MissingColumnError, match=r"s3://b/0: .* 100000 columns, .* and 99980 more\. .*columns=\["
    ) as told:
        located.all_columns()
    assert len(str(told.value)) < 1000
    # Those that are named are found all the same.
    values, missing = located.values_of(("5.jpg",))
    assert (missing, values.offset.tolist()) == (0, [[5]])


def index_of_columns(columns: tuple[str, ...], samples: int) -> ShardIndex:
    """A shard of one member a column, in so many samples: one, or one for each."""
    count = len(columns)
    starts = np.linspace(0, count, samples + 1).astype(np.int64)
    numbers = np.arange(count, dtype=np.int64)
    sizes = np.ones(count, np.int64)
    keys = np.frombuffer(b"k" * samples, np.uint8).copy()
    return ShardIndex(columns, keys, np.arange(samples + 1), starts, numbers.astype(np.int32), numbers, sizes, count)
