"""What the iterators over a foreign data set have in common: they begin where another was, and tell where they are.

`Resuming` lies between torch's iterators and their base, whose methods they call, so it acts at the right moments:
after the base has drawn the seed, before a worker is started; after it has asked for the sampler's iterator, before
that is asked for an index.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

from torch.utils.data.dataloader import _BaseDataLoaderIter, _InfiniteConstantSampler

from fastload.device import Mover
from fastload.errors import StateError
from fastload.torchloader.order import Order, OrderIterator
from fastload.torchloader.progress import Progress
from fastload.torchloader.randomness import generators_of
from fastload.torchloader.saved import Saved


class View:
    """A loader as torch's iterators see it: some of its attributes are others, and its sampler is its `Order`."""

    def __init__(self, loader: Any, **others: Any) -> None:
        self._loader = loader
        if not isinstance(loader.sampler, _InfiniteConstantSampler):
            self._index_sampler = Order(loader._index_sampler, generators_of(loader))
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class Resuming(_BaseDataLoaderIter):
    """An iteration. `saved`, where to begin, `progress` and `mover` have to be set before torch's constructor runs."""

    saved: Saved | None
    progress: Progress
    mover: Mover | None  # if batches are to arrive on a device

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._base_seed: int
        if self.saved is not None and self.saved.base_seed is not None:
            self._base_seed = self.saved.base_seed
        if self.saved is not None and self.saved.shared_seed is not None:
            self._shared_seed = self.saved.shared_seed
        if self.saved is not None and self.saved.is_finished and self.saved.next_epoch is not None:
            # Workers that live on draw no seed for another epoch.
            self.saved.next_epoch.restore(generators_of(loader))

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        begun_with = self._shared_seed
        super()._reset(loader, first_iter)
        if first_iter:  # torch draws another seed for data pipes, of which workers hear with the next epoch
            self._shared_seed = begun_with

    def __next__(self) -> Any:
        try:
            batch = super().__next__()
        except StopIteration:
            self.progress.is_finished = True
            raise
        self.progress.num_yielded = self._num_yielded
        return batch

    def discard(self, batches: int, failed: frozenset[int]) -> None:
        """Make that many batches, and nothing of them. In the turns that `failed`, errors are what was there then.

        Raises `StateError` where there are not so many.
        """
        for turn in range(batches + len(failed)):
            with suppress(Exception) if turn in failed else nullcontext():
                try:
                    next(self)
                except StopIteration:
                    raise StateError(
                        f"{batches} batches have to be made again to come to where the state was taken, and there are "
                        f"only {turn}: it belongs to another data set, sampler or batch size"
                    ) from None

    def delivered(self, batch: Any) -> Any:
        """What the user gets of a batch whose turn it is, before it counts as delivered."""
        return batch if self.mover is None else self.mover.deliver(batch)

    @property
    def order(self) -> OrderIterator | None:
        """The sampler's iterator; None for an iterable data set, which has none worth the name."""
        return self._sampler_iter if isinstance(self._sampler_iter, OrderIterator) else None

    def note_seeds(self) -> None:
        """What the progress tells of the iteration as a whole."""
        self.progress.length = self._IterableDataset_len_called
        self.progress.base_seed, self.progress.shared_seed = self._base_seed, self._shared_seed
