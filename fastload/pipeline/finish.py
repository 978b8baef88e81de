"""From gathered bytes to what the user gets: decoding, the user's functions, collating.

All that a batch needs of cache and plan is done when its bytes are gathered (`assemble`). What is left needs nothing
but them, so it can be done in the trainer's threads or in another process: a `Finish` pickles where the user's
functions do, and a `Gathered` always does.

Decoders that make random choices are given a key a sample, which follows from the data set's seed, the epoch and the
sample alone. The user's functions draw from the generators of Python, numpy and torch as they always do; where a
process is there for nothing else, these are seeded from the same keys before each call, so that what comes out does not
depend on which worker makes a batch, nor on how many there are, nor on where a run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from fastload import callers
from fastload.computed import computed
from fastload.decode import Decoder
from fastload.decode.keys import Keys
from fastload.decode.optional import Present, decode_optional
from fastload.decode.plain import Raw
from fastload.errors import ConfigError, DecodeError, MissingColumnError
from fastload.pipeline.columns import KEY, URL, ColumnSet
from fastload.pipeline.interleave import interleave
from fastload.transport.slots import Slots

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Function = Callable[[Any], Any]
Reseed = Callable[[int], None]
Batch = Any  # dict of column -> value, or a tuple of values; or what the user's functions make of it

# What is wrong with one sample, and nothing else.
SAMPLE_ERRORS = (DecodeError, MissingColumnError)
SOURCE = "__source__"


def _as_list(values: list[Any], *, collate_fn_map: Any = None) -> list[Any]:
    """What becomes of values the first of which is missing, as of bytes and text."""
    return values


class Names:
    """Keys and URLs of some samples, looked up once somebody asks."""

    def __init__(self, keys: Callable[[], list[str]], urls: Callable[[], list[str]]) -> None:
        self._keys, self._urls = keys, urls

    @computed
    def keys(self) -> list[str]:
        """The samples' keys."""
        return self._keys()

    @computed
    def urls(self) -> list[str]:
        """The URLs of their shards."""
        return self._urls()

    def place(self, number: int, column: str) -> str:
        """Where a value is, for an error."""
        return f"{self.urls[number]}: sample {self.keys[number]!r}, column {column!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _names, (self.keys, self.urls)


def _names(keys: list[str], urls: list[str]) -> Names:
    return Names(lambda: keys, lambda: urls)


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """`count` samples of one data set: for each column its values end to end, and their offsets int64[count + 1].

    `random_keys`: uint64[count], where something asks for them. `present`: of each optional column, bool[count]: which
    samples have it; its values are empty where they do not.
    """

    count: int
    names: Names
    columns: dict[str, tuple[Bytes, Ints]]
    random_keys: Keys | None
    present: dict[str, Present] = field(default_factory=dict)

    @property
    def seed(self) -> int | None:
        """A number that says which samples these are, and in which epoch; None where nothing asks for it."""
        return None if self.random_keys is None or not self.count else int(self.random_keys[0]) ^ self.count


@dataclass(frozen=True, slots=True, eq=False)
class GatheredParts:
    """Samples of several data sets: sample i is the next one of part `part_of[i]`; part k is of source `sources[k]`."""

    parts: list[Gathered]
    part_of: npt.NDArray[np.int32]
    sources: list[int]

    @property
    def seed(self) -> int | None:
        """As of one data set."""
        seeds = [part.seed for part in self.parts if part.seed is not None]
        return seeds[0] ^ len(self.part_of) if seeds else None


class Maker(Protocol):
    """What is made of gathered samples."""

    @property
    def is_mapped(self) -> bool:
        """Whether samples go through functions."""
        ...

    @property
    def has_optional(self) -> bool:
        """Whether samples may lack a column."""
        ...

    def batch(self, gathered: Any, slots: Slots) -> Batch:
        """All of them, as columns."""
        ...

    def samples(self, gathered: Any, reseed: Reseed) -> Iterator[Any]:
        """Each of them."""
        ...

    def origin(self, gathered: Any, number: int) -> tuple[Function, str]:
        """The function that one of them came from, and which it is, for an error."""
        ...


@dataclass(frozen=True, slots=True)
class OneMaker:
    """Makes batches of one data set, decoded, and samples that functions were applied to."""

    columns: ColumnSet
    functions: tuple[Function, ...] = ()

    @property
    def is_mapped(self) -> bool:
        """Whether samples go through functions."""
        return bool(self.functions)

    @property
    def has_optional(self) -> bool:
        """Whether samples may lack a column."""
        return bool(self.columns.optional)

    def batch(self, gathered: Gathered, slots: Slots) -> Batch:
        """A dict with `__key__` and `__url__`, or a tuple of the columns alone."""
        return _in_torch(self.arrays(gathered, slots))

    def arrays(self, gathered: Gathered, slots: Slots) -> Batch:
        """The same with arrays in place of tensors, each of which takes the GIL once more when it goes."""
        values = [self._decoded(gathered, name, slots) for name in gathered.columns]
        if self.columns.as_tuple:
            return tuple(values)
        return {
            KEY: gathered.names.keys,
            URL: gathered.names.urls,
            **dict(zip(gathered.columns, values, strict=True)),
        }

    def samples(self, gathered: Gathered, reseed: Reseed) -> Iterator[Any]:
        """The samples, one by one."""
        names = gathered.names
        columns = [
            (name, self.columns.decoder(name), memoryview(values.data), offsets.tolist(), gathered.present.get(name))
            for name, (values, offsets) in gathered.columns.items()
        ]
        keys = [None] * gathered.count if gathered.random_keys is None else gathered.random_keys.tolist()
        for number, (key, url, random_key) in enumerate(zip(names.keys, names.urls, keys, strict=True)):
            sample = {
                name: decoder.decode_one(
                    view[offsets[number] : offsets[number + 1]], names.place(number, name), random_key
                )
                if present is None or present[number]
                else decoder.missing()
                for name, decoder, view, offsets, present in columns
            }
            made = tuple(sample.values()) if self.columns.as_tuple else {KEY: key, URL: url, **sample}
            yield apply(self.functions, made, f"sample {key!r} of {url}", random_key, reseed)

    def origin(self, gathered: Gathered, number: int) -> tuple[Function, str]:
        """The last function, and the sample's key and URL."""
        return self.functions[-1], f"sample {gathered.names.keys[number]!r} of {gathered.names.urls[number]}"

    def _decoded(self, gathered: Gathered, name: str, slots: Slots) -> Any:
        values, offsets = gathered.columns[name]
        decoder: Decoder = self.columns.decoder(name)

        def where(number: int) -> str:
            return gathered.names.place(number, name)

        present = gathered.present.get(name)
        if present is not None:
            return decode_optional(decoder, values, offsets, present, where, gathered.random_keys, slots.take_array)
        if isinstance(decoder, Raw):
            return decoder.decode_owned(values, offsets, where)
        fixed = decoder.fixed()
        if fixed is not None:
            out = slots.take_array((gathered.count, *fixed[0]), fixed[1])
            decoder.decode_into(values, offsets, out, where, gathered.random_keys)
            return out
        return decoder.decode(values, offsets, where, gathered.random_keys)


def _in_torch(batch: Batch) -> Batch:
    """Arrays become tensors."""
    if isinstance(batch, tuple):
        return tuple(map(_value_in_torch, batch))
    return {name: _value_in_torch(value) for name, value in batch.items()}


def _value_in_torch(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@dataclass(frozen=True, slots=True)
class MixedMaker:
    """Makes batches of a mixture. `names`: of the columns of tuples, if its sources make tuples."""

    makers: tuple[OneMaker, ...]
    names: tuple[str, ...] | None
    functions: tuple[Function, ...] = ()

    @property
    def is_mapped(self) -> bool:
        """Whether samples of a source, or all, go through functions."""
        return bool(self.functions) or any(maker.is_mapped for maker in self.makers)

    @property
    def has_optional(self) -> bool:
        """Whether samples of a source may lack a column."""
        return any(maker.has_optional for maker in self.makers)

    def batch(self, gathered: GatheredParts, slots: Slots) -> Batch:
        """A dict with `__key__`, `__url__` and `__source__`, or a tuple of the columns alone."""
        sources = gathered.sources
        parts = [self.makers[n].arrays(part, slots) for n, part in zip(sources, gathered.parts, strict=True)]
        part_of = gathered.part_of
        if self.names is not None:
            columns = zip(self.names, zip(*parts, strict=True), strict=True)
            return _in_torch(tuple(interleave(name, values, part_of, slots) for name, values in columns))
        batch = {
            name: interleave(name, [part[name] for part in parts], part_of, slots)
            for name in _common_columns(sources, parts)
        }
        # Not by numpy's indexing, which lets go of the GIL.
        return _in_torch({**batch, SOURCE: np.array(list(map(sources.__getitem__, part_of.tolist())), np.int64)})

    def samples(self, gathered: GatheredParts, reseed: Reseed) -> Iterator[Any]:
        """The samples, one by one; dicts with `__source__`."""
        sources = gathered.sources
        parts = [self.makers[n].samples(part, reseed) for n, part in zip(sources, gathered.parts, strict=True)]
        keys = [
            repeat(None) if part.random_keys is None else iter(part.random_keys.tolist()) for part in gathered.parts
        ]
        for number in gathered.part_of.tolist():
            sample, key = next(parts[number]), next(keys[number])
            if isinstance(sample, dict):
                sample = {**sample, SOURCE: sources[number]}
            yield apply(self.functions, sample, f"a sample of source {sources[number]}", _of_step(key, 1), reseed)

    def origin(self, gathered: GatheredParts, number: int) -> tuple[Function, str]:
        """The last function, of the mixture or else of the source, and the sample's key and URL."""
        part = int(gathered.part_of[number])
        maker = self.makers[gathered.sources[part]]
        named = replace(maker, functions=(*maker.functions, *self.functions))
        return named.origin(gathered.parts[part], int(np.count_nonzero(gathered.part_of[:number] == part)))


def _common_columns(sources: Sequence[int], parts: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of all parts, in the order of the first. Raises `ConfigError` where they differ."""
    names = list(parts[0]) if parts else []
    for source, batch in zip(sources, parts, strict=True):
        if set(batch) != set(names):
            raise ConfigError(
                f"source {source} of the mixture has the columns {sorted(batch)}, and source "
                f"{sources[0]} has {sorted(names)}; give each the same with columns=[...] or decode={{...}}"
            )
    return names


@dataclass(frozen=True, slots=True)
class Finish:
    """What is done with gathered samples; call it.

    `gives`: "batch"; or "samples", a list of those that there are, which `collate`, if any, is applied to one by one.
    Batches of samples that functions or a `collate` of the user's are applied to are collated, by torch's
    `default_collate` where no other is given; `on_batches` are applied to batches in the end.
    """

    maker: Maker
    gives: Literal["batch", "samples"] = "batch"
    collate: Function | None = None
    on_batches: tuple[Function, ...] = field(default=())

    @property
    def has_functions(self) -> bool:
        """Whether anything of it is the user's."""
        return self.maker.is_mapped or self.collate is not None or bool(self.on_batches)

    def __call__(self, gathered: Any, slots: Slots, reseed: Reseed = lambda key: None) -> Any:
        """The batch, or the samples."""
        seed = gathered.seed
        if self.gives == "samples":
            collate = () if self.collate is None else (self.collate,)
            samples = self.maker.samples(gathered, reseed)
            return [apply(collate, sample, "a sample", _of_step(seed, 2), reseed) for sample in samples]
        batch = self._batch(gathered, slots, _of_step(seed, 2), reseed)
        return apply(self.on_batches, batch, "a batch", _of_step(seed, 3), reseed)

    def _batch(self, gathered: Any, slots: Slots, seed: int | None, reseed: Reseed) -> Any:
        if not self.maker.is_mapped and self.collate is None:
            return self.maker.batch(gathered, slots)
        samples = list(self.maker.samples(gathered, reseed))
        if self.collate is not None:
            return apply((self.collate,), samples, "the samples of a batch", seed, reseed)
        if not samples:
            return []
        for number, sample in enumerate(samples):
            if sample is None:
                function, which = self.maker.origin(gathered, number)
                raise ConfigError(
                    f"map({_name(function)}): it returned None for {which}; return the sample, or give the loader a "
                    "collate_fn that takes None"
                )
        if self.maker.has_optional:
            return collate(samples, collate_fn_map={**default_collate_fn_map, type(None): _as_list})
        return default_collate(samples)


def _of_step(key: int | None, step: int) -> int | None:
    """What to seed with before a later step, which would else draw what the functions on samples have drawn."""
    return None if key is None else (key + step * 0x9E3779B97F4A7C15) % (1 << 64)


def apply(functions: Sequence[Function], value: Any, what: str, key: int | None, reseed: Reseed) -> Any:
    """What the functions make of a value; where one fails, its error says of what."""
    if functions and key is not None:
        reseed(key)
    for function in functions:
        try:
            value = function(value)
        except Exception as error:
            callers.mark_as_users(error)
            error.add_note(f"in {_name(function)}, called with {what}")
            raise
    return value


def _name(function: Function) -> str:
    return str(getattr(function, "__qualname__", function))


def reseed_all(key: int) -> None:
    """Seed the generators of Python, numpy and torch; for processes that are there for nothing else."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # it is this global generator that users' functions draw from
    torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
