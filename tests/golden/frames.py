"""The bytes of every message between consumers and the cache service, by its tag, and its fields in order."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

from fastload import snapshot
from tests.golden.doors import ObjectInfo, ObjectRows, protocol

_ROWS = ObjectRows.of([ObjectInfo("s3://bucket/a.tar", 5, '"e"'), ObjectInfo("/data/ä.tar", 1 << 40, None, 7)])
_SNAPSHOT = snapshot.Snapshot(
    version=1,
    at=1.5,
    node=snapshot.Node(
        host="node7",
        pid=4321,
        uid=1000,
        directory="/nvme/cache",
        fastload="0.1.0",
        is_daemon=True,
        started_at=0.5,
        cpu_s=0.25,
        memory_bytes=30 << 20,
        chunk_bytes=8 << 20,
        remote_bytes=3,
        counters={"fetched_bytes": 1.0},
    ),
    tiers=[],
    endpoints=[],
    data_sets=[],
    jobs=[],
    consumers=[],
    troubles=["the disk is full"],
)
_STORE = {"endpoint_url": "http://localhost:8333", "anonymous": True, "extra": [["a", "b"]]}

FROM_CONSUMER: dict[str, tuple[Any, ...]] = {
    "hello": (7, 1234, "train", _STORE, {"disk_bytes": 1 << 33}, 77, "train.py"),
    "credentials": (_STORE,),
    "resolve": (1, ["s3://bucket/"], [".tar"], ["fastload-index.arrow"], True),
    "open": (2, "s3://bucket/a.tar"),
    "attach": (True, False, _ROWS),
    "plan": ([0, 2, 1], 3, True, 17, protocol.WarmTerms(200_000_000, 5, 1.75e9, True)),
    "keep": ([0, 1], "sieve"),
    "uses": (1 << 33, b"\0\0\0\0\1\0\0\0"),
    "advance": (300,),
    "want": ([1, 2**40], 3, True),
    "release": ([1, 70_000],),
    "pinned": ([5],),
    "get_indexes": (4, [0, 1]),
    "put_index": (1, b"index"),
    "give_up_indexes": ([1, 70_000],),
    "put_counts": ([0, 1], b"\1\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0"),
    "get_counts": (5, [1]),
    "get_unpacked_sizes": (5, [1]),
    "clear": (6, True, True),
    "pin": (6, "train", [0, 1], 86400.0, 1 << 40),
    "unpin": (6, ["train", "s3://bucket/"]),
    "label": ("train", [0, 1]),
    "held": (6,),
    "stats": (7,),
    "report": ({"samples": 12, "stalls": {"fetch": 0.5}},),
    "ping": (),
    "save": (
        "s3://bucket/run/7/",
        "0123456789abcdef",
        3,
        1 << 30,
        [(0, 4100), (8192, 1 << 28)],
        (1 << 29, 500),
        True,
        protocol.Begin(True, 1.5, 0.25),
    ),
    "take_back": ("0123456789abcdef", 3),
    "load": (5, "s3://bucket/run/7/0123456789abcdef/r00003-0000.safetensors", 1 << 28, ('"e"', 7)),
    "load_range": (6, 5, 65536, 8 << 20),
}
FROM_OPERATOR: dict[str, tuple[Any, ...]] = {
    "observe": (7, 1234, "status"),
    "watch": (1, 2.5),
    "hand_over": (2,),
    "submit_job": (3, {"name": "a", "urls": ["s3://bucket/"], "job": {"seed": 1}}),
    "cancel_job": (4, "0123456789"),
    "retry_job": (5, "0123456789"),
    "clear": (6, True, True),
    "unpin": (6, ["train", "s3://bucket/"]),
    "evict": (2, ["s3://bucket/"]),
    "verify": (3, [], True),
    "borrow": (4, "0123456789abcdef"),
}
FROM_SERVICE: dict[str, tuple[Any, ...]] = {
    "observed": (7, b"0123456789abcdef", 4321, True),
    "shown": (1, _SNAPSHOT),
    "verified": (3, 70, 100, 70 << 20, 1, 1, ["0" * 32 + "-00000000"], False),
    "done": (9, {"freed_bytes": 3}),
    "welcome": (7, b"0123456789abcdef", 4321, 8 << 20, 256, ["the disk is full"]),
    "refused": ("ServiceError", "another version"),
    "grants": ([1, 2], [3, 3], [0, 255], [0, 2]),
    "failed": ([1], [3], "ObjectMissingError", "it is gone"),
    "recall": ([1, 2],),
    "resolved": (1, _ROWS, True),
    "opened": (2, 9, "s3://bucket/a.tar", 5, '"e"', -1),
    "indexes": (4, [0], [b"index"], [1], True),
    "counts": (5, b"\xff\xff\xff\xff\xff\xff\xff\xff"),
    "cleared": (6, 1 << 34),
    "stats_reply": (7, {"node": {"fetched_bytes": 1, "beside": ""}, "consumer": {"ram_bytes": 2}}),
    "request_failed": (8, "StoreError", "no"),
    "trouble": ("the disk is full",),
    "progress": (1, 2, 3, 4, 5, 6, 7, False, "StoreError", "no", 1, [("s3://bucket/a.tar", "StoreError", "no")]),
    "pong": (),
    "save_state": ("0123456789abcdef", 3, "disk", 1 << 33, 5, "the disk is full", "StoreError", "no", True, "later"),
    "returned": ("0123456789abcdef", 3),
    "load_memory": (5,),
    "loaded": (6,),
    "lent": (4, [(3, [(0, 4100), (8192, 1 << 28)])]),
}


# What is said, by whom, and what the other side reads it with.
SIDES: dict[str, tuple[dict[str, tuple[Any, ...]], Any, Any]] = {
    "from consumer": (FROM_CONSUMER, protocol.FromConsumer, protocol.from_consumer),
    "from operator": (FROM_OPERATOR, protocol.FromOperator, protocol.from_operator),
    "from service": (FROM_SERVICE, protocol.FromService, protocol.from_service),
}


def record(_: Path) -> dict[str, Any]:
    """Frames as they go over the socket, in hex, and what both sides have to agree on beside them."""
    return {
        "agreed": {
            "version": protocol.VERSION,
            "frame_bytes_max": protocol.FRAME_BYTES_MAX,
            "index_bytes_max": protocol.INDEX_BYTES_MAX,
            "sources": list(protocol.SOURCES),
        },
        "fields": {tag: list(kind.__struct_fields__) for side in SIDES for tag, kind in kinds(side).items()},
        **{side: {tag: protocol.frame(each).hex() for tag, each in messages(side).items()} for side in SIDES},
    }


def messages(side: str) -> dict[str, Any]:
    """A message of each kind, with fixed values."""
    values, _, _ = SIDES[side]
    return {tag: kind(*values[tag]) for tag, kind in kinds(side).items()}


def kinds(side: str) -> dict[str, type]:
    """All messages of a side by tag."""
    _, union, _ = SIDES[side]
    return {kind.__struct_config__.tag: kind for kind in typing.get_args(union)}


def read(side: str, frames: dict[str, str]) -> dict[str, Any]:
    """What the other side makes of frames."""
    _, _, decode = SIDES[side]
    found = {}
    for tag, frame in frames.items():
        (payload,) = protocol.FrameReader().feed(bytes.fromhex(frame))
        found[tag] = decode(payload)
    return found
