"""Bytes, text and JSON, and what holds for all decoders."""

from __future__ import annotations

import json
import math
import pickle
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload import decode as fd
from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged
from tests.decode.helpers import decode, group, npy, where


@pytest.mark.parametrize(
    "decoder",
    [
        fd.raw(),
        fd.text(),
        fd.text("latin-1"),
        fd.integer(),
        fd.json(),
        fd.array(),
        fd.array((3, 2), "float32"),
        fd.flat("uint16", 2048),
        fd.image(8),
    ],
    ids=repr,
)
def test_decoders_are_values(decoder: fd.Decoder) -> None:
    again = pickle.loads(pickle.dumps(decoder))
    assert again == decoder
    assert hash(again) == hash(decoder)
    assert again.fixed() == decoder.fixed()


def test_public_names() -> None:
    assert set(fd.__all__) >= {"Decoder", "array", "flat", "image", "integer", "json", "raw", "text"}
    assert all(callable(getattr(fd, name)) for name in fd.__all__)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20)), st.binary(max_size=3))
def test_raw(items: list[bytes], before: bytes) -> None:
    values, offsets = group(items, before)
    batch = fd.raw().decode(values, offsets, where)
    assert isinstance(batch, Ragged)
    assert batch == items
    assert batch.values.flags.writeable
    assert not np.shares_memory(batch.values, values)


def test_raw_owned_keeps_the_memory_it_is_given() -> None:
    values = np.frombuffer(b"abcxx", np.uint8).copy()
    batch = fd.raw().decode_owned(values, np.array([0, 1, 3]), where)
    assert isinstance(batch, Ragged)
    assert batch == [b"a", b"bc"]
    assert np.shares_memory(batch.values, values)


def test_one_sample() -> None:
    assert fd.raw().decode_one(memoryview(b"ab"), "here") == b"ab"
    assert isinstance(fd.raw().decode_one(memoryview(b"ab"), "here"), bytes)
    assert fd.text().decode_one("grün".encode(), "here") == "grün"
    assert fd.json().decode_one(b"[1]", "here") == [1]
    assert fd.integer().decode_one(b"7\n", "here") == 7


@settings(deadline=None)
@given(st.lists(st.text(max_size=20)))
def test_text(items: list[str]) -> None:
    assert decode(fd.text(), [item.encode() for item in items]) == items


def test_text_that_is_none() -> None:
    with pytest.raises(DecodeError, match=r"sample 1: column x: not utf-8 text .*position 2.*text\(encoding"):
        decode(fd.text(), [b"fine", b"ab\xff"])
    assert decode(fd.text("latin-1"), [b"\xff"]) == ["ÿ"]


@pytest.mark.parametrize("encoding", ["no-such", "hex", "rot13", "\0"])
def test_text_encoding_is_checked_at_once(encoding: str) -> None:
    with pytest.raises(ConfigError, match="encoding="):
        fd.text(encoding)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(st.lists(_JSON))
def test_json(items: list[object]) -> None:
    written = [json.dumps(item).encode() for item in items]
    assert decode(fd.json(), written) == [json.loads(item) for item in written]


def test_json_as_python_writes_it() -> None:
    (found,) = decode(fd.json(), [b'{"loss": NaN, "best": -Infinity, "far": 1e999}'])
    assert math.isnan(found["loss"])
    assert (found["best"], found["far"]) == (-math.inf, math.inf)
    assert decode(fd.json(), ["﻿[1]".encode(), "[1]".encode("utf-16")]) == [[1], [1]]


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b" ",
        b'{"a": 1} x',
        b"{} {}",
        b"{'a': 1}",
        b"[1,",
        b"\xff",
        b'"\xff"',
        b"[" * 100_000,
        b"9" * 5000,
    ],
)
def test_json_that_is_none(bad: bytes) -> None:
    with pytest.raises(DecodeError, match=r"sample 1: column x: .*JSON"):
        decode(fd.json(), [b"{}", bad])


@pytest.mark.parametrize(
    ("decoder", "item"),
    [
        (fd.raw(), b"abc"),
        (fd.integer(), b"17"),
        (fd.array(2, "f4"), npy(np.arange(2))),
        (fd.flat("f4", 2), bytes(8)),
        (fd.flat("u2"), bytes(8)),
    ],
    ids=["raw", "integer", "array", "flat", "flat of any length"],
)
def test_no_python_per_sample(decoder: fd.Decoder, item: bytes) -> None:
    def calls(count: int) -> int:
        values, offsets = group([item] * count)
        seen = []
        sys.setprofile(lambda frame, event, what: seen.append(event))
        try:
            decoder.decode(values, offsets, where)
        finally:
            sys.setprofile(None)
        return len(seen)

    calls(2)  # compiles, and fills numpy's and our own caches
    assert calls(1000) == calls(10)


def test_places_are_made_for_errors_only() -> None:
    def never(number: int) -> str:
        raise AssertionError(number)

    for decoder, item in ((fd.text(), b"a"), (fd.json(), b"1"), (fd.integer(), b"1"), (fd.raw(), b"")):
        decoder.decode(*group([item] * 3), never)
