"""Rank processes for checkpoints of several."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastload.demo.weed import WeedServer
from tests.jobs.pool import RankPool


@pytest.fixture(scope="package")
def pool(weed: WeedServer) -> Iterator[RankPool]:
    """Four ranks, of the fork server that is there when the store is."""
    pool = RankPool(4)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
def mortals() -> Iterator[RankPool]:
    """Two ranks that end with the test."""
    pool = RankPool(2)
    try:
        yield pool
    finally:
        pool.close()
