"""What `stats()` returns: one flat form, the same for every loader, and listed in docs/stats.md.

Everything counts the current epoch of this loader (the last one, once it is over). Waits are seconds of all of the
loader's threads, by reason; `wait_batch_s` alone is the trainer's own stall. The service's counters are read when they
are needed and when the epoch ends. A service that was replaced starts at zero again; one that does not answer only
leaves these figures out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from fastload.errors import ServiceError, WaitTimeoutError
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
    "elapsed_s",
    "first_batch_s",
    *(f"{source}_bytes" for source in SOURCES),
    *(f"{source}_share" for source in SOURCES),
    "fetched_bytes",
    "requests",
    "retries",
    "bad_replies",
    *(f"wait_{reason}_s" for reason in REASONS),
    "node",
)


class Account(Protocol):
    """What a meter needs of a consumer."""

    def stats(self, deadline_s: float) -> dict[str, Any]:
        """`"consumer"`, `"node"` and `"store"` figures of the service."""
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

    def __init__(
        self, epoch: int, account: Account, waits: Waits, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._epoch, self._account, self._waits, self._now = epoch, account, waits, now
        self._batches = self._samples = self._repeats = self._skipped = 0
        self._waits_before = waits.seconds()
        self._service_before = self._service()
        self._began_s = now()
        self._first_batch_s = 0.0
        self._last_batch_s = 0.0
        self._final: dict[str, Any] | None = None

    @property
    def samples(self) -> int:
        return self._samples

    def delivered(self, samples: int, repeats: int, skipped: int = 0) -> None:
        """A batch has reached the user."""
        self._last_batch_s = self._now() - self._began_s
        self._first_batch_s = self._first_batch_s or self._last_batch_s
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
            "elapsed_s": self._last_batch_s,
            "first_batch_s": self._first_batch_s,
            **{f"{source}_bytes": count for source, count in source_bytes.items()},
            **{f"{source}_share": count / total if total else 0.0 for source, count in source_bytes.items()},
            "fetched_bytes": int(since["node"].get("fetched_bytes", 0)),
            "requests": int(since["store"].get("requests", 0)),
            "retries": int(since["store"].get("retries", 0)),
            "bad_replies": int(since["store"].get("bad_replies", 0)),
            **{f"wait_{name}_s": seconds - self._waits_before[name] for name, seconds in waited.items()},
            "node": service.get("node", {}),
        }

    def _service(self) -> dict[str, Any]:
        try:
            return self._account.stats(deadline_s=_ANSWER_S)
        except (ServiceError, WaitTimeoutError):  # it is being replaced, or was closed: no figures of it
            return {}


def empty_stats(epoch: int) -> dict[str, Any]:
    """The figures of an epoch that has not begun."""
    figures: dict[str, Any] = {key: 0.0 if key.endswith(("_s", "_share")) else 0 for key in STATS_KEYS}
    return {**figures, "epoch": epoch, "node": {}}


def _since(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, float]:
    """How far the numbers have grown; a number below its old value has begun again."""
    grown = {}
    for name, value in now.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            old = before.get(name, 0)
            grown[name] = value - old if value >= old else value
    return grown
