"""What `stats()` returns: one flat form, the same for every loader, and listed in docs/stats.md.

Everything counts the current epoch of this loader (the last one, once it is over). Waits are seconds of all of the
loader's threads, by reason; `wait_batch_s` alone is the trainer's own stall, which `stall_*_s` divide by cause
(`fastload.timing.stalls`): with `work_s`, the trainer's own time, they add up to `elapsed_s`. The service's counters
are read when they are needed and when the epoch ends. A service that was replaced starts at zero again; one that does
not answer only leaves these figures out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import to_builtins
from msgspec.structs import replace

from fastload.config import cpu_count
from fastload.errors import ServiceError, WaitTimeoutError
from fastload.timing.activity import CAUSES
from fastload.timing.histogram import BOUNDS_S
from fastload.timing.stalls import Stalls
from fastload.timing.verdict import Figures, StoreFigures, Verdict, verdict
from fastload.waiting import REASONS, Waits

# An answer takes a millisecond. An epoch does not begin or end later for the sake of figures.
_ANSWER_S = 5.0

SOURCES = ("ram", "disk", "remote")

STATS_KEYS = (
    "epoch",
    "batches",
    "samples",
    "repeats",
    "skipped",
    "filtered",
    "elapsed_s",
    "first_batch_s",
    *(f"{source}_bytes" for source in SOURCES),
    *(f"{source}_share" for source in SOURCES),
    "fetched_bytes",
    "requests",
    "retries",
    "bad_replies",
    *(f"wait_{reason}_s" for reason in REASONS),
    "wait_batch_p50_s",
    "wait_batch_p99_s",
    "wait_batch_max_s",
    "work_s",
    *(f"stall_{cause}_s" for cause in CAUSES),
    "bound_by",
    "verdict",
    "node",
)


@dataclass(frozen=True, slots=True)
class Making:
    """How a loader makes batches, as far as its verdict tells. `makers`: threads or processes."""

    rank: int = 0
    world_size: int = 1
    makers: int = 1
    decodes_images: bool = False
    is_ours: bool = True
    ram_bytes: int = 0


@functools.cache
def _cores() -> int:
    """As when it was first asked for: files are read for it."""
    return cpu_count()


class Account(Protocol):
    """What a meter needs of a consumer."""

    def stats(self, deadline_s: float) -> dict[str, Any]:
        """`"consumer"`, `"node"` and `"store"` figures of the service."""
        ...

    def counts(self) -> dict[str, int]:
        """What the consumer knows itself: leases granted by source, and recalled."""
        ...


class JointAccount:
    """Several consumers' figures as one's. Consumers of one cache see the same service, which is counted once."""

    def __init__(self, accounts: Sequence[tuple[str, Account]]) -> None:
        """`accounts`: the name of each one's cache, and the account."""
        self._accounts = tuple(accounts)

    def stats(self, deadline_s: float) -> dict[str, Any]:
        """As of one: sums of the consumers' figures, and of those of each service."""
        found = [(cache, account.stats(deadline_s)) for cache, account in self._accounts]
        of_caches = dict(found).values()
        return {
            "consumer": _sums(stats.get("consumer", {}) for _, stats in found),
            "node": _sums(stats.get("node", {}) for stats in of_caches),
            "store": _sums(stats.get("store", {}) for stats in of_caches),
        }

    def counts(self) -> dict[str, int]:
        """Sums of the consumers' counts."""
        return _sums(account.counts() for _, account in self._accounts)


def _sums(figures: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers added up by name; of anything else the last."""
    sums: dict[str, Any] = {}
    for each in figures:
        for name, value in each.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            sums[name] = sums.get(name, 0) + value if is_number else value
    return sums


class EpochMeter:
    """Counts one epoch of one loader."""

    def __init__(self, epoch: int, account: Account, waits: Waits, stalls: Stalls, making: Making) -> None:
        self._epoch, self._account, self._waits = epoch, account, waits
        self._stalls, self._making = stalls, making
        self._batches = self._samples = self._repeats = self._skipped = 0
        self._waits_before = waits.seconds()
        self._counts_before = account.counts()
        self._service_before = self._service()
        self._first_batch_s = 0.0
        self._final: dict[str, Any] | None = None

    @property
    def samples(self) -> int:
        return self._samples

    def delivered(self, samples: int, repeats: int, skipped: int = 0) -> None:
        """A batch has reached the user."""
        took_s = self._stalls.delivered()
        self._first_batch_s = self._first_batch_s or took_s
        self._batches += 1
        self._samples += samples
        self._repeats += repeats
        self._skipped += skipped

    def stop(self) -> None:
        """The epoch is over: what is counted from now on belongs to another."""
        if self._final is None:
            self._final = self.stats()

    def stats(self) -> dict[str, Any]:
        """The figures, under `STATS_KEYS`."""
        if self._final is not None:
            return dict(self._final)
        service = self._service()
        since = {
            name: _since(self._service_before.get(name, {}), service.get(name, {}))
            for name in ("consumer", "node", "store")
        }
        waited = self._waits.seconds()
        source_bytes = {source: int(since["consumer"].get(f"{source}_bytes", 0)) for source in SOURCES}
        total = sum(source_bytes.values())
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "samples": self._samples,
            "repeats": self._repeats,
            "skipped": self._skipped,
            "filtered": self._stalls.filtered(),
            "elapsed_s": self._stalls.settled_s,
            "first_batch_s": self._first_batch_s,
            **{f"{source}_bytes": count for source, count in source_bytes.items()},
            **{f"{source}_share": count / total if total else 0.0 for source, count in source_bytes.items()},
            "fetched_bytes": int(since["node"].get("fetched_bytes", 0)),
            "requests": int(since["store"].get("requests", 0)),
            "retries": int(since["store"].get("retries", 0)),
            "bad_replies": int(since["store"].get("bad_replies", 0)),
            **{f"wait_{name}_s": seconds - self._waits_before[name] for name, seconds in waited.items()},
            **stall_figures(self._stalls, self._batches),
            **_said(verdict(self._figures(since, service))),
            "node": service.get("node", {}),
        }

    def report(self) -> dict[str, Any]:
        """What the service is to show of this loader now; docs/stats.md lists it. Asks nobody."""
        stalls, elapsed_s = self._stalls.seconds_until_now()
        waits, making = self._stalls.waits, self._making
        zeros = max(0, self._batches - waits.count)
        return {
            "rank": making.rank,
            "world_size": making.world_size,
            "epoch": self._epoch,
            "batches": self._batches,
            "samples": self._samples,
            "work_s": max(0.0, elapsed_s - sum(stalls.values())),
            "batch_wait": {
                "bounds_s": BOUNDS_S,
                "counts": waits.cumulative(zeros),
                "count": waits.count + zeros,
                "sum_s": waits.sum_s,
            },
            **to_builtins(self._of_loader(stalls, elapsed_s)),
        }

    def _of_loader(self, stalls: Mapping[str, float], elapsed_s: float) -> Figures:
        making = self._making
        counts = _since(self._counts_before, self._account.counts())
        return Figures(
            elapsed_s=elapsed_s,
            stalls=dict(stalls),
            busy=self._stalls.busy(),
            map_cpu_s=self._stalls.map_cpu_s(),
            leases=int(sum(counts[f"granted_{source}"] for source in SOURCES)),
            recalls=int(counts["recalled"]),
            makers=making.makers,
            cores=_cores(),
            decodes_images=making.decodes_images,
            is_ours=making.is_ours,
            ram_bytes=making.ram_bytes,
        )

    def _figures(self, since: Mapping[str, Mapping[str, float]], service: Mapping[str, Any]) -> Figures:
        """Those of the loader with what the service knows."""
        node, requests = since["node"], int(since["store"].get("requests", 0))
        refused = int(node.get("throttled_requests", 0) + node.get("timed_out_requests", 0))
        fetched_bytes, chunks = int(node.get("fetched_bytes", 0)), int(node.get("fetched_chunks", 0))
        endpoints = service.get("node", {}).get("endpoints", {})
        store = store_figures(endpoints.values(), requests, refused, fetched_bytes // max(1, chunks))
        store = replace(store, fetched_per_s=fetched_bytes / max(1e-9, self._stalls.settled_s))
        return replace(self._of_loader(self._stalls.seconds(), self._stalls.settled_s), store=store)

    def _service(self) -> dict[str, Any]:
        try:
            return self._account.stats(deadline_s=_ANSWER_S)
        except (ServiceError, WaitTimeoutError):  # it is being replaced, or was closed: no figures of it
            return {}


class PlainMeter:
    """Counts one epoch of a loader over a data set that is not fastload's: batches, and how they were waited for."""

    def __init__(self, epoch: int, makers: int) -> None:
        self.stalls = Stalls()
        self._epoch, self._makers = epoch, makers
        self._batches = 0
        self._first_batch_s = 0.0

    @property
    def epoch(self) -> int:
        return self._epoch

    def next(self) -> PlainMeter:
        """That of the epoch after this one."""
        return PlainMeter(self._epoch + 1, self._makers)

    def delivered(self) -> None:
        """A batch has reached the user."""
        took_s = self.stalls.delivered()
        self._first_batch_s = self._first_batch_s or took_s
        self._batches += 1

    def stats(self) -> dict[str, Any]:
        """The figures, under `STATS_KEYS`; those of caches and samples are zero."""
        stalls, elapsed_s = self.stalls.seconds(), self.stalls.settled_s
        figures = Figures(
            elapsed_s=elapsed_s, stalls=stalls, makers=max(1, self._makers), cores=_cores(), is_ours=False
        )
        return {
            **empty_stats(self._epoch),
            "batches": self._batches,
            "elapsed_s": elapsed_s,
            "first_batch_s": self._first_batch_s,
            "wait_batch_s": self.stalls.waits.sum_s,
            **stall_figures(self.stalls, self._batches),
            **_said(verdict(figures)),
        }


def empty_stats(epoch: int) -> dict[str, Any]:
    """The figures of an epoch that has not begun."""
    figures: dict[str, Any] = {key: 0.0 if key.endswith(("_s", "_share")) else 0 for key in STATS_KEYS}
    said = _said(verdict(Figures(elapsed_s=0.0, stalls={})))
    return {**figures, "epoch": epoch, **said, "node": {}}


def stall_figures(stalls: Stalls, batches: int) -> dict[str, float]:
    """The trainer's time by cause, and its waits for each batch."""
    seconds, waits = stalls.seconds(), stalls.waits
    zeros = max(0, batches - waits.count)  # what was there when it was asked for
    return {
        "wait_batch_p50_s": waits.quantile(0.5, zeros),
        "wait_batch_p99_s": waits.quantile(0.99, zeros),
        "wait_batch_max_s": waits.max_s,
        "work_s": max(0.0, stalls.settled_s - sum(seconds.values())),
        **{f"stall_{cause}_s": seconds[cause] for cause in CAUSES},
    }


def store_figures(
    endpoints: Iterable[Mapping[str, float]], requests: int, refused: int, request_bytes: int
) -> StoreFigures:
    """Of the endpoint that was asked most, by its figures as the service has them, and of what all were asked."""
    most = max(endpoints, key=lambda each: each.get("requests", 0), default={})
    return StoreFigures(
        requests=requests,
        refused=refused,
        request_bytes=request_bytes,
        requests_allowed=int(most.get("requests_allowed", 0)),
        bytes_per_s=most.get("bytes_per_s", 0.0),
        connection_bytes_per_s=most.get("connection_bytes_per_s", 0.0),
        first_byte_s=max(0.0, most.get("first_byte_s", 0.0)),
        saturated_at=int(most.get("saturated_at", 0)),
    )


def _said(found: Verdict) -> dict[str, str]:
    return {"bound_by": found.bound_by, "verdict": found.sentence}


def _since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """How far the numbers have grown; a number below its old value has begun again."""
    grown = {}
    for name, value in now.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            old = before.get(name, 0)
            grown[name] = value - old if value >= old else value
    return grown
