"""Runs the jobs of a daemon beside its service, in the loop of that.

The service is what any job would start, but stays. What blocks runs elsewhere: each warming job in a child process
(`job`), listings and files in threads. So the daemon stays as small as a service at rest, a job that crashes costs that
job a retry, and to cancel one is to end a process.

All is decided in `_tick`, from the state of the jobs (`jobs`) and the schedule (`schedule`). What happens (a child has
said something, a listing has come, an operator asks) changes a job and asks for a tick.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from fastload import snapshot
from fastload.cache import CacheDirectory
from fastload.daemon.config import Config, DataTable, data_table, read_config, storage_options_of
from fastload.daemon.job import Advanced, Ended, Errand, Said
from fastload.daemon.jobs import (
    Job,
    Listing,
    Objects,
    job_id,
    of_kept,
    orphans,
    pin_of,
    read_kept,
    to_forget,
    to_keep,
    write_kept,
)
from fastload.daemon.schedule import minute_of_week, to_run, wait_s
from fastload.daemon.systemd import Notifier
from fastload.daemon.views import Views, environment_of_child
from fastload.errors import CacheError, ConfigError, FastloadError, ObjectMissingError
from fastload.formats import endings_of
from fastload.redaction import redact
from fastload.service.core import RELEASE_AFTER_S, Core
from fastload.service.fetching.stores import StoreTable
from fastload.service.host.server import Server
from fastload.service.state import ObjectEntry
from fastload.store import StoreOptions
from fastload.store.listing import expand
from fastload.store.types import ObjectInfo

log = logging.getLogger("fastload.service")

# A child that was asked to end is killed after that.
_CHILD_END_S = 2.0
# The longest line of a child: a thousand failed shards with what each error says.
_LINE_BYTES_MAX = 16 << 20
# How often is looked for chunks that were found damaged or were evicted, where a job is done.
_LOOK_S = 2.0
# Counting what is held takes no more of the loop's time than one part in so many, and so many objects at once.
_COUNTING_SHARE, _COUNTED_AT_ONCE = 50, 5000
# Shards that failed, which are logged by name.
_FAILED_LOGGED = 5

_decoder: msgspec.json.Decoder[Said] = msgspec.json.Decoder(Said)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the configuration comes from: its file (None: there is none), and the variables that it may name."""

    path: Path | None
    environ: Mapping[str, str]

    def read(self) -> Config:
        """The configuration; ConfigError."""
        return Config() if self.path is None else read_config(self.path, self.environ)


@dataclass(slots=True, eq=False)
class _Child:
    """A process that warms for a job."""

    job: Job
    process: asyncio.subprocess.Process | None = None
    is_stopped: bool = False
    is_refused: bool = False  # its pin
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def pid(self) -> int:
        """0 where it does not run yet."""
        return 0 if self.process is None else self.process.pid

    def stop(self) -> None:
        """Have it end soon."""
        self.is_stopped = True
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            asyncio.get_running_loop().call_later(_CHILD_END_S, self._kill)

    def _kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()


class Supervisor:
    """See the module's text. All methods are for the loop's thread."""

    def __init__(self, server: Server, directory: CacheDirectory, source: Source, config: Config) -> None:
        self._loop = asyncio.get_running_loop()
        self._server, self._directory, self._source, self._config = server, directory, source, config
        self._notifier = Notifier(source.environ)
        self._jobs: dict[str, Job] = {}
        self._once: list[str] = []  # jobs of the configuration that are done for good
        self._pins: dict[str, None] = {}  # that jobs have set: the daemon's, and not a user's
        self._children: dict[str, _Child] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._troubles: dict[str, str] = {}  # by what it is about
        self._timer: asyncio.TimerHandle | None = None
        self._tick_due = self._stopping = False
        self._status = ""
        self._limits = (0, 0)  # of warming: bytes a second, requests
        self._verify_s = 0.0
        self._damaged = 0  # chunks that were found so
        self._moves = 0  # of chunks, when what is held was last counted
        self._count_at = 0.0  # not before
        self._is_counting = self._is_begun = self._reload_due = False
        self._views = Views(directory.path, self._loop, self._troubles)

    # Life

    def begin(self) -> None:
        """Take the jobs up; the service serves from now on."""
        self._core: Core = self._server.core
        self._lister, self._keeper = self._core.pool("listing"), self._core.pool("jobs")
        self._keeper.finishes = True
        self._core.operators.jobs = self
        self._core.holdings.named.connect(self._named)
        self._core.holdings.pin_set.connect(self._pin_set)
        self._core.holdings.pin_refused.connect(self._pin_refused)
        try:
            kept = read_kept(self._directory.root)
        except CacheError as error:
            log.error("%s", error)
            self._troubles["jobs"] = str(error)
        else:
            self._once, self._pins = kept.once, dict.fromkeys(kept.pins)
            self._jobs = {each.id: of_kept(each) for each in kept.jobs}
        self._take(self._config)
        self._core.holdings.room_changed.connect(self._room_changed)
        self._is_begun = True
        self._notifier.ready(self._status_text())
        if self._reload_due:
            self.reload()
        if self._notifier.watchdog_s is not None:
            self._feed_watchdog(self._notifier.watchdog_s / 3)

    async def stop(self) -> None:
        """End the children, then the service."""
        if self._stopping:
            return
        self._stopping = True
        self._notifier.stopping()
        log.info("ending")
        if self._timer is not None:
            self._timer.cancel()
        children = list(self._children.values())
        for child in children:
            child.stop()
        await asyncio.gather(self._views.close(), *(child.ended.wait() for child in children))
        self._server.stop()

    def _feed_watchdog(self, every_s: float) -> None:
        self._notifier.alive()
        self._loop.call_later(every_s, self._feed_watchdog, every_s)

    # Configuration

    def reload(self) -> None:
        """Read the configuration again, and take all of it or nothing; once it serves."""
        if not self._is_begun:
            self._reload_due = True
            return
        self._notifier.reloading()
        if self._source.path is None:
            log.info("there is no configuration to read again: this daemon was started without one")
            self._notifier.ready(self._status_text())
            return
        self._keeper.submit(_read_again, self._source, self._config, self._directory.path, done=self._reloaded)

    def _reloaded(self, config: Config | None, error: BaseException | None) -> None:
        if error is not None or config is None:
            self._troubles["reload"] = f"the configuration was not read again, and the one before stays: {error}"
            log.error("%s", self._troubles["reload"])
        else:
            self._troubles.pop("reload", None)
            self._take(config)
            log.info("the configuration was read again: %d data sets", len(config.data))
        self._notifier.ready(self._status_text())

    def _take(self, config: Config) -> None:
        if config.disk_bytes != self._config.disk_bytes and "disk_bytes" in config.limits:
            self._core.change_disk_quota(config.limits["disk_bytes"])
        self._config = config
        self._core.rest_after_s = RELEASE_AFTER_S if config.rest_after_s is None else config.rest_after_s
        if config.verify_s != self._verify_s:  # another one begins a new round
            self._verify_s = config.verify_s
            self._core.verifying.scrub(config.verify_s)
        self._views.show(config)
        wanted = {table.name: table for table in config.data}
        for job in [job for job in self._jobs.values() if not job.is_submitted]:
            if wanted.get(job.id) != job.table:
                self._end_child(job)
                del self._jobs[job.id]
        for job in [job for job in self._jobs.values() if job.is_submitted and job.table.name in wanted]:
            log.warning("job %s ends: the configuration has a data set %s now", job.id, job.table.name)
            self._end_child(job)
            del self._jobs[job.id]
            self._keep()
        for table in config.data:
            if table.name not in self._jobs:
                self._jobs[table.name] = self._of_config(table)
        self._room_changed()
        self._wake()

    def _of_config(self, table: DataTable) -> Job:
        job = Job(table.name, table, is_submitted=False, since=time.time(), due_at=time.monotonic())
        if table.is_once and job_id(table) in self._once:
            job.is_check = True
        return job

    # Pins

    def _pin_set(self, pid: int, name: str) -> None:
        """A pin that a job sets is the daemon's from then on, and one that a user sets is not."""
        is_own = any(child.pid == pid for child in self._children.values())
        if is_own == (name in self._pins):
            return
        if is_own:
            self._pins[name] = None
        else:
            del self._pins[name]
        self._keep()

    def _pin_refused(self, pid: int, name: str) -> None:
        for child in self._children.values():
            child.is_refused |= child.pid == pid

    def _room_changed(self) -> None:
        """End pins that no job names any more; and jobs that had no room may have some now."""
        names = self._core.holdings.pin_names()
        if names is None:
            return
        before = len(self._pins)
        self._pins = {name: None for name in self._pins if name in names}
        gone = orphans(self._pins, self._jobs)
        for name in gone:
            del self._pins[name]
        if len(self._pins) != before:
            self._keep()
        for job in self._jobs.values():
            job.room_changed(time.monotonic())
        if gone:
            log.info("no job names them any more, and they are not pinned any more: %s", ", ".join(gone))
            self._core.holdings.unpin(gone)
        self._wake()

    def _is_pinned(self, job: Job) -> bool:
        return job.table.pin and pin_of(job) in (self._core.holdings.pin_names() or ())

    # What is held

    def _named(self, pid: int, entries: Iterable[ObjectEntry]) -> None:
        """A child has named what it warms, or asks for."""
        for child in self._children.values():
            if child.pid == pid:
                child.job.objects = Objects.of((entry.id, entry.info.size) for entry in dict.fromkeys(entries))

    async def _count_held(self, jobs: list[Job]) -> None:
        """How much is held of what is done, a slice at a time."""
        self._is_counting, self._moves = True, self._core.holdings.move_count
        took_s = 0.0
        for job in jobs:
            objects, held_bytes = job.objects, 0
            left = iter(objects or ())
            while some := list(islice(left, _COUNTED_AT_ONCE)):
                began = time.monotonic()
                held_bytes += self._core.holdings.held_bytes(some)
                took_s += time.monotonic() - began
                await asyncio.sleep(0)
            is_same = self._jobs.get(job.id) is job and job.state == "done" and job.objects is objects
            if is_same and job.holds(held_bytes, self._is_pinned(job), time.monotonic(), random.random()):
                log.warning("job %s (%s): %s", job.id, job.table.name, job.error)
                self._wake()
        self._is_counting, self._count_at = False, time.monotonic() + _COUNTING_SHARE * took_s

    def _count_if_moved(self, now: float) -> None:
        done = [job for job in self._jobs.values() if job.state == "done" and job.objects is not None]
        moves = self._core.holdings.move_count
        if done and moves != self._moves and now >= self._count_at and not self._is_counting:
            task = self._loop.create_task(self._count_held(done))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # What operators ask for (`service.operators.Jobs`)

    def describe(self) -> list[snapshot.Job]:
        """All jobs, the most urgent first."""
        now, wall = time.monotonic(), time.time()
        jobs = sorted(self._jobs.values(), key=lambda job: job.contender.rank)
        return [job.describe(now, wall) for job in jobs]

    def troubles(self) -> list[str]:
        """What is wrong now: with the configuration, and with jobs that failed."""
        failed = [(job, job.error) for job in self._jobs.values() if job.state == "failed"]
        not_listed = [(job, job.listing_error) for job in self._jobs.values()]
        of_jobs = [f"job {job.table.name}: {error}" for job, error in failed + not_listed if error]
        return [*self._troubles.values(), *of_jobs]

    def submit(self, job: dict[str, Any], done: Callable[[str, BaseException | None], None]) -> None:
        """Take one more, in place of another one of its name, and keep it before `done`."""

        def checked(table: DataTable | None, error: BaseException | None) -> None:
            if error is None and table is not None:
                error = self._refusal(table)
            if error is not None or table is None:
                done("", error)
            else:
                self._admit(table, done)

        self._keeper.submit(data_table, job, None, done=checked)  # it may name a million shards

    def _refusal(self, table: DataTable) -> ConfigError | None:
        if any(each.table.name == table.name for each in self._jobs.values() if not each.is_submitted):
            return ConfigError(f'the daemon\'s configuration has a data set "{table.name}"; give the job another name')
        return None

    def _admit(self, table: DataTable, done: Callable[[str, BaseException | None], None]) -> None:
        number = job_id(table)
        replaced = [job for job in self._jobs.values() if job.table.name == table.name and job.id != number]
        is_new = number not in self._jobs
        for each in replaced:
            self._end_child(each)
            del self._jobs[each.id]
        if is_new:
            self._jobs[number] = Job(number, table, is_submitted=True, since=time.time(), due_at=time.monotonic())
        else:
            self._jobs[number].retry(time.monotonic(), time.time())

        def kept(error: BaseException | None) -> None:
            if error is None:
                log.info("job %s (%s) was submitted", number, table.name)
                done(number, None)
                self._room_changed()  # one that it replaced may have had a pin
            else:
                if is_new and number in self._jobs:
                    self._end_child(self._jobs.pop(number))
                self._jobs |= {each.id: each for each in replaced}
                done("", CacheError(f"the job cannot be stored in {self._directory.path}: {error}; make room there"))
            self._wake()

        self._keep(kept)

    def cancel(self, job_id: str) -> None:
        """End a job, by its id or name; what it warmed stays."""
        job = self._find(job_id)
        job.cancel()
        self._end_child(job)
        log.info("job %s was cancelled", job.id)
        self._keep()

    def retry(self, job_id: str) -> None:
        """Run a job again now, by its id or name."""
        job = self._find(job_id)
        job.retry(time.monotonic(), time.time())
        if not job.is_submitted:
            self._forget_once(job.table)
        self._keep()
        self._wake()

    def _find(self, text: str) -> Job:
        found = self._jobs.get(text) or next((job for job in self._jobs.values() if job.table.name == text), None)
        if found is None:
            raise ConfigError(f"the daemon has no job {text!r}; `fastload jobs ls` lists those that it has")
        return found

    # What is kept

    def _keep(self, done: Callable[[BaseException | None], None] | None = None) -> None:
        def kept(_: None, error: BaseException | None) -> None:
            if error is None:
                self._troubles.pop("jobs", None)
            else:
                self._troubles["jobs"] = f"the submitted jobs cannot be stored: {error}; make room on the disk"
                log.error("%s", self._troubles["jobs"])
            if done is not None:
                done(error)

        for number in to_forget(self._jobs, self._pins):
            del self._jobs[number]
        self._keeper.submit(write_kept, self._directory.root, to_keep(self._jobs, self._once, self._pins), done=kept)

    def _forget_once(self, table: DataTable) -> None:
        with contextlib.suppress(ValueError):  # it was not done
            self._once.remove(job_id(table))

    # Deciding

    def _wake(self) -> None:
        if not self._tick_due and not self._stopping:
            self._tick_due = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._tick_due = False
        if self._stopping:
            return
        if self._timer is not None:
            self._timer.cancel()
        now, wall = time.monotonic(), time.time()
        minute = minute_of_week(wall)
        timetable = self._config.warm.timetable
        self._limit(timetable.rate_at(minute), self._config.warm.requests_in_flight)
        self._heal(now, wall)
        self._count_if_moved(now)
        contenders = [job.contender for job in self._jobs.values()]
        chosen = to_run(contenders, now, minute)
        for number, child in self._children.items():
            if number not in chosen and not child.is_stopped:
                self._end_child(child.job)
        for number in chosen:
            job = self._jobs[number]
            if number not in self._children and job.state != "listing":
                self._begin(job)
        for job in self._jobs.values():
            if job.watch_at <= now and not job.is_running and job.id not in self._children:
                self._list(job)
        again_s = min(
            wait_s(contenders, timetable, now, wall),
            *(max(0.0, job.watch_at - now) for job in self._jobs.values() if not job.is_running),
            _LOOK_S if self._verify_s or any(job.state == "done" for job in self._jobs.values()) else math.inf,
        )
        if again_s < math.inf:
            self._timer = self._loop.call_later(again_s, self._wake)
        self._show_status()

    def _heal(self, now: float, wall: float) -> None:
        """Chunks that were found damaged are gone: jobs that want what they hold checked have it fetched again."""
        damaged = self._core.verifying.counters["verify_damaged"]
        if damaged > self._damaged:
            log.warning("%d chunks on disk were damaged, and are fetched again", damaged - self._damaged)
            for job in self._jobs.values():
                if job.state == "done" and job.table.verify is not None:
                    job.retry(now, wall)
        self._damaged = damaged

    def _limit(self, bytes_per_s: int, requests: int) -> None:
        if self._limits != (bytes_per_s, requests):
            self._limits = bytes_per_s, requests
            self._core.warming.limit(bytes_per_s, requests)

    def _begin(self, job: Job) -> None:
        """List what is watched, so that it is known what its child begins with; then its child."""
        if job.table.watch is not None and job.listing is None:
            job.listed()
            self._list(job)
        else:
            self._start_child(job)

    # Listing

    def _list(self, job: Job) -> None:
        job.watch_at = math.inf  # until this has come back
        self._lister.submit(
            self._look_up, job.table, job.listing, done=lambda found, error: self._listed(job, found, error)
        )

    def _look_up(self, table: DataTable, before: Listing | None) -> tuple[Listing, list[str]]:
        """In a thread: what the store has of a data set, and what it had `before` and has no more."""
        options = StoreOptions.from_environment(storage_options_of(table.credentials), self._source.environ)
        stores = self._core.stores
        key = stores.add(options.to_wire())
        try:
            listing = Listing.of(_found(stores, key, table.urls, _endings_of(table)))
        finally:
            stores.remove(key)
        return listing, [] if before is None else before.gone_by(listing)

    def _listed(self, job: Job, found: tuple[Listing, list[str]] | None, error: BaseException | None) -> None:
        if self._jobs.get(job.id) is not job or job.state == "cancelled":
            return
        now, chance = time.monotonic(), random.random()
        if error is not None or found is None:
            job.not_listed(_said(error), now, chance)
            log.warning("%s cannot be listed: %s", job.table.name, _said(error))
        else:
            listing, gone = found
            job.watched(listing, now, time.time(), chance)
            if gone:
                log.info("%s: %d shards are gone or have changed", job.table.name, len(gone))
                self._core.drop(gone)
            if job.state == "listing":
                job.state = "waiting"
        self._wake()

    # Children

    def _start_child(self, job: Job) -> None:
        child = self._children[job.id] = _Child(job)
        job.begun(time.monotonic())
        task = self._loop.create_task(self._run(child))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end_child(self, job: Job) -> None:
        child = self._children.get(job.id)
        if child is not None and child.job is job:
            child.stop()
            job.stopped()

    async def _run(self, child: _Child) -> None:
        job = child.job
        log.info("job %s (%s) begins", job.id, job.table.name)
        outcome: Ended | None = None
        how = ""
        try:
            process = child.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fastload.daemon.job",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_BYTES_MAX,
                env=environment_of_child(self._source.environ),
                cwd="/",
                start_new_session=True,
            )
            if child.is_stopped:
                child.stop()
            outcome = await self._converse(child, process)
            how = _how_it_ended(await process.wait())
        except OSError as error:  # no memory, no process
            how = f"its process cannot be started: {error}; look at the limits of this process (ulimit -a)"
        except (ValueError, msgspec.MsgspecError) as error:  # a line that is too long, or none of ours
            how = f"its process said what makes no sense: {error}"
            child.stop()
            if child.process is not None:
                await child.process.wait()
        finally:
            child.ended.set()
            self._children.pop(job.id, None)
        self._settle(child, outcome, how)

    async def _converse(self, child: _Child, process: asyncio.subprocess.Process) -> Ended | None:
        """Tell a child what to do, and follow what it says; its last word, None where it ended without."""
        assert process.stdin is not None
        assert process.stdout is not None
        job = child.job
        errand = Errand(
            directory=str(self._directory.path),
            table=job.table,
            deadline_at=0.0 if math.isinf(job.deadline_at) else job.deadline_at,
            is_check=job.is_check,
        )
        with contextlib.suppress(ConnectionError):  # it has ended already
            process.stdin.write(msgspec.json.encode(errand) + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            said = _decoder.decode(line)
            if isinstance(said, Ended):
                return said
            if isinstance(said, Advanced) and job.state == "warming":
                job.came_to(said.figures, time.monotonic())
                self._show_status()
        return None

    def _settle(self, child: _Child, outcome: Ended | None, how: str) -> None:
        job = child.job
        now, chance = time.monotonic(), random.random()
        if self._jobs.get(job.id) is job and job.is_running and not child.is_stopped:
            is_new = True
            if outcome is None:
                job.failed(how, now, chance)
            elif outcome.error and child.is_refused:
                is_new = job.refused(outcome.error, now, chance)
            elif outcome.error:
                job.failed(outcome.error, now, chance)
            elif job.is_check:
                job.looked_up(outcome.figures, self._is_pinned(job), now, chance)
            else:
                job.came_to(outcome.figures, now)
                job.succeeded(now, chance)
            if job.error and is_new:
                log.warning("job %s (%s): %s", job.id, job.table.name, job.error)
                for url, why in islice(job.figures.failed.items(), _FAILED_LOGGED):
                    log.warning("job %s (%s): %s: %s", job.id, job.table.name, url, why)
            elif not job.error:
                self._done(job)
        self._wake()

    def _done(self, job: Job) -> None:
        log.info("job %s (%s) is done: %d bytes held", job.id, job.table.name, job.figures.held_bytes)
        if job.is_submitted:
            self._keep()
        elif job.table.is_once and job_id(job.table) not in self._once:
            self._once.append(job_id(job.table))
            self._keep()

    # Status

    def _status_text(self) -> str:
        running = [job for job in self._jobs.values() if job.is_running]
        if not running:
            failed = sum(job.state == "failed" for job in self._jobs.values())
            return f"{len(self._jobs)} jobs" + (f", {failed} failed" if failed else "")
        job = min(running, key=lambda job: job.contender.rank)
        share = job.figures.done_bytes / job.figures.total_bytes if job.figures.total_bytes else 0.0
        return f"{len(self._jobs)} jobs, {len(running)} running: {job.table.name} {share:.0%}"

    def _show_status(self) -> None:
        text = self._status_text()
        if text != self._status:
            self._status = text
            self._notifier.status(text)


def _found(stores: StoreTable, key: str, urls: list[str], endings: tuple[str, ...]) -> list[ObjectInfo]:
    """What these stand for. Members of a pattern that are not there hold up no others, as in a job's child."""
    try:
        return stores.resolve(key, urls, endings)
    except ObjectMissingError:
        names = [name for url in urls for name in expand(url)]
        prefixes = [name for name in names if name.endswith("/")]
        found = stores.present(key, [name for name in names if not name.endswith("/")])
        found += stores.resolve(key, prefixes, endings) if prefixes else []
        if not found:
            raise
        return found


def _endings_of(table: DataTable) -> tuple[str, ...]:
    """How the names of all objects end that its data is made of."""
    how = table.job.shard_format
    return endings_of(how) if isinstance(how, str) else (*how.endings, how.beside_ending)


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, FastloadError) else redact(repr(error))


def _how_it_ended(status: int) -> str:
    if status < 0:
        return f"its process was ended by signal {-status}"
    return f"its process ended with status {status} and without a word; the daemon's log may say why"


def _read_again(source: Source, before: Config, path: Path) -> Config:
    """In a thread: the configuration as it is now; ConfigError where not all of it can hold without a restart."""
    config = source.read()
    for name in ("cache", "ram_bytes"):
        if getattr(config, name) != getattr(before, name):
            raise ConfigError(f"{name} holds from the next start on; restart the daemon, or put back what it was")
    if config.disk_bytes != before.disk_bytes and config.disk_bytes is not None:
        CacheDirectory.open(path, disk_bytes=config.limits["disk_bytes"])
    return config
