"""Slots: memory comes back when the last view of it has gone, and never before."""

import gc
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from fastload.transport import slots
from fastload.transport.slots import SMALL_BYTES, SlotPool, size_class

SIZE = 4 * SMALL_BYTES


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_a_returned_slot_is_used_again() -> None:
    pool = SlotPool(1 << 30)
    first = pool.take(SIZE)
    where = address(first)
    del first
    assert address(pool.take(SIZE)) == where


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array[10:20],
        lambda array: array.view(np.float32).reshape(2, -1)[1],
        torch.from_numpy,
        lambda array: torch.from_numpy(array)[5:].detach(),
        lambda array: torch.from_numpy(array).view(torch.int16).numpy(),
        memoryview,
    ],
)
def test_any_view_keeps_the_slot(view) -> None:
    pool = SlotPool(1 << 30)
    array = pool.take(SIZE)
    where = address(array)
    kept = view(array)
    del array
    gc.collect()
    assert pool.free_bytes() == 0
    assert address(pool.take(SIZE)) != where
    del kept
    assert pool.free_bytes() > 0


def test_what_is_lent_is_writable_and_apart() -> None:
    pool = SlotPool(1 << 30)
    arrays = [pool.take(SIZE) for _ in range(8)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array.tolist()) for array in arrays] == [{number} for number in range(8)]


def test_typed_arrays() -> None:
    array = SlotPool(1 << 30).take_array((64, 3, 32, 32), np.float32)
    assert array.shape == (64, 3, 32, 32)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert SlotPool(0).take_array((0, 3), np.int64).shape == (0, 3)


def test_free_memory_is_bounded() -> None:
    pool = SlotPool(retained_bytes=3 * size_class(SIZE))
    arrays = [pool.take(SIZE) for _ in range(10)]
    del arrays
    assert pool.free_bytes() == 3 * size_class(SIZE)


def test_a_much_smaller_batch_does_not_take_a_large_slot() -> None:
    pool = SlotPool(1 << 30)
    large = pool.take(100 * SIZE)
    where = address(large)
    del large
    assert address(pool.take(SIZE)) != where


@pytest.mark.parametrize("byte_count", [SMALL_BYTES, 100_000, 1 << 20, (1 << 20) + 1, 38_535_168])
def test_size_classes_waste_little(byte_count: int) -> None:
    assert byte_count <= size_class(byte_count) <= byte_count * 9 / 8 + 4096


def test_threads_share_a_pool() -> None:
    pool = SlotPool(1 << 30)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(200):
            array = pool.take(SIZE)
            array[::4096] = number
            if not (array[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_notice_comes_also_where_lending_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    collected: deque[slots.Collected[str]] = deque()
    monkeypatch.setattr(slots, "address_of", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        slots.lent(np.zeros(10, np.uint8), collected, "this")
    assert [each.what for each in collected] == ["this"]
