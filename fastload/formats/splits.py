"""Splits of a data set that lie under one prefix: training data, validation data.

Which split a shard belongs to is said by names: by the folder right under the prefix that it lies in (`train/0.mds`,
as MDS has them), or by what its own name begins with (`train-00000-of-00006.tar`), also in a folder called `data`, as
on the Hub. Or by one file of a prefix (see `energon`). What is in a shard never says it.

Any folder may be named as a split. But folders may mean anything, so that only names which are used for nothing else
show that there are splits, and only where there are two of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fastload.errors import ConfigError

_TRAINING = ("train", "training")
_VALIDATION = ("val", "valid", "validation", "dev")
_TESTING = ("test", "testing", "eval", "evaluation")
_USUAL = frozenset((*_TRAINING, *_VALIDATION, *_TESTING))
_OF_FILE = re.compile(rf"({'|'.join(sorted(_USUAL, key=len, reverse=True))})[-_.]")
_ON_THE_HUB = "data/"
_SHOWN = 20


def split_of(name: str) -> str | None:
    """The split of a shard, by its name from the prefix on; None where that says none."""
    folder, slash, _ = name.removeprefix(_ON_THE_HUB).partition("/")
    if slash:
        return folder
    match = _OF_FILE.match(folder)
    return match[1] if match else None


def usual_splits(names: Iterable[str]) -> list[str]:
    """The splits of shards of these names, where there are several without doubt, in the order of the names."""
    found = dict.fromkeys(split for name in names if (split := split_of(name)) in _USUAL)
    return [split for split in found if split is not None] if len(found) > 1 else []


def chosen(names: Sequence[str], split: str, prefix: str) -> list[int]:
    """Which of the shards of these names, under `prefix`, belong to a split. ConfigError where none does."""
    splits = [split_of(name) for name in names]
    found = [number for number, each in enumerate(splits) if each == split]
    if not found:
        raise unknown(split, prefix, [each for each in dict.fromkeys(splits) if each is not None])
    return found


def unknown(split: str, prefix: str, there: Sequence[str]) -> ConfigError:
    """The error for a split that is none of those which are `there`."""
    which = (
        f"there are {shown(there)}"
        if there
        else f"it has none at all; leave it out, or name a folder with {split}/ in it"
    )
    return ConfigError(f"{prefix} has no split {split!r}; {which}")


def several(prefix: str, there: Sequence[str], where: str = "") -> ConfigError:
    """The error for a prefix with splits of which none was named."""
    return ConfigError(
        f"{prefix} has splits{where}: {shown(there)}; name one of them, split={there[0]!r} (or --split={there[0]}), or "
        "name the folders or shards that are to be read together"
    )


def shown(splits: Sequence[str]) -> str:
    more = len(splits) - _SHOWN
    return ", ".join(map(repr, splits[:_SHOWN])) + (f" and {more} more" if more > 0 else "")


def with_split(urls: Sequence[str], split: str | None) -> list[str]:
    """What data of a split is called where only URLs are known: in lists of shards and pins. No two are the same."""
    return list(urls) if split is None else [f"{url} split={split}" for url in urls]
