"""Sample counts of shards that this node has not opened, and how nodes exchange them.

Where all ranks are on one node, it counts a shard by indexing it. Several nodes each count the windows that they open.
Counts that one needs from another (near the end of the epoch, and about once a window) go through the key-value store
of torch.distributed: a log of counts, which all read, and a log of requests. A request is served by the nodes that read
the shards in question, in a thread of its own there, since their trainers may be waiting for the node that asks. Counts
that are known before the first batch are shared by a collective call instead; where all are known, the store is never
used.

Store keys, below a prefix that is new for each data set and version of its manifest: `counts` and `requests` are the
lengths of the two logs, `counts/<i>` and `requests/<i>` their records, from 1 on. A record of counts is JSON:
`[[object number, ...], [count, ...], error]`, where error is null or the `[type, message]` of the error that kept the
node from counting these; a record of requests is `[object number, ...]`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from fastload import errors
from fastload.client.consumer import Consumer
from fastload.errors import ConfigError, ServiceError
from fastload.pipeline.shards import ShardTable
from fastload.pipeline.source import AttachedConsumer, Source
from fastload.waiting import Waits

ObjectNos = npt.NDArray[np.int32]
Counts = tuple[ObjectNos, npt.NDArray[np.int64]]

# Shards that are indexed for their counts alone at a time, so that a feed can continue with the first of them.
_INDEXED_AT_ONCE = 16
# The count of a shard that another node opens anyway arrives soon; a request would have the shard read twice.
_ASK_AFTER_S = 0.5
# Without an answer (the node has closed its data set, or is slow), a node reads the shards itself.
_COUNT_OURSELVES_AFTER_S = 5.0
_POLL_FIRST_S, _POLL_MAX_S = 0.02, 0.5  # all ranks ask one process
_SERVE_POLL_S = 0.1
_RECORDS_AT_ONCE = 256

_Record = tuple[list[int], list[int], tuple[str, str] | None]


class CountSource(Protocol):
    """Where a feed finds the sample counts of shards that it has not opened."""

    def known(self) -> Counts:
        """What is known before anything is read: object numbers and their counts."""
        ...

    def counted(self, object_nos: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> None:
        """The feed has counted these."""
        ...

    def ask(self, object_nos: npt.NDArray[np.int32]) -> Counts:
        """The counts of some of these, at least of one. May wait."""
        ...


class LocalCounts:
    """Counts of shards that this node reads itself."""

    def __init__(self, source: Source, consumer: Consumer) -> None:
        self._source, self._consumer = source, consumer
        # Of this pass: the source may get another list of shards meanwhile.
        self._manifest, self._shards = source.manifest, source.shards

    def known(self) -> Counts:
        """The counts that this process knows."""
        return self._source.counts_in_memory()

    def counted(self, object_nos: ObjectNos, counts: npt.NDArray[np.int64]) -> None:
        """Remember these for the next epoch."""
        self._source.learn_counts(object_nos, counts, of=self._manifest)

    def ask(self, object_nos: ObjectNos) -> Counts:
        """The counts of the first of these, by indexing them."""
        object_nos = object_nos[:_INDEXED_AT_ONCE]
        counts = _count(self._shards, self._consumer, object_nos)
        self.counted(object_nos, counts)
        return object_nos, counts


class StoredCounts(LocalCounts):
    """For nodes that cannot communicate: the counts that are stored here must do."""

    def __init__(self, source: Source, consumer: Consumer, node_count: int, own: ObjectNos) -> None:
        super().__init__(source, consumer)
        self._node_count, self._own = node_count, own

    def known(self) -> Counts:
        """What this process has counted, and what this node's cache has indexes of."""
        self._source.sample_counts()
        return super().known()

    def ask(self, object_nos: ObjectNos) -> Counts:
        """The counts of those that this node reads. `ConfigError` where none is."""
        mine = object_nos[np.isin(object_nos, self._own)]
        if len(mine):
            return super().ask(mine)
        assert self._source.manifest is not None
        url = self._source.manifest.objects[int(object_nos[0])].url
        raise ConfigError(
            f"{self._node_count} nodes read partitions of their own, and this one has no way to learn how many samples "
            f"the others' shards hold (such as {url}): run `fastload index` once and give every node its file with "
            "index=..., or use partitions=1, with which every node reads all shards; or, where it is not a worker "
            "process of torch's own DataLoader, call torch.distributed.init_process_group before iterating"
        )


def _count(shards: ShardTable, consumer: Consumer, object_nos: ObjectNos) -> npt.NDArray[np.int64]:
    """int64[objects]: counts, from indexes; parses the shards that have none yet."""
    return np.array([index.sample_count for index in shards.index(consumer, object_nos.tolist())], np.int64)


class CountStore(Protocol):
    """What is used of torch.distributed's store. Safe to use from several threads."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 at first; the sum."""
        ...

    def set(self, key: str, value: bytes) -> None:
        """Write a value."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys are there."""
        ...

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Their values."""
        ...


class _Log:
    """Records that any rank appends and every rank reads, each in the same order."""

    def __init__(self, store: CountStore, name: str) -> None:
        self._store, self._name = store, name
        self._read = 0

    def append(self, record: Any) -> None:
        number = self._store.add(self._name, 1)
        self._store.set(f"{self._name}/{number}", msgspec.json.encode(record))

    def more(self) -> list[bytes]:
        """The records after those that were read. One that is only being written ends the list."""
        end = min(self._store.add(self._name, 0), self._read + _RECORDS_AT_ONCE)
        keys = [f"{self._name}/{number}" for number in range(self._read + 1, end + 1)]
        # Never a blocking get: a writer may have died between its two calls.
        while keys and not self._store.check(keys):
            keys = keys[: len(keys) // 2]
        self._read += len(keys)
        return self._store.multi_get(keys) if keys else []


class Exchange:
    """The counts of one manifest over all nodes: this rank's end of it, for as long as the data set is used.

    `own` are the objects that this node reads; `serves` says whether this rank answers for them. `common` are the
    objects whose counts all ranks know already. A thread serves requests from `open` to `close`, or until all counts
    are published.
    """

    def __init__(self, source: Source, store: CountStore, own: ObjectNos, common: ObjectNos, *, serves: bool) -> None:
        self._source, self._own, self._own_nos = source, frozenset(own.tolist()), own
        self._counts, self._requests = _Log(store, "counts"), _Log(store, "requests")
        self._publishing, self._reading = threading.Lock(), threading.Lock()
        self._published = set(common.tolist())
        self._unpublished = set(self._own - self._published)
        self._failed: dict[int, tuple[str, str]] = {}
        self._serves = serves
        self._is_closed = threading.Event()
        self._is_closed.set()
        self._thread: threading.Thread | None = None
        self._attached: AttachedConsumer | None = None  # with which the thread indexes something now

    def open(self) -> None:
        """Start serving requests, or start again after `close`."""
        if not self._is_closed.is_set():
            return
        self._is_closed = threading.Event()
        if self._serves and self._unpublished:
            arguments = weakref.WeakMethod(self._serve_once), self._is_closed
            self._thread = threading.Thread(target=_serve, args=arguments, name="fastload-counts", daemon=True)
            self._thread.start()

    def known(self) -> Counts:
        """The counts that this process knows. Those of its own shards are published."""
        object_nos, counts = self._source.counts_in_memory()
        if self._serves:
            ours = np.isin(object_nos, self._own_nos)
            self._publish(object_nos[ours], counts[ours])
        return object_nos, counts

    def counted(self, object_nos: ObjectNos, counts: npt.NDArray[np.int64]) -> None:
        """This node has opened a window: its counts are published."""
        self._source.learn_counts(object_nos, counts)
        if self._serves:
            self._publish(object_nos, counts)

    def ask(self, object_nos: ObjectNos, consumer: Consumer) -> Counts:
        """Some of these counts, once a node has published them, or by indexing them with `consumer` where none does.

        Raises the error that kept a node from counting; `ServiceError` when the consumer is interrupted.
        """
        import torch.distributed as distributed

        try:
            return self._ask(object_nos, consumer)
        except distributed.DistError as error:
            raise ServiceError(
                f"the store of torch.distributed ended while this rank waited to hear how many samples "
                f"{self._url(object_nos)} holds: {error}. Have the rank that holds it (rank 0, or torchrun's agent) "
                "live until all have read their batches, with a torch.distributed.barrier() before it ends"
            ) from error

    def _ask(self, object_nos: ObjectNos, consumer: Consumer) -> Counts:
        began, is_asked, pause_s = time.monotonic(), False, _POLL_FIRST_S
        while True:
            self._read_log(object_nos)
            found = self._in_memory(object_nos)
            if len(found[0]):
                return found
            waited = time.monotonic() - began
            if waited > _COUNT_OURSELVES_AFTER_S:
                return self._count_ourselves(object_nos[:_INDEXED_AT_ONCE], consumer)
            if waited > _ASK_AFTER_S and not is_asked:
                self._requests.append(object_nos.tolist())
                is_asked = True
            if self._is_closed.wait(pause_s) or consumer.is_interrupted:
                raise ServiceError("the data set was closed while it waited for another node's sample counts")
            pause_s = min(2 * pause_s, _POLL_MAX_S)

    def _count_ourselves(self, object_nos: ObjectNos, consumer: Consumer) -> Counts:
        counts = _count(self._source.shards, consumer, object_nos)
        self._source.learn_counts(object_nos, counts)
        self._publish(object_nos, counts)
        return object_nos, counts

    def close(self) -> None:
        """End the thread and all waits in `ask`. Idempotent; may be called before `open`."""
        self._is_closed.set()
        while self._thread is not None and self._thread is not threading.current_thread() and self._thread.is_alive():
            attached = self._attached  # it may have one only now
            with nullcontext() if attached is None else attached.consumer.interrupted():
                self._thread.join(_SERVE_POLL_S)

    def _in_memory(self, object_nos: ObjectNos) -> Counts:
        counts = self._source.counts_of(object_nos)
        return object_nos[counts >= 0], counts[counts >= 0]

    def _read_log(self, wanted: ObjectNos) -> None:
        """Learn the counts that were added to the log; raises the error that kept a node from counting `wanted`."""
        with self._reading:
            while records := self._counts.more():
                for record in records:
                    numbers, counts, error = msgspec.json.decode(record, type=_Record)
                    if error is None:
                        self._source.learn_counts(np.array(numbers, np.int32), np.array(counts, np.int64))
                        for number in numbers:  # it failed before, and was tried again
                            self._failed.pop(number, None)
                    else:
                        self._failed.update(dict.fromkeys(numbers, error))
            for number in wanted.tolist():
                if number in self._failed:  # the next to ask has it tried again
                    raise errors.from_wire(*self._failed.pop(number))

    def _serve_once(self) -> bool:
        """Count the shards of this node that were requested. Whether any are left that others may request."""
        for record in self._requests.more():
            asked = msgspec.json.decode(record, type=list[int])
            ours = [number for number in asked if number in self._own and number not in self._published]
            for start in range(0, len(ours), _INDEXED_AT_ONCE):
                self._count_and_publish(np.array(ours[start : start + _INDEXED_AT_ONCE], np.int32))
        return bool(self._unpublished)

    def _count_and_publish(self, object_nos: ObjectNos) -> None:
        try:
            counts = self._count(object_nos)
        except Exception as error:  # whatever it is, the node that asks must learn of it
            if not self._is_closed.is_set():  # otherwise closing caused it
                self._counts.append((object_nos.tolist(), [], errors.to_wire(error)))
            return
        self.counted(object_nos, counts)

    def _count(self, object_nos: ObjectNos) -> npt.NDArray[np.int64]:
        self._attached = self._source.open()
        try:
            return _count(self._source.shards, self._attached.consumer, object_nos)
        finally:
            attached, self._attached = self._attached, None
            self._source.give_back(attached)

    def _publish(self, object_nos: ObjectNos, counts: npt.NDArray[np.int64]) -> None:
        with self._publishing:
            pairs = zip(object_nos.tolist(), counts.tolist(), strict=True)
            fresh = {number: count for number, count in pairs if number not in self._published}
            self._published.update(fresh)
            self._unpublished.difference_update(fresh)
        if fresh:
            self._counts.append((list(fresh), list(fresh.values()), None))

    def _url(self, object_nos: ObjectNos) -> str:
        assert self._source.manifest is not None
        return self._source.manifest.objects[int(object_nos[0])].url


class ExchangedCounts:
    """An exchange as one pass uses it: waits are booked as the pass's own, and end when its consumer is interrupted."""

    def __init__(self, exchange: Exchange, consumer: Consumer, waits: Waits) -> None:
        self._exchange, self._consumer, self._waits = exchange, consumer, waits
        self.known, self.counted = exchange.known, exchange.counted

    def ask(self, object_nos: ObjectNos) -> Counts:
        """Some of these counts, as soon as a node has published them."""
        with self._waits.measure("index"):
            return self._exchange.ask(object_nos, self._consumer)


def _serve(target: weakref.WeakMethod[Callable[[], bool]], is_closed: threading.Event) -> None:
    """Serve requests until the exchange is closed or dropped, or all counts are published."""
    import torch.distributed as distributed

    while not is_closed.wait(_SERVE_POLL_S):
        serve_once = target()
        if serve_once is None:
            return
        try:
            if not serve_once():
                return
        except distributed.DistError:
            # The process that holds the store has ended, usually a moment before this one does. No request can come any
            # more, and nodes that wait for an answer get the same error from the store.
            return
        del serve_once
