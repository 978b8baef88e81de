"""A disk that does not answer: a read or write that hangs, in a dead NFS server or a drive that is going, for good.

Nothing can end such a call, and it keeps its thread and the buffer that it was given. So the calls go through pools
whose jobs are watched. When one has run for longer than the deadline, the disk *stalls*: the tier is bypassed
(`DiskTier.stalled`), and everything under way with it is given up, each in its own way (`Job.hung`): a chunk that was
being read is fetched from the store into another buffer; one that was being written stays readable, and its buffer
cannot be used for anything else. When the last of those calls has come back, their threads and buffers are as good as
ever, and so is the disk.

The deadline counts from when a thread began with the job, so that many quick ones in a row are no stall. Jobs have to
be small for that: a chunk, or a few indexes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from fastload.service.pools import Done, Job, Pool, Pools
from fastload.service.tiers import Disk

# A disk under load answers within a second or two, a drive that retries a bad spot within ten.
DISK_DEADLINE_S = 20.0


class DiskWatch:
    """Used by the loop's thread only."""

    def __init__(
        self,
        disk: Disk,
        pools: Pools,
        deadline_s: float,
        stalled: Callable[[], None],
        answered: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        """`stalled` is called when everything under way was given up, `answered` when all of it has come back."""
        self._disk, self._pools, self._deadline_s = disk, pools, deadline_s
        self._on_stall, self._on_answer, self._now = stalled, answered, now
        self._watched: list[Pool] = []
        self._hanging: set[Job] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def stalled(self) -> bool:
        """Whether a call hangs."""
        return bool(self._hanging)

    def pool(self, name: str, count: int) -> Pool:
        """A pool whose jobs are watched. Each must have a `hung`."""
        pool = self._pools.make(name, count, submitted=self._expect)
        self._watched.append(pool)
        return pool

    def close(self) -> None:
        """Watch no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _expect(self) -> None:
        """Something is under way: look after it when it may have run out of time."""
        if self._timer is None:
            self._timer = self._pools.loop.call_later(self._deadline_s, self._look)

    def _look(self) -> None:
        self._timer = None
        jobs = [job for pool in self._watched for job in pool.under_way if job not in self._hanging]
        if not jobs:
            return
        oldest = min((job.began for job in jobs if job.began), default=self._now())
        left_s = oldest + self._deadline_s - self._now()
        if left_s > 0:
            self._timer = self._pools.loop.call_later(left_s, self._look)
        else:
            self._stall(jobs)

    def _stall(self, jobs: list[Job]) -> None:
        self._disk.stalled(self._deadline_s)
        self._hanging.update(jobs)
        for job in jobs:
            assert job.hung is not None, "a watched job that nobody can give up"
            job.done = partial(self._returned, job, job.hung())
        self._on_stall()

    def _returned(self, job: Job, done: Done, result: Any, error: BaseException | None) -> None:
        done(result, error)
        self._hanging.discard(job)
        if not self._hanging:
            self._disk.answered()
            self._on_answer()
