"""From the URLs a user names to the manifest: shards by pattern, prefix or name, lists of shards, sidecar files.

Lists and sidecars are read through the cache like shards: attached, fetched once for the node, verified, and kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from fastload.client.consumer import Consumer
from fastload.errors import ConfigError, ObjectMissingError, ShardError
from fastload.formats import (
    INDEX_NAME,
    SHARD_ENDINGS,
    SIDECAR_NAME,
    ComputedFormat,
    Format,
    ListedShard,
    endings_of,
    energon,
    format_of,
    is_cut,
    is_described,
    listed_shards,
    may_be_beside,
    may_be_indexed,
    named_format,
    side_index,
    token_shards,
    wids,
)
from fastload.formats.pieces import in_pieces
from fastload.pipeline.split_choice import Energon, Prefixes, shifted
from fastload.plan import Manifest
from fastload.store.packing import PACKINGS, packing_of, unpacked_name
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo

# What Energon's files about a data set are called.
_ENERGONS = (*energon.SPLIT_FILES, *energon.COUNT_FILES)

# Some ten million shards; they are read into memory whole.
_LIST_BYTES_MAX = 2 << 30
_ERRORS_SHOWN = 20
_HEAD_BYTES = 4096


class _Listed(NamedTuple):
    """Some shards as they are stored, how many samples they should hold (-1: unknown), the sidecars that lie beside
    them, and of shards that are packed how large they are unpacked (-1: unknown). `excluded`: by shard, the keys of
    samples that are left out.
    """

    shards: ObjectTable
    sample_counts: npt.NDArray[np.int64]
    sidecars: ObjectTable
    unpacked_sizes: npt.NDArray[np.int64]
    excluded: Mapping[int, tuple[str, ...]] = {}


def list_shards(
    consumer: Consumer,
    urls: Sequence[str],
    how: Format = "auto",
    split: str | None = None,
    bad: dict[str, ShardError] | None = None,
) -> Manifest:
    """The manifest of `urls`, in their order, of which prefixes stand for the shards of this format under them, or with
    `split` for those of that split. It replaces the objects that `consumer` is attached to. Large files are there in
    pieces.

    A URL that ends in ".json" is a list of shards (see `wids`), unless it is JSON lines by `how`. Raises the errors of
    the store, and `ConfigError` for lists that cannot be used, and for splits that are not there, or of which none is
    named. ShardError, which names all, where packed shards cannot be unpacked; with `bad`, these are left out, and what
    is wrong with each is put there, by its URL.
    """
    prefixes = Prefixes.of(urls, split)
    if not isinstance(how, str):
        return _list_computed(consumer, urls, how, prefixes, bad)
    listed, failed = _with_sizes(consumer, _listed(consumer, urls, how, prefixes))
    if bad is not None:
        bad |= failed
    elif failed:
        raise all_of([*failed.values()], "packed shards")
    return _manifest(listed, how)


def list_one_by_one(
    consumer: Consumer, urls: Sequence[str], how: Format = "auto", split: str | None = None
) -> Iterator[Manifest | ShardError]:
    """Manifests of which the first shards are one after the other those of `list_shards`, for those who read the first
    that they can, and need to know nothing of the others; of one that cannot be unpacked what is wrong with it.
    """
    prefixes = Prefixes.of(urls, split)
    if not isinstance(how, str):
        bad: dict[str, ShardError] = {}
        manifest = _list_computed(consumer, urls, how, prefixes, bad)
        yield from bad.values()
        if len(manifest):
            yield manifest
        return
    listed = _listed(consumer, urls, how, prefixes)
    for number in range(len(listed.shards)):
        one, failed = _with_sizes(consumer, _only(listed, np.array([number])))
        yield next(iter(failed.values())) if failed else _manifest(one, how)


def all_of(errors: Sequence[ShardError], what: str) -> ShardError:
    """One error that says what is wrong with each shard."""
    if len(errors) == 1:
        return errors[0]
    more = [f"and {len(errors) - _ERRORS_SHOWN} more"] if len(errors) > _ERRORS_SHOWN else []
    texts = "\n".join([*map(str, errors[:_ERRORS_SHOWN]), *more])
    return ShardError(f"{len(errors)} {what} cannot be read:\n{texts}")


def _listed(consumer: Consumer, urls: Sequence[str], how: str, prefixes: Prefixes) -> _Listed:
    endings_of(how)  # what is none is an error now
    parts = [
        part
        for is_list, group in groupby(urls, _list_finder(consumer, how))
        for part in _parts(consumer, list(group), is_list, how, prefixes)
    ]
    shards = ObjectTable.joined([part.shards for part in parts])
    if not len(shards):
        raise ObjectMissingError(f"{', '.join(urls)}: no shards at all; name some, or correct the list")
    _check_formats(shards, how)
    return _Listed(
        shards,
        np.concatenate([part.sample_counts for part in parts]),
        _each_once(ObjectTable.joined([part.sidecars for part in parts])),
        np.concatenate([part.unpacked_sizes for part in parts]),
        shifted((part.excluded for part in parts), np.cumsum([0, *(len(part.shards) for part in parts)]).tolist()),
    )


def _only(listed: _Listed, numbers: npt.NDArray[np.int64]) -> _Listed:
    """Some of the shards."""
    counts, sizes = listed.sample_counts[numbers], listed.unpacked_sizes[numbers]
    places = numbers.tolist() if listed.excluded else []
    excluded = {at: listed.excluded[number] for at, number in enumerate(places) if number in listed.excluded}
    return _Listed(listed.shards.take(numbers), counts, listed.sidecars, sizes, excluded)


def _manifest(listed: _Listed, how: str) -> Manifest:
    """The manifest of shards of which all unpacked sizes are known."""
    inside, counts = _inside(listed.shards, listed.unpacked_sizes), listed.sample_counts
    shards = in_pieces(inside, lambda url: is_cut(url, how))
    if shards is not inside:
        counts = _counts_of_pieces(counts, shards)
    return Manifest(
        shards,
        promised=counts if (counts >= 0).any() else None,
        sidecars=listed.sidecars,
        excluded=listed.excluded,
    )


def _list_computed(
    consumer: Consumer, urls: Sequence[str], how: ComputedFormat, prefixes: Prefixes, bad: dict[str, ShardError] | None
) -> Manifest:
    """The manifest of a `ComputedFormat`, whose sidecars are what lies beside the shards. `bad`: see `list_shards`."""
    found = consumer.resolve(urls, (*how.endings, how.beside_ending), beside=[INDEX_NAME])
    names = [url for rows in found.rows() for url, *_ in rows]
    is_beside = np.array([url.endswith(how.beside_ending) for url in names], np.bool_)
    is_index = np.array([is_description(url) for url in names], np.bool_)
    shards = found.take(np.flatnonzero(~(is_beside | is_index)))
    shards = shards.take(np.array(prefixes.choose(shards, lambda prefix: None).numbers, np.int64))
    # An index belongs to chunks that lie beside it, and means nothing to other files.
    described = {beside_name(url, how) for rows in shards.rows() for url, *_ in rows}
    is_beside |= is_index & np.array([url in described for url in names], np.bool_)
    beside = found.take(np.flatnonzero(is_beside))
    if not len(shards):
        raise ObjectMissingError(f"{', '.join(urls)}: no shards at all; name those that end in {how.endings}")
    other = next(
        (url for rows in shards.rows() for url, *_ in rows if named_format(url) not in (None, "litdata")), None
    )
    if other is not None:
        raise ConfigError(
            f"{other} is {named_format(other)} by its name, and is to be read as {how.reading}; leave format= out"
        )
    packed = next((info.url for info in shards if packing_of(info.url) and named_format(info.url) is None), None)
    if packed is not None:
        raise ConfigError(f"{packed} is packed, and files of this format are read from anywhere; upload it unpacked")
    if prefixes.split is not None:  # what lies beside other splits has no part in this one
        wanted = {beside_name(info.url, how) for info in shards}
        beside = ObjectTable.of(info for info in beside if info.url in wanted)
    there = {info.url for info in beside}
    lacking = [name for info in shards if (name := beside_name(info.url, how)) not in there]
    lacking = [name for name in dict.fromkeys(lacking) if not name.startswith(prefixes.prefixes)]
    if lacking:  # those of shards that were named one by one
        beside = ObjectTable.joined([beside, consumer.present(lacking)])
    beside = _each_once(beside)
    listed, failed = _with_sizes(consumer, _in_order_of_indexes(consumer, shards, beside, prefixes.prefixes))
    shards = in_pieces(_inside(listed.shards, listed.unpacked_sizes))
    there = {info.url for info in beside}
    have_beside = np.array([beside_name(info.url, how) in there for info in shards], np.bool_)
    _check_indexed_alike(shards, [url for url in there if url.endswith(how.beside_ending)], how)
    reading = how.reading
    if len(beside):
        identities = msgspec.msgpack.encode(list(beside.identities()))
        reading += READING_BESIDE + hashlib.blake2b(identities, digest_size=16).hexdigest()
    counts = _counted(shards, have_beside, how, failed)
    if failed and bad is None:
        raise all_of([*failed.values()], "shards")
    if failed and bad is not None:
        bad |= failed
        kept = np.array([info.url not in failed for info in shards], np.bool_)
        shards, counts = shards.take(np.flatnonzero(kept)), counts[kept]
    if len(counts) and not counts.any():
        raise ConfigError(how.why_none(shards))
    return Manifest(shards, promised=counts, sidecars=beside, reading=reading)


def _check_indexed_alike(shards: ObjectTable, indexes: Sequence[str], how: ComputedFormat) -> None:
    """Raise `ConfigError` where some shards have an index of their own and others none: they are read otherwise."""
    if not indexes:
        return
    has, first = set(indexes), {True: "", False: ""}
    for rows in shards.rows():
        for url, *_ in rows:
            is_indexed = beside_name(url, how) in has
            first[is_indexed] = first[is_indexed] or url
    if all(first.values()):
        raise ConfigError(
            f"{first[False]} has no index beside it ({how.beside_ending}), and {first[True]} has one, by whose "
            "documents it is read: upload the index that is missing, or read them as two data sets (fastload.Mixture)"
        )


def _counted(
    shards: ObjectTable, have_beside: npt.NDArray[np.bool_], how: ComputedFormat, failed: dict[str, ShardError]
) -> npt.NDArray[np.int64]:
    """How many samples each shard has, or piece of one, -1 where that is not known; what is wrong with one goes to
    `failed`, by its URL.
    """
    counts = np.full(len(shards), -1, np.int64)
    for number, (info, has_beside) in enumerate(zip(shards, have_beside.tolist(), strict=True)):
        try:
            counts[number] = how.count(info, has_beside=has_beside)
        except ShardError as error:
            failed[info.url] = error
    return counts


def _in_order_of_indexes(
    consumer: Consumer, shards: ObjectTable, beside: ObjectTable, prefixes: tuple[str, ...]
) -> _Listed:
    """The same shards; chunks under a prefix in the order of their index, which is checked against them, and says how
    large packed ones are unpacked.
    """
    folders, counts, order = _Folders(shards), np.full(len(shards), -1, np.int64), np.arange(len(shards))
    for info in beside:
        if is_description(info.url) and _folder(info.url) in folders.numbers:
            listed = token_shards(_read(consumer, info), info.url)
            folders.note(info.url, listed, counts, order, is_whole=bool(prefixes) and info.url.startswith(prefixes))
    return _Listed(shards.take(order), counts[order], ObjectTable.of([]), folders.unpacked_sizes[order])


READING_BESIDE = "; beside it "


def check_reading(manifest: Manifest, how: Format) -> None:
    """Raise `ConfigError` where a list of shards was made for another format than `how`."""
    reading = "" if isinstance(how, str) else how.reading
    if manifest.reading.partition(READING_BESIDE)[0] != reading:
        raise ConfigError(
            f"the list of shards was made for {manifest.reading or 'a format without arguments'}, and this is "
            f"{reading or f'format={how!r}'}; give the same format=, or another file with manifest=..."
        )


def beside_name(url: str, how: ComputedFormat) -> str:
    """What the file is called that may lie beside a shard."""
    folder, slash, name = url.rpartition("/")
    if named_format(url) == "litdata":
        return folder + slash + INDEX_NAME
    return folder + slash + (name.rpartition(".")[0] or name) + how.beside_ending


def find_sidecars(consumer: Consumer, manifest: Manifest, index: str | None) -> ObjectTable:
    """The files with indexes of the manifest's shards: `index`, or without it those that lie beside the shards.

    `index` is looked up wherever it is used: it may be a local file, of which each node has a copy.
    """
    if index is None:
        return manifest.sidecars
    if manifest.reading:
        raise ConfigError(f"index={index!r}: the samples of {manifest.reading} are computed; leave index= out")
    descriptions = [info for info in manifest.sidecars if is_description(info.url)]
    return ObjectTable.joined([consumer.resolve([index], ()), ObjectTable.of(descriptions)])


def is_description(url: str) -> bool:
    """Whether a sidecar says how shards beside it are laid out, and holds no indexes of them."""
    return url.rpartition("/")[2] == INDEX_NAME


def attach(consumer: Consumer, manifest: Manifest, sidecars: ObjectTable) -> None:
    """Number the chunks of a manifest's objects, and behind them those of the sidecars."""
    consumer.attach(ObjectTable.joined([manifest.objects, sidecars]) if len(sidecars) else manifest.objects)


def _packings(shards: ObjectTable) -> npt.NDArray[np.int64]:
    """The number of how each shard is packed, as its name says or the table does; 0 where it is not."""
    urls = (url for rows in shards.rows() for url, *_ in rows)
    packings = np.fromiter((PACKINGS.index(packing_of(url)) for url in urls), np.int64, len(shards))
    found: npt.NDArray[np.int64] = np.maximum(packings, shards.all_pieces()[2])
    return found


def _with_sizes(consumer: Consumer, listed: _Listed) -> tuple[_Listed, dict[str, ShardError]]:
    """Find out the unpacked sizes that are not known, at worst by unpacking (see `service.unpacked_sizes`). Those that
    cannot be unpacked are left out, and what is wrong with each comes beside, by its URL.
    """
    unknown = np.flatnonzero((_packings(listed.shards) > 0) & (listed.unpacked_sizes < 0))
    if not len(unknown):
        return listed, {}
    consumer.attach(listed.shards.take(unknown))
    listed.unpacked_sizes[unknown], bad = consumer.unpacked_sizes()
    kept = np.delete(np.arange(len(listed.shards)), unknown[list(bad)])
    return _only(listed, kept), {listed.shards[int(unknown[at])].url: error for at, error in bad.items()}


def _inside(listed: ObjectTable, sizes: npt.NDArray[np.int64]) -> ObjectTable:
    """The same shards, with what is in them in place of those that are packed."""
    packings = _packings(listed)
    packed = np.flatnonzero(packings)
    if not len(packed):
        return listed
    pieces, object_sizes = listed.all_pieces().copy(), listed.sizes.copy()
    pieces[1, packed], pieces[2, packed] = object_sizes[packed], packings[packed]
    object_sizes[packed] = sizes[packed]
    return ObjectTable(listed.urls, object_sizes, listed.etags, listed.mtimes_ns, pieces)


def _check_formats(shards: ObjectTable, how: str) -> None:
    """Raise `ConfigError` where they are of several formats."""
    if how != "auto":
        return
    first: dict[str, str] = {}
    for rows in shards.rows():
        for url, *_ in rows:
            first.setdefault(format_of(url), url)
    if len(first) > 1:
        (one, url), (other, another) = list(first.items())[:2]
        raise ConfigError(
            f"{url} is {one} and {another} is {other}: a data set has one format; format={one!r} reads those of a "
            "prefix that are, and fastload.Mixture puts several data sets together"
        )


def _list_finder(consumer: Consumer, how: str) -> Callable[[str], bool]:
    """Says whether a URL names lists of shards. With JSON lines for `how`, all that end in .json do where the first of
    them begins as a list does: then the shards that they name are JSON lines.
    """
    are_lists: list[bool] = [] if how == "jsonl" else [True]

    def is_list(url: str) -> bool:
        if not wids.is_list(url) or named_format(url) is not None:
            return False
        if not are_lists:
            info = consumer.resolve([url], ())[0]
            consumer.attach(ObjectTable.of([info]))
            head = object_reader(consumer, 0, info.size)(0, min(info.size, _HEAD_BYTES))
            are_lists.append(wids.begins_as_list(head))
        return are_lists[0]

    return is_list


def _parts(consumer: Consumer, urls: list[str], are_lists: bool, how: str, prefixes: Prefixes) -> Iterator[_Listed]:
    if are_lists:
        for url in urls:
            yield from _of_lists(consumer, url, how)
    else:
        yield _of_names(consumer, urls, how, prefixes)


def _of_names(consumer: Consumer, urls: list[str], how: str, prefixes: Prefixes) -> _Listed:
    beside = [SIDECAR_NAME, INDEX_NAME, *_ENERGONS, "*" + side_index.ENDING]
    found = consumer.resolve(urls, endings_of(how), beside=beside)
    named = [(url, url.rpartition("/")[2]) for rows in found.rows() for url, *_ in rows]
    is_sidecar = np.array([name == SIDECAR_NAME for _, name in named], np.bool_)
    is_index = np.array([name == INDEX_NAME for _, name in named], np.bool_)
    is_energons = np.array([name in _ENERGONS and url.startswith(prefixes.prefixes) for url, name in named], np.bool_)
    is_side_index = np.array(
        [name.endswith(side_index.ENDING) and url.startswith(prefixes.prefixes) for url, name in named], np.bool_
    )
    is_shard = ~(is_sidecar | is_index | is_energons | is_side_index)
    if how == "auto":
        is_shard[_beside_shards([url for url, _ in named], prefixes.prefixes)] = False
    there = found if is_shard.all() else found.take(np.flatnonzero(is_shard))
    about = {info.url: info for info in found.take(np.flatnonzero(is_energons))}
    read = partial(_read, consumer)
    chosen = prefixes.choose(there, lambda prefix: Energon.under(prefix, about, read))
    shards = there if prefixes.split is None else there.take(np.array(chosen.numbers, np.int64))
    folders = _Folders(shards, how)
    indexes = [info for info in found.take(np.flatnonzero(is_index)) if _folder(info.url) in folders.numbers]
    counts, order = np.array(chosen.sample_counts, np.int64), np.arange(len(shards))
    for info in indexes:
        folders.note(info.url, listed_shards(_read(consumer, info), info.url), counts, order, is_whole=True)
    of_named = folders.indexes_of_named(consumer, {_folder(info.url) for info in indexes})
    for info in of_named:
        folders.note(info.url, listed_shards(_read(consumer, info), info.url), counts, order, is_whole=False)
    _check_packed(shards, prefixes.prefixes)
    described = [info for info in (*indexes, *of_named) if _folder(info.url) in folders.described | folders.digested]
    side_indexes = _side_indexes(found.take(np.flatnonzero(is_side_index)), shards, counts, how)
    sidecars = ObjectTable.joined([found.take(np.flatnonzero(is_sidecar)), ObjectTable.of(described), side_indexes])
    shards = folders.shards()
    ordered = shards.take(order) if (np.diff(order) < 0).any() else shards
    places = np.argsort(order)
    excluded = {int(places[number]): keys for number, keys in chosen.excluded.items()}
    return _Listed(ordered, counts[order], sidecars, folders.unpacked_sizes[order], excluded)


def _beside_shards(urls: list[str], prefixes: tuple[str, ...]) -> list[int]:
    """The numbers of those under a prefix that are no shards, since others of another format are there."""
    found: list[int] = []
    weak = [number for number, url in enumerate(urls) if ".json." in url.lower() and may_be_beside(url)]
    for prefix in prefixes if weak else ():
        if any(url.startswith(prefix) and named_format(url) not in (None, "jsonl") for url in urls):
            found += [number for number in weak if urls[number].startswith(prefix)]
    return found


def _check_packed(shards: ObjectTable, prefixes: tuple[str, ...]) -> None:
    """Raise `ConfigError` where a shard is under a prefix both packed and not, or packed in two ways."""
    if not prefixes:
        return
    urls = [url for rows in shards.rows() for url, *_ in rows if url.startswith(prefixes)]
    if not any(map(packing_of, urls)):
        return
    first: dict[str, str] = {}
    for url in urls:
        other = first.setdefault(unpacked_name(url), url)
        if other != url:
            raise ConfigError(
                f"{other} and {url} have the same samples by their names, one of them packed; delete one of both, or "
                f"name the shards that you want by a pattern, such as {_folder(url)}/{{a,b,c}}.ENDING"
            )


def _side_indexes(found: ObjectTable, shards: ObjectTable, counts: npt.NDArray[np.int64], how: str) -> ObjectTable:
    """Those of shards of which nothing else says how many samples they hold."""
    if not len(found):
        return found
    urls = (url for rows in shards.rows() for url, *_ in rows)
    wanted = {
        name
        for url, count in zip(urls, counts.tolist(), strict=True)
        if count < 0 and not packing_of(url)
        for name in side_index.names_beside(url, format_of(url, how))
    }
    return ObjectTable.of(info for info in found if info.url in wanted)


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _read(consumer: Consumer, info: ObjectInfo) -> bytes:
    if info.size > _LIST_BYTES_MAX:
        raise ConfigError(f"{info.url}: an index of {info.size} bytes, above {_LIST_BYTES_MAX}")
    consumer.attach(ObjectTable.of([info]))
    return object_reader(consumer, 0, info.size)(0, info.size)


class _Folders:
    """Shards by the folders that they lie in, and what an index says that lies there, too."""

    def __init__(self, shards: ObjectTable, how: str = "auto") -> None:
        self._shards, self._how = shards, how
        self.numbers: dict[str, dict[str, int]] = {}  # by folder: shards that it may name, by name
        self.described: set[str] = set()  # folders where it has to be
        self.digested: set[str] = set()  # others where it has digests
        self.unpacked_sizes = np.full(len(shards), -1, np.int64)  # of shards that are packed; -1: it does not say
        self._packings = np.zeros(len(shards), np.int64)  # where the index says it
        for number, url in enumerate(url for rows in shards.rows() for url, *_ in rows):
            if may_be_indexed(url, how):
                folder, _, name = url.rpartition("/")
                self.numbers.setdefault(folder, {})[name] = number
                if is_described(url, how):
                    self.described.add(folder)

    def shards(self) -> ObjectTable:
        """The shards; those that are packed as the index says are what is in them, of sizes that are not known yet."""
        shards, packed = self._shards, self._packings > 0
        if not packed.any():
            return shards
        pieces = shards.all_pieces().copy()
        pieces[1, packed], pieces[2, packed] = shards.sizes[packed], self._packings[packed]
        return ObjectTable(shards.urls, shards.sizes, shards.etags, shards.mtimes_ns, pieces)

    def indexes_of_named(self, consumer: Consumer, found: set[str]) -> list[ObjectInfo]:
        """The indexes of shards that were named one by one, where they are needed and not among those `found`."""
        lacking = [f"{folder}/{INDEX_NAME}" for folder in self.described if folder not in found]
        there = list(consumer.present(sorted(lacking))) if lacking else []
        missing = next(iter(sorted(set(lacking) - {info.url for info in there})), None)
        if missing is not None:
            name = next(iter(self.numbers[_folder(missing)]))
            by = " by its name" if self._how == "auto" else ""
            raise ConfigError(
                f"{_folder(missing)}/{name} is {format_of(name, self._how)}{by}, whose samples {INDEX_NAME} beside it "
                "describes, and there is none; upload it, or name another format"
            )
        return there

    def note(
        self,
        url: str,
        listed: Sequence[ListedShard],
        counts: npt.NDArray[np.int64],
        order: npt.NDArray[np.int64],
        *,
        is_whole: bool,
    ) -> None:
        """Note how many samples the index at `url`, which lists these, promises of each shard, and of a format that
        cannot do without it the shards' order. ConfigError where it names a shard that is not there or has another
        size, or has to name all and does not. `is_whole`: all that lies in the folder is known.
        """
        folder = _folder(url)
        numbers, ordered = self.numbers[folder], []
        for shard in listed:
            if shard.is_digested:
                self.digested.add(folder)
            number = numbers.get(shard.name)
            if number is None and not is_whole:
                continue
            if number is None:
                raise ConfigError(
                    f"{url} names {shard.name}, which is not beside it; upload it, or take it out of the index"
                )
            if shard.sizes and self._shards[number].size not in shard.sizes:
                raise ConfigError(
                    f"{url} says that {shard.name} has {shard.sizes[0]} bytes, and it has "
                    f"{self._shards[number].size}: it was cut short, or is another one; upload it again"
                )
            if packing_of(shard.name) and unpacked_name(shard.name) in numbers:
                raise ConfigError(
                    f"{url} names {shard.name}, and {unpacked_name(shard.name)} lies beside it, which has the same "
                    "samples; remove one of them"
                )
            counts[number], self.unpacked_sizes[number] = shard.samples, shard.unpacked_bytes
            self._packings[number] = PACKINGS.index(shard.packing)
            ordered.append(number)
        if folder in self.described:
            unnamed = next((name for name, number in numbers.items() if number not in set(ordered)), None)
            if unnamed is not None or len(set(ordered)) < len(ordered):
                raise ConfigError(
                    f"{url} does not name {unnamed}, which lies beside it; remove it, or write the index again"
                    if unnamed is not None
                    else f"{url} names a shard twice; write it again"
                )
            if is_whole:
                order[sorted(ordered)] = ordered


def _of_lists(consumer: Consumer, url: str, how: str, *, is_nested: bool = False) -> Iterator[_Listed]:
    """What the lists name that a URL or pattern stands for."""
    for info in consumer.resolve([url], ()):
        if info.size > _LIST_BYTES_MAX:
            raise ConfigError(
                f"{info.url}: a list of {info.size} bytes, above {_LIST_BYTES_MAX}; name a prefix, or several lists"
            )
        consumer.attach(ObjectTable.of([info]))
        for part in wids.parse(object_reader(consumer, 0, info.size)(0, info.size), info.url):
            if isinstance(part, wids.Shards):
                yield _named(consumer, part, info.url)
            elif is_nested:
                raise ConfigError(f"{url} is named by a list and names another, {part.url}; name the shards themselves")
            else:
                yield from _of_lists(consumer, part.url, how, is_nested=True)


def _named(consumer: Consumer, part: wids.Shards, list_url: str) -> _Listed:
    """The shards that a list names."""
    odd = next((url for url in part.urls if "{" in url or url.endswith("/")), None)
    if odd is not None:
        raise ConfigError(f"{list_url} names {odd}, a pattern or prefix; a list names each shard by itself")
    none = ObjectTable.of([])
    shards = consumer.resolve(part.urls, SHARD_ENDINGS) if part.urls else none
    promised = np.array(part.sizes, np.int64)
    wrong = np.flatnonzero((promised >= 0) & (promised != shards.sizes))
    if len(wrong):
        url, promise, size = part.urls[wrong[0]], promised[wrong[0]], shards.sizes[wrong[0]]
        raise ConfigError(
            f"{list_url} says that {url} has {promise} bytes, and it has {size}: it was cut short, or is another one; "
            "upload it again, or correct the list"
        )
    return _Listed(shards, np.array(part.sample_counts, np.int64), none, np.full(len(shards), -1, np.int64))


def _counts_of_pieces(counts: npt.NDArray[np.int64], shards: ObjectTable) -> npt.NDArray[np.int64]:
    """The promised counts of shards of which some are pieces: nothing is promised of these."""
    assert shards.pieces is not None, "there are pieces"
    starts, object_sizes, packings = shards.pieces
    of_object = np.cumsum(starts == 0) - 1
    return np.where((object_sizes < 0) | (packings > 0), counts[of_object], -1)


def _each_once(objects: ObjectTable) -> ObjectTable:
    """A prefix that was named twice gave them twice."""
    return ObjectTable.of(dict.fromkeys(objects))


def object_reader(consumer: Consumer, first_chunk: int, size: int) -> Callable[[int, int], bytes]:
    """`read_at(start, length)` of the attached object of `size` bytes whose chunks begin at number `first_chunk`."""
    chunk_bytes = consumer.chunk_bytes

    def read_at(start: int, length: int) -> bytes:
        if not 0 <= start <= start + length <= size:
            raise ValueError(f"bytes {start} to {start + length} of an object of {size}")
        if not length:
            return b""
        first, last = start // chunk_bytes, (start + length - 1) // chunk_bytes
        consumer.want(range(first_chunk + first, first_chunk + last + 1))
        parts = []
        for chunk in range(first, last + 1):
            low, high = max(start - chunk * chunk_bytes, 0), min(start + length - chunk * chunk_bytes, chunk_bytes)
            with consumer.acquire([first_chunk + chunk], reason="index") as held:
                arena, _, offsets = held.groups[0]
                parts.append(arena[int(offsets[0]) + low : int(offsets[0]) + high].tobytes())
            consumer.release([first_chunk + chunk])
        return b"".join(parts)

    return read_at
