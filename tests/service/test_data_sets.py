"""What is held by data set: counted as chunks come and go, and so at all times what a recount gives."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.cache import ChunkKey
from fastload.cache.catalog import UNKNOWN
from fastload.service.holding import data_sets
from fastload.service.holding.data_sets import OTHERS, DataSets

CHUNK = 100
SIZES = {bytes([number]) * 16: 50 + 90 * number for number in range(5)}  # one to five chunks, the last one short
HOMES = {key: f"s3://b/{'even' if key[0] % 2 == 0 else 'odd'}/" for key in SIZES}
OBJECT = st.sampled_from(list(SIZES))
STEP = st.one_of(
    st.tuples(st.just("disk"), OBJECT, st.integers(0, 4)),
    st.tuples(st.just("ram"), OBJECT, st.integers(0, 4)),
    st.tuples(st.just("learn"), OBJECT),
    st.tuples(st.just("label"), OBJECT),
    st.tuples(st.just("pin"), OBJECT),
    st.tuples(st.just("use"), OBJECT, st.integers(1, 100)),
)


def length(key: bytes, index: int, *, known: bool) -> int:
    return min(CHUNK, SIZES[key] - index * CHUNK) if known else CHUNK


@given(st.lists(STEP, max_size=60))
def test_counts_are_what_a_recount_gives(steps: list[tuple[object, ...]]) -> None:
    disk: dict[bytes, set[int]] = {key: set() for key in SIZES}
    ram: dict[bytes, set[int]] = {key: set() for key in SIZES}
    pinned: set[bytes] = set()
    labels: set[bytes] = set()
    known: set[bytes] = set()
    sets = DataSets(CHUNK, lambda key: disk[key])
    for step in steps:
        match step:
            case ("disk", bytes(key), int(index)) if index * CHUNK < SIZES[key]:
                times = -1 if index in disk[key] else 1
                disk[key] ^= {index}
                sets.on_disk(ChunkKey(key, index), times)
            case ("ram", bytes(key), int(index)) if index * CHUNK < SIZES[key]:
                if key not in sets:
                    sets.learn(key, SIZES[key], HOMES[key], pin="pin" if key in pinned else None)
                    known.add(key)
                times = -1 if index in ram[key] else 1
                ram[key] ^= {index}
                sets.in_ram(key, times * length(key, index, known=True))
            case ("learn" | "label" as what, bytes(key)) if disk[key] or ram[key] or key in pinned:
                pin = "pin" if key in pinned else None
                if what == "label":
                    labels.add(key)
                    sets.learn(key, SIZES[key], "label", is_given=True, pin=pin)
                else:
                    sets.learn(key, SIZES[key], HOMES[key], pin=pin)
                known.add(key)
            case ("pin", bytes(key)):
                pinned ^= {key}
                if key in pinned:
                    sets.learn(key, SIZES[key], HOMES[key], pin="pin")
                    known.add(key)
                else:
                    sets.pin(key, None)
            case ("use", bytes(key), int(at)):
                sets.use(key, at)
        here = {key for key in SIZES if disk[key] or ram[key] or key in pinned}
        known &= here
        labels &= here
        expected: dict[str, list[int]] = {}
        for key in here:
            name = UNKNOWN
            if key in known:
                name = "pin" if key in pinned else "label" if key in labels else HOMES[key]
            row = expected.setdefault(name, [0] * 5)
            row[0] += 1
            row[1] += SIZES[key] if key in known else 0
            row[2] += sum(length(key, index, known=True) for index in ram[key])
            row[3] += sum(length(key, index, known=key in known) for index in disk[key])
            row[4] += SIZES[key] if key in pinned else 0
        found = {
            row.name: [row.object_count, row.byte_count, row.ram_bytes, row.disk_bytes, row.pinned_bytes]
            for row in sets.rows()
        }
        assert found == expected
        assert sets.pinned_disk_bytes == sum(length(k, i, known=True) for k in pinned for i in disk[k])
        assert {key for key in SIZES if key in sets} == known


@pytest.mark.parametrize("count", [5, data_sets.ROWS_MAX + 50])
def test_more_folders_than_rows_are_summed_under_one(count: int) -> None:
    held: dict[bytes, set[int]] = {}
    sets = DataSets(CHUNK, lambda key: held.get(key, set()))
    keys = [random.Random(number).randbytes(16) for number in range(count)]
    for number, key in enumerate(keys):
        held[key] = {0}
        sets.on_disk(ChunkKey(key, 0), 1)
        sets.learn(key, 10, f"s3://b/{number}/")
    rows = {row.name: row for row in sets.rows()}
    assert len(rows) <= data_sets.ROWS_MAX + 2
    assert sum(row.disk_bytes for row in rows.values()) == 10 * count
    assert (OTHERS in rows) is (count > data_sets.ROWS_MAX)
    for key in keys:
        held[key] = set()
        sets.on_disk(ChunkKey(key, 0), -1)
    assert sets.rows() == []
