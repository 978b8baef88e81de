"""Checks of arguments that several entry points share. They raise `ConfigError` unless their docstring differs."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from fastload.errors import ConfigError
from fastload.store.urls import check_written

CachePolicy = Literal["auto", "pin", "future", "sieve", "lru"]


def checked_urls(urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> tuple[str, ...]:
    """One URL or path or several, as a tuple."""
    if isinstance(urls, str | os.PathLike):
        given, written = [urls], repr(urls)
    elif not isinstance(urls, Iterable) or isinstance(urls, bytes | Mapping | set | frozenset):
        raise ConfigError(f"urls={urls!r:.200} must be a URL, a path, or a list of these")
    else:
        given = list(urls)
        written = repr(given)
    wrong = [url for url in given if not isinstance(url, str | os.PathLike)]
    if wrong:
        raise ConfigError(f"urls={written:.200}: {wrong[0]!r:.100} is neither a URL nor a path; give a list of these")
    found = tuple(os.fspath(url) for url in given)
    if not found or not all(isinstance(url, str) and url for url in found):
        raise ConfigError(f"urls={written:.200} names no shard; give at least one URL, pattern or prefix")
    for url in found:
        check_written(url)
    return found


def checked_path(path: Any, name: str) -> str | None:
    """A path of a file, or None."""
    if path is not None and not isinstance(path, str | os.PathLike):
        raise ConfigError(f"{name}={path!r} must be the path of a file")
    text = None if path is None else os.fspath(path)
    if text is not None and (not isinstance(text, str) or not text):
        raise ConfigError(f"{name}={path!r} must be the path of a file")
    return text


def checked_split(split: Any) -> str | None:
    """The name of a split, or None."""
    if split is not None and (not isinstance(split, str) or not split or "/" in split):
        raise ConfigError(f"split={split!r} must be the name of a split, such as 'train'")
    return split


def checked_batch_size(batch_size: int | None) -> int | None:
    """An integer of at least 1, or None."""
    return None if batch_size is None else checked_count(batch_size, "batch_size")


def checked_count(value: int, name: str) -> int:
    """An integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ConfigError(f"{name}={value!r} must be an integer of at least 1")
    return operator.index(value)


def checked_seed(seed: int) -> int:
    """An integer."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ConfigError(f"seed={seed!r} must be an integer")
    return operator.index(seed)


def checked_epoch(epoch: int) -> int:
    """An integer of at least 0."""
    if isinstance(epoch, bool) or not hasattr(epoch, "__index__") or epoch < 0:
        raise ConfigError(f"epoch={epoch!r} must be an integer from 0 on")
    return operator.index(epoch)


def checked_on_error(on_error: str) -> str:
    """What to do where a sample cannot be read."""
    if on_error not in ("raise", "skip"):
        raise ConfigError(f'on_error={on_error!r} must be "raise" or "skip"')
    return on_error


def checked_cache_policy(policy: str) -> CachePolicy:
    """How the cache chooses what it keeps."""
    if policy not in get_args(CachePolicy):
        raise ConfigError(f'cache_policy={policy!r} must be "auto", "pin", "future", "sieve" or "lru"')
    return cast(CachePolicy, policy)


def checked_refresh(refresh: str) -> str:
    """When to list the data again."""
    if refresh not in ("never", "epoch"):
        raise ConfigError(f'refresh={refresh!r} must be "never" or "epoch"')
    return refresh


def checked_function(function: Any, name: str) -> Callable[[Any], Any]:
    """What `map` and `map_batch` were given."""
    if not callable(function):
        raise ConfigError(f"{name}({function!r}): give a function of one argument")
    checked: Callable[[Any], Any] = function
    return checked


def checked_number(number: Any, count: int) -> int:
    """A sample's number, counted from 0. TypeError for what is no number, IndexError outside of the data."""
    try:
        at = operator.index(number)
    except TypeError:
        raise TypeError(f"dataset[{number!r}]: give one number; for several samples use dataset.take([...])") from None
    return int(checked_numbers([at], count)[0])


def checked_numbers(numbers: Any, count: int) -> npt.NDArray[np.int64]:
    """Numbers of samples, int64[n], counted from 0; negative ones count from the end."""
    found = np.asarray(numbers)
    if found.size == 0:
        found = found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise TypeError(
            f"samples are taken by a list of whole numbers, not by {type(numbers).__name__} {numbers!r:.80}"
        )
    wrong = np.flatnonzero((found < -count) | (found >= count))
    if len(wrong):
        raise IndexError(f"sample {found[wrong[0]]} of a data set of {count} samples")
    found = found.astype(np.int64)
    return np.where(found < 0, found + count, found)
