"""Samples of a mixture as numbers: in the order of the line, and cut into batches.

A batch has a part for each source and epoch of it from which samples come, which is an entry as of a data set alone,
and says how the parts interleave. So each part is made as any batch is, and nobody needs to know of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastload.plan.samples import BatchEntry, Samples


class MixtureKey(NamedTuple):
    """A window of a mixture: which source, which epoch of it, and partition and number there."""

    source: int
    epoch: int
    partition: int
    window: int


class MixturePart(NamedTuple):
    """The samples of a batch that come from one epoch of one source, in their order."""

    source: int
    epoch: int
    entry: BatchEntry


@dataclass(frozen=True, slots=True, eq=False)
class MixtureEntry:
    """One batch of one rank (or of one of its workers), as numbers.

    Sample i is the next one of `parts[part_of[i]]`, int32; parts rise by source and epoch. `number`, `repeats` and
    `samples_after` are those of a `BatchEntry`, and each part has them too, with the repeats that are its own.
    """

    number: int
    parts: tuple[MixturePart, ...]
    part_of: NDArray[np.int32]
    repeats: int
    samples_after: int

    def __len__(self) -> int:
        return len(self.part_of)

    @property
    def windows(self) -> tuple[MixtureKey, ...]:
        """The windows in which the samples lie, each once, rising."""
        return tuple(MixtureKey(source, epoch, *key) for source, epoch, entry in self.parts for key in entry.windows)

    @property
    def source_of(self) -> NDArray[np.int32]:
        """The source of each sample, int32."""
        return np.array([part.source for part in self.parts], np.int32)[self.part_of]


_ROUNDS = 1 << 40  # above any round's number, so that source and round fit one int64


def origin_of(source: int, round_no: int) -> int:
    """Source and round as one number."""
    return source * _ROUNDS + round_no


@dataclass(frozen=True, slots=True, eq=False)
class MixedSamples:
    """Samples of a mixture in order, and of each where it is from: source and round as one number, `origin` int64[n].
    The first round of a source is its epoch `first_epoch`.
    """

    samples: Samples
    origin: NDArray[np.int64]
    first_epoch: int

    def __len__(self) -> int:
        return len(self.origin)

    def part(self, start: int, stop: int, step: int = 1) -> MixedSamples:
        """Those from `start` to `stop`, or every `step`-th of them; views."""
        return MixedSamples(self.samples.part(start, stop, step), self.origin[start:stop:step], self.first_epoch)

    def then(self, more: MixedSamples) -> MixedSamples:
        """These and `more` after them; a copy."""
        origin = np.concatenate([self.origin, more.origin])
        return MixedSamples(self.samples.then(more.samples), origin, self.first_epoch)

    def batch(self, number: int, repeats: int, samples_after: int) -> MixtureEntry:
        """All of them as one batch, whose last `repeats` are repeats."""
        return self._batches(len(self), [number], [samples_after], repeats)[0]

    def batches(self, size: int, numbers: Iterable[int], samples_after: Iterable[int]) -> list[MixtureEntry]:
        """Whole batches of `size` one after the other, without repeats; given for each are its number and
        `samples_after`.
        """
        return self._batches(size, list(numbers), list(samples_after), 0)

    def _batches(
        self, size: int, numbers: Sequence[int], samples_after: Sequence[int], repeats: int
    ) -> list[MixtureEntry]:
        """Batches of `size`, each of which ends with so many repeats."""
        batch_of = np.repeat(np.arange(len(numbers)), size)
        # Parts one after the other, batch by batch; samples of a part keep their order.
        by_part = np.lexsort((self.origin, batch_of))
        origin, in_parts = self.origin[by_part], self.samples.part_at(by_part)
        is_first = np.ones(len(origin), np.bool_)
        is_first[1:] = (origin[1:] != origin[:-1]) | (batch_of[1:] != batch_of[:-1])
        starts = np.flatnonzero(is_first)
        sizes = np.diff(starts, append=len(origin))
        part_of = np.empty(len(origin), np.int32)
        first_part = np.searchsorted(starts, np.arange(0, len(origin), size))  # of each batch
        part_of[by_part] = np.cumsum(is_first) - 1 - first_part[batch_of]
        windows, spans = in_parts.windows_of_parts(sizes), zip(starts.tolist(), sizes.tolist(), strict=True)
        parts = [
            (*divmod(code, _ROUNDS), in_parts.object_no[i : i + n], in_parts.sample_no[i : i + n], keys)
            for (i, n), code, keys in zip(spans, origin[starts].tolist(), windows, strict=True)
        ]
        entries, bounds = [], [*first_part.tolist(), len(parts)]
        for i, (number, after) in enumerate(zip(numbers, samples_after, strict=True)):
            interleaved = part_of[i * size : (i + 1) * size]
            repeated = np.bincount(interleaved[size - repeats :], minlength=bounds[i + 1] - bounds[i]).tolist()
            of_batch = tuple(
                MixturePart(source, self.first_epoch + round_no, BatchEntry(number, objects, nos, again, keys, after))
                for (source, round_no, objects, nos, keys), again in zip(
                    parts[bounds[i] : bounds[i + 1]], repeated, strict=True
                )
            )
            entries.append(MixtureEntry(number, of_batch, interleaved, repeats, after))
        return entries
