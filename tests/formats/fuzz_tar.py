"""`make fuzz`: damaged archives through the tar index. See `fuzzing` for how.

    python -m tests.formats.fuzz_tar --seconds 600

Archives of all formats are made of members with names and sizes around the lengths where something changes, of headers
block by block, of what GNU tar writes for sparse files, and then damaged: fields of headers, mostly with the checksum
put right again so that the damage is believed, records of pax headers, blocks moved, doubled, left out and emptied, an
end cut off or bytes behind it. The indexer's own buffers are small in most cases, so that they run full.

What must hold, whatever the bytes: an error that names the object and a place within it, or an index; each member
within the object, behind its header and before the next one; and the same from pieces of any size, with those left out
that are not needed.
"""

from __future__ import annotations

import random
import re
import tarfile
from typing import Any

import numpy as np

from fastload.errors import ShardError
from fastload.formats import ShardIndex, tar
from tests.formats import fuzzing
from tests.formats.archives import BLOCK, URL, Member, header, padded, pax, write

STEMS = [
    "a",
    "b",
    "dir/a",
    "d.d/a",
    "__m__/x",
    ".hidden",
    "",
    "/",
    "ä",
    "n" * 99,
    "n" * 155 + "/" + "m" * 99,
    "x" * 700,
]
ENDINGS = ["", ".x", ".X", ".y", ".é", ".É", ".tar.gz", ".", "..", ".__key__", ".\udcff"]
SIZES = [0, 1, 511, 512, 513, 1024, 3000]
KINDS = [bytes([kind]) for kind in b"0000\x0012345678LKxXgSVMDN"]
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
KEYWORDS = ["path", "size", "mtime", "comment", "GNU.sparse.major", "GNU.sparse.map", "hdrcharset", "linkpath", "p"]
NUMBERS = [0, 1, 511, 512, 513, 10240, 1 << 33, (1 << 54) - 1, 1 << 54, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 90]

# Sizes that may differ: the largest name, the largest payload, and members a call of the kernel.
_BUFFERS = {"NAME_BYTES_MAX": [256, 300, 1000], "PAYLOAD_BYTES_MAX": [0, 512, 700, 5000], "_MEMBERS": [1, 2, 3, 20]}
_OFFSET = re.compile(re.escape(URL) + r", offset (\d+): ")
# What is said of a whole archive, without a place.
_OF_ALL = ("it is compressed, and its name does not say so", "which is reserved")


# Archives.


def make(rng: random.Random) -> bytes:
    """A damaged archive; in one case of twenty a good one."""
    data = b"".join(_part(rng) for _ in range(rng.randint(1, 3)))
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 5, 20])):
        _damage(blocks, rng)
    data = b"".join(blocks)
    if rng.random() < 0.2:
        data = data[: rng.randrange(len(data) + 1)]
    if rng.random() < 0.1:
        data += rng.randbytes(rng.choice([1, 511, 512, 700]))
    return data or b"\0"


def _part(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.4:
        members = [Member(_name(rng), rng.randbytes(rng.choice(SIZES)), _kind(rng), "t" * 150) for _ in _few(rng)]
        try:
            return write(members, rng.choice(FORMATS), errors="surrogateescape")
        except ValueError:  # ustar has no room for such a name
            return write(members, tarfile.PAX_FORMAT, errors="surrogateescape")
    if kind < 0.5:
        return _sparse(rng)
    return b"".join(_blocks(rng) for _ in _few(rng)) + rng.choice([b"", b"\0" * BLOCK, b"\0" * 2 * BLOCK])


def _few(rng: random.Random) -> range:
    return range(rng.choice([0, 1, 1, 2, 2, 3, 4, 8, 30]))


def _kind(rng: random.Random) -> bytes:
    return rng.choice([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])


def _name(rng: random.Random) -> str:
    return rng.choice(STEMS) + rng.choice(ENDINGS)


def _raw_name(rng: random.Random) -> bytes:
    return _name(rng).encode(errors="surrogateescape")


def _blocks(rng: random.Random) -> bytes:
    """A header of any kind with its data, or a pax header."""
    if rng.random() < 0.3:
        records: dict[str, str | bytes] = {rng.choice(KEYWORDS): _value(rng) for _ in range(rng.randint(0, 3))}
        return pax(records, rng.choice([b"x", b"x", b"X", b"g"]))
    kind, size = rng.choice(KINDS), rng.choice(SIZES)
    data = (_raw_name(rng) + b"\0").ljust(size, b"\0")[:size] if kind in b"LK" else rng.randbytes(size)
    field = rng.choice([size, size, _size_field(rng)])
    magic = rng.choice([b"ustar\x0000", b"ustar  \0", b"\0" * 8])
    prefix = rng.choice([b"", b"", _raw_name(rng)[:155]])
    return header(_raw_name(rng)[:100], field, kind, magic=magic, prefix=prefix) + padded(data)


def _value(rng: random.Random) -> str | bytes:
    return rng.choice([str(rng.choice(NUMBERS)), _raw_name(rng), b"", b"-1", b"1=2", b"\n", b"a\0b", b"9" * 30])


def _size_field(rng: random.Random) -> bytes:
    """Twelve bytes: octal, base-256, negative, text, or anything."""
    number = rng.choice([rng.choice(NUMBERS), rng.randrange(1 << 14)])
    return rng.choice(
        [
            b"%011o\0" % (number & (1 << 33) - 1),
            b"%012o" % (number & (1 << 36) - 1),
            b"\x80" + (number & (1 << 88) - 1).to_bytes(11, "big"),
            b"\xff" + ((1 << 88) - number & (1 << 88) - 1).to_bytes(11, "big"),
            b"%12o" % (number & (1 << 36) - 1),
            b" " * 12,
            b"\0" * 12,
            b"-0000000001\0",
            b"0x12\0".ljust(12, b"\0"),
            rng.randbytes(12),
        ]
    )


def _sparse(rng: random.Random) -> bytes:
    """As GNU tar writes them: its own format with headers that go on, and the three of pax."""
    form = rng.randrange(4)
    if form == 0:
        block = bytearray(header(b"s.x", BLOCK, b"S", magic=b"ustar  \0"))
        block[386:410] = b"%011o\0%011o\0" % (0, BLOCK)
        block[482] = more = rng.randrange(2)
        _seal(block)
        return bytes(block) + rng.randbytes(BLOCK) * more + rng.randbytes(BLOCK)
    records: dict[str, str | bytes] = {
        1: {"GNU.sparse.size": "9999", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0"},
        2: {"GNU.sparse.map": "0,512", "GNU.sparse.size": "9999"},
        3: {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.x", "GNU.sparse.realsize": "9999"},
    }[form]
    return pax(records) + header(b"GNUSparseFile.0/s.x", 2 * BLOCK) + padded(b"1\n0\n512\n") + rng.randbytes(BLOCK)


# Damage.


def _damage(blocks: list[bytes], rng: random.Random) -> None:
    """Change one thing."""
    if not blocks:
        return
    at = rng.randrange(len(blocks))
    what = rng.random()
    if what < 0.5:
        heads = [number for number, block in enumerate(blocks) if block[257:262] == b"ustar"]
        at = rng.choice(heads) if heads else at
        blocks[at] = _damaged_header(blocks[at], rng)
    elif what < 0.65:
        blocks[at] = _damaged_text(blocks[at], rng)
    elif what < 0.75:
        block = bytearray(blocks[at])
        for _ in range(rng.choice([1, 1, 8, 64])):
            block[rng.randrange(len(block))] = rng.randrange(256)
        blocks[at] = bytes(block)
    elif what < 0.8:
        blocks.insert(at, rng.choice([b"\0" * BLOCK, rng.randbytes(BLOCK), blocks[at]]))
    elif what < 0.9:
        other = rng.randrange(len(blocks))
        blocks[at], blocks[other] = blocks[other], blocks[at]
    elif what < 0.95:
        blocks[at] = b"\0" * BLOCK
    else:
        del blocks[at : at + rng.choice([1, 1, 2, 5])]


def _damaged_header(block: bytes, rng: random.Random) -> bytes:
    """With another field, mostly under a checksum that says all is well."""
    if len(block) < BLOCK:
        return block
    changed = bytearray(block)
    start, new = rng.choice(
        [
            (124, _size_field(rng)),
            (124, _size_field(rng)),
            (156, rng.choice(KINDS)),
            (156, rng.choice(KINDS)),
            (0, _raw_name(rng)[:100].ljust(100, b"\0")),
            (0, b"\xff" * 100),
            (257, rng.choice([b"ustar\x0000", b"ustar  \0", b"\0" * 8])),
            (345, _raw_name(rng)[:155].ljust(155, b"x")),
            (345, b"p" * 167),
            (148, _size_field(rng)[:8]),
            (rng.randrange(BLOCK), bytes([rng.randrange(256)])),
        ]
    )
    changed[start : start + len(new)] = new
    if rng.random() < 0.9 and start != 148:
        _seal(changed, signed=rng.random() < 0.1)
    return bytes(changed)


def _seal(block: bytearray, signed: bool = False) -> None:
    """Put the checksum right."""
    block[148:156] = b" " * 8
    total = sum(block) - (256 * sum(byte >> 7 for byte in block) if signed else 0)
    block[148:156] = b"%06o\0 " % (total & 0o777777)


def _damaged_text(block: bytes, rng: random.Random) -> bytes:
    """With a digit, "=", blank or end of line changed, put in or taken out: what records of pax are made of."""
    marks = [at for at, byte in enumerate(block) if byte in b"0123456789= \n"]
    if not marks:
        return block
    at, new = rng.choice(marks), bytes([rng.choice(b"0123456789= \n\0a")])
    changed = rng.choice(
        [block[:at] + new + block[at + 1 :], block[:at] + new + block[at:], block[:at] + block[at + 1 :]]
    )
    return changed[: len(block)].ljust(len(block), b"\0")


# What must hold.


def check(data: bytes, rng: random.Random) -> None:
    """Index it in pieces of two sizes; AssertionError where something is wrong with what comes of that."""
    buffers = {name: rng.choice(sizes) for name, sizes in _BUFFERS.items()} if rng.random() < 0.9 else {}
    outcomes = [outcome(data, rng, buffers) for _ in range(2)]
    assert outcomes[0] == outcomes[1], f"{outcomes[0]!r} and {outcomes[1]!r} of the same bytes"
    found = outcomes[0]
    if isinstance(found, str):
        check_message(found, len(data))
    else:
        check_index(found, data)


def outcome(data: bytes, rng: random.Random, buffers: dict[str, int]) -> ShardIndex | str:
    """The index or the error of an archive that comes in pieces, all arrays guarded."""
    kept = {name: getattr(tar, name) for name in buffers}
    numpy: Any = fuzzing.Guarding(rng)
    try:
        tar.np = numpy
        for name, size in buffers.items():
            setattr(tar, name, size)
        return _index(data, rng.choice([1, 2, 7, 8, 64, 1 << 14]) * BLOCK, rng.random() < 0.5, rng)
    except ShardError as error:
        return str(error)
    finally:
        tar.np = np
        for name, size in kept.items():
            setattr(tar, name, size)


def _index(data: bytes, piece_bytes: int, skip: bool, rng: random.Random) -> ShardIndex:
    indexer = tar.TarIndexer(URL, len(data))
    at_end = rng.random() < 0.7
    start = 0
    while not indexer.done:
        assert start < len(data), f"byte {indexer.next_offset} is said to be needed of {len(data)}"
        piece = data[start : start + piece_bytes]
        array = fuzzing.guarded(len(piece), np.uint8, at_end)
        array[:] = np.frombuffer(piece, np.uint8)
        indexer.feed(array, start)
        end = start + len(piece)
        assert indexer.next_offset >= end, f"byte {indexer.next_offset} is still needed after all up to {end}"
        assert indexer.next_offset <= len(data), f"byte {indexer.next_offset} is needed of {len(data)}"
        start = indexer.next_offset // piece_bytes * piece_bytes if skip else end
    return indexer.finish()


def check_message(message: str, size: int) -> None:
    """It names the object and a place within it."""
    assert message.startswith(URL), message
    place = _OFFSET.match(message)
    assert place or any(words in message for words in _OF_ALL), f"no place in: {message}"
    assert place is None or int(place[1]) < size, f"a place outside of {size} bytes: {message}"


def check_index(found: ShardIndex, data: bytes) -> None:
    """All members lie where they can, and the index can be stored."""
    starts, ends = found.member_offset, found.member_offset + found.member_size
    assert np.all(found.member_size >= 0), "a negative size"
    assert np.all(starts >= BLOCK), "a member without a header before it"
    assert np.all(starts % BLOCK == 0), "a member between blocks"
    assert np.all(ends <= len(data)), "a member that leaves the object"
    assert np.all(starts[1:] >= ends[:-1] + BLOCK), "a member within another"
    assert found.object_size == len(data)
    assert ShardIndex.from_bytes(found.to_bytes(), URL, len(data)) == found, "stored, it is another"


TARGET = fuzzing.Target("tar", make, check)

if __name__ == "__main__":
    fuzzing.main("tests.formats.fuzz_tar", TARGET)
