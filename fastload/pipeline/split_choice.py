"""Which of the shards under a prefix are read, where there are splits: by their names, or as Energon's files say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastload.errors import ConfigError
from fastload.formats import energon, format_of, splits
from fastload.formats.energon import Splits
from fastload.store.listing import expand
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The prefixes among URLs, and which split is read of what is under each."""

    prefixes: tuple[str, ...]
    split: str | None

    @classmethod
    def of(cls, urls: Sequence[str], split: str | None) -> Prefixes:
        """ConfigError where a split is named of what is no prefix."""
        prefixes = []
        for url in urls:
            # Only what ends so may stand for prefixes; other patterns may stand for a million shards.
            names = expand(url) if url.endswith(("/", "}")) else [url]
            prefixes += [name for name in names if name.endswith("/")]
            other = next((name for name in names if not name.endswith("/")), None)
            if split is not None and other is not None:
                raise ConfigError(
                    f"split={split!r} is one of those under a prefix, and {other} is no prefix; write the folder with "
                    '"/" at the end, or leave split out'
                )
        return cls(tuple(dict.fromkeys(prefixes)), split)

    def choose(self, shards: ObjectTable, energon_of: Callable[[str], Energon | None]) -> Chosen:
        """The shards that are read, as `energon_of` a prefix says, or where that is None their names. ConfigError: see
        `list_shards`.
        """
        if not self.prefixes:
            return Chosen.all_of(shards)
        urls = [url for rows in shards.rows() for url, *_ in rows]
        parts = [self._under(prefix, urls, energon_of(prefix)) for prefix in self.prefixes]
        return Chosen.all_of(shards) if self.split is None else Chosen.joined(parts)

    def _under(self, prefix: str, urls: list[str], about: Energon | None) -> Chosen:
        if about is None and self.split is None:
            there = splits.usual_splits(url[len(prefix) :] for url in urls if url.startswith(prefix))
            if there:
                raise splits.several(prefix, there)
            return Chosen([], [])
        numbers = [number for number, url in enumerate(urls) if url.startswith(prefix)]
        names = [urls[number][len(prefix) :] for number in numbers]
        if about is not None:
            return about.chosen(dict(zip(names, numbers, strict=True)), self.split, prefix)
        assert self.split is not None, "it was asked above"
        at = splits.chosen(names, self.split, prefix)
        return Chosen([numbers[each] for each in at], [-1] * len(at))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The numbers of some shards, the samples that each should hold (-1: unknown), and keys that are excluded by the
    place of their shard among these.
    """

    numbers: list[int]
    sample_counts: list[int]
    excluded: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def all_of(cls, shards: ObjectTable) -> Chosen:
        return cls(list(range(len(shards))), [-1] * len(shards))

    @classmethod
    def joined(cls, parts: Sequence[Chosen]) -> Chosen:
        firsts = np.cumsum([0, *(len(part.numbers) for part in parts)]).tolist()
        return cls(
            [number for part in parts for number in part.numbers],
            [count for part in parts for count in part.sample_counts],
            shifted((part.excluded for part in parts), firsts),
        )


@dataclass(frozen=True, slots=True)
class Energon:
    """What Energon's files under a prefix say of the shards there."""

    splits: Splits
    sample_counts: Mapping[str, int]

    @classmethod
    def under(cls, prefix: str, files: Mapping[str, ObjectInfo], read: Callable[[ObjectInfo], bytes]) -> Energon | None:
        """Those under a prefix, where they are among `files`, which are by URL."""

        def first(names: Sequence[str]) -> ObjectInfo | None:
            urls = (f"{prefix}{energon.FOLDER}{name}" for name in names)
            return next((files[url] for url in urls if url in files), None)

        of_splits, of_counts = first(energon.SPLIT_FILES), first(energon.COUNT_FILES)
        if of_splits is None:
            return None
        counts = {} if of_counts is None else energon.counts(read(of_counts), of_counts.url)
        return cls(Splits.read(read(of_splits), of_splits.url), counts)

    def chosen(self, numbers: Mapping[str, int], split: str | None, prefix: str) -> Chosen:
        """The shards of a split; `numbers` are those of all shards by name."""
        there = list(self.splits.parts)
        if split is None:
            raise splits.several(prefix, there, f" ({self.splits.url})")
        if split not in there:
            raise splits.unknown(split, prefix, there)
        names = self.splits.shards(split)
        lacking = next((name for name in names if name not in numbers), None)
        if lacking is not None:
            raise ConfigError(
                f"{self.splits.url} names {lacking}, which is no shard under {prefix}; upload it, or correct the split"
            )
        keys = self.splits.samples(names)
        other = next((name for name in keys if format_of(name) != "tar"), None)
        if other is not None:
            raise ConfigError(
                f"{self.splits.url} excludes samples of {other}, and single ones are left out of tars only"
            )
        # What the counts say of a shard is no promise where some of its samples are left out.
        counts = [-1 if name in keys else self.sample_counts.get(name, -1) for name in names]
        excluded = {at: keys[name] for at, name in enumerate(names) if name in keys}
        return Chosen([numbers[name] for name in names], counts, excluded)


def shifted(parts: Iterable[Mapping[int, tuple[str, ...]]], firsts: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """All of several, whose numbers begin with these."""
    pairs = zip(firsts, parts, strict=False)
    return {first + number: keys for first, part in pairs for number, keys in part.items()}
