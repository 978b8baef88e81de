"""One suite for every store: local files, the real S3 server by all ways to it, fsspec, and wrapped stores."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import obstore
import pytest

from fastload.errors import AccessDeniedError, ObjectChangedError, ObjectMissingError, StoreError
from fastload.store import Counters, ObjectInfo, RequestOptions, Store, StoreOptions, direct, open_store
from fastload.store.local import LocalStore
from fastload.store.objectstore import ObjectStore
from tests.conftest import Bucket


@dataclass
class World:
    """A store, and a way to put objects where it reads them."""

    store: Store
    root: str
    put: Callable[[str, bytes], str]


def _local(request: pytest.FixtureRequest) -> World:
    folder: Path = request.getfixturevalue("tmp_path")

    def put(key: str, data: bytes) -> str:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        # Two writes within one tick of the file system's clock would have one time.
        os.utime(path, ns=(0, random.getrandbits(40)))
        return str(path)

    return World(LocalStore(), str(folder), put)


def _s3_direct(request: pytest.FixtureRequest) -> World:
    bucket: Bucket = request.getfixturevalue("s3")
    store = ObjectStore(bucket.url, bucket.options)
    assert store._direct is not None
    return World(store, bucket.url, bucket.put)


def _s3_obstore(request: pytest.FixtureRequest) -> World:
    bucket: Bucket = request.getfixturevalue("s3")
    # Any setting of obstore's own is a reason to read through obstore.
    store = ObjectStore(bucket.url, replace(bucket.options, extra=(("read_timeout", "30s"),)))
    assert store._direct is None
    return World(store, bucket.url, bucket.put)


def _s3_signed_url(request: pytest.FixtureRequest) -> World:
    bucket: Bucket = request.getfixturevalue("s3")
    store = ObjectStore(bucket.url, bucket.options)
    assert store._direct is not None
    # As if obstore had found the credentials by itself.
    store._direct._ask, store._direct.signs_urls = direct._in_url(store._opened()), True
    return World(store, bucket.url, bucket.put)


def _fsspec(request: pytest.FixtureRequest) -> World:
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    root = f"memory://{request.node.name.partition('[')[0]}"

    def put(key: str, data: bytes) -> str:
        system.pipe_file(f"{root}/{key}", data)
        return f"{root}/{key}"

    return World(open_store(root + "/", StoreOptions()), root, put)


def _wrapped(request: pytest.FixtureRequest) -> World:
    bucket: Bucket = request.getfixturevalue("s3")
    return World(open_store(bucket.url, bucket.options, RequestOptions(requests_max=2)), bucket.url, bucket.put)


WORLDS = [_local, _s3_direct, _s3_signed_url, _s3_obstore, _fsspec, _wrapped]


@pytest.fixture(params=WORLDS, ids=lambda make: make.__name__.strip("_"))
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made: World = request.param(request)
    yield made
    made.store.close()
    made.store.close()


def read(store: Store, info: ObjectInfo, start: int, length: int) -> bytes:
    out = bytearray(length)
    store.read_into(info, start, memoryview(out))
    return bytes(out)


def test_is_a_store(world: World) -> None:
    assert isinstance(world.store, Store)


def test_reads_what_was_put(world: World) -> None:
    data = random.Random(1).randbytes(3_000_001)
    info = world.store.head(world.put("folder/a b+ü%20.tar", data))
    assert info.size == len(data)
    for start, length in ((0, len(data)), (0, 1), (1, 4096), (len(data) - 1, 1), (1_000_003, 1_999_998)):
        assert read(world.store, info, start, length) == data[start : start + length]


def test_lists_by_prefix_in_order_of_keys(world: World) -> None:
    keys = ["d/b-1.tar", "d/a-10.tar", "d/a-2.tar", "d/a-2.txt", "d/a/x.tar", "d2/a.tar", "d/a-.tar", "e.tar"]
    sizes = {world.put(key, b"x" * (number + 1)): number + 1 for number, key in enumerate(keys)}
    for prefix in ("d/a-", "d/", "d", "d/a-2.tar", "", "nothing", "d/nothing/"):
        listed = list(world.store.list(f"{world.root}/{prefix}"))
        wanted = sorted(url for url in sizes if url.startswith(f"{world.root}/{prefix}"))
        assert [info.url for info in listed] == wanted, prefix
        assert all(info.size == sizes[info.url] for info in listed)


def test_a_listing_says_what_a_head_says(world: World) -> None:
    url = world.put("one.tar", b"abc")
    (listed,) = world.store.list(url)
    assert listed == world.store.head(url)
    assert read(world.store, listed, 1, 2) == b"bc"


def test_an_empty_object(world: World) -> None:
    info = world.store.head(world.put("empty.tar", b""))
    assert info.size == 0
    assert read(world.store, info, 0, 0) == b""


def test_a_missing_object(world: World) -> None:
    url = f"{world.root}/not-there.tar"
    with pytest.raises(ObjectMissingError, match=r"not-there\.tar"):
        world.store.head(url)
    with pytest.raises(ObjectMissingError, match=r"not-there\.tar"):
        read(world.store, ObjectInfo(url, 10, None), 0, 10)


@pytest.mark.parametrize("new", [b"0123456789abcdef", b"x123456789", b"012"], ids=["longer", "other", "shorter"])
def test_an_object_that_changed(world: World, new: bytes) -> None:
    info = world.store.head(world.put("a.tar", b"0123456789"))
    world.put("a.tar", new)
    with pytest.raises(ObjectChangedError, match=r"a\.tar.*changed"):
        read(world.store, info, 4, 6)
    assert read(world.store, world.store.head(info.url), 0, len(new)) == new


def test_serves_several_threads(world: World) -> None:
    data = random.Random(2).randbytes(1 << 20)
    info = world.store.head(world.put("a.tar", data))
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda start: read(world.store, info, start, 1 << 15), range(0, 1 << 20, 1 << 15))
        assert b"".join(parts) == data


def test_wrappers_count(s3: Bucket) -> None:
    counters = Counters()
    store = open_store(s3.url, s3.options, RequestOptions(counters=counters))
    info = store.head(s3.put("a.tar", b"x" * 1000))
    read(store, info, 0, 1000)
    list(store.list(s3.url + "/"))
    with pytest.raises(StoreError):
        store.head(s3.url + "/no")
    assert counters.values() == {"requests": 4, "bytes": 1000, "retries": 0, "bad_replies": 0, "errors": 1}
    store.close()


def test_more_than_one_page_of_keys(s3: Bucket) -> None:
    keys = [f"p/{number:05}.tar" for number in range(1005)]
    urls = [f"{s3.url}/{key}" for key in keys]
    writer = ObjectStore(s3.url, s3.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: obstore.put(writer._opened(), key, b"x"), keys))
    writer.close()
    store = open_store(s3.url, s3.options)
    assert [info.url for info in store.list(f"{s3.url}/p/00")] == urls[:1000]
    assert [info.url for info in store.list(f"{s3.url}/p/")] == urls
    assert [info.url for info in store.list(f"{s3.url}/p/0100")] == urls[1000:]
    store.close()


def test_an_object_of_many_parts_keeps_its_etag(s3: Bucket, tmp_path: Path) -> None:
    data = random.Random(3).randbytes(12 << 20)
    (tmp_path / "big").write_bytes(data)
    url = f"{s3.url}/big.tar"
    s3.server.upload(tmp_path / "big", url)
    store = open_store(s3.url, s3.options)
    (info,) = store.list(url)
    assert info.etag is not None
    assert "-" in info.etag
    assert read(store, info, 5 << 20, 1 << 20) == data[5 << 20 : 6 << 20]
    store.close()


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"abc")
    info = LocalStore().head(str(tmp_path / "a.tar"))

    def refuse(*_: object) -> int:  # root may read everything, and tests may run as root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastload.store.local.os.open", refuse)
    with pytest.raises(AccessDeniedError, match=r"a\.tar: this user may not read it"):
        read(LocalStore(), info, 0, 3)
    monkeypatch.undo()
    with pytest.raises(ObjectMissingError, match="is a folder; for the shards in it write"):
        LocalStore().head(str(tmp_path))
