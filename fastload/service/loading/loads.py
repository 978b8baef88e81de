"""Loads of checkpoints that the service carries: what many processes of a node read comes from the store once, and lies
in memory that they share.

Of each object that is read there is one piece of memory as large as the object, of which only those blocks take room
that were asked for. Processes map it, privately, and ask for ranges. What is missing of one is fetched with the
credentials of the process that asks, and those that ask for the same meanwhile wait for the same request. So each block
is fetched once, however the ranks of a job have divided a state among them, and no plans have to be gathered for that.

Memory is written once: a block that is there does not change until all of it goes, since pages of a private mapping
that its owner has not touched show what is written later. For the same reason memory is never used again.

No process gets what it could not read by itself: of each set of store options an object is looked up before its memory
is given out, and two of them share it where they have found the same version at the same endpoint.

Memory goes a minute after the last connection that asked for it, so that a process that comes a little later finds it.
Saves come first: together with their images, this takes `checkpoint_ram_bytes` at most, and memory that no connection
reads goes for them, and for other loads, at once. What does not fit is not fetched: the process reads it by itself. So
it does with everything that fails here, and has the store's error from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastload import protocol
from fastload.cache import Arena
from fastload.checkpoint.reading import READ_BYTES
from fastload.checkpoint.segments import BLOCK_BYTES
from fastload.config import exact_bytes, format_bytes
from fastload.errors import CacheError, ObjectChangedError, ServiceError, to_wire
from fastload.service.resources import Resources
from fastload.service.state import ConsumerState
from fastload.store.types import ObjectInfo

log = logging.getLogger("fastload.service")

# Requests at a time: as many as a process that reads by itself sends.
_REQUESTS_MAX = 16
# A store's patience. The process that asks has more of its own.
_REQUEST_S = 10.0
# How long memory that no process reads any more is kept.
IDLE_S = 60.0
# Each takes descriptors.
_OBJECTS_MAX = 4096
# Ranges that one consumer waits for.
_ASKS_MAX = 4096
_READ_BLOCKS = READ_BYTES // BLOCK_BYTES

# The state of a block.
_ABSENT, _COMING, _THERE = 0, 1, 2

SendWith = Callable[[protocol.Message, Sequence[int]], None]


@dataclass(eq=False, slots=True)
class _Ask:
    """A range that a consumer waits for."""

    consumer: ConsumerState
    reader: _Reader
    request: int
    byte_count: int
    missing: int = 0  # requests to the store that it waits for


@dataclass(eq=False, slots=True)
class _Fetch:
    """A request to the store: these blocks of an object."""

    first: int
    last: int
    asks: list[_Ask] = field(default_factory=list)


@dataclass(eq=False)
class _Object:
    """One version of an object, and its memory."""

    endpoint: str
    info: ObjectInfo
    memory: Arena
    blocks: bytearray  # the state of each
    fetches: list[_Fetch] = field(default_factory=list)
    readers: set[_Reader] = field(default_factory=set)
    names: set[tuple[str, str]] = field(default_factory=set)  # options and URL by which it was found
    goes: asyncio.TimerHandle | None = None

    @property
    def key(self) -> tuple[str, ObjectInfo]:
        return self.endpoint, self.info

    @property
    def is_idle(self) -> bool:
        return not (self.readers or self.fetches)

    @property
    def held_bytes(self) -> int:
        return (len(self.blocks) - self.blocks.count(_ABSENT)) * BLOCK_BYTES


@dataclass(eq=False, slots=True)
class _Reader:
    """What a consumer reads."""

    objects: dict[int, _Object | None] = field(default_factory=dict)  # by the numbers of its `Load`s; None: not yet
    waiting: int = 0  # ranges


class Loads:
    """See the module's text. Used by the loop's thread only."""

    def __init__(self, resources: Resources, image_bytes: Callable[[], int]) -> None:
        """`image_bytes`: what saves take of the memory."""
        self._stores, self._loop = resources.stores, resources.pools.loop
        self._ram_max, self._image_bytes = resources.limits.checkpoint_ram(), image_bytes
        self._pool = resources.pools.make("checkpoint-load", _REQUESTS_MAX)
        self._memory_pool = resources.pools.make("checkpoint-load-memory", 1)
        self._objects: dict[tuple[str, ObjectInfo], _Object] = {}  # by endpoint and version; what is idle by its age
        self._found: dict[tuple[str, str], _Object] = {}  # by options and URL
        self._looks: dict[tuple[str, str], list[Callable[[ObjectInfo | None, BaseException | None], None]]] = {}
        self._readers: dict[ConsumerState, _Reader] = {}
        self._held_bytes = 0
        self.idle_s = IDLE_S
        self.counters: Counter[str] = Counter(checkpoint_fetched_bytes=0, checkpoint_given_bytes=0)

    def stats(self) -> dict[str, int]:
        """Figures, for `stats_reply`."""
        return {**self.counters, "checkpoint_shared_bytes": self._held_bytes}

    # What processes ask for

    def load(self, consumer: ConsumerState, message: protocol.Load, send_with: SendWith) -> None:
        """Give out the memory of an object, once it was found with this consumer's options."""
        reader = self._readers.setdefault(consumer, _Reader())
        if message.request in reader.objects or len(reader.objects) == _OBJECTS_MAX:
            raise ServiceError(f"it reads {len(reader.objects)} objects, and calls another one {message.request}")
        reader.objects[message.request] = None
        name = consumer.options_key, message.url
        lend = partial(self._lend, consumer, message, name, send_with)
        there = self._found.get(name)
        if there is not None and _is_meant(there.info, message):
            lend(there.info, None)
            return
        waiting = self._looks.setdefault(name, [])
        waiting.append(lend)
        if len(waiting) == 1:
            self._stores.share(consumer.options_key)
            self._pool.submit(self._look, *name, done=partial(self._looked, name))

    def read(self, consumer: ConsumerState, message: protocol.LoadRange) -> None:
        """Have a range of an object fetched; ServiceError where there is no such range."""
        reader = self._readers.get(consumer, _Reader())
        there = reader.objects.get(message.load)
        if there is None or message.start + message.length > there.info.size:
            raise ServiceError(f"it asks for {message.length} bytes from {message.start} on, which no object has")
        if reader.waiting == _ASKS_MAX:
            raise ServiceError(f"it asks for more than {_ASKS_MAX} ranges at once")
        first, last = message.start // BLOCK_BYTES, -(-(message.start + message.length) // BLOCK_BYTES)
        missing = there.blocks.count(_ABSENT, first, last) * BLOCK_BYTES
        if missing and not self._make_room(missing):
            error = ServiceError(
                f"checkpoint_ram_bytes={exact_bytes(self._ram_max)} leaves no room for {format_bytes(missing)} more"
            )
            consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
            return
        self._fetch(consumer.options_key, there, first, last)
        ask = _Ask(consumer, reader, message.request, message.length)
        reader.waiting += 1
        for fetch in there.fetches:
            if fetch.first < last and fetch.last > first:
                fetch.asks.append(ask)
                ask.missing += 1
        if not ask.missing:
            self._answer(ask)

    def left(self, consumer: ConsumerState) -> None:
        """It has gone. What is being fetched for it still comes: others may wait for it, or come soon."""
        reader = self._readers.pop(consumer, _Reader())
        for there in set(reader.objects.values()):
            if there is not None:
                there.readers.discard(reader)
                self._rest(there)

    def give_way(self) -> None:
        """Saves take more memory now."""
        self._make_room(0)

    def close(self) -> None:
        for there in self._objects.values():
            there.memory.close()

    # Finding objects

    def _look(self, options_key: str, url: str) -> ObjectInfo:
        with self._stores.opened(options_key, url, _REQUEST_S) as store:
            return store.head(url)

    def _looked(self, name: tuple[str, str], info: ObjectInfo | None, error: BaseException | None) -> None:
        self._stores.remove(name[0])
        for lend in self._looks.pop(name):
            lend(info, error)

    def _lend(
        self,
        consumer: ConsumerState,
        message: protocol.Load,
        name: tuple[str, str],
        send_with: SendWith,
        info: ObjectInfo | None,
        error: BaseException | None,
    ) -> None:
        reader = self._readers.get(consumer)
        if reader is None:  # it has gone meanwhile
            return
        try:
            if info is None:
                raise error or ServiceError("a thread of the service ended")
            if not _is_meant(info, message):
                raise ObjectChangedError(f"{info.url} is another version than the one to be loaded")
            there = self._held(name, info)
        except Exception as caught:  # of any kind: it reads by itself, and finds the same
            consumer.send(protocol.RequestFailed(message.request, *to_wire(caught)))
            return
        if there.goes is not None:
            there.goes.cancel()
            there.goes = None
        there.readers.add(reader)
        reader.objects[message.request] = there
        send_with(protocol.LoadMemory(message.request), [there.memory.fd])

    def _held(self, name: tuple[str, str], info: ObjectInfo) -> _Object:
        """The object of this version, whose memory is made if it is not there. CacheError where there is none."""
        endpoint = self._stores.endpoint(name[0])
        there = self._objects.get((endpoint, info))
        if there is None:
            if len(self._objects) >= _OBJECTS_MAX and not self._drop_idle():
                raise CacheError(f"{len(self._objects)} objects are being read already")
            blocks = bytearray(-(-info.size // BLOCK_BYTES))
            there = _Object(endpoint, info, Arena(info.size, info.size), blocks)
            self._objects[there.key] = there
        there.names.add(name)
        self._found[name] = there
        return there

    # Fetching

    def _fetch(self, options_key: str, there: _Object, first: int, last: int) -> None:
        """Begin to fetch what is missing of these blocks."""
        while (first := there.blocks.find(_ABSENT, first, last)) >= 0:
            end = min(first + _READ_BLOCKS, last)
            end = next((at for at in range(first, end) if there.blocks[at] != _ABSENT), end)
            there.blocks[first:end] = bytes([_COMING]) * (end - first)
            self._held_bytes += (end - first) * BLOCK_BYTES
            fetch = _Fetch(first, end)
            there.fetches.append(fetch)
            self._stores.share(options_key)
            self._pool.submit(
                self._read_store, options_key, there, fetch, done=partial(self._fetched, options_key, there, fetch)
            )
            first = end

    def _read_store(self, options_key: str, there: _Object, fetch: _Fetch) -> int:
        info, start = there.info, fetch.first * BLOCK_BYTES
        out = there.memory.buffer(0)[start : fetch.last * BLOCK_BYTES]
        with self._stores.opened(options_key, info.url, _REQUEST_S) as store:
            store.read_into(info, start, out)
        return len(out)

    def _fetched(
        self, options_key: str, there: _Object, fetch: _Fetch, byte_count: int | None, error: BaseException | None
    ) -> None:
        self._stores.remove(options_key)
        there.fetches.remove(fetch)
        count = fetch.last - fetch.first
        if byte_count is None:
            there.blocks[fetch.first : fetch.last] = bytes([_ABSENT]) * count
            self._held_bytes -= count * BLOCK_BYTES
            failed = to_wire(error or ServiceError("a thread of the service ended"))
            log.info("%s, %d blocks from %d on: %s", there.info.url, count, fetch.first, error)
            for ask in fetch.asks:
                if ask.missing > 0:  # one answer is enough
                    ask.missing = -1
                    ask.reader.waiting -= 1
                    ask.consumer.send(protocol.RequestFailed(ask.request, *failed))
        else:
            there.blocks[fetch.first : fetch.last] = bytes([_THERE]) * count
            self.counters["checkpoint_fetched_bytes"] += byte_count
            for ask in fetch.asks:
                ask.missing -= 1
                if not ask.missing:
                    self._answer(ask)
        self._rest(there)

    def _answer(self, ask: _Ask) -> None:
        ask.reader.waiting -= 1
        self.counters["checkpoint_given_bytes"] += ask.byte_count
        ask.consumer.send(protocol.Loaded(ask.request))

    # Room

    def _make_room(self, byte_count: int) -> bool:
        """Whether so much more fits, once what no process reads has gone for it."""
        while self._image_bytes() + self._held_bytes + byte_count > self._ram_max:
            if not self._drop_idle():
                return False
        return True

    def _drop_idle(self) -> bool:
        """Let go of what no process reads, of what was left first; whether there was any."""
        there = next((each for each in self._objects.values() if each.is_idle), None)
        if there is not None:
            self._drop(there)
        return there is not None

    def _rest(self, there: _Object) -> None:
        """Have it go after a while, where no process reads it."""
        if there.is_idle and there.goes is None:
            there.goes = self._loop.call_later(self.idle_s, self._drop, there)
            self._objects[there.key] = self._objects.pop(there.key)
            self._make_room(0)

    def _drop(self, there: _Object) -> None:
        assert there.is_idle
        if there.goes is not None:
            there.goes.cancel()
        del self._objects[there.key]
        for name in there.names:
            if self._found[name] is there:  # or of another version by now
                del self._found[name]
        self._held_bytes -= there.held_bytes
        # It takes half a second for each GiB, where no process maps it any more.
        self._memory_pool.submit(there.memory.close, done=_gone)


def _is_meant(info: ObjectInfo, message: protocol.Load) -> bool:
    """Whether it is the version that a consumer asks for."""
    return info.size == message.size and message.version in (None, (info.etag, info.mtime_ns))


def _gone(_: None, error: BaseException | None) -> None:
    if error is not None:
        log.warning("the memory of a load was not given back: %s", error)
