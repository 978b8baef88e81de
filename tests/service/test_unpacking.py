"""What is in packed objects: its size and its ranges, by real child processes that are really killed."""

from __future__ import annotations

import bz2
import functools
import gzip
import lzma
import os
import random
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastload.config import cpu_count
from fastload.errors import FastloadError, ObjectChangedError, ShardError, StoreUnavailableError
from fastload.service import unpacking, unpacking_children
from fastload.service.unpacked_sizes import UnpackedSizes
from fastload.service.unpacking import Unpacking, files_in, memory_file
from fastload.store import packing
from fastload.store.types import ObjectInfo
from fastload.store.watch import Watch
from tests.formats import test_litdata
from tests.formats.packing import PACK, by_arrow, framed, twice, zstd_stream
from tests.patience import PATIENCE_S
from tests.processes import is_running, until

KEY = "options"
TEXT = b"".join(b"line %d of some text\n" % number for number in range(20_000))


def noise(size: int, seed: int = 1) -> bytes:
    """What packs to half of its size."""
    return (np.random.default_rng(seed).integers(0, 16, size, dtype=np.uint8) + 65).tobytes()


class Objects:
    """Packed objects in memory. `before(url, start)` is called before each read."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.reads: list[tuple[str, int, int]] = []
        self.before: Callable[[str, int], None] = lambda url, start: None

    def put(self, name: str, data: bytes) -> ObjectInfo:
        self.contents[name] = data
        return ObjectInfo(name, len(data), '"etag"')

    def read(self, over: Watch, key: str, info: ObjectInfo, start: int, out: memoryview) -> None:
        assert (key, info.packing, info.size) == (KEY, "", len(self.contents[info.url]))
        self.before(info.url, start)
        self.reads.append((info.url, start, len(out)))
        out[:] = self.contents[info.url][start : start + len(out)]


@pytest.fixture
def objects() -> Objects:
    return Objects()


@pytest.fixture
def unpacker(objects: Objects) -> Iterator[Unpacking]:
    made = Unpacking(objects.read, memory_file)
    yield made
    made.close()


def inside(info: ObjectInfo, size: int) -> ObjectInfo:
    """What is in a packed object."""
    return ObjectInfo(info.url, size, info.etag, info.mtime_ns, 0, info.size, packing.packing_of(info.url))


def watch() -> Watch:
    return Watch(lambda attempt: None)


def read(unpacker: Unpacking, info: ObjectInfo, start: int, length: int) -> bytes:
    out = bytearray(length)
    unpacker.read_into(KEY, info, start, memoryview(out), watch)
    return bytes(out)


def found_out(sizes: UnpackedSizes, infos: list[ObjectInfo]) -> list[int | ShardError | None]:
    question = sizes.ask(KEY, infos)
    try:
        return sizes.wait(question, PATIENCE_S)
    finally:
        sizes.forget(question)


def size_of(unpacker: Unpacking, info: ObjectInfo) -> int:
    sizes = UnpackedSizes(unpacker)
    try:
        (size,) = found_out(sizes, [info])
    finally:
        sizes.close()
    if isinstance(size, ShardError):
        raise size
    assert size is not None
    return size


def children() -> list[int]:
    """The processes that unpack for us."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"fastload.unpacker" in words and parent == os.getpid():
                found.append(int(folder.name))
    return found


def gzip_padded(data: bytes) -> bytes:
    return gzip.compress(data) + bytes(700)


WAYS: dict[str, Callable[[bytes], bytes]] = {
    **{f"x{ending}": pack for ending, pack in PACK.items()},
    "padded.gz": gzip_padded,
    "members.gz": twice(gzip.compress),
    "members.bz2": twice(bz2.compress),
    "members.xz": twice(lzma.compress),
    "frames.zst": twice(by_arrow("zstd")),
    **{
        f"{way}.{name}": twice(pack, share)
        for name, pack in (("gz", gzip.compress), ("zst", by_arrow("zstd")))
        for way, share in (("mostly_first", 0.97), ("mostly_last", 0.03))
    },
    "stream.zst": zstd_stream,
    "skipped.zst": lambda data: b"\x50\x2a\x4d\x18\4\0\0\0abcd" + by_arrow("zstd")(data),
}


SIZES = [*((name, False) for name in WAYS), *((name, True) for name in WAYS if name.endswith((".gz", ".zst")))]


@pytest.mark.parametrize(("name", "is_large"), SIZES)
def test_sizes_and_ranges_are_those_of_what_was_packed(
    name: str, is_large: bool, objects: Objects, unpacker: Unpacking
) -> None:
    data = noise(1_500_000) + TEXT if is_large else TEXT
    info = objects.put(name, WAYS[name](data))
    assert (info.size > 1 << 18) == is_large
    size = len(data) if name == "x.snappy" else size_of(unpacker, info)
    assert size == len(data)
    starts = list(range(0, size, 50_000))
    random.Random(3).shuffle(starts)
    unpacked = inside(info, size)
    with ThreadPoolExecutor(8) as pool:
        ranges = pool.map(lambda start: read(unpacker, unpacked, start, min(50_000, size - start)), starts)
        assert all(data[start : start + 50_000] == got for start, got in zip(starts, ranges, strict=True))
    is_walked = is_large and name.endswith(".zst") and name != "stream.zst"
    assert unpacker.run_count == (1 if is_walked or name == "x.snappy" else 0)  # what was measured was kept
    assert sum(length for _, _, length in objects.reads) == info.size * (2 if is_large and name.endswith(".zst") else 1)


def test_what_is_measured_is_kept_where_there_is_room(
    objects: Objects, unpacker: Unpacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "FILES_BYTES_MAX", 3 * len(TEXT))
    infos = [objects.put(f"{name}.gz", gzip.compress(TEXT)) for name in "ab"]
    assert [size_of(unpacker, info) for info in infos] == [len(TEXT)] * 2
    for info in infos:
        assert read(unpacker, inside(info, len(TEXT)), 100, 100) == TEXT[100:200]
    assert unpacker.run_count == 1  # of the second, which is unpacked again


def test_who_reads_waits_for_no_measuring(objects: Objects, unpacker: Unpacking) -> None:
    goes_on = threading.Event()
    objects.before = lambda url, start: None if url == "x.gz" else _must(goes_on.wait(PATIENCE_S))
    infos = [objects.put(f"{number}.gz", gzip.compress(TEXT)) for number in range(20)]
    info = objects.put("x.gz", gzip.compress(TEXT))
    with ThreadPoolExecutor(20) as pool:
        sizes = [pool.submit(size_of, unpacker, each) for each in infos]
        until(lambda: len(children()) >= min(4, cpu_count()))
        assert read(unpacker, inside(info, len(TEXT)), 100, 100) == TEXT[100:200]
        goes_on.set()
        assert {size.result() for size in sizes} == {len(TEXT)}


def test_what_proves_larger_than_its_room_is_measured(
    objects: Objects, unpacker: Unpacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(4 << 20)
    monkeypatch.setattr(unpacking, "FILES_BYTES_MAX", len(data))
    info = objects.put("x.gz", gzip.compress(data))
    assert size_of(unpacker, info) == len(data)
    assert read(unpacker, inside(info, len(data)), 100, 100) == data[100:200]
    assert unpacker.run_count == 1


CHUNK = test_litdata.chunk([b"x" * (37 * number % 900) for number in range(40)])
FRAMED = framed(CHUNK, 7)
FRAMES_FROM = 24 + 4 * 41  # where the table of frames begins


def in_frames(objects: Objects, data: bytes) -> ObjectInfo:
    info = objects.put("chunk-0-0.bin", data)
    return replace(info, object_size=info.size, packing=packing.FRAMES)


def changed(at: int, form: str, value: int) -> bytes:
    made = bytearray(FRAMED)
    struct.pack_into(form, made, at, value)
    return bytes(made)


def test_chunks_in_frames_are_what_they_were_before(objects: Objects, unpacker: Unpacking) -> None:
    info = in_frames(objects, FRAMED)
    assert size_of(unpacker, info) == len(CHUNK)
    assert objects.reads == [("chunk-0-0.bin", 0, 24), ("chunk-0-0.bin", 24 + 4 * 40, 4)]  # and nothing else
    assert read(unpacker, replace(info, size=len(CHUNK)), 0, len(CHUNK)) == CHUNK


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"1", "it has 1 bytes"),
        (FRAMED[:23], "it has 23 bytes"),
        (FRAMED[:100], "it has 100 bytes, too few for 40 items"),
        (CHUNK, "it begins with .*and such chunks with"),
        (changed(8, "<H", 2), "it has version 2, and 1 is known"),
        (changed(12, "<I", 1 << 31), "too few for 2147483648 items"),
    ],
)
def test_a_head_of_frames_that_lies_is_an_error_that_names_it(
    data: bytes, says: str, objects: Objects, unpacker: Unpacking
) -> None:
    with pytest.raises(ShardError, match=rf"^chunk-0-0\.bin is .*{says}"):
        size_of(unpacker, in_frames(objects, data))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (FRAMED[:-1], "it ends 1 bytes too early: it was cut short"),
        (FRAMED[:200], "it was cut short"),
        (changed(16 + 4, "<I", 5), r"its frames have 35 of 40 items|cannot"),
        (changed(24, "<I", 1), "its 40 items do not lie one after the other"),
        (changed(24 + 4, "<I", 1 << 30), "do not lie one after the other"),
        (changed(FRAMES_FROM, "<I", 1), "frame 0, of items 1 to 8"),
        (changed(FRAMES_FROM + 4, "<I", 1 << 31), "frame 0, of items 0 to 2147483648"),
        (changed(FRAMES_FROM + 8, "<Q", 0), "lies at 0"),
        (changed(FRAMES_FROM + 8, "<Q", 1 << 62), "it was cut short"),
        (changed(FRAMES_FROM + 20, "<I", 0), "has 0 bytes"),
        (changed(FRAMES_FROM + 16, "<I", 9), "frame 0: "),
        (changed(len(FRAMED) - 3, "<B", 255), "frame 5"),
    ],
)
def test_frames_that_are_damaged_are_an_error_that_names_them(
    data: bytes, says: str, objects: Objects, unpacker: Unpacking
) -> None:
    info = replace(in_frames(objects, data), size=len(CHUNK))
    with pytest.raises(ShardError, match=rf"^chunk-0-0\.bin cannot be unpacked as ldfz, .*({says})"):
        read(unpacker, info, 0, len(CHUNK))


def test_a_file_that_cannot_be_written_ends_no_measuring(objects: Objects) -> None:
    unpacker = Unpacking(objects.read, lambda size: os.open("/dev/full", os.O_WRONLY))
    try:
        assert size_of(unpacker, objects.put("x.gz", gzip.compress(TEXT))) == len(TEXT)
    finally:
        unpacker.close()


def test_what_is_wrong_is_remembered_until_it_is_asked_for_alone(objects: Objects, unpacker: Unpacking) -> None:
    sizes = UnpackedSizes(unpacker)
    infos = [
        objects.put(name, data) for name, data in (("a.gz", b"none"), ("b.gz", gzip.compress(TEXT)), ("c.xz", b""))
    ]
    for _ in range(2):
        first, second, third = found_out(sizes, infos)
        assert second == len(TEXT)
        assert "a.gz cannot be unpacked as gzip" in str(first)
        assert "c.xz is empty" in str(third)
    (again,) = found_out(sizes, infos[:1])
    assert again is first
    assert [name for name, *_ in objects.reads].count("a.gz") == 1
    (anew,) = found_out(sizes, infos[:1])
    assert anew is not first
    sizes.close()


def test_an_object_is_fetched_once(objects: Objects, unpacker: Unpacking) -> None:
    data, info = packed_noise(objects)
    unpacked = inside(info, len(data))
    with ThreadPoolExecutor(16) as pool:
        ranges = list(pool.map(lambda start: read(unpacker, unpacked, start, 1 << 20), range(0, len(data), 1 << 20)))
    assert b"".join(ranges) == data
    assert sorted(start for _, start, _ in objects.reads) == list(range(0, info.size, 4 << 20))
    assert read(unpacker, unpacked, 5, 7) == data[5:12]  # all of it was read, so it is unpacked anew
    assert unpacker.run_count == 2


def truncated(data: bytes) -> bytes:
    return data[:-9]


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


def lacking(data: bytes) -> bytes:
    return data[:20_000] + data[20_100:]


def wrong_sum(data: bytes) -> bytes:
    return data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]


FAULTS: list[tuple[str, Callable[[bytes], bytes]]] = [
    *((name, truncated) for name in ("x.gz", "x.zst", "x.bz2", "x.xz", "x.br")),
    *((name, flipped) for name in ("x.gz", "x.bz2", "x.xz", "x.br")),
    ("x.zst", lacking),  # it has no checksum here
    ("x.gz", wrong_sum),
    *((name, lambda data: data + b"and more") for name in ("x.gz", "x.zst", "x.bz2", "x.xz")),
    *((name, lambda data: b"this is not packed" * 99) for name in ("x.gz", "x.zst", "x.bz2", "x.xz", "x.snappy")),
    ("x.snappy", truncated),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(FAULTS)])
def test_what_is_damaged_is_an_error_that_says_where(
    name: str, fault: Callable[[bytes], bytes], objects: Objects, unpacker: Unpacking
) -> None:
    info = objects.put(name, fault(WAYS[name](noise(200_000))))
    says = rf"^{name} cannot be unpacked as \w+, .* of {info.size} .*upload it again"
    with pytest.raises(ShardError, match=says):
        size_of(unpacker, info)
    with pytest.raises(ShardError, match=says):
        read(unpacker, inside(info, 200_000), 199_000, 1000)
    good = objects.put("good.gz", gzip.compress(TEXT))
    assert read(unpacker, inside(good, len(TEXT)), 0, 100) == TEXT[:100]


def test_nothing_is_no_packed_object(objects: Objects, unpacker: Unpacking) -> None:
    with pytest.raises(ShardError, match=r"x\.zst is empty"):
        size_of(unpacker, objects.put("x.zst", b""))


@pytest.mark.parametrize("name", ["x.gz", "x.zst"])
@pytest.mark.parametrize("promised", [len(TEXT) - 1, len(TEXT) + 1])
def test_a_size_that_is_wrong_is_an_error_that_names_both(
    name: str, promised: int, objects: Objects, unpacker: Unpacking
) -> None:
    info = objects.put(name, WAYS[name](TEXT))
    with pytest.raises(
        ShardError, match=rf"{name} has (more than )?\d+ bytes unpacked, .* says {promised}, .*list the"
    ):
        read(unpacker, inside(info, promised), promised - 10, 10)


@pytest.mark.parametrize("name", ["x.gz", "x.zst", "x.bz2", "stream.zst"])
def test_a_bomb_is_an_error_that_names_both_sizes(
    name: str, objects: Objects, unpacker: Unpacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (unpacking_children, packing):
        monkeypatch.setattr(module, "BYTES_ALWAYS", 1 << 20)
        monkeypatch.setattr(module, "RATIO_MAX", 100)
    info = objects.put(name, WAYS[name](bytes(40 << 20)))
    with pytest.raises(ShardError, match=rf"{name} has {info.size} bytes packed and \d+ or more unpacked"):
        size_of(unpacker, info)


def test_a_header_that_promises_too_much_is_a_bomb(objects: Objects, unpacker: Unpacking) -> None:
    frame = by_arrow("zstd")(noise(1_000_000))
    header = b"\x28\xb5\x2f\xfd\xc0\x58" + (10**13).to_bytes(8, "little")
    info = objects.put("x.zst", header + frame[9 if frame[4] & 0x20 else 10 :])  # without its own header
    with pytest.raises(ShardError, match="10000000000000 or more unpacked"):
        size_of(unpacker, info)


def kill_once(objects: Objects, what: signal.Signals, times: int = 1) -> None:
    """Send the child a signal when it has been fed some of an object, in the first runs."""
    left = [times]

    def before(url: str, start: int) -> None:
        if start == 4 * (4 << 20) and left[0]:
            left[0] -= 1
            pids = until_child()
            os.kill(pids, what)
            if what == signal.SIGKILL:
                until(lambda: not is_running(pids))

    objects.before = before


def until_child() -> int:
    until(children)
    (pid,) = children()
    return pid


@functools.cache
def _large() -> tuple[bytes, bytes]:
    data = noise(28 << 20)
    return data, gzip.compress(data, 1)


def packed_noise(objects: Objects) -> tuple[bytes, ObjectInfo]:
    """Of five parts, more than are fetched ahead."""
    data, packed = _large()
    return data, objects.put("x.gz", packed)


def test_a_child_that_is_killed_is_replaced(objects: Objects, unpacker: Unpacking) -> None:
    data, info = packed_noise(objects)
    kill_once(objects, signal.SIGKILL)
    assert read(unpacker, inside(info, len(data)), len(data) - 1000, 1000) == data[-1000:]
    assert unpacker.run_count == 1


def test_children_that_are_killed_each_time_are_an_error(objects: Objects, unpacker: Unpacking) -> None:
    data, info = packed_noise(objects)
    kill_once(objects, signal.SIGKILL, times=2)
    with pytest.raises(ShardError, match=r"x\.gz: the process that unpacks it ended 2 times \(killed by SIGKILL\)"):
        read(unpacker, inside(info, len(data)), len(data) - 1000, 1000)
    assert read(unpacker, inside(info, len(data)), len(data) - 1000, 1000) == data[-1000:]


def test_a_child_that_is_silent_is_replaced(objects: Objects) -> None:
    data, info = packed_noise(objects)
    unpacker = Unpacking(objects.read, memory_file, silent_s=1.0)
    try:
        kill_once(objects, signal.SIGSTOP)
        assert read(unpacker, inside(info, len(data)), len(data) - 1000, 1000) == data[-1000:]
    finally:
        unpacker.close()


@pytest.mark.parametrize("error", [ObjectChangedError("x.gz: it changed"), StoreUnavailableError("x.gz: away")])
def test_the_stores_errors_come_as_they_are(error: FastloadError, objects: Objects, unpacker: Unpacking) -> None:
    data, info = packed_noise(objects)

    def before(url: str, start: int) -> None:
        if start == 12 << 20 or url == "x.bz2":
            raise error

    objects.before = before
    with pytest.raises(type(error), match=str(error)):
        read(unpacker, inside(info, len(data)), len(data) - 1000, 1000)
    with pytest.raises(type(error), match=str(error)):
        size_of(unpacker, objects.put("x.bz2", bz2.compress(TEXT)))


def held(objects: Objects) -> threading.Event:
    """Reads behind the first are not answered before this is set."""
    goes_on = threading.Event()
    objects.before = lambda url, start: None if start < 4 << 20 else _must(goes_on.wait(PATIENCE_S))
    return goes_on


def _must(true: bool) -> None:
    assert true


def test_a_wait_can_be_cancelled(objects: Objects, unpacker: Unpacking) -> None:
    data, info = packed_noise(objects)
    goes_on, over = held(objects), watch()
    errors: list[StoreUnavailableError] = []

    def wait() -> None:
        with over.over(), pytest.raises(StoreUnavailableError) as caught:
            read(unpacker, inside(info, len(data)), len(data) - 1000, 1000)
        errors.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    assert read(unpacker, inside(info, len(data)), 0, 1000) == data[:1000]  # while the rest is not there
    over.cancel()
    thread.join(PATIENCE_S)
    assert "given up" in str(errors[0])
    goes_on.set()
    assert read(unpacker, inside(info, len(data)), 1000, 1000) == data[1000:2000]
    assert unpacker.run_count == 1


def test_its_end_ends_waits_and_children(objects: Objects) -> None:
    data, info = packed_noise(objects)
    unpacker = Unpacking(objects.read, memory_file)
    goes_on = held(objects)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, unpacker, inside(info, len(data)), len(data) - 1000, 1000)
        until(children)
        threading.Timer(0.1, goes_on.set).start()
        unpacker.close()
        with pytest.raises(StoreUnavailableError, match="the cache service ends"):
            waiting.result(PATIENCE_S)
    until(lambda: not children())
    with pytest.raises(StoreUnavailableError):
        size_of(unpacker, info)


def test_files_go_by_lru_when_they_are_too_many(
    objects: Objects, unpacker: Unpacking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "FILES_BYTES_MAX", int(2.5 * len(TEXT)))
    infos = [inside(objects.put(f"{name}.gz", gzip.compress(TEXT)), len(TEXT)) for name in "abc"]
    for info in (infos[0], infos[1], infos[0], infos[2]):
        assert read(unpacker, info, len(TEXT) - 100, 100) == TEXT[-100:]
    assert unpacker.run_count == 3
    assert read(unpacker, infos[0], 900, 100) == TEXT[900:1000]
    assert unpacker.run_count == 3
    assert read(unpacker, infos[1], 900, 100) == TEXT[900:1000]
    assert unpacker.run_count == 4
    monkeypatch.setattr(unpacking, "FILES_BYTES_MAX", 10)  # one may always be there
    assert read(unpacker, infos[2], 900, 100) == TEXT[900:1000]


def test_where_the_directory_has_no_room_memory_does(
    objects: Objects, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.close(files_in(tmp_path)(100))
    assert not list(tmp_path.iterdir())
    unpacker = Unpacking(objects.read, files_in(tmp_path / "gone"))
    try:
        info = objects.put("x.gz", gzip.compress(TEXT))
        assert read(unpacker, inside(info, len(TEXT)), 100, 100) == TEXT[100:200]
    finally:
        unpacker.close()
    assert "unpacked bytes are kept in memory" in caplog.text
