"""webdataset's `wids` lists: a data set as a JSON file that names its shards and how many samples each holds.

    {"wids_version": 1, "shardlist": [{"url": "train-000.tar", "nsamples": 1000}, ...]}

Names are relative to `base`, where the list has one, and that and all else to the place of the list. `datasets` may
hold more lists, or name files with one (`source_url`), whose shards come behind the list's own. A list says what to
read, wherever it was read from, so it may send us to other buckets and hosts; the files of this machine are named by
local lists only.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from fastload.errors import ConfigError

ENDING = ".json"
_SHARD = re.compile(r"shard\.[0-9]+\.json\Z", re.IGNORECASE)  # of MosaicML's streaming

# Other formats call the file the same, and lead to this message when a user passes it.
_FOLDER, _TARS = "name the folder that it lies in", "which is not supported; write the samples as .tar shards"
_OTHERS = {
    "shards": f"MosaicML's streaming; {_FOLDER}",
    "chunks": f"LitData; {_FOLDER}",
    "features": f"Hugging Face, {_TARS}",
}


_Kind = TypeVar("_Kind")


class _Shard(msgspec.Struct):
    url: str
    nsamples: int = -1
    filesize: object = None


class _Dataset(msgspec.Struct):
    source_url: str | None = None
    base: str | None = None
    shardlist: list[_Shard] = []


class _List(msgspec.Struct):
    wids_version: int = 1
    base: str | None = None
    shardlist: list[_Shard] | None = None
    datasets: list[_Dataset] = []


@dataclass(frozen=True, slots=True)
class Shards:
    """Some shards of a list: their URLs, how many samples they should hold and of how many bytes they should be; -1: it
    does not say.
    """

    urls: list[str]
    sample_counts: list[int]
    sizes: list[int]


@dataclass(frozen=True, slots=True)
class WidsSource:
    """Another list whose shards belong here."""

    url: str


def is_list(url: str) -> bool:
    """Whether `url` names a list of shards rather than shards."""
    path = url.partition("?")[0] if url.lower().startswith(("http://", "https://")) else url
    return path.lower().endswith(ENDING) and not _SHARD.match(path.rpartition("/")[2])


def begins_as_list(head: bytes) -> bool:
    """Whether a file that may also be JSON lines is a list, by its first bytes."""
    return b'"wids_version"' in head or b'"shardlist"' in head


def parse(data: bytes, url: str) -> list[Shards | WidsSource]:
    """The parts of the list at `url`, in order. Raises ConfigError, naming `url`, where it is none."""
    read = _decode(data, url, _List)
    if read.wids_version != 1:
        raise ConfigError(f"{url} has wids_version {read.wids_version}; this fastload reads version 1")
    if read.shardlist is None and not read.datasets:
        raise ConfigError(_explain(data, url))
    parts: list[Shards | WidsSource] = [_shards(read.shardlist or [], read.base, url)]
    for dataset in read.datasets:
        if dataset.source_url is not None:
            parts.append(WidsSource(_joined(url, dataset.source_url, url)))
        else:
            parts.append(_shards(dataset.shardlist, dataset.base or read.base, url))
    return parts


def _decode(data: bytes, url: str, kind: type[_Kind]) -> _Kind:
    try:
        return msgspec.json.decode(data, type=kind)
    # The latter two where names of fields are not UTF-8, and where brackets are a thousand deep.
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{url} is no wids list of shards: {error}; write it again, or name the shards") from error


def _explain(data: bytes, url: str) -> str:
    names = _decode(data, url, dict[str, object])
    for name, format_name in _OTHERS.items():
        if name in names:
            return f"{url} is an index of {format_name}"
    return f"{url} is no wids list of shards: it has neither shardlist nor datasets; write it again, or name the shards"


def _shards(shards: list[_Shard], base: str | None, url: str) -> Shards:
    place = url if base is None else _joined(url, base.rstrip("/") + "/", url)
    for shard in shards:
        if shard.nsamples < -1:
            raise ConfigError(f"{url} says that {shard.url} has {shard.nsamples} samples; correct the list")
    urls = [_joined(place, shard.url, url) for shard in shards]
    return Shards(urls, [shard.nsamples for shard in shards], [_size(shard.filesize) for shard in shards])


def _size(value: object) -> int:
    """Lists that others made may have anything there."""
    return value if isinstance(value, int) and 0 <= value < 1 << 63 else -1


def _joined(place: str, name: str, url: str) -> str:
    """`name` as seen from `place`, the URL of a file or, with "/" at its end, of a folder."""
    if name.startswith("pipe:"):
        raise ConfigError(f"{url} names {name!r}; fastload runs no programs to read data: name its URL")
    is_local = "://" not in place
    if "://" in name:
        if name.lower().startswith("file:") and not is_local:
            raise ConfigError(f"{url} names {name!r}, a file of this machine; put the list on this machine too")
        return name
    root, path = ("", place) if is_local else _split(place)
    folder = path.rpartition("/")[0]
    joined = posixpath.normpath(posixpath.join(folder, name)) + ("/" if name.endswith("/") else "")
    if is_local:
        return joined
    return f"{root}/{joined.lstrip('/')}"


def _split(url: str) -> tuple[str, str]:
    """`s3://bucket` and `/key`; the parameters of a web address are no part of what lies beside it."""
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("http", "https"):
        rest = rest.partition("?")[0]
    authority, slash, path = rest.partition("/")
    return f"{scheme}://{authority}", slash + path
