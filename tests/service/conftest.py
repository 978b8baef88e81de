"""Real objects on the real server, and a cache of 64 KiB chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastload.client import Handle as Cache
from fastload.demo.weed import WeedServer
from tests.conftest import Bucket
from tests.service.helpers import CHUNK_BYTES, random_bytes

OBJECT_COUNT = 6


@pytest.fixture(scope="session")
def bucket_name(weed: WeedServer) -> str:
    """One bucket for all these tests: the first object in a new one takes the server a quarter of a second."""
    weed.make_bucket("service-tests")
    return "service-tests"


@pytest.fixture
def s3(s3: Bucket, bucket_name: str) -> Bucket:
    """That bucket. It holds nothing but `shards`, which are put right for each test."""
    return replace(s3, name=bucket_name)


@pytest.fixture
def shards(s3: Bucket) -> dict[str, bytes]:
    """Six objects of a bit more than three chunks, by URL."""
    sizes = [3 * CHUNK_BYTES + 1000 * number for number in range(OBJECT_COUNT)]
    return {
        s3.put(f"shard-{number}.tar", random_bytes(number, size)): random_bytes(number, size)
        for number, size in enumerate(sizes)
    }


@pytest.fixture
def mode() -> Any:
    """How the service runs; tests that should hold both ways are parametrised with `mode`."""
    return "auto"


@pytest.fixture
def cache(tmp_path: Path, mode: Any) -> Iterator[Cache]:
    """An arena of 40 buffers, and room for all on disk."""
    with Cache(
        tmp_path / "cache", ram_bytes=40 * CHUNK_BYTES, disk_bytes="64MiB", chunk_bytes=CHUNK_BYTES, service=mode
    ) as cache:
        yield cache
