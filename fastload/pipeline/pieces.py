"""Where the bytes of a piece of an object lie: in its own chunks, and what lies behind these in those of the pieces
that follow it. Few samples go on there (see `formats.pieces`), so where is found out one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastload.pipeline.windows import RecordParts, Values
from fastload.plan import Manifest

Ints = npt.NDArray[np.int64]


class PiecePlaces:
    """The pieces of a manifest that has some. Immutable."""

    def __init__(self, manifest: Manifest, first_chunk: Ints, chunk_bytes: int) -> None:
        assert manifest.objects.pieces is not None, "a manifest with pieces"
        self._starts, self._sizes = manifest.objects.pieces[0], manifest.sizes
        self._first_chunk, self._chunk_bytes = first_chunk, chunk_bytes

    def runs(self, object_no: int, offset: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Where these bytes of a piece lie: runs of pieces, each by the piece's first chunk, an offset and a size."""
        while size > 0:
            left = int(self._sizes[object_no]) - offset
            if left > 0:
                run = min(size, left)
                yield int(self._first_chunk[object_no]), offset, run
                offset, size = offset + run, size - run
            if size > 0:
                offset -= int(self._starts[object_no + 1] - self._starts[object_no])
                object_no += 1

    def chunks_beyond(self, object_no: int, reach: int) -> list[int]:
        """The chunks behind a piece that it reaches into."""
        size, chunk_bytes = int(self._sizes[object_no]), self._chunk_bytes
        return [
            first_chunk + number
            for first_chunk, offset, run in self.runs(object_no, size, reach - size)
            for number in range(offset // chunk_bytes, (offset + run - 1) // chunk_bytes + 1)
        ]

    def continued(self, parts: RecordParts, object_nos: npt.NDArray[np.int32]) -> RecordParts:
        """The parts of records of these objects, where those that go on behind their piece are in several."""
        values, starts = parts.values, parts.part_start
        numbers = object_nos if starts is None else np.repeat(object_nos, np.diff(starts))
        offset, size = values.offset[0], values.size[0]
        beyond = np.flatnonzero(offset + size > self._sizes[numbers]).tolist()
        if not beyond:
            return parts
        runs = {at: list(self.runs(int(numbers[at]), int(offset[at]), int(size[at]))) for at in beyond}
        counts = np.ones(len(numbers), np.int64)
        counts[beyond] = [len(runs[at]) for at in beyond]
        first = np.concatenate([[0], np.cumsum(counts)])
        taken = Values(*(np.repeat(each, counts, axis=1) for each in (values.first_chunk, values.offset, values.size)))
        tag = np.repeat(np.zeros(len(numbers), np.int64) if parts.tag is None else parts.tag, counts)
        for at, some in runs.items():
            place = slice(first[at], first[at + 1])
            taken.first_chunk[0, place], taken.offset[0, place], taken.size[0, place] = np.transpose(some)
            tag[first[at] + 1 : first[at + 1]] &= ~1  # what goes on does not begin anything
        return RecordParts(taken, tag, first[np.arange(len(object_nos) + 1) if starts is None else starts])
