"""zstd: records that are packed each as one frame, and how large frames are unpacked (RFC 8878)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastload.errors import DecodeError

if TYPE_CHECKING:
    from fastload.formats.records import Bytes, Int64s, Where

_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPED = b"\x2a\x4d\x18"  # behind 0x50 to 0x5f: a frame that holds something else (3.1.2)
_HEAD_BYTES_MAX = 18
_REPEATED = 1  # a block of one byte, again and again
_HAS_SUM = 4  # four bytes behind the last block
_UNPACKED_BYTES_MAX = 1 << 30

HEADS_MAX = 1 << 20
"""Heads of frames and blocks that are read, at most: seconds of Python, and 128 GiB of blocks as they are usual."""


def unpacked(records: Bytes, offsets: Int64s, where: Where) -> tuple[Bytes, Int64s]:
    """The records, unpacked, and their offsets. DecodeError, with `where(i)` before it, for one that cannot be, or that
    would take more than a GiB.
    """
    import pyarrow as pa  # takes a quarter of a second to import

    sizes = [0]
    for number in range(len(offsets) - 1):
        head = records[offsets[number] : min(offsets[number] + _HEAD_BYTES_MAX, offsets[number + 1])].tobytes()
        size = frame_bytes(head)
        if size is None or size > _UNPACKED_BYTES_MAX:
            what = "is no frame of zstd that says its size" if size is None else f"has {size} bytes unpacked"
            raise DecodeError(f"{where(number)}: it {what}; at most {_UNPACKED_BYTES_MAX} are read: write it again")
        sizes.append(size)
    out_offsets = np.cumsum(sizes, dtype=np.int64)
    out, codec = np.empty(int(out_offsets[-1]), np.uint8), pa.Codec("zstd")
    for number, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        try:
            found = codec.decompress(records[start:end].data, sizes[number + 1])
        except (OSError, ValueError) as error:
            raise DecodeError(f"{where(number)}: it cannot be unpacked ({error}): it is damaged") from error
        if found.size != sizes[number + 1]:
            raise DecodeError(f"{where(number)}: it has {found.size} bytes unpacked, and says {sizes[number + 1]}")
        out[out_offsets[number] : out_offsets[number + 1]] = np.frombuffer(found, np.uint8)
    return out, out_offsets


def frame_bytes(head: bytes) -> int | None:
    """How large a frame is unpacked, which its head says (RFC 8878, 3.1.1.1); None where it does not."""
    if not head.startswith(_MAGIC) or len(head) < 6:
        return None
    at, width = _place_of_size(head[4])
    if not width or at + width > len(head):
        return None
    return int.from_bytes(head[at : at + width], "little") + (256 if width == 2 else 0)


def unpacked_bytes(size: int, read: Callable[[int], bytes | bytearray]) -> int | None:
    """How large a file of `size` packed bytes is unpacked, as the heads of all its frames say; None where one does not
    say it, where there are very many, and where the frames do not end where the file does. `read(start)` gives some
    bytes from there on.
    """
    data: bytes | bytearray = b""
    at = first = total = head_count = 0  # `data` begins at `first`

    def head(count: int) -> bytes:
        """Bytes at `at`, fewer at the end."""
        nonlocal data, first, head_count
        head_count += 1
        if not first <= at <= at + count <= first + len(data) and at < size:
            first, data = at, read(at)
        return bytes(data[at - first : at - first + count])

    while at < size and head_count < HEADS_MAX:
        begin = head(_HEAD_BYTES_MAX)
        if begin[1:4] == _SKIPPED and begin[0] >> 4 == 5:
            at += 8 + int.from_bytes(begin[4:8], "little")
            continue
        said = frame_bytes(begin)
        if said is None:
            return None
        total += said
        place, width = _place_of_size(begin[4])
        at += place + width
        is_last = False
        while not is_last:
            about = head(3)
            if len(about) < 3 or head_count > HEADS_MAX:
                return None
            number = int.from_bytes(about, "little")
            is_last, kind, length = bool(number & 1), number >> 1 & 3, number >> 3
            at += 3 + (1 if kind == _REPEATED else length)
        at += 4 if begin[4] & _HAS_SUM else 0
    return total if at == size else None


def _place_of_size(about: int) -> tuple[int, int]:
    """Where a frame says how large it is, and in how many bytes."""
    is_single = about >> 5 & 1
    return 5 + (not is_single) + (0, 1, 2, 4)[about & 3], (is_single, 2, 4, 8)[about >> 6]
