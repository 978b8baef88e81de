"""DataLoader: torch's, with a faster way for our own data sets.

A generic subclass of `torch.utils.data.DataLoader`, which is what frameworks test for and rebuild from its attributes.
For a `StreamingDataset` it makes whole batches in threads (`num_workers` of them; 0: in the calling thread), in plan
order, from the node's cache; for any other data set it is torch's loader unchanged.

The loader owns the position: `state_dict()` says which sample comes after the last batch that was *delivered*, whatever
is in flight, and a loader that loads it goes on exactly there.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch.utils.data
from torch.utils.data import default_collate, default_convert
from torch.utils.data._utils.pin_memory import pin_memory

from fastload.dataset import Pass, StreamingDataset
from fastload.engine.pool import DecodePool
from fastload.engine.run import InlineRun, ThreadedRun
from fastload.errors import ConfigError, StateError
from fastload.metrics import EpochMeter, empty_stats
from fastload.plan import BatchEntry, Position, batch_count_of_rank

T = TypeVar("T", covariant=True)

STATE_VERSION = 1


class DataLoader(torch.utils.data.DataLoader[T]):
    """torch's `DataLoader`, with its arguments. For a `StreamingDataset`:

    `batch_size` samples are one batch: a dict of column -> tensor, `fastload.Ragged` or list, or a tuple (see
    `StreamingDataset`). With `batch_size=None` it yields samples. A `collate_fn` of the user's gets the list of
    samples, as in torch. `num_workers` is a number of decode threads; `prefetch_factor` batches are ahead for each.
    `worker_init_fn`, `multiprocessing_context` and `generator` have no meaning for threads that share the process
    and use no random state, and are ignored with a warning.

    Raises `ConfigError` where `batch_size` is not the data set's, if that names one.
    """

    def __init__(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        self._stream = _Stream(self) if isinstance(dataset, StreamingDataset) else None

    def __iter__(self) -> Any:
        if self._stream is None:
            return super().__iter__()
        return self._stream.iterate()

    def __len__(self) -> int:
        """Batches of this rank in an epoch. TypeError, with the cure, while shards are not indexed."""
        if self._stream is None:
            return super().__len__()
        return self._stream.batch_count()

    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands, after the last batch that it delivered; JSON's own types."""
        return self._of_stream("state_dict").state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken. Raises `StateError` for what is no such state."""
        self._of_stream("load_state_dict").load_state_dict(state)

    def stats(self) -> dict[str, Any]:
        """Where samples came from and time went in this epoch; the keys are listed in docs/stats.md."""
        return self._of_stream("stats").stats()

    def close(self) -> None:
        """End the threads and the connection. May be called twice; iterating again starts them anew."""
        if self._stream is not None:
            self._stream.close()

    def check_worker_number_rationality(self) -> None:
        """torch's advice is about processes; ours are threads."""
        if not isinstance(self.dataset, StreamingDataset):
            super().check_worker_number_rationality()

    def _of_stream(self, method: str) -> _Stream:
        if self._stream is None:
            raise TypeError(
                f"{method}() needs a fastload.StreamingDataset; this loader's data set is {type(self.dataset).__name__}"
            )
        return self._stream


class _Stream:
    """What a loader of one of our data sets has beside torch's attributes: position, threads, figures.

    It reads the loader's attributes when an iteration begins, since frameworks set them late, and refers to the loader
    only weakly, so that a loader that is dropped ends its threads at once.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = weakref.ref(loader)
        self._dataset: StreamingDataset = loader.dataset  # type: ignore[assignment]
        self._pool: DecodePool | None = None
        self._epoch = self._dataset.next_epoch()
        self._position: Position | None = None  # None: the start of `_epoch`
        self._is_loaded = False
        self._meter: EpochMeter | None = None
        self._runs: weakref.WeakSet[_Epoch] = weakref.WeakSet()
        _check_arguments(loader, self._dataset)

    def iterate(self) -> _Epoch:
        """Begin an epoch: where a loaded state says, else the data set's next."""
        loader = self._loader()
        assert loader is not None, "a loader outlives the call of its __iter__"
        start = self._position if self._is_loaded else None
        self._is_loaded = False
        self._epoch, self._position = self._dataset.begin_epoch(), start
        current = self._dataset.begin(self._epoch, _size_of_entries(loader), drop_last=loader.drop_last, start=start)
        try:
            self._meter = EpochMeter(self._epoch, current.session.consumer, current.session.waits)
            run = _Epoch(self, current, self._start(loader, current), is_batched=loader.batch_size is not None)
        except BaseException:
            self._dataset.end(current)
            raise
        self._runs.add(run)
        return run

    def delivered(self, current: Pass, entry: BatchEntry) -> None:
        """A batch has reached the user."""
        self._position = current.cursor.position(entry)
        assert self._meter is not None
        self._meter.delivered(len(entry), entry.repeats)

    def exhausted(self, epoch: int) -> None:
        """An epoch is over."""
        self._epoch, self._position = epoch + 1, None

    def ended(self, current: Pass) -> None:
        """A run is over, exhausted or not."""
        if self._meter is not None:
            self._meter.stop()
        self._dataset.end(current)

    def state_dict(self) -> dict[str, Any]:
        position = self._position
        if position is None and not self._runs:
            self._epoch = self._dataset.next_epoch()
        return {
            "version": STATE_VERSION,
            "epoch": self._epoch,
            "position": None if position is None else position.to_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        epoch, position = _read_state(state)
        for run in list(self._runs):
            run.close()
        self._dataset.set_epoch(epoch)
        if position is not None:
            self._dataset.adopt(position)
        self._epoch, self._position, self._is_loaded = epoch, position, position is not None

    def stats(self) -> dict[str, Any]:
        if self._meter is None:
            return empty_stats(self._epoch)
        return self._meter.stats()

    def batch_count(self) -> int:
        loader, dataset = self._loader(), self._dataset
        assert loader is not None, "a loader outlives the call of its __len__"
        return batch_count_of_rank(
            dataset.sample_count, dataset.ranks, dataset.tail, _size_of_entries(loader), loader.drop_last
        )

    def close(self) -> None:
        for run in list(self._runs):
            run.close()
        if self._meter is not None:
            self._meter.stop()
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        self._dataset.close()

    def _start(self, loader: DataLoader[Any], current: Pass) -> ThreadedRun | InlineRun:
        make = _maker(loader, current)
        if not loader.num_workers:
            return InlineRun(current.feed, make)
        if self._pool is None or self._pool.thread_count != loader.num_workers:
            if self._pool is not None:
                self._pool.close()
            self._pool = DecodePool(loader.num_workers)
        depth = max(2, loader.num_workers * (loader.prefetch_factor or 2))
        return ThreadedRun(current.feed, make, self._pool, depth, current.session.waits)


class _Epoch(Iterator[Any]):
    """The iterator over one epoch. Ends what it started when it is exhausted, fails, is closed or is dropped.

    Dropping is the usual case (a `break` out of a for loop), and so is a script that ends in mid-epoch: a finalizer
    serves both, and runs before those of the threads, which would wait for work that is not given up.
    """

    def __init__(self, stream: _Stream, current: Pass, run: ThreadedRun | InlineRun, *, is_batched: bool) -> None:
        self._stream, self._current, self._run, self._is_batched = stream, current, run, is_batched
        self._finish = weakref.finalize(self, _finish, stream, current, run, os.getpid())

    def __next__(self) -> Any:
        if not self._finish.alive:
            raise StopIteration
        try:
            entry, made = next(self._run)
        except StopIteration:
            self._stream.exhausted(self._current.cursor.order.epoch)
            self.close()
            raise
        except BaseException:
            self.close()
            raise
        self._stream.delivered(self._current, entry)
        return made if self._is_batched else made[0]

    def close(self) -> None:
        """Stop. May be called twice."""
        self._finish()


def _finish(stream: _Stream, current: Pass, run: ThreadedRun | InlineRun, pid: int) -> None:
    """End a run and give back what it used; in a forked child both are the parent's."""
    if os.getpid() != pid:
        return
    try:
        with current.session.consumer.interrupted():
            run.close()
    finally:
        stream.ended(current)


def _maker(loader: DataLoader[Any], current: Pass) -> Callable[[BatchEntry], Any]:
    """What makes a batch (or the one sample) of an entry, and pins it where torch's loader would."""
    make = _unpinned_maker(loader, current)
    if not (loader.pin_memory and torch.cuda.is_available()):
        return make
    return lambda entry: pin_memory(make(entry))  # type: ignore[no-untyped-call]  # torch has no types here


def _unpinned_maker(loader: DataLoader[Any], current: Pass) -> Callable[[BatchEntry], Any]:
    assembler, collate = current.assembler, loader.collate_fn
    if loader.batch_size is None:
        return lambda entry: [collate(sample) if _is_custom(collate) else sample for sample in assembler.samples(entry)]
    if _is_custom(collate):
        return lambda entry: collate(list(assembler.samples(entry)))
    return assembler.batch


def _is_custom(collate: Any) -> bool:
    """Whether `collate_fn` is the user's: torch fills in one of its own where none was given."""
    return collate is not default_collate and collate is not default_convert


def _size_of_entries(loader: DataLoader[Any]) -> int:
    """Samples an entry: a batch, or one where samples are delivered, so that the position is exact."""
    return loader.batch_size or 1


def _check_arguments(loader: DataLoader[Any], dataset: StreamingDataset) -> None:
    if dataset.batch_size is not None and loader.batch_size != dataset.batch_size:
        raise ConfigError(
            f"batch_size={loader.batch_size} of the loader is not batch_size={dataset.batch_size} of its data set; "
            "give both the same, or the data set none"
        )
    ignored = [
        name for name in ("worker_init_fn", "multiprocessing_context", "generator") if getattr(loader, name) is not None
    ]
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)}: ignored for a StreamingDataset, whose batches are made by threads of this process "
            "that use no random state of Python, numpy or torch",
            stacklevel=4,
        )


def _read_state(state: Mapping[str, Any]) -> tuple[int, Position | None]:
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
    read = Position.from_state(position)
    if read.epoch != epoch:
        raise StateError(f"the state is of epoch {epoch} and of epoch {read.epoch}: it is damaged; load another one")
    return epoch, read
