"""From what a user wrote to the list of objects: patterns, prefixes, plain URLs.

A pattern of ten thousand shards must not cost ten thousand requests. What a pattern's URLs have in common
is listed, 1000 keys a request, and gives sizes and ETags for all of them. So it is with plain URLs, where a
list of them names many of one folder. The others, and those of web servers, which have no listing, are asked
for one by one, many at a time.

Nothing is left out silently: a member of a pattern that is not there is an error, and so is a prefix
without shards.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from braceexpand import braceexpand

from fastload.errors import AccessDeniedError, ConfigError, FastloadError, ObjectMissingError, StoreError
from fastload.redaction import redact
from fastload.store import httpstore
from fastload.store.packing import PACKED_ENDINGS, PACKED_TAR_ENDINGS
from fastload.store.types import ObjectInfo, Store
from fastload.store.urls import check_key, folder_without_slash, how_to_name, normalise, scheme, store_root

_HEADS_AT_ONCE = 16
# Plain URLs of one folder for which it is listed, however much else may be in it. Fewer take no longer one by one.
_LISTED_FROM = _HEADS_AT_ONCE + 1
_SHOWN = 3
_TABLES = {
    ".parquet": 'read_parquet("x.parquet")',
    ".arrow": 'read_feather("x.arrow")',
    ".feather": 'read_feather("x.feather")',
    ".orc": 'read_orc("x.orc")',
    ".csv": 'read_csv("x.csv")',
    ".tsv": 'read_csv("x.tsv", sep="\\t")',
}
_INDEX_NAME = "index.json"
_NOT_UNPACKED = (".tar.lz4", ".tlz4", ".tar.Z")


def resolve(
    urls: Sequence[str],
    open_store: Callable[[str], Store],
    endings: Sequence[str] = (".tar",),
    beside: Sequence[str] = (),
) -> list[ObjectInfo]:
    """The objects that `urls` name, in their order; each may be a brace pattern, a prefix with "/" at its
    end, or a plain URL or path.

    `open_store(url)` gives the store that serves a URL; it stays the caller's, is only called by this thread, and may
    give the same one for several URLs of a root. `endings` are the names' ends by which a prefix knows shards (a "#" in
    them is a number); objects called one of `beside` come along with the shards of a prefix, and with "*.idx" those
    that end so. An object that is named twice comes twice.

    Raises `ObjectMissingError` for a pattern with missing members (naming the first) and for a prefix
    without shards (saying what was there), `ConfigError` for a pattern that cannot be read or that expands
    to nothing, and what the store raises.
    """
    if not urls:
        raise ConfigError("no URL was given; name at least one shard, pattern or prefix")
    expanded = [(url, expand(url)) for url in map(_text, urls)]
    plain = _plain([names[0] for _, names in expanded if len(names) == 1], open_store)
    found: list[ObjectInfo] = []
    for text, names in expanded:
        prefixes = [name for name in names if name.endswith("/")]
        if prefixes:
            for name in names:
                if name.endswith("/"):
                    found += _under(name, open_store, endings, beside)
                else:
                    found += _heads([name], open_store)
        elif len(names) == 1:
            found.append(plain[names[0]])
        else:
            with _naming(text, names):
                found += _members(text, names, open_store)
    return found


@contextlib.contextmanager
def _naming(pattern: str, names: list[str]) -> Iterator[None]:
    """Errors of the store name the pattern that the user wrote, in place of what its `names` begin with, which is only
    what we list.
    """
    try:
        yield
    except StoreError as error:
        message = str(error)
        if message.startswith(redact(pattern)):
            raise
        for prefix in _common_prefixes(names):
            message = message.removeprefix(f"{redact(prefix)}: ")
        raise type(error)(f"{pattern}: {message}") from error


def present(names: Sequence[str], open_store: Callable[[str], Store]) -> list[ObjectInfo]:
    """Those of the objects called `names` that are there, in this order. Names are taken as they are, also with braces;
    what the store raises besides is raised.
    """
    there = _in_listings(list(dict.fromkeys(names)), open_store)
    left = [name for name in dict.fromkeys(names) if name not in there]
    for name, info in zip(left, _one_by_one(left, open_store, may_miss=True), strict=True):
        if info is not None:
            there[name] = info
    return [there[name] for name in names if name in there]


def _text(url: object) -> str:
    if not isinstance(url, str | os.PathLike) or not os.fspath(url):
        raise ConfigError(f"{url!r} is not a URL or path; write s3://bucket/prefix/ or /data/train-{{000..123}}.tar")
    return str(os.fspath(url))


def expand(url: str) -> list[str]:
    """The URLs of a brace pattern, as webdataset expands it."""
    check_key(url)
    if "{" not in url:
        return [normalise(url)]
    try:
        return [normalise(name) for name in braceexpand(url)]
    except ValueError as error:
        raise ConfigError(f"{url!r}: its braces do not match; write {{000..123}} or {{a,b}}") from error


def _under(
    prefix: str, open_store: Callable[[str], Store], endings: Sequence[str], beside: Sequence[str]
) -> list[ObjectInfo]:
    everything = list(open_store(prefix).list(prefix))
    ends = tuple(each[1:] for each in beside if each.startswith("*"))
    is_beside = [_name(info) in beside or info.url.endswith(ends) for info in everything]
    extra = [info for info, is_extra in zip(everything, is_beside, strict=True) if is_extra]
    shards = [
        info
        for info, is_extra in zip(everything, is_beside, strict=True)
        if not is_extra and ends_in(info.url.lower(), tuple(endings))
    ]
    if not shards:
        raise ObjectMissingError(_no_shards(prefix, [info.url.removeprefix(prefix) for info in everything], endings))
    return shards + extra


def _no_shards(prefix: str, there: list[str], endings: Sequence[str]) -> str:
    """What a prefix has instead of shards, and what to do."""
    plain = [each for each in endings if not each.endswith((*PACKED_ENDINGS, *PACKED_TAR_ENDINGS))]
    kinds = ", ".join(plain) + (", and these packed, as in .gz" if len(plain) < len(endings) else "")
    if not there:
        return f"{prefix}: no shards ({kinds}) under this prefix, which holds nothing at all; {how_to_name(prefix)}"
    by_ending = Counter(os.path.splitext(name)[1] or "without an ending" for name in there)
    counts = ", ".join(f"{count} {ending}" for ending, count in by_ending.most_common(_SHOWN))
    others = "other object" + "s" * (len(there) > 1)
    held = f"{len(there)} {others} ({counts}), the first: {', '.join(there[:_SHOWN])}"
    tables = list(filter(None, map(of_table, there)))
    if 2 * len(tables) >= len(there):
        cure = tables[0]
    elif any(name.endswith(_NOT_UNPACKED) for name in there):
        cure = "shards that are packed by lz4 or compress are not read, so pack them with zstd or gzip"
    elif ".bin" not in endings and (".bin" in by_ending or ".npy" in by_ending):
        cure = 'files of tokens (.bin, .npy) are read with format="tokens(LENGTH, DTYPE)"'
    elif set(there) == {_INDEX_NAME}:
        cure = "that names the shards of MDS and LitData: upload those, if it names any"
    elif ".json" in by_ending and ".jsonl" in endings:
        cure = 'files of JSON lines that end in .json are read where they are named one by one, with format="jsonl"'
    elif ".tar" not in endings or ".jsonl" not in endings:  # those of a format that was named
        cure = (
            f"{how_to_name(prefix)}, or leave out the format, which then goes by the endings; files that are called "
            "otherwise are read where they are named one by one, by a pattern or by a list"
        )
    else:
        pack = "or pack its files into shards: tar --sort=name -cf train-000000.tar FOLDER"
        cure = f"{how_to_name(prefix)}, {pack}"
    return f"{prefix}: no shards ({kinds}) under this prefix, which holds {held}; {cure}"


def of_table(name: str) -> str:
    """What to do about a file of a name that says that it is a table; "" about others."""
    kind = os.path.splitext(name)[1].lower()
    if kind not in _TABLES:
        return ""
    return (
        f"tables ({kind}) are not read; write their rows as JSON lines, for example with pandas: "
        f'{_TABLES[kind]}.to_json("x.jsonl", orient="records", lines=True), or as MDS, which keeps their types'
    )


@functools.lru_cache(maxsize=64)
def _kinds(endings: tuple[str, ...]) -> tuple[tuple[str, ...], re.Pattern[str] | None]:
    """Those without a number, and what the others match."""
    texts = [re.escape(each).replace(re.escape("#"), "[0-9]+") for each in endings if "#" in each]
    numbered = re.compile(f"(?:{'|'.join(texts)})\\Z") if texts else None
    return tuple(each for each in endings if "#" not in each), numbered


def ends_in(name: str, endings: tuple[str, ...]) -> bool:
    """Whether a name ends in one of these; a "#" in them stands for a number."""
    plain, numbered = _kinds(endings)
    return name.endswith(plain) or (numbered is not None and numbered.search(name) is not None)


def _name(info: ObjectInfo) -> str:
    return info.url.rpartition("/")[2]


def _members(pattern: str, names: list[str], open_store: Callable[[str], Store]) -> list[ObjectInfo]:
    """The objects called `names`, which `pattern` expands to, in that order."""
    if scheme(names[0]) in httpstore.SCHEMES:
        return _heads(names, open_store)
    there = _listed(names, open_store)
    if any(name not in there for name in names):
        there |= _listed(names, open_store)  # one listing, which may have been cut short, ends no job
    missing = [name for name in names if name not in there]
    if missing:
        first = ", ".join(missing[:_SHOWN])
        raise ObjectMissingError(
            f"{pattern}: {len(missing)} of its {len(names)} objects are not there, the first: {first}; "
            "correct the range, or upload what is missing"
        )
    return [there[name] for name in names]


def _plain(names: list[str], open_store: Callable[[str], Store]) -> dict[str, ObjectInfo]:
    """The objects called `names`, prefixes among them left out, by name."""
    names = [name for name in dict.fromkeys(names) if not name.endswith("/")]
    there = _in_listings(names, open_store)
    # What a listing did not show is asked for as well: its own answer says best what is wrong with it.
    left = [name for name in names if name not in there]
    try:
        return there | dict(zip(left, _heads(left, open_store), strict=True))
    except ObjectMissingError as error:
        folder = next((name for name in left if str(error).startswith(f"{name}:") and _is_folder(name, open_store)), "")
        if folder:
            raise ObjectMissingError(folder_without_slash(folder)) from error
        raise


def _is_folder(name: str, open_store: Callable[[str], Store]) -> bool:
    """Whether objects are under what is named as if it were one; where that cannot be said, it is not."""
    if scheme(name) in httpstore.SCHEMES:
        return False
    with contextlib.suppress(FastloadError):
        return next(iter(open_store(name).list(f"{name}/")), None) is not None
    return False


def _in_listings(names: list[str], open_store: Callable[[str], Store]) -> dict[str, ObjectInfo]:
    """Of the objects called `names` those that are found by listing a folder of many, by name."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    there: dict[str, ObjectInfo] = {}
    for group in folders.values():
        if len(group) >= _LISTED_FROM and scheme(group[0]) not in (*httpstore.SCHEMES, "file"):
            # A user who may not list may still read; if not, that is raised below.
            with contextlib.suppress(AccessDeniedError):
                there |= _listed(group, open_store)
    return there


def _listed(names: list[str], open_store: Callable[[str], Store]) -> dict[str, ObjectInfo]:
    """Those of the objects called `names` that are there, by name."""
    wanted = set(names)
    return {
        info.url: info
        for prefix in _common_prefixes(names)
        for info in open_store(prefix).list(prefix)
        if info.url in wanted
    }


def _common_prefixes(names: Iterable[str]) -> list[str]:
    """What the names of each root have in common: one listing for each bucket."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(store_root(name), []).append(name)
    # Character by character is what is wanted here: a listing's prefix need not end at a folder.
    return [os.path.commonprefix(group) for group in groups.values()]  # noqa: RUF071


def _heads(names: list[str], open_store: Callable[[str], Store]) -> list[ObjectInfo]:
    return [info for info in _one_by_one(names, open_store) if info is not None]


def _one_by_one(
    names: list[str], open_store: Callable[[str], Store], *, may_miss: bool = False
) -> list[ObjectInfo | None]:
    """Each asked for; with `may_miss`, None for one that is not there."""
    stores: dict[str, Store] = {}
    for name in names:
        root = store_root(name)
        if root not in stores:
            stores[root] = open_store(name)

    def head(name: str) -> ObjectInfo | None:
        try:
            return stores[store_root(name)].head(name)
        except ObjectMissingError:
            if may_miss:
                return None
            raise

    if len(names) <= 1:
        return [head(name) for name in names]
    with ThreadPoolExecutor(min(_HEADS_AT_ONCE, len(names)), "fastload-head") as pool:
        return list(pool.map(head, names))
