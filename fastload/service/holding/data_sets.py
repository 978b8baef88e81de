"""How much of each data set is where: counted as chunks come and go, so that looking costs nothing.

An object is of the data set that a pin names, or that a consumer gave it a name for (`Label`), or else of its folder in
the store. What lies on disk and is known by nothing but a hash is of the data set `UNKNOWN`; its chunks count as whole
ones. An object is forgotten when nothing of it is held and no pin names it.

There are at most `ROWS_MAX` rows for folders; what comes beyond is counted in one row, `OTHERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from fastload import snapshot
from fastload.cache import ChunkKey
from fastload.cache.catalog import UNKNOWN

OTHERS = "(others)"
ROWS_MAX = 300


class _Row:
    """One data set."""

    __slots__ = ("byte_count", "disk_bytes", "is_given", "last_use_at", "name", "object_count", "pinned", "ram_bytes")

    def __init__(self, name: str, *, is_given: bool) -> None:
        self.name, self.is_given = name, is_given
        self.object_count = self.byte_count = self.ram_bytes = self.disk_bytes = self.pinned = 0
        self.last_use_at = 0.0

    def add(self, each: _Object, times: int) -> None:
        """Count an object in, or out."""
        self.object_count += times
        self.byte_count += times * max(0, each.size)
        self.ram_bytes += times * each.ram_bytes
        self.disk_bytes += times * each.disk_bytes
        self.pinned += times * each.size if each.is_pinned else 0


class _Object:
    """An object of which something is held, or that is pinned."""

    __slots__ = ("disk_bytes", "home", "is_given", "is_pinned", "ram_bytes", "row", "size")

    def __init__(self, row: _Row, size: int) -> None:
        self.row, self.size = row, size  # -1: not known
        self.home, self.is_given = "", False  # its data set where no pin names it, and whether it was given that name
        self.ram_bytes = self.disk_bytes = 0
        self.is_pinned = False


class DataSets:
    """See the module's text. Changed by the loop's thread only."""

    def __init__(self, chunk_bytes: int, indexes_of: Callable[[bytes], Collection[int]]) -> None:
        """`indexes_of(object_id)`: which chunks of an object are on disk."""
        self._chunk_bytes, self._indexes_of = chunk_bytes, indexes_of
        self._objects: dict[bytes, _Object] = {}
        self._rows: dict[str, _Row] = {}
        self._homes: dict[str, str] = {}  # one string for the many objects of a folder
        self.pinned_disk_bytes = 0  # that pinned objects hold on disk

    def __contains__(self, object_id: bytes) -> bool:
        """Whether anything is known of the object but a hash."""
        found = self._objects.get(object_id)
        return found is not None and found.size >= 0

    # What is known

    def learn(self, object_id: bytes, size: int, home: str, *, is_given: bool = False, pin: str | None = None) -> None:
        """What an object is; `pin` names it, if any does. `home`: its data set otherwise."""
        each = self._objects.get(object_id)
        if each is None:
            each = self._objects[object_id] = _Object(self._row(UNKNOWN, True), -1)
        else:
            self._count(each, -1)
        if each.size < 0:
            each.size = size
            each.disk_bytes = sum(self._length(each, index) for index in self._indexes_of(object_id))
        if is_given or not each.is_given:
            each.home, each.is_given = self._homes.setdefault(home, home), is_given
        self._place(each, pin)

    def pin(self, object_id: bytes, name: str | None) -> None:
        """The pin of this name names the object, or none does any more."""
        each = self._objects.get(object_id)
        if each is None:
            return
        self._count(each, -1)
        self._place(each, name)
        self._forget_if_empty(object_id, each)

    def _place(self, each: _Object, pin: str | None) -> None:
        each.is_pinned = pin is not None
        before = each.row
        each.row = self._row(pin or each.home or UNKNOWN, pin is not None or each.is_given or not each.home)
        each.row.last_use_at = max(each.row.last_use_at, before.last_use_at if before.name != UNKNOWN else 0.0)
        self._count(each, 1)
        self._drop_if_empty(before)

    def use(self, object_id: bytes, at: float) -> None:
        """The object was used at that time."""
        each = self._objects.get(object_id)
        if each is not None and at > each.row.last_use_at:
            each.row.last_use_at = at

    # What comes and goes

    def on_disk(self, key: ChunkKey, times: int) -> None:
        """A chunk is on disk (1), or is not any more (-1)."""
        each = self._objects.get(key.object_id)
        if each is None:
            each = self._objects[key.object_id] = _Object(self._row(UNKNOWN, True), -1)
            self._count(each, 1)
        change = times * self._length(each, key.index)
        each.disk_bytes += change
        each.row.disk_bytes += change
        if each.is_pinned:
            self.pinned_disk_bytes += change
        self._forget_if_empty(key.object_id, each)

    def in_ram(self, object_id: bytes, change: int) -> None:
        """So many bytes more of a known object are in RAM."""
        each = self._objects[object_id]
        each.ram_bytes += change
        each.row.ram_bytes += change
        self._forget_if_empty(object_id, each)

    def _length(self, each: _Object, index: int) -> int:
        if each.size < 0:
            return self._chunk_bytes
        return max(0, min(self._chunk_bytes, each.size - index * self._chunk_bytes))

    def _count(self, each: _Object, times: int) -> None:
        each.row.add(each, times)
        if each.is_pinned:
            self.pinned_disk_bytes += times * each.disk_bytes

    def _forget_if_empty(self, object_id: bytes, each: _Object) -> None:
        if each.is_pinned or each.ram_bytes or each.disk_bytes or self._indexes_of(object_id):
            return
        del self._objects[object_id]
        self._count(each, -1)
        self._drop_if_empty(each.row)

    def _row(self, name: str, is_given: bool) -> _Row:
        row = self._rows.get(name)
        if row is None and not is_given and len(self._rows) >= ROWS_MAX:
            name = OTHERS
            row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = _Row(name, is_given=is_given)
        return row

    def _drop_if_empty(self, row: _Row) -> None:
        if not row.object_count and self._rows.get(row.name) is row:
            del self._rows[row.name]
            self._homes.pop(row.name, None)

    # What is shown

    def rows(self) -> list[snapshot.DataSet]:
        """All data sets, those first of which most is held."""
        rows = sorted(self._rows.values(), key=lambda row: (-row.disk_bytes - row.ram_bytes, row.name))
        return [
            snapshot.DataSet(
                name=row.name,
                object_count=row.object_count,
                byte_count=row.byte_count,
                ram_bytes=row.ram_bytes,
                disk_bytes=row.disk_bytes,
                pinned_bytes=row.pinned,
                last_use_at=row.last_use_at,
            )
            for row in rows
        ]
