"""`make fuzz`: damaged files of records through what indexes them, finds their columns and decodes these. See `fuzzing`
for how.

    python -m tests.formats.fuzz_records --seconds 120

What must hold, whatever the bytes: an error of the kind that the reader documents, with the name of the object or the
place in it; or records that lie in the object, and values that are those of a reader in plain Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.errors import DecodeError, ShardError
from fastload.formats import RecordIndex, record_reader, records, stored_index, tfrecord
from fastload.formats.records import split
from tests.formats import fuzzing, protobuf
from tests.formats.fuzz_readers import changed

URL = "s3://bucket/shard"


@contextmanager
def guarding(rng: random.Random, module: Any, **limits: int) -> Iterator[None]:
    """All arrays that a module makes are guarded, and it has these limits."""
    numpy: Any = fuzzing.Guarding(rng)
    kept = {name: getattr(module, name) for name in limits}
    try:
        module.np = records.np = numpy
        for name, limit in limits.items():
            setattr(module, name, limit)
        yield
    finally:
        module.np = records.np = np
        for name, limit in kept.items():
            setattr(module, name, limit)


def guarded_bytes(data: bytes, at_end: bool) -> npt.NDArray[np.uint8]:
    array = fuzzing.guarded(len(data), np.uint8, at_end)
    array[:] = np.frombuffer(data, np.uint8)
    return array


def index_of(indexer: Any, data: bytes, rng: random.Random) -> RecordIndex | str:
    """The index or the error of a shard that comes in pieces."""
    step, at_end = rng.choice([1, 7, 64, 1000, 1 << 16]), rng.random() < 0.7
    try:
        for start in range(0, len(data), step):
            if indexer.done:
                break
            indexer.feed(guarded_bytes(data[start : start + step], at_end), start)
        assert indexer.done, f"byte {indexer.next_offset} is said to be needed of {len(data)}"
        index: RecordIndex = indexer.finish()
    except ShardError as error:
        assert str(error).startswith(indexer._url), error  # noqa: PT017
        return str(error)
    assert stored_index(index.to_bytes(), indexer._url, len(data)) == index
    return index


def values_of(index: RecordIndex, data: bytes, rng: random.Random) -> dict[str, list[Any]] | str:
    """The values of all columns, None where a record lacks one; or the error."""
    places = zip(index.offset.tolist(), index.size.tolist(), strict=True)
    pieces = [data[start : start + size] for start, size in places]
    assert sum(map(len, pieces)) == int(index.size.sum()), "a record that leaves the object"
    reader = record_reader(index.layout)
    offsets = np.cumsum([0, *map(len, pieces)], dtype=np.int64)
    at_end = rng.random() < 0.7

    def take(name: str, count: int) -> npt.NDArray[np.uint8]:
        return fuzzing.guarded(count, np.uint8, at_end)

    try:
        found, is_there = split(
            reader,
            guarded_bytes(b"".join(pieces), at_end),
            offsets,
            reader.columns,
            take,
            lambda number: f"at {number}",
        )
    except DecodeError as error:
        assert str(error).startswith("at "), error  # noqa: PT017
        return str(error)
    made: dict[str, list[Any]] = {}
    for name, there in zip(reader.columns, is_there, strict=True):
        decoder, (values, ends) = reader.decoder(name), found[name]
        made[name] = []
        for (start, end), has in zip(pairwise(ends.tolist()), there.tolist(), strict=True):
            try:
                made[name].append(decoder.decode_one(values[start:end].data, "here") if has else None)
            except DecodeError as error:
                assert str(error).startswith("here: "), error  # noqa: PT017
                made[name].append(error)
    return made


# TFRecord.


def make_tfrecord(rng: random.Random) -> bytes:
    """A file of a few records, whose messages are damaged behind their checks, or which is damaged anywhere."""
    messages = []
    for _ in range(rng.choice([0, 1, 2, 5])):
        numbers = [rng.getrandbits(64) >> rng.randrange(64) for _ in range(rng.choice([0, 1, 2, 9]))]
        pieces = [rng.randbytes(rng.choice([0, 1, 200])) for _ in range(rng.choice([1, 1, 3]))]
        message = protobuf.example(rng, n=numbers, f=[rng.random() for _ in range(rng.choice([1, 4]))], b=pieces)
        if rng.random() < 0.05:
            message = rng.randbytes(rng.randrange(30))
        messages.append(changed(message, rng) if rng.random() < 0.4 else message)
    data = protobuf.tfrecord(messages)
    return changed(data, rng) if rng.random() < 0.3 else data


def check_tfrecord(data: bytes, rng: random.Random) -> None:
    """Indexed and read, it is what plain Python makes of it."""
    limits = {"_AT_ONCE": rng.choice([1, 2, 100]), "_FEATURES_MAX": rng.choice([2, 50, 50])}
    with guarding(rng, tfrecord, **limits, _NAME_BYTES_MAX=rng.choice([1, 100, 100])):
        index = index_of(tfrecord.TfRecordIndexer(URL, len(data)), data, rng)
        if isinstance(index, str):
            refused = re.search(r"at byte (\d+), is no Example", index)
            if refused:
                start = int(refused[1])
                check_refused(data[start : start + int.from_bytes(data[start - 12 : start - 4], "little")])
            return
        made = values_of(index, data, rng)
    assert isinstance(made, dict), f"what could be indexed cannot be read: {made}"
    if list(made) == [tfrecord.WHOLE]:
        return
    for number, (start, size) in enumerate(zip(index.offset.tolist(), index.size.tolist(), strict=True)):
        expected = protobuf.parse(data[start : start + size])
        for name, values in made.items():
            assert as_list(values[number]) == as_list(expected.get(name.encode(), (0, None))[1]), (name, number)


def check_refused(message: bytes) -> None:
    """It is no Example."""
    try:
        found = protobuf.parse(message)
    except ValueError:
        return
    raise AssertionError(f"{message!r} is refused, and is {found}")


def as_list(values: Any) -> bytes | None:
    """Values to compare, also those that are not equal to themselves."""
    if values is None or isinstance(values, list):
        return repr([np.float32(each) if isinstance(each, float) else each for each in values or ()]).encode()
    return as_list([values] if isinstance(values, bytes) else np.atleast_1d(values).tolist())


TARGETS = [fuzzing.Target("tfrecord", make_tfrecord, check_tfrecord)]

if __name__ == "__main__":
    fuzzing.main("tests.formats.fuzz_records", *TARGETS)
