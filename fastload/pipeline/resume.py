"""Where an iteration over samples stands, for loaders that save data sets: torchdata's `StatefulDataLoader`.

A worker process has a part of its rank's batches (or samples), and only knows its own progress. It has delivered m
whole entries and some samples of the next. Entries are dealt to workers in rounds, so it continues where round m
begins, and leaves out what it has delivered of its part of that round.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from fastload import callers
from fastload.errors import StateError
from fastload.pipeline.gather import Skips
from fastload.plan import Cursor, Position

STATE_VERSION = 1


class _IterationStateJson(msgspec.Struct):
    """The JSON form. Fields can be added: unknown ones are left alone."""

    version: int
    epoch: int
    worker: int
    workers: int
    offset: int
    position: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class IterationState:
    """Begin `epoch` at `position` (None: at its beginning) as one of some workers, and leave out `offset` samples."""

    epoch: int
    worker: tuple[int, int] = (0, 1)
    position: Position | None = None
    offset: int = 0

    @property
    def is_within_epoch(self) -> bool:
        """Whether something of the epoch was delivered before."""
        return bool(self.offset) or (self.position is not None and self.position.samples > 0)

    def to_state(self) -> dict[str, Any]:
        """In JSON's own types."""
        position = None if self.position is None else self.position.to_state()
        return msgspec.to_builtins(_IterationStateJson(STATE_VERSION, self.epoch, *self.worker, self.offset, position))  # type: ignore[no-any-return]

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], read_position: Callable[[Mapping[str, Any]], Position]
    ) -> IterationState:
        """Reads what `to_state` wrote, also after a way through JSON. Raises `StateError`."""
        try:
            read = msgspec.convert(dict(state), _IterationStateJson)
        except (msgspec.ValidationError, TypeError, ValueError) as error:
            raise StateError(f"not a state of a fastload.StreamingDataset: {error}; load another one") from error
        if read.version != STATE_VERSION:
            raise StateError(
                f"the data set's state has version {read.version}, and this fastload reads version {STATE_VERSION}; "
                "load it with the fastload that saved it, or one that is newer"
            )
        if min(read.epoch, read.offset, read.worker) < 0 or read.worker >= read.workers:
            raise StateError("the data set's state is damaged: a count is out of range; load another one")
        position = None if read.position is None else read_position(read.position)
        if position is not None and position.epoch != read.epoch:
            raise StateError(
                f"the data set's state is of epoch {read.epoch} and of epoch {position.epoch}: it is "
                "damaged; load another one"
            )
        return cls(read.epoch, (read.worker, read.workers), position, read.offset)

    def check_worker(self, worker: tuple[int, int]) -> None:
        """Raise `StateError` where another worker would go on."""
        if worker != self.worker:
            raise StateError(
                f"the state was saved by worker {self.worker[0]} of {self.worker[1]}, and this is worker {worker[0]} "
                f"of {worker[1]}: a data set's state belongs to one worker; load it with the number of workers that "
                "saved it. (A fastload.DataLoader's own state can be loaded with any number.)"
            )


def why_nothing_came(cursor: Cursor[Any], batch_size: int = 1, *, drop_last: bool = False) -> str:
    """What to say where an epoch has ended and nothing of it was delivered to this rank."""
    if not cursor.total:
        return (
            "the epoch had no samples: all of its shards are empty, or files of tokens that are shorter than the "
            "length= of a sample; look at what is in them"
        )
    ranks = cursor.ranks.world_size
    share = f"{cursor.total} samples" + (f" for {ranks} ranks" if ranks > 1 else "")
    if drop_last and batch_size > 1:
        return (
            f"the epoch had no batch: its {share} are fewer than batch_size={batch_size} each, and drop_last=True "
            "leaves out a batch that is not full; lower batch_size, or leave drop_last out"
        )
    return f'this rank got no samples: there are {share}; use fewer ranks, or tail="pad"'


class Delivery:
    """Counts what an iteration has handed out, at no cost per sample."""

    def __init__(
        self,
        cursor: Cursor[Any],
        resumed: IterationState,
        workers: int,
        warn: Callable[[str], None] | None = None,
        skips: Skips | None = None,
    ) -> None:
        """`warn` is called where there was nothing to hand out; `skips` is notified of the end."""
        self._cursor, self._resumed, self._warn, self._skips = cursor, resumed, warn, skips
        self._round = cursor.batch_size * cursor.ranks.world_size * workers
        self._begun = 0  # entries that were begun
        self._size = 0  # of the last of these
        self._samples: Iterator[Any] = iter(())
        self._is_over = False

    def iterators(self, entries: Iterable[list[Any]]) -> Iterator[Iterator[Any]]:
        """An iterator over the samples of each entry; they are to be exhausted one after the other."""
        skipped, delivered = self._resumed.offset, 0
        try:
            for samples in entries:
                self._begun, self._size = self._begun + 1, len(samples)
                self._samples = iter(samples[skipped:])
                skipped, delivered = 0, delivered + self._size
                yield self._samples
        except Exception as error:
            if callers.is_for_the_user(error):
                raise callers.shortened(error)  # noqa: B904  # it is the same error
            raise
        self._is_over = True
        if self._skips is not None:
            self._skips.ended(self._cursor.epoch, delivered)
        if not self._begun and self._warn is not None:
            self._warn(why_nothing_came(self._cursor))

    def state(self) -> IterationState:
        """Where to continue."""
        resumed = self._resumed
        if not self._begun and not self._is_over:
            return resumed
        left = operator.length_hint(self._samples)
        whole, offset = (self._begun - 1, self._size - left) if left else (self._begun, 0)
        samples, total = self._cursor.start.samples + whole * self._round, self._cursor.total
        if total is not None and (self._is_over or samples > total):
            samples = total
        if samples == self._cursor.start.samples:
            return replace(resumed, offset=offset)
        return replace(resumed, position=self._cursor.position_at(samples), offset=offset)
