"""From the URLs a user names to the manifest: shards by pattern, prefix or name, lists of shards, sidecar files.

Lists and sidecars are read through the cache like shards: attached, fetched once for the node, verified, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastload.client.consumer import Consumer
from fastload.errors import ConfigError, ObjectMissingError
from fastload.formats import SHARD_ENDINGS, SIDECAR_NAME, endings_of, format_of, mds, wids
from fastload.plan import Manifest
from fastload.store.table import ObjectTable

# Some ten million shards; they are read into memory whole.
_LIST_BYTES_MAX = 2 << 30


class _Listed(NamedTuple):
    """Some shards, how many samples they should hold (-1: unknown), and the sidecars that lie beside them."""

    shards: ObjectTable
    sample_counts: npt.NDArray[np.int64]
    sidecars: ObjectTable


def list_shards(consumer: Consumer, urls: Sequence[str], format_name: str = "auto") -> Manifest:
    """The manifest of `urls`, in their order, of which prefixes stand for the shards of this format under them. It
    replaces the objects that `consumer` is attached to.

    A URL that ends in ".json" is a list of shards (see `wids`). Raises the errors of the store, and `ConfigError` for
    lists that cannot be used.
    """
    endings = endings_of(format_name)
    parts = [
        part
        for is_list, group in groupby(urls, wids.is_list)
        for part in _parts(consumer, list(group), is_list, endings)
    ]
    shards = ObjectTable.joined([part.shards for part in parts])
    if not len(shards):
        raise ObjectMissingError(f"{', '.join(urls)}: no shards at all; name some, or correct the list")
    _check_formats(shards)
    counts = np.concatenate([part.sample_counts for part in parts])
    sidecars = ObjectTable.joined([part.sidecars for part in parts])
    return Manifest(shards, promised=counts if (counts >= 0).any() else None, sidecars=_each_once(sidecars))


def find_sidecars(consumer: Consumer, manifest: Manifest, index: str | None) -> ObjectTable:
    """The files with indexes of the manifest's shards: `index`, or without it those that lie beside the shards.

    `index` is looked up wherever it is used: it may be a local file, of which each node has a copy.
    """
    return manifest.sidecars if index is None else consumer.resolve([index], ())


def attach(consumer: Consumer, manifest: Manifest, sidecars: ObjectTable) -> None:
    """Number the chunks of a manifest's objects, and behind them those of the sidecars."""
    consumer.attach(ObjectTable.joined([manifest.objects, sidecars]) if len(sidecars) else manifest.objects)


def _check_formats(shards: ObjectTable) -> None:
    """Raise `ConfigError` where they are of several formats."""
    first: dict[str, str] = {}
    for rows in shards.rows():
        for url, *_ in rows:
            first.setdefault(format_of(url), url)
    if len(first) > 1:
        (one, url), (other, another) = list(first.items())[:2]
        raise ConfigError(
            f"{url} is {one} and {another} is {other}: a data set has one format; name it (format={one!r}), or read "
            "them as two, which fastload.Mixture puts together"
        )


def _parts(consumer: Consumer, urls: list[str], are_lists: bool, endings: tuple[str, ...]) -> Iterator[_Listed]:
    if are_lists:
        for url in urls:
            yield from _of_list(consumer, url)
    else:
        yield _of_names(consumer, urls, endings)


def _of_names(consumer: Consumer, urls: list[str], endings: tuple[str, ...]) -> _Listed:
    found = consumer.resolve(urls, endings, beside=[SIDECAR_NAME, mds.INDEX_NAME])
    names = [url.rpartition("/")[2] for rows in found.rows() for url, *_ in rows]
    is_sidecar = np.array([name == SIDECAR_NAME for name in names], np.bool_)
    is_index = np.array([name == mds.INDEX_NAME for name in names], np.bool_)
    is_shard = ~(is_sidecar | is_index)
    shards = found if is_shard.all() else found.take(np.flatnonzero(is_shard))
    counts = _counts_of_indexes(consumer, found.take(np.flatnonzero(is_index)), shards)
    return _Listed(shards, counts, found.take(np.flatnonzero(is_sidecar)))


def _counts_of_indexes(consumer: Consumer, indexes: ObjectTable, shards: ObjectTable) -> npt.NDArray[np.int64]:
    """How many samples the index files of MDS promise of each shard, -1 where they do not name it. ConfigError for an
    index that names a shard which is not there, or has another size.
    """
    counts = np.full(len(shards), -1, np.int64)
    if not len(indexes):
        return counts
    numbers = {url: number for number, (url, *_) in enumerate(row for rows in shards.rows() for row in rows)}
    folders = {url.rpartition("/")[0] for url in numbers if format_of(url) == "mds"}
    for at, info in enumerate(indexes):
        folder = info.url.rpartition("/")[0]
        if folder not in folders:  # another format's
            continue
        if info.size > _LIST_BYTES_MAX:
            raise ConfigError(f"{info.url}: an index of {info.size} bytes, above {_LIST_BYTES_MAX}")
        consumer.attach(indexes.take(np.array([at])))
        for shard in mds.shards_of(object_reader(consumer, 0, info.size)(0, info.size), info.url):
            number = numbers.get(f"{folder}/{shard.name}")
            if number is None:
                raise ConfigError(
                    f"{info.url} names {shard.name}, which is not beside it; upload it, or take it out of the index"
                )
            if shard.byte_count != shards[number].size:
                raise ConfigError(
                    f"{info.url} says that {shard.name} has {shard.byte_count} bytes, and it has "
                    f"{shards[number].size}: it was cut short, or is another one; upload it again"
                )
            counts[number] = shard.samples
    return counts


def _of_list(consumer: Consumer, url: str, *, is_nested: bool = False) -> Iterator[_Listed]:
    (info,) = found = consumer.resolve([url], ())
    if info.size > _LIST_BYTES_MAX:
        raise ConfigError(
            f"{url}: a list of {info.size} bytes, above {_LIST_BYTES_MAX}; name a prefix, or several lists"
        )
    consumer.attach(found)
    for part in wids.parse(object_reader(consumer, 0, info.size)(0, info.size), info.url):
        if isinstance(part, wids.Shards):
            yield _named(consumer, part, url)
        elif is_nested:
            raise ConfigError(f"{url} is named by a list and names another, {part.url}; name the shards themselves")
        else:
            yield from _of_list(consumer, part.url, is_nested=True)


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
    return _Listed(shards, np.array(part.sample_counts, np.int64), none)


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
