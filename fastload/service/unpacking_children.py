"""The processes that unpack for the cache service (`fastload.unpacker`), and what is sent through them.

An object is fetched several requests ahead and written into a pipe; the child at its other end writes what comes out to
a file, or only counts it. The requests are watched as all are. A child that is silent is killed. One that is killed by
something else is replaced, once; the next time that is an error.

Used by threads of the pools; all state is under one lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from fastload import unpacker
from fastload.config import cpu_count
from fastload.errors import CacheError, FastloadError, ServiceError, ShardError, StoreUnavailableError
from fastload.service.host.launch import child_environment
from fastload.store import watch
from fastload.store.packing import BYTES_ALWAYS, RATIO_MAX
from fastload.store.types import ObjectInfo

log = logging.getLogger("fastload.service")

Read = Callable[[watch.Watch, str, ObjectInfo, int, memoryview], None]
"""Fills memory with bytes of a stored object, with a set of options, under a watch."""

Part = Callable[[int, int], bytearray]
"""Reads a part of a stored object: `part(start, length)`."""

PART_BYTES = 4 << 20
"""Packed bytes are fetched in parts of this size."""

# So many of them at a time for each object.
_PARTS_AHEAD = 4
# More gain nothing while a job trains: each is a process that computes all the time. A job that waits for sizes does
# nothing else yet, so on large nodes there are more for these.
_CHILDREN_MAX, _MEASURING_MAX, _CORES_PER_MEASURING = 4, 16, 4
# A child that has had something to do for so long, and says nothing, is killed.
SILENT_S = 60.0
_RUNS_OF_OBJECT_MAX = 2  # where children are killed
_WRITE_BYTES = 1 << 18
_END_S = 10.0
LOOK_EVERY_S = 0.2
"""A cancelled read is noticed so late, at most."""


class _ChildDiedError(Exception):
    """It said nothing more."""


class Children:
    """See the module's text."""

    def __init__(self, read: Read, silent_s: float = SILENT_S) -> None:
        self._read, self._silent_s = read, silent_s
        self._changed = threading.Condition()
        self._idle: list[_Child] = []
        self._busy = {False: 0, True: 0}  # how many there are, by whether they measure: readers wait for no measuring
        self._reading: set[watch.Watch] = set()
        self._is_closed = False

    def unpack(
        self,
        info: ObjectInfo,
        packing: str,
        part: Part,
        file: int | None,
        *,
        size: int = -1,
        kept_max: int = 0,
        progress: Callable[[int], None] = lambda byte_count: None,
    ) -> int:
        """Send a stored object, which `part` reads, through a child, and what comes out to `file`; how many bytes that
        are. `size`: as promised. Without that (-1) the object is measured, and at most `kept_max` bytes are written:
        where it has more, or the file takes no more, the file ends up empty. ShardError, or what `part` raises.
        """
        for number in range(_RUNS_OF_OBJECT_MAX):
            try:
                with self._child(info, is_measuring=size < 0) as child:
                    feeding = _Feeding(part, info.size)
                    try:
                        child.begin(feeding.pipe, file, packing, size, _bytes_max(info, size), kept_max)
                        feeding.start()
                        return self._watched(child, feeding, info, packing, size, progress)
                    finally:
                        child.kill_if_busy()  # what feeds it may wait for it
                        feeding.stop()
            except _ChildDiedError as error:
                if self._is_closed or number + 1 == _RUNS_OF_OBJECT_MAX:
                    raise ShardError(
                        f"{info.url}: the process that unpacks it ended {number + 1} times ({error}); if nothing kills "
                        "it, and memory is not short, the object is damaged: pack and upload it again"
                    ) from error
                log.warning("%s: the process that unpacks it ended (%s); another one begins anew", info.url, error)
        raise AssertionError("unreachable")

    def _watched(
        self,
        child: _Child,
        feeding: _Feeding,
        info: ObjectInfo,
        packing: str,
        size: int,
        progress: Callable[[int], None],
    ) -> int:
        while True:
            said = child.said(LOOK_EVERY_S)
            if feeding.error is not None:
                raise feeding.error
            self.check_open(info)
            if said is None:
                if time.monotonic() - max(child.heard_s, feeding.fed_s) > self._silent_s and not feeding.is_fetching:
                    raise _ChildDiedError(f"it was silent for {self._silent_s:.0f} s, and killed")
                continue
            if said.what != unpacker.FAILED:
                progress(said.byte_count)
            if said.what == unpacker.DONE:
                return said.byte_count
            if said.what == unpacker.FAILED:
                raise _failed(said, info, packing, size)

    def part_of(self, key: str, info: ObjectInfo, watches: Callable[[], watch.Watch]) -> Part:
        """Reads parts of a stored object, which is cancelled where the service ends."""

        def part(start: int, length: int) -> bytearray:
            data, over = bytearray(length), watches()
            with self._changed:
                self.check_open(info)
                self._reading.add(over)
            try:
                self._read(over, key, info, start, memoryview(data))
            finally:
                with self._changed:
                    self._reading.discard(over)
            return data

        return part

    @contextlib.contextmanager
    def _child(self, info: ObjectInfo, *, is_measuring: bool) -> Iterator[_Child]:
        """One that is idle or new; waits for one where there are enough."""
        most = min(_CHILDREN_MAX, cpu_count())
        if is_measuring:
            most = max(most, min(_MEASURING_MAX, cpu_count() // _CORES_PER_MEASURING))
        with self._changed:
            while self._busy[is_measuring] >= most:
                self.check_open(info)
                if watch.cancelled():
                    raise watch.given_up()
                self._changed.wait(LOOK_EVERY_S)
            self.check_open(info)
            self._busy[is_measuring] += 1
            child = self._idle.pop() if self._idle else None
        try:
            if child is None or child.has_ended:
                child = _new_child()
            yield child
        finally:
            with self._changed:
                self._busy[is_measuring] -= 1
                is_idle = child is not None and not child.is_busy and not self._is_closed
                if child is not None and is_idle:
                    self._idle.append(child)
                self._changed.notify_all()
            if child is not None and not is_idle:
                child.end()

    def check_open(self, info: ObjectInfo) -> None:
        if self._is_closed:
            raise StoreUnavailableError(f"{info.url}: the cache service ends")

    def close(self) -> None:
        """End all that is under way; who waits gets an error. Idempotent."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            reading = list(self._reading)
            self._changed.notify_all()
        for each in reading:
            each.cancel()
        for child in idle:
            child.end()


class _Feeding:
    """Reads an object some parts ahead and writes them into a pipe, in a thread of its own."""

    def __init__(self, part: Part, byte_count: int) -> None:
        self._part, self._byte_count = part, byte_count
        self.pipe, self._to = os.pipe()
        self.fed_s = time.monotonic()
        self.is_fetching = False
        self.error: FastloadError | None = None
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Once the other end has the pipe."""
        os.close(self.pipe)
        self.pipe = -1
        self._thread = threading.Thread(target=self._run, name="fastload-unpack-feed", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop feeding: the other end of the pipe is no longer read."""
        self._is_stopped = True
        if self._thread is not None:
            self._thread.join()
        else:
            os.close(self.pipe)
            os.close(self._to)

    def _run(self) -> None:
        try:
            self._feed()
        except BrokenPipeError:  # the child has ended, or has said why it reads no more
            pass
        except FastloadError as error:
            self.error = error
        except Exception as error:  # a thread's exception is seen by no one
            self.error = CacheError(f"a packed object cannot be read: {type(error).__name__}: {error}")
        finally:
            os.close(self._to)

    def _feed(self) -> None:
        pool = ThreadPoolExecutor(_PARTS_AHEAD, "fastload-unpack-part")
        try:
            starts = iter(range(0, self._byte_count, PART_BYTES))
            ahead = deque(self._submit(pool, start) for start in islice(starts, _PARTS_AHEAD))
            while ahead and not self._is_stopped:
                self.is_fetching = True
                data = memoryview(ahead.popleft().result())
                self.fed_s, self.is_fetching = time.monotonic(), False
                ahead.extend(self._submit(pool, start) for start in islice(starts, 1))
                while data:
                    data = data[os.write(self._to, data[:_WRITE_BYTES]) :]
                    self.fed_s = time.monotonic()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, start: int) -> Future[bytearray]:
        return pool.submit(self._part, start, min(PART_BYTES, self._byte_count - start))


class _Said(NamedTuple):
    what: bytes
    packed_bytes: int
    byte_count: int
    text: str


class _Child:
    """A process of `fastload.unpacker`. Used by one thread at a time."""

    def __init__(self) -> None:
        """OSError where no process can be started."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "fastload.unpacker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=child_environment(os.environ),  # without credentials
                    cwd="/",
                    start_new_session=True,
                )
        except BaseException:
            self._socket.close()
            raise
        self.is_busy = False
        self.heard_s = time.monotonic()

    @property
    def has_ended(self) -> bool:
        """As it does where it has nothing to do."""
        if self._process.poll() is None:
            return False
        self._socket.close()
        return True

    def begin(self, source: int, file: int | None, packing: str, size: int, bytes_max: int, kept_max: int) -> None:
        """Give it a job. _ChildDiedError."""
        job = unpacker.JOB.pack(packing.encode(), size, bytes_max, kept_max)
        self.is_busy, self.heard_s = True, time.monotonic()
        try:
            socket.send_fds(self._socket, [job], [source] if file is None else [source, file])
        except ConnectionError:
            raise _ChildDiedError(self._how_it_ended()) from None

    def said(self, timeout_s: float) -> _Said | None:
        """What it says next; None where that is nothing for so long. _ChildDiedError."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(1000 * timeout_s):
            return None
        try:
            message = self._socket.recv(unpacker.MESSAGE_BYTES_MAX)
        except ConnectionError:
            message = b""
        if len(message) < unpacker.PROGRESS.size:
            raise _ChildDiedError(self._how_it_ended())
        self.heard_s = time.monotonic()
        what, packed_bytes, byte_count = unpacker.PROGRESS.unpack_from(message)
        self.is_busy = what == unpacker.GOING
        return _Said(what, packed_bytes, byte_count, message[unpacker.PROGRESS.size :].decode(errors="replace"))

    def kill_if_busy(self) -> None:
        if self.is_busy:
            self._process.kill()

    def end(self) -> None:
        """Kill it and wait for it."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        code = self._process.returncode
        if code is None:
            return "it closed its socket"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _new_child() -> _Child:
    try:
        return _Child()
    except OSError as error:
        raise ServiceError(
            f"no process can be started that unpacks: {error}; look at the limits of the cache service (ulimit -a)"
        ) from error


def _bytes_max(info: ObjectInfo, size: int) -> int:
    return size if size >= 0 else max(BYTES_ALWAYS, RATIO_MAX * info.size)


def _failed(said: _Said, info: ObjectInfo, packing: str, size: int) -> ShardError:
    if said.byte_count > _bytes_max(info, size):
        return bomb(info, said.byte_count) if size < 0 else wrong_size(info, size, said.byte_count, "more than ")
    return ShardError(
        f"{info.url} cannot be unpacked as {packing}, which its name or index says: {said.text} (at byte "
        f"{said.packed_bytes} of {info.size} or shortly before, {said.byte_count} unpacked bytes); pack and upload it "
        "again"
    )


def wrong_size(info: ObjectInfo, promised: int, found: int, more: str = "") -> ShardError:
    return ShardError(
        f"{info.url} has {more}{found} bytes unpacked, and the list of shards says {promised}, from index.json or "
        "an earlier listing; mend index.json, or list the shards again (delete the file of manifest=, or give another)"
    )


def bomb(info: ObjectInfo, found: int) -> ShardError:
    return ShardError(
        f"{info.url} has {info.size} bytes packed and {found} or more unpacked, above {RATIO_MAX} times as many "
        f"and {BYTES_ALWAYS}: it is damaged, or made to fill memory; pack less in one object"
    )
