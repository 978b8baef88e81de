"""DataLoader: torch's, faster.

A generic subclass of `torch.utils.data.DataLoader`, which is what frameworks test for and rebuild from its attributes.
For a `StreamingDataset` it makes whole batches in threads (`num_workers` of them; 0: in the calling thread), in plan
order, from the node's cache (`loader_stream`); any other data set is read in torch's own way (`torchloader`).

The loader owns the position: `state_dict()` says which sample comes after the last batch that was *delivered*, whatever
is in flight, and a loader that loads it goes on exactly there.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack, get_args, overload

import torch.utils.data
from torch.utils.data import Dataset, Sampler

from fastload.arguments import checked_batch_size, checked_count
from fastload.callers import public
from fastload.dataset_base import BatchOf, Columns, DatasetBase, Result, Row, Unsaid
from fastload.device import checked_device
from fastload.errors import ConfigError
from fastload.loader_stream import Stream
from fastload.torchloader.reading import Reading

T = TypeVar("T", covariant=True)

WorkersMode = Literal["auto", "thread", "process", "side"]

_TORCH_KNOWS_IN_ORDER = "in_order" in inspect.signature(torch.utils.data.DataLoader).parameters


class DataLoader(torch.utils.data.DataLoader[T]):
    """torch's `DataLoader`, with its arguments and checks, for any data set; and `workers`, `state_dict()` and
    `close()`.

    Data sets that are not ours, map-style or iterable, are read as torch reads them: the same batches, order, seeds and
    `get_worker_info()`. `workers="process"`, which "auto" means for them, is `num_workers` processes, from which
    batches cross in memory that is used again. `workers="thread"` is as many threads of this process, for data sets
    that spend their time outside Python, are too large for each worker to have, or cannot be pickled. They share
    `dataset` and `collate_fn`; of an iterable or stateful data set, or with a `worker_init_fn`, each has a copy of all
    three. Threads leave Python's, numpy's and torch's global random numbers alone: `get_worker_info()` has a seed.

    Of data sets with a state of their own, workers report it at least every `snapshot_every_n_steps` batches (0 or
    None: only at first): for states that are too large to be copied with each. `state_dict()` is as exact, but loading
    one makes the batches since the last report again. With `in_order=False`, or persistent workers for a map-style
    data set, they report it with each all the same. Without workers, and for data sets of fastload's, it has no
    effect.

    For a `StreamingDataset` or a `Mixture`, `batch_size` samples are one batch: a dict of column -> tensor,
    `fastload.Ragged` or list, or a tuple (see `StreamingDataset`). With `batch_size=None` it yields samples, each
    gathered by itself: for many small ones iterate the data set instead. A `collate_fn` of the user's gets the list of
    samples, as in torch.

    `num_workers` decode threads make these batches (0: the calling thread); `prefetch_factor` batches are ahead for
    each, or as many groups of batches where a group of up to 64 takes milliseconds. Where functions of the user's are
    part of it (`map`, `map_batch`, `collate_fn`), as many worker processes do, so that they leave the trainer alone.
    `workers` says otherwise: "thread" for functions that spend their time outside Python or have to share its memory,
    "process", or "side" for one process with so many threads. Whichever it is, batches, order and state are the same.
    `worker_init_fn`, `multiprocessing_context` and `timeout` are for processes: threads, which share the trainer's, use
    no random state and end by themselves, ignore them, `generator` and `in_order=False` with a warning.

    With a CUDA `device`, "cuda" for the current one, batches arrive there: they are pinned, as by `pin_memory`, and
    copied ahead of their delivery on a stream of their own. For the stream that is current on delivery they are like
    any other tensors. At most two are ahead on the device. docs/dataloader.md says what is moved. "cpu" is as None.

    Raises `ConfigError` for `workers="side"` with a data set that is not ours, where `batch_size` is not the data
    set's, if that names one, and for a `device` that is not here or is no CUDA device.

    For fastload's data sets `shuffle=True` is the data set's `shuffle=True`, where that says nothing of it: order and
    state are the same, and `loader.dataset` is one that shuffles, with the epochs of the one given. False and None
    leave it to the data set. A `sampler` or `batch_sampler` is a `ConfigError`: samplers are for `dataset.indexed()`.

    With `with`, it is closed in the end.
    """

    if TYPE_CHECKING:  # what a `collate_fn` makes is unknown; the arguments behind it are listed once more for that

        class _More(TypedDict, total=False):
            pin_memory: bool
            drop_last: bool
            timeout: float
            worker_init_fn: Callable[[int], None] | None
            multiprocessing_context: Any
            generator: torch.Generator | None
            prefetch_factor: int | None
            persistent_workers: bool
            pin_memory_device: str
            in_order: bool
            workers: WorkersMode
            device: torch.device | str | None
            snapshot_every_n_steps: int | None

    @overload
    def __init__(
        self,
        dataset: Dataset[T],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: None = None,
        **more: Unpack[_More],
    ) -> None: ...

    @overload
    def __init__(
        self: DataLoader[Any],
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        **more: Unpack[_More],
    ) -> None: ...

    @public
    def __init__(
        self,
        dataset: Dataset[T],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
        workers: WorkersMode = "auto",
        device: torch.device | str | None = None,
        snapshot_every_n_steps: int | None = 1,
    ) -> None:
        # Each name is spelt out: frameworks read the signature, and make a loader again from its attributes.
        _check_dataset(dataset)
        self.workers = _checked_workers(workers, dataset)
        _check_types(
            num_workers=(num_workers, _is_whole, "a whole number; 0 makes batches in the calling thread"),
            prefetch_factor=(prefetch_factor, _is_whole_or_none, "a whole number of batches for each worker, or None"),
            timeout=(timeout, _is_number, "a number of seconds; 0 waits as long as it takes"),
            collate_fn=(collate_fn, _is_function, "a function of the list of samples, or None"),
            worker_init_fn=(worker_init_fn, _is_function, "a function of a worker's number, or None"),
            pin_memory=(pin_memory, _is_no_text, "True or False"),
            drop_last=(drop_last, _is_no_text, "True or False"),
            persistent_workers=(persistent_workers, _is_no_text, "True or False"),
            in_order=(in_order, _is_no_text, "True or False"),
        )
        checked_device(device)
        self.device = device
        self.snapshot_every_n_steps = _checked_interval(snapshot_every_n_steps)
        self.in_order = in_order
        if isinstance(dataset, DatasetBase):
            _check_samplers(sampler, batch_sampler)
            _check_ours(batch_size, num_workers, prefetch_factor)
            if _checked_shuffle(shuffle, dataset):
                dataset = dataset.shuffled()  # also for who makes a loader again from this one's attributes
            shuffle = None  # torch refuses it for any iterable data set
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            **_in_order(in_order),
        )
        self._stream = Stream(self) if _is_ours(dataset) else None
        self._reading = Reading()  # of a data set that is not ours

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts with no iteration, no state and no threads."""
        return {**self.__dict__, "_stream": None, "_reading": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stream = Stream(self) if _is_ours(self.dataset) else None
        self._reading = Reading()

    @overload
    def __iter__(self: DataLoader[Unsaid]) -> Any: ...

    @overload
    def __iter__(self: DataLoader[Row]) -> Iterator[dict[str, Any]]: ...

    @overload
    def __iter__(self: DataLoader[Columns]) -> Iterator[tuple[Any, ...]]: ...

    @overload
    def __iter__(self: DataLoader[BatchOf[Result]]) -> Iterator[Result]: ...

    @overload
    def __iter__(self) -> Any: ...

    @public
    def __iter__(self) -> Any:
        if self._stream is None:
            return super().__iter__()
        return self._stream.iterate()

    def _get_iterator(self) -> Any:
        self.check_worker_number_rationality()
        return self._reading.iterator(self)

    @public
    def __len__(self) -> int:
        """Batches of this rank in an epoch. TypeError, with the cure, while shards are not indexed."""
        if self._stream is None:
            return super().__len__()
        return self._stream.batch_count()

    @public
    def state_dict(self) -> dict[str, Any]:
        """Where this loader stands, after the last batch that it delivered; JSON's own types.

        Of a data set that is not ours, in the layout of torchdata's StatefulDataLoader; what a data set or sampler says
        of itself is in it as it is.
        """
        return self._reading.state_dict(self) if self._stream is None else self._stream.state_dict()

    @public
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration where `state` was taken. Raises `StateError` for what is no such state."""
        if self._stream is None:
            self._reading.load_state_dict(self, state)
        else:
            self._stream.load_state_dict(state)

    @public
    def set_epoch(self, epoch: int) -> None:
        """The next iteration is epoch `epoch`; it goes on in the middle where a state from there was loaded.

        For a data set that is not ours, the `set_epoch` of the data set and the sampler is called, where they have one.
        """
        if self._stream is not None:
            self._stream.set_epoch(epoch)
            return
        for each in (self.dataset, self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)):
            set_epoch = getattr(each, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    @public
    def peek(self) -> Any:
        """The first batch that the next `iter()` will give. Epoch, state, and what that `iter()` gives stay the same.

        With torch.distributed, to be called by all ranks. With functions of the user's and `num_workers=0`, what they
        draw from the global generators is drawn. `ConfigError` where the epoch has no batch.
        """
        return self._of_stream("peek").peek()

    @public
    def stats(self) -> dict[str, Any]:
        """Where samples came from and time went in this epoch, and why it is slow; the keys are listed in
        docs/stats.md. Of a data set that is not ours, what its waits tell.
        """
        return self._reading.stats() if self._stream is None else self._stream.stats()

    @public
    def close(self) -> None:
        """End threads, processes and connection. Idempotent; iterating again starts them again."""
        if self._stream is not None:
            self._stream.close()
        else:
            self._reading.close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        of = f"<{type(self.dataset).__name__}>" if self._stream is None else self.dataset
        said = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        others = {"workers": "auto", "drop_last": False, "device": None}
        said |= {name: getattr(self, name) for name, usual in others.items() if getattr(self, name) != usual}
        return f"DataLoader({of}, {', '.join(f'{name}={value!r}' for name, value in said.items())})"

    def check_worker_number_rationality(self) -> None:
        """torch's advice is about processes, not about threads."""
        if not _is_ours(self.dataset) and self.workers != "thread":
            super().check_worker_number_rationality()

    def _of_stream(self, method: str) -> Stream:
        if self._stream is None:
            raise TypeError(
                f"{method}() needs a fastload.StreamingDataset; this loader's data set is {type(self.dataset).__name__}"
            )
        return self._stream


def _is_ours(dataset: Any) -> bool:
    """Whether we make the batches. A subclass that yields samples of its own making keeps torch's way."""
    return isinstance(dataset, DatasetBase) and type(dataset).__iter__ is DatasetBase.__iter__


def _checked_shuffle(shuffle: Any, dataset: DatasetBase) -> bool | None:
    if not isinstance(shuffle, bool | None):
        raise ConfigError(
            f"shuffle={shuffle!r} of a loader must be True, False or None; write "
            f"{type(dataset).__name__}(..., shuffle={shuffle!r}), whose documentation lists the ways to shuffle"
        )
    if shuffle and not _is_ours(dataset):
        raise ConfigError(
            f"shuffle=True: {type(dataset).__name__} has an __iter__ of its own, which a loader cannot shuffle; "
            "give shuffle=True where the data set is made"
        )
    return shuffle


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, str | os.PathLike) and ("/" in str(dataset) or ".tar" in str(dataset)):
        raise ConfigError(
            f"dataset={dataset!r} is a URL or path, which would be read letter by letter; write "
            f"fastload.StreamingDataset({str(dataset)!r})"
        )
    if dataset is None or isinstance(dataset, type):
        raise ConfigError(
            f"dataset={dataset!r} is no data set; give an object, such as fastload.StreamingDataset(urls)"
        )


def _check_types(**given: tuple[Any, Callable[[Any], bool], str]) -> None:
    """What torch does not look at before it is used, which is late, in another place or in another process."""
    for name, (value, is_right, meant) in given.items():
        if not is_right(value):
            raise ConfigError(f"{name}={value!r} must be {meant}")


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__")


def _is_whole_or_none(value: Any) -> bool:
    return value is None or hasattr(value, "__index__")


def _is_number(value: Any) -> bool:
    return hasattr(value, "__float__")


def _is_no_text(value: Any) -> bool:
    """Whether it can be meant as True or False: "no" is as true as "yes"."""
    return not isinstance(value, str)


def _is_function(value: Any) -> bool:
    return value is None or callable(value)


def _check_ours(batch_size: Any, num_workers: Any, prefetch_factor: Any) -> None:
    """For our data sets torch's checks are too few: it takes 0 batches ahead, and True for a number."""
    checked_batch_size(batch_size)
    if isinstance(num_workers, bool):
        raise ConfigError(f"num_workers={num_workers!r} must be a whole number, such as {int(num_workers)}")
    if prefetch_factor is not None:
        checked_count(prefetch_factor, "prefetch_factor")


def _check_samplers(sampler: Any, batch_sampler: Any) -> None:
    for name, given in (("sampler", sampler), ("batch_sampler", batch_sampler)):
        if given is not None:
            raise ConfigError(
                f"{name}={type(given).__name__}: a data set of fastload's has an order of its own, and divides itself "
                f"among ranks and workers; leave {name} out and say shuffle=True, or read samples by number with "
                f"DataLoader(dataset.indexed(), {name}=...)"
            )


def _checked_workers(workers: Any, dataset: Any) -> WorkersMode:
    if workers not in get_args(WorkersMode):
        raise ConfigError(f'workers={workers!r} must be "auto", "thread", "process" or "side"')
    if workers == "side" and not _is_ours(dataset):
        raise ConfigError(
            f'workers="side" is for a StreamingDataset or a Mixture, not for {type(dataset).__name__}; '
            'give "process" or "thread"'
        )
    checked: WorkersMode = workers
    return checked


def _checked_interval(snapshot_every_n_steps: Any) -> int | None:
    steps: int | None = snapshot_every_n_steps
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
        raise ConfigError(f"snapshot_every_n_steps={steps!r} must be a number of batches, or None")
    return steps


def _in_order(in_order: bool) -> dict[str, Any]:
    """The argument for torch's constructor: releases before 2.6 know it not."""
    return {"in_order": in_order} if _TORCH_KNOWS_IN_ORDER else {}
