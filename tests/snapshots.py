"""Snapshots made up for tests of their views."""

from __future__ import annotations

from typing import Any

from fastload import snapshot as of
from fastload.timing.histogram import BOUNDS_S

# What a terminal or a page might obey, and what is too long for either.
HOSTILE = "\x1b[31m\x9b2J<img onerror=alert(1)>\u202etxt.exe\r\n\x07" + "x" * 10_000


def make(struct: type[Any], **values: Any) -> Any:
    """One of these, with zeros and empty things for what is not said."""
    if struct is of.Histogram:
        values = {"bounds_s": list(BOUNDS_S), "counts": [0] * len(BOUNDS_S), **values}
    empty = {"int": 0, "float": 0.0, "str": "", "bool": False}
    given = {
        name: make(getattr(of, kind)) if hasattr(of, kind) else empty.get(kind, [] if kind.startswith("list") else {})
        for name, kind in struct.__annotations__.items()
        if name not in values
    }
    return struct(**given, **values)


def example(at: float = 1000.0, name: str = "train", **values: Any) -> of.Snapshot:
    """One with something of each kind, all called `name`."""
    node = make(
        of.Node,
        host=name,
        pid=7,
        directory=f"/nvme/{name}",
        fastload=name,
        started_at=100.0,
        remote_bytes=1000,
        counters={"fetched_bytes": 4096, "hedged_requests": 3},
    )
    given: dict[str, Any] = {
        "version": of.VERSION,
        "at": at,
        "node": node,
        "tiers": [
            make(of.Tier, name="ram", limit_bytes=1 << 30, used_bytes=1 << 29, served_bytes=5000, is_writable=True),
            make(of.Tier, name="disk", limit_bytes=1 << 40, used_bytes=1 << 38, served_bytes=700, is_writable=True),
        ],
        "endpoints": [make(of.Endpoint, name=name, requests=10, requests_allowed=8, first_byte_s=0.02)],
        "data_sets": [make(of.DataSet, name=name, object_count=3, byte_count=300, ram_bytes=100, disk_bytes=200)],
        "jobs": [
            make(of.Job, id="1", name=name, state="warming", done_bytes=5, total_bytes=10, eta_s=60.0, error=name)
        ],
        "consumers": [make(of.Consumer, number=1, pid=9, name=name, program=name, ram_bytes=500, report={"rank": 0})],
        "troubles": [name],
    }
    return of.Snapshot(**{**given, **values})
