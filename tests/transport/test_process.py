"""Worker processes: their heap reuses large arrays, and the collector skips what they started with."""

from __future__ import annotations

import gc
import os
import resource

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

import fastload

BYTES = 24 << 20


class Faults(Dataset[int]):
    """Makes a large array and throws it away; says how many pages that took from the kernel."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        torch.ones(2 * BYTES, dtype=torch.uint8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2 * BYTES, dtype=torch.uint8)
        assert get_worker_info() is not None
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults() -> list[int]:
    return [int(batch) for batch in fastload.DataLoader(Faults(), batch_size=None, num_workers=1)]


@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="another C library")
def test_a_worker_reuses_freed_memory(monkeypatch):
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    assert max(faults()[1:]) < 200  # of 12,288 pages, or 24 where they are large


def test_settings_of_the_user_take_precedence(monkeypatch):
    from fastload.transport import worker_process

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not worker_process.keep_freed_memory(1 << 28)


class Collected(Dataset[list[int]]):
    """Makes a cycle; how many objects the collector has set aside, and whether the cycle was garbage to it."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> list[int]:
        cycle: list[object] = []
        cycle.append(cycle)
        del cycle
        return [gc.get_freeze_count(), gc.collect()]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_collector_skips_what_a_worker_started_with(method):
    gc.unfreeze()
    loader = fastload.DataLoader(Collected(), batch_size=None, num_workers=1, multiprocessing_context=method)
    for spared, garbage in loader:
        assert spared > 10_000
        assert garbage >= 1
    assert gc.get_freeze_count() == 0
