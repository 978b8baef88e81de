"""Indexes that come in files of their own, as a data set's readers use them.

The files are attached behind the manifest's objects. Their summaries are read when the first count or index is asked
for, and say which shards they speak of; an index is read when its shard is opened.

They save work and nothing depends on them, so what is wrong with them is a warning, and the shard is read instead: a
row for another version of its shard, an index that is damaged, a file that changed after it was listed. Only a file
that is no sidecar at all is an error.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fastload import callers
from fastload.client.consumer import Consumer
from fastload.errors import ShardError, StoreError
from fastload.formats import ShardIndex
from fastload.pipeline.objects import reader
from fastload.plan import Manifest
from fastload.store.table import ObjectTable

if TYPE_CHECKING:  # pyarrow takes a quarter of a second to import
    from fastload.formats.sidecar import Summary

Ints = npt.NDArray[np.int64]


class Sidecars:
    """The sidecars of a manifest; the first one's chunks begin at `first_chunk`. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, files: ObjectTable, first_chunk: int, chunk_bytes: int) -> None:
        self._manifest, self._files = manifest, files
        self._chunk_counts: Ints = -(-files.sizes // chunk_bytes)
        self._first_chunk: Ints = first_chunk + np.cumsum(self._chunk_counts) - self._chunk_counts
        self._lock = threading.Lock()
        self._summaries: list[Summary] = []
        self._file_of = np.full(len(manifest), -1, np.int32)
        self._row_of = np.full(len(manifest), -1, np.int64)
        self._is_open = False
        self._lost: set[int] = set()

    def counts(self, consumer: Consumer) -> Ints:
        """int64[objects]: the sample count of each shard, -1 where no sidecar has it."""
        self._open(consumer)
        counts = np.full(len(self._manifest), -1, np.int64)
        for number, summary in enumerate(self._summaries):
            of_file = np.flatnonzero(self._file_of == number)
            counts[of_file] = summary.sample_counts[self._row_of[of_file]]
        return counts

    def index(self, consumer: Consumer, object_no: int) -> ShardIndex | None:
        """The index of a shard, None where no sidecar has it."""
        self._open(consumer)
        number = int(self._file_of[object_no])
        if number < 0 or number in self._lost:
            return None
        info = self._files[number]
        try:
            row = int(self._row_of[object_no])
            return self._summaries[number].index(row, reader(consumer, int(self._first_chunk[number]), info.size))
        except StoreError as error:
            self._lost.add(number)
            _warn(f"{info.url} cannot be read any more ({error})", "its shards are indexed by reading them")
        except ShardError as error:
            self._file_of[object_no] = -1
            _warn(f"{info.url} has a damaged index ({error})", "the shard is indexed by reading it")
        return None

    def _open(self, consumer: Consumer) -> None:
        with self._lock:
            if not self._is_open:
                self._read_summaries(consumer)
                self._is_open = True

    def _read_summaries(self, consumer: Consumer) -> None:
        from fastload.formats.sidecar import read_summary

        ends = self._ends()
        consumer.want(ends)
        for info, first in zip(self._files, self._first_chunk.tolist(), strict=True):
            summary = read_summary(reader(consumer, first, info.size), info.size, info.url)
            rows, others = summary.rows_of(self._manifest.objects)
            self._warn_of_versions(info.url, others)
            found = rows >= 0
            self._file_of[found], self._row_of[found] = len(self._summaries), rows[found]
            self._summaries.append(summary)
        consumer.release(ends)

    def _ends(self) -> list[int]:
        """The first and last chunk of each file: its list of contents, and where it is small all that is read here."""
        stops = (self._first_chunk - 1 + self._chunk_counts).tolist()
        pairs = zip(self._first_chunk.tolist(), stops, strict=True)
        return [chunk for first, last in pairs for chunk in range(first, last + 1, max(1, last - first))]

    def _warn_of_versions(self, url: str, object_nos: Ints) -> None:
        there = object_nos[self._manifest.is_there[object_nos]]
        if len(there):
            shard = self._manifest.objects[int(there[0])].url
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            _warn(f"{url} was made of other versions of {shard}{more}", "what it says of them is not used")


def _warn(what: str, consequence: str) -> None:
    message = f"{what}: {consequence}. Write it again with: fastload index URL --output FILE"
    callers.warn(message, RuntimeWarning)
