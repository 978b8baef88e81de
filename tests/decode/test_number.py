"""Fractions out of text, against Python's own `float`."""

from __future__ import annotations

import decimal
import math
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import decode as fd
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.floats import MALFORMED, UNDECIDED, parse_floats, powers_of_five
from tests.decode.helpers import decode, group, where

# Enough for the exact value of any float64.
EXACT = decimal.Context(prec=1100)


def twin(item: bytes) -> float | None:
    """What `parse_floats` makes of an item, in plain Python; None for what is no number."""
    try:
        return float(item) if b"_" not in item else None
    except ValueError:
        return None


def bits(value: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


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


@settings(max_examples=400, deadline=None)
@given(st.lists(_items, max_size=8), st.binary(max_size=3))
@example([halfway(1.0), halfway(2.0**-1074), halfway(2.0**1022), b"1.7976931348623159e308", b"2.5e-324"], b"")
@example([b"9007199254740993", b"9007199254740993.0000000000000000001", b"-0", b"0e999999999999"], b"")
def test_kernel_and_twin(items: list[bytes], before: bytes) -> None:
    values, offsets = group(items, before)
    out, stopped = np.full(len(items), 99, np.uint64), np.full(1, -1, np.int64)
    for number, item in enumerate(items):
        expected = twin(item)
        failed = parse_floats(values, offsets[number : number + 2], powers_of_five(), 0, out[number:], stopped)
        if failed < 0:
            assert expected is not None
            assert int(out[number]) == bits(expected) or (math.isnan(expected) and np.isnan(out.view(float)[number]))
        else:
            assert stopped[0] == (MALFORMED if expected is None else UNDECIDED)
            assert expected is None or len(item) > 19


@settings(deadline=None)
@given(
    st.lists(_items.filter(lambda item: twin(item) is not None), max_size=8), st.sampled_from(["float64", "float32"])
)
def test_a_batch_is_what_python_makes_of_it(items: list[bytes], dtype: str) -> None:
    batch = decode(fd.number(dtype), items)
    with np.errstate(over="ignore"):
        expected = np.array([float(item) for item in items], np.float64).astype(dtype)
    np.testing.assert_array_equal(batch, expected)
    assert batch.dtype == dtype
    assert batch.flags.writeable
    ones = [fd.number(dtype).decode_one(item, "here") for item in items]
    np.testing.assert_array_equal(np.array(ones, dtype), expected)


def test_the_table_is_that_of_the_proof() -> None:
    """Those powers that fit 128 bits are exact; the first and the last row are as its authors publish them."""
    table = powers_of_five()
    assert table.shape == (651, 2)
    for power in (0, 1, 27, 55):
        exact = 5**power << 128 >> (5**power).bit_length()
        assert (int(table[342 + power, 0]) << 64) + int(table[342 + power, 1]) == exact
    assert [hex(word) for word in table[0].tolist()] == ["0xeef453d6923bd65a", "0x113faa2906a13b3f"]
    assert [hex(word) for word in table[-1].tolist()] == ["0x8e679c2f5e44ff8f", "0x570f09eaa7ea7648"]


def test_into_a_part_of_a_batch() -> None:
    out = np.zeros(4, np.float32)
    fd.number("float32").decode_into(*group([b"5", b"0.1"]), out[1:3], where)
    assert out.tolist() == [0, 5, np.float32(0.1), 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
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
