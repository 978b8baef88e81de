"""Figures about the tiers, as the service shows them; docs/protocol.md says what they mean."""

from __future__ import annotations

import numpy as np

from fastload.service import buffers
from fastload.service.buffers import BufferTable
from fastload.service.tiers import Disk


def of_buffers(table: BufferTable) -> dict[str, int]:
    """How many buffers are in which state."""
    count = np.bincount(table.status, minlength=buffers.STRANDED + 1).tolist()
    return {
        "buffers": table.count,
        "buffers_free": count[buffers.FREE],
        "buffers_leased": count[buffers.LEASED] + count[buffers.STUCK],
        "buffers_stranded": count[buffers.STRANDED],
    }


def of_disk(disk: Disk) -> dict[str, int]:
    """What the disk tier holds, and what went wrong with it."""
    counters = disk.counters
    return {
        "disk_used_bytes": disk.used_bytes,
        "disk_quota_bytes": disk.quota_bytes,
        "disk_damaged": counters["damaged"],
        "disk_errors": counters["errors"],
        "disk_stalls": counters["stalls"],
    }
