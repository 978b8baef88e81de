"""A process that is gone at any system call, or that is given less than it asked for, leaves what the next can use.

Everything that is kept in the directory of a cache: chunks, blobs (indexes and counts are such), limits, lists of
shards, runs. After each call that can be the last, the directory is opened again, all that is there is looked at, and
where something was to be kept, keeping it has to work by then.
"""

from __future__ import annotations

import errno
import mmap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastload
from fastload.cache import CacheDirectory, ChunkKey, DiskTier
from fastload.config import CacheLimits
from fastload.errors import StateError
from fastload.history.archive import Archive
from fastload.history.record import Recorder
from fastload.pipeline import manifest_files
from fastload.plan import Manifest
from fastload.store.types import ObjectInfo
from tests.cache.faults import CALLS, crashed, failing, short
from tests.history.runs import CHUNK_BYTES as RUN_CHUNK_BYTES
from tests.history.runs import info, key
from tests.shards import check_samples, corpus, samples_of

CHUNK_BYTES, QUOTA_BYTES = 64 << 10, 1 << 20
KEY, OTHER = ChunkKey(bytes(16), 1), ChunkKey(bytes(16), 2)
DATA = bytes(range(256)) * (CHUNK_BYTES // 256)
LIMITS = {"ram_bytes": 1 << 20, "disk_bytes": QUOTA_BYTES, "chunk_bytes": CHUNK_BYTES}
URLS = ["s3://bucket/data/"]
RUN = "20261126-120000-00000000"


@dataclass(frozen=True)
class Kept:
    """Something that is kept: `prepare` puts it there, `act` changes it, `check` looks whether all is right."""

    prepare: Callable[[Path], object]
    act: Callable[[Path], object]
    check: Callable[[Path], object]


def tier(place: Path) -> DiskTier:
    return DiskTier(place, QUOTA_BYTES, CHUNK_BYTES, margin_bytes=0)


def written(place: Path, chunk: ChunkKey) -> None:
    with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
        view[:] = DATA
        assert tier(place).write(chunk, view, CHUNK_BYTES)


def filled(place: Path) -> None:
    place.mkdir()
    written(place, KEY)
    assert tier(place).put_blob("a", b"old")


def check_tier(place: Path) -> None:
    found = tier(place)
    with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
        for chunk in list(found.keys()):
            view[:] = bytes(CHUNK_BYTES)
            # A half that was written is no chunk; what is one is right.
            assert found.read_into(chunk, view) in (CHUNK_BYTES, None)
            assert not found.contains(chunk) or view == DATA
    for name in found.blob_names():
        assert found.get_blob(name) in (b"old", b"new", None)
    files = [path for path in place.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name.startswith(".tmp-")]
    assert found.used_bytes == sum(path.stat().st_blocks * 512 for path in files)
    assert found.counters["errors"] == 0


def read_back(place: Path) -> None:
    with mmap.mmap(-1, CHUNK_BYTES) as memory, memoryview(memory) as view:
        found = tier(place)
        assert found.read_into(KEY, view) == CHUNK_BYTES
        assert view == DATA
        assert found.get_blob("a") == b"old"


def check_limits(place: Path) -> None:
    found = CacheDirectory.open(place).limits if (place / "cache.json").exists() else CacheLimits(**LIMITS)
    assert found in (CacheLimits(**LIMITS), CacheLimits(**{**LIMITS, "disk_bytes": 2 * QUOTA_BYTES}))
    CacheDirectory.open(place, **LIMITS)
    assert not list(place.glob(".tmp-*"))
    assert CacheDirectory.open(place).limits == CacheLimits(**LIMITS)


def listed(size: int) -> Manifest:
    return Manifest([ObjectInfo(f"s3://bucket/data/{number}.tar", size, "etag") for number in range(3)])


def check_manifests(place: Path) -> None:
    for manifest in (listed(1), listed(2)):
        try:
            assert manifest_files.find(manifest.fingerprint, place, URLS, None) == manifest
        except StateError:
            assert manifest != listed(1)  # the one that was there before stays
    manifest_files.keep(place, URLS, listed(2))
    assert manifest_files.find(listed(2).fingerprint, place, URLS, None) == listed(2)
    assert not list(place.rglob(".tmp-*"))


def append(place: Path, first: int, after: int = 0) -> int:
    recorder = Recorder("train.py", 1.8e9, RUN_CHUNK_BYTES)
    trace = recorder.begin_trace("reader")
    for number in range(first, first + 20):
        assert recorder.read(trace, key(number), info(number), 0, number * 0.1)
    return Archive(place).append(RUN, recorder.take(1.0, {}).pieces(), after) or 0


def check_runs(place: Path) -> None:
    archive = Archive(place)
    for run in archive.runs():
        assert len(archive.read(run).reads) in (0, 20, 40)
    archive.prune(0)
    assert not any(run.size for run in archive.runs())


def prepare_run(place: Path) -> None:
    place.mkdir()
    append(place, 0)


def more_of_run(place: Path) -> None:
    append(place, 20, Archive(place).find(RUN).size)


KEPT = {
    "a chunk is written": Kept(filled, lambda place: written(place, OTHER), check_tier),
    "a chunk is written again": Kept(filled, lambda place: written(place, KEY), check_tier),
    "a chunk is read": Kept(filled, read_back, check_tier),
    "a chunk is removed": Kept(filled, lambda place: tier(place).remove(KEY), check_tier),
    "a blob is written": Kept(filled, lambda place: tier(place).put_blob("b", b"new"), check_tier),
    "a blob is replaced": Kept(filled, lambda place: tier(place).put_blob("a", b"new"), check_tier),
    "a blob is removed": Kept(filled, lambda place: tier(place).remove_blob("a"), check_tier),
    "limits are made": Kept(lambda place: None, lambda place: CacheDirectory.open(place, **LIMITS), check_limits),
    "limits are changed": Kept(
        lambda place: CacheDirectory.open(place, **LIMITS),
        lambda place: CacheDirectory.open(place, disk_bytes=2 * QUOTA_BYTES),
        check_limits,
    ),
    "a list is kept": Kept(
        lambda place: (place.mkdir(), manifest_files.keep(place, URLS, listed(1))),
        lambda place: manifest_files.keep(place, URLS, listed(2)),
        check_manifests,
    ),
    "a run begins": Kept(lambda place: place.mkdir(), lambda place: append(place, 0), check_runs),
    "a run goes on": Kept(prepare_run, more_of_run, check_runs),
    "runs are removed": Kept(prepare_run, lambda place: Archive(place).prune(0), check_runs),
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_every_call_may_be_the_last(tmp_path: Path, kept: Kept) -> None:
    with failing() as calls:
        kept.prepare(tmp_path / "count")
        before = len(calls.names)
        kept.act(tmp_path / "count")
    made = calls.names[before:]
    assert made
    for nth, name in enumerate(made):
        for half in [False, True] if name == "pwritev" else [False]:
            place = tmp_path / f"{nth}-{half}"
            kept.prepare(place)
            # A child has its own start time to find out, once.
            of_name = made[:nth].count(name)
            assert crashed(lambda: kept.act(place), of_name, frozenset({name}), half=half), (nth, name)  # noqa: B023
            kept.check(place)


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_every_transfer_may_be_short(tmp_path: Path, kept: Kept) -> None:
    with failing() as calls:
        kept.prepare(tmp_path / "count")
        before = len(calls.names)
        kept.act(tmp_path / "count")
    transfers = [name for name in calls.names[before:] if name in ("preadv", "pwritev")]
    for nth in range(len(transfers)):
        place = tmp_path / str(nth)
        kept.prepare(place)
        with short(nth):
            kept.act(place)
        kept.check(place)


# A job whose cache is left so

DATA_SET = corpus(shard_count=3, samples_per_shard=6)
SMALL = {"ram_bytes": "1MiB", "disk_bytes": "8MiB", "chunk_bytes": "64KiB", "service": "inprocess"}


def read_all(url: str, place: Path) -> list[str]:
    """The keys of an epoch, whose samples are checked."""
    with fastload.Cache(place, **SMALL) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), batch_size=6)
        keys = [key for batch in loader for key in check_samples(DATA_SET, samples_of(batch))]
        loader.close()
    return keys


@pytest.fixture
def url(tmp_path: Path) -> str:
    return DATA_SET.write(tmp_path / "data")


@pytest.mark.parametrize("name", ["open", "pwritev", "rename", "link", "mkdir", "unlink", "fstat", "close"])
def test_a_job_reads_what_one_that_crashed_has_left(tmp_path: Path, url: str, name: str) -> None:
    for nth in (1, 4):
        place = tmp_path / str(nth)
        crashed(lambda: read_all(url, place), nth, frozenset({name}))  # noqa: B023
        assert read_all(url, place) == list(DATA_SET.samples)
        assert not list(place.rglob(".tmp-*"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_job_reads_on_whichever_calls_fail(tmp_path: Path, url: str, number: int) -> None:
    assert read_all(url, tmp_path / "cache") == list(DATA_SET.samples)
    with fastload.Cache(tmp_path / "cache", **SMALL):  # the directory itself can be used
        pass
    for name in sorted(CALLS & {"preadv", "pwritev", "rename", "link", "statvfs"}):
        with warnings.catch_warnings(), failing(0, number, frozenset({name}), times=3):
            warnings.simplefilter("ignore", RuntimeWarning)  # the one about the disk, for some of these
            assert read_all(url, tmp_path / "cache") == list(DATA_SET.samples)
