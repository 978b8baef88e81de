"""Snapshots as a service makes them, with figures of the test's choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastload import snapshot


def consumer(number: int, report: dict[str, Any] | None = None, **values: Any) -> snapshot.Consumer:
    """One that reads."""
    figures = {"ram_bytes": 0, "disk_bytes": 0, "remote_bytes": 0, "leases": 0, "wants": 0}
    names = {"name": f"loader {number}", "pid": 100 + number, "program": "train.py"}
    return snapshot.Consumer(number=number, report=report or {}, **{**figures, **names, **values})


def data_set(name: str, byte_count: int = 100) -> snapshot.DataSet:
    """One of which half is in RAM."""
    return snapshot.DataSet(
        name=name,
        object_count=1,
        byte_count=byte_count,
        ram_bytes=byte_count // 2,
        disk_bytes=byte_count,
        pinned_bytes=0,
        last_use_at=1.0,
    )


def job(name: str) -> snapshot.Job:
    """One that is half way."""
    return snapshot.Job(
        id="7",
        name=name,
        state="warming",
        urls=[name] * 10_000,
        is_submitted=False,
        is_pinned=True,
        done_bytes=50,
        total_bytes=100,
        held_bytes=50,
        fetched_bytes=50,
        shard_count=2,
        failed_shards=0,
        bytes_per_s=10.0,
        eta_s=5.0,
        deadline_at=0.0,
        priority=0,
        since=1.0,
        next_at=0.0,
        error="",
        failed={name: name},
    )


def snap(
    at: float,
    *,
    ram: int = 0,
    disk: int = 0,
    store: int = 0,
    fetched: float = 0.0,
    started_at: float = 1.0,
    consumers: Sequence[snapshot.Consumer] = (),
    data_sets: Sequence[snapshot.DataSet] = (),
    jobs: Sequence[snapshot.Job] = (),
    troubles: Sequence[str] = (),
) -> snapshot.Snapshot:
    """What was served from each tier since the service began, and who is connected."""
    return snapshot.Snapshot(
        version=snapshot.VERSION,
        at=at,
        node=snapshot.Node(
            host="node7",
            pid=7,
            uid=1000,
            directory="/nvme/cache",
            fastload="0.1.0",
            is_daemon=True,
            started_at=started_at,
            cpu_s=0.5,
            memory_bytes=1 << 20,
            chunk_bytes=1 << 20,
            remote_bytes=store,
            counters={"fetched_bytes": fetched},
        ),
        tiers=[
            snapshot.Tier(
                name=name, limit_bytes=1 << 30, used_bytes=1, pinned_bytes=0, served_bytes=served, is_writable=True
            )
            for name, served in (("ram", ram), ("disk", disk))
        ],
        endpoints=[],
        data_sets=list(data_sets),
        jobs=list(jobs),
        consumers=list(consumers),
        troubles=list(troubles),
    )
