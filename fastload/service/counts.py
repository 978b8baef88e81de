"""How many samples objects hold, by object id: all that most questions about indexes are about.

A count is a fact of one version of one object, so it is never wrong later, and stays true where the index has gone. All
of them lie in one blob beside the indexes, since a hundred thousand files take seconds to open, and minutes on a disk
that has just been mounted. What a crash kept out of the blob is found again in the heads of the indexes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

_RECORD = np.dtype([("object_id", "V16"), ("count", "<i8")])
# Some 200 MB of memory, 24 MB on disk.
_COUNTS_MAX = 1 << 20


class SampleCounts:
    """Those that were added last, at most about a million. Used by the loop's thread only."""

    NAME = "counts"

    def __init__(self) -> None:
        self._by_id: dict[bytes, int] = {}
        self.is_loaded = False
        self.is_changed = False

    def of(self, object_ids: Sequence[bytes]) -> list[int]:
        """The counts of these, -1 where there is none."""
        return [self._by_id.get(object_id, -1) for object_id in object_ids]

    def add(self, object_id: bytes, count: int) -> None:
        """Learn a count; -1 is none."""
        if count < 0 or self._by_id.get(object_id) == count:
            return
        self._by_id[object_id] = count
        self.is_changed = True
        if len(self._by_id) > _COUNTS_MAX:
            for oldest in list(islice(self._by_id, _COUNTS_MAX // 16)):
                del self._by_id[oldest]

    def load(self, data: bytes) -> None:
        """Add what `to_bytes` gave; what was learnt since counts more."""
        records = np.frombuffer(data, _RECORD, len(data) // _RECORD.itemsize)
        stored = zip(records["object_id"].tolist(), records["count"].tolist(), strict=True)
        self._by_id = {object_id: count for object_id, count in stored if count >= 0} | self._by_id
        self.is_loaded = True

    def to_bytes(self) -> bytes:
        """All of them, 24 bytes each: the id, and the count in little-endian. They count as written down."""
        records = np.empty(len(self._by_id), _RECORD)
        records["object_id"] = np.frombuffer(b"".join(self._by_id), "V16")
        records["count"] = np.fromiter(self._by_id.values(), np.int64, len(self._by_id))
        self.is_changed = False
        return records.tobytes()

    @staticmethod
    def added(stored: bytes, more: bytes) -> bytes:
        """What `to_bytes` gives where `stored` was loaded and `more` learnt since; the last of a count counts."""
        return (stored[: len(stored) // _RECORD.itemsize * _RECORD.itemsize] + more)[-_COUNTS_MAX * _RECORD.itemsize :]
