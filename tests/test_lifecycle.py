"""Forked children begin anew, finalizers do not wait, and a script that ends while work is in flight ends in order."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload import lifecycle
from fastload.lifecycle import Ending, call_later, fork_count, held_while_forking, is_inherited, on_drop, reset_on_fork
from tests.patience import PATIENCE_S
from tests.service.test_fork import in_child

FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Owner:
    pass


class Resettable:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name
        reset_on_fork(self, Resettable.reset)

    def reset(self) -> None:
        self.log.append(self.name)
        if self.name == "broken":
            raise RuntimeError("broken")


@FORKS
def test_a_child_resets_what_is_alive_in_its_order_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    failed: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", failed.append)
    kept = [Resettable(log, name) for name in ("one", "dropped", "broken", "three")]
    del kept[1]
    gc.collect()

    def child() -> None:
        assert log == ["one", "broken", "three"]
        assert [str(each.exc_value) for each in failed] == ["broken"]

    assert in_child(child) == ""
    assert log == []


@FORKS
def test_a_lock_that_is_held_while_forking_is_free_in_the_child() -> None:
    lock, is_held, release = held_while_forking(threading.RLock()), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            is_held.set()
            release.wait(PATIENCE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(PATIENCE_S)
    threading.Timer(0.05, release.set).start()  # the fork waits for this
    forks = fork_count()

    def child() -> None:
        assert release.is_set()
        assert lock.acquire(blocking=False)

    assert in_child(child) == ""
    assert fork_count() > forks
    holder.join()


def test_what_a_finalizer_leaves_is_done_in_another_thread() -> None:
    seen: list[threading.Thread] = []
    is_done = threading.Event()

    def work(log: list[threading.Thread]) -> None:
        log.append(threading.current_thread())
        is_done.set()

    owner = Owner()
    finalizer = on_drop(owner, call_later, work, seen)
    assert not finalizer.atexit
    del owner
    assert is_done.wait(PATIENCE_S)
    assert seen[0] is not threading.current_thread()


@FORKS
def test_a_childs_exit_does_not_wait_for_its_parents_calls() -> None:
    release = threading.Event()
    call_later(release.wait, PATIENCE_S)

    def child() -> None:
        assert not lifecycle._calls  # which its exit waits for

    assert in_child(child) == ""
    assert lifecycle._calls
    release.set()


@pytest.mark.parametrize("waits", [True, False])
def test_an_ending_happens_once(waits: bool) -> None:
    ended: list[threading.Thread] = []
    is_done = threading.Event()

    def end() -> None:
        ended.append(threading.current_thread())
        is_done.set()

    def ending_of(owner: object) -> Ending:
        return Ending(owner, end, waits=waits, at_exit=False)

    owner = Owner()
    ending = ending_of(owner)
    assert ending.is_due
    ending()
    ending()
    del owner
    assert not ending.is_due
    assert ended == [threading.current_thread()]  # by a call: here, whether it waits or not

    is_done.clear()
    owner = Owner()
    ending = ending_of(owner)
    del owner
    assert is_done.wait(PATIENCE_S)
    ending()
    assert len(ended) == 2
    assert (ended[1] is not threading.current_thread()) is waits


@FORKS
@pytest.mark.parametrize("end", [Ending.__call__, None])
def test_a_child_does_not_end_what_is_its_parents(end: Callable[[Ending], None] | None) -> None:
    ended: list[int] = []
    owners = [Owner()]
    ending = Ending(owners[0], ended.append, 1, waits=False, at_exit=False)

    def child() -> None:
        assert ending.is_inherited
        assert is_inherited(os.getppid())
        if end is not None:
            end(ending)
        owners.clear()
        assert not ending.is_due
        assert ended == []

    assert in_child(child) == ""
    assert not ending.is_inherited
    owners.clear()
    assert ended == [1]


ORDER = """
import threading, time
from fastload.lifecycle import Ending, call_later, end_at_exit, join_at_exit

class Owner: pass

def say(text, seconds=0.0):
    time.sleep(seconds)
    print(text, flush=True)

def failing():
    say("an ending that fails")
    raise RuntimeError("it failed")

def run():
    is_told.wait()
    say("a thread", 0.2)

def end():
    say("an ending that waits")
    call_later(say, "a call", 0.2)

is_told = threading.Event()
owners = [Owner() for _ in range(4)]
endings = [
    Ending(owners[0], is_told.set, waits=False, at_exit=True),
    Ending(owners[1], end, waits=True, at_exit=True),
    Ending(owners[2], failing, waits=False, at_exit=True),
    Ending(owners[3], say, "never", waits=True, at_exit=False),
]
stuck = threading.Thread(target=time.sleep, args=(3600,), daemon=True)
stuck.start()
join_at_exit(stuck, 0.01)
thread = threading.Thread(target=run, daemon=True)
thread.start()
join_at_exit(thread, 60.0)
end_at_exit()
end_at_exit()
"""

THREADS = """
import time
import torch
import fastload.pipeline.delivery
from fastload.pipeline.delivery import DecodePool
from fastload.lifecycle import call_later

class Slow:
    def __init__(self, name):
        self.name, self.tensor = name, torch.zeros(3)
    def __del__(self):
        time.sleep(0.3)
        del self.tensor
        print(self.name + "\\n", end="", flush=True)  # in one write: threads print side by side

def use(thing):
    time.sleep(0.1)

call_later(use, Slow("what was left for later"))
DecodePool(1).submit(lambda thing=Slow("a job of a pool that was dropped"): use(thing))
kept = DecodePool(1)
kept.submit(lambda thing=Slow("a job of a pool that is there"): use(thing))
"""


def printed(script: str) -> tuple[list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    return done.stdout.splitlines(), done.stderr


def test_the_order_of_an_exit() -> None:
    lines, errors = printed(ORDER)
    assert lines == ["an ending that waits", "a call", "an ending that fails", "a thread"]
    assert "RuntimeError: it failed" in errors


def test_what_threads_hold_is_let_go_of_before_the_interpreter_ends() -> None:
    lines, errors = printed(THREADS)
    assert sorted(lines) == [
        "a job of a pool that is there",
        "a job of a pool that was dropped",
        "what was left for later",
    ]
    assert not errors


def test_nothing_else_hooks_into_forks_finalizers_and_exits() -> None:
    hooks = re.compile(r"register_at_fork|weakref\.finalize|\batexit\b")
    root = Path(fastload.__file__).parent
    found = [path for path in sorted(root.rglob("*.py")) if hooks.search(path.read_text("utf-8"))]
    assert found == [Path(lifecycle.__file__)]
