"""`fastload.warm`: fill a node's cache with what a job will read, before it begins; in the job's own words."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from fastload import prepare
from fastload.arguments import checked_count, checked_epoch, checked_path, checked_seed, checked_split, checked_urls
from fastload.callers import public
from fastload.client.cache import AnyCache, directory_of
from fastload.client.cache import pin_name as pin_name_of
from fastload.config import parse_bytes, parse_rate, parse_seconds
from fastload.errors import ConfigError
from fastload.formats import Format, checked_format
from fastload.plan import Ranks, RequestedOrder, Shuffle
from fastload.prepare import PinTerms, Warmed, WarmJob
from fastload.protocol import Progress, WarmTerms
from fastload.store.logins import apart

OnProgress = Callable[[int, int], object]


@public
def warm(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    cache: AnyCache = None,
    shuffle: bool | Literal["window", "shards", "global", "none"] = "window",
    seed: int = 0,
    epoch: int = 0,
    nodes: int = 1,
    node: int = 0,
    partitions: int | None = None,
    index: str | os.PathLike[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    format: Format = "auto",  # noqa: A002  # as a data set calls it
    split: str | None = None,
    shuffle_window: int | str = "auto",
    storage_options: Mapping[str, Any] | None = None,
    bandwidth: int | str | None = None,
    deadline: float | str | None = None,
    pin: bool | str = False,
    ttl: float | str | None = None,
    check: bool = False,
    on_progress: OnProgress | None = None,
) -> Warmed:
    """Fill `cache` with what a job reads in `epoch`, in its order of first use. Blocks until everything is there, or
    the cache is full; the result says how much of it is held.

    `urls`, `shuffle`, `seed`, `partitions`, `index`, `manifest`, `format`, `split`, `shuffle_window` and
    `storage_options` are the job's: what its `StreamingDataset` is given. Of a job of several `nodes`, this is number
    `node`, from 0, and only its part is warmed.

    It stands back behind jobs that fetch. `bandwidth` (`"200MB/s"`, or bytes a second) bounds what it fetches; of
    several warm-ups on a node, the one with the nearest `deadline` (`"2h"`, or seconds from now) comes first. With
    `pin`, no other data displaces what was warmed: until it is unpinned, or was not used for `ttl` (`"14d"`, or
    seconds). A name may be given, under which operators see it.

    `check` fetches nothing and says what is held now. `on_progress` is called with the bytes that are done and those of
    all, some times a second, in this thread; an error that it raises ends the warm-up, and what is held stays.

    Raises the errors of listing, fetching and indexing, as a job would; ConfigError for arguments that cannot be.
    """
    job = WarmJob(
        checked_urls(urls),
        requested_order(shuffle, seed, shuffle_window, partitions),
        checked_epoch(epoch),
        checked_node(node, nodes),
        checked_path(index, "index"),
        checked_path(manifest, "manifest"),
        checked_format(format),
        checked_split(split),
    )
    terms, pinned = WarmTerms(checked_rate(bandwidth), 0, deadline_at(deadline, time.time())), _pin(pin, ttl, job.names)
    if check:
        found = prepare.look(job, directory_of(cache), storage_options=storage_options)
        return Warmed(found.object_count, found.total_bytes, found.held_bytes, stored_bytes=found.stored_bytes)

    def came(progress: Progress) -> None:
        if on_progress is not None:
            on_progress(progress.done_bytes, progress.total_bytes)

    return prepare.warm(job, cache, storage_options=storage_options, terms=terms, pin=pinned, on_progress=came)


def requested_order(
    shuffle: bool | str, seed: int, shuffle_window: int | str, partitions: int | None
) -> RequestedOrder:
    """The order that these arguments of a job ask for."""
    name = {True: "window", False: "none"}.get(shuffle, shuffle) if isinstance(shuffle, bool) else shuffle
    if name not in get_args(Shuffle):
        raise ConfigError(f'shuffle={shuffle!r} must be "window", "shards", "global" or "none"')
    window_bytes = None if shuffle_window == "auto" else parse_bytes(shuffle_window, "shuffle_window")
    if window_bytes is not None and window_bytes < 1:
        raise ConfigError(f'shuffle_window={shuffle_window!r} must be at least 1 byte, or "auto"')
    count = None if partitions is None else checked_count(partitions, "partitions")
    return RequestedOrder(checked_seed(seed), name, window_bytes, count)  # type: ignore[arg-type]


def checked_node(node: int, nodes: int) -> Ranks:
    """Any rank of this node: how many ranks share its partitions does not matter."""
    count = checked_count(nodes, "nodes")
    if isinstance(node, bool) or not isinstance(node, int) or not 0 <= node < count:
        raise ConfigError(f"node={node!r} must be from 0 to {count - 1}, since nodes={nodes}")
    return Ranks(node, count, 0, 1)


def checked_rate(bandwidth: int | str | None) -> int:
    """Bytes a second; 0: no limit."""
    bytes_per_s = 0 if bandwidth is None else parse_rate(bandwidth, "bandwidth")
    if bandwidth is not None and bytes_per_s < 1:
        raise ConfigError(f"bandwidth={bandwidth!r} lets nothing through; leave it out for no limit")
    return bytes_per_s


def deadline_at(deadline: float | str | None, now: float) -> float:
    """In seconds since 1970, as `now` is; 0: none."""
    seconds = None if deadline is None else parse_seconds(deadline, "deadline")
    if seconds == 0:
        raise ConfigError(f'deadline={deadline!r} has passed; give a length of time from now on, such as "2h"')
    return 0.0 if seconds is None else now + seconds


def _pin(pin: bool | str, ttl: float | str | None, urls: Sequence[str]) -> PinTerms | None:
    if not isinstance(pin, bool | str) or pin == "":
        raise ConfigError(f"pin={pin!r} must be True, False, or a name")
    if not pin:
        if ttl is not None:
            raise ConfigError(f"ttl={ttl!r} is that of a pin; add pin=True, or leave it out")
        return None
    ttl_s = 0.0 if ttl is None else parse_seconds(ttl, "ttl")
    if ttl is not None and not ttl_s:
        raise ConfigError(f"ttl={ttl!r} would end the pin at once; leave it out for no end")
    return PinTerms(pin if isinstance(pin, str) else pin_name(urls), ttl_s)


def pin_name(urls: Sequence[str]) -> str:
    """The name of a pin that was given none, as `Cache.pin` has it."""
    return pin_name_of(apart(urls, None)[0])
