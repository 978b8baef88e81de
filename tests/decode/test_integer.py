"""Integers out of text, against Python's own `int`."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload import decode as fd
from fastload.errors import DecodeError
from fastload.kernels.parse import parse_integers
from tests.decode.helpers import decode, group, where

_LARGEST = 2**63 - 1


def twin(items: list[bytes]) -> tuple[list[int], int]:
    """What `parse_integers` does, in plain Python: the values before the first failure, and its number or
    -1.
    """
    found: list[int] = []
    for number, item in enumerate(items):
        text = item.strip()
        if not re.fullmatch(rb"[+-]?[0-9]+", text) or not -_LARGEST - 1 <= int(text) <= _LARGEST:
            return found, number
        found.append(int(text))
    return found, -1


_near = st.integers(-(2**63) - 3, -(2**63) + 3) | st.integers(2**63 - 3, 2**63 + 3) | st.integers(2**64 - 3, 2**64 + 3)
_numbers = (_near | st.integers() | st.integers(-(10**19), 10**19)).map(lambda n: str(n).encode())
_spaces = st.text(" \t\n\r\x0b\x0c", max_size=3).map(str.encode)
_items = st.builds(lambda a, b, c: a + b + c, _spaces, _numbers, _spaces) | st.text(
    "0123456789+-_ .\n\x00\x1c\x85e", max_size=6
).map(lambda text: text.encode("latin-1"))


@settings(deadline=None)
@given(st.lists(_items), st.binary(max_size=3))
@example([b"-9223372036854775808", b"9223372036854775807", b"+0", b"-0", b"000000000000000000000000000012"], b"")
@example([b"9223372036854775808"], b"")
@example([b"-9223372036854775809"], b"")
@example([b"18446744073709551616"], b"")
@example([b"92233720368547758070"], b"")
@example([b""], b"7")
@example([], b"")
def test_kernel_and_twin(items: list[bytes], before: bytes) -> None:
    values, offsets = group(items, before)
    out = np.full(len(items), 99, np.int64)
    failed = parse_integers(values, offsets, out)
    expected, expected_failed = twin(items)
    assert failed == expected_failed
    assert out[: len(expected)].tolist() == expected


def test_batch() -> None:
    batch = decode(fd.integer(), [b"1", b" 22\n", b"-3"])
    assert batch.dtype == np.int64
    assert batch.tolist() == [1, 22, -3]
    assert batch.flags.writeable


def test_into_a_part_of_a_batch() -> None:
    out = np.zeros(4, np.int64)
    fd.integer().decode_into(*group([b"5", b"6"]), out[1:3], where)
    assert out.tolist() == [0, 5, 6, 0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "b'' is not a decimal integer"),
        (b"  ", "not a decimal"),
        (b"1_000", "b'1_000' is not"),
        (b"3.0", "b'3.0' is not"),
        (b"-", "not a decimal"),
        (b"+-5", "not a decimal"),
        (b"- 5", "not a decimal"),
        ("٣".encode(), "not a decimal"),
        (b"0x10", "not a decimal"),
        (b"9223372036854775808", "b'9223372036854775808' does not fit a 64-bit integer"),
        (b"x" * 1000, r"\.\.\. \(1000 bytes\) is not"),
    ],
)
def test_what_is_no_integer(bad: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=f"sample 2: column x: .*{message}"):
        decode(fd.integer(), [b"1", b"2", bad, b"also bad"])
    with pytest.raises(DecodeError, match=f"^here: .*{message}"):
        fd.integer().decode_one(bad, "here")
