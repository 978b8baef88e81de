"""Samples as numbers: those of an open window, some of them in an order, and a batch of them.

A batch of a mixture has a part for each source and epoch of it from which samples come, which is an entry as of a data
set alone, and says how the parts interleave. So each part is made as any batch is, independently of the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from fastload.kernels.gather import fill_buckets, locate
from fastload.plan.order import WindowKey
from fastload.plan.permutation import Permutation

Origin = tuple[int, int]  # a source, and an epoch of it


# Neither this nor `Samples` is frozen, which would take up to a microsecond more to make.
@dataclass(slots=True, eq=False)
class BatchEntry:
    """One batch of one rank (or of one of its workers), as numbers.

    `number` counts the rank's batches through the epoch. Sample i is number `sample_no[i]` (int64) of object
    `object_no[i]` (int32). The last `repeats` samples are repeats made to fill the tail. All samples lie in
    `windows`, each named once, rising. `samples_after` is how far the sequence is delivered once every rank has this
    batch. All are of one `epoch` of one `source`: of a mixture's batch this is a part, and a batch of a data set that
    is read alone is its own only part.
    """

    number: int
    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]
    repeats: int
    windows: tuple[WindowKey, ...]
    samples_after: int
    source: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.object_no)

    @property
    def parts(self) -> tuple[BatchEntry, ...]:
        """Itself; see `MixtureEntry`."""
        return (self,)

    @property
    def part_of(self) -> NDArray[np.int32]:
        """The part of each sample, int32."""
        return np.zeros(len(self), np.int32)


_WINDOWS = 1 << 40  # above any window's number, so that partition and window fit one int64


class OpenWindow:
    """The samples of a window in the order of `permutation`, numbered through its `objects`, which hold `counts`."""

    def __init__(self, permutation: Permutation, objects: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
        self.permutation, self.objects = permutation, objects
        self._ends = np.cumsum(counts)
        assert len(permutation) == counts.sum(), f"an order of {len(permutation)} samples for {counts.sum()}"
        self._bucket_shift = (len(permutation) // max(1, len(objects))).bit_length()
        self._buckets = np.empty((len(permutation) >> self._bucket_shift) + 2, np.int32)
        fill_buckets(self._ends, self._bucket_shift, self._buckets)

    def located(self, offsets: NDArray[np.int64], key: WindowKey) -> Samples:
        """The samples at some offsets in the window's order."""
        numbers = np.ascontiguousarray(self.permutation[offsets])
        object_no = np.empty(len(numbers), np.int32)
        sample_no, window = np.empty_like(numbers), np.empty_like(numbers)
        locate(self._ends, self._buckets, self._bucket_shift, self.objects, numbers, object_no, sample_no)
        window.fill(key.partition * _WINDOWS + key.window)
        return Samples(object_no, sample_no, window, key[:2])


@dataclass(slots=True, eq=False)
class Samples:
    """Samples in order: object_no int32[n], sample_no int64[n], and the window of each as one number, int64[n]. All
    have one `origin`, but for those within `MixedSamples`, which keeps their origins itself.
    """

    object_no: NDArray[np.int32]
    sample_no: NDArray[np.int64]
    window: NDArray[np.int64]
    origin: Origin

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """One after the other; at least one part."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([part.object_no for part in parts]),
            np.concatenate([part.sample_no for part in parts]),
            np.concatenate([part.window for part in parts]),
            parts[0].origin,
        )

    def __len__(self) -> int:
        return len(self.object_no)

    def windows(self) -> tuple[WindowKey, ...]:
        """The windows in which they lie, each once, rising."""
        return _keys(self.origin, _each_once(self.window))

    def batch(self, number: int, repeats: int, samples_after: int) -> BatchEntry:
        """All of them as one batch, whose last `repeats` are repeats."""
        return BatchEntry(number, self.object_no, self.sample_no, repeats, self.windows(), samples_after, *self.origin)

    def batches(self, size: int, numbers: Iterable[int], samples_after: Iterable[int]) -> list[BatchEntry]:
        """Whole batches of `size` one after the other, without repeats; given for each are its number and
        `samples_after`.
        """
        starts = range(0, len(self), size)
        windows_of = self.windows_of_parts(np.full(len(starts), size), [self.origin] * len(starts))
        source, epoch = self.origin
        return [
            BatchEntry(
                number, self.object_no[i : i + size], self.sample_no[i : i + size], 0, windows, after, source, epoch
            )
            for i, number, windows, after in zip(starts, numbers, windows_of, samples_after, strict=True)
        ]

    def windows_of_parts(self, sizes: NDArray[np.int64], origins: Sequence[Origin]) -> list[tuple[WindowKey, ...]]:
        """`windows` of parts of these sizes and origins, one after the other; of empty parts that is meaningless. Few
        differ, and each is made once.
        """
        if len(self) and self.window.min() == self.window.max():  # often, and then there is nothing to look for
            only = {origin: _keys(origin, self.window[:1]) for origin in set(origins)}
            return [only[origin] for origin in origins]
        codes, count = _each_once(self.window), len(sizes)
        is_in = np.zeros((count, len(codes)), np.bool_)
        is_in[np.repeat(np.arange(count), sizes), np.searchsorted(codes, self.window)] = True
        rows, made = is_in.tobytes(), dict[tuple[Origin, bytes], tuple[WindowKey, ...]]()
        keys = {origin: _keys(origin, codes) for origin in set(origins)}
        windows = []
        for i, origin in enumerate(origins):
            row = origin, rows[i * len(codes) : (i + 1) * len(codes)]
            if row not in made:
                made[row] = tuple(compress(keys[origin], row[1]))
            windows.append(made[row])
        return windows

    def part(self, start: int, stop: int, step: int = 1) -> Samples:
        """Those from `start` to `stop`, or every `step`-th of them; views."""
        part = slice(start, stop, step)
        return Samples(self.object_no[part], self.sample_no[part], self.window[part], self.origin)

    def part_at(self, places: NDArray[np.int64]) -> Samples:
        """Those at `places`, in that order."""
        return Samples(self.object_no[places], self.sample_no[places], self.window[places], self.origin)

    def placed(self, places: NDArray[np.int64]) -> Samples:
        """Each moved to its place; `places` has every number from 0 on once."""
        moved = Samples(
            np.empty_like(self.object_no), np.empty_like(self.sample_no), np.empty_like(self.window), self.origin
        )
        moved.object_no[places], moved.sample_no[places] = self.object_no, self.sample_no
        moved.window[places] = self.window
        return moved

    def then(self, more: Samples) -> Samples:
        """These and `more` after them; a copy."""
        return Samples.joined((self, more))


def _each_once(codes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The codes, rising. As `np.unique`, which imports `numpy.ma` first: 12 ms before a process's first batch."""
    rising = np.sort(codes)
    found: NDArray[np.int64] = rising[np.diff(rising, prepend=rising[:1] - 1) != 0]
    return found


def _keys(origin: Origin, codes: NDArray[np.int64]) -> tuple[WindowKey, ...]:
    return tuple(WindowKey(*origin, *divmod(code, _WINDOWS)) for code in codes.tolist())


def no_samples(origin: Origin) -> Samples:
    return Samples(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int64), origin)


@dataclass(frozen=True, slots=True, eq=False)
class MixtureEntry:
    """One batch of one rank (or of one of its workers), as numbers.

    Sample i is the next one of `parts[part_of[i]]`, int32; parts rise by source and epoch. `number`, `repeats` and
    `samples_after` are those of a `BatchEntry`, and each part has them too, with the repeats that are its own.
    """

    number: int
    parts: tuple[BatchEntry, ...]
    part_of: NDArray[np.int32]
    repeats: int
    samples_after: int

    def __len__(self) -> int:
        return len(self.part_of)

    @property
    def windows(self) -> tuple[WindowKey, ...]:
        """The windows in which the samples lie, each once, rising."""
        return tuple(key for part in self.parts for key in part.windows)

    @property
    def source_of(self) -> NDArray[np.int32]:
        """The source of each sample, int32."""
        return np.array([part.source for part in self.parts], np.int32)[self.part_of]


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
        samples = Samples.joined([no_samples((0, 0)), *(samples for _, samples in parts)])
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
                BatchEntry(number, samples.object_no, samples.sample_no, again, windows, after, *origin)
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
        ends, windows = np.cumsum(sizes).tolist(), samples.windows_of_parts(sizes, self.origins * batches)
        parts = [
            (self.origins[place % count], samples.part(ends[place] - of_place, ends[place]), windows[place])
            for place, of_place in enumerate(sizes.tolist())
            if of_place
        ]
        # Not all places are taken, and a batch counts only those that are.
        is_taken = sizes.reshape(batches, count) > 0
        interleaved = (np.cumsum(is_taken, axis=1, dtype=np.int32) - 1).ravel()[place_of]
        return interleaved, parts, [0, *np.cumsum(is_taken.sum(axis=1)).tolist()]
