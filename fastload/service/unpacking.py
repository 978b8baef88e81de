"""Ranges of what is in packed objects.

A packed object can only be read from its start. So the first range that is asked for begins a *run*: the packed bytes
are fetched, several requests ahead, and go through a child process (`fastload.unpacker`), which writes what comes out
to a file without a name in the cache directory. All ranges wait until the run has passed them and are read from that
file: a node fetches and unpacks an object once, however many of its ranks want it. A file goes when all of it has been
read, or by LRU when there are too many; what is asked for after that begins another run.

What waits here is no request to a store, so neither limits of requests nor second ones concern it (see `fetches`). The
run's own requests are watched as all are. A wait ends: those requests have deadlines, and a child that is silent is
killed. One that is killed by something else is replaced, once; the next time that is an error.

How large an object is unpacked has to be known before it is planned, and is found here, too. Chunks of LitData in
frames say it, and a small object is unpacked; of others the header of zstd or the end of gzip says it, and whether
that can be true of all the object is seen by what its first bytes unpack to, since it may have several members. Where
it cannot be, all of it is unpacked and counted.

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
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fastload import unpacker
from fastload.config import cpu_count
from fastload.errors import CacheError, FastloadError, ServiceError, ShardError, StoreUnavailableError
from fastload.formats.zstd import frame_bytes, whole_blocks
from fastload.service.host.launch import child_environment
from fastload.store import watch
from fastload.store.packing import BYTES_ALWAYS, FRAMES, RATIO_MAX, is_bomb, packing_of
from fastload.store.types import ObjectInfo

log = logging.getLogger("fastload.service")

Read = Callable[[watch.Watch, str, ObjectInfo, int, memoryview], None]
"""Fills memory with bytes of a stored object, with a set of options, under a watch."""

FILES_BYTES_MAX = 2 << 30
"""Unpacked bytes in files, at most; one object may be larger."""

# More gain nothing: each is a process that computes all the time.
_CHILDREN_MAX = 4
# Packed bytes are fetched in parts of this size, so many at a time for each run.
_PART_BYTES, _PARTS_AHEAD = 4 << 20, 4
# A child that has had something to do for so long, and says nothing, is killed.
SILENT_S = 60.0
_RUNS_OF_OBJECT_MAX = 2  # where children are killed
_WRITE_BYTES = 1 << 18
_END_S = 10.0
# A cancelled read is noticed so late, at most.
_LOOK_EVERY_S = 0.2

_SIZES_AT_ONCE = 16
# Up to here an object is unpacked to know its size; of a larger one, so many bytes say how well it packs.
_SMALL_BYTES, _HEAD_BYTES = 1 << 18, {"gzip": 1 << 16, "zstd": 1 << 18}
# What an object says of its size is believed if it is not far less than its head lets expect: of two members alike, the
# size of one is half of that.
_PLAUSIBLE_SHARE = 0.8
_PLAUSIBLE_TIMES = 4.0


class _ChildDiedError(Exception):
    """It said nothing more."""


@dataclass(eq=False)
class _Run:
    """What is in an object, as far as it is unpacked. Guarded by the lock of `Unpacking`."""

    key: str
    info: ObjectInfo
    file: int
    watches: Callable[[], watch.Watch]
    byte_count: int = 0
    is_over: bool = False
    error: FastloadError | None = None
    readers: int = 0
    served: dict[int, int] = field(default_factory=dict)  # lengths of ranges that were read, by where they begin


class Unpacking:
    """See the module's text."""

    def __init__(self, read: Read, make_file: Callable[[int], int], *, silent_s: float = SILENT_S) -> None:
        """`make_file(size)` gives the descriptor of an empty file without a name that has room for so many bytes."""
        self._read, self._make_file, self._silent_s = read, make_file, silent_s
        self._changed = threading.Condition()
        self._runs: OrderedDict[tuple[str, ObjectInfo], _Run] = OrderedDict()  # the one used last is the last
        self._idle: list[_Child] = []
        self._child_count = 0
        self._reading: set[watch.Watch] = set()
        self._threads: set[threading.Thread] = set()
        self._is_closed = False
        self._sizes: dict[tuple[str, ObjectInfo], Future[int]] = {}
        self._sizers: ThreadPoolExecutor | None = None
        self.run_count = 0

    # Ranges

    def read_into(
        self, key: str, info: ObjectInfo, start: int, out: memoryview, watches: Callable[[], watch.Watch]
    ) -> None:
        """Fill `out` with unpacked bytes from `start`. `watches` makes a watch for each request to the store.
        ShardError for what cannot be unpacked, and the store's errors.
        """
        run = self._use(key, info, watches)
        try:
            self._wait_for(run, start + len(out))
            got = 0
            while got < len(out):
                count = os.preadv(run.file, [out[got:]], start + got)
                if not count:
                    raise CacheError(f"{info.url}: the file with its unpacked bytes was cut short; try again")
                got += count
        finally:
            self._leave(run, start, len(out))

    def _use(self, key: str, info: ObjectInfo, watches: Callable[[], watch.Watch]) -> _Run:
        with self._changed:
            while True:
                self._check_open(info)
                run = self._runs.get((key, info))
                if run is not None:
                    break
                if self._make_room(info.size):
                    run = self._begin(key, info, watches)
                    break
                self._wait_a_little()
            self._runs.move_to_end((key, info))
            run.readers += 1
            return run

    def _begin(self, key: str, info: ObjectInfo, watches: Callable[[], watch.Watch]) -> _Run:
        run = self._runs[key, info] = _Run(key, info, self._make_file(info.size), watches)
        self.run_count += 1
        self._start(lambda: self._carry_out(run))
        return run

    def _start(self, function: Callable[[], None]) -> None:
        """In a thread that is waited for at the end."""

        def carry_out() -> None:
            try:
                function()
            finally:
                with self._changed:
                    self._threads.discard(thread)

        thread = threading.Thread(target=carry_out, name="fastload-unpack", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _make_room(self, byte_count: int) -> bool:
        """Let go of files that nothing reads; whether there is room for another one."""
        for place, run in list(self._runs.items()):
            if sum(each.info.size for each in self._runs.values()) + byte_count <= FILES_BYTES_MAX:
                return True
            if run.is_over and not run.readers:
                self._drop(place)
        return not self._runs

    def _drop(self, place: tuple[str, ObjectInfo]) -> None:
        run = self._runs.pop(place)
        os.close(run.file)

    def _wait_for(self, run: _Run, end: int) -> None:
        with self._changed:
            # The last bytes are not given out before what follows them has been checked.
            while not (run.is_over if end == run.info.size else run.byte_count >= end) and run.error is None:
                self._check_open(run.info)
                self._wait_a_little()
            if run.error is not None:
                raise type(run.error)(str(run.error))

    def _wait_a_little(self) -> None:
        if watch.cancelled():
            raise watch.given_up()
        self._changed.wait(_LOOK_EVERY_S)

    def _check_open(self, info: ObjectInfo) -> None:
        if self._is_closed:
            raise StoreUnavailableError(f"{info.url}: the cache service ends")

    def _leave(self, run: _Run, start: int, length: int) -> None:
        with self._changed:
            run.readers -= 1
            if run.byte_count >= start + length:
                run.served[start] = length
            self._let_go(run)

    def _let_go(self, run: _Run) -> None:
        """Of a run that is over and failed, or of which all has been read."""
        is_of_no_use = run.error is not None or sum(run.served.values()) >= run.info.size or self._is_closed
        place = run.key, run.info
        if run.is_over and not run.readers and is_of_no_use and self._runs.get(place) is run:
            self._drop(place)
        self._changed.notify_all()

    # Runs

    def _carry_out(self, run: _Run) -> None:
        """In a thread of its own."""

        def progress(byte_count: int) -> None:
            with self._changed:
                run.byte_count = max(run.byte_count, byte_count)
                self._changed.notify_all()

        info, error = run.info, None
        try:
            part = self._part_of(run.key, info.stored, run.watches)
            found = self._unpack(info.stored, info.packing, part, size=info.size, file=run.file, progress=progress)
            if found != info.size:
                raise _wrong_size(info, info.size, found)
        except FastloadError as caught:
            error = caught
        except Exception as caught:  # those who wait get it: there is nobody else here
            error = CacheError(f"{info.url} cannot be unpacked: {type(caught).__name__}: {caught}")
            log.exception("unpacking %s", info.url)
        with self._changed:
            run.is_over, run.error = True, error
            self._let_go(run)

    def _unpack(
        self,
        info: ObjectInfo,
        packing: str,
        part: Callable[[int, int], bytes | bytearray],
        *,
        size: int = -1,
        file: int | None = None,
        progress: Callable[[int], None] = lambda byte_count: None,
        is_head: bool = False,
    ) -> int:
        """Send an object, which `part(start, length)` reads, through a child, and what comes out to `file`; how many
        bytes that are. `size`: as promised, -1 where nothing is. ShardError, or what `part` raises.
        """
        for number in range(_RUNS_OF_OBJECT_MAX):
            try:
                with self._child(info) as child:
                    feeding = _Feeding(part, info.size)
                    try:
                        child.begin(feeding.pipe, file, packing, size, _bytes_max(info, size), is_head)
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
            said = child.said(_LOOK_EVERY_S)
            if feeding.error is not None:
                raise feeding.error
            self._check_open(info)
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

    def _part_of(
        self, key: str, info: ObjectInfo, watches: Callable[[], watch.Watch]
    ) -> Callable[[int, int], bytearray]:
        """Reads parts of a stored object, which is cancelled where the service ends."""

        def part(start: int, length: int) -> bytearray:
            data, over = bytearray(length), watches()
            with self._changed:
                self._check_open(info)
                self._reading.add(over)
            try:
                self._read(over, key, info, start, memoryview(data))
            finally:
                with self._changed:
                    self._reading.discard(over)
            return data

        return part

    # Children

    @contextlib.contextmanager
    def _child(self, info: ObjectInfo) -> Iterator[_Child]:
        """One that is idle or new; waits for one where there are enough."""
        with self._changed:
            while self._child_count >= min(_CHILDREN_MAX, cpu_count()):
                self._check_open(info)
                self._wait_a_little()
            self._check_open(info)
            self._child_count += 1
            child = self._idle.pop() if self._idle else None
        try:
            if child is None or child.has_ended:
                child = self._new_child()
            yield child
        finally:
            with self._changed:
                self._child_count -= 1
                is_idle = child is not None and not child.is_busy and not self._is_closed
                if child is not None and is_idle:
                    self._idle.append(child)
                self._changed.notify_all()
            if child is not None and not is_idle:
                child.end()

    def _new_child(self) -> _Child:
        try:
            return _Child()
        except OSError as error:
            raise ServiceError(
                f"no process can be started that unpacks: {error}; look at the limits of the cache service (ulimit -a)"
            ) from error

    # Sizes

    def unpacked_sizes(self, key: str, infos: Sequence[ObjectInfo], patience_s: float) -> list[int]:
        """How large these stored objects are unpacked; -1 for those of which it is not known after that time, and which
        may be asked for again. ShardError for one that cannot be unpacked, and the store's errors.
        """
        with self._changed:
            if self._is_closed:
                raise StoreUnavailableError("the cache service ends")
            if self._sizers is None:
                self._sizers = ThreadPoolExecutor(_SIZES_AT_ONCE, "fastload-unpacked-size")
            for info in infos:
                if (key, info) not in self._sizes:
                    self._sizes[key, info] = self._sizers.submit(self._size_of, key, info)
            futures = [self._sizes[key, info] for info in infos]
        wait(futures, patience_s, FIRST_EXCEPTION)
        with self._changed:
            for info, future in zip(infos, futures, strict=True):
                if future.done():
                    self._sizes.pop((key, info), None)
        return [future.result() if future.done() else -1 for future in futures]

    def _size_of(self, key: str, info: ObjectInfo) -> int:
        packing, info = info.packing or packing_of(info.url), info.stored
        if not info.size:
            raise ShardError(f"{info.url} is empty, and nothing packs to that; upload it again")
        part = self._part_of(key, info, lambda: watch.Watch(lambda attempt: None))
        if packing == FRAMES:
            return _framed_size(info, part)
        said = self._said_size(info, packing, part) if info.size > _SMALL_BYTES else None
        if said is not None and is_bomb(info.size, said):
            raise _bomb(info, said)
        return self._unpack(info, packing, part) if said is None else said

    def _said_size(self, info: ObjectInfo, packing: str, part: Callable[[int, int], bytearray]) -> int | None:
        """The size that an object says it has, where that may be true of all of it."""
        if packing not in _HEAD_BYTES:
            return None
        head = bytes(part(0, _HEAD_BYTES[packing]))
        if packing == "zstd":
            said, head = frame_bytes(head), head[: whole_blocks(head)]
        else:
            said = int.from_bytes(part(info.size - 4, 4), "little")
        if not said or not head:
            return None
        count = self._unpack(
            replace(info, size=len(head)), packing, lambda start, length: head[start : start + length], is_head=True
        )
        expected = count / len(head) * info.size
        # Of gzip that was cut, the last bytes are any number; more than that is not believed, and then found.
        is_plausible = _PLAUSIBLE_SHARE * expected <= said and (
            packing == "zstd" or said <= _PLAUSIBLE_TIMES * expected
        )
        return said if count and is_plausible else None

    # The end

    def close(self) -> None:
        """End all that is under way; who waits gets an error. Idempotent."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            reading, threads, sizers = list(self._reading), list(self._threads), self._sizers
            for run in list(self._runs.values()):
                self._let_go(run)
            self._changed.notify_all()
        for each in reading:
            each.cancel()
        for child in idle:
            child.end()
        deadline = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if sizers is not None:
            sizers.shutdown(wait=False, cancel_futures=True)


class _Feeding:
    """Reads an object some parts ahead and writes them into a pipe, in a thread of its own."""

    def __init__(self, part: Callable[[int, int], bytes | bytearray], byte_count: int) -> None:
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
        """Nobody reads the pipe any more."""
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
        except Exception as error:  # nobody else would see it
            self.error = CacheError(f"a packed object cannot be read: {type(error).__name__}: {error}")
        finally:
            os.close(self._to)

    def _feed(self) -> None:
        pool = ThreadPoolExecutor(_PARTS_AHEAD, "fastload-unpack-part")
        try:
            starts = iter(range(0, self._byte_count, _PART_BYTES))
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

    def _submit(self, pool: ThreadPoolExecutor, start: int) -> Future[bytes | bytearray]:
        return pool.submit(self._part, start, min(_PART_BYTES, self._byte_count - start))


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

    def begin(self, source: int, file: int | None, packing: str, size: int, bytes_max: int, is_head: bool) -> None:
        """Give it a job. _ChildDiedError."""
        job = unpacker.JOB.pack(packing.encode(), size, bytes_max, is_head)
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


def _framed_size(info: ObjectInfo, part: Callable[[int, int], bytearray]) -> int:
    """How large a chunk of LitData is whose items are packed in frames, as its head says."""
    try:
        size = unpacker.framed_size(info.size, part)
    except unpacker.DamagedError as error:
        raise ShardError(
            f"{info.url} is no chunk that is packed in frames, as its index says: {error}; upload it again"
        ) from error
    if is_bomb(info.size, size):
        raise _bomb(info, size)
    return size


def _bytes_max(info: ObjectInfo, size: int) -> int:
    return size if size >= 0 else max(BYTES_ALWAYS, RATIO_MAX * info.size)


def _failed(said: _Said, info: ObjectInfo, packing: str, size: int) -> ShardError:
    if said.byte_count > _bytes_max(info, size):
        return _bomb(info, said.byte_count) if size < 0 else _wrong_size(info, size, said.byte_count, "more than ")
    return ShardError(
        f"{info.url} cannot be unpacked as {packing}, which its name or index says: {said.text} (at byte "
        f"{said.packed_bytes} of {info.size} or shortly before, {said.byte_count} unpacked bytes); pack and upload it "
        "again"
    )


def _wrong_size(info: ObjectInfo, promised: int, found: int, more: str = "") -> ShardError:
    return ShardError(
        f"{info.url} has {more}{found} bytes unpacked, and the list of shards says {promised}, from index.json or the "
        "packed object itself; list the shards again (without the file of manifest=), mend index.json, or pack it "
        "again as one member: gunzip or unzstd it, then gzip or zstd it"
    )


def _bomb(info: ObjectInfo, found: int) -> ShardError:
    return ShardError(
        f"{info.url} has {info.size} bytes packed and {found} or more unpacked, above {RATIO_MAX} times as many "
        f"and {BYTES_ALWAYS}: it is damaged, or made to fill memory; pack less in one object"
    )


def memory_file(size: int) -> int:
    """A file in memory."""
    return os.memfd_create("fastload-unpacked", os.MFD_CLOEXEC)


def files_in(folder: Path) -> Callable[[int], int]:
    """Makes files without a name in a folder; in memory where that has no room, which costs memory and no job."""

    def make(size: int) -> int:
        try:
            file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            return instead(size, error)
        try:
            os.posix_fallocate(file, 0, max(1, size))
        except OSError as error:
            os.close(file)
            return instead(size, error)
        return file

    def instead(size: int, error: OSError) -> int:
        log.warning("%d unpacked bytes are kept in memory, since the cache directory takes no file: %s", size, error)
        return memory_file(size)

    return make
