"""What checkpoints lie below a URL, committed and not, as one listing and the manifests in it say; and whether all of
them is what was written, as their checksums say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from fastload.checkpoint import commit as decisions
from fastload.checkpoint import finding
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.reading import READ_BYTES
from fastload.checkpoint.records import MANIFEST_NAME, Manifest, Object, plan_name, url_of
from fastload.checkpoint.retention import number_of
from fastload.checkpoint.segments import BLOCK_BYTES, damaged_blocks
from fastload.errors import CheckpointError, ObjectMissingError
from fastload.store.types import ObjectInfo, Store

_AT_ONCE = 16
_OURS = re.compile(r"(?:(.*)/)?(manifest\.json|[0-9a-f]{16}/[^/]+)")


@dataclass(frozen=True, slots=True)
class Row:
    """A folder with a checkpoint, or what attempts to save one have left there.

    `name` is below the URL, "" for the URL itself. `bytes` are of the committed attempt; `other_bytes` of attempts that
    are under way, have failed, or were replaced, and of segments that only other steps refer to. `at_s` is when it was
    committed, or else when something was written last.
    """

    name: str
    state: Literal["committed", "damaged", "uncommitted", "remains"]
    attempts: int  # that are not committed
    ranks: int
    bytes: int
    other_bytes: int
    at_s: float
    metric: float | None


def rows(place: Place) -> list[Row]:
    """In the order of their names, numbers as numbers."""
    groups: dict[str, dict[str, ObjectInfo]] = {}
    for name, info in place.names().items():
        if (match := _OURS.fullmatch(name)) is not None:
            groups.setdefault(match[1] or "", {})[match[2]] = info
    ours = {name: group for name, group in groups.items() if MANIFEST_NAME in group or decisions.attempts(group)}

    def row(name: str) -> Row:
        folder = Place(place.store, f"{place.folder}{name}/" if name else place.folder)
        return _row(name, ours[name], _manifest(folder) if MANIFEST_NAME in ours[name] else None)

    with ThreadPoolExecutor(_AT_ONCE, "fastload-checkpoints") as pool:
        return sorted(pool.map(row, ours), key=lambda each: _in_order(each.name))


def _manifest(place: Place) -> Manifest | None:
    try:
        data, info = place.read(MANIFEST_NAME)
        manifest = Manifest.decode(data, info.url)
    except (CheckpointError, ObjectMissingError):
        return None
    return manifest


def _row(name: str, group: dict[str, ObjectInfo], manifest: Manifest | None) -> Row:
    others = decisions.attempts(group) - ({manifest.attempt} if manifest is not None else set())
    own = {each for each in group if manifest is not None and each.startswith(manifest.attempt + "/")}
    if manifest is not None:
        state: Literal["committed", "damaged", "uncommitted", "remains"] = "committed"
    elif MANIFEST_NAME in group:
        state = "damaged"
    else:
        state = "uncommitted" if any(plan_name(attempt) in group for attempt in others) else "remains"
    times = [group[MANIFEST_NAME]] if MANIFEST_NAME in group else group.values()
    return Row(
        name,
        state,
        len(others),
        len(manifest.parts) if manifest is not None else 0,
        sum(group[each].size for each in own),
        sum(info.size for each, info in group.items() if each not in own and each != MANIFEST_NAME),
        max(info.mtime_ns for info in times) / 1e9,
        manifest.metric if manifest is not None else None,
    )


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    steps = [(number_of(part), part) for part in name.split("/")]
    return [(step is None, step or 0, part) for step, part in steps]


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
