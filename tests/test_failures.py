"""The table of failures: what goes wrong, which exception the user sees, and what its message contains.

Each row is a real situation, made with a real server, real files and real processes where they can produce it.
"""

from __future__ import annotations

import errno
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.cache import ChunkKey, DiskTier
from tests.cache.faults import failing
from tests.formats.side_indexes import dalis
from tests.processes import service_pids, until
from tests.shards import check_samples, corpus, samples_of, tar_of

LIMITS = {"ram_bytes": "1MiB", "disk_bytes": "16MiB", "chunk_bytes": "64KiB"}
GOOD = {"a/000": {"bin": b"0" * 100, "cls": b"0"}, "a/001": {"bin": b"1" * 100, "cls": b"1"}}


@dataclass
class Place:
    """What a situation is made of."""

    s3: Any
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch

    def load(self, url: str, *, limits: dict[str, Any] = LIMITS, directory: Path | None = None, **options: Any) -> None:
        """Do what a user does, until something is wrong."""
        with fastload.Cache(directory or self.tmp_path / "cache", **limits) as cache:
            dataset = fastload.StreamingDataset(url, cache=cache, **options)
            loader = fastload.DataLoader(dataset, batch_size=2, num_workers=1)
            try:
                for _ in loader:
                    pass
            finally:
                loader.close()


@dataclass(frozen=True)
class Failure:
    """A row of the table."""

    situation: Callable[[Place], None]
    error: type[fastload.FastloadError]
    contains: tuple[str, ...]


FAILURES: dict[str, Failure] = {}


def failure(error: type[fastload.FastloadError], *contains: str) -> Callable[[Callable[[Place], None]], None]:
    def add(situation: Callable[[Place], None]) -> None:
        FAILURES[situation.__name__] = Failure(situation, error, contains)

    return add


@failure(fastload.ObjectMissingError, "s3://no-such-bucket", "bucket")
def missing_bucket(place: Place) -> None:
    place.load("s3://no-such-bucket/x.tar")


@failure(fastload.ObjectMissingError, "/absent.tar")
def missing_object(place: Place) -> None:
    place.s3.put("present.tar", tar_of(GOOD))
    place.load(f"{place.s3.url}/absent.tar")


@failure(fastload.ObjectMissingError, "/nothing/", ".tar")
def empty_prefix(place: Place) -> None:
    place.load(f"{place.s3.url}/nothing/")


@failure(fastload.ObjectMissingError, "part-0002.tar")
def a_pattern_with_a_gap(place: Place) -> None:
    for number in (0, 1, 3):
        place.s3.put(f"part-{number:04d}.tar", tar_of(GOOD))
    place.load(f"{place.s3.url}/part-{{0000..0003}}.tar")


@failure(fastload.ObjectMissingError, "absent")
def missing_local_file(place: Place) -> None:
    place.load(str(place.tmp_path / "absent.tar"))


@failure(fastload.AccessDeniedError, "s3://test-")
def access_denied(place: Place) -> None:
    url = place.s3.put("x.tar", tar_of(GOOD))
    place.monkeypatch.setenv("AWS_ACCESS_KEY_ID", place.s3.server.denied_access_key_id)
    place.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", place.s3.server.denied_secret_access_key)
    place.load(url)


@failure(fastload.AccessDeniedError, "s3://test-")
def wrong_secret(place: Place) -> None:
    url = place.s3.put("x.tar", tar_of(GOOD))
    place.monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    place.load(url)


@failure(fastload.AccessDeniedError, "s3://test-")
def unknown_access_key(place: Place) -> None:
    url = place.s3.put("x.tar", tar_of(GOOD))
    place.load(url, storage_options={"access_key_id": "NOBODY", "secret_access_key": "x"})


@failure(fastload.StoreUnavailableError, "s3://test-", "127.0.0.1:9")
def unreachable_endpoint(place: Place) -> None:
    url = place.s3.put("x.tar", tar_of(GOOD))
    place.load(url, storage_options={"endpoint_url": "http://127.0.0.1:9", "deadline_s": 1})


@failure(fastload.ConfigError, "endpiont_url")
def misspelt_storage_option(place: Place) -> None:
    place.load(f"{place.s3.url}/x.tar", storage_options={"endpiont_url": "http://127.0.0.1:9"})


@failure(fastload.ShardError, "/cut.tar", "300")
def truncated_tar(place: Place) -> None:
    data = tar_of({"a/000": {"bin": b"0" * 5000}, "a/001": {"bin": b"1" * 300_000}})
    place.load(place.s3.put("cut.tar", data[:300_000]))


@failure(fastload.ShardError, "/empty.tar", "is empty")
def empty_file(place: Place) -> None:
    place.load(place.s3.put("empty.tar", b""))


@failure(fastload.ShardError, "/lies.tar")
def a_member_whose_length_lies(place: Place) -> None:
    data = bytearray(tar_of(GOOD))
    data[124:136] = b"77777777777\0"
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    place.load(place.s3.put("lies.tar", bytes(data)))


@failure(fastload.ShardError, "/noise.tar", "offset 0")
def not_a_tar(place: Place) -> None:
    place.load(place.s3.put("noise.tar", b"\x5a" * 100_000))


@failure(fastload.ShardError, "/twice.tar", "a/000", "cls")
def a_doubled_column(place: Place) -> None:
    one = tar_of({"a/000": {"cls": b"0"}})[:1024]
    place.load(place.s3.put("twice.tar", one + one + b"\0" * 1024))


@failure(fastload.ShardError, "/x.tar.gz", "cannot be unpacked as gzip", "of 102", "upload it again")
def compressed_tar(place: Place) -> None:
    place.load(place.s3.put("x.tar.gz", b"\x1f\x8b" + b"0" * 100))


@failure(fastload.MissingColumnError, "/x.tar", "a/001", "jpg")
def missing_column(place: Place) -> None:
    samples = {"a/000": {"jpg": b"0", "cls": b"0"}, "a/001": {"cls": b"1"}}
    place.load(place.s3.put("x.tar", tar_of(samples)))


@failure(fastload.DecodeError, "/x.tar", "a/001", "jpg")
def corrupt_jpeg(place: Place) -> None:
    import numpy as np
    import simplejpeg

    jpeg = simplejpeg.encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    samples = {"a/000": {"jpg": jpeg}, "a/001": {"jpg": b"\xff\xd8" + b"nonsense" * 10}}
    place.load(place.s3.put("x.tar", tar_of(samples)), decode={"jpg": fastload.decode.image(size=32)})


@failure(fastload.DecodeError, "/x.tar", "a/001", "cls", "12.5")
def not_an_integer(place: Place) -> None:
    samples = {"a/000": {"cls": b"1"}, "a/001": {"cls": b"12.5"}}
    place.load(place.s3.put("x.tar", tar_of(samples)), decode={"cls": fastload.decode.integer()})


@failure(fastload.CacheError, "/cache", "written by others", "chmod 700")
def cache_directory_open_to_others(place: Place) -> None:
    (place.tmp_path / "cache").mkdir()
    (place.tmp_path / "cache").chmod(0o777)
    place.load(place.s3.put("x.tar", tar_of(GOOD)))


@failure(fastload.CacheError, "/file")
def cache_directory_is_a_file(place: Place) -> None:
    (place.tmp_path / "file").write_text("")
    place.load(place.s3.put("x.tar", tar_of(GOOD)), directory=place.tmp_path / "file")


@failure(fastload.ConfigError, "ram_bytes=100000", "131072")
def arena_below_two_chunks(place: Place) -> None:
    place.load(place.s3.put("x.tar", tar_of(GOOD)), limits={**LIMITS, "ram_bytes": 100_000})


@failure(fastload.ConfigError, "disk_bytes=5000", "73728")
def quota_below_one_chunk(place: Place) -> None:
    place.load(place.s3.put("x.tar", tar_of(GOOD)), limits={**LIMITS, "disk_bytes": 5000})


@failure(fastload.ConfigError, "ram_bytes='lots'")
def a_size_that_is_none(place: Place) -> None:
    place.load("s3://x/y.tar", limits={**LIMITS, "ram_bytes": "lots"})


@failure(fastload.ObjectChangedError, "/x.tar")
def object_changed_since_listing(place: Place) -> None:
    data = corpus(shard_count=1, samples_per_shard=30)
    (shard,) = data.shards.values()
    url = place.s3.put("x.tar", shard)
    with fastload.Cache(place.tmp_path / "cache", **LIMITS) as cache:
        dataset = fastload.StreamingDataset(url, cache=cache)
        with pytest.raises(TypeError):
            len(dataset)  # lists
        place.s3.put("x.tar", shard[:-1024] + b"\0" * 2048)
        try:
            list(dataset)
        finally:
            dataset.close()


@failure(fastload.ConfigError, "has splits: 'train', 'val'", "split='train'")
def splits_of_which_none_is_named(place: Place) -> None:
    for split in ("train", "val"):
        place.s3.put(f"data/{split}/0.tar", tar_of(GOOD))
    place.load(f"{place.s3.url}/data/")


@failure(fastload.ConfigError, "has no split 'test'", "there are 'train'")
def a_split_that_is_not_there(place: Place) -> None:
    place.s3.put("data/train/0.tar", tar_of(GOOD))
    place.load(f"{place.s3.url}/data/", split="test")


@failure(fastload.ConfigError, "split.yaml names shards/1.tar", "which is no shard under")
def a_split_file_that_names_a_shard_which_is_not_there(place: Place) -> None:
    place.s3.put("data/shards/0.tar", tar_of(GOOD))
    place.s3.put("data/.nv-meta/split.yaml", b"split_parts: {train: ['shards/{0,1}.tar']}")
    place.load(f"{place.s3.url}/data/", split="train")


@failure(fastload.ShardError, "/0.idx is no index of", "/0.tar", "write it again, or remove it")
def an_index_of_another_tool_that_lies(place: Place) -> None:
    data = tar_of(GOOD)
    place.s3.put("data/0.tar", data)
    place.s3.put("data/0.idx", dalis(data).replace(b"a/001", b"a/007"))
    place.load(f"{place.s3.url}/data/")


WRITTEN = Path(__file__).parent / "formats" / "written"


def put_written(
    place: Place,
    name: str,
    shard: str = "",
    change: Callable[[bytes], bytes] = bytes,
    about: Callable[[Any], None] = lambda index: None,
) -> str:
    """The URL of what a format's own writer wrote, where a shard was changed, and what the index says. It says the
    shard's new size.
    """
    index = json.loads((WRITTEN / name / "index.json").read_bytes())
    for path in (WRITTEN / name).iterdir():
        data = change(path.read_bytes()) if path.name == shard else path.read_bytes()
        for listed in index.get("chunks", []):
            if listed["filename"] == path.name and ".zstd" not in path.name:
                listed["chunk_bytes"] = len(data)
        for files in index.get("shards", []):
            for listed in (files["raw_data"], files["zip_data"]):
                if listed is not None and listed["basename"] == path.name:
                    listed["bytes"] = len(data)
        if path.name != "index.json":
            place.s3.put(f"data/{path.name}", data)
    about(index)
    place.s3.put("data/index.json", json.dumps(index).encode())
    return f"{place.s3.url}/data/"


@failure(fastload.ShardError, "chunk-0-1.bin cannot be unpacked as ldfz", "it was cut short")
def a_chunk_in_frames_that_was_cut(place: Place) -> None:
    place.load(put_written(place, "litdata_frames", "chunk-0-1.bin", lambda data: data[:-9]))


@failure(fastload.ShardError, "chunk-0-1.bin is no chunk that is packed in frames", "it has version 9, and 1 is known")
def a_chunk_in_frames_of_another_version(place: Place) -> None:
    place.load(put_written(place, "litdata_frames", "chunk-0-1.bin", lambda data: data[:8] + b"\x09" + data[9:]))


@failure(fastload.ShardError, "chunk-0-1.bin cannot be unpacked as ldfz", "frame 0")
def a_chunk_whose_frames_lie(place: Place) -> None:
    at = 24 + 4 * 9  # of eight items
    place.load(put_written(place, "litdata_frames", "chunk-0-1.bin", lambda data: data[:at] + b"\x01" + data[at + 1 :]))


@failure(fastload.ShardError, "chunk-0-1.zstd:4.bin cannot be unpacked as zstd", "pack and upload it again")
def a_packed_chunk_that_was_cut(place: Place) -> None:
    place.load(put_written(place, "litdata_whole", "chunk-0-1.zstd:4.bin", lambda data: data[:-9]))


@failure(fastload.ShardError, "chunk-0-1.zstd:4.bin has", "bytes unpacked, and the list of shards says 77")
def a_packed_chunk_whose_size_lies(place: Place) -> None:
    def about(index: Any) -> None:
        index["chunks"][1]["chunk_bytes"] = 77

    place.load(put_written(place, "litdata_whole", about=about))


@failure(fastload.ConfigError, "data/index.json: its chunks are compressed by lz4", "or without")
def a_codec_of_litdata_that_is_not_known(place: Place) -> None:
    place.load(put_written(place, "litdata", about=lambda index: index["config"].update(compression="lz4")))


@failure(fastload.ConfigError, "data/index.json: its chunks are encrypted", "write them without")
def chunks_that_are_encrypted(place: Place) -> None:
    place.load(
        put_written(place, "litdata", about=lambda index: index["config"].update(encryption={"algorithm": "fernet"}))
    )


@failure(fastload.ConfigError, "data/index.json: its chunks hold tokens", 'format="tokens(BLOCK_SIZE')
def chunks_of_tokens_without_a_block_size(place: Place) -> None:
    place.load(put_written(place, "litdata_tokens"))


@failure(fastload.ShardError, "chunk-0-1.bin has", "9999 int32 lie in it: it was cut short; upload it again")
def chunks_of_tokens_whose_count_lies(place: Place) -> None:
    def about(index: Any) -> None:
        index["chunks"][1]["dim"] = 9999

    place.load(put_written(place, "litdata_tokens", about=about), format=fastload.formats.tokens(16, overlap=0))


@failure(fastload.ShardError, "shard.00000.csv: its xxh3_64 is", "and the index beside it says", "upload both again")
def a_shard_whose_digest_is_wrong(place: Place) -> None:
    place.load(put_written(place, "mds_csv", "shard.00000.csv", lambda data: data.replace(b"21|", b"22|")))


@failure(fastload.ShardError, "shard.00000.xsv has", "and its last line ends at", "it was cut short")
def a_shard_of_lines_that_was_cut(place: Place) -> None:
    place.load(put_written(place, "mds_xsv", "shard.00000.xsv", lambda data: data[:-5]))


@failure(fastload.ShardError, "shard.00000.xsv holds 24 samples", "says 25")
def a_shard_of_lines_whose_count_lies(place: Place) -> None:
    def about(index: Any) -> None:
        index["shards"][0]["samples"] = 25

    place.load(put_written(place, "mds_xsv", about=about))


@failure(fastload.ConfigError, "data/index.json names hologram shards", "write them as MDS")
def shards_of_a_format_that_is_not_known(place: Place) -> None:
    def about(index: Any) -> None:
        index["shards"][0]["format"] = "hologram"

    place.load(put_written(place, "mds_xsv", about=about))


@pytest.mark.parametrize("name", FAILURES)
def test_failure(name: str, s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = FAILURES[name]
    with pytest.raises(fastload.FastloadError) as caught:
        row.situation(Place(s3, tmp_path, monkeypatch))
    assert type(caught.value) is row.error, caught.value
    message = str(caught.value)
    for part in row.contains:
        assert part in message, message
    assert s3.server.secret_access_key not in message


def load_all(url: str, cache: fastload.Cache) -> list[str]:
    loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), batch_size=8, num_workers=1)
    try:
        return [key for batch in loader for key in batch["__key__"]]
    finally:
        loader.close()


def test_a_damaged_chunk_is_fetched_again(s3, tmp_path: Path) -> None:
    data = corpus()
    url = data.put(s3)
    directory = tmp_path / "cache"
    with fastload.Cache(directory, **LIMITS) as cache:
        assert load_all(url, cache) == list(data.samples)
    until(lambda: not service_pids(directory))  # whose arena is not damaged
    chunks = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size > 60_000)
    for path in chunks[::2]:
        damaged = bytearray(path.read_bytes())
        damaged[20_000] ^= 1
        path.write_bytes(damaged)
    with fastload.Cache(directory, **LIMITS) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), batch_size=8, num_workers=1)
        keys = [key for batch in loader for key in check_samples(data, samples_of(batch))]
        assert keys == list(data.samples)
        assert loader.stats()["remote_bytes"] > 0
        loader.close()


def test_a_job_goes_on_without_room_on_disk(s3, tmp_path: Path) -> None:
    """The quota is below the data: what does not fit is fetched in each epoch, and nothing is wrong."""
    data = corpus()
    limits = {"ram_bytes": "256KiB", "disk_bytes": "256KiB", "chunk_bytes": "64KiB"}
    with fastload.Cache(tmp_path / "cache", **limits) as cache:
        url = data.put(s3)
        for _ in range(2):
            assert load_all(url, cache) == list(data.samples)


def load_here(url: str, directory: Path, **limits: Any) -> list[str]:
    """Read everything with the service in this process, where its system calls can be made to fail."""
    with fastload.Cache(directory, service="inprocess", **{**LIMITS, **limits}) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), batch_size=8, num_workers=1)
        try:
            return check_samples(corpus(), [sample for batch in loader for sample in samples_of(batch)])
        finally:
            loader.close()


def test_a_disk_that_is_behind_is_waited_for(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five times the arena each byte is fetched once, and then none."""
    data = corpus(shard_count=8, samples_per_shard=16, value_bytes=20_000)
    url = data.put(s3)
    write = DiskTier.write
    limits = {"ram_bytes": "512KiB", "disk_bytes": "16MiB", "chunk_bytes": "64KiB"}

    def write_slowly(tier: DiskTier, key: ChunkKey, buffer: memoryview, length: int) -> bool:
        time.sleep(0.12)
        return write(tier, key, buffer, length)

    monkeypatch.setattr(DiskTier, "write", write_slowly)
    with fastload.Cache(tmp_path / "cache", service="inprocess", **limits) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache), batch_size=8, num_workers=2)
        for _ in range(2):
            for batch in loader:
                check_samples(data, samples_of(batch))
            figures = loader.stats()["node"]
            assert (figures["fetched_bytes"], figures["dropped_unwritten"]) == (data.byte_count, 0)
            assert figures["dropped_chunks"] > 8
        loader.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_one_warning(s3, tmp_path: Path, number: int) -> None:
    data = corpus()
    fastload.Cache(tmp_path / "cache", **LIMITS)  # whose settings are written while there is room
    with (
        failing(0, number, only=frozenset({"pwritev"}), times=1 << 30),
        pytest.warns(RuntimeWarning, match="cache") as caught,
    ):
        assert load_here(data.put(s3), tmp_path / "cache") == list(data.samples)
    messages = {str(warning.message) for warning in caught}
    assert len(messages) == len(caught.list) == 1
    assert os.strerror(number) in messages.pop()


def test_a_disk_that_cannot_be_read_is_fetched_around(s3, tmp_path: Path) -> None:
    data = corpus()
    url = data.put(s3)
    assert load_here(url, tmp_path / "cache") == list(data.samples)
    with (
        failing(0, errno.EIO, only=frozenset({"preadv"}), times=1 << 30),
        pytest.warns(RuntimeWarning, match="cache"),
    ):
        assert load_here(url, tmp_path / "cache") == list(data.samples)


@pytest.mark.parametrize(
    ("only", "number"), [("mkdir", errno.EACCES), ("mkdir", errno.EROFS), ("open_directory", errno.EACCES)]
)
def test_a_cache_directory_that_cannot_be_used(tmp_path: Path, only: str, number: int) -> None:
    with failing(0, number, only=frozenset({only})), pytest.raises(fastload.CacheError) as caught:
        fastload.Cache(tmp_path / "cache", **LIMITS)
    assert str(tmp_path / "cache") in str(caught.value)
    assert os.strerror(number) in str(caught.value)
