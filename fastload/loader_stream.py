"""How a `DataLoader` reads a data set of fastload: position, threads, workers, statistics.

The loader owns the position: a state says which sample comes after the last batch that was *delivered*, whatever is in
flight, and a loader that loads it goes on exactly there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch.multiprocessing
from torch.utils.data import default_collate, default_convert

from fastload import callers
from fastload.arguments import checked_epoch
from fastload.dataset_base import DatasetBase
from fastload.decode.pictures import Image, WholeImage
from fastload.device import Mover, mover_to, pinned
from fastload.errors import ConfigError, StateError
from fastload.pipeline.delivery import NOTHING, TASK_S, DecodePool, InlineRun, Iteration, Make, ThreadedRun
from fastload.pipeline.epoch_pass import EpochPass
from fastload.pipeline.finish import Finish
from fastload.pipeline.resume import why_nothing_came
from fastload.pipeline.workers import WorkerOptions, Workers
from fastload.plan import Position, batch_count_of_rank
from fastload.reports import Reporter
from fastload.stats import EpochMeter, Making, empty_stats
from fastload.timing import activity
from fastload.timing.stalls import Stalls

STATE_VERSION = 1
# What a task sends to a worker process takes about so long, since it costs half a millisecond to send it.
_TASK_OF_WORKERS_S = 4e-3


class LoaderSettings(Protocol):
    """The attributes of a loader that are read when an iteration begins."""

    dataset: Any
    batch_size: int | None
    num_workers: int
    workers: Any
    prefetch_factor: int | None
    drop_last: bool
    collate_fn: Any
    pin_memory: bool
    device: Any
    timeout: float
    in_order: bool
    worker_init_fn: Any
    multiprocessing_context: Any
    generator: Any


@dataclass(slots=True, eq=False)
class _Progress:
    """How far one iteration is. `last` is the last entry delivered; `ended_at` where the epoch ended, if it has."""

    epoch: int
    meter: EpochMeter
    current: EpochPass | None
    if_nothing: Callable[[EpochPass], None]
    reporter: Reporter | None = None
    last: Any = None
    batches: int = 0
    ended_at: Position | None = None

    def delivered(self, current: EpochPass, entry: Any) -> None:
        """A batch has reached the user."""
        self.last, self.batches = entry, self.batches + 1
        skipped = 0 if current.skips is None else current.skips.take(entry)
        self.meter.delivered(len(entry) - skipped, entry.repeats, skipped)

    def begin_reports(self) -> None:
        """From now on the service hears how it goes. Of several sources, one consumer speaks for all."""
        if self.current is not None:
            self.reporter = Reporter(self.meter.report, self.current.sources[0].attached.consumer.report)

    def end(self) -> None:
        """The iteration is over, finished or not: its statistics are final."""
        if self.reporter is not None:
            self.reporter.stop()
        self.meter.stop()

    def exhausted(self) -> None:
        """The epoch is over."""
        current = self.current
        self.ended_at = self.position(self.epoch)
        self.last = self.current = None
        if current is None:
            return
        if current.skips is not None:
            current.skips.ended(self.epoch, self.meter.samples)
        if not self.batches and not current.cursor.start.samples:
            self.if_nothing(current)

    def position(self, next_epoch: int) -> Position:
        """After the last batch delivered, or at the beginning of `next_epoch` where this one is over.

        Made only now, since few ask.
        """
        last, current, ended_at = self.last, self.current, self.ended_at
        if current is None:
            assert ended_at is not None, "an epoch that is over has ended somewhere"
            return ended_at.at_epoch(next_epoch)
        return current.cursor.start if last is None else current.feed.position(last)


class Stream:
    """What a loader of a data set of fastload has beside torch's attributes: position, threads, statistics.

    It reads the loader's attributes when an iteration begins, since frameworks set them late, and refers to the loader
    only weakly, so that a loader that is dropped ends its threads at once. Iterations that run side by side each have
    their progress; the loader's state and statistics are those of the one that began last.
    """

    def __init__(self, loader: LoaderSettings) -> None:
        self._loader = weakref.ref(loader)
        self._dataset: DatasetBase = loader.dataset
        self._pool: DecodePool | None = None
        self._workers: Workers | None = None
        self._loaded: Position | None = None  # where the next iteration begins, if a state was loaded
        self._latest: _Progress | None = None
        self._changing = threading.Lock()  # held while an iteration begins, and while all are ended
        self._iterations: weakref.WeakSet[Iteration] = weakref.WeakSet()
        _check_arguments(loader, self._dataset)

    def iterate(self) -> Iteration:
        """Begin an epoch: where a loaded state says, else the data set's next."""
        with self._changing:
            iteration, progress = self._begin()
            # Only now: what could not begin is begun again by the next try.
            self._dataset.begin_epoch()
            self._loaded, self._latest = None, progress
            progress.begin_reports()
            return iteration

    def peek(self) -> Any:
        """The first batch that the next iteration will give. That begins where it would have begun."""
        with self._changing:
            iteration, _ = self._begin()
        try:
            return next(iteration)
        except StopIteration:
            raise ConfigError("there is nothing to peek at: the epoch has no batch for this rank") from None
        finally:
            iteration.close()

    def _begin(self) -> tuple[Iteration, _Progress]:
        """The next iteration, which counts nowhere yet."""
        stalls = Stalls()
        with stalls.own("startup"):
            return self._begin_measured(stalls)

    def _begin_measured(self, stalls: Stalls) -> tuple[Iteration, _Progress]:
        loader = self._loader()
        assert loader is not None, "a loader outlives the call of its __iter__"
        start, epoch = self._loaded, self._dataset.next_epoch()
        if start is not None and not start.samples:
            start = start.at_epoch(epoch)  # at its beginning, another epoch is as good
        current = self._dataset.begin(epoch, _size_of_entries(loader), drop_last=loader.drop_last, start=start)
        try:
            meter = EpochMeter(epoch, current.account, current.waits, stalls, _making(loader, self._dataset, current))
            progress = _Progress(epoch, meter, current, _warning(self._dataset, loader))
            mover = mover_to(loader.device)
            run = self._start(loader, current, stalls, _pinning(loader) if mover is None else mover.begin)
        except BaseException:
            current.end()
            raise
        iteration = Iteration(
            run,
            partial(_interrupted, current, self._workers),
            partial(_release, current, progress),
            partial(progress.delivered, current),
            progress.exhausted,
            _as_is if mover is None else partial(_delivered, stalls, mover),
        )
        self._iterations.add(iteration)
        return iteration, progress

    def state_dict(self) -> dict[str, Any]:
        epoch, position = self._place()
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "position": None if position is None else position.to_state(),
        }

    def _place(self) -> tuple[int, Position | None]:
        if self._loaded is not None:
            return self._loaded.epoch, self._loaded
        if self._latest is not None:
            position = self._latest.position(self._dataset.next_epoch())
            return position.epoch, position
        return self._dataset.next_epoch(), None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position = _read_state(state, self._dataset)
        with self._changing:
            self._close_iterations()
            self._dataset.set_epoch(epoch)
            if position is not None:
                self._dataset.adopt(position)
            self._latest, self._loaded = None, position

    def set_epoch(self, epoch: int) -> None:
        epoch = checked_epoch(epoch)
        with self._changing:
            loaded = self._loaded
            if loaded is not None and loaded.samples and loaded.epoch != epoch:
                callers.warn(
                    f"set_epoch({epoch}): the state that was loaded is from the middle of epoch {loaded.epoch}, which "
                    f"continues; call set_epoch({loaded.epoch}), or nothing until that epoch is over"
                )
                return
            self._dataset.set_epoch(epoch)

    def stats(self) -> dict[str, Any]:
        if self._latest is None:
            return empty_stats(self._dataset.next_epoch())
        return self._latest.meter.stats()

    def batch_count(self) -> int:
        loader, dataset = self._loader(), self._dataset
        assert loader is not None, "a loader outlives the call of its __len__"
        return batch_count_of_rank(
            dataset.sample_count,
            dataset.ranks,
            dataset.tail,
            _size_of_entries(loader),
            loader.drop_last,
            dataset.partitions,
        )

    def close(self) -> None:
        with self._changing:
            try:
                self._close_iterations()
                if self._latest is not None:
                    self._latest.meter.stop()
            finally:
                if self._pool is not None:
                    self._pool.close()
                    self._pool = None
                if self._workers is not None:
                    self._workers.close()
                    self._workers = None
                self._dataset.close()

    def _close_iterations(self) -> None:
        for iteration in list(self._iterations):
            iteration.close()

    def _start(
        self, loader: LoaderSettings, current: EpochPass, stalls: Stalls, prepare: Callable[[Any], Any]
    ) -> ThreadedRun | InlineRun:
        finish = _finish(loader, self._dataset, current)
        where = where_batches_are_made(loader.workers, loader.num_workers, has_functions=finish.has_functions)
        self._workers = self._workers_for(loader, finish, where)
        make = _batch_function(current, finish, self._workers, prepare)
        if where == "caller":
            return InlineRun(current.feed, make, current.waits, stalls)
        pool = self._pool
        if pool is None or pool.is_inherited or pool.thread_count != loader.num_workers:
            if pool is not None:
                pool.close()
            pool = self._pool = DecodePool(loader.num_workers)
        depth = max(2, loader.num_workers * (loader.prefetch_factor or 2))
        task_s = TASK_S
        if self._workers is not None:
            task_s = 0.0 if loader.timeout else _TASK_OF_WORKERS_S  # a timeout is that of one batch
        return ThreadedRun(current.feed, make, pool, depth, current.waits, task_s=task_s, stalls=stalls)

    def _workers_for(self, loader: LoaderSettings, finish: Finish, where: str) -> Workers | None:
        """Those that there are, if they still fit; otherwise others, or none."""
        workers, self._workers = self._workers, None
        wanted = None if where not in ("process", "side") else _worker_options(loader, finish, where)
        if workers is not None and wanted == workers.options and workers.is_usable:
            return workers
        if workers is not None:
            workers.close()
        return None if wanted is None else Workers(wanted)


def _warning(dataset: DatasetBase, loader: LoaderSettings) -> Callable[[EpochPass], None]:
    """Warns that an epoch had nothing to give. It holds no reference to the loader."""
    batch_size, drop_last = loader.batch_size or 1, loader.drop_last

    def warn(current: EpochPass) -> None:
        dataset.warn_once(why_nothing_came(current.cursor, batch_size, drop_last=drop_last))

    return warn


@contextmanager
def _interrupted(current: EpochPass, workers: Workers | None) -> Iterator[None]:
    """While it is entered, waits for bytes or for workers end."""
    with current.interrupted(), workers.interrupted() if workers is not None else nullcontext():
        yield


def _release(current: EpochPass, progress: _Progress) -> None:
    """An iteration is over: its statistics are final, and its consumer may serve another."""
    try:
        progress.end()
    finally:
        current.end()


def _making(loader: LoaderSettings, dataset: DatasetBase, current: EpochPass) -> Making:
    decoders = (decoder for each in current.builder.sources for decoder in each.columns.decoders.values())
    consumer = current.sources[0].attached.consumer
    return Making(
        rank=dataset.ranks.rank,
        world_size=dataset.ranks.world_size,
        makers=max(1, loader.num_workers),
        decodes_images=any(isinstance(decoder, Image | WholeImage) for decoder in decoders),
        ram_bytes=consumer.buffer_count * consumer.chunk_bytes,
    )


def _delivered(stalls: Stalls, mover: Mover, moving: Any) -> Any:
    with stalls.own("transfer"):
        return mover.deliver(moving)


def where_batches_are_made(workers: str, num_workers: int, *, has_functions: bool) -> str:
    """In the "caller", a "thread", a "process" or on the "side"; `has_functions`: the user's Python is part of it."""
    if not num_workers:
        return "caller"
    if workers == "auto":
        return "process" if has_functions else "thread"
    return workers


def _finish(loader: LoaderSettings, dataset: DatasetBase, current: EpochPass) -> Finish:
    """What is done with gathered samples, as loader and data set say."""
    collate = loader.collate_fn if _is_custom(loader.collate_fn) else None
    if loader.batch_size is None:
        if dataset.on_batches:
            raise ConfigError("map_batch() functions need batches; give the loader a batch_size")
        return Finish(current.builder, "samples", collate)
    return Finish(current.builder, "batch", collate, dataset.on_batches)


def _worker_options(loader: LoaderSettings, finish: Finish, where: str) -> WorkerOptions:
    context = loader.multiprocessing_context
    if context is None or isinstance(context, str):
        context = torch.multiprocessing.get_context(context)
    processes, channels = (loader.num_workers, 1) if where == "process" else (1, loader.num_workers)
    return WorkerOptions(finish, processes, channels, loader.worker_init_fn, context, loader.timeout, loader.dataset)


def _batch_function(current: EpochPass, finish: Finish, workers: Workers | None, prepare: Callable[[Any], Any]) -> Make:
    """What makes a batch (or the one sample) of each entry, and then prepares it for its delivery."""
    here = partial(map, partial(finish, slots=current.slots))
    is_keyed = finish.has_functions

    def prepared(batch: Any) -> Any:
        if finish.gives == "samples":
            if not batch:
                return NOTHING
            (batch,) = batch
        if prepare is _as_is:
            return batch
        account = activity.current()
        before = account.switch("transfer")
        try:
            return prepare(batch)
        finally:
            account.switch(before)

    def make(entries: Sequence[Any]) -> Iterator[Any]:
        if workers is None:
            yield from map(prepared, current.make(entries, here, current.memory, is_keyed=is_keyed))
        else:
            with workers.lend() as channel:
                yield from map(prepared, current.make(entries, channel.call, channel.memory, is_keyed=is_keyed))

    return make


def _pinning(loader: LoaderSettings) -> Callable[[Any], Any]:
    """What pins a batch, where torch's loader would."""
    if not loader.pin_memory:
        return _as_is
    if torch.cuda.is_available():
        return pinned
    callers.warn(
        "pin_memory=True: there is no CUDA device here, so batches are not pinned; leave it out to silence this warning"
    )
    return _as_is


def _as_is(batch: Any) -> Any:
    return batch


def _is_custom(collate: Any) -> bool:
    """Whether `collate_fn` is the user's: torch fills in one of its own where none was given.

    One that the user gives by its name counts as none, too. They could be distinguished here, but frameworks that make
    a loader again pass the attribute, which names it in any case; and of batches of equal shape it makes the same.
    """
    return collate is not default_collate and collate is not default_convert


def _size_of_entries(loader: LoaderSettings) -> int:
    """Samples an entry: a batch, or one where samples are delivered, so that the position is exact."""
    return loader.batch_size or 1


def _check_arguments(loader: LoaderSettings, dataset: DatasetBase) -> None:
    if dataset.batch_size is not None and loader.batch_size != dataset.batch_size:
        raise ConfigError(
            f"batch_size={loader.batch_size} of the loader is not batch_size={dataset.batch_size} of its data set; "
            "give both the same, or the data set none"
        )
    has_functions = dataset.has_functions or _is_custom(loader.collate_fn)
    if loader.workers in ("process", "side") or (loader.workers == "auto" and has_functions):
        return  # they are for worker processes
    ignored = [
        name for name in ("worker_init_fn", "multiprocessing_context", "generator") if getattr(loader, name) is not None
    ]
    if loader.timeout:
        ignored.append(f"timeout={loader.timeout}")
    if not loader.in_order:
        ignored.append("in_order=False")
    if ignored:
        callers.warn(
            f"{', '.join(ignored)}: ignored for a StreamingDataset, whose batches are made by threads of this process "
            "that use no random state of Python, numpy or torch and keep their order; worker_init_fn, "
            'multiprocessing_context and timeout are heeded with workers="process"'
        )


def _read_state(state: Mapping[str, Any], dataset: DatasetBase) -> tuple[int, Position | None]:
    """The parts of a loader's state. Raises `StateError`."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != STATE_VERSION or not {"epoch", "position"} <= set(state):
        raise StateError(
            f"not a state of a fastload.DataLoader of version {STATE_VERSION} (version {version!r}); "
            "pass what its state_dict() returned"
        )
    epoch, position = state["epoch"], state["position"]
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise StateError(f"the state's epoch is {epoch!r}: it is damaged; load another one")
    if position is None:
        return epoch, None
    read = dataset.read_position(position)
    if read.epoch != epoch:
        raise StateError(f"the state is of epoch {epoch} and of epoch {read.epoch}: it is damaged; load another one")
    return epoch, read
