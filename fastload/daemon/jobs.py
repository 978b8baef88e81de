"""The jobs of a daemon: what becomes of each, as pure state, and the file that keeps those which were submitted.

A job is *due* from a moment on, by a clock that only goes forward. While it is due, its window is open and no more than
a few come before it, it runs: the store is listed, where it is watched, and a child process warms what it names. What
comes of that is an outcome, which settles when it is due again:

    done       when the store has changed; where it is pinned or watched, also when the cache has lost a part of it
    failed     after a pause, which grows; also where only some shards failed: these are tried again
    full       not before something changes: another try would fetch again what there is no room for
    refused    its pin is too large: not before something changes, or after long pauses, which grow

What is done need not stay so: other data may displace it, or a disk may damage it. So a job that is done knows its
objects (`Objects`), and is told how much of them is held (`holds`). After a restart that is looked up first
(`is_check`): nothing is fetched for it.

Progress is nothing that is kept: it is what the cache holds. So the file has the tables of submitted jobs and whether
each is over, and is written when one comes or goes. Besides it names the pins that the daemon has set, which end with
the last job that names them; a user's pins are not among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from fastload import snapshot
from fastload.cache import tempfiles
from fastload.cache.key import OBJECT_ID_BYTES
from fastload.config import format_bytes
from fastload.daemon.config import DataTable
from fastload.daemon.schedule import Contender, Windows, jittered, pause_s
from fastload.errors import CacheError, ConfigError
from fastload.redaction import redact
from fastload.store.types import ObjectInfo

State = Literal["waiting", "listing", "warming", "done", "failed", "cancelled"]

# Of submitted jobs that are over, so many are remembered.
_OVER_MAX = 100
_FAILED_SHOWN = _URLS_SHOWN = 20
# The rate that is shown is that of about the last so many seconds.
_RATE_S = 10.0
# Pauses where another try costs much and promises little: from the first to the longest.
_LONG_PAUSES_S = 600.0, 12 * 3600.0
# What was held for so long begins with the shortest pause when it is lost.
_LASTED_S = 24 * 3600.0


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """How far a job is, as its child says."""

    done_bytes: int = 0
    total_bytes: int = 0
    held_bytes: int = 0
    fetched_bytes: int = 0
    shard_count: int = 0
    failed: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Listing:
    """What the store had when it was looked at: a hash, and packed rows, since a daemon keeps them for weeks and a data
    set may have a million.
    """

    digest: bytes
    packed: bytes = field(repr=False, compare=False)

    @classmethod
    def of(cls, objects: Iterable[ObjectInfo]) -> Listing:
        """Takes a second for a million."""
        rows = sorted((info.url, info.size, info.etag or "", info.mtime_ns) for info in objects)
        data = msgspec.msgpack.encode(rows)
        return cls(hashlib.blake2b(data, digest_size=16).digest(), zlib.compress(data, 1))

    def gone_by(self, later: Listing) -> list[str]:
        """The URLs of those that are not there any more in a later one, or are something else."""
        if later == self:
            return []
        left = set(later._rows())
        return [row[0] for row in self._rows() if row not in left]

    def _rows(self) -> list[tuple[str, int, str, int]]:
        return msgspec.msgpack.decode(zlib.decompress(self.packed), type=list[tuple[str, int, str, int]])


@dataclass(frozen=True, slots=True)
class Objects:
    """Ids and sizes of what a job warms, packed, since there may be a million."""

    ids: bytes = field(repr=False)
    sizes: array[int] = field(repr=False)

    @classmethod
    def of(cls, objects: Iterable[tuple[bytes, int]]) -> Objects:
        """From ids and sizes."""
        ids, sizes = bytearray(), array("q")
        for object_id, size in objects:
            ids += object_id
            sizes.append(size)
        return cls(bytes(ids), sizes)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        for number, size in enumerate(self.sizes):
            yield self.ids[number * OBJECT_ID_BYTES : (number + 1) * OBJECT_ID_BYTES], size


@dataclass(slots=True, eq=False)
class Job:
    """See the module's text. Changed by the loop's thread only."""

    id: str
    table: DataTable
    is_submitted: bool
    since: float  # seconds since 1970
    state: State = "waiting"
    due_at: float = 0.0
    deadline_at: float = math.inf  # seconds since 1970
    watch_at: float = math.inf
    failures: int = 0
    error: str = ""
    listing_error: str = ""  # why the store cannot be looked at again; what came of the last try stays
    figures: Figures = field(default_factory=Figures)
    listing: Listing | None = None  # what the store had when it was last looked at
    bytes_per_s: float = 0.0
    objects: Objects | None = None  # of its last run
    is_check: bool = False  # it was done before a restart: look up what is held, and fetch nothing
    needs_room: bool = False  # it is full, or its pin was refused
    losses: int = 0  # times in a row that some of what was done was lost
    _done_at: float = 0.0
    _measured: tuple[float, int] = (0.0, 0)
    _refusal: str = ""  # the last one of its pin

    def __post_init__(self) -> None:
        self._set_deadline(self.since)

    def _set_deadline(self, wall: float) -> None:
        seconds = self.table.deadline_s
        self.deadline_at = math.inf if seconds is None else wall + seconds

    @property
    def is_running(self) -> bool:
        """Whether something is done for it now."""
        return self.state in ("listing", "warming")

    @property
    def contender(self) -> Contender:
        """As the schedule sees it."""
        return Contender(
            self.id,
            self.due_at,
            Windows() if self.is_check else self.table.windows,
            self.deadline_at,
            self.table.priority,
            self.since,
            in_spare_lane=self.failures > 0 or self.is_check,
        )

    # What happens to it

    def listed(self) -> None:
        """The store is being listed."""
        self.state = "listing"

    def begun(self, now: float) -> None:
        """Its child runs."""
        self.objects, self.needs_room = None, False
        if self.is_check:
            self.state = "listing"
            return
        self.state, self.error = "warming", ""
        self.figures = Figures()
        self.bytes_per_s, self._measured = 0.0, (now, 0)

    def came_to(self, figures: Figures, now: float) -> None:
        """Its child has said how far it is."""
        at, fetched = self._measured
        if now > at:
            rate = max(0, figures.fetched_bytes - fetched) / (now - at)
            self.bytes_per_s += (rate - self.bytes_per_s) * min(1.0, (now - at) / _RATE_S)
            self._measured = now, figures.fetched_bytes
        self.figures = figures

    def stopped(self) -> None:
        """It was stopped for others, or because its window has closed; it goes on later."""
        if self.is_running:
            self.state, self.bytes_per_s = "waiting", 0.0

    def succeeded(self, now: float, chance: float) -> None:
        """All is held but what `figures.failed` names, which is tried again, or what there is no room for."""
        self.bytes_per_s = 0.0
        figures = self.figures
        if figures.failed:
            url, why = next(iter(figures.failed.items()))
            count = len(figures.failed)
            self._try_again(f"{count} of {figures.shard_count} shards failed, the first: {url}: {why}", now, chance)
        elif figures.held_bytes < figures.total_bytes:
            self.state, self.due_at, self.failures, self.needs_room = "failed", math.inf, 0, True
            self.error = (
                f"the cache is full: {figures.held_bytes} of {figures.total_bytes} bytes are held; raise disk_bytes, "
                "evict what is not needed, or name less"
            )
        else:
            self._is_done(now)
        self._watch(now, chance)

    def _is_done(self, now: float) -> None:
        self.state, self.due_at, self.failures, self.error = "done", math.inf, 0, ""
        self.is_check, self._done_at = False, now

    def looked_up(self, figures: Figures, is_pinned: bool, now: float, chance: float) -> None:
        """So much is held of what was done before a restart."""
        self._is_done(now)
        self.figures = msgspec.structs.replace(figures, held_bytes=figures.total_bytes)
        self.holds(figures.held_bytes, is_pinned, now, chance)

    def holds(self, held_bytes: int, is_pinned: bool, now: float, chance: float) -> bool:
        """So much is held now of what is done; `is_pinned`: its pin has not ended. Returns whether that is a loss, and
        the first.

        What was lost is warmed again where it is pinned, soon, since nothing displaces it then; and where it is watched
        and was not to be pinned, after long pauses: two data sets that do not fit together would be fetched in turn
        for ever.
        """
        before, total = self.figures.held_bytes, self.figures.total_bytes
        self.figures = msgspec.structs.replace(self.figures, held_bytes=held_bytes)
        if held_bytes >= total:
            self.error = ""
            return False
        what = f"{format_bytes(held_bytes)} of {format_bytes(total)} held: the rest was evicted or damaged since"
        if not is_pinned and (self.table.pin or self.table.watch is None):
            keeps = "" if self.table.pin else ", and pin = true keeps it"
            self.error = f"{what}; fastload jobs retry warms it again{keeps}"
            return before >= total
        self.losses = 1 if now - self._done_at > _LASTED_S else self.losses + 1
        pauses = () if is_pinned else _LONG_PAUSES_S
        self.state, self.due_at = "waiting", now + pause_s(self.losses, chance, *pauses)
        self.error = f"{what}, and is warmed again"
        return True

    def refused(self, error: str, now: float, chance: float) -> bool:
        """Its pin is more than its quota, or than there is room for. Returns whether that was not said before."""
        self.bytes_per_s = 0.0
        self._try_again(error, now, chance, *_LONG_PAUSES_S)
        self.needs_room = True
        is_new, self._refusal = self.error != self._refusal, self.error
        return is_new

    def room_changed(self, now: float) -> None:
        """A pin has ended, or the quota of the disk or the configuration has changed."""
        if self.needs_room and self.state == "failed":
            self.due_at = now

    def failed(self, error: str, now: float, chance: float) -> None:
        """It ended by an error."""
        self.bytes_per_s = 0.0
        self._try_again(error, now, chance)

    def _try_again(self, error: str, now: float, chance: float, *pauses: float) -> None:
        self.failures += 1
        self.state, self.error = "failed", redact(error)
        self.due_at = now + pause_s(self.failures, chance, *pauses)

    def _watch(self, now: float, chance: float) -> None:
        seconds = self.table.watch_s
        self.watch_at = math.inf if seconds is None else now + jittered(seconds, chance)

    def watched(self, listing: Listing, now: float, wall: float, chance: float) -> None:
        """The store has this now. It is due where that is something else."""
        before, self.listing, self.listing_error = self.listing, listing, ""
        self._watch(now, chance)
        if before is None and self.state == "failed":  # it could not be listed
            self.state, self.due_at = "waiting", now
        if before is None or before == listing:
            return
        if self.state in ("done", "failed"):
            self.state, self.failures, self.losses = "waiting", 0, 0
            self._set_deadline(wall)
        self.due_at = now

    def not_listed(self, error: str, now: float, chance: float) -> None:
        """The store could not be listed; what it warmed before stays as it is."""
        self._watch(now, chance)
        if self.state == "listing":
            self._try_again(error, now, chance)
        else:
            self.listing_error = redact(error)

    def cancel(self) -> None:
        """It is not wanted any more."""
        self.state, self.due_at, self.watch_at, self.bytes_per_s = "cancelled", math.inf, math.inf, 0.0

    def retry(self, now: float, wall: float) -> None:
        """It is wanted again, at once."""
        if not self.is_running:
            self.state, self.due_at, self.failures, self.losses = "waiting", now, 0, 0
            self.is_check, self._refusal = False, ""
            self._set_deadline(wall)

    # As others see it

    def describe(self, now: float, wall: float) -> snapshot.Job:
        """For a snapshot."""
        figures = self.figures
        left = figures.total_bytes - figures.done_bytes
        known = self.state == "warming" and self.bytes_per_s > 0 and figures.total_bytes > 0
        next_at = min(self.due_at if not self.is_running else math.inf, self.watch_at)
        return snapshot.Job(
            id=self.id,
            name=redact(self.table.name),
            state=self.state,
            urls=[redact(url) for url in self.table.urls[:_URLS_SHOWN]],
            is_submitted=self.is_submitted,
            is_pinned=self.table.pin,
            done_bytes=figures.done_bytes,
            total_bytes=figures.total_bytes,
            held_bytes=figures.held_bytes,
            fetched_bytes=figures.fetched_bytes,
            shard_count=figures.shard_count,
            failed_shards=len(figures.failed),
            bytes_per_s=self.bytes_per_s,
            eta_s=left / self.bytes_per_s if known else -1.0,
            deadline_at=0.0 if math.isinf(self.deadline_at) else self.deadline_at,
            priority=self.table.priority,
            since=self.since,
            next_at=0.0 if math.isinf(next_at) else wall + max(0.0, next_at - now),
            error=self.error or self.listing_error,
            failed=dict(list(figures.failed.items())[:_FAILED_SHOWN]),
        )


def job_id(table: DataTable) -> str:
    """The id of a submitted job: that of its content, so that one that is submitted twice is one job."""
    return hashlib.blake2b(msgspec.json.encode(table, order="deterministic"), digest_size=5).hexdigest()


# The file


class KeptJob(msgspec.Struct, frozen=True, kw_only=True):
    """A submitted job as the file has it. `figures` are those of one that is over."""

    id: str
    since: float
    table: DataTable
    state: Literal["waiting", "done", "cancelled"]
    figures: Figures


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The file. `once` are the jobs of the configuration that are done for good, by `job_id`; `pins` those that the
    daemon has set, by name.
    """

    format: int = 1
    jobs: list[KeptJob] = []
    once: list[str] = []
    pins: list[str] = []


def path_of(root: Path) -> Path:
    """Where the submitted jobs of a directory are kept."""
    return root / "jobs.json"


def read_kept(root: Path) -> Kept:
    """What the file has; CacheError for one that cannot be read, which is put aside."""
    path = path_of(root)
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
        for job in kept.jobs:
            job.table.check()
        return kept
    except FileNotFoundError:
        return Kept()
    except (OSError, msgspec.MsgspecError, ConfigError) as error:
        aside = path.with_name("jobs.json.damaged")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        raise CacheError(
            f"the submitted jobs cannot be read: {error}; the file is put aside as {aside.name}; submit them again"
        ) from error


def write_kept(root: Path, kept: Kept) -> None:
    """Replace the file, whole and for good; OSError as the system gives it."""
    temp = root / next(tempfiles.temp_names())
    try:
        with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(msgspec.json.encode(kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path_of(root))
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def to_forget(jobs: Mapping[str, Job], pins: Collection[str] = ()) -> list[str]:
    """Submitted jobs that are over, the oldest, where there are too many of them; but none whose pin is set."""
    over = [
        job.id
        for job in jobs.values()
        if job.is_submitted and job.state in ("done", "cancelled") and pin_of(job) not in pins
    ]
    return over[: max(0, len(over) - _OVER_MAX)]


def pin_of(job: Job) -> str | None:
    """The name of the pin that a job sets, if it sets one."""
    return redact(job.table.name) if job.table.pin else None


def orphans(pins: Iterable[str], jobs: Mapping[str, Job]) -> list[str]:
    """Of the pins that the daemon has set, those that no job names."""
    named = {pin_of(job) for job in jobs.values()}
    return [name for name in pins if name not in named]


def to_keep(jobs: Mapping[str, Job], once: list[str], pins: Iterable[str] = ()) -> Kept:
    """What the file should have."""
    return Kept(
        jobs=[
            KeptJob(
                id=job.id,
                since=job.since,
                table=job.table,
                state=_kept_state(job),
                figures=job.figures if _kept_state(job) == "done" else Figures(),
            )
            for job in jobs.values()
            if job.is_submitted
        ],
        once=once,
        pins=list(pins),
    )


def _kept_state(job: Job) -> Literal["waiting", "done", "cancelled"]:
    if job.state == "done" or job.is_check:
        return "done"
    return "cancelled" if job.state == "cancelled" else "waiting"


def of_kept(kept: KeptJob) -> Job:
    """A job of the file, as a daemon begins with it."""
    job = Job(kept.id, kept.table, is_submitted=True, since=kept.since, state=kept.state, figures=kept.figures)
    if kept.state == "cancelled":
        job.due_at = math.inf
    elif kept.state == "done":
        # Nothing is known of what the store had, so what came since would not be noticed; nor of what was lost.
        job.state, job.is_check = "waiting", kept.table.watch is None
    return job
