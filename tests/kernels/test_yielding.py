"""Kernels that yield the processor: compiled and in Python, with time passed in and with the real one."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from fastload.kernels import yielding
from fastload.kernels.declare import array_out, boolean, int64, kernel
from fastload.kernels.yielding import (
    LATE_NS,
    NEVER,
    PAUSE_MAX_NS,
    PAUSE_MIN_NS,
    monotonic_ns,
    yield_state,
    yield_to_others,
)


@kernel(int64(array_out(int64), int64))
def twice(state, number):
    yield_to_others(state)
    return 2 * number


@kernel(int64(boolean))
def compiled_monotonic_ns(_):
    return monotonic_ns()


@pytest.fixture
def yields():
    """This process yields the processor, and is afterwards as it was before."""
    before = yield_state.copy()
    yield_state[:] = 0, PAUSE_MIN_NS
    yield
    yield_state[:] = before


def in_python(function):
    """The Python of a kernel, helper or generated function."""
    return getattr(function, "__wrapped__", function)


def test_the_clock_is_pythons():
    for _ in range(100):
        before, now, after = time.monotonic_ns(), compiled_monotonic_ns(False), time.monotonic_ns()
        assert before <= now <= after


@pytest.mark.usefixtures("yields")
def test_a_kernel_yields_each_time_that_it_is_called():
    some_ns = 12_345
    for first_ns, does in ((0, True), (NEVER, False)):
        yield_state[:] = first_ns, some_ns
        assert twice(yield_state, 1) == 2
        assert (yield_state[1] != some_ns) == does  # it has been early, and there is no pause, or late
        yield_state[:] = first_ns, some_ns
        compiled_monotonic_ns(False)
        assert yield_state.tolist() == [first_ns, some_ns]  # others do not


@pytest.mark.usefixtures("yields")
def test_a_kernel_that_yields_does_what_it_does():
    """With others at work on every processor: they get it, and not for ever."""
    is_over = threading.Event()

    def work() -> None:
        block = np.zeros(1 << 22)
        while not is_over.is_set():
            np.sqrt(block, out=block)

    others = [threading.Thread(target=work) for _ in range(4)]
    for other in others:
        other.start()
    try:
        assert [twice(yield_state, number) for number in range(100)] == list(range(0, 200, 2))
    finally:
        is_over.set()
        for other in others:
            other.join()


def test_only_a_process_that_has_begun_to_yields():
    code = """
import time
from fastload.kernels.yielding import NEVER, PAUSE_MIN_NS, start_yielding, yield_state
from tests.kernels.test_yielding import twice
assert yield_state.tolist() == [NEVER, PAUSE_MIN_NS]
twice(yield_state, 1)
assert yield_state.tolist() == [NEVER, PAUSE_MIN_NS]
start_yielding()
assert yield_state.tolist() == [0, PAUSE_MIN_NS]
began_ns = time.monotonic_ns()
twice(yield_state, 1)
found = yield_state[0]
assert found == 0 or found > began_ns
start_yielding()
assert yield_state[0] == found
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
    monkeypatch.setattr(yielding, "monotonic_ns", lambda: processor.now_ns)
    monkeypatch.setattr(yielding, "yield_processor", processor.yield_processor)
    state = np.array([0, PAUSE_MIN_NS])

    def offers(times: int) -> int:
        before = processor.offers
        for _ in range(times):
            in_python(yield_to_others)(state)
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
