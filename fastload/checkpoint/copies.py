"""What this node has of a checkpoint: images that its service holds, files in the cache's directory, and memory into
which the service reads for all processes of the node.

A trainer that starts again reads the first two instead of the store; processes that load the same read it from there
once (`service.loading`). Nothing is trusted: each block is verified by the checksums of the part record, and what is
damaged is read from the next copy, or from the store.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from fastload.cache import syscalls
from fastload.cache.chunkfile import transfer
from fastload.cache.directory import opened
from fastload.checkpoint.records import Object, object_name
from fastload.client.cache import AnyCache, directory_of, handle_of
from fastload.client.loader import Loader
from fastload.client.operator import NotServedError, Operator, is_served
from fastload.errors import FastloadError
from fastload.plan.ranks import resolve_ranks
from fastload.store.urls import scheme

FOLDER = "checkpoints"
# What a node takes no longer to read than to ask a service for.
_SMALL_BYTES = 8 << 20
# From here on the start of a service is a tenth of the load, or less.
_STARTING_BYTES = 2 << 30
log = logging.getLogger("fastload.checkpoint")


class SharedMemory:
    """Objects that the service reads, in memory that other processes read as well. Thread-safe."""

    def __init__(self, loader: Loader) -> None:
        """The loader is closed with it."""
        self._loader = loader
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[int, Future[mmap.mmap]]] = {}  # by URL
        self._has_warned = False

    def ask(self, url: str, each: Object) -> None:
        """Ask for an object's memory, ahead of its use."""
        self._asked(url, each)

    def memory(self, url: str, each: Object) -> mmap.mmap | None:
        """That of the whole object, mapped privately: of what is in it, only what was `read` means anything. None where
        it cannot be had.
        """
        try:
            return self._asked(url, each)[1].result()
        except FastloadError as error:
            self._warn(url, error)
            return None

    def read(self, url: str, each: Object, start: int, end: int) -> memoryview | None:
        """Wait for these bytes in the memory of their object; None where they cannot be had."""
        memory = self.memory(url, each)
        if memory is None:
            return None
        try:
            self._loader.read(self._asked(url, each)[0], start, end)
        except FastloadError as error:
            self._warn(url, error)
            return None
        return memoryview(memory)[start:end]

    def close(self) -> None:
        """The memory stays as long as it is used."""
        self._loader.close()

    def _warn(self, url: str, error: FastloadError) -> None:
        """Once: what is wrong with one range is so with many."""
        if not self._has_warned:
            self._has_warned = True
            # As a text: the traceback of what a log keeps would keep the memory.
            log.warning("some of %s is read by this process alone: %s", url, str(error))

    def _asked(self, url: str, each: Object) -> tuple[int, Future[mmap.mmap]]:
        with self._lock:
            if url not in self._objects:
                version = None if each.info is None else (each.info.etag, each.info.mtime_ns)
                self._objects[url] = self._loader.load(url, each.size, version)
            return self._objects[url]


class Copies:
    """Those of some checkpoints' objects, until it is closed. Thread-safe."""

    def __init__(self, cache: AnyCache, storage_options: Mapping[str, Any] | None = None) -> None:
        """In a cache, which need not exist. `storage_options` are those by which the store is read."""
        self._cache, self._storage_options = cache, storage_options
        self._directory = directory_of(cache)
        self._shared: SharedMemory | None = None
        self._is_alone = False  # the service does not answer
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
        # What others have written is never saved by this node.
        return bool(each.sums) and self._found("/".join(each.name.split("/")[-2:]), each.size) != (None, None)

    def shared(self, folder: str, byte_count: int, *, in_place: bool = False) -> SharedMemory | None:
        """Memory that the processes of the node share, for a load of so many bytes; None where that would cost more
        than it saves, or no service can be had. `in_place`: they are used where they lie, and not copied.
        """
        with self._lock:
            if self._shared is None and not self._is_alone:
                try:
                    if self._is_worth_it(folder, byte_count, in_place):
                        loader = handle_of(self._cache).loader(self._storage_options, f"load {folder}")
                        self._shared = SharedMemory(loader)
                except FastloadError as error:
                    log.warning("%s is read by this process alone: %s", folder, error)
                    self._is_alone = True
            return self._shared

    def _is_worth_it(self, folder: str, byte_count: int, in_place: bool) -> bool:
        """A process that is alone pays 1.4 times the CPU time of reading by itself for what is copied from there (all
        of it goes through memory that is new, and through two processes), and no more for what is used in place. To
        start a service takes as long as to read 200 MB. Local files that are copied are in the page cache already.
        """
        processes = resolve_ranks().local_world_size
        has_others = processes > 1
        if processes * byte_count < _SMALL_BYTES or (not in_place and (not has_others or scheme(folder) == "file")):
            return False
        return has_others or byte_count >= _STARTING_BYTES or is_served(self._directory)

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
        if self._is_alone:
            return
        try:
            operator = Operator.connect(self._directory, "checkpoint")
        except FastloadError as error:
            self._is_alone = not isinstance(error, NotServedError)
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
            if self._shared is not None:
                self._shared.close()

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
