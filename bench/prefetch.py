"""Requests in flight without a knob: `python -m bench.prefetch [--quick] [--case NAME ...]`.

A store of `weed mini` behind a proxy that holds requests back by 20, 100 or 200 ms, gives 80 MB/s a connection and a
cap in all, and a consumer that reads chunks along a plan, as a loader does, by a cache service of its own. Data and
arena are in memory: what is measured is how the requests are steered. The cap is 400 MB/s, or what `--cap` says where
this machine cannot serve that much beside everything else; `--per-connection` goes with it.

    sweep    each first byte: goodput of fixed settings and of none, after 5 s; requests allowed then
    change   first byte and cap change in mid-run: goodput from 10 s after the change on, of the best fixed setting's
    steady   a consumer that takes 70 % of what the sweep's best gives: the share of its time that it waits
    slow     one request in a hundred takes 50 times as long, depth of two batches: stall with second requests, without

Each figure stands beside its target; the status is 1 where one is missed. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from bench.proxy import Profile, Proxy
from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.config import MIB
from fastload.demo.weed import WeedServer
from fastload.service.fetching import request_limit
from fastload.store import replies
from fastload.store.types import ObjectInfo

BUCKET = "bench"
OBJECTS, OBJECT_CHUNKS = 6, 8
CHUNK_BYTES = 8 * MIB
FIRST_BYTES_S = (0.02, 0.1, 0.2)
FIXED = (4, 6, 8, 12, 16, 24)
SETTLED_S = 5.0
ADAPTED_S = 10.0
BATCH_CHUNKS = 4
READ_MAX_BYTES_PER_S = 1.2e9  # more than comes


@dataclass(frozen=True, slots=True)
class Reading:
    """What came of a run."""

    mb_per_s: float
    waited_share: float
    waited_s: float
    node: dict[str, float]


class Place:
    """A store with objects in it, and a proxy in front of it."""

    def __init__(self, weed: WeedServer, proxy: Proxy) -> None:
        self.proxy = proxy
        options = weed.environment()
        self._options = {
            "endpoint": proxy.url,
            "key": options["AWS_ACCESS_KEY_ID"],
            "secret": options["AWS_SECRET_ACCESS_KEY"],
        }

    @contextmanager
    def consumer(self, fixed: int, buffers: int, chunk_bytes: int) -> Iterator[Consumer]:
        """One of a new cache in memory."""
        with (
            tempfile.TemporaryDirectory(prefix="fastload-prefetch-") as folder,
            Cache(
                folder,
                ram_bytes=buffers * chunk_bytes,
                disk_bytes=0,
                chunk_bytes=chunk_bytes,
                requests_in_flight=fixed,
                service="inprocess",
            ) as cache,
            cache.consumer(self._options) as consumer,
        ):
            yield consumer

    def read(
        self,
        seconds: float,
        *,
        fixed: int = 0,
        from_s: float = SETTLED_S,
        mb_per_s: float | None = None,
        depth: int = 4 * BATCH_CHUNKS,
        chunk_bytes: int = CHUNK_BYTES,
        at: tuple[float, Callable[[], None]] | None = None,
    ) -> Reading:
        """Read along a plan for so long, no faster than `mb_per_s`, with `depth` chunks wanted ahead; `at`: a time, and
        what to do then. Figures count from `from_s` on.
        """
        with self.consumer(fixed, max(depth, 32) + 3 * BATCH_CHUNKS, chunk_bytes) as consumer:
            found = list(consumer.resolve([f"s3://{BUCKET}/"], (".bin",)))
            # The same few objects again and again, each time as another version: nothing is read twice.
            rounds = 1 + int(seconds * READ_MAX_BYTES_PER_S / sum(info.size for info in found))
            objects = [ObjectInfo(info.url, info.size, None, number) for number in range(rounds) for info in found]
            consumer.attach(objects)
            consumer.set_plan(range(len(objects)))
            return _read(consumer, chunk_bytes, seconds, from_s, mb_per_s, depth, at)


def _read(
    consumer: Consumer,
    chunk_bytes: int,
    seconds: float,
    from_s: float,
    mb_per_s: float | None,
    depth: int,
    at: tuple[float, Callable[[], None]] | None,
) -> Reading:
    began = due = time.monotonic()
    fetched_before, waited_s, counted_from, position = 0.0, 0.0, 0.0, 0
    while (now := time.monotonic()) - began < seconds:
        if at is not None and now - began >= at[0]:
            at[1]()
            at = None
        if not counted_from and now - began >= from_s:
            # What came is counted, not what was read: some of that had come before.
            counted_from, fetched_before, waited_s = now, consumer.stats()["node"]["fetched_bytes"], 0.0
        consumer.want(range(position, position + depth))
        left = set(range(position, position + BATCH_CHUNKS))
        waiting = time.monotonic()
        while left:
            with consumer.acquire(sorted(left)) as held:
                left -= set(held.chunk_nos.tolist())
        waited_s += time.monotonic() - waiting
        consumer.release(range(position, position + BATCH_CHUNKS))
        position += BATCH_CHUNKS
        consumer.advance(position)
        if mb_per_s is not None:
            due = max(due, waiting) + BATCH_CHUNKS * chunk_bytes / (mb_per_s * 1e6)
            time.sleep(max(0.0, due - time.monotonic()))
    took_s = time.monotonic() - counted_from
    node = consumer.stats()["node"]
    return Reading((node["fetched_bytes"] - fetched_before) / took_s / 1e6, waited_s / took_s, waited_s, node)


class Report:
    """Lines of figures, and whether all targets were met."""

    met = True

    def line(self, what: str, value: float, unit: str = "", target: float | None = None, least: bool = True) -> None:
        """One figure."""
        verdict = ""
        if target is not None:
            good = value >= target if least else value <= target
            self.met &= good
            verdict = f"{'>=' if least else '<='} {target:g} {'met' if good else 'missed'}"
        print(f"  {what:56} {value:8.3g} {unit:8} {verdict}", flush=True)


def needed(profile: Profile) -> float:
    """Requests at a time that fill the link, by Little's law."""
    assert profile.total_bytes_per_s is not None
    assert profile.connection_bytes_per_s is not None
    return profile.total_bytes_per_s * (profile.delay_s / CHUNK_BYTES + 1 / profile.connection_bytes_per_s)


def sweep(place: Place, profile: Profile, seconds: float, report: Report) -> None:
    """See the module's text."""
    for first_byte_s in FIRST_BYTES_S:
        found = best_fixed(place, replace(profile, delay_s=first_byte_s), seconds)
        free = place.read(SETTLED_S + seconds)
        print(f"first byte {first_byte_s * 1000:g} ms: " + ", ".join(f"{n}: {rate:.0f}" for n, rate in found.items()))
        report.line("no knob, MB/s", free.mb_per_s)
        report.line("of the best fixed setting", free.mb_per_s / max(found.values()), "", 0.9)
        most = needed(replace(profile, delay_s=first_byte_s))
        report.line(
            "requests allowed at the end, of those needed", free.node["requests_allowed"] / most, "", 2.0, False
        )


def best_fixed(place: Place, profile: Profile, seconds: float) -> dict[int, float]:
    """MB/s of fixed settings."""
    place.proxy.change(profile)
    return {fixed: place.read(1.0 + seconds, fixed=fixed, from_s=1.0).mb_per_s for fixed in FIXED}


def change(place: Place, profile: Profile, seconds: float, report: Report) -> None:
    """See the module's text."""
    near, far = replace(profile, delay_s=0.02), replace(profile, delay_s=0.2)
    assert profile.total_bytes_per_s is not None
    narrow = replace(near, total_bytes_per_s=profile.total_bytes_per_s / 3)
    for name, before, after in (
        ("20 ms to 200 ms", near, far),
        ("200 ms to 20 ms", far, near),
        ("a third of the cap", near, narrow),
        ("three times the cap", narrow, near),
    ):
        best = max(best_fixed(place, after, seconds).values())
        place.proxy.change(before)
        changes_s = 8.0
        end_s = changes_s + ADAPTED_S + seconds
        at = changes_s, lambda after=after: place.proxy.change(after)
        found = place.read(end_s, from_s=changes_s + ADAPTED_S, at=at)
        print(f"{name}: best fixed {best:.0f} MB/s, no knob {found.mb_per_s:.0f}")
        report.line("of the best fixed setting, 10 s after", found.mb_per_s / best, "", 0.9)


def steady(place: Place, profile: Profile, seconds: float, report: Report) -> None:
    """See the module's text."""
    for first_byte_s in FIRST_BYTES_S:
        now = replace(profile, delay_s=first_byte_s)
        best = max(best_fixed(place, now, seconds).values())
        found = place.read(SETTLED_S + 2 * seconds, mb_per_s=0.7 * best, depth=24)
        report.line(f"{first_byte_s * 1000:g} ms: waits, share of time", found.waited_share, "", 0.02, False)


def slow(place: Place, profile: Profile, seconds: float, report: Report) -> None:
    """See the module's text."""
    # Chunks of 1 MiB, so that there are hundreds of requests in a short run.
    now = replace(profile, delay_s=0.02, slow_every=100, slow_s=50 * (0.02 + MIB / 80e6))
    place.proxy.change(now)
    stalls = {}
    for name, share in (("with", request_limit.SHARE_MAX), ("without", 0.0)):
        with mock.patch.object(request_limit, "SHARE_MAX", share):
            found = place.read(4 * seconds, from_s=2.0, mb_per_s=50.0, depth=2 * BATCH_CHUNKS, chunk_bytes=MIB)
        stalls[name] = found.waited_s
        requests = sum(each["requests"] for each in found.node["endpoints"].values())  # type: ignore[attr-defined]
        print(f"{name} second requests: {found.node['hedged_requests']:.0f} of {requests}")
        report.line("stall", found.waited_s, "s")
        if share:
            report.line("second requests, share", (found.node["hedged_requests"] - 1) / requests, "", 0.03, False)
    report.line("stall with, of that without", stalls["with"] / max(stalls["without"], 1e-9), "", 1 / 3, False)


CASES = {"sweep": sweep, "change": change, "steady": steady, "slow": slow}


def main() -> int:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs: a look, not a figure")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cap", type=float, default=400.0, help="MB/s in all")
    parser.add_argument("--per-connection", type=float, default=80.0, help="MB/s")
    options = parser.parse_args()
    profile = Profile(0.02, options.cap * 1e6, options.per_connection * 1e6)
    report = Report()
    with (
        tempfile.TemporaryDirectory(prefix="fastload-store-") as folder,
        WeedServer(Path(folder)) as weed,
        mock.patch.object(replies, "other_version", return_value=""),  # versions are made up: see `Place.read`
    ):
        weed.make_bucket(BUCKET)
        for number in range(OBJECTS):
            weed.put(f"s3://{BUCKET}/{number}.bin", os.urandom(OBJECT_CHUNKS * CHUNK_BYTES))
        with Proxy(weed.endpoint_url, profile) as proxy:
            place = Place(weed, proxy)
            for name in options.case:
                print(f"{name}: cap {options.cap:g} MB/s, {options.per_connection:g} MB/s a connection")
                CASES[name](place, profile, 3.0 if options.quick else 8.0, report)
    return int(not report.met)


if __name__ == "__main__":
    sys.exit(main())
