"""The key of a chunk: two different ranges of bytes never have one, and one range has the same everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.cache import ChunkKey, object_id, url_without_credentials
from fastload.store.types import ObjectInfo

INFO = ObjectInfo("s3://bucket/train-0.tar", 1000, '"abc"', 5)
OF_BYTES = replace(INFO, etag='"900150983cd24fb0d6963f7d28e17f72"')

keys = st.builds(ChunkKey, st.binary(min_size=16, max_size=16), st.integers(0, (1 << 63) - 1))


@given(keys)
def test_name_gives_the_key_back(key: ChunkKey) -> None:
    assert ChunkKey.from_name(key.name) == key
    assert len(key.fan_out) == 2
    assert 0 <= int(key.fan_out, 16) < 256


@pytest.mark.parametrize("name", ["", "x", "0" * 32, "0" * 32 + "-1", "0" * 32 + "-000000001", "0" * 32 + "-0000000g"])
def test_foreign_names_are_nobodys(name: str) -> None:
    assert ChunkKey.from_name(name) is None


def test_upper_case_and_overflow_are_nobodys() -> None:
    assert ChunkKey.from_name("A" * 32 + "-00000000") is None
    assert ChunkKey.from_name("0" * 32 + "-" + "f" * 16) is None


def test_neighbours_lie_in_different_directories() -> None:
    assert len({ChunkKey(bytes(16), index).fan_out for index in range(256)}) == 256


@pytest.mark.parametrize(("object_bytes", "index"), [(b"short", 0), (bytes(16), -1), (bytes(16), 1 << 63)])
def test_impossible_keys_are_refused(object_bytes: bytes, index: int) -> None:
    with pytest.raises(ValueError, match="no chunk key"):
        ChunkKey(object_bytes, index)


def test_object_id_is_pinned() -> None:
    # What is on disk is found by it: a change loses every cache.
    assert object_id(INFO, 8 << 20, "").hex() == "fa67858aa75ab581752cee665819fd2a"
    assert object_id(OF_BYTES, 8 << 20, "http://a").hex() == "b909b46fcef08e708df4a727097a5b13"


def test_every_field_counts() -> None:
    ids = {
        object_id(info, chunk_bytes, endpoint)
        for info in (
            INFO,
            replace(INFO, url="s3://bucket/train-1.tar"),
            replace(INFO, etag='"abd"'),
            replace(INFO, size=1001),
            *(replace(INFO, etag=None, mtime_ns=mtime_ns, size=size) for mtime_ns in (5, 6) for size in (1000, 1001)),
        )
        for chunk_bytes in (1 << 20, 8 << 20)
        for endpoint in ("http://a", "http://b")
    }
    assert len(ids) == 4 * 2 * 2 + 4 * 2 * 2


def test_endpoint_and_time_do_not_count_beside_an_etag_made_of_the_bytes() -> None:
    for info in (OF_BYTES, replace(OF_BYTES, etag=f'"{"0a" * 16}-12"')):
        assert object_id(info, 4096, "http://a") == object_id(replace(info, mtime_ns=9), 4096, "http://b")
        assert object_id(info, 4096, "http://a") == object_id(info, 4096, "")


def test_two_stores_may_give_other_bytes_the_same_etag() -> None:
    """One that counts versions, say. A web server's place is in the URL."""
    assert object_id(INFO, 4096, "http://a") == object_id(replace(INFO, mtime_ns=9), 4096, "http://a")
    assert len({object_id(INFO, 4096, endpoint) for endpoint in ("", "http://a", "http://b")}) == 3
    web = replace(INFO, url="https://host/a.tar")
    assert object_id(web, 4096, "") == object_id(web, 4096, "http://a")
    assert object_id(INFO, 4096, "") == object_id(replace(INFO, etag="abc"), 4096, "")


def test_a_weak_etag_is_none() -> None:
    weak = replace(INFO, etag='W/"abc"')
    assert object_id(weak, 4096, "") == object_id(replace(INFO, etag=None), 4096, "")


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_fields_cannot_run_into_each_other(url: str, etag: str, other_url: str, other_etag: str) -> None:
    one = object_id(ObjectInfo("/" + url, 1, "x" + etag), 4096, "")
    two = object_id(ObjectInfo("/" + other_url, 1, "x" + other_etag), 4096, "")
    same = (url, ("x" + etag).strip().strip('"')) == (other_url, ("x" + other_etag).strip().strip('"'))
    assert (one == two) == same


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://u:p@h:1/a?versionId=3", "https://h:1/a?versionId=3"),
        ("https://h/a?X-Amz-Signature=1&X-Amz-Date=2&versionId=3", "https://h/a?versionId=3"),
        ("https://h/a?AWSAccessKeyId=k&Signature=s&Expires=1", "https://h/a"),
        ("https://h/a?Expires=1&policy=2", "https://h/a?Expires=1&policy=2"),
        ("https://h/a?sv=1&se=2&sr=b&sig=x%3D", "https://h/a"),
        ("https://h/a?sv=1&se=2", "https://h/a?sv=1&se=2"),
        ("https://h/a?X-Goog-Signature=1&b=%20#part", "https://h/a?b=+"),
        ("s3://key:secret@bucket/a?b#c", "s3://bucket/a?b#c"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/data/a@b?c#d.tar", "/data/a@b?c#d.tar"),
        ("file:///data/a", "file:///data/a"),
    ],
)
def test_url_without_credentials(url: str, expected: str) -> None:
    assert url_without_credentials(url) == expected
