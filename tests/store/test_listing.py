"""From what a user writes to objects, on local files and on the real S3 server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastload.errors import AccessDeniedError, ConfigError, ObjectMissingError
from fastload.store import Counters, ObjectInfo, RequestOptions, Store, StoreOptions, open_store, resolve, store_root
from fastload.store.listing import present
from tests.conftest import Bucket
from tests.patience import PATIENCE_S


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    keys = [f"t/train-{number:03}.tar" for number in range(12)] + ["t/val-0.tar", "t/README", "u/x.tar", "w/note.txt"]
    if request.param == "s3":
        s3 = request.getfixturevalue("s3")
        for key in keys:
            s3.put(key, b"x" * len(key))
        return str(s3.url)
    for key in keys:
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"x" * len(key))
    return str(tmp_path)


class Pool:
    """One store for each root, with one count of their requests."""

    def __init__(self, options: StoreOptions) -> None:
        self._options, self._stores = options, dict[str, Store]()
        self.counters = Counters()

    def open(self, url: str) -> Store:
        root = store_root(url)
        if root not in self._stores:
            self._stores[root] = open_store(url, self._options, RequestOptions(counters=self.counters))
        return self._stores[root]

    def close(self) -> None:
        for store in self._stores.values():
            store.close()


@pytest.fixture
def pool() -> Iterator[Pool]:
    with contextlib.closing(Pool(StoreOptions.from_environment())) as pool:
        yield pool


Names = Callable[..., list[str]]


@pytest.fixture
def names(root: str, pool: Pool) -> Names:
    def resolve_names(*urls: str) -> list[str]:
        infos = resolve([f"{root}/{url}" for url in urls], pool.open)
        assert all(isinstance(info, ObjectInfo) for info in infos)
        assert all(info.size == len(info.url.removeprefix(root + "/")) for info in infos)
        return [info.url.removeprefix(root + "/") for info in infos]

    return resolve_names


def test_a_pattern(names: Names, pool: Pool) -> None:
    assert names("t/train-{003..005}.tar") == [f"t/train-00{number}.tar" for number in (3, 4, 5)]
    assert pool.counters.values()["requests"] == 1
    assert names("t/{val-0,train-011}.tar") == ["t/val-0.tar", "t/train-011.tar"]


def test_what_lies_beside_the_shards_of_a_prefix(root: str, pool: Pool) -> None:
    def found(url: str, beside: tuple[str, ...]) -> list[str]:
        infos = resolve([f"{root}/{url}"], pool.open, beside=beside)
        return [info.url.rpartition("/")[2] for info in infos]

    shards = found("t/", ())
    assert found("t/", ("README", "val-0.tar", "absent")) == [name for name in shards if name != "val-0.tar"] + [
        "README",
        "val-0.tar",
    ]
    assert found("t/", ("*0.tar",)) == [name for name in shards if not name.endswith("0.tar")] + [
        name for name in shards if name.endswith("0.tar")
    ]
    assert found("t/", ("*ADME", "*.idx")) == [*shards, "README"]
    assert found("t/train-{000..001}.tar", ("README",)) == ["train-000.tar", "train-001.tar"]
    with pytest.raises(ObjectMissingError, match="no shards"):
        found("w/", ("note.txt",))


def test_a_prefix(names: Names) -> None:
    assert names("t/") == [f"t/train-{number:03}.tar" for number in range(12)] + ["t/val-0.tar"]
    assert names("{u,t}/")[:2] == ["u/x.tar", "t/train-000.tar"]


def test_plain_urls_in_their_order_and_as_often_as_named(names: Names) -> None:
    assert names("u/x.tar", "t/train-002.tar", "u/x.tar") == ["u/x.tar", "t/train-002.tar", "u/x.tar"]


def test_many_plain_urls_of_one_folder_are_listed(s3: Bucket) -> None:
    keys = [f"many/train-{number:03}.tar" for number in range(40)]
    for key in [*keys, "few/a.tar", "few/b.tar"]:
        s3.put(key, b"x")
    urls = [f"{s3.url}/{key}" for key in ["few/b.tar", *reversed(keys), keys[7], "few/a.tar"]]
    with contextlib.closing(Pool(s3.options)) as pool:
        assert [info.url for info in resolve(urls, pool.open)] == urls
        assert pool.counters.values()["requests"] == 3  # one listing, and two of the other folder
        with pytest.raises(ObjectMissingError, match=r"many/train-040\.tar"):
            resolve([*urls, f"{s3.url}/many/train-040.tar"], pool.open)


def test_of_names_those_that_are_there(s3: Bucket) -> None:
    """One request more for each that is not, however many are: a run of long ago may have read much that is gone."""
    keys = [f"many/{number:03}" for number in range(40)] + ["many/a {b,c}"]
    for key in keys:
        s3.put(key, b"x")
    gone = [f"{s3.url}/many/gone-{number}" for number in range(5)]
    urls = [f"{s3.url}/{key}" for key in keys]
    with contextlib.closing(Pool(s3.options)) as pool:
        found = present([gone[0], *urls, *gone, urls[3]], pool.open)
        assert [info.url for info in found] == [*urls, urls[3]]
        assert pool.counters.values()["requests"] <= 1 + len(gone) + 1
        assert present([], pool.open) == []


class ReadOnly:
    """Objects that may be read and not listed, as some buckets have it. Notes who asks at once."""

    def __init__(self, together: int) -> None:
        self.barrier = threading.Barrier(together)
        self.opened = 0

    def open(self, url: str) -> ReadOnly:
        self.opened += 1
        return self

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        raise AccessDeniedError(f"{prefix_url}: may not be listed")

    def head(self, url: str) -> ObjectInfo:
        self.barrier.wait(PATIENCE_S)
        return ObjectInfo(url, 1)

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        raise AssertionError("nothing is read")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("count", [8, 32])
def test_plain_urls_that_are_not_listed_are_asked_for_together(count: int) -> None:
    store = ReadOnly(together=min(count, 16))
    urls = [f"s3://bucket/t/{number}.tar" for number in range(count)]
    assert [info.url for info in resolve(urls, store.open)] == urls
    assert store.opened <= 2


def test_missing_members(names: Names, root: str) -> None:
    with pytest.raises(ObjectMissingError) as error:
        names("t/train-{010..013}.tar")
    assert f"{root}/t/train-{{010..013}}.tar: 2 of its 4 objects are not there" in str(error.value)
    assert f"{root}/t/train-012.tar" in str(error.value)


def test_nothing_there(names: Names, root: str) -> None:
    with pytest.raises(ObjectMissingError, match=r"w/: no shards \(\.tar\).*1 other object \(1 \.txt\), .*: note\.txt"):
        names("w/")
    with pytest.raises(ObjectMissingError, match=r"nowhere/: no shards .*nothing at all"):
        names("nowhere/")
    with pytest.raises(ObjectMissingError, match=r"t/none\.tar"):
        names("t/none.tar")


@pytest.mark.parametrize(
    ("name", "cure"),
    [("train-*.tar", r'"\*" stands for itself; write \{0'), ("s3:/bucket/a.tar", "write s3://bucket/a.tar")],
)
def test_wrong_names_that_are_easily_mended(name: str, cure: str, names: Names) -> None:
    with pytest.raises(ObjectMissingError, match=cure):
        names(name)


def test_a_bucket_is_no_shard(pool: Pool) -> None:
    with pytest.raises(ConfigError, match=r's3://bucket is a bucket, not an object; .* with "/" at the end'):
        resolve(["s3://bucket"], pool.open)


def test_what_is_no_url(names: Names) -> None:
    with pytest.raises(ConfigError, match="braces do not match"):
        names("t/train-{000..001.tar")
    with pytest.raises(ConfigError, match="no URL was given"):
        names()


@pytest.mark.parametrize("url", ["s3:///key", "s3://"])
def test_no_bucket(url: str, pool: Pool) -> None:
    with pytest.raises(ConfigError, match="names no bucket"):
        resolve([url], pool.open)


def test_relative_paths_and_file_urls(pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    found = resolve(["a.tar", f"file://{tmp_path}/a.tar", "./"], pool.open)
    assert [info.url for info in found] == [str(tmp_path / "a.tar")] * 3
