"""What is computed once holds nobody up: not another object's threads, and not a process that is forked meanwhile."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from fastload.cached_attribute import cached_attribute
from tests.patience import PATIENCE_S


class Slow:
    """`value` waits for an event, if it has one."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self.gate, self.count = gate, 0
        self.begun = threading.Event()

    @cached_attribute
    def value(self) -> int:
        """Seven."""
        self.count += 1
        self.begun.set()
        assert self.gate is None or self.gate.wait(PATIENCE_S)
        return 7


def test_it_is_computed_once_and_stays() -> None:
    slow = Slow()
    assert (slow.value, slow.value, slow.count) == (7, 7, 1)
    assert Slow.value.__doc__ == "Seven."


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_neither_threads_nor_a_child_wait_for_another_objects() -> None:
    gate = threading.Event()
    held = Slow(gate)
    thread = threading.Thread(target=lambda: held.value)
    thread.start()
    try:
        assert held.begun.wait(PATIENCE_S)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # not in a thread: it may get the number of the one that holds a lock
            os._exit(Slow().value != 7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        gate.set()
        thread.join()
