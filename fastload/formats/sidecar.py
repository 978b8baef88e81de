"""The sidecar: one Arrow file with the indexes of many shards, so that the shards need not be read for them.

It has a row for each shard: which version of which object it is, how many samples it holds, and its index in the stored
form of `index`. The columns of a record batch lie one after the other and the indexes come last, so that the rest, a
hundred bytes a shard, is read without them; `index_offset` and `index_bytes` then say where in the file one shard's
index lies. With batches of a gigabyte, of a sidecar of any size a few parts in a thousand are read before the first
sample, and after that the indexes that are needed. docs/index.md describes it for others.

Rejected: the arrays of an index as Arrow columns of their own, which makes an index seven reads in seven places, and
would need every check that `ShardIndex.from_bytes` makes once more.

A piece of an object has a row of its own, with ` bytes=<start>-<end>` behind its URL.

Nothing in the file is believed: it may come from anywhere. A row counts only for the very version of the object that it
was made of, and its index has to be one of an object of that size and of that many samples.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fastload.cache.key import url_without_credentials
from fastload.cache.tempfiles import temp_names
from fastload.errors import ConfigError, FastloadError, ShardError
from fastload.formats import Index, PackedIndex, StoredIndex, StridedIndex, stored_index
from fastload.store.table import ObjectTable, Texts
from fastload.store.types import ObjectInfo

VERSION = b"1"
_VERSION_KEY = b"fastload.index"

_SUMMARY = [
    pa.field("url", pa.utf8(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    pa.field("etag", pa.utf8()),
    pa.field("mtime_ns", pa.int64(), nullable=False),
    pa.field("samples", pa.int64(), nullable=False),
    pa.field("index_offset", pa.int64(), nullable=False),
    pa.field("index_bytes", pa.int64(), nullable=False),
]
SCHEMA = pa.schema([*_SUMMARY, pa.field("index", pa.large_binary(), nullable=False)], {_VERSION_KEY: VERSION})

# The indexes of one record batch. The larger, the less of a file has to be read to know its shards.
_BATCH_BYTES = 1 << 30
_ALIGNMENT = 8
_MAGIC_BYTES = 8

ReadAt = Callable[[int, int], bytes]


class SidecarWriter:
    """Writes a sidecar to a local file; `add` each shard, then `close`, or the file is not there. For one thread.

    Raises `ConfigError` where the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], batch_bytes: int = _BATCH_BYTES) -> None:
        """Begin, beside `path`, where twice `batch_bytes` must fit as well."""
        self._path, self._batch_bytes = Path(path), batch_bytes
        self._rows: list[tuple[ObjectInfo, int, int]] = []
        self._spooled = 0
        self._temp = self._path.with_name(next(temp_names()))
        with self._writing():
            self._spool = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115  # closed with us
            os.close(os.open(self._temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))  # and the umask
            self._sink = pa.OSFile(str(self._temp), "wb")
            self._writer = pa.ipc.new_file(self._sink, SCHEMA)

    def add(self, info: ObjectInfo, index: Index) -> None:
        """The next shard."""
        assert not isinstance(index, StridedIndex | PackedIndex), "it is computed where it is needed"
        data = index.to_bytes()
        with self._writing():
            self._spool.write(data)
            self._spooled += len(data)
            self._rows.append((info, index.sample_count, len(data)))
            if self._spooled >= self._batch_bytes:
                self._write_batch()

    def close(self) -> None:
        """Finish the file, and put it in its place."""
        with self._writing():
            if self._rows:
                self._write_batch()
            self._writer.close()
            self._sink.close()
            os.replace(self._temp, self._path)

    def __enter__(self) -> SidecarWriter:
        return self

    def __exit__(self, *error: object) -> None:
        """Let go of everything; what was not closed is not there."""
        self._spool.close()
        self._sink.close()
        with contextlib.suppress(FileNotFoundError):  # it is in its place
            os.unlink(self._temp)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"{str(self._path)!r} cannot be written: {error.strerror or error}; name a file in a directory that is "
                "there, that you may write to and that has room"
            ) from error

    def _write_batch(self) -> None:
        self._spool.flush()
        # Unmapped with the last of pyarrow's objects that refer to it.
        self._write_rows(pa.py_buffer(mmap(self._spool.fileno(), self._spooled, access=ACCESS_READ)))
        self._rows, self._spooled = [], 0
        self._spool.seek(0)
        self._spool.truncate()

    def _write_rows(self, data: Any) -> None:
        infos, samples, lengths = zip(*self._rows, strict=True)
        ends = np.cumsum([0, *lengths], dtype=np.int64)
        index = pa.Array.from_buffers(pa.large_binary(), len(infos), [None, pa.py_buffer(ends), data])

        def batch(first_offset: int) -> Any:
            columns = [
                pa.array([_name(url_without_credentials(info.url), info) for info in infos], pa.utf8()),
                pa.array([info.size for info in infos], pa.int64()),
                pa.array([info.etag for info in infos], pa.utf8()),
                pa.array([info.mtime_ns for info in infos], pa.int64()),
                pa.array(samples, pa.int64()),
                pa.array(first_offset + ends[:-1], pa.int64()),
                pa.array(lengths, pa.int64()),
                index,
            ]
            return pa.record_batch(columns, SCHEMA)

        # The bytes of the last column end the batch. The schema before the first batch is written together with it.
        start = self._sink.tell() or _MAGIC_BYTES + len(SCHEMA.serialize())
        end = start + pa.ipc.get_record_batch_size(batch(0))
        padded = -(-len(data) // _ALIGNMENT) * _ALIGNMENT
        self._writer.write_batch(batch(end - padded))
        if self._sink.tell() != end:
            raise AssertionError(f"pyarrow {pa.__version__} ended a record batch at {self._sink.tell()}, not at {end}")


@dataclass(frozen=True, eq=False)
class SidecarSummary:
    """What a sidecar says of its shards, without their indexes; by row."""

    objects: ObjectTable
    sample_counts: NDArray[np.int64]
    index_offset: NDArray[np.int64]
    index_bytes: NDArray[np.int64]

    def rows_of(self, objects: ObjectTable) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """int64[objects]: the row of each, -1 where there is none; and the numbers of those that have one, but of
        another version.
        """
        rows = pc.fill_null(pc.index_in(_urls(objects), value_set=_urls(self.objects)), -1).to_numpy().astype(np.int64)
        numbers = np.flatnonzero(rows >= 0)
        same = _same_version(objects.take(numbers), self.objects.take(rows[numbers]))
        rows[numbers[~same]] = -1
        return rows, numbers[~same]

    def index(self, row: int, read_at: ReadAt, shard: ObjectInfo | None = None) -> StoredIndex:
        """The index of a row's shard, which is the listed `shard`. ShardError where the row lies."""
        info, samples = shard or self.objects[row], int(self.sample_counts[row])
        data = read_at(int(self.index_offset[row]), int(self.index_bytes[row]))
        found = stored_index(data, info.url, info.size, info.start, info.whole.size - info.start)
        if found.sample_count != samples:
            raise ShardError(f"{info.url}: its index in the sidecar has {found.sample_count} samples, not {samples}")
        return found


def read_summary(read_at: ReadAt, size: int, url: str) -> SidecarSummary:
    """The summary of the sidecar of `size` bytes at `url`, of which `read_at(start, length)` reads a part.

    Raises ShardError, naming `url`, where it is no sidecar.
    """
    try:
        with pa.PythonFile(_Ranges(read_at, size), mode="r") as source:
            options = pa.ipc.IpcReadOptions(included_fields=list(range(len(_SUMMARY))))
            reader = pa.ipc.open_file(source, options=options)
            _require(reader.schema.metadata == SCHEMA.metadata, f"its schema says {reader.schema.metadata}")
            _require(reader.schema.equals(pa.schema(_SUMMARY)), "its columns are others")
            table = pa.Table.from_batches(
                (reader.get_batch(number) for number in range(reader.num_record_batches)), pa.schema(_SUMMARY)
            )
        table.validate(full=True)
        return _summary(table, size)
    except FastloadError:  # of `read_at`
        raise
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0]
        raise ShardError(
            f"{url} is no index of shards that can be used ({reason}); remove it, or write it again with: "
            "fastload index URL --output FILE"
        ) from error


def _summary(table: Any, size: int) -> SidecarSummary:
    columns = {name: table.column(name) for name in table.schema.names}
    for field in _SUMMARY:
        _require(field.nullable or columns[field.name].null_count == 0, f"{field.name} is missing in some rows")
    sizes, mtimes_ns, samples, offsets, lengths = (
        columns[name].to_numpy().astype(np.int64)
        for name in ("size", "mtime_ns", "samples", "index_offset", "index_bytes")
    )
    for name, values in (("size", sizes), ("samples", samples), ("index_offset", offsets), ("index_bytes", lengths)):
        _require(not (values < 0).any(), f"{name} is negative in some rows")
    _require(not ((offsets > size) | (lengths > size - np.minimum(offsets, size))).any(), "an index lies outside of it")
    objects = ObjectTable(_texts(columns["url"]), sizes, _texts(columns["etag"]), mtimes_ns)
    return SidecarSummary(objects, samples, offsets, lengths)


def _require(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(what)


class _Ranges(io.RawIOBase):
    """A file for pyarrow, by ranges. Errors of `read_at` pass through pyarrow as they are."""

    def __init__(self, read_at: ReadAt, size: int) -> None:
        self._read_at, self._size, self._position = read_at, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._position)
        length = left if size is None or size < 0 else min(size, left)
        data = self._read_at(self._position, length) if length else b""
        self._position += length
        return data


def _texts(column: Any) -> Texts:
    """A column of texts that pyarrow has checked."""
    array = pc.cast(column, pa.large_utf8()).combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    _, starts, data = array.buffers()
    count = len(array)
    offsets = np.frombuffer(starts, np.int64, count + 1, 8 * array.offset) if count else np.zeros(1, np.int64)
    missing = array.is_null().to_numpy(zero_copy_only=False).astype(np.bool_)
    return Texts(data.to_pybytes() if data is not None else b"", offsets, missing)


def _array(texts: Texts) -> Any:
    """The same as an Arrow array, without a copy."""
    valid = None if not texts.missing.any() else pa.array(~texts.missing).buffers()[1]
    starts = np.ascontiguousarray(texts.starts)
    return pa.Array.from_buffers(pa.large_utf8(), len(texts), [valid, pa.py_buffer(starts), pa.py_buffer(texts.data)])


def _name(url: str, info: ObjectInfo) -> str:
    """What a row calls a shard."""
    return f"{url} bytes={info.start}-{info.start + info.size}" if info.is_piece else url


def _urls(objects: ObjectTable) -> Any:
    if objects.pieces is not None:
        return pa.array([_name(url_without_credentials(info.url), info) for info in objects], pa.large_utf8())
    urls = _array(objects.urls)
    if pc.any(pc.starts_with(urls, "http")).as_py():  # others hold no credentials
        return pa.array([url_without_credentials(url or "") for url in objects.urls.to_list()], pa.large_utf8())
    return urls


def _same_version(one: ObjectTable, other: ObjectTable) -> NDArray[np.bool_]:
    """bool[n]: whether both are the same version of an object, as `ObjectTable.identities` says it."""
    etags, other_etags = _strong(one.etags), _strong(other.etags)
    same = pc.fill_null(pc.equal(etags, other_etags), False).to_numpy(zero_copy_only=False)
    neither = pc.and_(pc.is_null(etags), pc.is_null(other_etags)).to_numpy(zero_copy_only=False)
    same |= neither & (one.mtimes_ns == other.mtimes_ns)
    return np.asarray(same & (one.sizes == other.sizes), np.bool_)


def _strong(etags: Texts) -> Any:
    """Strong ETags without quotes; null for others."""
    bare = pc.utf8_trim(_array(etags), '" ')
    weak = pc.or_(pc.match_substring_regex(_array(etags), "^[Ww]/"), pc.equal(bare, ""))
    return pc.if_else(weak, pa.scalar(None, pa.large_utf8()), bare)
