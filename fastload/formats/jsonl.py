"""JSON lines: a file of text, each line a JSON object. Lines end in LF or CR LF, the last one may lack that; blank
lines and a byte order mark at the beginning are left out.

Where the lines are is found by reading all of a file once. A large file is read in pieces: a line belongs to the piece
in which the line before it ends, so that no piece is read to know where another begins. The values of the columns that
are asked for are found in a line when it is gathered, and are JSON themselves; nothing else of it is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastload import decode
from fastload.decode import Decoder
from fastload.errors import DecodeError, ShardError
from fastload.formats.pieces import own_bytes
from fastload.formats.record_index import RecordIndex, shard_name
from fastload.formats.records import Bytes, Int64s, RecordReader, Where, layout_of
from fastload.kernels.records import find_lines, find_members
from fastload.store.types import ObjectInfo

WHOLE = "json"
"""The column that has all of a line, where none are asked for."""

_MARK, _MARKS_OF_UTF16 = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
_LINE_END = ord("\n")
_HEAD_BYTES = 512  # of text, as of binary files: a zero is in those of TFRecord, MDS, LitData and tars
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_AT_ONCE = 1 << 16
_LINE_BYTES_MAX = (1 << 32) - 1


class JsonlIndexer:
    """Makes the index of one file from all of its bytes, or of a piece of one. Used by one thread.

    Offsets count from the start of the piece. It goes on behind its end up to the end of its last line.
    """

    def __init__(self, url: str, size: int, piece: ObjectInfo | None = None) -> None:
        self._url, self._given, self._start = url, size, 0 if piece is None else piece.start
        self._size = size if piece is None else own_bytes(piece)
        self._object_end = size if piece is None else piece.whole.size - piece.start
        self._state = np.zeros(2, np.int64)
        self._starts: list[NDArray[np.int64]] = []
        self._ends: list[NDArray[np.int64]] = []
        self._is_open_blank = True  # the line that goes on beyond what was read
        self._is_before_first = self._start > 0  # what was read so far is of a line of the piece before
        self._head = b""  # of the file
        self._done = self._object_end == 0

    @property
    def next_offset(self) -> int:
        """The offset of the next byte that is needed; where all that is there ends once none is."""
        return self._object_end if self._done else int(self._state[1])

    @property
    def done(self) -> bool:
        """Whether no more bytes are needed."""
        return self._done

    def feed(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Read `chunk`, which lies at `start` in the object, or in the piece."""
        if not start <= self.next_offset < start + len(chunk):
            raise ShardError(f"{self._url}: bytes from {start} came where those from {self.next_offset} were needed")
        if not self._start and start < _HEAD_BYTES:
            self._head = self._head[:start] + chunk[: _HEAD_BYTES - start].tobytes()
        if self._is_before_first:
            self._skip(chunk, start)
        elif start == 0 and chunk[:3].tobytes() == _MARK:
            self._state[:] = len(_MARK)
        elif start == 0:
            self._check_text(chunk[:_HEAD_BYTES].tobytes())
        last = self._size - start if self._size < self._object_end else len(chunk)  # the line that is the last of ours
        if not self._is_before_first:
            end = len(chunk) if last >= len(chunk) else _line_end(chunk, max(0, last))
            self._find(chunk[:end], start)
            # The line end at which our last line ends was found.
            self._done = self._state[0] > self._size
        self._done = self._done or start + len(chunk) >= self._object_end
        if self._is_before_first and start + len(chunk) >= self._size:
            self._done = True  # one line goes through all of the piece

    def _check_text(self, head: bytes) -> None:
        """ShardError where a file that begins so is none of lines."""
        if head.startswith(_MARKS_OF_UTF16):
            raise ShardError(
                f"{self._url} is text in UTF-16, and JSON is in UTF-8; write it so: iconv -f UTF-16 -t UTF-8 "
                f"{shard_name(self._url)}"
            )
        for mark, tool in _PACKED.items():
            if head.startswith(mark):
                raise ShardError(
                    f"{self._url} is compressed with {tool}, and its name does not say so; let that end in .gz, .zst, "
                    ".xz or .bz2"
                )
        zero = head.find(0)
        if zero >= 0 and not head.lstrip().startswith(b"{"):  # else a line is damaged, which may be skipped
            raise ShardError(
                f"{self._url} has a zero at byte {zero}, and JSON lines are text in UTF-8: it is of another format, "
                "which its ending or format= has to name, or it is damaged"
            )

    def _skip(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Go to the first line that begins behind a line end in the piece."""
        end = _line_end(chunk[: max(0, self._size - start)], 0)
        self._is_before_first = not end or chunk[end - 1] != _LINE_END
        self._state[:] = start + (len(chunk) if self._is_before_first else end)

    def _find(self, chunk: NDArray[np.uint8], start: int) -> None:
        """Find the lines that end in a chunk, or in what is left of it."""
        opened, was_blank = int(self._state[0]), self._is_open_blank
        first = len(self._starts)
        is_aligned = chunk.ctypes.data % 8 == 0  # as chunks in the arena are
        words = chunk[: len(chunk) // 8 * 8 if is_aligned else 0].view(np.uint64)
        while self.next_offset < start + len(chunk):
            starts, ends = np.empty((2, _AT_ONCE), np.int64)
            found = find_lines(chunk, words, start, self._state, starts, ends)
            self._starts.append(starts[:found].copy())
            self._ends.append(ends[:found].copy())
        if opened < start and was_blank:
            self._drop_blank(first, chunk, start)
        rest = chunk[max(0, int(self._state[0]) - start) :]
        self._is_open_blank = (was_blank or int(self._state[0]) > opened) and _is_blank(rest)

    def _drop_blank(self, number: int, chunk: NDArray[np.uint8], start: int) -> None:
        """Leave out the first line of a chunk, found as `number`, where it began before and nothing is in it."""
        ends = self._ends[number]
        if len(ends) and self._starts[number][0] < start and _is_blank(chunk[: ends[0] - start]):
            self._starts[number], self._ends[number] = self._starts[number][1:], ends[1:]

    def finish(self) -> RecordIndex:
        """The index. ShardError: a line is longer than can be, or the first is no object by itself."""
        is_open = not self._is_before_first and self._state[0] <= self._size and self._state[0] < self._object_end
        if is_open and not self._is_open_blank:  # the last line of the file may lack its end
            self._starts.append(self._state[:1].copy())
            self._ends.append(np.array([self._object_end], np.int64))
        none = np.empty(0, np.int64)
        starts, ends = np.concatenate([none, *self._starts]), np.concatenate([none, *self._ends])
        sizes = ends - starts
        first = self._head[starts[0] : ends[0]].strip() if len(starts) and ends[0] <= _HEAD_BYTES else b""
        if first in (b"{", b"["):
            how = "." if first == b"{" else "'.[]'"
            raise ShardError(
                f"{self._url} begins with the line {first.decode()!r}: it is JSON of several lines, and JSON lines "
                f"have an object each; write it so: jq -c {how} {shard_name(self._url)}"
            )
        if len(sizes) and sizes.max() > _LINE_BYTES_MAX:
            start = self._start + starts[sizes.argmax()]
            raise ShardError(f"{self._url}: the line at byte {start} has {sizes.max()} bytes, above 4 GiB")
        name = shard_name(self._url, self._start)
        return RecordIndex(layout_of("jsonl", {}), starts, sizes.astype(np.uint32), self._given, name)


def _is_blank(line: NDArray[np.uint8]) -> bool:
    """Whether nothing but space is in a line, as `find_lines` sees it."""
    return not line.tobytes().strip()


def _line_end(chunk: NDArray[np.uint8], begin: int) -> int:
    """Behind the first line end from `begin` on, or the chunk's length where there is none."""
    step = 4096
    while begin < len(chunk):
        found = chunk[begin : begin + step].tobytes().find(b"\n")
        if found >= 0:
            return begin + found + 1
        begin, step = begin + step, 2 * step
    return len(chunk)


@dataclass(frozen=True, slots=True)
class JsonlReader:
    """Reads lines; see `records.RecordReader`."""

    columns: tuple[str, ...] = (WHOLE,)

    sizes = None

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> JsonlReader:
        """From the description that indexes hold, which says nothing. ShardError where it does."""
        if fields:
            raise ShardError(f"its lines are described by {sorted(fields)}, which this fastload does not know")
        return cls()

    def may_have(self, column: str) -> bool:
        return True

    def columns_of(self, record: bytes) -> list[str]:
        try:
            return list(json.loads(record))
        except (ValueError, TypeError, RecursionError):  # it was found to be an object, and no more
            return []

    def kind(self, column: str) -> str:
        return "JSON"

    def decoder(self, column: str) -> Decoder:
        return decode.json()

    def joined(self, other: RecordReader) -> bytes | None:
        return None

    def find(self, records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where) -> None:
        if list(columns) == [WHOLE]:
            places[0, 0], places[1, 0] = offsets[:-1], np.diff(offsets)
        else:
            find_values(records, offsets, columns, places, where)


def find_values(records: Bytes, offsets: Int64s, columns: Sequence[str], places: Int64s, where: Where) -> None:
    """`RecordReader.find` of members of JSON objects, by their names."""
    names = [name.encode() for name in columns]
    name_offsets = np.cumsum([0, *map(len, names)], dtype=np.int64)
    text = np.frombuffer(b"".join(names), np.uint8)
    wrong = find_members(records, offsets, text, name_offsets, places[0], places[1])
    if wrong >= 0:
        line = records[offsets[wrong] : offsets[wrong + 1]]
        raise DecodeError(
            f"{where(wrong)}: {line[:60].tobytes()!r}{'...' if len(line) > 60 else ''} is no JSON object; mend the "
            'line, or read on without it: on_error="skip"'
        )
