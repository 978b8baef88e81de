"""The shares of a node's cache fit together, whoever spends them."""

from __future__ import annotations

import pytest

from fastload import shares
from fastload.service.deciding.eviction import prefetch_distance, read_threads, write_queue_max, write_threads

BUFFER_COUNTS = [2, 3, 4, 5, 8, 13, 40, 1024, 1 << 14]


def test_what_is_held_at_the_same_time_is_no_more_than_all() -> None:
    assert shares.ARC + shares.WINDOWS <= 1
    assert shares.ARC + shares.PREFETCH_MOST <= 1
    assert shares.PREFETCH_LEAST <= shares.PREFETCH_MOST
    assert shares.READ_AHEAD < shares.WINDOWS
    assert shares.INDEXING <= shares.WINDOWS
    assert 0 < shares.WRITE_QUEUE < 1
    assert 0 < shares.DISK_CHUNKS < 1


@pytest.mark.parametrize("share", [shares.WINDOWS, shares.READ_AHEAD])
def test_shares_that_are_spent_as_one_part_in_so_many_are_exact(share: float) -> None:
    assert 1 / share == int(1 / share)


@pytest.mark.parametrize("buffer_count", BUFFER_COUNTS)
def test_a_disk_that_hangs_leaves_an_arena_buffers(buffer_count: int) -> None:
    left = buffer_count - read_threads(buffer_count) - write_threads(buffer_count)
    assert left >= (2 if buffer_count >= 4 else 0)


@pytest.mark.parametrize("buffer_count", BUFFER_COUNTS)
@pytest.mark.parametrize("requests_allowed", [1, 8, 256, 10_000])
def test_prefetching_displaces_a_share_at_most(buffer_count: int, requests_allowed: int) -> None:
    ahead = prefetch_distance(buffer_count, requests_allowed)
    assert 1 <= ahead <= max(1, buffer_count * shares.PREFETCH_MOST)
    assert ahead >= min(buffer_count * shares.PREFETCH_LEAST, buffer_count * shares.PREFETCH_MOST) - 1


@pytest.mark.parametrize("buffer_count", BUFFER_COUNTS)
def test_writes_that_wait_leave_buffers_for_training(buffer_count: int) -> None:
    assert 1 <= write_queue_max(buffer_count) < buffer_count
