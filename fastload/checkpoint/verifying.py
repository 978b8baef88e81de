"""All of a checkpoint, or of a run's, read and compared with its checksums."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastload.checkpoint import finding
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.errors import CheckpointError
from fastload.checkpoint.inventory import rows
from fastload.checkpoint.reading import READ_BYTES
from fastload.checkpoint.records import Object, url_of
from fastload.checkpoint.segments import BLOCK_BYTES, damaged_blocks
from fastload.errors import ObjectMissingError
from fastload.store.types import Store

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Verified:
    """A checkpoint: the bytes of its objects, those of them that have no checksums, and a line for each damage."""

    url: str
    bytes: int
    unchecked_bytes: int
    damaged: list[str]


def verified(place: Place, on_progress: Callable[[int, int], None]) -> list[Verified]:
    """The checkpoint at a place, or else all that are below. An object that several of them hold is read once. Raises
    `ObjectMissingError` where there is none.
    """
    objects: dict[str, Object] = {}  # by URL
    held: list[tuple[str, list[str], list[str]]] = []  # URL, what is wrong with records, objects
    for named in _checkpoints(place):
        url = named.folder.rstrip("/")
        try:
            where, there = finding.at(named)
        except CheckpointError as error:
            held.append((url, [str(error)], []))
            continue
        urls = {url_of(where.folder, one.name): one for one in there.objects}
        objects.update(urls)
        held.append((url, [], list(urls)))
    total = sum(each.size for each in objects.values())
    done = 0
    found: dict[str, list[str]] = {}
    for url, each in objects.items():
        found[url] = _damages(place.store, url, each) if each.sums else []
        done += each.size
        on_progress(done, total)
    return [
        Verified(
            url,
            sum(objects[one].size for one in own),
            sum(objects[one].size for one in own if not objects[one].sums),
            wrong + [line for one in own for line in found[one]],
        )
        for url, wrong, own in held
    ]


def _checkpoints(place: Place) -> list[Place]:
    below = [each for each in rows(place) if each.state in ("committed", "damaged")]
    if below:
        return [Place(place.store, f"{place.folder}{each.name}/" if each.name else place.folder) for each in below]
    return [place]


def _damages(store: Store, url: str, each: Object) -> list[str]:
    """A line for each part of an object that is not what was written."""
    try:
        info = store.head(url)
    except ObjectMissingError as error:
        return [str(error)]
    if info.size != each.size:
        return [f"{url}: it has {info.size} of {each.size} bytes"]

    def blocks(start: int) -> list[int]:
        data = memoryview(bytearray(min(READ_BYTES, each.size - start)))
        for _ in range(2):  # it may have been damaged on its way
            store.read_into(info, start, data)
            wrong = damaged_blocks(each.sums, start, data)
            if not wrong:
                break
        return wrong

    with ThreadPoolExecutor(_AT_ONCE, "fastload-verify") as pool:
        numbers = [number for found in pool.map(blocks, range(0, each.size, READ_BYTES)) for number in found]
    return [
        f"{url}: the {BLOCK_BYTES} bytes from {number * BLOCK_BYTES} on are not what was written" for number in numbers
    ]
