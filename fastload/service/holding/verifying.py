"""Reading what lies on disk only to check it: slowly all the time (`scrub`), and at once where an operator asks.

A disk loses bits without a word, and what is kept for weeks is read seldom. A chunk whose checksums differ is removed,
so that it is fetched again when it is next wanted, by a job or by what warms a pinned data set.

Scrubbing goes round: each chunk once in the time that it was given, at most `SCRUB_BYTES_PER_S`, and only while no
consumer waits for anything and the disk answers. It begins somewhere at random, so that a service that ends early each
time comes to all chunks in the end; nothing of it is stored. One thread and one buffer do all of this, the buffer only
while there is something to do.

A read that hangs keeps that thread, so no other read is given the buffer before it has returned: what it writes late
harms nobody. Checks that were submitted meanwhile have been given up, or wait behind it; the buffer is closed when the
last of them has come back.
"""

from __future__ import annotations

import asyncio
import mmap
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fastload import protocol
from fastload.cache import ChunkKey
from fastload.errors import CacheError, to_wire
from fastload.service.disk_io import DiskEvictor, DiskWatch
from fastload.service.holding.holdings import Holdings
from fastload.service.host.threads import Done
from fastload.service.operators import Operator
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState

SCRUB_BYTES_PER_S = 32 << 20
# While consumers wait for something, the next look is so much later.
_BUSY_S = 1.0
_REPORT_EVERY_S = 1.0
# Names of damaged chunks in one message.
_NAMES_MAX = 10_000

Checked = Callable[[bool | None], None]


@dataclass(slots=True, eq=False)
class _Run:
    """A `Verify` that is being carried out."""

    operator: Operator
    message: protocol.Verify
    keys: list[ChunkKey]  # the next is the last
    total: int
    reported_at: float
    done_chunks: int = 0
    done_bytes: int = 0
    skipped: int = 0
    damaged_count: int = 0
    damaged: list[str] = field(default_factory=list)  # since the last report


class Verifying:
    """Used by the loop's thread only, except for what its pool runs."""

    def __init__(
        self, resources: Resources, shared: SharedState, holdings: Holdings, watch: DiskWatch, evictor: DiskEvictor
    ) -> None:
        self._disk, self._now, self._loop = resources.disk, resources.now, resources.pools.loop
        self._shared, self._holdings, self._watch, self._evictor = shared, holdings, watch, evictor
        self._pool = watch.pool("verify", 1)  # one thread, since there is one buffer
        self._scratch: mmap.mmap | None = None
        self._using = 0  # checks under way
        self._interval_s = 0.0
        self._keys: list[ChunkKey] = []  # of this round, the next last
        self._round_ends = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_scrubbing = False
        self.counters: Counter[str] = Counter(verified_chunks=0, verified_bytes=0, verify_damaged=0)

    # All the time

    def scrub(self, interval_s: float) -> None:
        """From now on, check each chunk once in so many seconds; 0: none."""
        self._interval_s = interval_s
        self._keys = []
        self._round_ends = 0.0
        self._next_in(0.0)

    def _next_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._scrub_next) if self._interval_s else None

    def _scrub_next(self) -> None:
        self._timer = None
        if self._is_scrubbing or self._is_waited_for() or self._watch.stalled or not self._disk.readable:
            self._next_in(_BUSY_S)
            return
        if not self._keys and not self._begin_round():
            return
        key, began = self._keys.pop(), self._now()
        left = len(self._keys) + 1

        def checked(found: bool | None) -> None:
            self._is_scrubbing = False
            least_s = self._disk.chunk_bytes / SCRUB_BYTES_PER_S
            even_s = max(0.0, self._round_ends - began) / left  # so that the round ends in time
            self._next_in(max(least_s, even_s) - (self._now() - began))

        self._is_scrubbing = True
        self._check(key, repair=True, then=checked)

    def _is_waited_for(self) -> bool:
        """Whether a consumer's thread waits for a chunk."""
        return any(chunk.urgent for consumer in self._shared.consumers for chunk in consumer.wants.values())

    def _begin_round(self) -> bool:
        """Whether there is something to do now."""
        wait_s = self._round_ends - self._now()
        if wait_s > 0:
            self._next_in(wait_s)
            return False
        keys = self._disk.keys()
        self._round_ends = self._now() + self._interval_s
        if not keys:
            self._next_in(self._interval_s)
            return False
        start = random.randrange(len(keys))
        self._keys = (keys[start:] + keys[:start])[::-1]
        return True

    # At once

    def verify(self, operator: Operator, message: protocol.Verify) -> None:
        """Check what is called so, and answer as it goes on. It ends with the operator's connection."""
        if self._watch.stalled:
            error = CacheError(f"the disk cache {self._disk.directory} does not answer; verify it again when it does")
            operator.send(protocol.RequestFailed(message.request, *to_wire(error)))
            return

        def found(object_ids: set[bytes]) -> None:
            order = self._shared.disk_order
            begin([ChunkKey(each, index) for each in object_ids for index in order.indexes_of(each)])

        def begin(keys: list[ChunkKey]) -> None:
            self._go_on(_Run(operator, message, keys[::-1], len(keys), self._now()))

        if message.what:
            self._holdings.search(message.what, found)
        else:
            begin(self._disk.keys())

    def _go_on(self, run: _Run) -> None:
        if not run.operator.is_connected:
            return
        if not run.keys:
            self._report(run, finished=True)
            return
        if self._now() - run.reported_at >= _REPORT_EVERY_S:
            self._report(run, finished=False)
        key = run.keys.pop()

        def checked(found: bool | None) -> None:
            run.done_chunks += 1
            run.skipped += found is None
            run.done_bytes += self._disk.chunk_bytes if found is not None else 0
            if found is False:
                run.damaged_count += 1
                run.damaged.append(key.name)
            if self._watch.stalled:
                run.skipped += len(run.keys)
                run.keys.clear()
            self._go_on(run)

        self._check(key, repair=run.message.repair, then=checked)

    def _report(self, run: _Run, *, finished: bool) -> None:
        names, run.damaged = run.damaged[:_NAMES_MAX], []
        run.reported_at = self._now()
        run.operator.send(
            protocol.Verified(
                run.message.request,
                run.done_chunks,
                run.total,
                run.done_bytes,
                run.skipped,
                run.damaged_count,
                names,
                finished,
            )
        )

    # One chunk

    def _check(self, key: ChunkKey, *, repair: bool, then: Checked) -> None:
        if self._scratch is None:
            self._scratch = mmap.mmap(-1, self._disk.chunk_bytes)
        scratch = memoryview(self._scratch)
        self._using += 1

        def done(found: bool | None, error: BaseException | None) -> None:
            then(found)  # first, so that the next one finds the buffer
            settle(found)

        def settle(found: bool | None) -> None:
            scratch.release()
            self._using -= 1
            if not self._using and self._scratch is not None:
                self._scratch.close()
                self._scratch = None
            if found is not None:
                self.counters["verified_chunks"] += 1
                self.counters["verified_bytes"] += self._disk.chunk_bytes
                self.counters["verify_damaged"] += not found
            if not found:
                self._evictor.settle([key])

        def hung() -> Done:
            then(None)
            return lambda found, error: settle(found)

        self._pool.submit(lambda: self._disk.verify(key, scratch, repair=repair), done=done, hung=hung)
