"""A cache of 64 KiB chunks, whose arena has forty."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import fastload

CHUNK_BYTES = 64 << 10


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    """Where nothing is cached yet, with the service in this process, which starts at once."""
    with fastload.Cache(
        tmp_path / "cache", ram_bytes=40 * CHUNK_BYTES, disk_bytes="64MiB", chunk_bytes=CHUNK_BYTES, service="inprocess"
    ) as cache:
        yield cache


@pytest.fixture
def served(tmp_path: Path) -> Iterator[fastload.Cache]:
    """With a service that is a process."""
    with fastload.Cache(
        tmp_path / "cache", ram_bytes=40 * CHUNK_BYTES, disk_bytes="64MiB", chunk_bytes=CHUNK_BYTES
    ) as cache:
        yield cache
