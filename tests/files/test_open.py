"""Objects of the real server as files."""

from __future__ import annotations

import gc
import io
import os
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastload
from fastload.client.cache import handle_of
from tests.conftest import Bucket
from tests.files.conftest import CHUNK_BYTES
from tests.processes import kill_service, until


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def node(cache: fastload.Cache) -> dict:
    """The service's figures."""
    with handle_of(cache).consumer() as consumer:
        return consumer.stats()


def leases(cache: fastload.Cache) -> int:
    return sum(int(each["leases"]) + int(each["wants"]) for each in node(cache)["consumers"])


def test_a_file(s3: Bucket, cache: fastload.Cache) -> None:
    data = content(3 * CHUNK_BYTES + 1000)
    url = s3.put("folder/object {0..3} #1?", data)
    with fastload.open(url, cache) as file:
        assert isinstance(file, io.BufferedReader)
        assert (file.size, file.url, file.name, file.mode) == (len(data), url, url, "rb")
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.read(10) == data[:10]
        assert file.tell() == 10
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.read() == file.read(5) == b""
        file.seek(CHUNK_BYTES - 3)
        assert file.read(6) == data[CHUNK_BYTES - 3 : CHUNK_BYTES + 3]
        out = np.zeros((50, 1000), np.int16)
        file.seek(1)
        assert file.readinto(out) == out.nbytes
        assert out.tobytes() == data[1 : 1 + out.nbytes]
        assert file.seek(len(data) + 100) == len(data) + 100
        assert file.read() == b""
        assert file.readinto(bytearray(10)) == 0
        with pytest.raises(ValueError, match="before the beginning"):
            file.seek(-1)
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    assert file.closed
    for call in (file.read, file.tell, file.readable, lambda: file.seek(0), lambda: file.raw.readinto(bytearray(1))):
        with pytest.raises(ValueError, match="closed file"):
            call()
    file.close()


def test_empty_objects_and_local_files(s3: Bucket, cache: fastload.Cache, tmp_path: Path) -> None:
    with fastload.open(s3.put("empty", b""), cache) as file:
        assert (file.size, file.read(), file.read(1)) == (0, b"", b"")
    path = tmp_path / "a file"
    path.write_bytes(data := content(2 * CHUNK_BYTES))
    with fastload.open(path, cache) as file:
        assert file.read() == data
    path.write_bytes(b"another")
    with fastload.open(f"file://{path}", cache) as file:
        assert file.read() == b"another"


def test_what_cannot_be_opened(s3: Bucket, cache: fastload.Cache, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-here") as caught:
        fastload.open(f"{s3.url}/nothing-here", cache)
    assert isinstance(caught.value, fastload.ObjectMissingError)
    with pytest.raises(fastload.ObjectMissingError):
        fastload.open(tmp_path / "nothing", cache)
    with pytest.raises(fastload.ConfigError, match="a folder"):
        fastload.open(f"{s3.url}/folder/", cache)
    with pytest.raises(fastload.ConfigError, match="zero byte"):
        fastload.open("s3://bucket/\0", cache)
    with pytest.raises(fastload.ConfigError, match="is not a URL"):
        fastload.open("", cache)
    with pytest.raises(fastload.ConfigError, match="or the directory of one"):
        fastload.open(f"{s3.url}/x", 17)  # type: ignore[arg-type]
    with pytest.raises(fastload.ConfigError, match="looks like a mode"):
        fastload.open(f"{s3.url}/x", "rb")
    with pytest.raises(fastload.ConfigError, match="is a bucket, not an object"):
        fastload.open("s3://bucket", cache)
    url = s3.put("private", b"data")
    denied = {"key": s3.denied_options.access_key_id, "secret": s3.denied_options.secret_access_key}
    with pytest.raises(PermissionError, match="private"):
        fastload.open(url, cache, storage_options=denied)
    # Not there, and then it is.
    with pytest.raises(fastload.ObjectMissingError):
        fastload.open(f"{s3.url}/later", cache)
    s3.put("later", b"now")
    with fastload.open(f"{s3.url}/later", cache) as file:
        assert file.read() == b"now"


def test_each_byte_is_fetched_once_and_each_object_asked_for_once(s3: Bucket, cache: fastload.Cache) -> None:
    objects = {
        s3.put(f"{number}", content(1000 + number, number)): content(1000 + number, number) for number in range(60)
    }
    with fastload.open(next(iter(objects)), cache):
        before = node(cache)["store"]["requests"]
    for _ in range(2):
        for url, data in objects.items():
            with fastload.open(url, cache) as file:
                assert file.read() == data
    figures = node(cache)
    assert figures["node"]["fetched_bytes"] == sum(map(len, objects.values()))
    # But for those that were sent a second time since the first was late.
    asked = figures["store"]["requests"] - figures["node"]["hedged_requests"]
    assert asked - before == 2 * len(objects) - 1
    until(lambda: leases(cache) == 0)
    assert len([each for each in figures["consumers"] if each["name"] == "fastload.open"]) == 1


def test_an_object_that_changes(s3: Bucket, cache: fastload.Cache) -> None:
    old, new = content(3 * CHUNK_BYTES), content(3 * CHUNK_BYTES, 1)
    url = s3.put("changing", old)
    with fastload.open(url, cache) as file:
        assert file.read(10) == old[:10]
        s3.put("changing", new)
        file.seek(2 * CHUNK_BYTES)
        with pytest.raises(fastload.ObjectChangedError, match="changing"):
            file.read(10)
        file.seek(0)
        assert file.read(20) == old[:20]  # this is here
    with fastload.open(url, cache) as file:
        assert file.read() == new


def test_leases_are_given_back(s3: Bucket, cache: fastload.Cache) -> None:
    data = content(20 * CHUNK_BYTES)
    url = s3.put("large", data)
    file = fastload.open(url, cache)
    assert file.read(2 * CHUNK_BYTES + 5) == data[: 2 * CHUNK_BYTES + 5]
    assert leases(cache) > 1  # it goes on ahead
    file.seek(0)
    assert file.read() == data
    until(lambda: leases(cache) == 0)
    file.seek(0)
    file.read(CHUNK_BYTES + CHUNK_BYTES // 2)
    file.close()
    until(lambda: leases(cache) == 0)
    file = fastload.open(url, cache)
    file.read(3 * CHUNK_BYTES + 1)
    del file  # not closed
    until(lambda: leases(cache) == 0)


def test_what_follows_is_fetched_ahead(s3: Bucket, cache: fastload.Cache) -> None:
    data = content(16 * CHUNK_BYTES)
    with fastload.open(s3.put("forward", data), cache) as file:
        assert file.read(1000) == data[:1000]
        assert node(cache)["node"]["fetched_chunks"] == 1
        while file.tell() < 3 * CHUNK_BYTES:
            file.read(10_000)
        until(lambda: node(cache)["node"]["fetched_chunks"] > 5)
    with fastload.open(s3.put("anywhere", data), cache) as file:
        before = node(cache)["node"]["fetched_chunks"]
        for chunk in (9, 2, 14, 6):
            file.seek(chunk * CHUNK_BYTES + 100)
            file.raw.readinto(bytearray(100))
        assert node(cache)["node"]["fetched_chunks"] == before + 4


def test_a_file_of_many_chunks_in_an_arena_of_two(s3: Bucket, tmp_path: Path) -> None:
    data = content(9 * CHUNK_BYTES + 1)
    url = s3.put("large", data)
    with (
        fastload.Cache(tmp_path / "small", ram_bytes=2 * CHUNK_BYTES, disk_bytes=0, chunk_bytes=CHUNK_BYTES) as cache,
        ThreadPoolExecutor(4) as pool,
    ):

        def read(number: int) -> bool:
            with fastload.open(url, cache) as file:
                return file.read(number + 1) + file.read() == data

        assert all(pool.map(read, range(8)))


def test_threads_share_one_connection(s3: Bucket, cache: fastload.Cache) -> None:
    objects = [(s3.put(f"{number}", content(50_000, number)), content(50_000, number)) for number in range(8)]

    def read(number: int) -> bool:
        url, data = objects[number % len(objects)]
        with fastload.open(url, cache) as file:
            file.seek(number)
            return file.read(1000) == data[number : number + 1000] and file.read() == data[number + 1000 :]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))
    assert [each["name"] for each in node(cache)["consumers"]].count("fastload.open") == 1


def test_a_list_that_has_grown_long(s3: Bucket, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.files.chunks._OBJECTS_MAX", 10)
    objects = [(s3.put(f"{number}", content(900, number)), content(900, number)) for number in range(35)]
    first = fastload.open(objects[0][0], cache)
    for url, data in objects:
        with fastload.open(url, cache) as file:
            assert file.read() == data
    assert first.read() == objects[0][1]
    first.close()
    del first, file
    gc.collect()
    until(lambda: [each["name"] for each in node(cache)["consumers"]].count("fastload.open") == 1)


def test_a_service_that_dies(s3: Bucket, served: fastload.Cache) -> None:
    data = content(6 * CHUNK_BYTES)
    urls = [s3.put(name, data) for name in ("one", "two", "three")]
    with fastload.open(urls[0], served) as one, fastload.open(urls[1], served) as two:
        assert one.read(100) == data[:100]
        kill_service(served.directory)
        assert two.read() == data
        with fastload.open(urls[2], served) as three:
            assert three.read() == data
        assert one.read() == data[100:]


def test_a_cache_that_is_closed(s3: Bucket, cache: fastload.Cache) -> None:
    data = content(3 * CHUNK_BYTES)
    url = s3.put("object", data)
    file = fastload.open(url, cache)
    cache.close()
    with pytest.raises(fastload.ServiceError, match="closed"):
        file.read()
    file.close()
    with fastload.open(url, cache) as file:
        assert file.read() == data


def test_a_handle_that_nobody_keeps(s3: Bucket, cache: fastload.Cache) -> None:
    url = s3.put("object", b"data")
    file = fastload.open(url, fastload.Cache(cache.directory))
    gc.collect()
    assert file.read() == b"data"
    del file
    gc.collect()  # and with it goes the connection, as the fixture sees


# Readers


def test_pictures(s3: Bucket, cache: fastload.Cache) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    encoded = io.BytesIO()
    PIL.Image.fromarray(pixels).save(encoded, "png")
    with fastload.open(s3.put("picture.png", encoded.getvalue()), cache) as file, PIL.Image.open(file) as picture:
        assert picture.size == (400, 300)
        assert np.array_equal(np.asarray(picture), pixels)


def test_archives(s3: Bucket, cache: fastload.Cache) -> None:
    packed = io.BytesIO()
    members = {f"member-{number}": content(30_000, number) for number in range(20)}
    with zipfile.ZipFile(packed, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with fastload.open(s3.put("archive.zip", packed.getvalue()), cache) as file, zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for name in random.Random(0).sample(sorted(members), len(members)):
            assert archive.read(name) == members[name]


def test_arrays(s3: Bucket, cache: fastload.Cache) -> None:
    array = np.random.default_rng(0).standard_normal((300, 200))
    plain, packed = io.BytesIO(), io.BytesIO()
    np.save(plain, array)
    np.savez(packed, one=array, two=array[:10])
    with fastload.open(s3.put("array.npy", plain.getvalue()), cache) as file:
        assert np.array_equal(np.load(file), array)
    with fastload.open(s3.put("arrays.npz", packed.getvalue()), cache) as file, np.load(file) as arrays:
        assert np.array_equal(arrays["two"], array[:10])
        assert np.array_equal(arrays["one"], array)


def test_tables(s3: Bucket, cache: fastload.Cache) -> None:
    table = pa.table({"number": np.arange(50_000), "fraction": np.random.default_rng(0).random(50_000)})
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written, row_group_size=10_000)
    with fastload.open(s3.put("table.parquet", written.getvalue()), cache) as file:
        parquet = pyarrow.parquet.ParquetFile(file)
        assert parquet.read_row_group(3, ["number"]).column(0).to_pylist() == list(range(30_000, 40_000))
        assert parquet.read() == table


# Against a model

SIZE = 5 * CHUNK_BYTES + 12_345
MODEL = content(SIZE, 7)
places = st.integers(0, SIZE + 10)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.one_of(st.just(-1), st.integers(0, 100), st.integers(0, SIZE))),
        st.tuples(st.just("readinto"), st.one_of(st.integers(0, 100), st.integers(0, 3 * CHUNK_BYTES))),
        st.tuples(st.just("read1"), st.integers(0, 3 * CHUNK_BYTES)),
        st.tuples(st.just("readline"), st.integers(0, 1000)),
        st.tuples(st.just("seek"), places),
        st.tuples(st.just("end"), st.integers(0, SIZE)),
        st.tuples(st.just("raw"), st.integers(0, 2 * CHUNK_BYTES)),
    ),
    max_size=30,
)


def apply(file: io.BufferedReader, raw: io.RawIOBase, model: io.BytesIO, name: str, value: int) -> None:
    match name:
        case "read":
            assert file.read(value) == model.read(value)
        case "read1":
            found = file.read1(value)
            assert found == model.read(len(found))
            assert bool(found) == (value > 0 and model.tell() - len(found) < SIZE)
        case "readline":
            assert file.readline(value) == model.readline(value)
        case "readinto":
            ours, theirs = bytearray(value), bytearray(value)
            assert file.readinto(ours) == model.readinto(theirs)
            assert ours == theirs
        case "seek":
            assert file.seek(value) == model.seek(value)
        case "end":
            assert file.seek(-value, os.SEEK_END) == model.seek(-value, os.SEEK_END)
        case "raw":
            position = model.tell()
            assert raw.seek(position) == position
            assert raw.readinto(out := bytearray(value)) == len(expected := MODEL[position : position + value])
            assert out[: len(expected)] == expected
            assert raw.tell() == position + len(expected)
    assert file.tell() == model.tell()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_it_reads_as_a_file_in_memory_does(
    s3: Bucket, cache: fastload.Cache, operations: list[tuple[str, int]]
) -> None:
    url = f"{s3.url}/model"
    try:
        file = fastload.open(url, cache)
    except fastload.ObjectMissingError:  # the first example
        file = fastload.open(s3.put("model", MODEL), cache)
    with file, fastload.open(url, cache) as other:
        model = io.BytesIO(MODEL)
        for name, value in operations:
            apply(file, other.raw, model, name, value)
