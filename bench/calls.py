"""How many calls of functions an epoch takes, of Python's and of C's: a figure that no neighbour changes much.

    python -m bench.calls '{"urls": [...], "decode": {"jpg": "image:224"}, "batch_size": 256, "folder": "/tmp/a"}'

prints one number for an epoch out of RAM: the calls of all threads of trainer and cache service, which runs in threads
of this process for that, divided by the batches. A profiler sees them, which makes everything slower, so rates say
nothing here.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from types import FrameType
from typing import Any

from fastload.bench.runs import decoders


class Calls:
    """Counts from `install` on, in this thread and in all that are started later."""

    def __init__(self) -> None:
        self._counter = itertools.count()  # which threads may share

    def install(self) -> None:
        """To be called before the threads are there that are to be counted."""
        step = self._counter.__next__

        def count(frame: FrameType, event: str, argument: Any) -> None:
            if event in ("call", "c_call"):
                step()

        threading.setprofile(count)
        sys.setprofile(count)

    def remove(self) -> None:
        """Threads that were started meanwhile go on counting."""
        threading.setprofile(None)
        sys.setprofile(None)

    def so_far(self) -> int:
        """Calls since `install`, and of this method."""
        return next(self._counter)


def calls_a_batch(urls: list[str], decode: dict[str, str], batch_size: int, folder: str) -> float:
    """Of the third epoch, when all that is done once is done."""
    import fastload

    cache = fastload.Cache(folder, ram_bytes="512MiB", disk_bytes=0, history_bytes=0, service="inprocess")
    calls = Calls()
    calls.install()
    try:
        dataset = fastload.StreamingDataset(urls, cache=cache, decode=decoders(decode), seed=0)
        loader = fastload.DataLoader(dataset, batch_size=batch_size, num_workers=2)
        batches = before = 0
        for epoch in range(3):
            loader.set_epoch(epoch)
            before, batches = calls.so_far(), sum(1 for _ in loader)
        counted = calls.so_far() - before
        loader.close()
    finally:
        calls.remove()
        cache.close()
    return counted / batches


if __name__ == "__main__":
    print(calls_a_batch(**json.loads(sys.argv[1])))
