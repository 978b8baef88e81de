"""What runs beside the thread that wakes up: a loader whose batches are taken, and what that is compared with."""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.decode import MEAN, STD
from bench.interference.cases import image_shards, loader

PEERS = {"hash": "SHA-256", "pillow": "Pillow, image by image"}


class Load:
    """Does `work` again and again in a thread; counts how often."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.done = 0
        self._work, self._may, self._is_ended = work, threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._may.wait()
            if self._is_ended:
                return
            self._work()
            self.done += 1

    def go_on(self) -> None:
        """Work, and let it get going."""
        self._may.set()
        time.sleep(0.3)

    def pause(self) -> None:
        """No more work, and let what was begun end."""
        self._may.clear()
        time.sleep(0.7)

    def close(self) -> None:
        """End."""
        self._is_ended = True
        self._may.set()
        self._thread.join()


@contextmanager
def running(folder: Path, name: str, threads: int, per_s: float = math.inf) -> Iterator[Load]:
    """A load by the name of a case, at most so often a second, or one of `PEERS`."""
    work: Callable[[], object]
    with ExitStack() as stack:
        if name == "hash":
            work = hashing
        elif name == "pillow":
            work = pillow_decoding(folder)
        else:
            work = paced(taking(stack.enter_context(loader(folder, name, threads))), per_s)
        load = Load(work)
        stack.callback(load.close)
        yield load


def taking(loader: Any) -> Callable[[], object]:
    """Takes the next batch, epoch after epoch; what it reads is warm by then."""
    for _ in loader:
        pass

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()
    return lambda: next(batches)


def paced(work: Callable[[], object], per_s: float) -> Callable[[], object]:
    """`work`, at most so often a second."""
    due_s = time.monotonic()

    def next_one() -> None:
        nonlocal due_s
        now_s = time.monotonic()
        due_s = max(due_s + 1 / per_s, now_s)
        time.sleep(due_s - now_s)
        work()

    return work if per_s == math.inf else next_one


def hashing() -> None:
    """A core's work that hardly needs the GIL."""
    for _ in range(16):
        hashlib.sha256(_BLOCK).digest()


_BLOCK = bytes(1 << 20)


def pillow_decoding(folder: Path) -> Callable[[], None]:
    """A batch of images as threads of Python make it."""
    from PIL import Image

    with tarfile.open(image_shards(folder)[0]) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:256]
        files = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)

    def work() -> None:
        for file in files:
            picture = Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            np.ascontiguousarray(((np.asarray(picture, np.float32) / 255 - mean) / std).transpose(2, 0, 1))

    return work
