"""The job that reads a data set: which share this process has, in which order, and where sample counts come from.

It is settled once, when the data set is first iterated, since frameworks initialise torch.distributed late. Worker
processes of torch's loader inherit what their parent knows, and cannot communicate with the other ranks.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload import callers
from fastload.config import format_bytes
from fastload.errors import ConfigError
from fastload.lifecycle import is_inherited
from fastload.pipeline import agreement
from fastload.pipeline.counts import CountSource, Exchange, ExchangedCounts, LocalCounts, StoredCounts
from fastload.pipeline.source import AttachedConsumer, Source
from fastload.plan import (
    Manifest,
    OrderOptions,
    Ranks,
    RequestedOrder,
    default_partitions,
    epoch_orders,
    lanes_of_node,
    ram_bytes_for,
    resolve_ranks,
)


@dataclass(frozen=True, slots=True)
class PassStart:
    """Where a pass begins: its epoch, how many samples of it were delivered before, over all ranks, and the fingerprint
    of the list of shards that these were from.
    """

    epoch: int
    fingerprint: str | None = None
    samples: int = 0

    @property
    def saved_list(self) -> str | None:
        """The fingerprint of the list that must be gone on with."""
        return self.fingerprint if self.samples else None

    def __str__(self) -> str:
        return f"epoch {self.epoch}, after {self.samples} samples"


class Job:
    """`given`: rank and world size as the user said them. `ram_bytes`: the arena of this node."""

    def __init__(
        self, given: tuple[int | None, int | None], replicas: int, requested: RequestedOrder, ram_bytes: int
    ) -> None:
        self._given, self._replicas, self._requested, self._ram_bytes = given, replicas, requested, ram_bytes
        # What was given is checked at once; what launchers and torch say comes later.
        self._processes: Ranks | None = None if given == (None, None) else resolve_ranks(*given)
        self._order: OrderOptions | None = None
        self._agreed_ram_bytes = ram_bytes  # the smallest of all nodes, once that is known
        self._saved_window_bytes: int | None = None  # of the state that was loaded
        self._sharers = 1
        self._settled_for: tuple[int, str | int | None] = (0, None)
        self._begin()
        if self._processes is not None:
            self._processes.with_replicas(replicas)

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._meetings: agreement.Meetings | None = None
        self._settling = threading.Lock()
        self._exchange: Exchange | None = None
        self._has_agreed = False

    def shuffled(self) -> Job:
        """The same job, except that it shuffles in windows and has agreed on nothing yet."""
        job = copy.copy(self)
        job._requested, job._order = replace(self._requested, shuffle="window"), None
        return job

    @property
    def seed(self) -> int:
        """What the order is drawn from."""
        return self._requested.seed

    @property
    def ranks(self) -> Ranks:
        """The share of this process; settled at the first iteration."""
        return self._ranks_of_processes().with_replicas(self._replicas)

    @property
    def partition_count(self) -> int:
        return self._requested.partition_count(self.ranks)

    @property
    def order(self) -> OrderOptions:
        """The order; before `settle`, the one that this process would settle on by itself."""
        return self._order or self._requested.settled(self.ranks, self._ram_bytes)

    def settle(
        self,
        source: Source,
        settings: Mapping[str, Any],
        begin: PassStart,
        *,
        in_worker: bool,
        sharers: int = 1,
    ) -> None:
        """Before a pass begins: all ranks take rank 0's list of shards, and make sure that they are one job.

        `settings` are compared beside those of the order. So many data sets as `sharers` are read at a time, and have
        their windows in one arena.
        """
        with self._settling:
            self._processes = self._ranks_of_processes()
            is_collective = not in_worker and agreement.is_collective(self._processes)
            if is_collective:
                self._meet(self._processes, begin)
            version = (begin.saved_list or begin.epoch) if source.grows else None
            if self._has_agreed and (sharers, version) == self._settled_for:
                return
            if source.grows and in_worker:
                raise ConfigError(
                    'refresh="epoch" needs a loader whose process lists the shards for all ranks: use '
                    "fastload.DataLoader, or make the data set anew for each epoch"
                )
            self._sharers = sharers
            choose = partial(self._choose, source, begin)
            if is_collective:
                self._agree(self._processes, source, choose, settings)
            else:
                source.adopt(choose())
                if not in_worker or self._order is None:  # a worker may have it from its parent
                    self._order = self._settled_order()
            self._has_agreed, self._settled_for = True, (sharers, version)

    def _meet(self, processes: Ranks, begin: PassStart) -> None:
        """Wait for the other ranks. In a new process group everything is agreed on again."""
        if self._meetings is None or not self._meetings.are_of_this_group:
            self._meetings, self._has_agreed = agreement.Meetings(), False
        agreement.meet(processes, self._meetings.next_name(), str(begin))

    def _choose(self, source: Source, begin: PassStart) -> Manifest:
        """The list of shards for a pass: the one that a state names, the user's file, or a new listing."""
        assert self._processes is not None
        if source.grows and begin.saved_list is not None:
            return source.manifest_of(begin.saved_list)
        make = source.refresh if source.grows and source.manifest is not None else source.list_shards
        if not source.has_file:
            return make()
        epoch = begin.epoch if source.grows else None
        return source.shared_manifest(make, is_first=self._processes.rank == 0, epoch=epoch)

    def adopt(self, saved: OrderOptions) -> None:
        """Continue in the order of a saved run, where the user did not give one."""
        with self._settling:
            self._requested = self._requested.adopted(saved)
            self._saved_window_bytes = saved.window_bytes
            if self._order is not None:
                self._order = self._settled_order()

    def counts(self, source: Source, attached: AttachedConsumer) -> CountSource:
        """The source of sample counts of shards that a pass has not opened. Only after `settle`."""
        with self._settling:
            if self._exchange is not None and not is_inherited(self._pid):
                self._exchange.open()
                return ExchangedCounts(self._exchange, attached.consumer, attached.waits)
        nodes = default_partitions(self.ranks)
        if nodes == 1 or self.order.partitions == 1:
            return LocalCounts(source, attached.consumer)
        return StoredCounts(source, attached.consumer, nodes, self.own_objects(source))

    def close(self) -> None:
        """End the thread that answers other nodes; it starts again with the next pass."""
        with self._settling:
            if self._exchange is not None and not is_inherited(self._pid):
                self._exchange.close()

    def _ranks_of_processes(self) -> Ranks:
        return self._processes if self._processes is not None else resolve_ranks(*self._given)

    def _agree(
        self, processes: Ranks, source: Source, choose: Callable[[], Manifest], settings: Mapping[str, Any]
    ) -> None:
        manifest, name = agreement.share_manifest(processes, choose)
        source.adopt(manifest)
        least = agreement.compare(lambda: (self._settings_of_all(settings), {"ram_bytes": self._ram_bytes}))
        self._agreed_ram_bytes = least["ram_bytes"]
        self._order = self._settled_order()
        if self._order.partitions > 1 and default_partitions(self.ranks) > 1:
            self._begin_exchange(processes, source, name)

    def _settings_of_all(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What has to be the same on all ranks. Raises `ConfigError` where the nodes of this one fit no partitions."""
        ranks, partitions = self.ranks, self.partition_count
        lanes_of_node(ranks, partitions)
        requested = {key: value for key, value in asdict(self._requested).items() if key != "partitions"}
        same = {**requested, "partitions": partitions, "replicas": self._replicas, **settings}
        return same if partitions == 1 else {**same, "local_world_size": ranks.local_world_size}

    def _begin_exchange(self, processes: Ranks, source: Source, name: str) -> None:
        own, serves = self.own_objects(source), processes.local_rank == 0

        def known() -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
            if not serves:
                return np.empty(0, np.int32), np.empty(0, np.int64)
            source.sample_counts()  # what this node's cache has indexes of
            return source.counts_in_memory()

        common, counts = agreement.share_counts(processes, known, own)
        source.learn_counts(common, counts)
        if self._exchange is not None:
            self._exchange.close()
        self._exchange = Exchange(source, agreement.store(name), own, common, serves=serves)

    def own_objects(self, source: Source) -> npt.NDArray[np.int32]:
        """The objects of the partitions that this node reads."""
        assert source.manifest is not None
        if self.order.partitions == 1:
            return np.flatnonzero(source.manifest.is_there).astype(np.int32)
        orders = epoch_orders(source.manifest, self.order, 0)
        home = lanes_of_node(self.ranks, self.order.partitions)
        return np.concatenate([orders[partition].object_order for partition in home])

    def _settled_order(self) -> OrderOptions:
        requested, ranks, ram_bytes = self._requested, self.ranks, self._agreed_ram_bytes // self._sharers
        order = requested.settled(ranks, ram_bytes)
        wanted = requested.window_bytes
        if order.shuffle != "window" or wanted is None or order.window_bytes == wanted:
            return order
        lanes = len(lanes_of_node(ranks, order.partitions))
        is_saved = wanted == self._saved_window_bytes  # then the order is settled, whatever the memory
        callers.warn(
            f"shuffle_window={format_bytes(wanted)} is too large for {format_bytes(ram_bytes)} of ram_bytes"
            + (f" (the share of one of {self._sharers} sources)" if self._sharers > 1 else "")
            + f": the live windows of {lanes} partition(s) a node must fit in half of that, or parts of them are read "
            "again; "
            + ("the saved run has it, so it stays. " if is_saved else f"it is {format_bytes(order.window_bytes)} now. ")
            + f"Raise ram_bytes to {format_bytes(ram_bytes_for(lanes, wanted) * self._sharers)}, or lower "
            "shuffle_window in a new run"
        )
        return replace(order, window_bytes=wanted) if is_saved else order

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; ranks too, since a worker cannot ask torch.distributed."""
        state = dict(self.__dict__)
        del state["_pid"], state["_settling"], state["_exchange"], state["_has_agreed"], state["_meetings"]
        if self._processes is None and agreement.is_initialised():
            state["_processes"] = self._ranks_of_processes()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()
