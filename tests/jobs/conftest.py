"""What the tests of jobs share: rank processes, and shards of all shapes in a bucket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastload.demo.weed import WeedServer
from tests.jobs.pool import RankPool
from tests.jobs.shelf import Shelf


@pytest.fixture(scope="package")
def pool(weed: WeedServer) -> Iterator[RankPool]:
    """Four ranks, of the fork server that is there when the store is."""
    pool = RankPool(4)
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture(scope="package")
def shelf(weed: WeedServer) -> Shelf:
    """Shards from which corpora are drawn; uploaded once."""
    return Shelf.uploaded(weed, "jobs")


@pytest.fixture
def mortals() -> Iterator[RankPool]:
    """Four ranks that end with the test: what they do may leave something behind, or they may be killed."""
    pool = RankPool(4)
    try:
        yield pool
    finally:
        pool.close()
