"""What a cache directory holds, from its files alone: whether a service runs or not, and changing nothing.

The chunk files say what is there, the catalog what that is. A catalog that cannot be read costs the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastload import snapshot
from fastload.cache.catalog import UNKNOWN, Catalog, CatalogError, CatalogObject, CatalogPin
from fastload.cache.disk import take_inventory
from fastload.cache.key import ChunkKey


@dataclass(slots=True)
class Held:
    """One version of one object that is on disk, in part or whole, or that a pin names."""

    object_id: str  # in hex
    url: str = ""  # "": not known
    size: int = -1  # -1: not known
    etag: str | None = None
    data_set: str = UNKNOWN
    pins: tuple[str, ...] = ()
    chunk_count: int = 0  # on disk
    disk_bytes: int = 0  # allocated
    used_at: float = 0.0  # since 1970; 0: not known


@dataclass(slots=True)
class Contents:
    """All of a directory. `trouble`: why names and pins are missing, or "" where they are not."""

    held: list[Held]
    keys: list[ChunkKey]
    cut: list[ChunkKey]  # whose files have a size that no chunk has, and hold nothing
    trouble: str = ""

    def called(self, what: Sequence[str]) -> list[Held]:
        """What is called so, by URL, by a prefix that ends in a slash, by data set or by pin; all of it for nothing."""
        if not what:
            return self.held
        names, prefixes = set(what), tuple(name for name in what if name.endswith("/"))
        return [
            each
            for each in self.held
            if each.url in names
            or each.data_set in names
            or not names.isdisjoint(each.pins)
            or (prefixes and each.url.startswith(prefixes))
        ]


def read_contents(root: Path, directory: Path) -> Contents:
    """What is in the directory, which is reached at `root`, now: by URL, and last what is not known."""
    found = take_inventory(root, sweep=False)
    objects, pins, trouble = _read_catalog(root, directory)
    held: dict[bytes, Held] = {}
    keys: list[ChunkKey] = []
    for _, name, took in found.held:
        if isinstance(name, ChunkKey):
            keys.append(name)
            each = held.get(name.object_id)
            if each is None:
                each = held[name.object_id] = Held(name.object_id.hex())
            each.chunk_count += 1
            each.disk_bytes += took
    for pin in pins:
        for object_id, size in pin.sizes.items():
            each = held.setdefault(object_id, Held(object_id.hex()))
            each.size = size
            each.pins += (pin.name,)
            each.data_set = each.pins[0]
    for known in objects:
        if known.object_id in held:
            _describe(held[known.object_id], known)
    if found.error is not None:
        trouble = f"{directory} could not be listed in full: {found.error}"
    return Contents(
        sorted(held.values(), key=lambda each: (not each.url, each.url, each.object_id)), keys, found.cut, trouble
    )


def _describe(each: Held, known: CatalogObject) -> None:
    each.url, each.size, each.etag, each.used_at = known.url, known.size, known.etag, known.used_at
    if not each.pins:
        each.data_set = known.set_name


def _read_catalog(root: Path, directory: Path) -> tuple[list[CatalogObject], list[CatalogPin], str]:
    catalog = Catalog(root, read_only=True)
    if not catalog.exists():
        return [], [], ""
    try:
        catalog.open()
        return catalog.objects(), catalog.pins(), ""
    except CatalogError as error:
        return [], [], f"the catalog of {directory} cannot be read ({error}): data sets and pins are not shown"
    finally:
        catalog.close()


def by_data_set(held: Iterable[Held]) -> list[snapshot.DataSet]:
    """The same summed up as the service shows it, with what files take on disk; nothing is in RAM."""
    rows: dict[str, list[Held]] = {}
    for each in held:
        rows.setdefault(each.data_set, []).append(each)
    sums = [
        snapshot.DataSet(
            name=name,
            object_count=len(members),
            byte_count=sum(max(0, each.size) for each in members),
            ram_bytes=0,
            disk_bytes=sum(each.disk_bytes for each in members),
            pinned_bytes=sum(each.size for each in members if each.pins),
            last_use_at=max(each.used_at for each in members),
        )
        for name, members in rows.items()
    ]
    return sorted(sums, key=lambda row: (-row.disk_bytes, row.name))
