"""Fractions out of text, against Python's own `float`."""

from __future__ import annotations

import decimal
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import decode as fd
from fastload.errors import ConfigError, DecodeError
from tests.decode.helpers import decode, group, where

# Enough for the exact value of any float64.
EXACT = decimal.Context(prec=1100)


def twin(item: bytes) -> float | None:
    """What an item is, in plain Python; None for what is no number."""
    try:
        return float(item) if b"_" not in item else None
    except ValueError:
        return None


def halfway(value: float) -> bytes:
    """What lies exactly between a positive number and the next, in all its digits."""
    following = decimal.Decimal(math.nextafter(value, math.inf))
    return str(EXACT.divide(EXACT.add(decimal.Decimal(value), following), 2)).encode()


_digits = st.text("0123456789", max_size=25)
_finite = st.floats(allow_nan=False, allow_infinity=False)
_written = st.builds(
    lambda sign, before, point, after, exponent: (sign + before + point + after + exponent).encode(),
    st.sampled_from(["", "", "-", "+"]),
    _digits,
    st.sampled_from(["", "."]),
    _digits,
    st.just("")
    | st.integers(-400, 400).map(lambda n: f"e{n}")
    | st.sampled_from(["E+05", "e-0", "e", "e-", "e9" * 20]),
)
_items = (
    _written
    | _finite.map(repr).map(str.encode)
    | st.integers().map(str).map(str.encode)
    | st.floats(1e-30, 1e300).map(halfway)
    | st.text("0123456789.+-eE _infatyINFATY\t\n\x00\x1c\x85", max_size=9).map(lambda text: text.encode("latin-1"))
    | st.sampled_from(
        [b"inf", b"-Infinity", b"NaN", b"+nan", b"infinit", b" 1.5\n", b"1" * 400, b"." + b"0" * 400 + b"1e401"]
    )
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_items, max_size=8), st.binary(max_size=3), st.sampled_from(["float64", "float32"]))
@example(
    [halfway(1.0), halfway(2.0**-1074), halfway(2.0**1022), b"1.7976931348623159e308", b"2.5e-324"], b"", "float64"
)
@example([b"9007199254740993", b"9007199254740993.0000000000000000001", b"-0", b"0e999999999999"], b"", "float64")
@example([b"1", b"nan(1)"], b"", "float64")
@example([b"nan", b"1_0"], b"", "float32")
@example([b"\x1c1", b"nan()"], b"", "float64")
def test_a_batch_is_what_python_makes_of_it(items: list[bytes], before: bytes, dtype: str) -> None:
    """To the bit, but for the bits of what is not a number; of several that are no numbers, the first is named."""
    values, offsets = group(items, before)
    out = np.full(len(items), 99, dtype)
    expected = [twin(item) for item in items]
    if None in expected:
        wrong = expected.index(None)
        with pytest.raises(DecodeError, match=f"^{re.escape(where(wrong))}: .* is not a decimal number"):
            fd.number(dtype).decode_into(values, offsets, out, where)
        return
    fd.number(dtype).decode_into(values, offsets, out, where)
    with np.errstate(over="ignore"):
        wanted = np.array(expected, np.float64).astype(dtype)
    are_numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(out), ~are_numbers)
    assert out[are_numbers].tobytes() == wanted[are_numbers].tobytes()


@settings(deadline=None)
@given(
    st.lists(_items.filter(lambda item: twin(item) is not None), max_size=8), st.sampled_from(["float64", "float32"])
)
def test_a_batch_and_its_samples_are_the_same(items: list[bytes], dtype: str) -> None:
    batch = decode(fd.number(dtype), items)
    with np.errstate(over="ignore"):
        expected = np.array([float(item) for item in items], np.float64).astype(dtype)
    np.testing.assert_array_equal(batch, expected)
    assert batch.dtype == dtype
    assert batch.flags.writeable
    ones = [fd.number(dtype).decode_one(item, "here") for item in items]
    np.testing.assert_array_equal(np.array(ones, dtype), expected)


def test_into_a_part_of_a_batch() -> None:
    out = np.zeros(4, np.float32)
    fd.number("float32").decode_into(*group([b"5", b"0.1"]), out[1:3], where)
    assert out.tolist() == [0, 5, np.float32(0.1), 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"nan(1)", "not a decimal"),
        (b"", "b'' is not a decimal number"),
        (b"1_0.5", "b'1_0.5' is not"),
        (b".", "not a decimal"),
        (b"1e", "not a decimal"),
        (b"0x1p3", "not a decimal"),
        (b"1,5", "not a decimal"),
        ("١".encode(), "not a decimal"),
        (b"x" * 1000, r"\.\.\. \(1000 bytes\) is not"),
    ],
)
def test_what_is_no_number(bad: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=f"^s3://b/t.tar: sample 2: column x: .*{message}"):
        decode(fd.number(), [b"1", halfway(1.5), bad, b"also bad"])
    with pytest.raises(DecodeError, match=f"^here: .*{message}"):
        fd.number().decode_one(bad, "here")


@pytest.mark.parametrize("dtype", ["int64", "float16", ">c8", "no dtype", 7])
def test_other_dtypes_are_refused(dtype: object) -> None:
    with pytest.raises(ConfigError, match="neither"):
        fd.number(dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize(("decoder", "dtype"), [(fd.integer, np.int64), (fd.number, np.float64)])
def test_what_stands_for_a_null_of_json(decoder: Callable[..., Any], dtype: Any) -> None:
    items = [b"null", b"7", b"1234", b"null", b" -2 "]
    found = decode(decoder(null=-1), items)
    assert (found.dtype, found.tolist()) == (dtype, [-1, 7, 1234, -1, -2])
    assert [decoder(null=-1).decode_one(item, "here") for item in items] == found.tolist()
    name = decoder.__name__
    with pytest.raises(DecodeError, match=rf"b'null' is .*; say what stands for .*: decode\.{name}\(null=-1\)"):
        decode(decoder(-5) if name == "integer" else decoder(default=-5), items)
    with pytest.raises(DecodeError, match="sample 1: column x: b'nul'"):
        decode(decoder(null=-1), [b"null", b"nul"])
    with pytest.raises(ConfigError, match="null='x' is not"):
        decoder(null="x")
