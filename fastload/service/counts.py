"""How many samples objects hold, by object id: all that most questions about indexes are about.

A count is a fact of one version of one object, so it is never wrong later, and stays true where the index has gone. All
of them lie in one blob beside the indexes, since a hundred thousand files take seconds to open, and minutes on a disk
that has just been mounted. What a crash kept out of the blob is found again in the heads of the indexes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastload.service import bounded

_RECORD = np.dtype([("object_id", "V16"), ("count", "<i8")])
# Some 200 MB of memory, 24 MB on disk.
_COUNTS_MAX = 1 << 20


class SampleCounts:
    """Those that were added last, at most about a million. Used by the loop's thread only."""

    NAME = "counts"

    def __init__(self) -> None:
        self._by_id: dict[bytes, int] = {}
        self._news: dict[bytes, int] = {}  # of these, what has yet to be written down
        self.is_loaded = False

    @property
    def is_changed(self) -> bool:
        """Whether something has yet to be written down."""
        return bool(self._news)

    def of(self, object_ids: Sequence[bytes]) -> list[int]:
        """The counts of these, -1 where there is none."""
        return [self._by_id.get(object_id, -1) for object_id in object_ids]

    def add(self, object_id: bytes, count: int) -> None:
        """Learn a count; -1 is none."""
        if count < 0 or self._by_id.get(object_id) == count:
            return
        for counts in (self._by_id, self._news):
            bounded.put(counts, object_id, count, _COUNTS_MAX)

    def load(self, data: bytes) -> None:
        """Add what `to_bytes` gave; what was learnt since counts more."""
        records = np.frombuffer(data, _RECORD, len(data) // _RECORD.itemsize)
        stored = zip(records["object_id"].tolist(), records["count"].tolist(), strict=True)
        self._by_id = {object_id: count for object_id, count in stored if count >= 0} | self._by_id
        self.is_loaded = True

    def to_bytes(self) -> bytes:
        """All of them, 24 bytes each: the id, and the count in little-endian. They count as written down."""
        self._news = {}
        return _to_bytes(self._by_id)

    def take_news(self) -> bytes:
        """The same of those that have yet to be written down."""
        news, self._news = self._news, {}
        return _to_bytes(news)

    @staticmethod
    def added(stored: bytes, more: bytes) -> bytes:
        """What `to_bytes` gives where `stored` was loaded and `more` are the news since; the last of a count counts."""
        return (stored[: len(stored) // _RECORD.itemsize * _RECORD.itemsize] + more)[-_COUNTS_MAX * _RECORD.itemsize :]


def _to_bytes(counts: dict[bytes, int]) -> bytes:
    records = np.empty(len(counts), _RECORD)
    records["object_id"] = np.frombuffer(b"".join(counts), "V16")
    records["count"] = np.fromiter(counts.values(), np.int64, len(counts))
    return records.tobytes()
