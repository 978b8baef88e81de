"""What this node still has of a checkpoint: images that its service holds, and files in the cache's directory.

A trainer that starts again reads these instead of the store. Nothing is trusted: each block is verified by the
checksums of the part record, and what is damaged is read from the next copy, or from the store.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fastload.cache import syscalls
from fastload.cache.chunkfile import transfer
from fastload.cache.directory import opened
from fastload.checkpoint.records import Object, object_name
from fastload.client.operator import Operator
from fastload.errors import FastloadError

FOLDER = "checkpoints"
log = logging.getLogger("fastload.checkpoint")


class Copies:
    """Those of some checkpoints' objects, until it is closed. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        """In the cache at `directory`, which need not exist."""
        self._directory = directory
        self._lock = threading.Lock()
        self._operators: list[Operator] = []  # for as long as images are read
        self._asked: set[str] = set()  # attempts whose images were asked for
        self._images: dict[str, memoryview] = {}  # by name of the object
        self._files: dict[str, int | None] = {}  # descriptors

    def of(self, each: Object, start: int, end: int) -> Iterator[memoryview]:
        """These bytes of an object, from one copy after the other. What is given is the caller's own, and does not
        change after it was verified.
        """
        name = "/".join(each.name.split("/")[-2:])  # an earlier step's object lies under its own attempt
        image, file = self._found(name, each.size)
        if image is not None:
            yield memoryview(bytearray(image[start:end]))
        if file is not None:
            data = memoryview(bytearray(end - start))
            try:
                transfer(syscalls.preadv, file, (data,), "read", start)
            except OSError as error:
                log.warning("%s on disk cannot be read: %s", name, error)
            else:
                yield data

    def has(self, each: Object) -> bool:
        """Whether there is any."""
        return self._found("/".join(each.name.split("/")[-2:]), each.size) != (None, None)

    def _found(self, name: str, size: int) -> tuple[memoryview | None, int | None]:
        attempt = name.partition("/")[0]
        with self._lock:
            if attempt not in self._asked:
                self._asked.add(attempt)
                self._borrow(attempt)
            if name not in self._files:
                self._files[name] = self._open(name, size)
            image = self._images.get(name)
            return image if image is not None and len(image) == size else None, self._files[name]

    def _open(self, name: str, size: int) -> int | None:
        try:
            with opened(self._directory) as root:
                fd = syscalls.open(root / FOLDER / name.replace("/", "-"), os.O_RDONLY)
        except OSError:  # none, or it is not ours, or not to be read
            return None
        if syscalls.fstat(fd).st_size == size:
            return fd
        syscalls.close(fd)  # it is being written
        return None

    def _borrow(self, attempt: str) -> None:
        try:
            operator = Operator.connect(self._directory, "checkpoint")
        except FastloadError:  # none serves
            return
        self._operators.append(operator)
        try:
            for rank, segments, fd in operator.borrow(attempt):
                try:
                    self._map(attempt, rank, segments, fd)
                finally:
                    syscalls.close(fd)
        except FastloadError as error:
            log.info("no images of %s: %s", attempt, error)

    def _map(self, attempt: str, rank: int, segments: list[tuple[int, int]], fd: int) -> None:
        size = syscalls.fstat(fd).st_size
        view = memoryview(syscalls.mmap_shared(fd, size, writable=False))
        for number, (start, length) in enumerate(segments):
            if 0 <= start <= start + length <= size:
                self._images[object_name(attempt, rank, number)] = view[start : start + length]

    def close(self) -> None:
        """The images may be used again."""
        with self._lock:
            self._images.clear()
            for fd in self._files.values():
                if fd is not None:
                    syscalls.close(fd)
            self._files.clear()
            for operator in self._operators:
                operator.close()
            self._operators.clear()

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
