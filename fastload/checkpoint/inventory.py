"""What checkpoints lie below a URL, committed and not, as one listing and the manifests in it say."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from fastload.checkpoint import commit as decisions
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.errors import CheckpointError
from fastload.checkpoint.pruning import number_of
from fastload.checkpoint.records import MANIFEST_NAME, Manifest, plan_name
from fastload.errors import ObjectMissingError
from fastload.store.types import ObjectInfo

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
