"""Two ends of a link, in one process and in two: what arrives is what was sent, without a copy where it can be, and
memory is used again as soon as, and not before, it is unused.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.ragged import Ragged
from fastload.transport import Link, LinkClosedError, SharedPool
from fastload.transport.slots import Collected

LARGE = 100_000
Pair = tuple[Link, Link]
Point = namedtuple("Point", "x y")


def new_pair(retained_bytes: int = 1 << 30) -> Pair:
    return tuple(Link(sock, SharedPool(retained_bytes)) for sock in socket.socketpair())  # type: ignore[return-value]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ends = new_pair()
    yield ends
    for end in ends:
        end.close()


def passed(pair: Pair, message: Any) -> Any:
    """What arrives at the other end; sent by another thread, since a socket holds only so much."""
    sender = threading.Thread(target=pair[0].send, args=(message,))
    sender.start()
    arrived = pair[1].receive()
    sender.join()
    return arrived


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


MESSAGES: list[Any] = [
    {
        "image": torch.rand(3, 100, 200),
        "label": torch.arange(3),
        "name": "a",
        "nested": [1, (2.5, b"x"), Point(1, None)],
    },
    torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last),
    torch.rand(300, 200).t(),
    torch.rand(4, 1).expand(4, 50_000),
    torch.rand(1000, 100)[:, ::2],
    [torch.tensor(7), torch.empty(0, 5), torch.rand(50_000).to(torch.bfloat16), torch.ones(90_000, dtype=torch.bool)],
    torch.rand(40_000, dtype=torch.complex64),
    np.arange(LARGE).reshape(100, -1),
    np.asfortranarray(np.random.rand(200, 300)),
    np.arange(LARGE)[::2],
    np.array(["a", "bc"]),
    np.array([{"a": 1}, None], object),
    Ragged.from_items([b"abc", b"", b"x" * LARGE]),
    b"x" * LARGE,
    torch.nn.Parameter(torch.rand(100, 300)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_what_arrives_is_what_was_sent(pair, message):
    arrived = passed(pair, message)
    assert same(message, arrived)
    if type(message) is torch.Tensor and all(message.stride()):
        assert arrived.stride() == message.contiguous().stride() or arrived.stride() == message.stride()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_more_than_memory_arrive_too(pair):
    sparse = torch.eye(300).to_sparse()
    assert torch.equal(passed(pair, sparse).to_dense(), torch.eye(300))
    for layout in torch.jagged, torch.strided:
        nested = torch.nested.nested_tensor([torch.rand(300, 100), torch.rand(2, 100)], layout=layout)
        assert all(map(torch.equal, passed(pair, nested).unbind(), nested.unbind()))
    assert torch.equal(passed(pair, torch.tensor([1 + 2j]).conj()), torch.tensor([1 - 2j]))


def test_what_shared_memory_still_does(pair):
    whole = torch.arange(LARGE)
    one, other, expanded = passed(pair, [whole, whole[10:20], whole[:1].expand(LARGE)])
    one[10:20] = 7
    assert other.tolist() == [7] * 10
    one[0] = 5
    assert expanded[-1] == 5
    assert passed(pair, torch.ones(1).expand(1 << 30)).untyped_storage().nbytes() == 4


def test_layouts_are_kept(pair):
    channels_last = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    assert passed(pair, channels_last).is_contiguous(memory_format=torch.channels_last)
    assert passed(pair, torch.rand(300, 200).t()).stride() == (1, 200)


def test_what_arrives_is_writable_and_the_receivers_own(pair):
    source = np.zeros(LARGE, np.uint8)
    source.flags.writeable = False
    small, large, array = passed(pair, (torch.zeros(3), torch.zeros(LARGE), source))
    for each in (small, large, array):
        each += 1
    assert not source.any()
    again = passed(pair, (torch.zeros(3), torch.zeros(LARGE), source))
    assert not any(each.any() for each in again)
    assert small.all()
    assert large.all()
    assert array.all()


def test_memory_is_used_again_once_both_sides_have_let_go(pair):
    mine, other = pair
    numbers = set()
    for value in range(10):
        block = mine.pool.take(LARGE)
        block[:] = value
        slot, _ = mine.pool.count_sent(block)
        mine.pool.release([Collected(slot.number, was_forked=False)])
        numbers.add(slot.number)
        arrived = passed(pair, block)
        assert arrived[0] == value
        del block, arrived
        passed((other, mine), "the word that it is over")
    assert len(numbers) == 1


def test_what_is_kept_stays_as_it_is(pair):
    mine, other = pair
    kept = []
    for value in range(20):
        arrived = passed(pair, torch.full((LARGE,), value, dtype=torch.uint8))
        if value % 3 == 0:
            kept.append((value, arrived[10:]))
        del arrived
        passed((other, mine), None)
    for value, tensor in kept:
        assert (tensor == value).all()
    del kept, tensor
    gc.collect()
    passed((other, mine), None)
    assert sum(slot.sent for slot in mine.pool._by_number.values()) == 0


def test_memory_that_a_child_may_see_is_not_used_again(pair):
    """A child has what its parent held when it was forked, whatever the parent releases afterwards."""
    mine, other = pair
    arrived, kept = passed(pair, torch.ones(LARGE)), mine.pool.take(LARGE)
    kept[:] = 0
    pipe = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(pipe[1])  # so that it ends with its parent, too
        os.read(pipe[0], 1)
        os._exit(0 if (arrived.numpy() == 1).all() and not kept.any() else 1)
    del arrived, kept
    passed((other, mine), None)
    again = passed(pair, torch.full((LARGE,), 2.0)), mine.pool.take(LARGE)
    again[1][:] = 3
    os.write(pipe[1], b"-")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not mine.pool.free_bytes
    for fd in pipe:
        os.close(fd)


def test_what_lies_in_shared_memory_already_is_not_copied_there_or_back(pair):
    mine, other = pair
    block = mine.pool.take(LARGE)
    block[:] = 1
    arrived = passed(pair, {"whole": block, "half": block[LARGE // 4 :]})
    arrived["whole"][:] = 2
    assert (block == 2).all()
    back = passed((other, mine), torch.from_numpy(arrived["half"]))
    back.fill_(3)
    assert (block[LARGE // 4 :] == 3).all()
    assert block[0] == 2
    del arrived, block, back
    passed((other, mine), None)
    assert mine.pool.free_bytes


def test_memory_beyond_what_is_kept_is_given_back_on_both_sides():
    mine, other = new_pair(retained_bytes=0)
    for _ in range(3):
        del (arrived := [passed((mine, other), np.ones(LARGE))])[:]
        passed((other, mine), None)
    passed((mine, other), None)
    assert not mine.pool._by_number
    assert not other._peer._mapped
    assert not arrived
    mine.close()
    other.close()


def test_memory_that_was_never_sent_is_dropped_in_silence():
    mine, other = new_pair(retained_bytes=0)
    with closing(mine), closing(other):
        mine.pool.take(LARGE)
        assert passed((mine, other), "the next message") == "the next message"
        assert not mine.pool._by_number


def test_more_new_slots_than_the_kernel_passes_at_once(pair):
    arrays = [np.full(LARGE, number, np.uint16) for number in range(300)]
    assert same(passed(pair, arrays), arrays)


def test_an_object_that_cannot_be_pickled_leaves_the_link_as_it_was(pair):
    with pytest.raises(Exception, match="pickle"):
        pair[0].send([np.ones(LARGE), lambda: None])
    assert passed(pair, "next") == "next"


def test_an_end_that_is_closed_is_an_error_at_the_other(pair):
    pair[1].close()
    with pytest.raises(LinkClosedError, match="gone"):
        pair[0].send(np.ones(LARGE))
    with pytest.raises(LinkClosedError, match="gone"):
        pair[0].receive()


def test_a_closed_end_keeps_only_the_memory_that_is_held(pair):
    kept = passed(pair, np.full(LARGE, 7))
    pair[1].close()
    assert not pair[1]._peer._mapped
    assert (kept == 7).all()


def _echo(sock: socket.socket) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    link = Link(sock, SharedPool(1 << 26))
    while (message := link.receive()) is not None:
        link.send(message + 1)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_another_process_and_when_that_is_killed(method):
    here, there = socket.socketpair()
    process = multiprocessing.get_context(method).Process(target=_echo, args=(there,), daemon=True)
    process.start()
    there.close()
    link = Link(here, SharedPool(1 << 26))
    kept = []
    for value in range(10):
        link.send(torch.full((LARGE,), value))
        kept.append(link.receive())
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(LinkClosedError):
        link.receive()
    for value, tensor in enumerate(kept):
        assert (tensor == value + 1).all()
    link.close()
    process.join()
    process.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([10, 70_000, 200_000])), max_size=30), st.data())
def test_no_value_changes_under_whoever_holds_it(steps, data):
    """Any order of sending, keeping and dropping, at both ends."""
    pair = new_pair(retained_bytes=300_000)
    with closing(pair[0]), closing(pair[1]):
        _exchange(pair, steps, data)


def _exchange(pair: Pair, steps: list[tuple[int, int]], data: st.DataObject) -> None:
    held: list[tuple[int, Any]] = []
    for number, (action, size) in enumerate(steps):
        ends = pair if action % 2 else pair[::-1]
        block = ends[0].pool.take(size)
        block[:] = number % 251
        arrived = passed(ends, block)
        if action >= 2:
            held.append((number % 251, block))
        held.append((number % 251, arrived))
        del block, arrived
        if held and data.draw(st.booleans()):
            del held[data.draw(st.integers(0, len(held) - 1))]
        assert all((array == value).all() for value, array in held)
