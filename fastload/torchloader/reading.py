"""How a `DataLoader` reads a data set that is not ours: what the loader holds of it, beside torch's attributes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch.utils.data.dataloader import _DatasetKind

from fastload import callers
from fastload.torchloader.order import is_stateful, state_of
from fastload.torchloader.processes import Processes
from fastload.torchloader.progress import Progress
from fastload.torchloader.randomness import Randomness, generators_of, global_kept
from fastload.torchloader.resuming import Resuming
from fastload.torchloader.saved import Saved, State, read, told_to_user
from fastload.torchloader.single import Single
from fastload.torchloader.threads import Threads
from fastload.torchloader.unbegun import is_known_unbegun, unbegun_state
from fastload.torchloader.working import Working


class Reading:
    """The position of a loader over a foreign data set, which is that of the iteration that began last.

    It does not keep that one alive, so that workers end as soon as the user has let go of it; its progress it does.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._latest: Callable[[], Resuming | None] = lambda: None
        self._loaded: tuple[State, Saved] | None = None  # where the next iteration begins
        self._prepared: Resuming | None = None  # the next iteration, which was begun for its state
        self._has_warned = False

    def iterator(self, loader: Any) -> Any:
        """Begin an iteration."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            return prepared
        loaded, self._loaded = self._loaded, None
        iterator = _begun(loader, None if loaded is None else loaded[1])
        self._progress, self._latest = iterator.progress, weakref.ref(iterator)
        return iterator

    def state_dict(self, loader: Any) -> State:
        """Where the last iteration is; where the next will begin, if a state was loaded or there was none."""
        if self._loaded is not None:
            return self._loaded[0]
        if self._progress is None and is_known_unbegun(loader):
            return unbegun_state(loader)
        if self._progress is None:
            self._prepared = self.iterator(loader)
        assert self._progress is not None, "there was an iteration"
        latest = self._latest()
        if isinstance(latest, Working):
            latest.tell_states()
        state, reasons = told_to_user(self._progress.state())
        if not is_stateful(loader.dataset):  # else it was asked, in whichever worker
            state_of(loader.dataset, reasons)
        for each in (loader.sampler, loader.batch_sampler):
            state_of(each, reasons)
        if reasons and not self._has_warned:
            self._has_warned = True
            callers.warn(
                f"the state of a loader over {type(loader.dataset).__name__} leaves out what one of its parts says of "
                f"where it is: {reasons[0]}. It is read as torch's loader reads it, and a loader that resumes from the "
                "state reads and discards what came before. To resume without that, it needs state_dict() and "
                "load_state_dict(state), as in torchdata"
            )
        return state

    def load_state_dict(self, loader: Any, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken."""
        self._prepared = self._loaded = None
        if state != {}:  # as torchdata: which is to begin at the beginning
            is_iterable = bool(loader._dataset_kind == _DatasetKind.Iterable)
            saved = read(state, loader.dataset, is_iterable, loader.num_workers)
            self._loaded = dict(state), saved
        loader._iterator = None  # with persistent workers: they cannot be told

    def close(self, loader: Any) -> None:
        """End workers that wait for the next epoch."""
        waiting, loader._iterator = (self._prepared, loader._iterator), None
        self._prepared = None
        for iterator in waiting:
            if isinstance(iterator, Working):
                iterator._shutdown_workers()


def _begun(loader: Any, saved: Saved | None) -> Resuming:
    kind = _kind(loader)
    if saved is None:
        return kind(loader)
    if not saved.is_finished:
        with nullcontext() if kind is Single else global_kept():  # that one knows what to keep
            return kind(loader, saved)
    if loader.num_workers and not loader.persistent_workers:
        return _of_next_epoch(loader, saved, lambda: kind(loader))
    if loader.num_workers and saved.discard and saved.num_workers == loader.num_workers:
        return _of_next_epoch(loader, saved, lambda: _led_to_its_end(loader, saved, kind))
    if loader.num_workers:
        return _of_next_epoch(loader, saved, lambda: kind(loader, saved))
    Single(loader, saved)  # the data set is told where it was
    return _of_next_epoch(loader, saved, lambda: Single(loader))


def _kind(loader: Any) -> type[Single] | type[Processes] | type[Threads]:
    if not loader.num_workers:
        return Single
    return Threads if loader.workers == "thread" else Processes


def _led_to_its_end(loader: Any, saved: Saved, kind: Callable[[Any, Saved], Any]) -> Any:
    """The epoch after one that was over, with workers whose last states were not told: they go there again."""
    before = Randomness.now(generators_of(loader))
    iterator = kind(loader, replace(saved, is_finished=False))
    for _ in iterator:  # nothing comes any more
        pass
    before.restore(generators_of(loader))
    iterator._reset(loader)
    return iterator


def _of_next_epoch(loader: Any, saved: Saved, begin: Callable[[], Resuming]) -> Resuming:
    """The epoch after one that was over, in the order in which it would have followed."""
    if saved.next_epoch is None:
        return begin()
    generators = generators_of(loader)
    before = Randomness.now(generators)
    saved.next_epoch.restore(generators)
    iterator = begin()
    if iterator.order is not None:
        iterator.order.settle()
    # Where the user's numbers were those that the order was drawn from, they go on from there.
    before.restore_global_where_not(saved.next_epoch)
    return iterator
