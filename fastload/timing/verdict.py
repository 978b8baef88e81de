"""Why a loader is slow, in one sentence: what most of the trainer's waiting was for, by how much, and what helps.

Pure, so that whoever has the figures may ask: a loader of itself, the service of each loader that reports, a benchmark
of what it ran. The verdict names the largest cause of waits, never another one; `bound_by` may say more of it, where
figures tell more: of fetching, whether the link, the time to the first byte or the store's refusals are the limit, and
of functions on samples, whether they work or wait. What the figures do not show is not said.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from fastload.config import format_bytes
from fastload.timing.activity import CAUSES, Cause

# Below this nothing is settled: threads start, caches are cold, code is compiled.
SHORT_S = 1.0
# A trainer that waits for less of its time is not held up by its loader.
KEEPS_UP_SHARE = 0.05
# Requests that a store refuses, of all: from here on it is asked for more than it gives.
THROTTLED_SHARE = 0.01
# Of the time of a request, what passes before its first byte: from here on more at a time would bring more.
LATENCY_SHARE = 0.5
# Of what the endpoint gives where more requests bring no more, what an epoch fetched: from here on that is the limit.
_LINK_SHARE = 0.6
# Functions that run for less of their time wait for something. All of them together, in cores: threads that compete for
# the interpreter run for a part of their time each, and for a core's in all.
_RUNS_SHARE, _RUNS_CORES = 0.5, 0.5
# Leases that were taken back while they were needed, of all: from here on the arena is too small for what is open.
_RECALLED_SHARE = 0.2
# All that threads can do: what is lacking is time between two of their steps.
_BUSY_SHARE = 0.8


class StoreFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The endpoint that was asked most; zeros where a figure is not known."""

    requests: int = 0
    refused: int = 0  # throttled or timed out
    requests_allowed: int = 0
    bytes_per_s: float = 0.0
    connection_bytes_per_s: float = 0.0
    first_byte_s: float = 0.0
    request_bytes: int = 0
    saturated_at: int = 0  # requests at a time at which more brought no more; 0: that was not seen
    fetched_per_s: float = 0.0  # bytes, over the epoch


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one epoch, or the part of it that is over."""

    elapsed_s: float
    stalls: dict[str, float]  # the trainer's waits, seconds by `CAUSES`
    busy: dict[str, float] = {}  # what the threads or processes that make batches did, seconds by cause
    map_cpu_s: float = -1.0  # processor time in busy["map"]; -1: not known
    makers: int = 0  # how many these are
    cores: int = 0
    decodes_images: bool = False
    is_ours: bool = True  # whether fastload reads the data; else a data set of another kind does
    ram_bytes: int = 0  # the arena
    leases: int = 0  # chunks that were leased, again included
    recalls: int = 0  # leases that were taken back since others needed the room
    store: StoreFigures = StoreFigures()


class Verdict(msgspec.Struct, frozen=True):
    """`sentence` with the figure and the cure. `bound_by` is one word, `cause` the largest cause of waits behind it;
    "" where the trainer does not wait, or where it is too early to say.
    """

    sentence: str
    bound_by: str
    cause: Cause | str


def verdict(figures: Figures) -> Verdict:
    """What holds the trainer up. Figures that make no sense count as zero."""
    elapsed_s = _number(figures.elapsed_s)
    stalls = {cause: _number(figures.stalls.get(cause, 0.0)) for cause in CAUSES}
    waited_s = sum(stalls.values())
    elapsed_s = max(elapsed_s, waited_s)
    if elapsed_s < SHORT_S:
        return Verdict(f"too short to say: {elapsed_s:.1f} s of the epoch; look again later", "unknown", "")
    if waited_s < KEEPS_UP_SHARE * elapsed_s:
        return Verdict(
            f"consumer-bound: the trainer waits {_percent(waited_s, elapsed_s)} of the time, so its own work is the "
            "limit; the loader keeps up, and nothing is to be done here",
            "consumer",
            "",
        )
    cause = max(CAUSES, key=stalls.__getitem__)
    bound_by, what = _about(cause, figures)
    waits = f"the trainer waits {_percent(waited_s, elapsed_s)} of the time"
    if stalls[cause] < 0.995 * waited_s:
        waits += f", {_percent(stalls[cause], elapsed_s)} for this"
    return Verdict(f"{bound_by}-bound: {what} ({waits})", bound_by, cause)


def _about(cause: Cause, figures: Figures) -> tuple[str, str]:
    if cause in ("fetch", "disk", "service") and _is_short_of_memory(figures):
        recalled = _percent(_number(figures.recalls), _number(figures.leases))
        return "memory", (
            f"{recalled} of the chunks leased were taken back for others, since what is open at a time does not fit "
            f"into ram_bytes={format_bytes(int(_number(figures.ram_bytes)))}; raise ram_bytes, or lower shuffle_window"
        )
    if cause == "fetch":
        return _about_fetching(figures)
    if cause in ("decode", "decompress"):
        return cause, _about_decoding(cause, figures)
    if cause == "map" and not figures.is_ours:
        return "map", (
            "batches are made by the data set's own code, which takes longer than the trainer's steps; raise "
            "num_workers, or make it quicker"
        )
    if cause == "map" and _maps_wait(figures):
        idle = 1.0 - _number(figures.map_cpu_s) / _number(figures.busy.get("map", 0.0))
        return "map", (
            f"functions given to map() or map_batch() take {_per_maker('map', figures)}, and wait or sleep for "
            f"{idle:.0%} of that; raise num_workers, also beyond the number of cores, or have them wait once for a "
            "batch, in map_batch()"
        )
    return cause, {
        "startup": "connecting, and starting the service, threads and processes; keep the loader for several epochs "
        "(workers and connection stay), and look at first_batch_s apart from the rest",
        "listing": "the store is asked which shards there are; keep the list in a file (manifest=), or name fewer and "
        "larger shards",
        "index": "shards are indexed, or the next batches planned; index them beforehand with fastload index or "
        "fastload warm, or use larger shards",
        "disk": "chunks are read from the disk tier, which is slower than they are used; use a faster disk for the "
        "cache, or raise ram_bytes",
        "service": "the cache service answers late; give the node a free core, and see its log for a disk or store "
        "that hangs",
        "map": f"functions given to map() or map_batch() take {_per_maker('map', figures)}; make them quicker, "
        + _more_workers(figures, "or do their work when the shards are written"),
        "collate": f"samples are put together into batches for {_per_maker('collate', figures)}; return arrays of one "
        "shape, " + _more_workers(figures, "or use smaller samples"),
        "transfer": 'batches are moved between processes or to the device; use workers="thread" where no function '
        "is in Python, device= in place of pin_memory, or smaller dtypes",
        "other": "a batch waits until a thread begins with it; give this process a free core",
    }[cause]


def _about_fetching(figures: Figures) -> tuple[str, str]:
    store = figures.store
    requests, refused = _number(store.requests), _number(store.refused)
    rate, connection = _number(store.bytes_per_s), _number(store.connection_bytes_per_s)
    if refused and refused >= THROTTLED_SHARE * max(requests, refused):
        return "throttled", (
            f"the store refuses {_percent(refused, max(requests, refused))} of {requests:.0f} requests; ask its "
            "operator for more, spread the data over more prefixes, or warm the cache beforehand"
        )
    if not rate or not connection:
        return "fetch", (
            "chunks come from the object store more slowly than they are used; warm the cache beforehand, or move "
            "the data nearer"
        )
    fetched = _number(store.fetched_per_s)
    if _number(store.saturated_at) and (not fetched or fetched >= _LINK_SHARE * rate):
        return "link", (
            f"the store gives {format_bytes(int(rate))}/s over {store.requests_allowed} requests at a time, more of "
            "them bring no more, and the trainer uses more; warm the cache beforehand, store smaller samples, or get "
            "a faster link"
        )
    body_s = _number(store.request_bytes) / connection
    first_byte_s = _number(store.first_byte_s)
    if first_byte_s > LATENCY_SHARE * (first_byte_s + body_s):
        return "latency", (
            f"a request waits {1000 * first_byte_s:.0f} ms for its first byte and takes {1000 * body_s:.0f} ms after, "
            f"and {store.requests_allowed} run at a time; allow more (requests_in_flight, ram_bytes), use larger "
            "shards, or warm the cache beforehand"
        )
    return "fetch", (
        "chunks come from the object store more slowly than they are used: "
        f"{format_bytes(int(fetched or rate))}/s, up to {store.requests_allowed} requests at a time, each "
        f"{1000 * first_byte_s:.0f} ms to its first byte and {1000 * body_s:.0f} ms after; whether the link gives more "
        "was not seen; warm the cache beforehand, raise ram_bytes (it bounds requests), or move the data nearer"
    )


def _about_decoding(cause: str, figures: Figures) -> str:
    what = "images" if figures.decodes_images else "values"
    does = "decode" if cause == "decode" else "decompress"
    makers, cores = int(_number(figures.makers)), int(_number(figures.cores))
    share = _share_of(cause, figures)
    if 0 < makers < cores:
        workers = "1 worker" if makers == 1 else f"{makers} workers"
        does += "s" if makers == 1 else ""
        return f"{workers} of {cores} cores {does} {what} {share:.0%} of the time; raise num_workers to {cores}"
    cure = "smaller stored images" if figures.decodes_images else "a cheaper format"
    if share < _BUSY_SHARE:
        return (
            f"{share:.0%} of {cores or makers} cores {does} {what}; other work on this machine has the rest; free cores"
        )
    return f"{share:.0%} of {cores or makers} cores {does} {what}; more prefetch will not help; consider {cure}"


def _per_maker(cause: str, figures: Figures) -> str:
    makers = max(1, int(_number(figures.makers)))
    who = "the thread that makes" if makers == 1 else f"the {makers} threads or processes that make"
    return f"{_share_of(cause, figures):.0%} of the time of {who} batches"


def _maps_wait(figures: Figures) -> bool:
    """Whether functions on samples hardly use a processor."""
    if figures.map_cpu_s < 0:
        return False
    took_s, cpu_s = _number(figures.busy.get("map", 0.0)), _number(figures.map_cpu_s)
    return cpu_s < _RUNS_SHARE * took_s and cpu_s < _RUNS_CORES * _number(figures.elapsed_s)


def _more_workers(figures: Figures, otherwise: str) -> str:
    makers, cores = int(_number(figures.makers)), int(_number(figures.cores))
    return f"or raise num_workers to {cores}" if makers < cores else otherwise


def _share_of(cause: str, figures: Figures) -> float:
    """Of the time of those that make batches, what this took."""
    makers = max(1.0, _number(figures.makers))
    return min(1.0, _number(figures.busy.get(cause, 0.0)) / max(1e-9, makers * _number(figures.elapsed_s)))


def _is_short_of_memory(figures: Figures) -> bool:
    leases = _number(figures.leases)
    return leases > 0 and _number(figures.recalls) >= _RECALLED_SHARE * leases


def _percent(part: float, of: float) -> str:
    return f"{min(1.0, part / of) if of > 0 else 0.0:.0%}"


def _number(value: Any) -> float:
    """A figure that may be anything: it comes from other processes too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    try:
        number = float(value)
    except OverflowError:
        return 0.0
    return number if math.isfinite(number) and 0 < number < 1e18 else 0.0


def figures_of(values: Mapping[str, Any]) -> Figures:
    """Figures from a report. Raises `msgspec.ValidationError` for what is none."""
    return msgspec.convert(values, Figures)
