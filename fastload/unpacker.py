"""The process that unpacks objects for the cache service: `python -m fastload.unpacker FD`.

What comes out of a bucket is decoded here and not in the service, so that a decoder that crashes, or is fed what grows
without end, ends this process and nothing else. It has no credentials and asks no store. The service passes it, over
the socket that is its descriptor FD, one job after the other: a message with how the bytes are packed and how many may
come out, and two descriptors, of a pipe that brings the packed bytes and of the file that the unpacked ones go to;
where they are only counted, there is no file. Where they are measured and turn out too many for it, or cannot be
written, it is emptied, and the rest is counted. It sends back how many bytes it has unpacked, again and again, and last
what came of it. `service.unpacking_children` is the other end.

It ends when it has nothing to do for half a minute, when the socket ends, and when its parent has gone: processes that
were forked from the service may keep the socket open.
"""

from __future__ import annotations

import bz2
import contextlib
import itertools
import lzma
import os
import resource
import select
import signal
import socket
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

JOB = struct.Struct("<8sqqq")
"""How it is packed; how many bytes should come out, -1: unknown; how many may; where it is unknown, how many are
written at most.
"""

PROGRESS = struct.Struct("<cqq")
"""What follows (`GOING`, `DONE`, `FAILED` and a text behind it), packed bytes read, unpacked bytes written."""

GOING, DONE, FAILED = b"g", b"d", b"f"
MESSAGE_BYTES_MAX = 4096

_READ_BYTES, _OUT_BYTES = 1 << 18, 1 << 20
_ADDRESS_SPACE_BYTES = 16 << 30
_PARENT_EVERY_S = 2.0
_IDLE_LOOKS_MAX = 15


def _has_come(fd: int, timeout_s: float) -> bool:
    """Whether there is something to read, or the end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(1000 * timeout_s))


class DamagedError(Exception):
    """What came cannot be unpacked."""


class _Decoder(Protocol):
    """As `bz2.BZ2Decompressor`."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes: ...


class _Gzip:
    """zlib's decoder of one member, in the manner of bz2's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1, /) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Source:
    """The packed bytes of a job, as a file for pyarrow, too."""

    closed = False

    def __init__(self, fd: int, parent: int) -> None:
        self._fd, self._parent = fd, parent
        self.count = 0

    def read(self, count: int = -1) -> bytes:
        if count < 0:
            parts = []
            while data := self.read(_READ_BYTES):
                parts.append(data)
            return b"".join(parts)
        while not _has_come(self._fd, _PARENT_EVERY_S):
            if os.getppid() != self._parent:
                raise ConnectionError("the service has gone")
        data = os.read(self._fd, min(count, _READ_BYTES))
        self.count += len(data)
        return data

    def exactly(self, count: int) -> bytes:
        """The next bytes, as many. DamagedError where there are fewer."""
        parts = []
        while count and (data := self.read(count)):
            parts.append(data)
            count -= len(data)
        if count:
            raise DamagedError(f"it ends {count} bytes too early: it was cut short")
        return b"".join(parts)

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False


def _members(source: _Source, new: Any) -> Iterator[bytes]:
    """Of one member after the other. Zeros behind the last are padding, as gzip has it."""
    decoder: _Decoder = new()
    data, is_first, begun = b"", True, False
    while True:
        if decoder.eof:
            data = decoder.unused_data or data
            decoder, is_first, begun = new(), False, False
            if not data:
                data = source.read(_READ_BYTES)
        elif not data and decoder.needs_input:
            data = source.read(_READ_BYTES)
        if not begun and not is_first:
            data = data.lstrip(b"\0")
            if not data:
                data = source.read(_READ_BYTES)
                if not data:
                    return
                continue
        if not data and decoder.needs_input:
            raise DamagedError("it ends before the packed bytes do: it was cut short")
        begun = True
        try:
            out = decoder.decompress(data, _OUT_BYTES)
        except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError) as error:
            where = "" if is_first else " behind the end of what was packed: something else follows"
            raise DamagedError(f"{error}{where}") from error
        data = b""
        yield out


def _by_arrow(source: _Source, packing: str) -> Iterator[bytes]:
    import pyarrow as pa  # takes a quarter of a second to import

    try:
        with pa.CompressedInputStream(pa.PythonFile(source, mode="r"), packing) as stream:
            while out := stream.read(_OUT_BYTES):
                yield out
    except ConnectionError:
        raise
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from error


def _snappy(source: _Source, size: int) -> Iterator[bytes]:
    import pyarrow as pa

    packed = source.read()
    found = shift = 0
    for byte in packed[:5]:  # how large it is unpacked
        found |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if size >= 0 and found != size:
        raise DamagedError(f"it says that it has {found} bytes unpacked, and {size} were promised")
    if found > 64 * len(packed) + 64:
        raise DamagedError(f"{len(packed)} bytes say that they are {found}: they are damaged")
    try:
        yield memoryview(pa.Codec("snappy").decompress(packed, found))  # type: ignore[misc]
    except (OSError, ValueError) as error:
        raise DamagedError(str(error)) from error


# LitData's chunks whose items are packed by zstd, some in each frame (docs/formats.md): a head, where each item begins
# and the last ends, a table of frames, and these.
_FRAMED, _FRAME = struct.Struct("<8sHHIII"), struct.Struct("<IIQII")
_FRAMED_MAGIC, _FRAMED_VERSION = b"LDFZ01\0\0", 1


def framed_size(packed_bytes: int, read_at: Callable[[int, int], bytes | bytearray]) -> int:
    """How large such a chunk is unpacked: a head, and the items. DamagedError where it is none."""
    if packed_bytes < _FRAMED.size:
        raise DamagedError(f"it has {packed_bytes} bytes")
    count, _ = _framed_head(read_at(0, _FRAMED.size))
    at = _FRAMED.size + 4 * count
    if packed_bytes < at + 4:
        raise DamagedError(f"it has {packed_bytes} bytes, too few for {count} items")
    return 8 + 4 * count + int.from_bytes(read_at(at, 4), "little")


def _framed_head(head: bytes | bytearray) -> tuple[int, int]:
    """How many items and frames there are."""
    magic, version, _, items, _, frames = _FRAMED.unpack(head)
    if magic != _FRAMED_MAGIC:
        raise DamagedError(f"it begins with {magic!r}, and such chunks with {_FRAMED_MAGIC!r}")
    if version != _FRAMED_VERSION:
        raise DamagedError(f"it has version {version}, and {_FRAMED_VERSION} is known")
    return items, frames


def _framed(source: _Source) -> Iterator[bytes]:
    """The same chunk as if its items had never been packed."""
    import pyarrow as pa

    items, frames = _framed_head(source.exactly(_FRAMED.size))
    ends = struct.unpack(f"<{items + 1}I", source.exactly(4 * (items + 1)))
    table = [_FRAME.unpack(source.exactly(_FRAME.size)) for _ in range(frames)]
    head_bytes = 8 + 4 * items
    if ends[0] or any(end < start for start, end in itertools.pairwise(ends)) or head_bytes + ends[-1] >= 1 << 32:
        raise DamagedError(f"its {items} items do not lie one after the other")
    yield struct.pack(f"<{items + 2}I", items, *(head_bytes + end for end in ends))
    item, codec = 0, pa.Codec("zstd")
    for number, (first, count, at, packed_bytes, size) in enumerate(table):
        stop = first + count
        if first != item or stop > items or ends[stop] - ends[first] != size or at < source.count:
            raise DamagedError(f"frame {number}, of items {first} to {stop}, has {size} bytes or lies at {at}")
        source.exactly(at - source.count)
        try:
            found = codec.decompress(source.exactly(packed_bytes), size)
        except (OSError, ValueError) as error:
            raise DamagedError(f"frame {number}: {error}") from error
        if found.size != size:
            raise DamagedError(f"frame {number} has {found.size} bytes unpacked, and says {size}")
        yield memoryview(found)  # type: ignore[misc]
        item = stop
    if item != items:
        raise DamagedError(f"its frames have {item} of {items} items")


_TABLE_MAGIC = b"LDARW01\0"


def _table(source: _Source) -> Iterator[bytes]:
    """A chunk of LitData with the same table of Arrow, of which nothing is compressed."""
    import pyarrow as pa

    data = memoryview(source.read())
    ends, head_bytes = len(data) - 12, 8 + 4 * int.from_bytes(data[:4], "little")
    start = ends - int.from_bytes(data[max(0, ends) : ends + 4], "little")
    if data[-8:] != _TABLE_MAGIC or not head_bytes <= start <= ends:
        raise DamagedError("it has no table of Arrow at its end: it was cut short, or its index is another one's")
    yield data[:head_bytes]  # type: ignore[misc]
    part, out = pa.py_buffer(data[start:ends]), pa.BufferOutputStream()
    try:
        is_file = bytes(data[start : start + 6]) == b"ARROW1"
        with pa.ipc.open_file(part) if is_file else pa.ipc.open_stream(part) as table:
            batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
            with pa.ipc.new_file(out, table.schema) as writer:
                for batch in batches:
                    batch.validate(full=True)  # pyarrow ends the process where it writes offsets that lie
                    writer.write_batch(batch)
    except pa.ArrowMemoryError as error:
        raise MemoryError from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedError(f"its table of Arrow: {error}") from error
    made = out.getvalue()
    yield memoryview(made)  # type: ignore[misc]
    yield struct.pack("<I", made.size) + _TABLE_MAGIC


_DECODERS = {"gzip": _Gzip, "bz2": bz2.BZ2Decompressor, "xz": lambda: lzma.LZMADecompressor(memlimit=1 << 30)}


def unpacked(source: _Source, packing: str, size: int) -> Iterator[bytes]:
    """The unpacked bytes, some at a time. DamagedError."""
    if packing in _DECODERS:
        return _members(source, _DECODERS[packing])
    if packing in ("ldfz", "ldarw"):
        return _framed(source) if packing == "ldfz" else _table(source)
    return _snappy(source, size) if packing == "snappy" else _by_arrow(source, packing)


class _Out:
    """Where unpacked bytes go to."""

    def __init__(self, file: int | None, *, is_measured: bool, bytes_max: int) -> None:
        """OSError where it cannot be written, but for what `is_measured`: that is given up, and the file emptied."""
        self._file, self._is_measured, self._bytes_max = file, is_measured, bytes_max
        if file is not None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_max if hard < 0 else min(bytes_max, hard), hard))

    def write(self, out: bytes, start: int) -> None:
        if self._file is None:
            return
        if self._is_measured and start + len(out) > self._bytes_max:
            self._give_up()
            return
        left = memoryview(out)
        try:
            while len(left):
                left = left[os.pwrite(self._file, left, start + len(out) - len(left)) :]
        except OSError:
            if not self._is_measured:
                raise
            self._give_up()

    def _give_up(self) -> None:
        assert self._file is not None, "there is something to give up"
        with contextlib.suppress(OSError):  # it has not all that was unpacked in any case, and is not kept
            os.ftruncate(self._file, 0)
        self._file = None


def _do(job: bytes, files: list[int], to: socket.socket, parent: int) -> None:
    name, size, bytes_max, kept_max = JOB.unpack(job)
    packing = name.rstrip(b"\0").decode()
    source = _Source(files[0], parent)
    is_measured, count = size < 0, 0
    to_file = _Out(
        files[1] if len(files) > 1 else None,
        is_measured=is_measured,
        bytes_max=min(bytes_max, kept_max) if is_measured else bytes_max,
    )
    try:
        for out in unpacked(source, packing, size):
            if count + len(out) > bytes_max:
                count += len(out)
                raise DamagedError("too many bytes")
            to_file.write(out, count)
            count += len(out)
            to.send(PROGRESS.pack(GOING, source.count, count))
    except DamagedError as error:
        text = str(error)
    except ConnectionError:
        raise
    except MemoryError:
        text = "it takes more memory to unpack than is allowed"
    except OSError as error:
        text = f"the unpacked bytes cannot be written: {error.strerror}"
    else:
        to.send(PROGRESS.pack(DONE, source.count, count))
        return
    to.send(PROGRESS.pack(FAILED, source.count, count) + text.encode()[:2048])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()
    for what, most in ((resource.RLIMIT_AS, _ADDRESS_SPACE_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))
    with socket.socket(fileno=int(sys.argv[1])) as service:
        while True:
            for _ in range(_IDLE_LOOKS_MAX):
                if _has_come(service.fileno(), _PARENT_EVERY_S):
                    break
                if os.getppid() != parent:
                    return
            else:
                return
            try:
                job, files, _, _ = socket.recv_fds(service, MESSAGE_BYTES_MAX, 2)
            except ConnectionError:
                return
            if not job:
                return
            try:
                _do(job, files, service, parent)
            except (BrokenPipeError, ConnectionError):
                return
            finally:
                for fd in files:
                    os.close(fd)


if __name__ == "__main__":
    main()
