"""Runs for tests: lists of reads, as if they had been recorded and read again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastload.history.archive import Archive
from fastload.history.keys import object_key
from fastload.history.record import Recorder
from fastload.history.runfile import Run
from fastload.store.types import ObjectInfo

CHUNK_BYTES = 64 << 10


def info(number: int, chunks: int = 1) -> ObjectInfo:
    """An object."""
    return ObjectInfo(f"s3://bucket/{number:06d}", chunks * CHUNK_BYTES, f'"{number}"', -1)


def key(number: int) -> int:
    """Its key."""
    return object_key(info(number).url)


def record(reads: Iterable[tuple[int, int]], recorder: Recorder | None = None) -> Recorder:
    """A recorder that was told these reads, (trace, object number), a second apart."""
    recorder = recorder or Recorder("train.py", 1.8e9, CHUNK_BYTES)
    traces: dict[int, int] = {}
    for second, (trace, number) in enumerate(reads):
        if trace not in traces:
            traces[trace] = recorder.begin_trace("reader")
        recorder.read(traces[trace], key(number), info(number), 0, float(second))
    return recorder


def run(folder: Path, reads: Sequence[tuple[int, int]], name: str = "20261126-120000-00000000") -> Run:
    """What was kept of these reads."""
    archive = Archive(folder)
    archive.append(name, record(reads).take(float(len(reads)), {}).pieces())
    return archive.read(archive.find(name))
