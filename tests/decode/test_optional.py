"""Groups of samples of which some have no value, against decoding them one by one."""

from __future__ import annotations

import json
import math
import pickle
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload import decode as fd
from fastload.decode.optional import check_missing, decode_optional
from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged
from tests.decode.helpers import group, npy, where
from tests.decode.pictures import jpeg

JPEGS = [jpeg(np.full((20, 30, 3), level, np.uint8)) for level in (0, 90, 255)]
ARRAYS = [npy(np.arange(6, dtype=np.float32).reshape(2, 3) + n) for n in range(3)]


@dataclass(frozen=True)
class Halves(fd.Decoder):
    """One of the user's: the bytes as arrays of two columns, in one `Ragged`."""

    default: int | None = None

    def missing(self) -> Any:
        return None if self.default is None else np.full((1, 2), self.default, np.uint8)

    def _decode(self, value: memoryview) -> np.ndarray:
        return np.frombuffer(bytes(value) * 2, np.uint8).reshape(-1, 2)

    def decode(self, values: Any, offsets: Any, where: Any, keys: Any = None) -> Ragged:
        rows: Any = super().decode(values, offsets, where, keys)
        return Ragged.from_items(rows) if rows else Ragged(np.empty(0, np.uint8), np.zeros(1, np.int64), [], "array")


@dataclass(frozen=True)
class Lengths(fd.Decoder):
    """Another: an array whose shape it does not say."""

    def _decode(self, value: memoryview) -> int:
        return len(value)

    def decode(self, values: Any, offsets: Any, where: Any, keys: Any = None) -> np.ndarray:
        return np.diff(offsets)


CASES: list[tuple[fd.Decoder, list[bytes]]] = [
    (fd.raw(), [b"", b"abc", b"\0"]),
    (fd.raw(default=b""), [b"abc", b"d"]),
    (fd.raw(default=b"xyz"), [b"", b"abc", b"d"]),
    (fd.text(), [b"", b"abc"]),
    (fd.text(default="none"), [b"", b"abc"]),
    (fd.json(), [b"{}", b"[1, 2]", b"3"]),
    (fd.json(default={"a": [math.inf]}), [b"{}", b"[1, 2]", b"3"]),
    (fd.integer(default=-1), [b"5", b"-6", b"70"]),
    (fd.integer(np.int8(3)), [b"5", b"-6", b"70"]),
    (fd.number(default=0.5), [b"1", b"2.25"]),
    (fd.number("float32", default=0.1), [b"1", b"0.1"]),
    (fd.array(), ARRAYS),
    (fd.array(default=np.zeros((0, 3), np.int8)), ARRAYS),
    (fd.array((2, 3), "float32", default=-1), ARRAYS),
    (fd.array((2, 3), "float64", default=[0, 1, 2]), ARRAYS),
    (fd.flat("<i2"), [b"", b"abcd", b"ef"]),
    (fd.flat(">f4", (1, 2), default=-1.5), [bytes(8), b"abcdefgh"]),
    (fd.image(8, default=0.5), JPEGS),
    (fd.image(8, dtype="uint8", layout="NHWC", default=(1, 2, 3)), JPEGS),
    (fd.image(4, random_resized_crop=True, hflip=0.5, default=(0.1, 0.2, 0.3)), JPEGS),
    (Halves(), [b"ab", b"", b"xyz"]),
    (Halves(9), [b"ab", b"", b"xyz"]),
]


def together(decoder: fd.Decoder, items: list[bytes | None], keys: np.ndarray | None) -> Any:
    values, offsets = group([item or b"" for item in items])
    present = np.array([item is not None for item in items], np.bool_)
    return decode_optional(decoder, values, offsets, present, where, keys, np.empty)


@settings(deadline=None, max_examples=10)
@given(st.data())
@pytest.mark.parametrize(("decoder", "values"), CASES, ids=repr)
def test_as_one_by_one(decoder: fd.Decoder, values: list[bytes], data: st.DataObject) -> None:
    check_missing(decoder)
    items = data.draw(st.lists(st.none() | st.sampled_from(values), max_size=8))
    keys = np.arange(len(items), dtype=np.uint64) * 7 if decoder.wants_keys() else None
    batch = together(decoder, items, keys)
    assert len(batch) == len(items)
    if isinstance(batch, Ragged):
        there = [True] * len(items) if batch.present is None else batch.present.tolist()
        assert there == [item is not None or decoder.missing() is not None for item in items]
        batch = batch.tolist()
    for number, (item, made) in enumerate(zip(items, batch, strict=True)):
        key = None if keys is None else int(keys[number])
        expected = decoder.missing() if item is None else decoder.decode_one(item, "", key)
        np.testing.assert_array_equal(made, expected)
        assert (made is None) == (expected is None)
        assert isinstance(made, bytes | str | dict | list | type(None)) == isinstance(
            expected, bytes | str | dict | list | type(None)
        )


@pytest.mark.parametrize(("decoder", "_"), CASES, ids=repr)
def test_decoders_with_a_default_are_values(decoder: fd.Decoder, _: object) -> None:
    again = pickle.loads(pickle.dumps(decoder))
    assert again == decoder
    assert hash(again) == hash(decoder)


def test_defaults_tell_decoders_apart() -> None:
    assert fd.integer(default=1) != fd.integer()
    assert fd.array((2,), "int8", default=0) != fd.array((2,), "int8", default=1)
    assert fd.image(8, default=0) != fd.image(8)


def test_no_two_samples_share_a_default() -> None:
    for decoder in (fd.json(default={"a": []}), fd.array(default=np.zeros(2))):
        one, other = together(decoder, [None, None], None)
        one["a" if isinstance(one, dict) else 0] = 5
        assert str(one) != str(other)
        assert str(decoder.missing()) == str(other)


def test_an_error_names_the_sample_and_not_its_place_among_those_that_are_there() -> None:
    for decoder in (fd.integer(default=0), fd.text()):
        with pytest.raises(DecodeError, match=f"^{re.escape(where(3))}:"):
            together(decoder, [None, b"1", None, b"\xff"], None)


@pytest.mark.parametrize(
    "decoder", [fd.integer(), fd.number(), fd.image(8), fd.array((2, 3), "float32"), fd.array((2, 3))], ids=repr
)
def test_a_tensor_needs_a_default(decoder: fd.Decoder) -> None:
    with pytest.raises(ConfigError, match="no room"):
        check_missing(decoder)


def test_a_decoder_that_makes_arrays_unforeseen_says_so_where_a_value_is_missing() -> None:
    check_missing(Lengths())
    assert together(Lengths(), [b"a", b"bc"], None).tolist() == [1, 2]
    with pytest.raises(ConfigError, match=f"^{re.escape(where(1))}: the sample lacks it"):
        together(Lengths(), [b"a", None], None)


class Lying(fd.Decoder):
    def _decode(self, value: memoryview) -> Any:
        raise NotImplementedError

    def fixed(self) -> fd.base.Fixed:
        return (2, 3), np.dtype(np.float32)

    def missing(self) -> Any:
        return np.zeros((3, 2))


def test_a_default_of_another_shape_is_refused_where_it_is_declared() -> None:
    with pytest.raises(ConfigError, match=r"does not fit float32\[2, 3\]"):
        check_missing(Lying())


@pytest.mark.parametrize(
    "make",
    [
        lambda: fd.integer(default=1.5),  # type: ignore[arg-type]
        lambda: fd.integer(default="7"),  # type: ignore[arg-type]
        lambda: fd.integer(default=1 << 63),
        lambda: fd.number(default="7"),  # type: ignore[arg-type]
        lambda: fd.text(default=b"x"),  # type: ignore[arg-type]
        lambda: fd.raw(default="x"),  # type: ignore[arg-type]
        lambda: fd.json(default={1, 2}),
        lambda: fd.json(default=object()),
        lambda: fd.array((2,), default=0),
        lambda: fd.array((2,), "int8", default=0.5),
        lambda: fd.array((2,), "int8", default=300),
        lambda: fd.array((2,), "uint8", default=-1),
        lambda: fd.array((2,), "float32", default=[1, 2, 3]),
        lambda: fd.array((2,), "float32", default=1j),
        lambda: fd.array((2,), "float32", default="nothing"),
        lambda: fd.array(default=[[1], [2, 3]]),
        lambda: fd.image(8, default="grey"),  # type: ignore[arg-type]
        lambda: fd.image(8, default=(1, 2)),  # type: ignore[arg-type]
        lambda: fd.image(8, default=math.nan),
        lambda: fd.image(8, dtype="uint8", default=0.5),
        lambda: fd.image(8, dtype="uint8", default=256),
    ],
)
def test_what_is_no_default_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="default="):
        make()


def test_numbers_that_the_type_holds_are_defaults() -> None:
    for default in (0, 255, 7.0, np.int64(3), True):
        made = together(fd.array((2,), "uint8", default=default), [None], None)
        assert made.tolist() == [[int(default)] * 2]
    assert together(fd.array((1,), "float32", default=math.nan), [None], None).tolist() == [
        [pytest.approx(math.nan, nan_ok=True)]
    ]
    assert json.loads(json.dumps(fd.json(default=(1, 2)).missing())) == [1, 2]
