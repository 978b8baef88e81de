"""Cyclic redundancy checks, sixteen bytes a turn, for polynomials that no library at hand knows; in 0.5 ns a byte.

Each of the sixteen bytes is looked up in a table of its own, which says what it makes of the check when the bytes
behind it are zeros; none of these waits for another (Kounavis and Berry, "A systematic approach to building high
performance software-based CRC generators", ISCC 2005). The check is one of 64 bits, or a shorter one in the low bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.declare import array_in, array_out, helper, int64, kernel, uint8, uint64, void

__all__ = ["CRC32C", "advance", "crc32_of", "tables_of"]

CRC32C = 0x82F63B78
"""The polynomial of CRC-32C (Castagnoli), lowest bit last."""

_BYTE = np.uint64(255)
_8, _16, _24, _32, _40, _48, _56 = (np.uint64(bits) for bits in range(8, 64, 8))
_TABLES = tuple(np.uint64(number << 8) for number in range(16))
_T0, _T1, _T2, _T3, _T4, _T5, _T6, _T7, _T8, _T9, _T10, _T11, _T12, _T13, _T14, _T15 = _TABLES


@functools.lru_cache(maxsize=4)
def tables_of(polynomial: int) -> NDArray[np.uint64]:
    """As the kernels take them."""
    first = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (polynomial if byte & 1 else 0)
        first.append(byte)
    rows = [first]
    for _ in range(15):
        rows.append([(value >> 8) ^ first[value & 255] for value in rows[-1]])
    tables = np.array(rows, np.uint64).ravel()
    tables.flags.writeable = False
    return tables


@helper(uint64(uint64, uint64, array_in(uint64)))
def _turn(a: Any, b: Any, tables: NDArray[np.uint64]) -> Any:
    """The check after two words, the first of which has the check before in it."""
    return (
        tables[_T15 | (a & _BYTE)]
        ^ tables[_T14 | ((a >> _8) & _BYTE)]
        ^ tables[_T13 | ((a >> _16) & _BYTE)]
        ^ tables[_T12 | ((a >> _24) & _BYTE)]
        ^ tables[_T11 | ((a >> _32) & _BYTE)]
        ^ tables[_T10 | ((a >> _40) & _BYTE)]
        ^ tables[_T9 | ((a >> _48) & _BYTE)]
        ^ tables[_T8 | (a >> _56)]
        ^ tables[_T7 | (b & _BYTE)]
        ^ tables[_T6 | ((b >> _8) & _BYTE)]
        ^ tables[_T5 | ((b >> _16) & _BYTE)]
        ^ tables[_T4 | ((b >> _24) & _BYTE)]
        ^ tables[_T3 | ((b >> _32) & _BYTE)]
        ^ tables[_T2 | ((b >> _40) & _BYTE)]
        ^ tables[_T1 | ((b >> _48) & _BYTE)]
        ^ tables[_T0 | (b >> _56)]
    )


@kernel(void(array_in(uint64), array_in(uint64), array_out(uint64)))
def advance(words: NDArray[np.uint64], tables: NDArray[np.uint64], check: NDArray[np.uint64]) -> None:
    """Take the check, which is one word, over an even number of little-endian words.

    `tables`, 4096 words: word `256 * n + b` is what byte b makes of a check of zero, with n zero bytes behind it.
    """
    now = check[0]
    for i in range(0, words.size - 1, 2):
        a, b = words[i] ^ now, words[i + 1]
        now = _turn(a, b, tables)
    check[0] = now


@helper(uint64(array_in(uint8), int64))
def _word(data: NDArray[np.uint8], at: int) -> Any:
    """The eight bytes from there on, wherever that is; compiled, one load."""
    word = uint64(0)
    for number in range(8):
        word |= uint64(data[at + number]) << uint64(8 * number)
    return word


@helper(int64(array_in(uint8), int64, int64, array_in(uint64)))
def crc32_of(data: NDArray[np.uint8], start: int, end: int, tables: NDArray[np.uint64]) -> int:
    """The check, of 32 bits, of `data[start:end]`, which begins and ends as usual: with ones, and inverted."""
    now = uint64(0xFFFFFFFF)
    at = start
    while at + 16 <= end:
        a, b = _word(data, at) ^ now, _word(data, at + 8)
        now = _turn(a, b, tables)
        at += 16
    while at < end:
        now = (now >> _8) ^ tables[(now ^ uint64(data[at])) & _BYTE]
        at += 1
    check: int = int64(now ^ uint64(0xFFFFFFFF))
    return check
