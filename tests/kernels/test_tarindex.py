"""The parts of the tar kernel against plain Python and Python's tarfile. The whole of it: tests/formats."""

from __future__ import annotations

import re
import tarfile

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload.kernels import tarindex
from fastload.kernels.tarindex import STATE_SIZE, checksum_fits, parse_number, read_pax, text_length

HUGE = 1 << 54
FIELDS = st.one_of(
    st.binary(min_size=8, max_size=12),
    st.text("01237 89\0x", min_size=8, max_size=12).map(str.encode),
    st.binary(min_size=7, max_size=11).map(lambda rest: b"\x80" + rest),
)

# How archivers write a checksum.
FORMS = [b"%06o\0 ", b"%07o\0", b"%7o "]


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def plain_number(field: bytes) -> int:
    """What a field of digits says; -1 for anything else."""
    if field[0] == 0x80:
        return min(int.from_bytes(field[1:], "big"), HUGE)
    octal = re.fullmatch(rb" *([0-7]*) *(\0.*)?", field, re.DOTALL)
    return -1 if octal is None else int(octal[1] or b"0", 8)


@settings(max_examples=100, deadline=None)
@given(FIELDS)
@example(b"\x80" + b"\xff" * 11)
@example(b"        ")
@example(b"\0" * 8)
def test_numbers(field: bytes) -> None:
    found = parse_number(array(field))
    assert found == plain_number(field)
    if 0 <= found < HUGE:
        assert found == tarfile.nti(field)


@settings(deadline=None)
@given(st.binary(max_size=20), st.integers(0, 20))
def test_texts_end_at_zero(field: bytes, zeros: int) -> None:
    field += bytes(zeros)
    assert text_length(array(field)) == len(field.partition(b"\0")[0])


@settings(max_examples=80, deadline=None)
@given(
    st.binary(min_size=512, max_size=512),
    st.sampled_from([0, 1, None]),
    st.sampled_from([b"%06o\0 ", b"%07o\0", b"%7o "]),
)
def test_checksums_are_those_of_tarfile(block: bytes, which: int | None, form: bytes) -> None:
    if which is not None:
        total = tarfile.calc_chksums(block)[which]
        block = block[:148] + form % max(0, total) + block[156:]
    stored = plain_number(block[148:156])
    assert checksum_fits(array(block)) == (stored in tarfile.calc_chksums(block))


def record(keyword: bytes, value: bytes, wrong: int) -> bytes:
    """A pax record whose length is off by `wrong`."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length += 1
    return b"%d" % max(0, length + wrong) + rest


def plain_pax(payload: bytes, shared: bool, room: int) -> tuple[int, bytes | None, int, bool]:
    """Code, name, size and whether it is sparse."""
    name, size, sparse = None, -1, False
    while payload and payload[0]:
        digits = re.match(rb"[0-9]+", payload)
        end = int(digits[0]) if digits else 0
        entry = re.fullmatch(rb"[0-9]+ ([^=]+)=(.*)\n", payload[:end], re.DOTALL) if end <= len(payload) else None
        if entry is None:
            return tarindex.BAD_PAX, None, -1, sparse
        keyword, value = entry[1], entry[2]
        if keyword == b"path":
            name = value.rstrip(b"/")
        elif keyword == b"size":
            if not re.fullmatch(rb"[0-9]+", value):
                return tarindex.BAD_PAX, None, -1, sparse
            size = min(int(value), HUGE)
        elif keyword.startswith(b"GNU.sparse."):
            sparse = True
        payload = payload[end:]
    if shared and size >= 0:
        return tarindex.GLOBAL_SIZE, None, -1, sparse
    if name is not None and len(name) > room:
        return tarindex.TOO_LONG, None, size, sparse
    return tarindex.MORE, name, size, sparse


RECORDS = st.builds(
    record,
    st.sampled_from([b"path", b"size", b"mtime", b"GNU.sparse.major", b"GNU.sparse", b"", b"pat\xff", b"paths"]),
    st.sampled_from([b"", b"a", b"b/c//", b"=\n", b"123", b"12x", b"9" * 30, b"x" * 20]) | st.binary(max_size=4),
    st.sampled_from([0] * 12 + [-1, 1, 7]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(RECORDS, max_size=4), st.binary(max_size=3), st.booleans())
def test_pax_headers(records: list[bytes], rest: bytes, shared: bool) -> None:
    payload, room = b"".join(records) + rest, 12
    state, out = np.zeros(STATE_SIZE, np.int64), np.zeros(room, np.uint8)
    state[[tarindex.PENDING_NAME, tarindex.PENDING_SIZE, tarindex.GLOBAL_NAME]] = -1
    state[tarindex.MODE] = tarindex._GLOBAL_PAX if shared else tarindex._PAX
    slot, other = tarindex.PENDING_NAME, tarindex.GLOBAL_NAME
    if shared:
        slot, other = other, slot
    code = read_pax(array(payload), state, out)
    expected, name, size, sparse = plain_pax(payload, shared, room)
    assert code == expected
    assert state[tarindex.PENDING_SPARSE] == sparse
    assert state[other] == -1
    if code == tarindex.MORE:
        assert (None if state[slot] < 0 else out[: state[slot]].tobytes()) == name
        assert state[tarindex.PENDING_SIZE] == size
