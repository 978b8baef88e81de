"""From gathered bytes to what the user gets: decoding, interleaving, the user's functions, collating.

Everything that needs the cache or the plan is done when the bytes are gathered (see `gather`). The rest needs only the
bytes, so it can run in the trainer's threads or in another process: a `Finish` can be pickled where the user's
functions can, and gathered samples always can.

Decoders that make random choices get a key for each sample, which depends on the data set's seed, the epoch and the
sample alone. The user's functions draw from the generators of Python, numpy and torch as usual; in worker processes
these are seeded from the same keys before each call, so that the result depends neither on which worker makes a batch,
nor on how many there are, nor on where a run was resumed.

A batch of a mixture is made of parts, one for each source: sample i is the next one of part `part_of[i]`. A column must
be of one kind in all parts. Arrays and `Ragged` are copied once; lists are not copied.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise, repeat
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data._utils.collate import collate, collate_tensor_fn, default_collate_fn_map

from fastload import callers
from fastload.decode import Decoder
from fastload.decode.base import Keys
from fastload.decode.optional import Present, decode_optional
from fastload.errors import ConfigError, DecodeError, MissingColumnError
from fastload.kernels.interleave import interleave_offsets, interleave_rows, interleave_values
from fastload.kernels.yielding import yield_state
from fastload.pipeline.columns import ANY, KEY, URL, ColumnSet
from fastload.pipeline.names import Names
from fastload.ragged import Ragged, presence, unchecked
from fastload.strings import Strings
from fastload.timing import activity
from fastload.timing.activity import Account
from fastload.transport.bulk_copy import stack_into
from fastload.transport.pickling import is_plain
from fastload.transport.slots import SMALL_BYTES, Slots

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Function = Callable[[Any], Any]
Reseed = Callable[[int], None]
PartOf = npt.NDArray[np.int32]
Batch = Any  # dict of column -> value, or a tuple of values; or what the user's functions make of it
# Errors that concern one sample alone.
SAMPLE_ERRORS = (DecodeError, MissingColumnError)
SOURCE = "__source__"
# In place of a sample that a filter has left out.
_LEFT_OUT = object()


class Filter:
    """A function on samples that leaves some out: those for which the user's function says nothing true."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self.__qualname__ = f"filter({_name(function)})"

    def __call__(self, sample: Any) -> Any:
        return sample if self._function(sample) else _LEFT_OUT


def _as_list(values: list[Any], *, collate_fn_map: Any = None) -> list[Any]:
    """Collates a column whose first value is missing as bytes and text are: into a list."""
    return values


class ColumnFunctions:
    """A function on samples that applies the user's functions of bytes to columns (`decode={"jpg": function}`)."""

    def __init__(self, columns: ColumnSet) -> None:
        self._functions = dict(columns.functions)
        self._rows = None if columns.names is None else {name: row for row, name in enumerate(columns.names)}
        named = ", ".join(f"{name!r}: {_name(function)}" for name, function in self._functions.items())
        self.__qualname__ = f"decode={{{named}}}"

    def of_column(self, name: Any) -> str:
        """What the user wrote for one column; all of it for another."""
        return f"decode={{{name!r}: {_name(self._functions[name])}}}" if name in self._functions else self.__qualname__

    def __call__(self, sample: Any) -> Any:
        if isinstance(sample, dict):
            for name, function in self._functions.items():
                if sample[name] is not None:  # a column that samples may lack
                    sample[name] = function(sample[name])
            return sample
        values = list(sample)
        assert self._rows is not None, "tuples have named columns"
        for name, function in self._functions.items():
            row = self._rows[name]
            if values[row] is not None:
                values[row] = function(values[row])
        return tuple(values)


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """`count` samples of one data set: for each column its values end to end, and their offsets int64[count + 1].

    They are those of `names` from number `first` on. `random_keys`: uint64[count], where something needs them.
    `present`: of each optional column, bool[count]: which samples have it; its values are empty where they do not.
    `decoders`: of columns for which the user declared none, what their format says. `kinds`: of those for which the
    user declared one, and which their format has as numbers, how these are stored.
    """

    count: int
    names: Names
    columns: dict[str, tuple[Bytes, Ints]]
    random_keys: Keys | None
    present: dict[str, Present] = field(default_factory=dict)
    first: int = 0
    decoders: dict[str, Decoder] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> Strings:
        """The samples' keys."""
        return Strings(self.names.keys, self.first, self.first + self.count)

    @property
    def urls(self) -> Strings:
        """The URLs of their shards."""
        return Strings(self.names.urls, self.first, self.first + self.count)

    def place(self, number: int, column: str) -> str:
        """Where a value is, for an error of its decoder."""
        place = self.names.place(self.first + number, column)
        kind = self.kinds.get(column)
        return place if kind is None else f"{place} (stored as {kind}: a number without decode=, so leave it out there)"

    def split(self, sizes: Sequence[int]) -> Iterator[Gathered]:
        """The samples in parts of these sizes, one after the other; views."""
        bounds = list(accumulate(sizes, initial=0))
        edges = {name: offsets[bounds].tolist() for name, (_, offsets) in self.columns.items()}
        for number, (start, stop) in enumerate(pairwise(bounds)):
            part = slice(start, stop)
            columns = {}
            for name, (values, offsets) in self.columns.items():
                low, high = edges[name][number : number + 2]
                columns[name] = values[low:high], offsets[start : stop + 1] - low
            present = {name: there if there is None else there[part] for name, there in self.present.items()}
            keys = None if self.random_keys is None else self.random_keys[part]
            more = self.first + start, self.decoders, self.kinds
            yield Gathered(stop - start, self.names, columns, keys, present, *more)

    @property
    def seed(self) -> int | None:
        """A number that says which samples these are, and in which epoch; None where nothing asks for it."""
        return None if self.random_keys is None or not self.count else int(self.random_keys[0]) ^ self.count


@dataclass(frozen=True, slots=True, eq=False)
class GatheredBatch:
    """The samples of a batch. Part k is of source `sources[k]`, and sample i is the next one of part `part_of[i]`;
    `part_of` is None for a data set that is read alone, whose batches have one part.
    """

    parts: list[Gathered]
    sources: list[int]
    part_of: PartOf | None = None

    @property
    def seed(self) -> int | None:
        """A number that says which samples these are, and in which epoch; None where nothing asks for it."""
        if self.part_of is None:
            return self.parts[0].seed
        seeds = [part.seed for part in self.parts if part.seed is not None]
        return seeds[0] ^ len(self.part_of) if seeds else None


@dataclass(frozen=True, slots=True)
class SourceBuilder:
    """Decodes the samples of one source, and applies its functions to them."""

    columns: ColumnSet
    functions: tuple[Function, ...] = ()

    def arrays(self, gathered: Gathered, slots: Slots) -> Batch:
        """A dict with `__key__` and `__url__`, or a tuple of the columns alone: arrays, since each tensor takes the GIL
        once more when it is dropped.
        """
        if self.columns.all_optional:
            raise ConfigError(
                f"columns=[{ANY!r}]: samples have different columns, so that a batch has none by itself; name those "
                "to read, or make samples alike by map(function)"
            )
        values = [self._decoded(gathered, name, slots) for name in gathered.columns]
        if self.columns.as_tuple:
            return tuple(values)
        return {
            KEY: gathered.keys,
            URL: gathered.urls,
            **dict(zip(gathered.columns, values, strict=True)),
        }

    def samples(self, gathered: Gathered, reseed: Reseed) -> Iterator[Any]:
        """The samples, one by one, with `_LEFT_OUT` in place of those that a filter leaves out."""
        columns = [
            (
                name,
                gathered.decoders.get(name) or self.columns.decoder(name),
                memoryview(values.data),
                offsets.tolist(),
                gathered.present.get(name),
            )
            for name, (values, offsets) in gathered.columns.items()
        ]
        keys = [None] * gathered.count if gathered.random_keys is None else gathered.random_keys.tolist()
        account = activity.current()
        for number, (key, url, random_key) in enumerate(zip(gathered.keys, gathered.urls, keys, strict=True)):
            sample = {
                name: decoder.decode_one(
                    view[offsets[number] : offsets[number + 1]], gathered.place(number, name), random_key
                )
                if present is None or present[number]
                else decoder.missing()
                for name, decoder, view, offsets, present in columns
            }
            made = tuple(sample.values()) if self.columns.as_tuple else {KEY: key, URL: url, **sample}
            if self.functions:
                what = f"sample {key!r} of {url}"
                made = _mapped(account, number, self.functions, made, what, random_key, reseed)
            yield made

    def _decoded(self, gathered: Gathered, name: str, slots: Slots) -> Any:
        values, offsets = gathered.columns[name]
        decoder = gathered.decoders.get(name) or self.columns.decoder(name)

        def where(number: int) -> str:
            return gathered.place(number, name)

        present = gathered.present.get(name)
        if present is not None:
            return decode_optional(decoder, values, offsets, present, where, gathered.random_keys, slots.take_array)
        if decoder.is_in_place:
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
class Mixing:
    """What a mixture adds to its sources: `names` of the columns of tuples, if they make tuples, and `functions` on
    samples.
    """

    names: tuple[str, ...] | None
    functions: tuple[Function, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchBuilder:
    """Makes batches and samples of one data set that is read alone, or (`mixing`) of a mixture."""

    sources: tuple[SourceBuilder, ...]
    mixing: Mixing | None = None

    @property
    def is_mapped(self) -> bool:
        """Whether samples of a source, or all, go through functions."""
        return any(builder.functions for builder in self.sources) or bool(self.mixing and self.mixing.functions)

    @property
    def is_filtered(self) -> bool:
        """Whether samples of a source, or of all, go through a filter."""
        functions = [*(each for builder in self.sources for each in builder.functions)]
        functions += () if self.mixing is None else self.mixing.functions
        return any(isinstance(function, Filter) for function in functions)

    @property
    def has_optional(self) -> bool:
        """Whether samples of a source may lack a column."""
        return any(builder.columns.optional or builder.columns.all_optional for builder in self.sources)

    def batch(self, gathered: GatheredBatch, slots: Slots) -> Batch:
        """A dict with `__key__` and `__url__`, of a mixture `__source__` too; or a tuple of the columns alone."""
        sources, part_of = gathered.sources, gathered.part_of
        parts = [self.sources[n].arrays(part, slots) for n, part in zip(sources, gathered.parts, strict=True)]
        if self.mixing is None or part_of is None:
            return _in_torch(parts[0])
        activity.current().switch("collate")
        if self.mixing.names is not None:
            columns = zip(self.mixing.names, zip(*parts, strict=True), strict=True)
            return _in_torch(tuple(interleave(name, values, part_of, slots) for name, values in columns))
        batch = {
            name: interleave(name, [part[name] for part in parts], part_of, slots)
            for name in _common_columns(sources, parts)
        }
        # Not by numpy's indexing, which lets go of the GIL.
        return _in_torch({**batch, SOURCE: np.array(list(map(sources.__getitem__, part_of.tolist())), np.int64)})

    def samples(self, gathered: GatheredBatch, reseed: Reseed) -> Iterator[Any]:
        """The samples that filters leave, one by one; those of a mixture, if they are dicts, with `__source__`."""
        sources = gathered.sources
        parts = [self.sources[n].samples(part, reseed) for n, part in zip(sources, gathered.parts, strict=True)]
        if self.mixing is None or gathered.part_of is None:
            samples = parts[0]
        else:
            samples = self._mixed(gathered, gathered.part_of.tolist(), parts, self.mixing.functions, reseed)
        return _kept(samples, activity.current()) if self.is_filtered else samples

    def names_of(self, sample: tuple[Any, ...]) -> Sequence[Any]:
        """What the values of a tuple are called; their numbers, where functions have made other tuples."""
        names = self.sources[0].columns.names if self.mixing is None else self.mixing.names
        return range(len(sample)) if names is None or len(names) != len(sample) else list(names)

    def may_lack(self, name: Any) -> bool:
        """Whether samples without that column have None there."""
        return any(source.columns.all_optional or name in source.columns.optional for source in self.sources)

    def origin(self, gathered: GatheredBatch, number: int, name: Any = None) -> tuple[str, str]:
        """The last function that a sample, or its column `name`, went through, and the sample's key and URL, for an
        error.
        """
        part, functions = 0, () if self.mixing is None else self.mixing.functions
        if gathered.part_of is not None:
            part = int(gathered.part_of[number])
            number = int(np.count_nonzero(gathered.part_of[:number] == part))
        samples = gathered.parts[part]
        functions = (*self.sources[gathered.sources[part]].functions, *functions)
        last = next((each for each in reversed(functions) if not isinstance(each, Filter)), functions[-1])
        said = last.of_column(name) if isinstance(last, ColumnFunctions) else f"map({_name(last)})"
        return said, f"sample {samples.keys[number]!r} of {samples.urls[number]}"

    @staticmethod
    def _mixed(
        gathered: GatheredBatch,
        part_of: list[int],
        parts: list[Iterator[Any]],
        functions: tuple[Function, ...],
        reseed: Reseed,
    ) -> Iterator[Any]:
        sources = gathered.sources
        keys = [
            repeat(None) if part.random_keys is None else iter(part.random_keys.tolist()) for part in gathered.parts
        ]
        account = activity.current()
        for turn, number in enumerate(part_of):
            sample, key = next(parts[number]), next(keys[number])
            if isinstance(sample, dict):
                sample = {**sample, SOURCE: sources[number]}
            if functions and sample is not _LEFT_OUT:
                what = f"a sample of source {sources[number]}"
                sample = _mapped(account, turn, functions, sample, what, _of_step(key, 1), reseed)
            yield sample


def _kept(samples: Iterator[Any], account: Account) -> Iterator[Any]:
    """Without those that filters left out. The account counts these once all are made: a batch that fails is made
    again.
    """
    left_out = 0
    for sample in samples:
        if sample is _LEFT_OUT:
            left_out += 1
        else:
            yield sample
    account.filtered += left_out


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

    `gives`: "batch"; or "samples", a list, to each of which `collate` is applied, if there is one.
    Batches of samples that functions or a `collate` of the user's are applied to are collated, by torch's
    `default_collate` where no other is given; `on_batches` are applied to batches in the end.
    """

    builder: BatchBuilder
    gives: Literal["batch", "samples"] = "batch"
    collate: Function | None = None
    on_batches: tuple[Function, ...] = field(default=())

    @property
    def has_functions(self) -> bool:
        """Whether functions of the user are part of it."""
        return self.builder.is_mapped or self.collate is not None or bool(self.on_batches)

    def __call__(self, gathered: GatheredBatch, slots: Slots, reseed: Reseed = lambda key: None) -> Any:
        """The batch, or the samples. What the thread's account is at afterwards is the caller's to say."""
        account = activity.current()
        if account.cause != "decode":
            account.switch("decode")
        seed = gathered.seed
        if self.gives == "samples":
            samples = self.builder.samples(gathered, reseed)
            if self.collate is None:
                return list(samples)
            collated = []
            for sample in samples:
                account.switch("collate")
                collated.append(apply((self.collate,), sample, "a sample", _of_step(seed, 2), reseed))
                account.switch("decode")
            return collated
        batch = self._batch(gathered, slots, _of_step(seed, 2), reseed, account)
        if self.on_batches:
            account.switch("map")
        return apply(self.on_batches, batch, "a batch", _of_step(seed, 3), reseed)

    def _batch(self, gathered: GatheredBatch, slots: Slots, seed: int | None, reseed: Reseed, account: Account) -> Any:
        if not self.builder.is_mapped and self.collate is None:
            return self.builder.batch(gathered, slots)
        samples = list(self.builder.samples(gathered, reseed))
        account.switch("collate")
        if self.collate is not None:
            return apply((self.collate,), samples, "the samples of a batch", seed, reseed)
        if not samples:
            return []
        for number, sample in enumerate(samples):
            if sample is None:
                function, which = self.builder.origin(gathered, number)
                if self.builder.is_filtered:  # which it is of those that were kept
                    which = "a sample of a batch"
                raise ConfigError(
                    f"{function}: it returned None for {which}; return the sample, or give the loader a "
                    "collate_fn that takes None"
                )
        try:
            return self._collated(samples, slots)
        except (TypeError, RuntimeError, ValueError, KeyError) as error:
            reason = self._why_none(samples, gathered) or _why_unlike(samples) or _why_ragged(samples)
            if reason is None:
                raise
            raise ConfigError(reason) from error

    def _why_none(self, samples: list[Any], gathered: GatheredBatch) -> str | None:
        """What to say where a batch failed since a function made None of a value; None where it failed otherwise."""
        for number, sample in enumerate(samples):
            values = {}
            if isinstance(sample, tuple):
                values = dict(zip(self.builder.names_of(sample), sample, strict=True))
            elif isinstance(sample, dict):
                values = sample
            name = next((each for each in values if values[each] is None and not self.builder.may_lack(each)), None)
            if name is None:
                continue
            function, which = self.builder.origin(gathered, number, name)
            if isinstance(sample, dict) and KEY in sample and URL in sample:
                which = f"sample {sample[KEY]!r} of {sample[URL]}"
            elif self.builder.is_filtered:  # which it is of those that were kept
                which = "a sample of a batch"
            return (
                f"{function}: it returned None for column {name!r} of {which}; return a value, leave such samples out "
                "by filter(function) of the data set, or give the loader a collate_fn that takes None"
            )
        return None

    def _collated(self, samples: list[Any], slots: Slots) -> Any:
        functions: dict[Any, Function] = {**default_collate_fn_map}
        if functions[torch.Tensor] is collate_tensor_fn:  # not one that the user has registered
            functions[torch.Tensor] = partial(_stacked, slots)
        if self.builder.has_optional:
            functions[type(None)] = _as_list
        return collate(samples, collate_fn_map=functions)


def _why_unlike(samples: list[Any]) -> str | None:
    """What to say where a batch failed since its samples are dicts with different columns; None where they are not."""
    if not all(isinstance(sample, dict) for sample in samples):
        return None
    names = list(samples[0])
    other = next((list(sample) for sample in samples if set(sample) != set(names)), None)
    if other is None:
        return None
    return (
        f"samples of a batch have the columns {names}, and others of it {other}; let the functions given to map() "
        "return the same for each, also where they are of several sources of a mixture, or give the loader a collate_fn"
    )


def _why_ragged(samples: list[Any]) -> str | None:
    """What to say where a batch failed since arrays of a column differ in shape; None where none do."""
    if not all(isinstance(sample, dict) for sample in samples):
        return None
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if all(isinstance(value, (np.ndarray, torch.Tensor)) for value in values):
            shapes = list(dict.fromkeys(tuple(value.shape) for value in values))
            if len(shapes) > 1:
                return (
                    f"arrays of column {name!r} have the shapes {shapes[0]} and {shapes[1]}, and samples that map() or "
                    "filter() have seen are put together by torch's default_collate, which wants one shape; pad them "
                    "in a function given to map(), leave the column out (columns=[...]), or give the loader a "
                    "collate_fn"
                )
    return None


def _stacked(slots: Slots, tensors: Sequence[torch.Tensor], *, collate_fn_map: Any = None) -> torch.Tensor:
    """The tensors of a column in a slot, which costs no page faults, and no second copy where it goes to a process."""
    first, byte_count = tensors[0], len(tensors) * tensors[0].nbytes
    if (
        type(first) is not torch.Tensor
        or not is_plain(first)
        or byte_count < SMALL_BYTES
        # Of several dtypes torch makes one that fits all.
        or any(each.requires_grad or each.dtype != first.dtype for each in tensors)
    ):
        return collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)  # type: ignore[no-any-return]
    out = torch.frombuffer(slots.take(byte_count), dtype=first.dtype).view(len(tensors), *first.shape)
    return stack_into(out, tensors)


def _of_step(key: int | None, step: int) -> int | None:
    """The seed of a later step, which would otherwise draw the same numbers as the functions on samples."""
    return None if key is None else (key + step * 0x9E3779B97F4A7C15) % (1 << 64)


def apply(functions: Sequence[Function], value: Any, what: str, key: int | None, reseed: Reseed) -> Any:
    """The value after all functions, or up to a filter that leaves it out; where one fails, a note on its error says
    for which value.
    """
    if functions and key is not None:
        reseed(key)
    for function in functions:
        if value is _LEFT_OUT:
            break
        try:
            try:
                value = function(value)
            except StopIteration as error:  # it would look like the end of the epoch
                raise RuntimeError(f"{_name(function)} raised StopIteration") from error
        except Exception as error:
            callers.mark_as_users(error)
            error.add_note(f"in {_name(function)}, called with {what}")
            raise
    return value


# Functions on samples that take longer are timed each time, others one in so many.
_SLOW_S, _TIMED_EVERY = 1e-4, 8


def _mapped(
    account: Account, number: int, functions: Sequence[Function], value: Any, what: str, key: int | None, reseed: Reseed
) -> Any:
    """`apply` to the sample of this number in its batch; the thread's account books the time."""
    if not account.maps_slowly and number % _TIMED_EVERY:
        return apply(functions, value, what, key, reseed)
    began_s, cpu_began_s = time.monotonic(), time.thread_time()
    before = account.switch("map") if account.maps_slowly else None
    made = apply(functions, value, what, key, reseed)
    took_s = time.monotonic() - began_s
    if account.maps_slowly:
        account.switch(before)
    else:
        account.map_s += _TIMED_EVERY * took_s
        account.map_cpu_s += _TIMED_EVERY * (time.thread_time() - cpu_began_s)
    account.maps_slowly = took_s > _SLOW_S
    return made


def _name(function: Function) -> str:
    return str(getattr(function, "__qualname__", function))


def reseed_all(key: int) -> None:
    """Seed the generators of Python, numpy and torch; for worker processes only."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)  # it is this global generator that users' functions draw from
    seed = key & 0x7FFFFFFFFFFFFFFF
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes a hundred times as long
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def rows_of_parts(part_of: PartOf, part_count: int) -> list[Ints]:
    """Where the samples of each part go, rising."""
    by_part = np.argsort(part_of, kind="stable")
    bounds = np.searchsorted(part_of[by_part], np.arange(part_count + 1))
    return [by_part[first:stop] for first, stop in pairwise(bounds)]


def interleave(name: str, parts: Sequence[Any], part_of: PartOf, slots: Slots) -> Any:
    """The values of column `name`. Raises `ConfigError` where parts differ in kind."""
    kinds = {_kind(part) for part in parts}
    if len(kinds) > 1:
        described = " and ".join(sorted(kinds))
        raise ConfigError(f"column {name!r} is {described} in the sources of a mixture; decode it alike in all of them")
    assert sum(map(len, parts)) == len(part_of), f"{len(part_of)} samples of parts of {list(map(len, parts))}"
    if len(parts) == 1:
        return parts[0]
    part_of = np.ascontiguousarray(part_of)
    if isinstance(parts[0], np.ndarray):
        return _rows(list(map(np.ascontiguousarray, parts)), part_of, slots)
    if isinstance(parts[0], Ragged):
        return _ragged(parts, part_of, slots)
    if isinstance(parts[0], Strings):
        return Strings(lambda: _list(parts, part_of), 0, len(part_of))
    return _list(parts, part_of)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"a tensor of {value.dtype}{list(value.shape[1:])}"
    if isinstance(value, Ragged):
        return f"a Ragged of {value.kind} {value.values.dtype}"
    return "strings" if isinstance(value, Strings) else "a list"


def _rows(parts: Sequence[npt.NDArray[Any]], part_of: PartOf, slots: Slots) -> npt.NDArray[Any]:
    out = slots.take_array((len(part_of), *parts[0].shape[1:]), parts[0].dtype)
    if out.nbytes:
        row_bytes = out.nbytes // len(out)
        wrong = interleave_rows(part_of, *_places(parts), row_bytes, _scratch(parts), out.reshape(-1).view(np.uint8))
        assert wrong < 0, f"sample {wrong} is not there"
    return out


def _ragged(parts: Sequence[Ragged], part_of: PartOf, slots: Slots) -> Ragged:
    part_offsets, values = [part.offsets for part in parts], [part.values for part in parts]
    offsets = np.empty(len(part_of) + 1, np.int64)
    addresses, counts = _places(part_offsets)[0], np.array([len(part) for part in parts], np.int64)
    wrong = interleave_offsets(part_of, addresses, counts, _scratch(parts), offsets)
    assert wrong < 0, f"sample {wrong} is not there"
    dtype = values[0].dtype
    out = slots.take(int(offsets[-1]) * dtype.itemsize)
    wrong = interleave_values(yield_state, part_of, *_places(values), offsets, dtype.itemsize, _scratch(parts), out)
    assert wrong < 0, f"sample {wrong} is not there"
    shapes = None
    if any(part.shapes is not None for part in parts):
        shapes = _list([part.shapes or [(length,) for length in part.lengths.tolist()] for part in parts], part_of)
    present = None
    if any(part.present is not None for part in parts):
        present = _rows(list(map(presence, parts)), part_of, slots)
    return unchecked(out.view(dtype), offsets, shapes, parts[0].kind, present)


def _places(arrays: Sequence[npt.NDArray[Any]]) -> tuple[Ints, Ints]:
    """Addresses and sizes of contiguous arrays."""
    assert all(array.flags.c_contiguous for array in arrays), "arrays with gaps"
    return (
        np.array([array.ctypes.data for array in arrays], np.int64),
        np.array([array.nbytes for array in arrays], np.int64),
    )


def _scratch(parts: Sequence[Any]) -> Ints:
    return np.zeros(len(parts), np.int64)


def _list(parts: Sequence[Sequence[Any]], part_of: PartOf) -> list[Any]:
    items = [iter(part) for part in parts]
    return list(map(next, map(items.__getitem__, part_of.tolist())))
