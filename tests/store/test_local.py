"""Versions of local files: another file is another version, also where size and modification time are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import fastload
from fastload.cache import object_id
from fastload.errors import ObjectChangedError
from fastload.store import ObjectInfo, RequestOptions, RetryOptions, StoreOptions, local, open_store
from fastload.store.local import LocalStore
from fastload.store.table import ObjectTable
from tests.shards import tar_of

DATA = b"0123456789"


def replaced(path: Path, data: bytes) -> None:
    """By a file of the same size, with the time of the one before: as `cp -p` and `rsync -t` do."""
    was = path.stat()
    new = path.with_name("new")
    new.write_bytes(data)
    os.utime(new, ns=(was.st_atime_ns, was.st_mtime_ns))
    new.replace(path)
    is_now = path.stat()
    assert (is_now.st_size, is_now.st_mtime_ns) == (was.st_size, was.st_mtime_ns)


def written_to(path: Path, data: bytes) -> None:
    """In its place, with the time set back."""
    was = path.stat()
    while path.stat().st_ctime_ns == was.st_ctime_ns:  # the clock of the file system has ticks
        path.write_bytes(data)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


CHANGES = [replaced, written_to]


def read(store: object, info: ObjectInfo, out: bytearray) -> bytes:
    store.read_into(info, 0, memoryview(out))  # type: ignore[attr-defined]
    return bytes(out)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_another_file_of_the_same_size_and_time(change: Callable[[Path, bytes], None], path: Path) -> None:
    store = open_store(str(path), StoreOptions(), RequestOptions(retry=RetryOptions(deadline_s=0)))
    info = store.head(str(path))
    assert read(store, info, bytearray(10)) == DATA
    change(path, DATA[::-1])
    with pytest.raises(ObjectChangedError, match=r"a\.tar.*written to or replaced.*list again"):
        read(store, info, bytearray(10))
    assert read(store, store.head(str(path)), bytearray(10)) == DATA[::-1]
    store.close()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_tagged", [True, False])
def test_a_change_while_it_is_read(
    change: Callable[[Path, bytes], None], is_tagged: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that is open: a replaced one is read to its end, and its last byte is the old one's, too."""
    store = LocalStore()
    info = store.head(str(path))
    info = info if is_tagged else replace(info, etag=None)
    preadv = os.preadv

    def in_between(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, [buffers[0][:5]], offset)
        if offset == 0:
            change(path, DATA[::-1])
        return count

    monkeypatch.setattr(os, "preadv", in_between)
    with pytest.raises(ObjectChangedError, match=r"a\.tar"):
        read(store, info, bytearray(10))


def test_a_list_from_elsewhere_holds_for_copies(path: Path, tmp_path: Path) -> None:
    """It says size and time, as every node's files have them."""
    info = replace(LocalStore().head(str(path)), etag=None)
    replaced(path, DATA)
    assert read(LocalStore(), info, bytearray(10)) == DATA


def test_tables_get_and_lose_what_this_node_knows(path: Path, tmp_path: Path) -> None:
    there = LocalStore().head(str(path))
    assert there.etag == f'W/"{path.stat().st_ino}-{path.stat().st_ctime_ns}"'
    listed = [
        ObjectInfo("s3://bucket/a.tar", 5, '"e"', 1),
        replace(there, etag=None),
        ObjectInfo(str(tmp_path / "absent"), 5),
        ObjectInfo("http://host/a.tar", 5, None, 2),
    ]
    tagged = local.with_version_tags(ObjectTable.of(listed))
    assert list(tagged) == [listed[0], there, *listed[2:]]
    assert list(local.without_version_tags(tagged)) == listed
    remote = ObjectTable.of([listed[0], listed[3]])
    assert local.with_version_tags(remote) is remote
    assert local.without_version_tags(remote) is remote
    assert len(local.with_version_tags(ObjectTable.of([]))) == 0
    many = ObjectTable.of([listed[1], listed[2]] * 1000)
    assert list(local.with_version_tags(many)) == [there, listed[2]] * 1000
    # What was found out stays, whatever the file is by now.
    replaced(path, DATA)
    assert list(local.with_version_tags(tagged)) == list(tagged)


def test_what_a_chunk_of_a_file_is_found_by(path: Path) -> None:
    """A file whose times agree, as they do of one that was just written, has the id that it had without a tag."""
    info = ObjectInfo("/data/a.tar", 10, None, 1000)
    was = object_id(info, 8 << 20, "")
    assert object_id(replace(info, etag='W/"7-1000"'), 8 << 20, "") == was
    others = [f'W/"{inode}-{ctime}"' for inode in (7, 8) for ctime in (1001, 1002)]
    assert len({was, *(object_id(replace(info, etag=etag), 8 << 20, "") for etag in others)}) == 5
    # An object of a store whose weak ETag happens to look like that is none.
    remote = replace(info, url="s3://data/a.tar")
    assert object_id(replace(remote, etag='W/"7-1001"'), 8 << 20, "") == object_id(remote, 8 << 20, "")


def test_file_systems_that_number_files_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    device = path.stat().st_dev
    place = f"{os.major(device)}:{os.minor(device)}"
    real_open = open
    monkeypatch.setattr("builtins.open", lambda name, *more, **options: real_open(mounts, *more, **options))
    for kind, keeps in (("ext4", True), ("fuse.sshfs", False), ("fuse", False), ("fuseblk", True), ("cifs", False)):
        mounts.write_text(f"junk\n22 1 {place} / / rw - {kind} /dev/x rw\n23 1 9:99 / /x rw - fuse y rw\n")
        local._keeps_inodes.cache_clear()
        assert local.version_tag(path.stat()).startswith('W/"0-') is not keeps
    local._keeps_inodes.cache_clear()


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_does_not_take_one_file_for_another(change: Callable[[Path, bytes], None], tmp_path: Path) -> None:
    """And a state goes on with the same files, copied anew."""
    shard = tmp_path / "data" / "a.tar"
    shard.parent.mkdir()

    def tar(byte: bytes) -> bytes:
        return tar_of({f"{number:03}": {"bin": byte * 3000} for number in range(40)})

    def job(state: dict[str, object] | None = None, stop_after: int = 99) -> tuple[set[bytes], dict[str, object]]:
        with fastload.Cache(tmp_path / "cache", ram_bytes="1MiB", disk_bytes="16MiB", chunk_bytes="64KiB") as cache:
            dataset = fastload.StreamingDataset(f"{shard.parent}/", cache=cache, shuffle=False)
            loader = fastload.DataLoader(dataset, batch_size=8, num_workers=1)
            if state is not None:
                loader.load_state_dict(state)
            seen: set[bytes] = set()
            for number, batch in enumerate(loader, 1):
                seen |= {bytes(set(sample)) for sample in batch["bin"]}
                if number == stop_after:
                    break
            saved = loader.state_dict()
            loader.close()
        return seen, saved

    shard.write_bytes(tar(b"a"))
    assert job()[0] == {b"a"}
    change(shard, tar(b"b"))
    assert job()[0] == {b"b"}
    _, state = job(stop_after=2)
    change(shard, tar(b"c"))
    assert job(state)[0] == {b"c"}
