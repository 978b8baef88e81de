"""Kernels that give way: compiled and in Python, with time passed in and with the real one."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastload.kernels import yielding
from fastload.kernels.jit import IS_PLAIN, boolean, int64, kernel
from fastload.kernels.yielding import LATE_NS, NEVER, PAUSE_MAX_NS, PAUSE_MIN_NS, give_way, monotonic_ns


@kernel(int64(int64), gives_way=True)
def twice(number):
    return 2 * number


@kernel(int64(boolean))
def compiled_monotonic_ns(_):
    return monotonic_ns()


@pytest.fixture
def giving_way():
    """This process gives way, and is afterwards as it was before."""
    before = yielding.state.copy()
    yielding.state[:] = 0, PAUSE_MIN_NS
    yield
    yielding.state[:] = before


def in_python(function):
    """The Python of a kernel, helper or generated function."""
    return getattr(function, "__wrapped__", function)


def test_the_clock_is_pythons():
    for _ in range(100):
        before, now, after = time.monotonic_ns(), compiled_monotonic_ns(False), time.monotonic_ns()
        assert before <= now <= after


@pytest.mark.skipif(IS_PLAIN, reason="kernels are plain Python functions, which never do")
@pytest.mark.usefixtures("giving_way")
def test_a_kernel_gives_way_each_time_that_it_is_called():
    some_ns = 12_345
    for first_ns, is_given in ((0, True), (NEVER, False)):
        yielding.state[:] = first_ns, some_ns
        assert twice(1) == 2
        assert (yielding.state[1] != some_ns) == is_given  # it has been early, and there is no pause, or late
        yielding.state[:] = first_ns, some_ns
        compiled_monotonic_ns(False)
        assert yielding.state.tolist() == [first_ns, some_ns]  # others do not


@pytest.mark.usefixtures("giving_way")
def test_a_kernel_that_gives_way_does_what_it_does():
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
        assert [twice(number) for number in range(100)] == list(range(0, 200, 2))
    finally:
        is_over.set()
        for other in others:
            other.join()


def test_only_a_process_that_has_begun_to_gives_way():
    code = """
import time
from fastload.kernels import yielding
from tests.kernels.test_yielding import twice
assert yielding.state.tolist() == [yielding.NEVER, yielding.PAUSE_MIN_NS]
twice(1)
assert yielding.state.tolist() == [yielding.NEVER, yielding.PAUSE_MIN_NS]
yielding.start_giving_way()
assert yielding.state.tolist() == [0, yielding.PAUSE_MIN_NS]
began_ns = time.monotonic_ns()
twice(1)
found = yielding.state[0]
assert found == 0 or found > began_ns
yielding.start_giving_way()
assert yielding.state[0] == found
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Processor:
    """Time, and others who keep the processor for so long when it is offered to them."""

    def __init__(self) -> None:
        self.now_ns, self.others_ns, self.offers = 1 << 40, 0, 0

    def yield_processor(self) -> None:
        self.offers += 1
        self.now_ns += self.others_ns


def test_who_keeps_the_processor_is_not_offered_it_for_a_while(monkeypatch):
    processor = Processor()
    monkeypatch.setattr(yielding, "array_at", in_python(yielding.array_at))
    monkeypatch.setattr(yielding, "monotonic_ns", lambda: processor.now_ns)
    monkeypatch.setattr(yielding, "yield_processor", processor.yield_processor)
    state = np.array([0, PAUSE_MIN_NS])

    def offers(times: int) -> int:
        before = processor.offers
        for _ in range(times):
            in_python(give_way)(state.ctypes.data)
        return processor.offers - before

    assert offers(5) == 5  # nobody is there
    processor.others_ns = LATE_NS
    assert offers(5) == 5  # for a moment only
    processor.others_ns = LATE_NS + 1
    pauses_ns = [10_000_000, 20_000_000, 40_000_000, 80_000_000, 160_000_000, 160_000_000]
    assert (pauses_ns[0], pauses_ns[-1]) == (PAUSE_MIN_NS, PAUSE_MAX_NS)
    for pause_ns in pauses_ns:
        assert offers(5) == 1
        processor.now_ns += pause_ns - 1
        assert offers(1) == 0
        processor.now_ns += 1
    processor.others_ns = 0
    assert offers(5) == 5
    processor.others_ns = LATE_NS + 1
    assert offers(5) == 1
    processor.now_ns += PAUSE_MIN_NS
    assert offers(5) == 1
    state[0] = NEVER
    assert offers(5) == 0
