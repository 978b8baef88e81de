"""Kernels that give way: compiled and in Python, with time passed in and with the real one."""

import threading
import time

import numpy as np
import pytest

from fastload.kernels import yielding
from fastload.kernels.jit import array_out, boolean, int64, kernel, void
from fastload.kernels.yielding import LATE_NS, NEVER, PAUSE_NS, give_way, monotonic_ns


@kernel(void(array_out(int64)))
def compiled_give_way(not_before_ns):
    give_way(not_before_ns)


@kernel(int64(boolean))
def compiled_monotonic_ns(_):
    return monotonic_ns()


def in_python(function):
    """The Python of a kernel, helper or generated function."""
    return getattr(function, "__wrapped__", function)


def test_the_clock_is_pythons():
    for _ in range(100):
        before, now, after = time.monotonic_ns(), compiled_monotonic_ns(False), time.monotonic_ns()
        assert before <= now <= after


@pytest.mark.parametrize("function", [compiled_give_way, in_python(give_way)])
def test_before_its_time_nothing_is_done(function, monkeypatch):
    monkeypatch.setattr(yielding, "monotonic_ns", time.monotonic_ns)
    monkeypatch.setattr(yielding, "yield_processor", lambda: pytest.fail("it gave way"))
    never = np.array([NEVER])
    function(never)
    assert never.tolist() == [NEVER]


def test_a_kernel_that_gives_way_comes_back():
    """With others at work on every processor: it is given way to them, and not for ever."""
    is_over = threading.Event()

    def work() -> None:
        block = np.zeros(1 << 22)
        while not is_over.is_set():
            np.sqrt(block, out=block)

    others = [threading.Thread(target=work) for _ in range(4)]
    for other in others:
        other.start()
    try:
        not_before_ns = np.zeros(1, np.int64)
        for _ in range(50):
            compiled_give_way(not_before_ns)
    finally:
        is_over.set()
        for other in others:
            other.join()
    assert not_before_ns[0] <= time.monotonic_ns() + PAUSE_NS


class Processor:
    """Time, and others who keep the processor for so long when it is offered to them."""

    def __init__(self) -> None:
        self.now_ns, self.others_ns, self.offers = 1 << 40, 0, 0

    def yield_processor(self) -> None:
        self.offers += 1
        self.now_ns += self.others_ns


def test_who_keeps_the_processor_is_not_offered_it_for_a_while(monkeypatch):
    processor = Processor()
    monkeypatch.setattr(yielding, "monotonic_ns", lambda: processor.now_ns)
    monkeypatch.setattr(yielding, "yield_processor", processor.yield_processor)
    not_before_ns = np.zeros(1, np.int64)

    def offers(times: int) -> int:
        before = processor.offers
        for _ in range(times):
            in_python(give_way)(not_before_ns)
        return processor.offers - before

    assert offers(5) == 5  # nobody is there
    processor.others_ns = LATE_NS
    assert offers(5) == 5  # for a moment only
    processor.others_ns = LATE_NS + 1
    assert offers(5) == 1
    processor.now_ns += PAUSE_NS - 1
    assert offers(1) == 0
    processor.now_ns += 1
    assert offers(5) == 1
    processor.now_ns += PAUSE_NS
    processor.others_ns = 0
    assert offers(5) == 5
