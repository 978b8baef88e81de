"""What a node's cache holds and does at one moment: one description, which every view shows and nothing else.

The service makes a `Snapshot` for those who watch it (`protocol.Watch`). `fastload status` and `top`, metrics and the
page are views of it. It travels as msgpack in the protocol and as JSON to users, with these names; `VERSION` grows when
a field is renamed, removed or changes its meaning. Byte counts are ints, durations are seconds, moments are seconds
since 1970. Names and URLs are without credentials.
"""

from __future__ import annotations

from typing import Any

import msgspec

VERSION = 1


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, and the process that serves the cache on it."""

    host: str
    pid: int
    uid: int
    directory: str
    fastload: str  # its version
    is_daemon: bool  # it stays when the last consumer has gone
    started_at: float
    cpu_s: float
    memory_bytes: int  # anonymous memory of the process; the arena is the tier's
    chunk_bytes: int
    remote_bytes: int  # granted to consumers straight from stores; `Tier.served_bytes` is the rest of what they read
    counters: dict[str, float]  # docs/protocol.md lists them, under `node`


class Tier(msgspec.Struct, frozen=True, kw_only=True):
    """RAM or disk."""

    name: str  # "ram" or "disk"
    limit_bytes: int
    used_bytes: int
    pinned_bytes: int  # of used_bytes, what pins keep; in RAM they keep nothing
    served_bytes: int  # granted to consumers from it
    is_writable: bool


class Histogram(msgspec.Struct, frozen=True, kw_only=True):
    """Durations: how many were not above each of `bounds_s`, which are the same in every snapshot."""

    bounds_s: list[float]
    counts: list[int]
    count: int  # of all
    sum_s: float


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A store, as it was measured lately."""

    name: str
    requests_allowed: int
    requests_in_flight: int
    requests: int
    bytes_per_s: float
    first_byte_s: float  # -1: not known
    throttled_at: float  # requests at a time at which it refused; 0: never
    throttled_requests: int
    timed_out_requests: int
    request_times: Histogram  # of requests that succeeded, from their sending to their last byte
    first_byte_times: Histogram  # of those whose store says when it came


class DataSet(msgspec.Struct, frozen=True, kw_only=True):
    """What the cache holds of one data set: of a name that a pin or a job gave, or else of one folder of a store. It
    counts objects of which something is held, and those that a pin names.
    """

    name: str
    object_count: int
    byte_count: int  # of these objects, held or not
    ram_bytes: int
    disk_bytes: int
    pinned_bytes: int
    last_use_at: float


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A warming job of the daemon."""

    id: str
    name: str
    state: str  # waiting, listing, warming, done, failed, cancelled
    urls: list[str]  # the first of them
    is_submitted: bool  # by `warm --daemon`, or else of the daemon's configuration
    is_pinned: bool
    done_bytes: int
    total_bytes: int
    held_bytes: int
    fetched_bytes: int
    shard_count: int
    failed_shards: int
    bytes_per_s: float
    eta_s: float  # -1: not known
    deadline_at: float  # 0: none
    priority: int
    since: float  # when it was submitted, or its configuration was read
    next_at: float  # when it is tried or listed again; 0: that is not foreseen
    error: str  # why it is not done
    failed: dict[str, str]  # by shard, why it is not held; the first of them

    @property
    def is_ready(self) -> bool:
        """Whether all of its data is held now."""
        return self.state == "done" and self.held_bytes >= self.total_bytes


class Consumer(msgspec.Struct, frozen=True, kw_only=True):
    """One connection that reads or warms."""

    number: int
    name: str
    pid: int
    program: str
    leases: int
    wants: int
    ram_bytes: int
    disk_bytes: int
    remote_bytes: int
    report: dict[str, Any]  # what it says of itself: rank, epoch, samples, waits by cause, ... (docs/stats.md)


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """See the module's text."""

    version: int
    at: float
    node: Node
    tiers: list[Tier]
    endpoints: list[Endpoint]
    data_sets: list[DataSet]
    jobs: list[Job]
    consumers: list[Consumer]
    troubles: list[str]
