"""Frames: any cut of the stream gives the same messages, and what is none is refused."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload import protocol
from fastload.errors import ServiceError
from fastload.protocol import FrameReader, ObjectRows, frame, from_consumer, from_service
from fastload.store.types import ObjectInfo

MESSAGES = [
    protocol.Want([1, 2**40], 3, True),
    protocol.Hello(1, 2, "train", {"extra": [["a", "b"]]}, {"disk_bytes": 5}),
    protocol.Attach(True, True, ObjectRows.of([ObjectInfo("s3://b/k", 5, "e"), ObjectInfo("/p", 6, None, 7)])),
    protocol.PutIndex(0, b"\0" * 1000),
    protocol.SetPlan([], 0, False, 0),
]


@given(st.lists(st.integers(1, 200), min_size=1))
def test_any_cut_of_the_stream(sizes: list[int]) -> None:
    stream = b"".join(map(frame, MESSAGES))
    reader, found, at, number = FrameReader(), [], 0, 0
    while at < len(stream):
        size = sizes[number % len(sizes)]
        found += [from_consumer(payload) for payload in reader.feed(stream[at : at + size])]
        at, number = at + size, number + 1
    assert found == MESSAGES


def test_a_length_beyond_the_maximum() -> None:
    with pytest.raises(ServiceError, match="more than may be"):
        list(FrameReader().feed(struct.pack("<I", protocol.FRAME_BYTES_MAX + 1)))
    with pytest.raises(ServiceError, match="PutIndex"):
        frame(protocol.PutIndex(0, bytes(protocol.FRAME_BYTES_MAX)))


@given(st.binary(max_size=100))
def test_garbage(data: bytes) -> None:
    for decode in (from_consumer, from_service):
        try:
            decode(data)
        except ServiceError:
            continue


def test_each_side_takes_only_the_other_sides_messages() -> None:
    with pytest.raises(ServiceError, match="not a message"):
        from_service(frame(protocol.Want([1], 1, True))[4:])
    with pytest.raises(ServiceError, match="not a message"):
        from_consumer(frame(protocol.Recall([1]))[4:])


def test_rows() -> None:
    objects = [ObjectInfo("s3://b/k", 5, "e"), ObjectInfo("/p", 6, None, 7)]
    rows = ObjectRows.of(objects)
    assert list(rows.table()) == objects
    assert list(ObjectRows.of(rows.table()[1:]).table()) == objects[1:]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sizes": struct.pack("<q", 5)}, "different lengths"),
        ({"sizes": struct.pack("<2q", 5, -1)}, "a negative size"),
        ({"sizes": b"123"}, "cannot be read"),
        ({"url_bytes": struct.pack("<2i", 7, -1), "urls": b"s3://b/"}, "without a URL"),
        ({"url_bytes": struct.pack("<2i", 7, 3)}, "texts of 10 bytes in a column of 9"),
        ({"url_bytes": struct.pack("<2i", -7, 9)}, "cannot be read"),
        ({"urls": b"s3://b/k\xff"}, "cannot be read"),
        ({"urls": "s3://b/é".encode(), "url_bytes": struct.pack("<2i", 8, 1)}, "in the middle of a character"),
    ],
)
def test_rows_that_lie(changes: dict[str, bytes], says: str) -> None:
    rows = ObjectRows.of([ObjectInfo("s3://b/", 5, "e"), ObjectInfo("/p", 6, None, 7)])
    with pytest.raises(ServiceError, match=says):
        msgspec.structs.replace(rows, **changes).table()
