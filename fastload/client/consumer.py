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

Any number of threads may call any method, and a forked child too: `session` says how. Leases are kept after their use
until they are released, or until the service needs their room (`leases`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload import errors, protocol
from fastload.cache.policy import PolicyName
from fastload.client.leases import Lease, offsets_by_arena
from fastload.client.session import Connector, Int64, Session, chunk_starts
from fastload.errors import FastloadError, ServiceError
from fastload.protocol import Progress
from fastload.store import local, normalise
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from fastload.waiting import DEADLINE_S, Reason, Waits

Ints = Sequence[int] | npt.NDArray[np.integer[Any]]


class Held:
    """Chunks pinned for the length of a `with` block.

    `chunk_nos` (int64[n]) are those that are here, some or all of the ones asked for. `groups` holds (arena, chunk_nos
    int64[k], offsets int64[k]): read-only uint8 arrays of a whole arena, and where in it each chunk begins. One group,
    or two for a while after the service was replaced.
    """

    def __init__(self, unpin: Callable[[dict[int, Lease]], None], held: dict[int, Lease]) -> None:
        self._unpin = unpin
        self._held = held
        self.chunk_nos: Int64 = np.fromiter(held, np.int64, len(held))
        self.groups: list[tuple[npt.NDArray[np.uint8], Int64, Int64]] = [
            (arena.view.array, np.array(chunks, np.int64), np.array(offsets, np.int64))
            for arena, chunks, offsets in offsets_by_arena(held)
        ]

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the pins. ServiceError where the service took the chunks back meanwhile: what was read is void."""
        held, self._held = self._held, {}
        self.groups = []
        if held:
            self._unpin(held)


class Consumer(Session):
    """See the module's text."""

    def __init__(
        self,
        cache: Connector,
        storage_options: Mapping[str, Any] | None = None,
        name: str = "",
        *,
        waits: Waits | None = None,
    ) -> None:
        """Connect, starting the service where none runs; CacheError, ConfigError or ServiceError where that fails.

        `storage_options` as the user gave them; with them the environment is read, now and again whenever a store
        denies access. `waits` is where the time spent waiting is booked.
        """
        super().__init__(cache, storage_options, name, waits)

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
            self._objects = table
            self._first_chunk = chunk_starts(table.sizes, self.chunk_bytes)
            self._plan = self._keep = self._progress = None
            self._table.clear()
            self._tell_objects()

    # The plan

    def keep(self, object_nos: Ints, policy: PolicyName) -> None:
        """These objects (numbers, int[n]) will be read again and again; `policy` says how the service keeps them.

        They stay before what nobody names, also while a plan names only some of them; until this is called again, or
        the consumer ends. It costs nothing to say the same twice.
        """
        self._enter()
        keep = protocol.Keep(self._checked_objects(object_nos), policy)
        with self._changed:
            if keep != self._keep:
                self._keep = keep
                self._send(keep)

    def set_plan(self, object_order: Ints, epoch: int = 0, warm: bool = False) -> None:
        """All chunks of these objects (numbers, int[n]) in this order will be needed; replaces the plan before.

        With `warm`, fill the cache with them instead of the arena only; see `progress` and `wait_progress`.
        """
        self._enter()
        order = self._checked_objects(object_order)
        with self._changed:
            self._progress = None
            self._plan = protocol.SetPlan(order, epoch, warm, 0)
            self._send(self._plan)

    def foresee(self, first: int, positions: npt.NDArray[np.integer[Any]]) -> None:
        """Chunks of the warm plan, by their positions in it, will be read in this order, the first as use number
        `first`.

        Each call goes on where the one before ended. `advance` then counts uses. A service that replaces this one
        learns what is told from then on.
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
        """How far a warm plan is, as last heard."""
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
                "news of a warm plan",
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
            self._ask_for(self._checked(chunk_nos), urgent=False)

    def acquire(self, chunk_nos: Ints, deadline_s: float = DEADLINE_S, *, reason: Reason = "chunk") -> Held:
        """Wait until at least one of the chunks is here, and pin all those that are.

        The error of a chunk that could not be had is raised here, as the store or the service put it; asking again
        tries again. Not to be called while the same thread holds a `Held`.
        """
        self._enter()
        chunks = self._checked(chunk_nos)
        if not chunks:
            raise ValueError("acquire() of no chunks")
        with self._changed:
            waiter = self._table.add_waiter(chunks)
            try:
                if not waiter.got:  # mostly they are here
                    self._wait_for_any(chunks, waiter.got, reason, deadline_s)
                    self._table.pin_available(waiter)
            except BaseException:
                self._send_release(self._table.unpin(waiter.got))
                self._changed.notify_all()
                raise
            finally:
                self._table.remove_waiter(waiter)
        return Held(self._unpin, waiter.got)

    def _wait_for_any(self, chunks: list[int], got: dict[int, Lease], reason: Reason, deadline_s: float) -> None:
        failure: FastloadError | None = None

        def ready() -> bool:
            nonlocal failure
            if got:
                return True
            failure = self._table.take_failure(chunks)
            if failure is None:
                self._ask_for(chunks, urgent=True)
            return failure is not None

        self._wait(ready, reason, f"chunks of {self._where(chunks[0])} from the cache service", deadline_s)
        if failure is not None:
            raise failure

    def _unpin(self, held: dict[int, Lease]) -> None:
        with self._changed:
            lost = any(lease.arena.lost for lease in held.values())
            if any(lease.recalled for lease in held.values()):  # it leaves now, and may be asked for again
                self._changed.notify_all()
            self._send_release(self._table.unpin(held))
        if lost:
            raise ServiceError("the cache service dropped this consumer while it was reading; what it read is void")

    def release(self, chunk_nos: Ints) -> None:
        """Give leases back, and want these no more. Pinned ones go when their pins end."""
        with self._changed:
            self._send_release(self._table.release(self._checked(chunk_nos)))

    # Indexes

    def get_indexes(self, object_nos: Ints, deadline_s: float = DEADLINE_S) -> dict[int, bytes]:
        """The stored indexes of these objects; those that have none are left out."""
        numbers = [int(number) for number in object_nos]
        parts = self._ask_service(lambda request: protocol.GetIndexes(request, numbers), "index", deadline_s)
        return {
            number: data
            for part in parts
            if isinstance(part, protocol.Indexes)
            for number, data in zip(part.objects, part.data, strict=True)
        }

    def put_index(self, object_no: int, data: bytes) -> None:
        """Have an index kept for later runs; one above 64 MiB is not."""
        self._enter()
        if len(data) <= protocol.INDEX_BYTES_MAX:
            with self._changed:
                self._send(protocol.PutIndex(int(object_no), bytes(data)))

    def put_counts(self, object_nos: Ints, counts: Ints) -> None:
        """Have sample counts kept for later runs that were heard of elsewhere. They need no index; a consumer that has
        ended leaves it.
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

    def _get_counts(self, numbers: list[int], deadline_s: float) -> Int64:
        (part,) = self._ask_service(lambda request: protocol.GetCounts(request, numbers), "index", deadline_s)
        assert isinstance(part, protocol.Counts)
        if len(part.counts) != 8 * len(numbers):
            raise ServiceError(f"the cache service answered {len(part.counts)} bytes for {len(numbers)} sample counts")
        return np.frombuffer(part.counts, "<i8").astype(np.int64)

    # Figures

    def stats(self, deadline_s: float = DEADLINE_S) -> dict[str, Any]:
        """The service's counters: `"consumer"` (ours), `"node"` and `"store"`; see docs/protocol.md. To `"node"` this
        adds `"beside"`, which says why that is not the directory's own service, and is "" where it is.
        """
        (part,) = self._ask_service(protocol.Stats, "service", deadline_s)
        assert isinstance(part, protocol.StatsReply)
        return {**part.values, "node": {**part.values.get("node", {}), "beside": self.beside}}

    def clear(self, *, history: bool, deadline_s: float = DEADLINE_S) -> int:
        """Empty the cache: see `Cache.clear`."""
        (part,) = self._ask_service(lambda request: protocol.Clear(request, history), "service", deadline_s)
        assert isinstance(part, protocol.Cleared)
        return part.byte_count

    def report(self, **values: float) -> None:
        """Figures of ours for the service to show beside its own."""
        with self._changed:
            self._report.update(values)
            self._send(protocol.Report(self._report))

    def counts(self) -> dict[str, int]:
        """Chunks leased, pinned and asked for, and leases granted by source, as known here."""
        with self._changed:
            granted = {
                f"granted_{name}": self._table.granted_count[number] for number, name in enumerate(protocol.SOURCES)
            }
            return {**self._table.counts(), **granted}

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # Inside

    def _checked_objects(self, object_nos: Ints) -> list[int]:
        numbers: list[int] = np.asarray(object_nos, np.int64).tolist()
        if numbers and not (min(numbers) >= 0 and max(numbers) < len(self._objects)):
            raise ValueError(f"a plan names object {max(numbers)} (or a negative one) of {len(self._objects)}")
        return numbers

    def _checked(self, chunk_nos: Ints) -> list[int]:
        chunks: list[int] = np.asarray(chunk_nos, np.int64).tolist()
        if chunks and not (min(chunks) >= 0 and max(chunks) < self._first_chunk[-1]):
            raise ValueError(f"chunk {max(chunks)} (or a negative one) of {self._first_chunk[-1]} attached chunks")
        return chunks

    def _where(self, chunk: int) -> str:
        number = int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1
        start = (chunk - int(self._first_chunk[number])) * self.chunk_bytes
        return f"{self._objects[number].url} from byte {start}"


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
