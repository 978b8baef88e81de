"""Indexes that other tools left beside single shards (see `formats.side_index`), attached behind a manifest's objects.

Each is read when its shard is opened, or its sample count is asked for. They are optional, as sidecar files are: one
that does not fit its shard, or cannot be read, costs a warning, and the shard is read instead. A count that fits and is
wrong all the same is an error once the shard is read, since plans were made with it, and so is a member that is not
where an index says.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from fastload import callers
from fastload.client.consumer import Consumer
from fastload.errors import ShardError, StoreError
from fastload.formats import format_of, side_index
from fastload.formats.side_index import UnprovenIndex
from fastload.pipeline.side_files import SideFiles
from fastload.plan import Manifest

# Files that are asked for together.
_AT_ONCE = 32


class SideIndexes:
    """Those of a manifest's shards. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, files: SideFiles, how: str) -> None:
        self._manifest, self._files, self._how = manifest, files, how
        numbers = {info.url: number for number, info in enumerate(files.infos)}
        self._file_of: dict[int, int] = {}
        for number, url in enumerate(url for rows in manifest.objects.rows() for url, *_ in rows) if numbers else ():
            names = side_index.names_beside(url, format_of(url, how))
            file = next((numbers[name] for name in names if name in numbers), None)
            if file is not None:
                self._file_of[number] = file
        self._lock = threading.Lock()
        self._lost: set[int] = set()

    def url_of(self, object_no: int) -> str | None:
        """Where the index of a shard is; None where it has none."""
        file = self._file_of.get(object_no)
        return None if file is None else self._files.infos[file].url

    def counts(self, consumer: Consumer, object_nos: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """How many samples each of these shards holds, -1 where no index says it."""
        found = np.full(len(object_nos), -1, np.int64)
        for first in range(0, len(object_nos), _AT_ONCE):
            numbers = object_nos[first : first + _AT_ONCE].tolist()
            files = [self._file_of[number] for number in numbers if number in self._file_of]
            chunks = self._files.first_chunk[[file for file in files if self._files.infos[file].size]]
            consumer.want(chunks)
            for at, number in enumerate(numbers, first):
                read = self._read(consumer, number)
                if read is not None:
                    found[at] = read if isinstance(read, int) else read.sample_count
            consumer.release(chunks)
        return found

    def index(self, consumer: Consumer, object_no: int) -> UnprovenIndex | None:
        """The index of a shard; None where no file says more than how many samples it holds."""
        read = self._read(consumer, object_no)
        return None if isinstance(read, int) else read

    def _read(self, consumer: Consumer, object_no: int) -> int | UnprovenIndex | None:
        number = self._file_of.get(object_no)
        if number is None or object_no in self._lost:
            return None
        info, shard = self._files.infos[number], self._manifest.objects[object_no]
        try:
            if info.size > side_index.BYTES_MAX:
                raise ShardError(f"{info.url}: {info.size} bytes are above {side_index.BYTES_MAX}")
            data = self._files.read_at(consumer, number)(0, info.size)
            return side_index.read(data, info.url, shard, format_of(shard.url, self._how))
        except (ShardError, StoreError) as error:
            with self._lock:
                self._lost.add(object_no)
            callers.warn(
                f"the index beside {shard.url} cannot be used ({error}): the shard is indexed by reading it. Write the "
                "index again, or remove it",
                RuntimeWarning,
            )
        return None
