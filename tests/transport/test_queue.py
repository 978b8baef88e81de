"""Objects arrive whole and once, whichever process puts them, however long they are, and through interruptions."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fastload.transport.queue import Queue
from tests.patience import PATIENCE_S
from tests.processes import is_running, until
from tests.programs import run

FORK, SPAWN = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")
LIMIT_S = PATIENCE_S
# More than the kernel holds for a reader that does not read.
LONG = 5 << 20


def put_all(into: Queue, name: str, sizes: list[int]) -> None:
    for number, size in enumerate(sizes):
        into.put((name, number, bytes(size)))


def taken(source: Queue, count: int) -> list[Any]:
    return [source.get(timeout=LIMIT_S) for _ in range(count)]


@pytest.mark.parametrize(("processes", "names"), [(FORK, "012"), (SPAWN, "0")])
def test_each_senders_objects_come_in_order_and_whole(processes: Any, names: str) -> None:
    objects = Queue(processes)
    sizes = [10, LONG, 0, 40_000, 100, LONG // 3, 1]
    senders = [processes.Process(target=put_all, args=(objects, name, sizes)) for name in names]
    for sender in senders:
        sender.start()
    arrived = taken(objects, len(sizes) * len(senders))
    for sender in senders:
        sender.join(LIMIT_S)
        assert sender.exitcode == 0
    for name in names:
        assert [(number, len(data)) for who, number, data in arrived if who == name] == list(enumerate(sizes))
    with pytest.raises(queue.Empty):
        objects.get(timeout=0.01)
    objects.close()


def test_nobody_waits_for_a_reader_that_does_not_read() -> None:
    objects = Queue(FORK)
    for number in range(2_000):  # more than the socket holds
        objects.put((number, bytes(1_000)))
    objects.put((2_000, bytes(LONG)))
    assert [number for number, _ in taken(objects, 2_001)] == list(range(2_001))
    until(lambda: not any(each.name == "fastload-queue" for each in threading.enumerate()))
    objects.close()


def test_an_object_that_cannot_be_pickled_is_an_error_where_it_was_put() -> None:
    objects = Queue(FORK)
    with pytest.raises(Exception, match="lambda"):
        objects.put(lambda: None)
    objects.put("next")
    assert objects.get(timeout=LIMIT_S) == "next"
    objects.close()
    with pytest.raises(ValueError, match="closed"):
        objects.put(1)
    objects.close()


def test_a_message_that_was_not_counted_is_found() -> None:
    """As of a sender that was killed before it could count it."""
    objects = Queue(FORK)
    objects.put("first")
    assert objects._count.acquire(False)
    assert objects.get(timeout=0.01) == "first"
    objects.put("second")
    assert objects.get(timeout=LIMIT_S) == "second"
    objects.close()


def test_what_was_found_before_it_was_counted_is_not_waited_for() -> None:
    """As of a sender that was stopped in between, and went on when its message had been read."""
    objects = Queue(FORK)
    objects._count.release()
    late = threading.Timer(1.0, objects.put, ("late",))
    late.start()
    with pytest.raises(queue.Empty):
        objects.get(timeout=0.05)
    objects._count.release()
    with pytest.raises(queue.Empty):
        objects.get(block=False)
    assert objects.get(timeout=LIMIT_S) == "late"
    late.join()
    objects.close()


def test_a_process_that_is_forked_while_something_is_waiting_sends_its_own() -> None:
    objects = Queue(FORK)
    objects.put(("parent", bytes(LONG)))
    sender = FORK.Process(target=put_all, args=(objects, "child", [10, LONG]))
    sender.start()
    assert sorted((each[0], len(each[-1])) for each in taken(objects, 3)) == [
        ("child", 10),
        ("child", LONG),
        ("parent", LONG),
    ]
    sender.join(LIMIT_S)
    assert sender.exitcode == 0
    objects.close()


def test_where_the_kernel_takes_short_messages_only_pieces_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = socket.socketpair

    def small(*args: Any) -> Any:
        ends = plain(*args)
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes the least of it
        return ends

    monkeypatch.setattr(socket, "socketpair", small)
    objects = Queue(FORK)
    put_all(objects, "one", [10, 200_000, 20_000, 1])
    assert [len(data) for _, _, data in taken(objects, 4)] == [10, 200_000, 20_000, 1]
    objects.close()


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_is_raised_while_a_thread_begins_neither_loses_nor_doubles(
    monkeypatch: pytest.MonkeyPatch, has_begun: bool
) -> None:
    """A signal's handler may raise there; such a thread may be taken for dead, too."""
    objects, start = Queue(FORK), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.undo()
        if has_begun:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        objects.put((0, bytes(LONG)))
    monkeypatch.setattr(objects, "_is_sending", lambda: False)
    for number in (1, 2, 3):
        objects.put((number, bytes(LONG)))
    assert [number for number, _ in taken(objects, 4)] == [0, 1, 2, 3]
    with pytest.raises(queue.Empty):
        objects.get(block=False)
    objects.close()


def interrupted_after(call: Any) -> Any:
    """A call that is interrupted as soon as it is done."""

    def run(*args: Any) -> None:
        call(*args)
        raise KeyboardInterrupt

    return run


def test_what_is_raised_between_sending_or_reading_and_counting_delays_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Queue(FORK)
    acquire = objects._count.acquire
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", interrupted_after(os.writev))
        with pytest.raises(KeyboardInterrupt):
            objects.put("one")
    assert objects._count.get_value() == 1
    with monkeypatch.context() as patch:
        patch.setattr(objects, "_read", lambda: None)  # it looked before it was there
        patch.setattr(objects._count, "acquire", interrupted_after(acquire))
        with pytest.raises(KeyboardInterrupt):
            objects.get(timeout=LIMIT_S)
    objects.put("two")

    def counted(block: bool = True, timeout: float | None = None) -> bool:
        assert not block, "there was something, and it was waited for"
        return acquire(False)

    monkeypatch.setattr(objects._count, "acquire", counted)
    assert taken(objects, 2) == ["one", "two"]
    objects.close()


def test_where_no_thread_can_be_had_whoever_puts_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Queue(FORK)

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    with pytest.raises(RuntimeError, match="thread"):
        objects.put(bytes(LONG))
    monkeypatch.undo()
    put_all(objects, "one", [10, LONG])
    assert [len(data) for _, _, data in taken(objects, 2)] == [10, LONG]
    objects.close()


def put_until_killed(into: Queue, size: int) -> None:
    while True:
        into.put((os.getpid(), bytes(size)))


@pytest.mark.parametrize("size", [100, LONG])
def test_senders_that_are_killed_leave_the_queue_to_others(size: int) -> None:
    objects = Queue(FORK)
    for _ in range(5):
        sender = FORK.Process(target=put_until_killed, args=(objects, size), daemon=True)
        sender.start()
        taken(objects, 3)
        os.kill(sender.pid, signal.SIGKILL)
        sender.join(LIMIT_S)
    put_all(objects, "last", [10, LONG])
    seen: list[Any] = []
    while len(seen) < 2:
        seen += [each for each in taken(objects, 1) if each[0] == "last"]
    assert [number for _, number, _ in seen] == [0, 1]
    objects.close()


@pytest.mark.parametrize("dispensable", ["", "first", "last", "last, and closed"])
def test_what_is_waiting_is_sent_before_a_process_ends_unless_it_is_dispensable(dispensable: str) -> None:
    objects = Queue(FORK)
    sender = FORK.Process(target=put_and_leave, args=(objects, dispensable))
    sender.start()
    if not dispensable:
        assert [len(each) for each in taken(objects, 3)] == [LONG] * 3
    sender.join(LIMIT_S / 3)
    exit_code = sender.exitcode
    sender.kill()
    assert exit_code == 0
    objects.close()


def put_and_leave(into: Queue, dispensable: str) -> None:
    if dispensable == "first":
        into.cancel_join_thread()
    for _ in range(3):
        into.put(bytes(LONG))
    if "last" in dispensable:
        into.cancel_join_thread()
    if "closed" in dispensable:
        into.close()


READER = """
import multiprocessing, os, time
from fastload.transport.queue import Queue
context = multiprocessing.get_context("{method}")

def put(into):
    into.put(bytes(5 << 20))  # does not fit, and is sent at this process's end at the latest
    os.write(1, b"%d\\n" % os.getpid())  # at once: print() may leave the end of its line until another has begun one

if __name__ == "__main__":
    objects = Queue(context)
    for _ in range(2):
        context.Process(target=put, args=(objects,)).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_senders_that_end_do_not_wait_for_a_reader_that_was_killed(method: str, tmp_path: Path) -> None:
    """Each of them may hold the end that the reader had."""
    script = tmp_path / "reader.py"
    script.write_text(READER.format(method=method))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        try:
            senders = [int(reader.stdout.readline()) for _ in range(2)]
        finally:
            reader.kill()
        until(lambda: not any(map(is_running, senders)))


def put_from_a_child(into: Queue, is_put: Any) -> None:
    FORK.Process(target=lambda: (into.put(bytes(LONG)), is_put.set())).start()
    is_put.wait()
    os._exit(0)


def test_what_a_sender_sends_outlives_who_started_it() -> None:
    """Its parent has ended, and the reader, which is another process, has not."""
    objects, is_put = Queue(FORK), FORK.Event()
    starter = FORK.Process(target=put_from_a_child, args=(objects, is_put))
    starter.start()
    until(lambda: starter.exitcode is not None)  # its child has what one that joins it waits for
    assert [len(each) for each in taken(objects, 1)] == [LONG]
    objects.close()


WITHOUT_SERVER = """
import multiprocessing, os, signal
from multiprocessing import forkserver
from fastload.transport.queue import Queue
context = multiprocessing.get_context("forkserver")

def put(into, is_put):
    into.put(bytes(5 << 20))
    is_put.set()

if __name__ == "__main__":
    context.set_forkserver_preload(["fastload.transport.queue"])
    objects, is_put = Queue(context), context.Event()
    context.Process(target=put, args=(objects, is_put)).start()
    is_put.wait()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    forkserver._forkserver._forkserver_pid = None
    print(len(objects.get(timeout=300)))
"""


def test_what_a_sender_sends_outlives_its_fork_server(tmp_path: Path) -> None:
    script = tmp_path / "without_server.py"
    script.write_text(WITHOUT_SERVER)
    assert run(WITHOUT_SERVER, path=script).stdout == f"{LONG}\n"


def test_closing_ends_the_thread_of_a_queue_that_nobody_reads() -> None:
    objects = Queue(FORK)
    objects.put(bytes(LONG))
    thread = objects._thread
    assert thread is not None
    objects.cancel_join_thread()
    objects.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()
    assert objects._writer.closed


def test_a_time_limit_and_a_signal_end_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = Queue(FORK)
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        objects.get(timeout=0.05)
    assert time.monotonic() - began >= 0.05
    with pytest.raises(queue.Empty):
        objects.get(block=False)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            objects.get(timeout=LIMIT_S)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    objects.put("after")
    assert objects.get(timeout=LIMIT_S) == "after"
    objects.close()


def test_a_queue_that_nobody_closes_leaves_nothing() -> None:
    script = """
import multiprocessing, os
from fastload.transport.queue import Queue
before = len(os.listdir("/proc/self/fd"))
for _ in range(50):
    objects = Queue(multiprocessing.get_context("fork"))
    objects.put(1)
del objects
print(len(os.listdir("/proc/self/fd")) - before)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert not done.stderr
