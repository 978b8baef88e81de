"""The bytes of pieces, out of a store: exactly the ranges that are needed, verified, many in flight.

Ranges are made wider to the blocks that have a checksum, joined where what lies between costs less than a request of
its own, and cut so that several connections share a large one. A block that is not what was written is read once more,
since it may have been damaged on its way. What others have written has no checksums.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from fastload.checkpoint.records import Object, url_of
from fastload.checkpoint.segments import BLOCK_BYTES, blocks_of, damaged_block
from fastload.errors import CheckpointDamagedError, ObjectMissingError
from fastload.store.types import ObjectInfo, Store

_log = logging.getLogger("fastload.checkpoint")

READ_BYTES = 8 << 20
# What passes in the time that a request takes to be answered: 20 ms at 100 MB/s, a connection's rate at a busy store.
GAP_BYTES = 2 << 20
_IN_FLIGHT = 16


@dataclass(slots=True)
class Wanted:
    """Bytes of an object from `start` on, and where they go; `arrived` is called once all are there, by any thread.

    `is_shared`: `out` is the place of these bytes in the memory of `Shared`, so that they come by themselves.
    """

    object: Object
    start: int
    out: memoryview
    arrived: Callable[[], None]
    is_shared: bool = False
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        self.missing = len(self.out)

    @property
    def end(self) -> int:
        return self.start + len(self.out)


@dataclass(frozen=True, slots=True)
class Range:
    """One request: these bytes of an object, and what is wanted of them."""

    object: Object
    start: int
    end: int
    wanted: tuple[Wanted, ...]


def ranges(
    wanted: Iterable[Wanted], gap_bytes: int = GAP_BYTES, read_bytes: int = READ_BYTES, *, in_blocks: bool = False
) -> Iterator[Range]:
    """What to request, object by object and in order of the bytes. `in_blocks`: whole blocks also of what has no
    checksums.
    """
    group: list[Wanted] = []
    start = end = 0
    for each in sorted((each for each in wanted if len(each.out)), key=lambda each: (each.object.name, each.start)):
        first, last = each.start, each.end
        if each.object.sums or in_blocks:
            first, last = blocks_of(first, last, each.object.size)
        if group and (group[0].object.name != each.object.name or first > end + gap_bytes):
            yield from _cut(group, start, end, read_bytes)
            group = []
        start, end = (start, max(end, last)) if group else (first, last)
        group.append(each)
    if group:
        yield from _cut(group, start, end, read_bytes)


def _cut(group: Sequence[Wanted], start: int, end: int, read_bytes: int) -> Iterator[Range]:
    assert read_bytes % BLOCK_BYTES == 0
    at = 0  # what ends before is complete; starts are in order, and ends nearly so
    for first in range(start, end, read_bytes):
        last = min(first + read_bytes, end)
        while at < len(group) and group[at].end <= first:
            at += 1
        inside = []
        for each in group[at:]:
            if each.start >= last:
                break
            if each.end > first:
                inside.append(each)
        if inside:
            yield Range(group[0].object, first, last, tuple(inside))


class Shared(Protocol):
    """Memory that the processes of this node share, into which its service reads objects, each byte once."""

    def ask(self, url: str, each: Object) -> None:
        """Ask for an object's memory, ahead of its use."""
        ...

    def read(self, url: str, each: Object, start: int, end: int) -> memoryview | None:
        """Wait for these bytes, which may be damaged; None where they cannot be had."""
        ...


class Copies(Protocol):
    """What is nearer than the store, of some objects. Thread-safe."""

    def has(self, each: Object) -> bool:
        """Whether there may be any."""
        ...

    def of(self, each: Object, start: int, end: int) -> Iterator[memoryview]:
        """These bytes of an object, which may be damaged, from one copy after the other."""
        ...

    def shared(self, folder: str, byte_count: int) -> Shared | None:
        """What other processes may read as well, for a load of so many bytes from this folder; None: not worth it."""
        ...


def read(store: Store, folder: str, wanted: Sequence[Wanted], copies: Copies | None = None) -> None:
    """Fill all of them. The first error ends it."""
    with requests(store, folder, copies, sum(len(each.out) for each in wanted)) as begin:
        for request in begin(wanted):
            request.result()


@contextlib.contextmanager
def requests(
    store: Store, folder: str, copies: Copies | None = None, byte_count: int = 0
) -> Iterator[Callable[[Sequence[Wanted]], list[Future[None]]]]:
    """A function that begins to fill what is wanted, by requests each of which is a future. Those that have not begun
    when the block ends are given up. `byte_count`: of all that will be wanted.
    """
    shared = copies.shared(folder, byte_count) if copies is not None else None
    infos: dict[str, Future[ObjectInfo]] = {}
    lock, asking = threading.Lock(), threading.Lock()

    def fetch(part: Range) -> None:
        data = _from_copies(copies, part)
        by_itself = False
        if data is None and shared is not None:
            data = _from_shared(shared, url_of(folder, part.object.name), part)
            by_itself = data is not None
        if data is None:
            # It was submitted before this, so that a thread has it, or had; or no copy was good.
            info = infos.get(part.object.name)
            data = _verified(store, info.result() if info is not None else ask(part.object), part)
        for each in part.wanted:
            first, last = max(each.start, part.start), min(each.end, part.end)
            if not (each.is_shared and by_itself):
                each.out[first - each.start : last - each.start] = data[first - part.start : last - part.start]
            with lock:
                each.missing -= last - first
                is_complete = each.missing == 0
            if is_complete:
                each.arrived()

    def ask(each: Object) -> ObjectInfo:
        with asking:
            if each.name not in infos:
                answer = Future[ObjectInfo]()
                answer.set_result(_info(store, folder, each))
                infos[each.name] = answer
        return infos[each.name].result()

    def begin(wanted: Sequence[Wanted]) -> list[Future[None]]:
        for each in wanted:
            if not len(each.out):
                each.arrived()
            elif copies is not None and copies.has(each.object):
                continue
            elif shared is not None:
                shared.ask(url_of(folder, each.object.name), each.object)
            elif each.object.name not in infos:
                infos[each.object.name] = pool.submit(_info, store, folder, each.object)
        return [pool.submit(fetch, part) for part in ranges(wanted, in_blocks=shared is not None)]

    with ThreadPoolExecutor(_IN_FLIGHT, "fastload-checkpoint") as pool:
        try:
            yield begin
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _from_copies(copies: Copies | None, part: Range) -> memoryview | None:
    if copies is None or not part.object.sums:
        return None
    return next((data for data in copies.of(part.object, part.start, part.end) if _is_whole(part, data)), None)


def _from_shared(shared: Shared, url: str, part: Range) -> memoryview | None:
    data = shared.read(url, part.object, part.start, part.end)
    return data if data is not None and _is_whole(part, data) else None


def _is_whole(part: Range, data: memoryview) -> bool:
    """Whether it is what was written, as far as that is known."""
    number = damaged_block(part.object.sums, part.start, data) if part.object.sums else None
    if number is None:
        return True
    _log.warning(
        "a copy of %s on this node is damaged: the %d bytes from %d on are not what was written; it is not used",
        part.object.name,
        BLOCK_BYTES,
        number * BLOCK_BYTES,
    )
    return False


def _info(store: Store, folder: str, each: Object) -> ObjectInfo:
    if each.info is not None:
        return each.info
    try:
        info = store.head(url_of(folder, each.name))
    except ObjectMissingError as error:
        raise CheckpointDamagedError(f"{folder} is damaged: {error}; take another step") from error
    if info.size != each.size:
        raise CheckpointDamagedError(
            f"{info.url} is damaged: it has {info.size} of {each.size} bytes; take another step"
        )
    return info


def _verified(store: Store, info: ObjectInfo, part: Range) -> memoryview:
    data = memoryview(bytearray(part.end - part.start))
    for attempt in range(2):
        store.read_into(info, part.start, data)
        number = damaged_block(part.object.sums, part.start, data) if part.object.sums else None
        if number is None:
            break
        if attempt:
            raise CheckpointDamagedError(
                f"{info.url} is damaged: the {BLOCK_BYTES} bytes from {number * BLOCK_BYTES} on are not what was "
                "written; take another step"
            )
    return data
