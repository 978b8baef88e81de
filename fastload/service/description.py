"""Makes the snapshot that operators watch: what the parts of a core know, in the terms of `fastload.snapshot`."""

from __future__ import annotations

import os
import re
import resource
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from fastload import protocol, snapshot
from fastload.cgroups import read_file
from fastload.redaction import redact
from fastload.service.fetching.request_limit import Endpoints
from fastload.service.holding.holdings import Holdings
from fastload.service.operators import Jobs
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import ConsumerState
from fastload.stats import store_figures
from fastload.timing.histogram import BOUNDS_S, Histogram
from fastload.timing.verdict import figures_of, verdict
from fastload.version import __version__


def describe(
    resources: Resources,
    shared: SharedState,
    endpoints: Endpoints,
    holdings: Holdings,
    counters: Mapping[str, Any],
    jobs: Jobs | None,
) -> snapshot.Snapshot:
    """All that the service knows of this moment; `jobs` are a daemon's."""
    troubles = [*resources.warnings.messages, *(jobs.troubles() if jobs is not None else ())]
    return snapshot.Snapshot(
        version=snapshot.VERSION,
        at=resources.wall(),
        node=_node(resources, shared, counters, is_daemon=jobs is not None),
        tiers=_tiers(resources, shared, holdings),
        endpoints=_endpoints(endpoints),
        data_sets=holdings.data_sets(),
        jobs=jobs.describe() if jobs is not None else [],
        consumers=[_consumer(each) for each in shared.consumers],
        troubles=[redact(message) for message in troubles],
    )


def judged(report: dict[str, Any], endpoints: Endpoints, chunk_bytes: int) -> dict[str, Any]:
    """What a loader reports, with a verdict on it: the service knows how its store answers."""
    try:
        figures = figures_of(report)
    except msgspec.ValidationError:  # another program's, which says what it likes
        return report
    requests = sum(endpoint.hedger.request_count for _, endpoint in endpoints.items())
    refused = sum(sum(endpoint.refusals.values()) for _, endpoint in endpoints.items())
    store = store_figures((endpoint.stats() for _, endpoint in endpoints.items()), requests, refused, chunk_bytes)
    found = verdict(msgspec.structs.replace(figures, store=store))
    return {**report, "bound_by": found.bound_by, "verdict": found.sentence}


def _node(resources: Resources, shared: SharedState, counters: Mapping[str, Any], *, is_daemon: bool) -> snapshot.Node:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return snapshot.Node(
        host=socket.gethostname(),
        pid=os.getpid(),
        uid=os.geteuid(),
        directory=str(resources.disk.directory),
        fastload=__version__,
        is_daemon=is_daemon,
        started_at=resources.started_at,
        cpu_s=used.ru_utime + used.ru_stime,
        memory_bytes=_memory_bytes(),
        chunk_bytes=resources.limits.chunk_bytes,
        remote_bytes=shared.leases.served_bytes[protocol.SOURCE_REMOTE],
        counters={
            name: value
            for name, value in counters.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
    )


def _tiers(resources: Resources, shared: SharedState, holdings: Holdings) -> list[snapshot.Tier]:
    arena, disk = resources.arena, resources.disk
    ram_served, disk_served, _ = shared.leases.served_bytes
    return [
        snapshot.Tier(
            name="ram",
            limit_bytes=arena.byte_count,
            used_bytes=(shared.table.count - shared.table.free_count) * arena.chunk_bytes,
            pinned_bytes=0,
            served_bytes=ram_served,
            is_writable=True,
        ),
        snapshot.Tier(
            name="disk",
            limit_bytes=disk.quota_bytes,
            used_bytes=disk.used_bytes,
            pinned_bytes=holdings.pinned_disk_bytes,
            served_bytes=disk_served,
            is_writable=disk.writable,
        ),
    ]


def _endpoints(endpoints: Endpoints) -> list[snapshot.Endpoint]:
    described = []
    for name, endpoint in endpoints.items():
        figures, refusals = endpoint.stats(), endpoint.refusals
        described.append(
            snapshot.Endpoint(
                name=redact(name),
                requests_allowed=int(figures["requests_allowed"]),
                requests_in_flight=int(figures["requests_in_flight"]),
                requests=int(figures["requests"]),
                bytes_per_s=figures["bytes_per_s"],
                first_byte_s=figures["first_byte_s"],
                throttled_at=figures["throttled_at"],
                throttled_requests=refusals["throttled"],
                timed_out_requests=refusals["timed_out"],
                request_times=_histogram(endpoint.request_times),
                first_byte_times=_histogram(endpoint.first_byte_times),
            )
        )
    return described


def _histogram(histogram: Histogram) -> snapshot.Histogram:
    return snapshot.Histogram(
        bounds_s=list(BOUNDS_S), counts=histogram.cumulative(), count=histogram.count, sum_s=histogram.sum_s
    )


def _consumer(consumer: ConsumerState) -> snapshot.Consumer:
    ram, disk, remote = consumer.granted.byte_counts
    return snapshot.Consumer(
        number=consumer.number,
        name=consumer.name,
        pid=consumer.pid,
        program=consumer.program,
        leases=len(consumer.leases),
        wants=len(consumer.wants),
        ram_bytes=ram,
        disk_bytes=disk,
        remote_bytes=remote,
        report=consumer.report,
    )


def _memory_bytes() -> int:
    """Anonymous memory of this process; 0 where the system does not say."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", read_file("/proc/self/status"), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
