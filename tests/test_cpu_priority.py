"""Threads of fastload take long time slices, in which others come first: what the kernel is told."""

import os
import platform
import re
import sys
import threading
from types import SimpleNamespace

import pytest

from fastload import cpu_priority
from fastload.cpu_priority import scheduling, take_long_slices

RELEASE = re.match(r"(\d+)\.(\d+)", platform.release())
HAS_SLICES = sys.platform == "linux" and RELEASE is not None and tuple(map(int, RELEASE.groups())) >= (6, 12)


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.skipif(not HAS_SLICES, reason="this kernel has slices of one length")
def test_a_threads_slices_become_longer_and_nothing_else_changes():
    before, is_told, after, others = (
        *in_a_thread(lambda: (scheduling(), take_long_slices(), scheduling())),
        scheduling(),
    )
    assert is_told
    assert before.runtime_ns < after.runtime_ns == cpu_priority._SLICE_NS
    assert others.runtime_ns == before.runtime_ns
    for name in ("policy", "flags", "nice", "priority"):
        assert getattr(before, name) == getattr(after, name), name


@pytest.mark.skipif(not HAS_SLICES, reason="this kernel has slices of one length")
def test_a_niceness_is_kept():
    def nice() -> tuple[bool, int, int]:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        return (
            take_long_slices(),
            os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
            scheduling().runtime_ns,
        )

    assert in_a_thread(nice) == (True, 7, cpu_priority._SLICE_NS)


@pytest.mark.skipif(not HAS_SLICES, reason="this kernel has slices of one length")
def test_slices_that_are_longer_already_do_not_become_shorter(monkeypatch):
    def twice() -> list[int]:
        found = []
        for slice_ns in (20_000_000, 5_000_000):
            monkeypatch.setattr(cpu_priority, "_SLICE_NS", slice_ns)
            assert take_long_slices()
            found.append(scheduling().runtime_ns)
        return found

    assert in_a_thread(twice) == [20_000_000, 20_000_000]


@pytest.mark.skipif(not HAS_SLICES, reason="this kernel has slices of one length")
def test_another_policy_is_the_users():
    def idle() -> tuple[bool, int]:
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
        return take_long_slices(), os.sched_getscheduler(threading.get_native_id())

    assert in_a_thread(idle) == (False, os.SCHED_IDLE)


def test_what_is_no_linux_of_these_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "mips")
    assert scheduling() is None
    assert in_a_thread(take_long_slices) is False


def test_only_who_is_ahead_pauses_for_breath(monkeypatch):
    slept = []
    monkeypatch.setattr(cpu_priority, "time", SimpleNamespace(sleep=slept.append))

    def ours() -> None:
        cpu_priority.breathe()
        cpu_priority.let_breathe(True)
        cpu_priority.breathe()
        cpu_priority.breathe()
        cpu_priority.let_breathe(False)
        cpu_priority.breathe()

    in_a_thread(ours)
    cpu_priority.breathe()
    assert slept == [cpu_priority._BREATH_S] * 2
