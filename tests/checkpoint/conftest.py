"""Rank processes for checkpoints of several; and for what names no cache, one that ends with the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastload.client.cache import handle_of
from fastload.demo.weed import WeedServer
from tests.jobs.pool import RankPool
from tests.processes import service_pids, until


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


@pytest.fixture(autouse=True)
def default_cache(
    tmp_path_factory: pytest.TempPathFactory, nothing_left_behind: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("default") / "cache"
    monkeypatch.setenv("FASTLOAD_CACHE", str(directory))
    yield
    if directory.exists():
        handle_of(directory).close()
        until(lambda: not service_pids(directory))
