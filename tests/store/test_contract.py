"""One suite for every store: local files, the real S3 server by all ways to it, fsspec, and wrapped stores."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest

from fastload.errors import (
    AccessDeniedError,
    ConfigError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    WriteConflictError,
)
from fastload.store import (
    Counters,
    ObjectInfo,
    RequestOptions,
    Retrying,
    Store,
    StoreOptions,
    check_conditions,
    direct,
    open_store,
)
from fastload.store.local import LocalStore
from fastload.store.objectstore import ObjectStore
from tests.conftest import Bucket
from tests.patience import PATIENCE_S


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


def _fsspec_local(request: pytest.FixtureRequest) -> World:
    pytest.importorskip("fsspec")
    root = f"local://{request.getfixturevalue('tmp_path')}"
    local = _local(request)
    return World(open_store(root, StoreOptions()), root, lambda key, data: f"local://{local.put(key, data)}")


WORLDS = [_local, _s3_direct, _s3_signed_url, _s3_obstore, _fsspec, _fsspec_local, _wrapped]


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


def test_writes_are_read_back(world: World) -> None:
    url = f"{world.root}/new/folder/a b+ü%20.bin"
    data = random.Random(4).randbytes(1_000_003)
    for content in (data, b"", b"shorter"):
        etag = world.store.put(url, content)
        info = world.store.head(url)
        assert (info.size, info.etag) == (len(content), etag)
        assert read(world.store, info, 0, len(content)) == content
        assert [each.url for each in world.store.list(f"{world.root}/")] == [url]


@pytest.mark.parametrize("kind", ["bytes", "read-only", "array", "map"])
def test_any_buffer_is_written(world: World, kind: str) -> None:
    array = np.arange(30_000, dtype=np.float32).reshape(100, 300)
    content, url = array.tobytes(), f"{world.root}/a.bin"
    with contextlib.ExitStack() as stack:
        buffer: Any = {"bytes": content, "read-only": memoryview(content), "array": array}.get(kind)
        if buffer is None:
            buffer = stack.enter_context(mmap.mmap(-1, len(content)))
            buffer[:] = content
        world.store.put(url, buffer)
    assert read(world.store, world.store.head(url), 0, len(content)) == content


def test_a_write_is_another_version(world: World) -> None:
    url = f"{world.root}/a.bin"
    world.store.put(url, b"0123")
    before = world.store.head(url)
    world.store.put(url, b"01234")
    with pytest.raises(ObjectChangedError, match=r"a\.bin"):
        read(world.store, before, 0, 4)


def test_what_is_deleted_is_gone_and_may_be_deleted_again(world: World) -> None:
    urls = [f"{world.root}/d/{name}" for name in ("a.bin", "b.bin")]
    for url in urls:
        world.store.put(url, b"x")
    world.store.delete(urls[0])
    with pytest.raises(ObjectMissingError):
        world.store.head(urls[0])
    assert [info.url for info in world.store.list(f"{world.root}/d/")] == [urls[1]]
    for url in (*urls, f"{world.root}/never/there"):
        world.store.delete(url)
    assert list(world.store.list(f"{world.root}/d/")) == []
    world.store.put(urls[0], b"y")
    assert world.store.head(urls[0]).size == 1


# Writes on a condition


CONDITIONAL = [make for make in WORLDS if "fsspec" not in make.__name__]


@pytest.fixture(params=CONDITIONAL, ids=lambda make: make.__name__.strip("_"))
def conditional(request: pytest.FixtureRequest) -> Iterator[World]:
    made: World = request.param(request)
    yield made
    made.store.close()


def test_only_what_is_not_there_is_created(conditional: World) -> None:
    store, url = conditional.store, f"{conditional.root}/new/manifest.json"
    etag = store.put_if_absent(url, b"first")
    with pytest.raises(WriteConflictError, match=r"manifest\.json: another has written it"):
        store.put_if_absent(url, b"second")
    info = store.head(url)
    assert info.etag == etag
    assert read(store, info, 0, 5) == b"first"
    store.delete(url)
    store.put_if_absent(url, b"third")


def test_only_the_version_that_was_seen_is_replaced(conditional: World) -> None:
    store, url = conditional.store, f"{conditional.root}/manifest.json"
    first = store.put(url, b"first")
    assert first is not None
    second = store.put_if_match(url, b"other", first)
    assert second == store.head(url).etag != first
    for etag in (first, '"no such"'):
        with pytest.raises(WriteConflictError, match=r"manifest\.json: another has written it"):
            store.put_if_match(url, b"lost!", etag)
    assert read(store, store.head(url), 0, 5) == b"other"


@pytest.mark.parametrize("name", ["manifest.json", "no/such/folder/manifest.json"])
def test_what_is_gone_is_not_replaced(conditional: World, name: str) -> None:
    store, url = conditional.store, f"{conditional.root}/{name}"
    first = store.put(f"{conditional.root}/manifest.json", b"first")
    assert first is not None
    store.delete(f"{conditional.root}/manifest.json")
    with pytest.raises(WriteConflictError):
        store.put_if_match(url, b"second", first)
    with pytest.raises(ObjectMissingError):
        store.head(url)


def _race(store: Store, turn: int, write: Callable[[Store, bytes], object]) -> list[bytes]:
    """What 8 writers at once write, each of their own: of those that do not lose. Never what was there before, which an
    ETag of the content would not tell from it.
    """
    patient, start = Retrying(store), threading.Barrier(8)

    def one(content: bytes) -> bytes | None:
        start.wait(PATIENCE_S)
        with contextlib.suppress(WriteConflictError):
            write(patient, content)
            return content
        return None

    with ThreadPoolExecutor(8) as pool:
        return [
            content for content in pool.map(one, [b"%d%d" % (turn, number) * 500 for number in range(8)]) if content
        ]


def test_of_eight_creators_one_wins(conditional: World) -> None:
    for number in range(5):
        url = f"{conditional.root}/{number}/manifest.json"
        (winner,) = _race(conditional.store, number, lambda store, data, url=url: store.put_if_absent(url, data))  # type: ignore[misc]
        assert read(conditional.store, conditional.store.head(url), 0, 1000) == winner


def test_of_eight_who_replace_one_wins(conditional: World) -> None:
    url = f"{conditional.root}/manifest.json"
    etag = conditional.store.put(url, b"old")
    for turn in range(5):
        before: str = etag or ""
        (winner,) = _race(conditional.store, turn, lambda store, data, etag=before: store.put_if_match(url, data, etag))  # type: ignore[misc]
        info = conditional.store.head(url)
        assert read(conditional.store, info, 0, 1000) == winner
        etag = info.etag


def test_conditions_are_tried_out(conditional: World) -> None:
    check_conditions(conditional.store, f"{conditional.root}/folder/")
    assert list(conditional.store.list(f"{conditional.root}/")) == []


@pytest.mark.parametrize("make", [_fsspec, _fsspec_local])
def test_file_systems_of_fsspec_write_nothing_on_a_condition(
    make: Callable[[pytest.FixtureRequest], World], request: pytest.FixtureRequest
) -> None:
    world = make(request)
    url = f"{world.root}/manifest.json"
    with pytest.raises(ConfigError, match="fsspec, which has no conditional writes"):
        world.store.put_if_absent(url, b"x")
    with pytest.raises(ConfigError, match="fsspec, which has no conditional writes"):
        world.store.put_if_match(url, b"x", "y")
    with pytest.raises(ConfigError, match="fsspec, which has no conditional writes"):
        check_conditions(world.store, world.root)
    assert list(world.store.list(f"{world.root}/")) == []
    world.store.close()


def test_web_servers_are_not_written_to() -> None:
    store, url = open_store("http://127.0.0.1:9/a", StoreOptions()), "http://127.0.0.1:9/a"
    for write in (
        lambda: store.put(url, b""),
        lambda: store.put_if_absent(url, b""),
        lambda: store.put_if_match(url, b"", "e"),
        lambda: store.delete(url),
    ):
        with pytest.raises(ConfigError, match="nothing is written to web servers"):
            write()
    store.close()


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
