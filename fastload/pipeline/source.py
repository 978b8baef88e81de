"""The data of one data set in this process, and its consumers of the cache.

Each iteration has a consumer to itself (`AttachedConsumer`). A data set keeps idle ones, and opens another when two
iterations run at once. They belong to the process that opened them: after a fork, the child begins with none.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.client.cache import Handle
from fastload.client.consumer import Consumer
from fastload.formats import ComputedFormat, Format, Index
from fastload.formats.splits import with_split
from fastload.kernels import FIRST_BATCH, compile_in_background
from fastload.lifecycle import call_later, is_inherited, on_drop
from fastload.pipeline import manifest_files
from fastload.pipeline.shard_listing import attach, check_reading, find_sidecars, list_shards
from fastload.pipeline.shards import ShardTable, first_index
from fastload.plan import Manifest, next_version
from fastload.store.table import ObjectTable
from fastload.transport.slots import SlotPool
from fastload.waiting import Waits

# Free slots are kept for batches to come: two or three large ones for each of a few threads.
_SLOTS_RETAINED_BYTES = 1 << 30


class AttachedConsumer:
    """A consumer with the objects of `manifest` attached, and an account of its waits. Used by one iteration at a
    time.
    """

    def __init__(self, cache: Handle, storage_options: Mapping[str, Any] | None, name: str) -> None:
        self.manifest: Manifest | None = None
        self.closings = 0  # how often its source had been closed when it was opened
        self.waits = Waits()
        self.consumer: Consumer = cache.consumer(storage_options, name, waits=self.waits)

    def attach(self, manifest: Manifest, sidecars: ObjectTable) -> None:
        attach(self.consumer, manifest, sidecars)
        self.manifest = manifest

    def close(self) -> None:
        """Disconnect. May be called twice."""
        self.consumer.close()


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Where the data of one data set lies, and how its list of shards is kept.

    `index` names a file with the shards' indexes, `manifest_file` one for the list of shards. Data that `grows` is
    listed again between epochs, and versions of its list are kept for states that name them. `kernels` are the modules
    that its decoders use. `format` is that of the shards, `split` the one to be read of those under the URLs.
    """

    urls: Sequence[str]
    cache: Handle
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    index: str | None = None
    manifest_file: str | None = None
    grows: bool = False
    kernels: tuple[str, ...] = ()
    format: Format = "auto"
    split: str | None = None

    @property
    def names(self) -> list[str]:
        """What the data is called in files of lists of shards."""
        return with_split(self.urls, self.split)

    @property
    def computed(self) -> ComputedFormat | None:
        """The format where its indexes are computed, and not stored."""
        return None if isinstance(self.format, str) else self.format


class Source:
    """The data of one data set in this process: its manifest, what is known of its shards, and its consumers."""

    def __init__(self, options: SourceOptions, manifest: Manifest | None = None) -> None:
        self._options = options
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[AttachedConsumer] = []
        self._closings = 0
        # A data set that is dropped leaves no connection. It may be dropped under any lock, so another thread does it.
        on_drop(self, call_later, _close_all, self._idle)
        self._manifest = manifest
        self._first_chunk: npt.NDArray[np.int64] | None = None
        self._sidecars = ObjectTable.of([])
        self._shards: ShardTable | None = None
        self._counts: npt.NDArray[np.int64] | None = None  # by object; -1: not known here
        self._unsent: set[int] = set()  # objects whose counts the service may not know yet
        self.slots = SlotPool(_SLOTS_RETAINED_BYTES)

    @property
    def grows(self) -> bool:
        """Whether the data is listed again between epochs."""
        return self._options.grows

    @property
    def has_file(self) -> bool:
        """Whether the user keeps the list of shards in a file."""
        return self._options.manifest_file is not None

    @property
    def cache_name(self) -> str:
        return str(self._options.cache.directory)

    @property
    def is_inherited(self) -> bool:
        """Whether this was made in a process that this one was forked from."""
        return is_inherited(self._pid)

    @property
    def manifest(self) -> Manifest | None:
        """The manifest, once a consumer has been opened."""
        return self._manifest

    def adopt(self, manifest: Manifest) -> None:
        """Take this manifest for the data from now on. Consumers that are open go on with the one before."""
        check_reading(manifest, self._options.format)
        with self._lock:
            if self._manifest is not None and manifest.says_the_same_as(self._manifest):
                return
            _close_all(self._idle)  # they are attached to another
            self._manifest = manifest
            self._first_chunk = self._shards = self._counts = None
            self._unsent.clear()
            self._keep()

    def refresh(self, waits: Waits | None = None) -> Manifest:
        """List the data again: the version that follows the manifest, or the manifest itself where nothing has
        changed. It counts once it is adopted.
        """
        with self._options.cache.consumer(
            self._options.storage_options, self._options.urls[0], waits=waits
        ) as consumer:
            listed = self._listed(consumer)
        return listed if self._manifest is None else next_version(self._manifest, listed)

    def manifest_of(self, fingerprint: str) -> Manifest:
        """The version that a state names. `StateError` where it is not to be found."""
        with self._lock:
            if self._manifest is not None and self._manifest.fingerprint == fingerprint:
                return self._manifest
        return manifest_files.find(
            fingerprint, self._options.cache.directory, self._options.names, self._options.manifest_file
        )

    def shared_manifest(
        self,
        make: Callable[[], Manifest],
        *,
        is_first: bool,
        epoch: int | None = None,
        waits: Waits | None = None,
    ) -> Manifest:
        """The manifest in the user's file, which the first rank makes where there is none: see `manifests`."""
        assert self._options.manifest_file is not None, "the user named no file"
        return manifest_files.shared_manifest(
            self._options.manifest_file,
            self._options.names,
            is_first=is_first,
            list_shards=make,
            epoch=epoch,
            waits=waits,
        )

    @property
    def first_chunk(self) -> npt.NDArray[np.int64]:
        """int64[objects + 1]: each object's first chunk number."""
        assert self._first_chunk is not None, "no consumer was opened yet"
        return self._first_chunk

    @property
    def shards(self) -> ShardTable:
        assert self._shards is not None, "no consumer was opened yet"
        return self._shards

    def list_shards(self) -> Manifest:
        """The manifest, which is listed where it is not known yet."""
        if self._manifest is None:
            self.give_back(self.open())
        assert self._manifest is not None, "opening a consumer lists the shards"
        return self._manifest

    def open(self) -> AttachedConsumer:
        """An idle consumer or a new one; the first lists the shards."""
        with self._lock:
            while self._idle:
                attached = self._idle.pop()
                if not attached.consumer.is_ended:  # by Cache.close(), or because its service could not be replaced
                    return attached
            return self._connect()

    def give_back(self, attached: AttachedConsumer) -> None:
        """The consumer is idle again; where the source was closed meanwhile, it is closed now."""
        with self._lock:
            self._keep_counts(attached)
            if attached.manifest is not self._manifest or attached.closings != self._closings:
                attached.close()
            elif not attached.consumer.is_ended:
                self._idle.append(attached)

    def close(self) -> None:
        """Disconnect: the idle consumers now, those in use when they are given back. Idempotent; the source
        stays usable.
        """
        with self._lock:
            self._closings += 1
            _close_all(self._idle)

    def counts_in_memory(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The objects whose sample counts this process has learnt, and their counts. Sends nothing."""
        with self._lock:
            known = np.flatnonzero(self._counts_here() >= 0)
            return known.astype(np.int32), self._counts_here()[known]

    def counts_of(self, object_nos: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """The sample counts of these objects, int64; -1 where this process has not learnt it. Sends nothing."""
        with self._lock:
            return self._counts_here()[object_nos]

    def learn_counts(
        self, object_nos: npt.NDArray[np.int32], counts: npt.NDArray[np.int64], of: Manifest | None = None
    ) -> None:
        """Remember the sample counts of these objects; those of a list of shards other than today's are ignored."""
        with self._lock:
            if of is None or of is self._manifest:
                here = self._counts_here()
                self._unsent.update(object_nos[here[object_nos] < 0].tolist())
                here[object_nos] = counts

    def sample_counts(self, *, is_needed: bool = False) -> npt.NDArray[np.int64] | None:
        """int64[objects]: samples of each shard, or None where a shard has not been indexed yet. Where it `is_needed`,
        all that can be computed is.
        """
        attached = self.open()
        try:
            counts = self._counts_here()
            if (counts < 0).any():
                stored = self.shards.known_counts(attached.consumer, is_needed=is_needed)
                with self._lock:
                    known = stored >= 0
                    counts[known] = stored[known]
                    self._unsent.difference_update(np.flatnonzero(known).tolist())
        finally:
            self.give_back(attached)
        return counts if (counts >= 0).all() else None

    def first_index(self) -> Index:
        """The index of the first shard that can be read: see `shards.first_index`. Of the others nothing is asked."""
        options = self._options
        with options.cache.consumer(options.storage_options, options.urls[0]) as consumer:
            return first_index(consumer, options.urls, options.format, options.split)

    def _keep_counts(self, attached: AttachedConsumer) -> None:
        """Send the service counts that it may not know: counts from other nodes are needed before the next run's first
        epoch, to know how long that is.
        """
        if self._options.computed is not None:
            self._unsent.clear()  # they depend on arguments
        if self._manifest is not None:
            self._unsent.difference_update(self._manifest.excluded)  # of these, it keeps what the whole shard holds
        if self._shards is not None:
            self._unsent.difference_update(self._shards.unproven)
        if self._unsent and attached.manifest is self._manifest:
            numbers = np.array(sorted(self._unsent), np.int32)
            attached.consumer.put_counts(numbers, self._counts_here()[numbers])
            self._unsent.clear()

    def _counts_here(self) -> npt.NDArray[np.int64]:
        assert self._manifest is not None, "no consumer was opened yet"
        if self._counts is None:
            promised = self._manifest.promised
            self._counts = np.full(len(self._manifest), -1, np.int64) if promised is None else promised.copy()
            self._counts[self._manifest.gone] = 0
        return self._counts

    def _frozen(self) -> Manifest | None:
        """The list in the user's file, where that is one for all epochs and has been made."""
        if self._options.manifest_file is None or self._options.grows:
            return None
        return manifest_files.frozen(self._options.manifest_file, self._options.names)

    def _listed(self, consumer: Consumer) -> Manifest:
        return list_shards(consumer, self._options.urls, self._options.format, self._options.split)

    def _keep(self) -> None:
        if self._options.grows:
            assert self._manifest is not None, "no consumer was opened yet"
            manifest_files.keep(self._options.cache.directory, self._options.names, self._manifest)

    def _connect(self) -> AttachedConsumer:
        if self._first_chunk is None:
            compile_in_background(*FIRST_BATCH, *self._options.kernels)
        attached = AttachedConsumer(self._options.cache, self._options.storage_options, name=self._options.urls[0])
        attached.closings = self._closings
        try:
            if self._manifest is None:
                manifest = self._frozen() or self._listed(attached.consumer)
                check_reading(manifest, self._options.format)
                self._manifest = manifest
                self._keep()
            if self._first_chunk is None:
                chunk_bytes = attached.consumer.chunk_bytes
                self._first_chunk = self._manifest.first_chunk(chunk_bytes)
                self._sidecars = find_sidecars(attached.consumer, self._manifest, self._options.index)
                places = self._first_chunk, chunk_bytes
                self._shards = ShardTable(self._manifest, *places, self._sidecars, self._options.format)
            attached.attach(self._manifest, self._sidecars)
        except BaseException:
            attached.close()
            raise
        return attached


def _close_all(consumers: list[AttachedConsumer]) -> None:
    while consumers:
        consumers.pop().close()
