"""The bytes of every file that outlives a process, in hex, and what is read from them.

Of a run's file the pieces are compared as they are once unpacked, since versions of zlib pack differently; `file` is
only read. Much of a sidecar is laid out by pyarrow: where a new version of it writes other bytes, what has to hold is
that the recorded ones are read.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastload
from tests.golden.doors import (
    Archive,
    ChunkKey,
    EndpointSummary,
    Manifest,
    ObjectInfo,
    Recorder,
    ShardIndex,
    SidecarWriter,
    indexer_for,
    object_id,
    object_key,
    read_blob,
    read_chunk,
    read_sidecar,
    write_blob,
    write_chunk,
)
from tests.golden.texts import with_texts_named
from tests.golden.world import data_set, world
from tests.shards import tar_of

INFOS = [
    ObjectInfo("s3://bucket/a.tar", 4096, '"e0"'),
    ObjectInfo("s3://bucket/b.tar", 10 << 20, None, 1_700_000_000_000_000_007),
    ObjectInfo("/data/ä.tar", 0, None, 5),
]
CHUNKS = {"empty": 0, "short": 11, "a page": 4096, "two blocks": 70_000}
CHUNK_KEY = ChunkKey(bytes(range(16)), 3)
CHUNK_BYTES_MAX = 128 << 10
BLOBS = {"empty": b"", "short": b"some bytes"}
LIMITS = {
    "ram_bytes": 16 << 20,
    "disk_bytes": 64 << 20,
    "chunk_bytes": 64 << 10,
    "disk_write_bytes_per_s": 5 << 20,
    "requests_in_flight": 12,
    "history_bytes": 3 << 20,
    "checkpoint_ram_bytes": 6 << 20,
    "checkpoint_disk_bytes": 7 << 20,
}
RUN_NAME = "20261126-120000-00000000"


def record(folder: Path) -> dict[str, Any]:
    """All files, in the form in which long texts have names."""
    return with_texts_named({kind: record_kind(folder / kind, kind) for kind in KINDS})


def record_kind(folder: Path, kind: str) -> dict[str, Any]:
    """Those of one kind."""
    folder.mkdir()
    return json.loads(json.dumps(KINDS[kind][0](folder)))


def read_kind(folder: Path, kind: str, recorded: dict[str, Any]) -> tuple[Any, Any]:
    """What is read from recorded files, and what should be."""
    folder.mkdir()
    return KINDS[kind][1](folder, recorded)


# Chunks and blobs


def _chunk(name: str) -> bytes:
    return bytes(i * 7 % 251 for i in range(CHUNKS[name]))


def _write_chunks(folder: Path) -> dict[str, str]:
    found = {}
    for name in CHUNKS:
        write_chunk(folder / name, CHUNK_KEY, memoryview(bytearray(_chunk(name))))
        found[name] = (folder / name).read_bytes().hex()
    return found


def _read_chunks(folder: Path, recorded: dict[str, str]) -> tuple[Any, Any]:
    found = {}
    for name, data in _files(folder, recorded):
        out = bytearray(CHUNK_BYTES_MAX)
        length = read_chunk(data, CHUNK_KEY, memoryview(out))
        found[name] = bytes(out[:length])
    return found, {name: _chunk(name) for name in CHUNKS}


def _write_blobs(folder: Path) -> dict[str, str]:
    found = {}
    for name, data in BLOBS.items():
        write_blob(folder / name, f"blob {name}", data)
        found[name] = (folder / name).read_bytes().hex()
    return found


def _read_blobs(folder: Path, recorded: dict[str, str]) -> tuple[Any, Any]:
    return {name: read_blob(path, f"blob {name}") for name, path in _files(folder, recorded)}, BLOBS


# Indexes


def _shards() -> Iterator[tuple[ObjectInfo, ShardIndex]]:
    for number in range(3):
        samples = {f"{number}/ä{sample}": {"jpg": b"x" * sample, "cls": b"1"} for sample in range(number)}
        tar = tar_of(samples)
        info = ObjectInfo(f"s3://bucket/{number}.tar", len(tar), None if number == 1 else f'"e{number}"', 1000 + number)
        indexer = indexer_for(info.url, info.size)
        while not indexer.done:
            start = indexer.next_offset
            indexer.feed(np.frombuffer(tar[start:], np.uint8), start)
        yield info, indexer.finish()


def _write_indexes(_: Path) -> dict[str, str]:
    return {info.url: index.to_bytes().hex() for info, index in _shards()}


def _read_indexes(_: Path, recorded: dict[str, str]) -> tuple[Any, Any]:
    shards = {info.url: (info, index) for info, index in _shards()}
    found = {
        url: ShardIndex.from_bytes(bytes.fromhex(data), url, shards[url][0].size) for url, data in recorded.items()
    }
    return found, {url: index for url, (_, index) in shards.items()}


def _write_sidecar(folder: Path) -> dict[str, str]:
    with SidecarWriter(folder / "x.arrow", batch_bytes=300) as writer:
        for info, index in _shards():
            writer.add(info, index)
        writer.close()
    return {"two batches": (folder / "x.arrow").read_bytes().hex()}


def _read_sidecar(_: Path, recorded: dict[str, str]) -> tuple[Any, Any]:
    data = bytes.fromhex(recorded["two batches"])

    def read_at(start: int, length: int) -> bytes:
        return data[start : start + length]

    summary = read_sidecar(read_at, len(data), "s3://bucket/x.arrow")
    found = [(summary.objects[row], summary.index(row, read_at)) for row in range(len(summary.objects))]
    return found, list(_shards())


# History


def _write_run(folder: Path) -> dict[str, Any]:
    recorder = Recorder("train.py", 1.8e9, 64 << 10)
    traces = [recorder.begin_trace("reader"), recorder.begin_trace("warm")]
    for second, (trace, number, chunk) in enumerate([(0, 0, 0), (1, 1, 0), (0, 1, 3), (0, 1, 3), (1, 2, 0)]):
        info = INFOS[number]
        recorder.read(traces[trace], object_key(info.url), info, chunk, second * 1.5)
    endpoints = {"http://localhost:8333": EndpointSummary(7, 1e6, 0.01, 2e5, 0, 3)}
    archive = Archive(folder)
    archive.append(RUN_NAME, recorder.take(6.0, endpoints).pieces())
    data = (folder / "history" / f"{RUN_NAME}.run").read_bytes()
    return {"magic": data[:8].hex(), "pieces": list(_pieces(data[8:])), "file": data.hex()}


def _pieces(data: bytes) -> Iterator[tuple[int, str]]:
    """Kind and payload of each."""
    while data:
        kind, length, _ = struct.unpack_from("<II16s", data)
        payload = data[24 : 24 + length]
        yield kind, (payload if kind == 3 else zlib.decompress(payload)).hex()
        data = data[24 + length :]


def _read_run(folder: Path, recorded: dict[str, Any]) -> tuple[Any, Any]:
    path = folder / "history" / f"{RUN_NAME}.run"
    path.parent.mkdir()
    path.write_bytes(bytes.fromhex(recorded["file"]))
    archive = Archive(folder)
    run = archive.read(archive.find("latest"))
    reads = [getattr(run.reads, name).tolist() for name in ("objects", "chunks", "traces", "ticks")]
    summary = run.summary
    found = [list(run.objects), run.keys.tolist(), reads, summary.program, summary.read_count, summary.traces]
    found += [list(summary.endpoints), summary.began, summary.seconds]
    expected_reads = [[0, 1, 1, 2], [0, 0, 3, 0], [0, 1, 0, 1], [0, 15, 30, 60]]
    expected = [INFOS, [object_key(info.url) for info in INFOS], expected_reads, "train.py", 4]
    return found, [*expected, {"reader": 1, "warm": 1}, ["http://localhost:8333"], 1.8e9, 6.0]


# What is JSON


def _write_limits(folder: Path) -> dict[str, str]:
    with fastload.Cache(folder / "cache", **LIMITS):
        return {"cache.json": (folder / "cache" / "cache.json").read_text()}


def _read_limits(folder: Path, recorded: dict[str, str]) -> tuple[Any, Any]:
    (folder / "cache").mkdir(mode=0o700)
    (folder / "cache" / "cache.json").write_text(recorded["cache.json"])
    names = ("ram_bytes", "disk_bytes", "chunk_bytes")
    with fastload.Cache(folder / "cache", **LIMITS):
        pass  # a warning, were any of these another
    with fastload.Cache(folder / "cache") as cache:
        return [getattr(cache, name) for name in names], [LIMITS[name] for name in names]


def _manifests() -> dict[str, Manifest]:
    return {
        "plain": Manifest(INFOS),
        "all": Manifest(INFOS, [1, 2], [0], promised=[3, -1, 0], sidecars=[INFOS[1]]),
        "empty": Manifest([]),
        "excluded": Manifest(INFOS, excluded={2: ["b/1", "a"], 0: ["é"]}),
    }


def _write_manifests(folder: Path) -> dict[str, str]:
    """As they are sent, and the files of users and of the cache directory."""
    found = {name: manifest.to_json().decode() for name, manifest in _manifests().items()}
    with world(folder) as cache:
        _read_once(data_set(cache, manifest=folder / "train.json"))
        _read_once(data_set(cache, manifest=folder / "grows.json", refresh="epoch"))
        _read_once(data_set(cache, refresh="epoch"))
    kept = folder / "cache" / "manifests"
    files = [folder / "train.json", folder / "grows.epoch-0.json", *sorted(kept.iterdir())]
    return found | {f"file {path.name}": path.read_text() for path in files}


def _read_manifests(folder: Path, recorded: dict[str, str]) -> tuple[Any, Any]:
    manifests = _manifests()
    found = [Manifest.from_json(recorded[name].encode(), name) for name in manifests]
    assert all(each.says_the_same_as(manifest) for each, manifest in zip(found, manifests.values(), strict=True))
    with world(folder) as cache:
        (folder / "train.json").write_text(recorded["file train.json"])
        keys = _read_once(data_set(cache, manifest=folder / "train.json"))
        return [found, keys], [list(manifests.values()), _read_once(data_set(cache))]


def _read_once(dataset: fastload.StreamingDataset) -> list[str]:
    with fastload.DataLoader(dataset, batch_size=8) as loader:
        return [key for batch in loader for key in batch["__key__"]]


# Names of files


def _write_names(_: Path) -> dict[str, Any]:
    ids = {info.url: object_id(info, 8 << 20, "http://a").hex() for info in INFOS}
    keys = [ChunkKey(bytes(range(16)), index) for index in (0, 3, 255, 1 << 40)]
    return {"object ids": ids, "chunks": [[key.fan_out, key.name] for key in keys]}


def _read_names(_: Path, recorded: dict[str, Any]) -> tuple[Any, Any]:
    found = [ChunkKey.from_name(name) for _, name in recorded["chunks"]]
    return [each and each.index for each in found], [0, 3, 255, 1 << 40]


def _files(folder: Path, recorded: dict[str, str]) -> Iterator[tuple[str, Path]]:
    for name, data in recorded.items():
        (folder / name).write_bytes(bytes.fromhex(data))
        yield name, folder / name


KINDS: dict[str, Any] = {
    "chunk": (_write_chunks, _read_chunks),
    "blob": (_write_blobs, _read_blobs),
    "index": (_write_indexes, _read_indexes),
    "sidecar": (_write_sidecar, _read_sidecar),
    "run": (_write_run, _read_run),
    "limits": (_write_limits, _read_limits),
    "manifest": (_write_manifests, _read_manifests),
    "names": (_write_names, _read_names),
}
