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

from fastload.plan.samples import NO_SAMPLES, BatchEntry, Samples
from fastload.plan.tally import WindowKey


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


Origin = tuple[int, int]  # a source, and an epoch of it
_Part = tuple[Origin, Samples, tuple[WindowKey, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class MixedSamples:
    """Samples of a mixture in order, and where each is from: sample i from `origins[origin_of[i]]`. Origins rise."""

    samples: Samples
    origin_of: NDArray[np.int64]
    origins: tuple[Origin, ...]

    @classmethod
    def joined(cls, parts: Sequence[tuple[Origin, Samples]], places: Sequence[NDArray[np.int64]]) -> MixedSamples:
        """Parts of one origin each, whose samples come at `places`, which are all from 0 on."""
        origins = tuple(sorted({origin for origin, _ in parts}))
        index = {origin: number for number, origin in enumerate(origins)}
        samples = Samples.joined([NO_SAMPLES, *(samples for _, samples in parts)])
        all_places = np.concatenate([np.empty(0, np.int64), *places])
        origin_of = np.empty(len(samples), np.int64)
        origin_of[all_places] = np.repeat(
            np.array([index[origin] for origin, _ in parts], np.int64), [len(samples) for _, samples in parts]
        )
        return cls(samples.placed(all_places), origin_of, origins)

    def __len__(self) -> int:
        return len(self.origin_of)

    def part(self, start: int, stop: int, step: int = 1) -> MixedSamples:
        """Those from `start` to `stop`, or every `step`-th of them; views."""
        return MixedSamples(self.samples.part(start, stop, step), self.origin_of[start:stop:step], self.origins)

    def then(self, more: MixedSamples) -> MixedSamples:
        """These and `more` after them; a copy."""
        origins = tuple(sorted({*self.origins, *more.origins}))
        of_each = [np.array([origins.index(origin) for origin in each.origins], np.int64) for each in (self, more)]
        origin_of = np.concatenate([of_each[0][self.origin_of], of_each[1][more.origin_of]])
        return MixedSamples(self.samples.then(more.samples), origin_of, origins)

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
        interleaved, parts, bounds = self._parts(size, len(numbers))
        entries = []
        for i, (number, after) in enumerate(zip(numbers, samples_after, strict=True)):
            order, of_batch = interleaved[i * size : (i + 1) * size], parts[bounds[i] : bounds[i + 1]]
            repeated = [0] * len(of_batch)
            for part in order[size - repeats :].tolist():
                repeated[part] += 1
            made = tuple(
                MixturePart(*origin, BatchEntry(number, samples.object_no, samples.sample_no, again, windows, after))
                for (origin, samples, windows), again in zip(of_batch, repeated, strict=True)
            )
            entries.append(MixtureEntry(number, made, order, repeats, after))
        return entries

    def _parts(self, size: int, batches: int) -> tuple[NDArray[np.int32], list[_Part], list[int]]:
        """For each sample its part of its batch, the parts of all batches, and which of them each batch begins with."""
        count = len(self.origins)
        # Places for a part of each origin in each batch; numpy sorts small integers by their digits.
        place_of = np.repeat(np.arange(batches) * count, size) + self.origin_of
        by_place = np.argsort(place_of.astype(np.min_scalar_type(batches * count)), kind="stable")
        samples, sizes = self.samples.part_at(by_place), np.bincount(place_of, minlength=batches * count)
        ends, windows = np.cumsum(sizes).tolist(), samples.windows_of_parts(sizes)
        parts = [
            (self.origins[place % count], samples.part(ends[place] - of_place, ends[place]), windows[place])
            for place, of_place in enumerate(sizes.tolist())
            if of_place
        ]
        # Not all places are taken, and a batch counts only those that are.
        is_taken = sizes.reshape(batches, count) > 0
        interleaved = (np.cumsum(is_taken, axis=1, dtype=np.int32) - 1).ravel()[place_of]
        return interleaved, parts, [0, *np.cumsum(is_taken.sum(axis=1)).tolist()]
