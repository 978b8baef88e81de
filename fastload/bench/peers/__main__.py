"""One loader in a process of its own: `python -m fastload.bench.peers`, as `process` has it.

The clock of an epoch starts with everything imported and, for a loader that has a service, with the service up; the
first one's covers building data set and loader.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastload.bench import measure
from fastload.bench.peers import module
from fastload.bench.peers.job import Answer, Batch, Job, Loader, Reading, Request
from fastload.bench.process import serve

_SETTLE_S = 1.0


def _answer(request: Request) -> Answer:
    answer = Answer()
    peer = module(request.peer)
    if request.job is None:
        importlib.import_module(request.peer)
        began = time.monotonic()
        peer.convert([Path(path) for path in request.shards], request.columns, Path(request.folder))
        answer.seconds = time.monotonic() - began
        return answer
    loader: Loader = peer.Loader(request.job)
    try:
        for number in request.epochs:
            answer.epochs.append(_read(loader, request.job, number))
    finally:
        loader.close()
    return answer


def _read(loader: Loader, job: Job, number: int) -> Reading:
    def pids() -> list[int]:
        return [os.getpid(), *loader.processes()]

    raw = [name for name in job.columns if name not in job.decode]
    keys, payload, first_s = [], 0, 0.0
    before = measure.cpu_s(pids())
    with measure.PeakMemory(pids) as memory:
        began = time.monotonic()
        for batch in loader.epoch(number):
            first_s = first_s or time.monotonic() - began
            keys.append(batch.keys)  # ours become strings when they are looked at, which nobody has to
            payload += _byte_count(batch, raw)
        seconds = time.monotonic() - began
        time.sleep(_SETTLE_S)  # what came is still being written to caches
    return Reading(
        seconds=seconds,
        first_batch_s=first_s,
        payload_bytes=payload if payload >= 0 else None,
        cpu_s=measure.cpu_s(pids()) - before,
        peak_memory_bytes=memory.peak_bytes,
        keys=[str(key) for some in keys for key in some],
        batch_sizes=[len(some) for some in keys],
    )


_UNKNOWN = -(1 << 62)


def _byte_count(batch: Batch, raw: list[str]) -> int:
    return sum(_column_bytes(batch.columns[name]) for name in raw)


def _column_bytes(column: Any) -> int:
    if hasattr(column, "offsets"):  # a `Ragged`
        return int(column.offsets[-1] - column.offsets[0])
    if isinstance(column, list) and all(isinstance(value, bytes | memoryview) for value in column):
        return sum(map(len, column))
    return _UNKNOWN


if __name__ == "__main__":
    sys.exit(serve(Request, _answer))
