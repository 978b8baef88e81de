"""A worker's slots and the trainer's side of them, both in this process: an array never changes while it is held."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.transport.packing import Arrived, Packed, Packer, Receiver
from fastload.transport.worker_slots import SlotCounters

LARGE = 100_000
Ends = tuple[Packer, Receiver]


@contextmanager
def new_ends(retained_bytes: int = 1 << 30) -> Iterator[Ends]:
    receiver = Receiver(SlotCounters(1))
    receiver.counters.set_open(0)
    packer = Packer(receiver.counters, receiver.number, 0, retained_bytes)
    try:
        yield packer, receiver
    finally:
        for slot in packer._slots._by_number.values():
            slot.close_fd()  # as when a worker ends
        receiver.counters.close_fd()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with new_ends() as both:
        yield both


def passed(ends: Ends, batch: Any) -> Any:
    packed = ends[0].pack(Arrived(batch))
    assert isinstance(packed, Packed)
    return ends[1].unpack(packed).batch


def filled(size: int, value: int) -> torch.Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([10, 66_000, 70_000, 200_000, 600_000]), max_size=5), max_size=12),
    st.sampled_from([0, 1_000_000, 1 << 30]),
    st.data(),
)
def test_no_value_changes_while_it_is_held(batches, retained_bytes, data):
    """Any order of sending, keeping and dropping, at both ends."""
    with new_ends(retained_bytes) as ends:
        held: list[tuple[int, torch.Tensor]] = []
        for number, sizes in enumerate(batches):
            made = [ends[0].take_tensor((size,), torch.uint8).fill_(number) for size in sizes[::2]]
            others = [filled(size, number) for size in sizes[1::2]]
            arrived = passed(ends, [made, others])
            held += [(number, tensor) for part in arrived for tensor in part]
            if data.draw(st.booleans()):
                held += [(number, tensor) for tensor in made]  # a data set that keeps what it has given
            del made, others, arrived
            while held and data.draw(st.booleans()):
                del held[data.draw(st.integers(0, len(held) - 1))]
            assert all((tensor[::997] == value).all() for value, tensor in held)


def test_a_slot_is_used_again_and_what_was_stacked_in_one_is_not_copied(ends):
    places = set()
    for value in range(10):
        made = ends[0].take_tensor((10, LARGE), torch.uint8).fill_(value)
        where = made.data_ptr()
        packed = ends[0].pack(Arrived(made))
        assert made.data_ptr() == where
        assert len(packed.data) < 1000
        del made
        arrived = ends[1].unpack(packed)
        assert (arrived.batch == value).all()
        places.add(arrived.batch.data_ptr())
        del arrived
    assert len(places) <= 2  # the worker hears of it with the batch after


def test_buffers_of_a_batch_share_a_slot_unless_they_are_a_large_part_of_it(ends):
    packed = ends[0].pack(Arrived([filled(LARGE, n) for n in range(100)] + [filled(180 * LARGE, 1)]))
    assert len({place.slot for place in packed.places}) == 2
    assert len(packed.new_slots) == 2
    ends[1].unpack(packed)


@pytest.mark.parametrize("with_buffer", [False, True])
def test_a_long_pickle_lies_in_a_slot_which_is_used_again(ends, with_buffer):
    bases = set()
    for number in range(6):
        batch = [[f"{number} {i}" for i in range(40_000)], np.full(100, number), filled(LARGE * with_buffer, number)]
        packed = ends[0].pack(Arrived(batch))
        assert not packed.data
        assert len(packed.places) == 1 + with_buffer
        texts, small, large = ends[1].unpack(packed).batch
        assert texts == batch[0]
        assert (small == number).all()
        small[:] = 7  # it is the user's
        assert (large == number).all()
        del large
        bases.add(packed.places[-1].slot)
    assert len(bases) <= 2


def test_free_memory_beyond_the_budget_is_dropped_on_both_sides():
    with new_ends(retained_bytes=250_000) as ends:
        arrived = [passed(ends, filled(LARGE, n)) for n in range(8)]
        assert len(ends[1]._bases) == 8
        del arrived
        for _ in range(2):
            passed(ends, filled(LARGE, 0))  # carries the word that they are free; then that they are no more
        assert sum(slot.base.size for slot in ends[0]._slots._by_number.values()) <= 250_000 + 2 * LARGE
        assert len(ends[1]._bases) <= 3
        used = {slot.base.ctypes.data for slot in ends[0]._slots._by_number.values() if slot.base.size}
        # This process is both ends: each slot is mapped twice, and none is that was dropped.
        assert mapped_here() == len(used) + len(ends[1]._bases)


def mapped_here() -> int:
    return Path("/proc/self/maps").read_text().count("fastload-slot")


def test_memory_that_a_child_may_see_is_not_used_again(ends):
    """A child has what its parent held when it was forked, whatever the parent releases afterwards."""
    arrived, made = passed(ends, filled(LARGE, 1)), ends[0].take_tensor((LARGE,), torch.uint8).fill_(2)
    pipe = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(pipe[1])  # so that it ends with its parent, too
        os.read(pipe[0], 1)
        os._exit(0 if (arrived.numpy() == 1).all() and (made.numpy() == 2).all() else 1)
    del arrived, made
    kept = [passed(ends, filled(LARGE, 3)) for _ in range(4)]
    os.write(pipe[1], b"-")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    del kept
    for _ in range(4):
        passed(ends, filled(LARGE, 4))
    assert not any(slot.was_forked and slot.base.size for slot in ends[0]._slots._by_number.values())  # it is dropped
    for fd in pipe:
        os.close(fd)


def test_descriptors_are_closed_once_the_trainer_has_mapped_what_they_are_of(ends):
    before = len(os.listdir("/proc/self/fd"))
    kept = [passed(ends, filled(LARGE, n)) for n in range(50)]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert all((tensor == n).all() for n, tensor in enumerate(kept))


def test_what_cannot_be_pickled_leaves_no_slot_in_use(ends):
    for _ in range(5):
        with pytest.raises(Exception, match="pickle"):
            ends[0].pack(Arrived([filled(LARGE, 1), ends[0].take_tensor((LARGE,), torch.uint8), lambda: None]))
    assert (passed(ends, filled(LARGE, 7)) == 7).all()
    assert len(ends[0]._slots._by_number) <= 2


def test_arrays_in_the_pickle_are_writable_too(ends):
    small, large = passed(ends, (np.arange(3), np.arange(LARGE)))
    small += 1
    large += 1
    assert small.tolist() == [1, 2, 3]
    assert large[-1] == LARGE


def test_batches_are_made_here_whatever_device_is_the_default(ends):
    with torch.device("meta"):
        batch = [ends[0].take_tensor((length,), torch.uint8) for length in (0, 10, LARGE)]
        arrived = passed(ends, batch)
    assert {each.device.type for each in batch + arrived} == {"cpu"}
