"""Frames: any cut of the stream gives the same messages, and what is none is refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import ServiceError
from fastload.service import protocol
from fastload.service.protocol import FrameReader, ObjectRows, frame, from_consumer, from_service
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
    assert ObjectRows.of(objects).objects() == objects
    with pytest.raises(ServiceError, match="different lengths"):
        ObjectRows(["a"], [1, 2], [None], [0]).objects()
    with pytest.raises(ServiceError, match="negative"):
        ObjectRows(["a"], [-1], [None], [0]).objects()
