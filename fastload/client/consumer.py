"""A consumer: one data set's connection to the cache service.

    consumer = cache.consumer(storage_options, name="train")
    objects = consumer.resolve(["s3://bucket/train-{000000..000099}.tar"], endings=(".tar",))
    consumer.attach(objects)                      # numbers their chunks: first_chunk[object] + index
    consumer.set_plan([3, 1, 2], epoch=0)         # fetched ahead, in this order
    consumer.want([30, 31, 32])                   # lease these as they come
    with consumer.acquire([30, 31]) as held:      # waits until at least one is here, and pins what is
        for arena, chunk_nos, offsets in held.groups:
            ...
    consumer.release([30, 31])

Any number of threads may call any method. Leases are kept after their use until they are released, or until the service
needs their room (`leases`).

A consumer holds everything that a new service needs (objects, plan, wants, requests in flight), so a service that dies
costs its consumers a pause: the connection's thread connects again, which starts another service, and
`_send_everything` repeats it all. Requests are idempotent, so those in flight are simply sent again. What was granted
before stays readable: the dead service's arena lives as long as it is mapped here.

Everything is sent under the lock, together with the change of state that it speaks of; that keeps both sides' views of
leases the same. The lock is never held while waiting for an answer.

A fork is safe: the child drops the parent's socket and leases, and makes its own connection at its first call, with the
same objects and plan.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload import callers, errors, protocol
from fastload.cache.policy import PolicyName
from fastload.client.attached import AttachedObjects, Int64, Ints, OpenedObject
from fastload.client.connection import Connection, ConnectionEvents
from fastload.client.connector import Connector
from fastload.client.handshake import Welcomed
from fastload.client.leases import Held, Lease, LeaseTable, MappedArena, Waiter
from fastload.errors import FastloadError, ServiceError, ShardError
from fastload.lifecycle import reset_on_fork
from fastload.protocol import Progress
from fastload.redaction import redact
from fastload.store import StoreOptions, local, normalise, options
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from fastload.timing.activity import Cause
from fastload.waiting import DEADLINE_S, Reason, Waits, wait

# What a request is for, in notices of long waits and in the error of one that took too long.
_WHAT_FOR: dict[type[protocol.Message], str] = {
    protocol.Clear: "to empty the cache",
    protocol.GetCounts: "to say how many samples shards hold",
    protocol.GetUnpackedSizes: "to say how large packed shards are",
    protocol.GetIndexes: "for the indexes of shards",
    protocol.Held: "to say what it holds",
    protocol.Pin: "to pin objects",
    protocol.Unpin: "to unpin objects",
    protocol.Open: "to find an object",
    protocol.Resolve: "to list the shards",
    protocol.Stats: "for its figures",
}


# What a thread has waited for, by where its chunk came from (`protocol.SOURCES`).
_WAITED_FOR: tuple[Cause, ...] = ("service", "disk", "fetch")


@dataclass(frozen=True, slots=True)
class HeldBytes:
    """How much of some objects the cache holds: `byte_count` is all of them, `held_bytes` what is in either tier."""

    byte_count: int
    ram_bytes: int
    disk_bytes: int
    held_bytes: int
    pinned_bytes: int  # that pins name, held or not


class WaitInterruptedError(ServiceError):
    """A wait was ended by `Consumer.interrupted`, whose caller handles it."""


@dataclass(slots=True, eq=False)
class _Request:
    message: protocol.Message
    parts: list[protocol.Message] = field(default_factory=list)
    done: bool = False
    error: FastloadError | None = None


class Consumer:
    """See the module's text. Private methods are called under `_changed`, save for those that take it themselves."""

    def __init__(
        self,
        connector: Connector,
        storage_options: Mapping[str, Any] | None = None,
        name: str = "",
        *,
        waits: Waits | None = None,
        make_connection: Callable[[ConnectionEvents, threading.Condition, str], Connection] = Connection,
    ) -> None:
        """Connect, starting the service where none runs; CacheError, ConfigError or ServiceError where that fails.

        `storage_options` as the user gave them; with them the environment is read, now and again whenever a store
        denies access. `waits` is where the time spent waiting is booked. A simulation has a connection of its own.
        """
        self.name = redact(name)
        self.chunk_bytes = 0
        self._connector, self._make_connection = connector, make_connection
        self._storage_options = options.checked(storage_options)
        self._store_wire: dict[str, Any] | None = None
        self._waits = waits
        self._attached = AttachedObjects()
        self._plan: protocol.SetPlan | None = None
        self._keep: protocol.Keep | None = None
        self._label = ""
        self._report: dict[str, Any] = {}
        self._begin()
        reset_on_fork(self, Consumer._forget_after_fork)
        self._connect()
        try:
            self._warn()
        except BaseException:  # where warnings are errors
            self.close()
            raise

    def _begin(self) -> None:
        """Everything that belongs to this process's connection."""
        self._changed = threading.Condition(threading.Lock())
        self._connecting = threading.Lock()
        self._table = LeaseTable()
        self._requests: dict[int, _Request] = {}
        self._request_serial = 0
        self._troubles: list[str] = []
        self._progress: Progress | None = None
        self._arena: MappedArena | None = None
        self._buffer_count = 0
        self._beside = ""
        self._interruptions = 0
        self._ended: FastloadError | None = None
        self._connection: Connection | None = None

    # Life

    @property
    def is_ended(self) -> bool:
        """Whether it was closed, or ended by an error: every call raises that."""
        return self._ended is not None

    @property
    def beside(self) -> str:
        """Why its service is not the directory's own, but stands in for that; "" where it is."""
        return self._beside

    @property
    def buffer_count(self) -> int:
        return self._buffer_count

    def close(self) -> None:
        """Let go of everything. Waiting callers get a ServiceError. Idempotent."""
        with self._changed:
            connection, self._connection = self._connection, None
            if self._ended is None:
                self._ended = ServiceError(
                    "this connection to the cache was closed (by close(), or the end of a with block); iterate anew"
                )
            self._table.clear()
            if self._arena is not None:
                self._arena.view.close()
            self._changed.notify_all()
        if connection is not None:
            connection.close()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """For the length of the block, calls that wait or would wait raise WaitInterruptedError.

        For ending the threads that use this consumer without ending the consumer.
        """
        with self._changed:
            self._interruptions += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._interruptions -= 1

    @property
    def is_interrupted(self) -> bool:
        """Whether `interrupted` is entered: what waits for others with this consumer gives up as well."""
        return self._interruptions > 0

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # What is in the store

    def resolve(
        self,
        urls: Sequence[str],
        endings: Sequence[str],
        deadline_s: float = DEADLINE_S,
        *,
        beside: Sequence[str] = (),
    ) -> ObjectTable:
        """The objects that `urls` (patterns, prefixes, plain URLs) stand for; the store's errors come as they are.

        A prefix stands for what is under it and ends in one of `endings`, and for all there that is called one of
        `beside`.
        """
        # Made absolute here: the service has another working directory.
        names = [normalise(url) if url else url for url in map(os.fspath, urls)]
        parts = self._ask_service(
            lambda request: protocol.Resolve(request, names, list(endings), list(beside)), "listing", deadline_s
        )
        found = ObjectTable.joined([part.rows.table() for part in parts if isinstance(part, protocol.Resolved)])
        return local.without_version_tags(found)

    def present(self, names: Sequence[str], deadline_s: float = DEADLINE_S) -> ObjectTable:
        """Those of the objects at these URLs (normalised, and no patterns) that are there, in this order; the store's
        errors come as they are.
        """
        found = [ObjectTable.of([])]
        for some in _by_bytes(names, protocol.FRAME_BYTES_MAX // 2):
            parts = self._ask_service(
                lambda request, some=some: protocol.Resolve(request, some, [], [], present=True),  # type: ignore[misc]
                "listing",
                deadline_s,
            )
            found += [part.rows.table() for part in parts if isinstance(part, protocol.Resolved)]
        return local.without_version_tags(ObjectTable.joined(found))

    def attach(self, objects: Sequence[ObjectInfo]) -> None:
        """Say which objects chunk numbers refer to; ends all leases, wants and the plan of the ones before."""
        self._enter()
        table = local.with_version_tags(ObjectTable.of(objects))
        with self._changed:
            if self._table.counts()["pinned"]:
                raise ServiceError("attach() while chunks are pinned: end every `with acquire(...)` first")
            self._attached = AttachedObjects.of(table, self.chunk_bytes)
            self._plan = self._keep = self._progress = None
            self._label = ""
            self._table.clear()
            self._send_objects()

    def open(self, url: str, deadline_s: float = DEADLINE_S) -> OpenedObject:
        """Attach one more object, by its URL (normalised), as it is now; the store's errors come as they are.

        Only for a consumer to which nothing else is attached. The service looks up the object's version and takes it
        onto the end of this consumer's list; both sides number objects in the order of these answers, which the socket
        keeps. The list only grows: when it is long, another consumer goes on with an empty one.
        """
        (part,) = self._ask_service(lambda request: protocol.Open(request, url), "listing", deadline_s)
        assert isinstance(part, protocol.Opened)
        with self._changed:
            return self._attached[part.object_no]

    @property
    def object_count(self) -> int:
        return len(self._attached)

    # The plan

    def keep(self, object_nos: Ints, policy: PolicyName) -> None:
        """These objects (numbers, int[n]) will be read again and again; `policy` says how the service keeps them.

        They stay before others that no consumer names, also while a plan names only some of them; until this is called
        again, or the consumer ends. Saying the same twice costs nothing.
        """
        self._enter()
        keep = protocol.Keep(self._attached.checked_objects(object_nos), policy)
        with self._changed:
            if keep != self._keep:
                self._keep = keep
                self._send(keep)

    def set_plan(
        self, object_order: Ints, epoch: int = 0, warm: bool = False, terms: protocol.WarmTerms | None = None
    ) -> None:
        """All chunks of these objects (numbers, int[n]) in this order will be needed; replaces the plan before.

        With `warm`, fill the cache with them instead of the arena only; see `progress` and `wait_progress`. `terms` are
        those of a warm-up, which stands back behind jobs; a job that has its own data kept names none.
        """
        self._enter()
        order = self._attached.checked_objects(object_order)
        with self._changed:
            self._progress = None
            self._plan = protocol.SetPlan(order, epoch, warm, 0, terms)
            self._send(self._plan)

    def foresee(self, first: int, positions: npt.NDArray[np.integer[Any]]) -> None:
        """Chunks of the warm plan, by their positions in it, will be read in this order, the first as use number
        `first`.

        Each call goes on where the one before ended. `advance` then counts uses. A service that replaces this one
        learns only what is foreseen from then on.
        """
        with self._changed:
            if self._plan is not None:
                self._send(protocol.Uses(first, positions.astype("<i4").tobytes()))

    def advance(self, plan_position: int) -> None:
        """Nothing of the plan below this position, counted in chunks, is needed any more."""
        with self._changed:
            if self._plan is not None and plan_position > self._plan.position:
                self._plan.position = int(plan_position)
                self._send(protocol.Advance(int(plan_position)))

    def progress(self) -> Progress | None:
        """How far a warm plan is, as last reported."""
        with self._changed:
            return self._progress

    def wait_progress(self, seen: Progress | None, deadline_s: float = DEADLINE_S) -> Progress:
        """Wait for a progress other than `seen`; raises what stopped the plan.

        After one that is `finished` there is no other.
        """
        self._enter()
        with self._changed:
            self._wait(
                lambda: self._progress is not None and self._progress is not seen,
                "chunk",
                "progress of a warm plan",
                deadline_s,
            )
            progress = self._progress
        assert progress is not None
        if progress.error_name:
            raise errors.from_wire(progress.error_name, progress.error_message)
        return progress

    # Chunks

    def want(self, chunk_nos: Ints) -> None:
        """Lease these as they come. Does not wait."""
        self._enter()
        with self._changed:
            self._ask_for(self._attached.checked_chunks(chunk_nos), urgent=False)

    def acquire(self, chunk_nos: Ints, deadline_s: float = DEADLINE_S, *, reason: Reason = "chunk") -> Held:
        """Wait until at least one of the chunks is here, and pin all those that are.

        The error of a chunk that could not be had is raised here, as the store or the service put it; asking again
        tries again. Not to be called while the same thread holds a `Held`.
        """
        self._enter()
        chunks = self._attached.checked_chunks(chunk_nos)
        if not chunks:
            raise ValueError("acquire() of no chunks")
        with self._changed:
            waiter = self._table.add_waiter(chunks)
            try:
                if not waiter.got:  # mostly they are here
                    what = f"chunks of {self._attached.where(chunks[0], self.chunk_bytes)} from the cache service"
                    came_from = partial(_came_from, waiter)
                    self._wait(lambda: self._is_served(waiter), reason, what, deadline_s, came_from)
                    self._table.pin_available(waiter)
            except BaseException:
                self._send_release(self._table.unpin(waiter.got))
                self._changed.notify_all()
                raise
            finally:
                self._table.remove_waiter(waiter)
        return Held(self._unpin, waiter.got)

    def _is_served(self, waiter: Waiter) -> bool:
        """Whether it has got something; else have the service asked. Raises the failure of one of its chunks."""
        if waiter.got:
            return True
        failure = self._table.take_failure(waiter.asked)
        if failure is not None:
            raise failure
        self._ask_for(waiter.asked, urgent=True)
        return False

    def begin_acquire(self, chunk_nos: Ints) -> Waiter:
        """An acquire in steps, for a caller that must not wait. `end_acquire` follows once `got` holds something; until
        then `look_again` does whenever the service has answered with anything but a grant.
        """
        with self._changed:
            waiter = self._table.add_waiter(self._attached.checked_chunks(chunk_nos))
            self._is_served(waiter)
            return waiter

    def look_again(self, waiter: Waiter) -> None:
        """Raise a failure, or ask again where that is needed."""
        with self._changed:
            self._is_served(waiter)

    def end_acquire(self, waiter: Waiter) -> Held:
        """Pin all that is here."""
        with self._changed:
            self._table.pin_available(waiter)
            self._table.remove_waiter(waiter)
        return Held(self._unpin, waiter.got)

    def _unpin(self, held: dict[int, Lease]) -> None:
        with self._changed:
            lost = any(lease.arena.lost for lease in held.values())
            if any(lease.recalled for lease in held.values()):  # it leaves now, and may be asked for again
                self._changed.notify_all()
            self._send_release(self._table.unpin(held))
        if lost:
            raise ServiceError("the cache service dropped this consumer while it was reading; what it read is void")

    def release(self, chunk_nos: Ints) -> None:
        """Give leases back, and no longer want these. Pinned ones go when their pins end."""
        with self._changed:
            self._send_release(self._table.release(self._attached.checked_chunks(chunk_nos)))

    # Indexes

    def get_indexes(self, object_nos: Ints, deadline_s: float = DEADLINE_S) -> tuple[dict[int, bytes], list[int]]:
        """The stored indexes of these objects, and which ones this consumer has to make: each is to be given to
        `put_index`, or else to `give_up_indexes`. At least one is in either; ask again for the rest.

        Waits where another consumer makes all that are missing.
        """
        numbers = [int(number) for number in object_nos]
        parts = self._ask_service(lambda request: protocol.GetIndexes(request, numbers), "index", deadline_s)
        pieces = [part for part in parts if isinstance(part, protocol.Indexes)]
        stored = {number: data for piece in pieces for number, data in zip(piece.objects, piece.data, strict=True)}
        make = [number for piece in pieces for number in piece.make]
        named = {*stored, *make}
        if not named <= {*numbers} or (numbers and not named):
            raise ServiceError(
                f"the cache service was asked for indexes of {len(numbers)} objects and named none of them, or others"
            )
        return stored, make

    def put_index(self, object_no: int, data: bytes) -> None:
        """Have an index kept for this node's other consumers and later runs; one above 64 MiB is not."""
        self._enter()
        if len(data) > protocol.INDEX_BYTES_MAX:
            self.give_up_indexes([object_no])
            return
        with self._changed:
            self._send(protocol.PutIndex(int(object_no), bytes(data)))

    def give_up_indexes(self, object_nos: Ints) -> None:
        """These are not going to be made here. A consumer that has ended does nothing."""
        with self._changed:
            if self._ended is None and len(object_nos):
                self._send(protocol.GiveUpIndexes([int(number) for number in object_nos]))

    def put_counts(self, object_nos: Ints, counts: Ints) -> None:
        """Have sample counts that are known from elsewhere kept for later runs. They need no index. A consumer that has
        ended does nothing.
        """
        numbers, counts = [int(number) for number in object_nos], np.asarray(counts, "<i8")
        step = protocol.COUNTS_PER_REQUEST
        with self._changed:
            for start in range(0, len(numbers) if self._ended is None else 0, step):
                some = slice(start, start + step)
                self._send(protocol.PutCounts(numbers[some], counts[some].tobytes()))

    def get_counts(self, object_nos: Ints, deadline_s: float = DEADLINE_S) -> Int64:
        """int64[n]: how many samples these objects hold, -1 for those without a stored index."""
        numbers = [int(number) for number in object_nos]
        counts = [np.empty(0, np.int64)]
        for start in range(0, len(numbers), protocol.COUNTS_PER_REQUEST):
            asked = numbers[start : start + protocol.COUNTS_PER_REQUEST]
            counts.append(self._get_counts(asked, deadline_s))
        return np.concatenate(counts)

    def unpacked_sizes(self, deadline_s: float = DEADLINE_S) -> tuple[Int64, dict[int, ShardError]]:
        """int64[n]: how many bytes the attached objects, which are packed, have unpacked, and by number what is wrong
        with those that cannot be unpacked. Raises the store's errors. The deadline is that of each step.
        """
        sizes, bad = np.full(len(self._attached), -1, np.int64), dict[int, ShardError]()

        def ask(numbers: list[int]) -> None:
            try:
                sizes[numbers] = self._get_unpacked_sizes(numbers, deadline_s)
            except ShardError as error:
                (bad_one,) = numbers  # of several the sizes say which ones are bad
                sizes[bad_one], bad[bad_one] = protocol.NO_SIZE, error

        is_slow = False
        while len(left := np.flatnonzero(sizes == -1)):
            asked = left[: protocol.UNPACKED_SIZES_PER_REQUEST].tolist()
            ask(asked)
            if not is_slow and (sizes[asked] == -1).any():
                is_slow = True
                callers.warn(
                    f"{len(sizes)} packed shards are read to know how large they are unpacked, once for this node; "
                    "manifest=... keeps that for others, and so does the index.json of MDS",
                    RuntimeWarning,
                )
        for number in np.flatnonzero(sizes == protocol.NO_SIZE).tolist():
            while number not in bad and sizes[number] < 0:
                ask([number])
        return sizes, bad

    def _get_unpacked_sizes(self, numbers: list[int], deadline_s: float) -> Int64:
        (part,) = self._ask_service(lambda request: protocol.GetUnpackedSizes(request, numbers), "listing", deadline_s)
        assert isinstance(part, protocol.Counts)
        if len(part.counts) != 8 * len(numbers):
            raise ServiceError(f"the cache service answered {len(part.counts)} bytes for {len(numbers)} sizes")
        return np.frombuffer(part.counts, "<i8").astype(np.int64)

    def _get_counts(self, numbers: list[int], deadline_s: float) -> Int64:
        (part,) = self._ask_service(lambda request: protocol.GetCounts(request, numbers), "index", deadline_s)
        assert isinstance(part, protocol.Counts)
        if len(part.counts) != 8 * len(numbers):
            raise ServiceError(f"the cache service answered {len(part.counts)} bytes for {len(numbers)} sample counts")
        return np.frombuffer(part.counts, "<i8").astype(np.int64)

    # Figures

    def stats(self, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The service's counters: `"consumer"`, `"node"` and `"store"`; see docs/protocol.md. To `"node"` this adds
        `"beside"`, which says why that is not the directory's own service, and is "" where it is.
        """
        (part,) = self._ask_service(protocol.Stats, "service", deadline_s)
        assert isinstance(part, protocol.StatsReply)
        return {**part.values, "node": {**part.values.get("node", {}), "beside": self.beside}}

    def clear(self, *, history: bool, pins: bool = False, deadline_s: float = DEADLINE_S) -> int:
        """Empty the cache: see `Cache.clear`."""
        (part,) = self._ask_service(lambda request: protocol.Clear(request, history, pins), "service", deadline_s)
        assert isinstance(part, protocol.Cleared)
        return part.byte_count

    # What the cache keeps

    def pin(
        self,
        name: str,
        ttl_s: float = 0.0,
        quota_bytes: int = 0,
        objects: Ints | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> int:
        """Have the attached objects (or those of these numbers) kept on disk as pin `name`, in place of what it named.

        It lasts until it is unpinned, or until none of the objects was used for `ttl_s` seconds (0: no such end), also
        without this consumer, and is stored when this returns; how many bytes it names. It fetches nothing: set it
        before a warm plan, so that what comes has room. CacheError where the objects are more than `quota_bytes` (0: as
        much as there is) or than the disk tier can hold beside other pins.
        """
        self._enter()
        numbers = range(self.object_count) if objects is None else objects
        checked, name = self._attached.checked_objects(numbers), redact(name)
        (part,) = self._ask_service(
            lambda request: protocol.Pin(request, name, checked, float(ttl_s), int(quota_bytes)), "service", deadline_s
        )
        assert isinstance(part, protocol.Done)
        return int(part.values["byte_count"])

    def unpin(self, what: Sequence[str], deadline_s: float = DEADLINE_S) -> int:
        """End the pins of these names, and what these URLs and prefixes name of all pins; how many bytes that leaves
        unpinned.
        """
        names = list(map(redact, what))
        (part,) = self._ask_service(lambda request: protocol.Unpin(request, names), "service", deadline_s)
        assert isinstance(part, protocol.Done)
        return int(part.values["byte_count"])

    def label(self, name: str) -> None:
        """The attached objects are the data set `name`, in what operators are shown."""
        self._enter()
        with self._changed:
            self._label = redact(name)
            self._send(protocol.Label(self._label, list(range(len(self._attached)))))

    def held(self, deadline_s: float = DEADLINE_S) -> HeldBytes:
        """How much of the attached objects the cache holds, by tier. Fetches nothing."""
        (part,) = self._ask_service(protocol.Held, "service", deadline_s)
        assert isinstance(part, protocol.Done)
        return HeldBytes(**part.values)

    def report(self, **values: Any) -> None:
        """Figures of this process for the service to show beside its own; they replace those of before.

        Never waits for the service: where its socket takes nothing now, these are left out.
        """
        with self._changed:
            self._report = values
            if self._connection is not None and self._connection.has_room:
                self._send(protocol.Report(values))

    def counts(self) -> dict[str, int]:
        """Chunks leased, pinned and asked for, and leases granted by source and recalled, as known here."""
        with self._changed:
            granted = {
                f"granted_{name}": self._table.granted_count[number] for number, name in enumerate(protocol.SOURCES)
            }
            return {**self._table.counts(), **granted, "recalled": self._table.recalled_count}

    # Sending

    def _enter(self) -> None:
        """Before a call: connect where a fork took the connection, raise what ended it, and pass on warnings."""
        if self._connection is None and self._ended is None:
            with self._connecting:  # one thread of the child connects, for all
                if self._connection is None and self._ended is None:
                    self._connect()
        self._warn()
        if self._ended is not None:
            raise self._ended

    def _warn(self) -> None:
        while self._troubles:
            with self._changed:
                message = self._troubles.pop(0) if self._troubles else ""  # another thread was quicker
            if message and self._connector.is_new_warning(message):
                callers.warn(message, RuntimeWarning)

    def _ask_for(self, chunks: Iterable[int], *, urgent: bool) -> None:
        ask, serial = self._table.to_ask(chunks, urgent=urgent)
        if ask:
            self._send(protocol.Want(ask, serial, urgent))

    def _ask_service(
        self, make: Callable[[int], protocol.Message], reason: Reason, deadline_s: float
    ) -> list[protocol.Message]:
        self._enter()
        with self._changed:
            self._request_serial += 1
            number = self._request_serial
            request = self._requests[number] = _Request(make(number))
            try:
                self._send(request.message)
                what = f"the cache service {_WHAT_FOR.get(type(request.message), 'to answer')}"
                self._wait(lambda: request.done, reason, what, deadline_s)
            except BaseException:
                for part in request.parts:
                    self._decline(part)
                raise
            finally:
                del self._requests[number]
        if request.error is not None:
            raise request.error
        return request.parts

    def _wait(
        self,
        ready: Callable[[], bool],
        reason: Reason,
        what: str,
        deadline_s: float,
        cause: Callable[[], Cause | None] = lambda: None,
    ) -> None:
        """Wait under the lock until `ready()`; raises what ended the consumer or the wait meanwhile."""
        wait(
            self._changed,
            lambda: self._ended is not None or self.is_interrupted or ready(),
            reason,
            what=what,
            waits=self._waits,
            deadline_s=deadline_s,
            more=self._connector.log_hint,
            cause=cause,
        )
        if self._ended is not None:
            raise self._ended
        if self.is_interrupted and not ready():
            raise WaitInterruptedError(f"interrupted while waiting for {what}")

    def _send(self, message: protocol.Message) -> None:
        # Without a connection nothing is lost: everything is sent through the next one.
        if self._connection is not None:
            self._connection.send(message)

    def _send_release(self, chunks: list[int]) -> None:
        if chunks:
            self._send(protocol.Release(chunks))

    # Receiving, in the connection's thread

    def _on_message(self, message: protocol.FromService) -> None:
        with self._changed:
            self._take(message)
            self._changed.notify_all()

    def _take(self, message: protocol.FromService) -> None:
        match message:
            case protocol.Grants():
                self._take_grants(message)
            case protocol.Recall():
                released, pinned = self._table.recall(message.chunks)
                self._send_release(released)
                if pinned:
                    self._send(protocol.Pinned(pinned))
            case protocol.Failed():
                self._take_failed(message)
            case protocol.Progress():
                failed_before = 0 if self._progress is None else self._progress.failed_objects
                is_denied = message.error_name == "AccessDeniedError" or message.failed_objects > failed_before
                if not (is_denied and self._renew_credentials()):
                    self._progress = message
            case protocol.Trouble():
                self._troubles.append(message.message)
            case protocol.RequestFailed():
                self._take_request_failed(message)
            case protocol.Indexes():
                _check_lengths(message, message.objects, message.data)
                self._take_part(message)
            case protocol.Opened():
                self._attached.append(message, self.chunk_bytes)  # also where the caller has given up: the service did
                self._take_part(message)
            case protocol.Resolved() | protocol.Counts() | protocol.Cleared() | protocol.StatsReply() | protocol.Done():
                self._take_part(message)
            case protocol.Pong():
                pass
            case protocol.Refused():
                raise protocol.ConversationError(message.message)
            case _:
                raise protocol.ConversationError(f"an unexpected {type(message).__name__} message")

    def _take_grants(self, message: protocol.Grants) -> None:
        assert self._arena is not None
        _check_lengths(message, message.chunks, message.serials, message.buffers, message.sources)
        if message.buffers and not 0 <= min(message.buffers) <= max(message.buffers) < self._buffer_count:
            raise protocol.ConversationError(f"buffers {message.buffers} are granted of {self._buffer_count}")
        if message.sources and not 0 <= min(message.sources) <= max(message.sources) < len(protocol.SOURCES):
            raise protocol.ConversationError(f"sources {message.sources} are granted of {len(protocol.SOURCES)}")
        if self._connection is not None:
            self._connection.was_served()
        fields = zip(message.chunks, message.serials, message.buffers, message.sources, strict=True)
        for chunk, serial, buffer, source in fields:
            self._table.grant(chunk, serial, self._arena, buffer, source)

    def _take_failed(self, message: protocol.Failed) -> None:
        _check_lengths(message, message.chunks, message.serials)
        if message.name == "AccessDeniedError" and self._renew_credentials():
            self._send_wants(self._table.ask_again())
            return
        for chunk, serial in zip(message.chunks, message.serials, strict=True):
            self._table.fail(chunk, serial, errors.from_wire(message.name, message.message))

    def _take_request_failed(self, message: protocol.RequestFailed) -> None:
        request = self._requests.get(message.request)
        if request is None:
            return
        if message.name == "AccessDeniedError" and self._renew_credentials():
            request.parts.clear()
            self._send(request.message)
            return
        request.error = errors.from_wire(message.name, message.message)
        request.done = True

    def _take_part(
        self,
        message: protocol.Resolved
        | protocol.Opened
        | protocol.Indexes
        | protocol.Counts
        | protocol.Cleared
        | protocol.StatsReply
        | protocol.Done,
    ) -> None:
        request = self._requests.get(message.request)
        if request is None:
            self._decline(message)
        elif not request.done:
            request.parts.append(message)
            request.done = message.last if isinstance(message, protocol.Resolved | protocol.Indexes) else True

    def _decline(self, part: protocol.Message) -> None:
        """The caller has given up waiting for this answer: others need not wait for indexes that it was to make."""
        if isinstance(part, protocol.Indexes):
            # Numbers of objects that were attached before mean nothing to the service, or others.
            make = [number for number in part.make if number < len(self._attached)]
            if make:
                self._send(protocol.GiveUpIndexes(make))

    def _renew_credentials(self) -> bool:
        """Read the environment again; True where that changed anything, which is then sent to the service."""
        try:
            wire = self._read_store_options()
        except FastloadError:  # it cannot be read now: the denial stands
            return False
        if wire == self._store_wire:
            return False
        self._store_wire = wire
        self._send(protocol.Credentials(wire))
        return True

    def _read_store_options(self) -> dict[str, Any]:
        return StoreOptions.from_environment(self._storage_options).to_wire()

    # The connection

    def _connect(self) -> None:
        """Takes `_changed` itself, as all of these do that the connection calls."""
        events = ConnectionEvents(
            self._find_service, self._on_connected, self._on_lost, self._on_message, self._on_ended
        )
        self._make_connection(events, self._changed, self.name).start()

    def _find_service(self, stop: threading.Event, avoid: str) -> Welcomed:
        if self._store_wire is None:
            self._store_wire = self._read_store_options()
        program = os.path.basename(sys.argv[0])[:255] if getattr(sys, "argv", None) else ""
        hello = protocol.Hello(
            protocol.VERSION, os.getpid(), self.name, self._store_wire, group=os.getpgrp(), program=program
        )
        return self._connector.connect(hello, stop, avoid)

    def _on_connected(self, connection: Connection, welcomed: Welcomed) -> None:
        """Map the service's arena, and send it everything."""
        welcome = welcomed.welcome
        with self._changed:
            if self._ended is not None:  # closed while connecting
                welcomed.close()
                raise self._ended
            if self._arena is not None:
                # What was leased is still good if the service before has ended. One that lives has ended the leases.
                self._table.leave(self._arena, lost=connection.was_refused)
            self._beside = welcomed.beside
            self.chunk_bytes, self._buffer_count = welcome.chunk_bytes, welcome.buffer_count
            self._arena = MappedArena(welcomed.view, welcome.chunk_bytes)
            self._troubles += welcome.troubles + welcomed.troubles
            self._connection = connection
            connection.adopt(welcomed)
            self._send_everything()
            self._changed.notify_all()

    def _on_lost(self, silent: socket.socket | None) -> None:
        """Where the service is only silent, it may go on at any time: it finds our socket open as long as anything that
        it leased to us is being read, and that we want nothing more.
        """
        if silent is None:
            return
        with self._changed:
            arena, self._arena = self._arena, None
            assert arena is not None
            left = self._table.leave(arena, lost=False, link=silent)
            if arena.link is not None and left and self._connection is not None:
                self._connection.send_last(silent, protocol.Release(left))

    def _on_ended(self, error: FastloadError) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = error
            self._changed.notify_all()

    def _send_everything(self) -> None:
        if len(self._attached):
            self._send_objects()
        if self._label:
            self._send(protocol.Label(self._label, list(range(len(self._attached)))))
        if self._keep is not None:
            self._send(self._keep)
        if self._plan is not None:
            self._send(self._plan)
        self._send_wants(self._table.ask_again())
        for request in self._requests.values():
            if not request.done:  # an answer that is complete is about to be taken by the thread that asked
                request.parts.clear()
                self._send(request.message)
        if self._report:
            self._send(protocol.Report(self._report))

    def _send_objects(self) -> None:
        for message in self._attached.messages():
            self._send(message)

    def _send_wants(self, wants: list[tuple[list[int], int, bool]]) -> None:
        for chunks, serial, urgent in wants:
            self._send(protocol.Want(chunks, serial, urgent))

    def _forget_after_fork(self) -> None:
        """In a forked child: the socket and the leases are the parent's."""
        connection, arena, ended = self._connection, self._arena, self._ended
        if connection is not None:
            connection.abandon()
        if arena is not None:
            arena.view.close()
        self._table.hang_up()
        self._begin()
        self._ended = ended


def _came_from(waiter: Waiter) -> Cause:
    """What the wait for its chunks is for: of those that have come, what takes longest; before that, a fetch."""
    return _WAITED_FOR[max((lease.source for lease in waiter.got.values()), default=protocol.SOURCE_REMOTE)]


def _check_lengths(message: protocol.Message, *columns: Sized) -> None:
    if len({len(column) for column in columns}) > 1:
        raise protocol.ConversationError(f"the lists of a {type(message).__name__} message differ in length")


def _by_bytes(names: Sequence[str], bytes_max: int) -> Iterator[list[str]]:
    """The names in parts of so many bytes."""
    some: list[str] = []
    byte_count = 0
    for name in names:
        name_bytes = len(name.encode("utf-8", "surrogateescape")) + 8  # and its length
        if some and byte_count + name_bytes > bytes_max:
            yield some
            some, byte_count = [], 0
        some.append(name)
        byte_count += name_bytes
    if some:
        yield some
