"""`make fuzz`: damaged indexes, sidecars and lists of shards through what reads them. See `fuzzing` for how.

    python -m tests.formats.fuzz_readers --seconds 120

What must hold, whatever the bytes: an error of the kind that the reader documents, with the name of the object in it,
or something that leads nobody outside of the object. A stored index is sealed again after most of the damage, so that
it is not the checksum that finds it; damage to a sidecar goes to its structure and to the values of its rows.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from fastload.errors import ConfigError, ShardError
from fastload.formats import ShardIndex, energon, side_index, wids
from fastload.formats.shard_index import HEADER_BYTES, stored_sample_count
from fastload.formats.sidecar import SCHEMA, read_summary
from fastload.store.types import ObjectInfo
from tests.formats import fuzzing, protobuf
from tests.formats.archives import URL, Member, index, members_of, write
from tests.formats.side_indexes import dalis, dalis_of_records, energons

NUMBERS = [-1, 0, 1, 2, 3, 127, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 62), (1 << 63) - 1, -(1 << 63)]
_SHARDS = [
    write([Member("a.x", b"1" * 700), Member("a.é", b"2"), Member("b.x", b"3")]),
    write([Member(f"{number}.x", b"x") for number in range(40)]),
    write([]),
]
_INDEXES = [(index(data).to_bytes(), len(data)) for data in _SHARDS]


def changed(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """Bytes, numbers, cuts, and pieces moved."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        at = rng.randrange(first, len(changed)) if len(changed) > first else len(changed)
        what = rng.random()
        if what < 0.5:
            width, form = rng.choice([(1, "<B"), (4, "<I"), (8, "<Q")])
            at -= (at - first) % width
            number = rng.choice([rng.choice(NUMBERS), rng.getrandbits(64), rng.randrange(300), len(data)])
            if at + width <= len(changed):
                struct.pack_into(form, changed, at, number & (1 << 8 * width) - 1)
        elif what < 0.8:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif what < 0.87:
            del changed[at : at + rng.choice([1, 4, 8, 100])]
        elif what < 0.95:
            changed[at:at] = rng.randbytes(rng.choice([1, 4, 8, 100]))
        else:
            del changed[at:]
    return bytes(changed)


@contextmanager
def expected(kind: type[Exception], start: str) -> Iterator[None]:
    """An error of that kind that starts with that, or none."""
    try:
        yield
    except kind as error:
        message = str(error)
    else:
        message = start
    assert message.startswith(start), message


# Stored indexes.


def make_index(rng: random.Random) -> bytes:
    """A number of a shard, and an index that is damaged behind its checksum, mostly with another one that fits."""
    number = rng.randrange(len(_INDEXES))
    data = changed(_INDEXES[number][0], rng, rng.choice([0, 16, 16, HEADER_BYTES, HEADER_BYTES]))
    if rng.random() < 0.9 and len(data) >= HEADER_BYTES:
        data = data[:8] + struct.pack("<Q", xxhash.xxh3_64_intdigest(data[16:])) + data[16:]
    return bytes([number]) + data


def check_index(data: bytes, rng: random.Random) -> None:
    """Read as an index of that shard, from memory that ends where it ends."""
    size = _INDEXES[data[0] % len(_INDEXES)][1]
    stored = fuzzing.guarded(len(data) - 1, np.uint8, at_end=True)
    stored[:] = np.frombuffer(data, np.uint8)[1:]
    count = stored_sample_count(stored[:HEADER_BYTES].tobytes(), len(stored))
    with expected(ShardError, f"{URL}: its stored index is damaged"):
        found = ShardIndex.from_bytes(memoryview(stored), URL, size)
        check_found(found, size)
        assert found.sample_count == count, f"{found.sample_count} samples, {count} by the header alone"
        assert found.to_bytes() == stored.tobytes(), "not all that was read is in it"


def check_found(found: ShardIndex, size: int) -> None:
    """It leads nobody outside of the object or of its own arrays."""
    assert np.all((found.member_offset >= 0) & (found.member_size >= 0))
    assert np.all(found.member_offset.astype(object) + found.member_size <= size), "a member that leaves the object"
    assert len(found.member_start) == len(found.key_offsets) == found.sample_count + 1
    assert len(found.member_offset) == len(found.member_size) == len(found.member_column) == found.member_count
    for sample in range(found.sample_count):
        assert isinstance(found.key(sample), str)
    for column in found.columns:
        members = members_of(found, column)
        assert np.all((members >= -1) & (members < found.member_count))


# Sidecars.


def _rows(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for number in range(rng.choice([0, 1, 3, 20])):
        data, size = rng.choice(_INDEXES)
        samples = struct.unpack_from("<Q", data, 32)[0]
        row = {"url": f"s3://b/{number}.tar", "size": size, "etag": rng.choice([None, "e", ""]), "mtime_ns": number}
        row |= {"samples": samples, "index_offset": 0, "index_bytes": len(data), "index": data}
        if rng.random() < 0.3:
            row[rng.choice(["size", "mtime_ns", "samples", "index_offset", "index_bytes"])] = rng.choice(NUMBERS)
        rows.append(row)
    return rows


def make_sidecar(rng: random.Random) -> bytes:
    """An Arrow file with a schema that is nearly or quite right, and then damaged, mostly."""
    schema = SCHEMA
    if rng.random() < 0.1:
        at = rng.randrange(len(schema))
        kind = rng.choice([pa.int32(), pa.utf8(), pa.large_utf8(), pa.binary(), pa.list_(pa.int64()), pa.null()])
        schema = schema.set(at, pa.field(schema.field(at).name, kind))
    rows = _rows(rng)
    try:
        table = pa.Table.from_pylist(rows, SCHEMA).cast(schema)
    except pa.ArrowException:  # those values do not go into that type
        table = pa.Table.from_pylist(rows, SCHEMA)
    sink = pa.BufferOutputStream()
    codec = rng.choice([None, None, None, "zstd", "lz4"])
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=rng.choice([1, 2, 100]))
    data: bytes = sink.getvalue().to_pybytes()
    if rng.random() < 0.9:
        # The footer is short, comes last and says where all else is.
        data = changed(data, rng, rng.choice([0, 0, max(0, len(data) - 700)]))
    return data


def check_sidecar(data: bytes, rng: random.Random) -> None:
    """Read its summary, and each index of it."""

    def read_at(start: int, length: int) -> bytes:
        assert 0 <= start <= start + length <= len(data), f"{length} bytes at {start} are asked for, of {len(data)}"
        return data[start : start + length]

    with expected(ShardError, URL):
        summary = read_summary(read_at, len(data), URL)
        count = len(summary.objects)
        assert len(summary.sample_counts) == len(summary.index_offset) == len(summary.index_bytes) == count
        for row, info in enumerate(summary.objects):
            with expected(ShardError, info.url):
                check_found(summary.index(row, read_at), info.size)
        rows, others = summary.rows_of(summary.objects)
        assert np.all((rows >= -1) & (rows < count))
        assert np.all((others >= 0) & (others < count))


# Lists of shards.

_NAMES = [
    "a.tar",
    "../a.tar",
    "/etc/a.tar",
    "s3://x/a.tar",
    "file:///etc/x",
    "pipe:cat",
    "",
    "..",
    "http://h",
    "\ud800x",
]
_PLACES = [URL, "/data/list.json", "https://h/x/list.json?y=1", "list.json", "s3://b/"]


def _json(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say."""
    if depth > 3 or rng.random() < 0.4:
        return rng.choice([None, True, 0, -1, 1.5, 1 << 70, "", rng.choice(_NAMES)])
    if rng.random() < 0.5:
        return [_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(["url", "base", "shardlist", "nsamples", "a"]): _json(rng, depth + 1) for _ in range(3)}


def make_list(rng: random.Random) -> bytes:
    """A list with parts that are anything, whose text is damaged in half of the cases."""
    value: dict[str, Any] = {
        "wids_version": rng.choice([1, 1, 1, 2, "1"]),
        "shardlist": [{"url": rng.choice(_NAMES), "nsamples": rng.choice(NUMBERS)} for _ in range(rng.randrange(3))],
        "datasets": [{rng.choice(["source_url", "base", "shardlist"]): _json(rng)} for _ in range(rng.randrange(3))],
        "base": rng.choice([None, *_NAMES]),
    }
    for name in rng.sample(list(value), rng.randrange(3)):
        if rng.random() < 0.5:
            del value[name]
        else:
            value[name] = _json(rng)
    data = json.dumps(value if rng.random() < 0.9 else _json(rng)).encode()
    if rng.random() < 0.05:
        at, deep = rng.randrange(len(data)), rng.choice([b"[", b'{"a":'])
        data = data[:at] + deep * rng.choice([100, 2000, 100_000]) + data[at:]
    return changed(data, rng) if rng.random() < 0.5 else data


def check_list(data: bytes, rng: random.Random) -> None:
    """Read, as if it lay in several places."""
    for place in _PLACES:
        with expected(ConfigError, place):
            for part in wids.parse(data, place):
                check_part(part, place)


def check_part(part: wids.Shards | wids.WidsSource, place: str) -> None:
    """It names nothing that a list at that place must not."""
    urls = [part.url] if isinstance(part, wids.WidsSource) else part.urls
    assert isinstance(part, wids.WidsSource) or len(part.sample_counts) == len(urls)
    for url in urls:
        assert not url.startswith("pipe:"), url
        # The files of this machine are named by lists on this machine only.
        assert "://" not in place or ("://" in url and not url.lower().startswith("file:")), url


# Indexes of other tools, and Energon's files.

_RECORDS = [protobuf.tfrecord([data[:600], b"", data[:9]]) for data in _SHARDS]
_SIDES = [write_index(data) for data in _SHARDS for write_index in (dalis, energons)]
_SIDES += map(dalis_of_records, _RECORDS)


def make_side(rng: random.Random) -> bytes:
    """The number of a shard, and an index that is damaged in its bytes or its numbers."""
    number = rng.randrange(2 * len(_SHARDS))
    own = (number % len(_SHARDS)) * 2 + rng.randrange(2) if number < len(_SHARDS) else number + len(_SHARDS)
    data = _SIDES[own] if rng.random() < 0.9 else rng.choice(_SIDES)
    if rng.random() < 0.6:
        data = changed(data, rng)
    else:
        words = data.split(b" ")
        at = rng.randrange(len(words))
        words[at] = rng.choice([str(rng.choice([*NUMBERS, 512, 1024])).encode(), words[rng.randrange(len(words))]])
        data = b" ".join(words)
    return bytes([number]) + data


def check_side(data: bytes, rng: random.Random) -> None:
    """Read as the index of that shard, and what it says proven by the shard's own headers."""
    shard = [*_SHARDS, *_RECORDS][data[0] % (2 * len(_SHARDS))]
    kind = "tar" if data[0] < len(_SHARDS) else "tfrecord"
    with expected(ShardError, "a.idx"):
        found = side_index.read(data[1:], "a.idx", ObjectInfo(URL, len(shard)), kind)
        if isinstance(found, int):
            assert 0 <= found <= len(shard), found
        else:
            check_unproven(found, shard)


def check_unproven(found: side_index.UnprovenIndex, shard: bytes) -> None:
    """It stays within the shard, and what the shard confirms of it is so."""
    check_found(found, len(shard))
    assert np.all((found.header_start >= 0) & (found.header_start + 512 <= found.member_offset))
    samples = np.arange(found.sample_count)
    parts = [shard[start : start + size] for start, size in zip(*found.places_of_headers(samples), strict=True)]
    ends = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    found.prove(samples, np.frombuffer(b"".join(parts), np.uint8), ends)
    true = index(shard)
    members = [(true.key(sample), member) for sample in range(true.sample_count) for member in _of(true, sample)]
    assert members == [(found.key(sample), member) for sample in samples for member in _of(found, sample)]


def _of(found: ShardIndex, sample: int) -> list[tuple[str, int, int]]:
    own = range(found.member_start[sample], found.member_start[sample + 1])
    places = found.member_offset.tolist(), found.member_size.tolist()
    return [(found.columns[found.member_column[at]], places[0][at], places[1][at]) for at in own]


_SPLITS = [
    b"exclude:\n- shards/b.tar\n- shards/a.tar/001\nsplit_parts:\n  train: ['shards/{a,b}.tar']\n  val:\n  - x.tar\n",
    b"split_parts: {train: ['{000..012}.tar', a.tar], no: []}\nexclude: [a.tar/in/b, '{000..003}.tar']\n",
    b'{"split_parts": {"train": ["a.tar"]}, "exclude": ["a.tar/1"], "shard_counts": {"a.tar": 12}}',
]


def make_splits(rng: random.Random) -> bytes:
    """A split file that is damaged."""
    data = rng.choice(_SPLITS)
    if rng.random() < 0.3:
        at, deep = rng.randrange(len(data)), rng.choice([b"{", b"[", b"- ", b"{a,", b"{0..99999999999}", b"&a *a "])
        data = data[:at] + deep * rng.choice([1, 3, 100, 3000]) + data[at:]
    return changed(data, rng)


def check_splits(data: bytes, rng: random.Random) -> None:
    """Read as YAML and as JSON; all that is then said of splits are names of some number."""
    for url in ("d/.nv-meta/split.yaml", "d/.nv-meta/split.json"):
        with expected(ConfigError, url):
            found = energon.Splits.read(data, url)
            for split in found.parts:
                names = found.shards(split)
                assert all(isinstance(name, str) for name in names)
                assert set(found.samples(names)) <= set(names)
        with expected(ConfigError, url):
            assert all(0 <= count < 1 << 63 for count in energon.counts(data, url).values())


TARGETS = [
    fuzzing.Target("index", make_index, check_index, ("pages",)),
    fuzzing.Target("sidecar", make_sidecar, check_sidecar, ("pages",)),
    fuzzing.Target("list", make_list, check_list, ("pages",)),
    fuzzing.Target("side", make_side, check_side, ("pages", "bounds")),
    fuzzing.Target("splits", make_splits, check_splits, ("pages",)),
]

if __name__ == "__main__":
    fuzzing.main("tests.formats.fuzz_readers", *TARGETS)
