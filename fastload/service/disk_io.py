"""I/O with the disk tier: chunks are written behind and evicted, and calls that hang are given up.

*Writing behind* (`WriteBehind`). Fetched chunks go from the arena to disk while consumers already read them. A chunk
keeps its buffer until it is written, so that each byte is fetched once where the disk has room: where writes are
behind, fetches wait for them. That ends where the disk is slow, which is where a write takes longer than `QUICK_S`:
then a demanded chunk takes the buffer of a write that has not begun (`cancel`), and so do chunks that are fetched
ahead, as long as more than a share of the arena waits to be written. That costs the cache some chunks, which the next
epoch fetches again, but it leaves training its buffers. Writes may have a limit in bytes a second: a chunk above it is
not cached on disk this time, and warming waits.

*Evicting* (`DiskEvictor`). All chunks that leave the disk leave here: for another chunk, for an index, for a smaller
quota, or because the cache is cleared. `eviction` decides which.

*A disk that does not answer* (`DiskWatch`), such as a dead NFS server or a drive that fails, may hold a call for good.
Nothing can end such a call, and it keeps its thread and its buffer. So the calls go through pools whose tasks are
watched. When one has run for longer than the deadline, the disk *stalls*: the tier is bypassed (`DiskTier.stalled`),
and every call under way is given up, each in its own way (`Task.hung`). A chunk that was being read is fetched from the
store into another buffer. A chunk that was being written stays readable, and its buffer cannot be used for anything
else. When the last of those calls has returned, the disk, its threads and the buffers are used as before. The deadline
counts from when a thread began with the task, so that many quick ones in a row are no stall. Tasks have to be small for
that: a chunk, or a few indexes.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fastload.cache import ChunkKey
from fastload.service.deciding.eviction import write_queue_max, write_threads
from fastload.service.fetching.rate_budget import RateBudget
from fastload.service.host.threads import Done, Pool, Task
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk

# A disk under load answers within a second or two, a drive that retries a bad spot within ten.
DISK_DEADLINE_S = 20.0
# A write that takes no longer is worth waiting for if its buffer is needed. 8 MiB take 6 ms on a good disk, and now and
# then more than a second on one that others use as well. So a disk is waited for that writes 8 MB/s in two threads;
# a slower one holds up a demanded chunk for so long, once.
QUICK_S = 2.0
# Writes of one chunk, each of which found less room than its victims were to leave, or than another one had made for
# itself just then.
_TRIES_MAX = 4
# What a limit of writes leaves unused may be used later, up to so many seconds of it.
_SAVED_S = 10.0


class DiskEvictor:
    """Removes chunks from the disk tier, in two steps: `remove` in a thread, then `settle` in the loop."""

    def __init__(self, shared: SharedState) -> None:
        self._disk, self.order = shared.disk, shared.disk_order

    def remove(self, victims: Iterable[ChunkKey], enough: Callable[[], bool] = lambda: False) -> None:
        """Remove these in turn, in a thread, while there is not `enough` room."""
        for key in victims:
            if enough():
                return
            self._disk.remove(key)

    def settle(self, victims: Iterable[ChunkKey], *, already_discarded: bool = False) -> int:
        """Have the order name what the disk holds of these; how many have gone. `already_discarded`: the order
        has counted them as gone since they were chosen, and names again what could not be removed.
        """
        gone = 0
        for key in victims:
            if not self._disk.contains(key):
                gone += 1
                self.order.discard(key)
            elif already_discarded:
                self.order.add(key)
        return gone


class WriteBehind:
    """Used by the loop's thread only, except for `_evict_and_write`."""

    def __init__(self, resources: Resources, shared: SharedState, watch: DiskWatch, evictor: DiskEvictor) -> None:
        self._arena, self._disk = resources.arena, resources.disk
        self._now, self._is_lost = resources.now, resources.is_lost
        self._table, self._order, self._admission = shared.table, shared.disk_order, shared.admission
        self._events, self._evictor = resources.events, evictor
        self._queue: dict[Chunk, None] = {}
        self._queued_bytes = 0  # of these
        self._pool = watch.pool("disk-write", write_threads(resources.arena.buffer_count))
        self._queue_max = write_queue_max(resources.arena.buffer_count)
        self._running: dict[Chunk, float] = {}  # when each began
        self._was_slow = False  # the last write that ended
        self._tries: dict[Chunk, int] = {}  # of those that are tried again
        self._budget = RateBudget(0, self._now(), _SAVED_S)
        self.counters: Counter[str] = Counter(
            written_chunks=0,
            written_bytes=0,
            writes_refused=0,
            writes_skipped=0,
            writes_over_budget=0,
            writes_given_up=0,
            writes_hung=0,
            evicted=0,
        )
        self.limit(resources.limits.disk_write_bytes_per_s)
        resources.events.disk_stalled.connect(self.cancel_all)

    def quick_for_s(self) -> float:
        """For how many seconds the writes under way may yet be called quick; 0 where the disk is slow, or none runs."""
        oldest = min(self._running.values(), default=-math.inf)
        return 0.0 if self._was_slow else max(0.0, oldest + QUICK_S - self._now())

    @property
    def full(self) -> bool:
        """Whether the disk takes no further chunk: switched off, failed, or filled with what live plans name."""
        whole = self._disk.file_bytes(self._arena.chunk_bytes)
        return not self._disk.writable or not (self._has_free_room(whole) or self._admission.has_spare)

    @property
    def full_of_pinned(self) -> bool:
        """Whether it does not take a pinned chunk either."""
        whole = self._disk.file_bytes(self._arena.chunk_bytes)
        return not self._disk.writable or not (self._has_free_room(whole) or self._admission.may_evict_for_pinned())

    def admit(self, chunk: Chunk, *, patient: bool) -> bool:
        """Queue the chunk's write; False where it will not be written. `patient`: also if more was written than should
        be.
        """
        if not self._has_room(chunk):
            self.counters["writes_refused"] += self._disk.quota_bytes > 0
            return False
        if not self._budget.take(self._disk.file_bytes(chunk.length), self._now(), on_credit=patient):
            self.counters["writes_over_budget"] += 1
            return False
        self._enqueue(chunk)
        self.pump()
        return True

    def _has_room(self, chunk: Chunk) -> bool:
        if not self._disk.writable:
            return False
        return self._has_free_room(self._disk.file_bytes(chunk.length)) or self._admission.may_evict_for(chunk)

    def _has_free_room(self, need: int) -> bool:
        return self._disk.writable and self._disk.free_bytes - self._queued_bytes >= need

    def _enqueue(self, chunk: Chunk) -> None:
        chunk.queue_write()
        self._queue[chunk] = None
        self._queued_bytes += self._disk.file_bytes(chunk.length)

    def _dequeue(self, chunk: Chunk) -> None:
        del self._queue[chunk]
        self._queued_bytes -= self._disk.file_bytes(chunk.length)

    def limit(self, bytes_per_s: int) -> None:
        """Write so much on average from now on; 0: whatever comes."""
        self._budget.change(bytes_per_s, self._now())

    def wait_s(self) -> float:
        """In how many seconds the limit lets the next chunk through."""
        return self._budget.wait_s(self._now())

    @property
    def excess(self) -> int:
        """How many more writes are queued than should be where the disk is slow."""
        return max(0, len(self._queue) - self._queue_max)

    def cancel(self, chunk: Chunk) -> None:
        """The chunk's write has not begun, and shall not."""
        self.counters["writes_skipped" if self.excess else "writes_given_up"] += 1
        self._dequeue(chunk)
        chunk.cancel_write()
        self._tries.pop(chunk, None)
        self._budget.give_back(self._disk.file_bytes(chunk.length))

    def cancel_all(self) -> None:
        """None of the queued writes shall begin."""
        for chunk in list(self._queue):
            self.cancel(chunk)
            self._events.written(chunk, False)

    def pump(self) -> None:
        """Begin writes while there are threads for them."""
        while self._queue and self._pool.idle:
            chunk = next(iter(self._queue))
            self._dequeue(chunk)
            self._begin(chunk)

    def _begin(self, chunk: Chunk) -> None:
        chunk.begin_write()
        self._running[chunk] = self._now()
        self._table.refresh(chunk)
        key = chunk.entry.key(chunk.index)
        victims = self._victims(chunk)

        def done(written: bool | None, error: BaseException | None) -> None:
            self._settle(chunk, key, bool(written), victims)

        def hung() -> Done:
            self.counters["writes_hung"] += 1
            del self._running[chunk]
            chunk.abandon_write()
            self._events.written(chunk, False)
            return done

        buffer = self._arena.buffer(chunk.buffer)
        self._pool.submit(self._evict_and_write, key, buffer, chunk.length, victims, done=done, hung=hung)

    def _victims(self, chunk: Chunk) -> list[ChunkKey]:
        """As many as free the room if they are whole chunks; where they are short ones the write is tried again."""
        lacking = max(0, self._disk.file_bytes(chunk.length) - self._disk.free_bytes)
        count = -(-lacking // self._disk.file_bytes(self._arena.chunk_bytes))
        victims = (self._admission.evict_for(chunk) for _ in range(count))
        return [key for key in victims if key is not None]

    def _evict_and_write(self, key: ChunkKey, buffer: memoryview, length: int, victims: list[ChunkKey]) -> bool:
        """In a thread."""
        if self._is_lost():
            return False
        self._evictor.remove(victims)
        return self._disk.write(key, buffer, length)

    def _settle(self, chunk: Chunk, key: ChunkKey, written: bool, victims: list[ChunkKey]) -> None:
        self.counters["evicted"] += self._evictor.settle(victims, already_discarded=True)
        self._was_slow = self._running.pop(chunk, -math.inf) + QUICK_S < self._now()
        tries = self._tries.pop(chunk, 0) + 1
        if not written and tries < _TRIES_MAX and self._has_room(chunk):
            self._tries[chunk] = tries
            self._enqueue(chunk)
            self._table.refresh(chunk)
            self.pump()
            return
        if written:
            self._order.add(key)
            self.counters["written_chunks"] += 1
            self.counters["written_bytes"] += chunk.length
        else:
            self._budget.give_back(self._disk.file_bytes(chunk.length))
            self.counters["writes_refused"] += self._disk.quota_bytes > 0
        chunk.finish_write()
        self._events.written(chunk, written)
        self.pump()


class Quota:
    """Changes the disk quota while the service runs. Used by the loop's thread only, except for `_apply`.

    A job that opens the directory with another `disk_bytes` has it written there and is warned; the service gets it
    with the hello. A larger quota holds at once. For a smaller one what is too much is evicted. A tier that was off
    first takes stock of what lies there. Both may take long, so they are done in a thread; and since they consist of
    many small calls, a deadline for the whole would say nothing about the disk.
    """

    def __init__(self, resources: Resources, evictor: DiskEvictor, took_stock: Callable[[], None]) -> None:
        """`took_stock()` is called when it is known what lies in a tier that was off."""
        self._disk, self._evictor, self._took_stock = resources.disk, evictor, took_stock
        self._pool = resources.pools.make("quota", 1)  # one thread: of two changes the later one holds
        self._wanted = resources.disk.quota_bytes

    def change(self, quota_bytes: int) -> None:
        """Have at most so many bytes on disk from now on."""
        if quota_bytes == self._wanted:
            return
        self._wanted = quota_bytes
        was_off = not self._disk.quota_bytes
        order = self._evictor.order
        victims = [*order.in_order(), *order.pinned()]

        def done(_: None, error: BaseException | None) -> None:
            self._evictor.settle(victims)
            if was_off:
                for key in self._disk.keys():  # noqa: SIM118  # a method of the tier
                    self._evictor.order.add(key)
                self._took_stock()

        self._pool.submit(self._apply, quota_bytes, victims, done=done)

    def _apply(self, quota_bytes: int, victims: list[ChunkKey]) -> None:
        """In a thread."""
        self._disk.set_quota(quota_bytes)
        if quota_bytes:  # without a quota the tier is off, and left as it is
            self._evictor.remove(victims, lambda: self._disk.free_bytes >= 0)


class DiskWatch:
    """Used by the loop's thread only."""

    def __init__(self, resources: Resources, deadline_s: float) -> None:
        self._disk, self._pools = resources.disk, resources.pools
        self._now, self._events = resources.now, resources.events
        self._deadline_s = deadline_s
        self._watched: list[Pool] = []
        self._hanging: set[Task] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def stalled(self) -> bool:
        """Whether a call hangs."""
        return bool(self._hanging)

    def pool(self, name: str, count: int) -> Pool:
        """A pool whose tasks are watched. Each must have a `hung`."""
        pool = self._pools.make(name, count, submitted=self._expect)
        self._watched.append(pool)
        return pool

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expect(self) -> None:
        """Something is under way: look after it when it may have run out of time."""
        if self._timer is None:
            self._timer = self._pools.loop.call_later(self._deadline_s, self._look)

    def _look(self) -> None:
        self._timer = None
        tasks = [task for pool in self._watched for task in pool.under_way if task not in self._hanging]
        if not tasks:
            return
        oldest = min((task.began for task in tasks if task.began), default=self._now())
        left_s = oldest + self._deadline_s - self._now()
        if left_s > 0:
            self._timer = self._pools.loop.call_later(left_s, self._look)
        else:
            self._stall(tasks)

    def _stall(self, tasks: list[Task]) -> None:
        self._disk.stalled(self._deadline_s)
        self._hanging.update(tasks)
        for task in tasks:
            assert task.hung is not None, "a watched task that cannot be given up"
            task.done = partial(self._returned, task, task.hung())
        self._events.disk_stalled()

    def _returned(self, task: Task, done: Done, result: Any, error: BaseException | None) -> None:
        done(result, error)
        self._hanging.discard(task)
        if not self._hanging:
            self._disk.answered()
            self._events.changed()
