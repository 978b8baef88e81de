"""Runs the jobs in step with their plans, does to them what the schedule says, and holds what they get against the
oracle.

One thread, which waits for messages of all processes. A job's ranks go on together: the next step is asked for when
all have taken the last, and every few steps their state is kept, as a trainer keeps its checkpoints. A rank that dies
goes on from there, alone where its job has no process group, with all of its job where it has one, as torchrun does it.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from bench.chaos import damage, jobs
from bench.chaos.oracle import DamagedError, Oracle, Place, WrongError
from bench.chaos.schedule import Event

STEPS_A_STATE = 5
HANG_S = 60.0
WORLD_SIZES = (1, 2, 3)
_STOPS_S = 4.0
_START = Place()
_DEFECTS_MAX = 5


@dataclass(eq=False)
class RankProcess:
    """One rank's process, and where it is."""

    spec: jobs.Rank
    process: Any
    connection: Connection
    place: Place
    asked_at: float | None = None
    worker_killed: bool = False
    refused_before: int = 0  # how many requests the store had refused when it began
    told: tuple[Place, Mapping[str, Any]] | None = None  # its last state, and where


@dataclass(eq=False)
class Job:
    """`kind` of workers; `make` gives what its ranks are started with. `kept`: their states after a step that all have
    taken, one for all but with torchdata's loader, whose ranks cannot go on as others, nor as more or fewer.
    """

    kind: str
    oracle: Oracle
    make: Callable[[int, int, Mapping[str, Any] | None], jobs.Rank]
    has_group: bool
    world_size: int = 2
    ranks: list[RankProcess] = field(default_factory=list)
    target: Place = _START  # where all ranks are to be
    kept: tuple[Place, list[Mapping[str, Any]]] = (_START, [])
    due: float = 0.0

    @property
    def has_one_state(self) -> bool:
        """Whether each rank may go on from another's state."""
        return self.kind != "torch"


class Driver:
    """`jobs_` on one cache `disk`, and all that `events` has for them. `refusals` and `lies` say how many there
    were; `pace_s` is the time of a trainer's step.
    """

    def __init__(
        self,
        jobs_: list[Job],
        disk: damage.Disk,
        events: Iterator[Event],
        folder: Path,
        *,
        refusals: Callable[[], int],
        lies: Callable[[], int],
        pace_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._jobs, self._disk, self._events, self._folder = jobs_, disk, events, folder
        self._refusals, self._lies, self._pace_s, self._say = refusals, lies, pace_s, say
        self._context = multiprocessing.get_context("forkserver")
        self._next_event = next(events, None)
        self._later: list[tuple[float, Callable[[], None]]] = []  # what ends at a time: stops and disk trouble
        self._stopped: Counter[int] = Counter()
        self._is_still_at = 0.0  # until then a process was stopped, and none need make progress
        self.steps = 0
        self.samples = self.resumes = 0
        self.done: Counter[str] = Counter()
        self.history: list[str] = []
        self.defects: list[str] = []
        self.held: dict[str, list[int]] = {}
        self.resized: Counter[str] = Counter()

    def run(self, until: float, steps_max: int) -> None:
        """Until that time, or so many steps of all jobs. Then nothing more is done to them, and each reads its epoch
        to the end.
        """
        for job in self._jobs:
            self._start(job)
        while time.monotonic() < until and self.steps < steps_max and len(self.defects) < _DEFECTS_MAX:
            while self._next_event is not None and self._next_event.step <= self.steps:
                self._apply(self._next_event)
                self._next_event = next(self._events, None)
            self._turn()
        self._recover()
        ends = {job: Place(job.target.epoch + 1) for job in self._jobs}
        while not self.defects and any(job.target.epoch < ends[job].epoch or self._lags(job) for job in self._jobs):
            self._turn(ends)

    def end(self) -> None:
        """Let all ranks end in good order, and see what they have left."""
        self._say("all ranks end")
        for job in self._jobs:
            for rank in job.ranks:
                with contextlib.suppress(OSError):
                    rank.connection.send(None)
            for rank in job.ranks:
                self._see_end(job, rank)

    def _see_end(self, job: Job, rank: RankProcess) -> None:
        try:
            while rank.connection.poll(HANG_S):
                answer = rank.connection.recv()
                if isinstance(answer, jobs.Ended):
                    if answer.left:
                        self._defect(f"{job.kind} rank {rank.spec.rank} left behind {answer.left}")
                    break
                if isinstance(answer, jobs.Failed):
                    self._defect(f"{job.kind} rank {rank.spec.rank} could not end: {answer.trace}")
                    break
            else:
                self._defect(f"{job.kind} rank {rank.spec.rank} does not end\n{self.stacks()}")
            rank.process.join(HANG_S)
        except (EOFError, OSError) as error:
            self._defect(f"{job.kind} rank {rank.spec.rank} ended without a word: {error!r}")
        rank.process.kill()
        rank.process.join()
        rank.connection.close()

    def kill(self) -> None:
        """End all processes."""
        self._recover()
        for job in self._jobs:
            self._kill_job(job)

    # Steps

    def _turn(self, ends: Mapping[Job, Place] | None = None) -> None:
        """Ask the ranks that are due, read answers, and find the ranks that have been silent for too long."""
        now = time.monotonic()
        for _, act in [one for one in self._later if one[0] <= now]:
            act()
        self._later = [one for one in self._later if one[0] > now]
        for job in self._jobs:
            if not self._lags(job) and now >= job.due and (ends is None or job.target.epoch < ends[job].epoch):
                job.target = job.oracle.next(job.target, job.world_size)
                job.due = now + self._pace_s
            for rank in job.ranks:
                if rank.asked_at is None and rank.place != job.target:
                    self._ask(job, rank, now)
        busy = {rank.connection: (job, rank) for job in self._jobs for rank in job.ranks if rank.asked_at is not None}
        times = [one[0] for one in self._later] + [job.due for job in self._jobs if not self._lags(job)]
        patience = max(0.0, min([1.0, *(at - now for at in times)]))
        for connection in wait(list(busy), patience):
            assert isinstance(connection, Connection)
            job, rank = busy[connection]
            if rank in job.ranks:  # not ended meanwhile, with another of its job
                self._hear(job, rank)
        self._look_for_hangs()
        damage.reap()

    def _lags(self, job: Job) -> bool:
        return any(rank.place != job.target for rank in job.ranks)

    def _ask(self, job: Job, rank: RankProcess, now: float) -> None:
        after = job.oracle.next(rank.place, job.world_size)
        with contextlib.suppress(OSError):  # it has ended: its reader finds out
            rank.connection.send(_keeps_state(after))
        rank.asked_at = now

    def _hear(self, job: Job, rank: RankProcess) -> None:
        try:
            answer = rank.connection.recv()
        except (EOFError, OSError):
            rank.process.join()
            self._defect(f"{job.kind} rank {rank.spec.rank} ended with exit code {rank.process.exitcode}")
            self._start_again(job, rank)
            return
        if isinstance(answer, jobs.Failed):
            if not self._may_fail(rank, answer):
                self._defect(f"{job.kind} rank {rank.spec.rank} failed at {rank.place}:\n{answer.trace}")
            self.done[f"failed: {answer.kind}"] += 1
            self._start_again(job, rank)
            return
        assert isinstance(answer, jobs.Got)
        try:
            job.oracle.check(rank.place, rank.spec.rank, job.world_size, answer)
        except DamagedError as error:
            if not self._lies():
                self._defect(f"{job.kind}: {error}")
            self.done["batches damaged by lies"] += 1
        except WrongError as error:
            self._defect(f"{job.kind}: {error}")
            self._start_again(job, rank)
            return
        self.samples += len(answer.keys)
        rank.asked_at = None
        rank.place = job.oracle.next(rank.place, job.world_size)
        self.held.setdefault(f"{job.kind} {rank.process.pid}", []).append(answer.held[0])
        if answer.state is not None:
            rank.told = (rank.place, answer.state)
        if not self._lags(job):
            self.steps += 1
            if self.steps % 200 == 1:
                self._say(f"{self.steps} steps, {self.samples} samples")
            if answer.state is not None:
                self._keep(job)

    def _keep(self, job: Job) -> None:
        """The states of a step that all have taken; of our own loaders all are the same."""
        states = [rank.told[1] for rank in job.ranks if rank.told is not None and rank.told[0] == job.target]
        if len(states) < len(job.ranks) or (job.has_one_state and any(state != states[0] for state in states)):
            self._defect(f"{job.kind}: ranks say different states at {job.target}: {states}")
        else:
            job.kept = (job.target, states)

    def _may_fail(self, rank: RankProcess, failed: jobs.Failed) -> bool:
        """Whether what was done to it explains its error: a worker that was killed, a store that refused or lied."""
        if failed.kind == ("WorkerError" if rank.spec.kind != "torch" else "RuntimeError"):
            return rank.worker_killed
        if failed.kind == "ShardError" and self._lies():  # it is in the cache by now, and would be for ever
            self._do_kill_service()
            self._disk.vanish()
            return True
        return failed.kind == "AccessDeniedError" and self._refusals() > rank.refused_before

    # Starting

    def _start(self, job: Job) -> None:
        """All ranks of a job, where its last state is."""
        is_group = job.has_group and job.world_size > 1
        meeting = str(self._folder / f"meeting-{job.kind}-{self.resumes}") if is_group else ""
        job.target = job.kept[0]
        job.ranks = [self._start_rank(job, number, meeting) for number in range(job.world_size)]

    def _start_rank(self, job: Job, number: int, meeting: str = "") -> RankProcess:
        place, states = job.kept
        state = states[0 if job.has_one_state else number] if states else None
        spec = replace(job.make(number, job.world_size, state), meeting=meeting)
        here, there = self._context.Pipe()
        process = self._context.Process(target=jobs.serve, args=(there, spec))
        process.start()
        there.close()
        damage.keep(process.pid)
        return RankProcess(spec, process, here, place, refused_before=self._refusals())

    def _start_again(self, job: Job, rank: RankProcess) -> None:
        """A rank that has ended, or has to; with a process group all of the job."""
        self.resumes += 1
        if job.has_group:
            self._kill_job(job)
            self._start(job)
            return
        self._kill(rank)
        job.ranks[job.ranks.index(rank)] = self._start_rank(job, rank.spec.rank)

    def _kill(self, rank: RankProcess) -> None:
        rank.process.kill()
        rank.process.join()
        rank.connection.close()

    def _kill_job(self, job: Job) -> None:
        for rank in job.ranks:
            rank.process.kill()
        for rank in job.ranks:
            self._kill(rank)
        job.ranks = []

    # What happens

    def _apply(self, event: Event) -> None:
        self.history.append(str(event))
        name = "_do_" + event.kind.replace("-", "_")
        if getattr(self, name)(*event.draws):
            self.done[event.kind] += 1
            self._say(str(event))

    def _job(self, draw: float) -> Job:
        return self._jobs[int(draw * len(self._jobs))]

    def _rank(self, draw: float, job: Job) -> RankProcess:
        return job.ranks[int(draw * len(job.ranks))]

    def _do_kill_service(self, *_: float) -> bool:
        return sum(damage.send(pid, signal.SIGKILL) for pid in damage.services(self._disk.directory)) > 0

    def _do_kill_rank(self, which: float, who: float, *_: float) -> bool:
        job = self._job(which)
        self._start_again(job, self._rank(who, job))
        return True

    def _do_kill_worker(self, which: float, who: float, whom: float, *_: float) -> bool:
        with_workers = [job for job in self._jobs if job.kind != "thread"]
        if not with_workers:
            return False
        job = with_workers[int(which * len(with_workers))]
        rank = self._rank(who, job)
        workers = sorted(damage.descendants(rank.process.pid) - set(damage.services(self._disk.directory)))
        if not workers:
            return False
        rank.worker_killed = True
        return damage.send(workers[int(whom * len(workers))], signal.SIGKILL)

    def _do_kill_job(self, which: float, *_: float) -> bool:
        job = self._job(which)
        self._kill_job(job)
        self.resumes += 1
        self._start(job)
        return True

    def _do_resize(self, which: float, size: float, *_: float) -> bool:
        """Killed, and resumed with another number of ranks."""
        resizable = [job for job in self._jobs if job.has_one_state]
        job = resizable[int(which * len(resizable))]
        sizes = [one for one in WORLD_SIZES if one != job.world_size]
        self._kill_job(job)
        new = sizes[int(size * len(sizes))]
        self.resized[f"{job.world_size} to {new}"] += 1
        job.world_size = new
        self.resumes += 1
        self._start(job)
        return True

    def _do_kill_all(self, *draws: float) -> bool:
        for job in self._jobs:
            self._kill_job(job)
        self._do_kill_service()
        for job in self._jobs:
            self.resumes += 1
            self._start(job)
        return True

    def _do_stop_service(self, _: float, __: float, long: float, *___: float) -> bool:
        return sum(self._stop(pid, long) for pid in damage.services(self._disk.directory)) > 0

    def _do_stop_rank(self, which: float, who: float, long: float, *_: float) -> bool:
        pid = self._rank(who, self._job(which)).process.pid
        return self._stop(pid, long)

    def _stop(self, pid: int, draw: float) -> bool:
        """For some seconds, in which no process has to make progress."""
        for_s = _STOPS_S * (0.25 + draw)
        until = time.monotonic() + for_s
        self._later.append((until, lambda: self._continue(pid)))
        self._is_still_at = max(self._is_still_at, until)
        self._stopped[pid] += 1
        return damage.send(pid, signal.SIGSTOP)

    def _continue(self, pid: int) -> None:
        self._stopped[pid] -= 1
        if not self._stopped[pid]:
            damage.send(pid, signal.SIGCONT)

    def _do_full(self, _: float, __: float, long: float, *___: float) -> bool:
        self._disk.fill()
        return self._recovers(long)

    def _do_eio(self, share: float, _: float, long: float, *__: float) -> bool:
        return self._fail_disk(errno.EIO, 20 + int(980 * share**2), long)

    def _do_slow_disk(self, share: float, _: float, long: float, *__: float) -> bool:
        return self._fail_disk(0, 0, long, 0.1 * share)

    def _fail_disk(self, number: int, per_mille: int, long: float, delay_s: float = 0.0) -> bool:
        self._disk.fail(number, per_mille, delay_s)
        return self._recovers(long)

    def _recovers(self, long: float) -> bool:
        self._later.append((time.monotonic() + 1.0 + 3.0 * long, self._disk.recover))
        return True

    def _chosen(self, pattern: str, share: float, most: int) -> list[Path]:
        return _some(self._disk.files(pattern), share, most)

    def _do_flip_chunk(self, share: float, where: float, *_: float) -> bool:
        return sum(self._disk.flip(path, where) for path in self._chosen("chunks/*/*.chunk", share, 20)) > 0

    def _do_cut_chunk(self, share: float, where: float, *_: float) -> bool:
        return sum(self._disk.cut(path, where) for path in self._chosen("chunks/*/*.chunk", share, 20)) > 0

    def _do_remove_chunk(self, share: float, *_: float) -> bool:
        return sum(self._disk.remove(path) for path in self._chosen("chunks/*/*.chunk", share, 20)) > 0

    def _do_flip_other(self, share: float, where: float, *_: float) -> bool:
        """Indexes and counts, runs, manifests, limits; also cut."""
        files = [path for path in self._disk.files("*") if path.suffix in (".blob", ".run", ".json")]
        damaged = self._disk.flip if where < 0.6 else self._disk.cut
        return sum(damaged(path, where) for path in _some(files, share, 10)) > 0

    def _do_empty_directory(self, *_: float) -> bool:
        self._disk.empty()
        return True

    def _do_remove_directory(self, *_: float) -> bool:
        self._disk.vanish()
        return True

    def _recover(self) -> None:
        for _, act in self._later:
            act()
        self._later = []
        self._disk.recover()

    # What must not happen

    def _look_for_hangs(self) -> None:
        now = time.monotonic()
        for job in self._jobs:
            for rank in job.ranks:
                if rank.asked_at is not None and now - max(rank.asked_at, self._is_still_at) > HANG_S:
                    words = f"{job.kind} rank {rank.spec.rank} at {rank.place} has said nothing for {HANG_S:g} s"
                    self._defect(f"{words}\n{self.stacks()}")
                    self._start_again(job, rank)
                    return

    def _defect(self, words: str) -> None:
        self.defects.append(f"at step {self.steps}: {words}")
        self._say("DEFECT " + words.partition("\n")[0] + " ... " + words.strip().rpartition("\n")[2][:300])

    def stacks(self) -> str:
        """What every rank, worker and service is doing."""
        for path in self._folder.glob("traces-*"):
            os.truncate(path, 0)
        ranks = [rank for job in self._jobs for rank in job.ranks]
        for rank in ranks:
            for pid in [rank.process.pid, *damage.descendants(rank.process.pid)]:
                if "fastload.service" not in damage.command_of(pid):
                    damage.send(pid, signal.SIGUSR1)
        # PYTHONFAULTHANDLER makes it write its stacks to its log, and end
        for pid in damage.services(self._disk.directory):
            damage.send(pid, signal.SIGABRT)
        time.sleep(1.0)  # there is no event for when it is written
        parts = [f"{path.name}:\n{path.read_text()}" for path in sorted(self._folder.glob("traces-*"))]
        for path in self._disk.directory.glob("*.log"):
            parts.append(f"{path.name}:\n{path.read_text(errors='replace')[-8000:]}")
        return "\n".join(parts)


def _some(files: list[Path], share: float, most: int) -> list[Path]:
    """Up to `most` of them, spread out."""
    step = max(1, len(files) // (1 + int(share * most)))
    return files[int(share * step) :: step]


def _keeps_state(after: Place) -> bool:
    return after.step % STEPS_A_STATE == 0
