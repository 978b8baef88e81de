"""Fractions out of text: those of a whole batch in one call, without a Python object for any of them.

A decimal fraction is a mantissa w, the first 19 digits, and a power q of ten. The float64 that is nearest to w * 10**q
follows from the upper half of w times a 128-bit approximation of 5**q, and always does where w has all digits: Lemire,
"Number Parsing at a Gigabyte per Second" (2021), and Mushtak and Lemire, "Fast Number Parsing Without Fallback" (2022).
Where there are more digits, w and w + 1 nearly always give the same float64; where they do not, somebody else decides.

45 ns for one of 17 digits, where Python's `float` takes 280.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fastload.kernels.jit import array_in, array_out, helper, int64, kernel, tuple_of, uint8, uint64
from fastload.kernels.parse import is_space

__all__ = ["MALFORMED", "UNDECIDED", "parse_floats", "powers_of_five"]

Bytes: TypeAlias = npt.NDArray[np.uint8]
Int64s: TypeAlias = npt.NDArray[np.int64]
Words: TypeAlias = npt.NDArray[np.uint64]

_SIGN = np.uint64(1 << 63)
# float64: 52 bits of fraction, 11 of exponent.
_EXPONENT_MIN, _EXPONENT_MAX = -342, 308  # of ten: what is below is 0 and what is above is infinite
_INFINITE = np.uint64(0x7FF << 52)
_NAN = np.uint64(0x7FF8 << 48)
_NO_BITS = np.uint64((1 << 64) - 1)  # no float64's magnitude has the sign bit
_DIGITS = 19  # that fit 64 bits
_ZERO, _ONE, _HALF, _LOW_HALF = np.uint64(0), np.uint64(1), np.uint64(32), np.uint64((1 << 32) - 1)
_IMPLIED = np.uint64(1 << 52)

# Why `parse_floats` stopped.
MALFORMED, UNDECIDED = 0, 1


@cache
def powers_of_five() -> Words:
    """uint64[651, 2]: the upper and lower half of 5**q for q from -342 to 308, each scaled to 128 bits and rounded down
    (up, from -27 to -1), as the proof has it.
    """
    rows = []
    for q in range(_EXPONENT_MIN, _EXPONENT_MAX + 1):
        power = 5 ** abs(q)
        bits = power.bit_length()
        scaled = power << 128 >> bits if q >= 0 else (1 << (bits + 127)) // power + (q >= -27)
        rows.append((scaled >> 64, scaled & ((1 << 64) - 1)))
    table = np.array(rows, np.uint64)
    table.flags.writeable = False
    return table


@kernel(int64(array_in(uint8), array_in(int64), array_in(uint64, 2), int64, array_out(uint64), array_out(int64)))
def parse_floats(values: Bytes, offsets: Int64s, powers: Words, first: int, out: Words, stopped: Int64s) -> int:
    """Parse item i, `values[offsets[i]:offsets[i + 1]]`, from item `first` on, into the bits of a float64, `out[i]`.

    An item is what Python's `float` takes of ASCII bytes, but for underscores. Returns the number of the first item
    that is something else (`stopped[0]` is then MALFORMED) or whose rounding is not decided here (UNDECIDED), or -1;
    `out` is filled up to there. `powers` is `powers_of_five()`. The offsets must lie within `values` and never fall.
    """
    for item in range(first, len(offsets) - 1):
        start, end = offsets[item], offsets[item + 1]
        while start < end and is_space(values[start]):
            start += 1
        while start < end and is_space(values[end - 1]):
            end -= 1
        negative = start < end and values[start] == 45
        if start < end and (values[start] == 43 or values[start] == 45):
            start += 1
        bits = _magnitude(values[start:end], powers, stopped)
        if bits == _NO_BITS:
            return item
        out[item] = bits | _SIGN if negative else bits
    return -1


@helper(uint64(array_in(uint8), array_in(uint64, 2), array_out(int64)))
def _magnitude(text: Bytes, powers: Words, stopped: Int64s) -> np.uint64:
    """The bits of an unsigned number; _NO_BITS, and why in `stopped`, where there are none."""
    stopped[0] = MALFORMED
    mantissa, digits, exponent, at = _ZERO, 0, 0, 0
    passed_point, is_long, any_digit = False, False, False
    while at < text.size:
        byte = text[at]
        if byte == 46 and not passed_point:
            passed_point = True
        elif 48 <= byte <= 57:
            any_digit = True
            if digits < _DIGITS:
                mantissa = mantissa * np.uint64(10) + np.uint64(byte - 48)
                digits += mantissa != _ZERO  # those in front that are 0 do not count
                exponent -= passed_point
            else:
                is_long |= byte != 48
                exponent += not passed_point
        else:
            break
        at += 1
    if not any_digit:
        return _word(text) if at == 0 else _NO_BITS
    if at < text.size:
        shift = _exponent(text[at:])
        if shift == _EXPONENT_BAD:
            return _NO_BITS
        exponent += shift
    bits = _nearest(mantissa, exponent, powers)
    if is_long and _nearest(mantissa + _ONE, exponent, powers) != bits:
        stopped[0] = UNDECIDED
        return _NO_BITS
    return bits


_EXPONENT_BAD = -(1 << 62)


@helper(int64(array_in(uint8)))
def _exponent(text: Bytes) -> int:
    """What stands after the digits: e or E, a sign or none, digits."""
    if text[0] != 101 and text[0] != 69:
        return _EXPONENT_BAD
    at = 1
    negative = at < text.size and text[at] == 45
    if at < text.size and (text[at] == 43 or text[at] == 45):
        at += 1
    if at == text.size:
        return _EXPONENT_BAD
    value = 0
    for i in range(at, text.size):
        if not 48 <= text[i] <= 57:
            return _EXPONENT_BAD
        value = min(value * 10 + (int64(text[i]) - 48), 1 << 40)  # more than any text has digits to make up for
    return -value if negative else value


@helper(uint64(array_in(uint8)))
def _word(text: Bytes) -> np.uint64:
    """inf, infinity or nan, in any case of letters."""
    letters = _ZERO
    if text.size != 3 and text.size != 8:
        return _NO_BITS
    for i in range(text.size):
        letters = letters << np.uint64(8) | np.uint64(text[i] | 32)
    if letters == np.uint64(0x696E66) or letters == np.uint64(0x696E66696E697479):
        return _INFINITE
    return _NAN if letters == np.uint64(0x6E616E) else _NO_BITS


@helper(tuple_of(uint64, 2)(uint64, uint64))
def _product(a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """The upper and the lower half of a * b."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW_HALF, b >> _HALF, b & _LOW_HALF
    low, middle = a_low * b_low, a_high * b_low
    carry = (low >> _HALF) + (middle & _LOW_HALF) + a_low * b_high  # cannot overflow
    return a_high * b_high + (middle >> _HALF) + (carry >> _HALF), carry << _HALF | low & _LOW_HALF


@helper(uint64(uint64, int64, array_in(uint64, 2)))
def _nearest(mantissa: np.uint64, exponent: int, powers: Words) -> np.uint64:
    """The bits of the float64 nearest to mantissa * 10**exponent; of two that are as near, the even one."""
    if mantissa == _ZERO or exponent < _EXPONENT_MIN:
        return _ZERO
    if exponent > _EXPONENT_MAX:
        return _INFINITE
    zeros = 0
    while mantissa < _SIGN:
        mantissa <<= _ONE
        zeros += 1
    row = exponent - _EXPONENT_MIN
    high, low = _product(mantissa, powers[row, 0])
    if high & np.uint64(0x1FF) == np.uint64(0x1FF):  # more bits may carry over
        more, _ = _product(mantissa, powers[row, 1])
        low += more
        if low < more:
            high += _ONE
    upper = high >> np.uint64(63)
    shift = upper + np.uint64(9)
    fraction = high >> shift  # 53 bits, and one to round by
    power = ((152170 + 65536) * exponent >> 16) + 63 + int64(upper) - zeros + 1023
    if power <= 0:  # subnormal
        if power < -62:
            return _ZERO
        fraction >>= np.uint64(1 - power)
        return (fraction + (fraction & _ONE)) >> _ONE  # where that carries, it is the smallest normal one
    # Exactly between two: only where 5**exponent is small enough for a product without remainder.
    if low <= _ONE and -4 <= exponent <= 23 and fraction & np.uint64(3) == _ONE and fraction << shift == high:
        fraction &= ~_ONE
    fraction = (fraction + (fraction & _ONE)) >> _ONE
    if fraction >= _IMPLIED << _ONE:
        fraction, power = _IMPLIED, power + 1
    return _INFINITE if power >= 0x7FF else np.uint64(power) << np.uint64(52) | fraction & ~_IMPLIED
