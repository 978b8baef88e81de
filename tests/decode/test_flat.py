"""Arrays without a header, against numpy's own reading of their bytes."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastload.decode as fd
from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged
from tests.decode.helpers import decode, group, where

DTYPES = ["<u2", ">i4", "f4", ">f8", "c8", "u1"]


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(DTYPES), hnp.array_shapes(max_dims=3, max_side=4), st.binary(max_size=3))
def test_a_shape_makes_tensors(data: st.DataObject, dtype: str, shape: tuple[int, ...], before: bytes) -> None:
    arrays = data.draw(st.lists(hnp.arrays(dtype, shape), max_size=5))
    decoder, items = fd.flat(dtype, shape), [array.tobytes() for array in arrays]
    batch = decode(decoder, items, before)
    assert (batch.shape[1:], batch.dtype) == decoder.fixed()
    assert batch.dtype.isnative
    out = np.empty_like(batch)
    decoder.decode_into(*group(items, before), out, where)
    for made in (batch, out):
        np.testing.assert_array_equal(made, np.array(arrays, dtype).reshape(-1, *shape))
        assert made.flags.writeable
    for item, array in zip(items, arrays, strict=True):
        np.testing.assert_array_equal(decoder.decode_one(item, ""), array)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(DTYPES), st.binary(max_size=3))
def test_without_a_shape_each_has_its_length(data: st.DataObject, dtype: str, before: bytes) -> None:
    arrays = data.draw(st.lists(hnp.arrays(dtype, st.integers(0, 5)), max_size=5))
    batch = decode(fd.flat(dtype), [array.tobytes() for array in arrays], before)
    assert isinstance(batch, Ragged)
    assert (batch.kind, batch.values.dtype) == ("array", np.dtype(dtype).newbyteorder("="))
    assert len(batch) == len(arrays)
    for made, array in zip(batch, arrays, strict=True):
        np.testing.assert_array_equal(made, array)


def test_what_is_given_away_is_not_copied() -> None:
    values = np.arange(24, dtype=np.uint8)
    offsets = np.array([0, 8, 16])
    batch = fd.flat("<u2", 4).decode_owned(values, offsets, where)
    assert np.shares_memory(batch, values)  # type: ignore[arg-type]
    assert torch.from_numpy(batch).shape == (2, 4)  # type: ignore[arg-type]
    ragged = fd.flat("<u2").decode_owned(values, offsets, where)
    assert isinstance(ragged, Ragged)
    assert np.shares_memory(ragged.values, values)
    # At an odd address, and in another byte order, it is.
    for decoder, memory in ((fd.flat("<u2", 4), values[1:]), (fd.flat(">u2", 4), values)):
        copied = decoder.decode_owned(memory, offsets, where)
        assert not np.shares_memory(copied, values)  # type: ignore[arg-type]
        expected = np.frombuffer(memory[:16].tobytes(), decoder.stored).reshape(2, 4)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(copied, expected)  # type: ignore[arg-type]


def test_booleans_are_zero_or_one() -> None:
    batch = decode(fd.flat("?", 3), [bytes([0, 1, 2]), bytes([255, 0, 0])])
    assert batch.view(np.uint8).tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("decoder", "words"),
    [(fd.flat("u2", (2, 3)), "uint16[2, 3] takes 12"), (fd.flat("f4"), "no whole number of float32")],
)
@pytest.mark.parametrize("bad", [b"123", b"1" * 13])
def test_another_size_is_an_error_that_names_the_sample(decoder: fd.Decoder, words: str, bad: bytes) -> None:
    good = bytes(12)
    for function in (decoder.decode, decoder.decode_owned):
        with pytest.raises(DecodeError, match=f"^{re.escape(where(1))}: {len(bad)} bytes.*{re.escape(words)}"):
            function(*group([good, bad, good, bad]), where)
    with pytest.raises(DecodeError, match=f"^here: {len(bad)} bytes.*{re.escape(words)}"):
        decoder.decode_one(bad, "here")
    if decoder.fixed() is not None:  # sizes that are right only in the sum
        with pytest.raises(DecodeError, match=f"^{re.escape(where(0))}: 11 bytes"):
            decoder.decode_into(*group([bytes(11), bytes(13)]), np.empty((2, 2, 3), np.uint16), where)


def test_what_cannot_be_is_refused_at_once() -> None:
    for dtype in ("U3", object, "M8[s]", "i4,i4", "nonsense", None):
        with pytest.raises(ConfigError, match="dtype"):
            fd.flat(dtype, 2)
    with pytest.raises(DecodeError, match="8 bytes, and"):
        fd.flat("u2", (1 << 40, 1 << 40)).decode_one(bytes(8), "here")
    for shape in (-1, (2, -1), "x", (2, 0)):
        with pytest.raises(ConfigError, match="shape="):
            fd.flat("f4", shape)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="default=1 needs shape="):
        fd.flat("f4", default=1)
    for default in ("x", [1, 2, 3], -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="default="):
            fd.flat("u1", 2, default=default)  # type: ignore[arg-type]
