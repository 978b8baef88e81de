"""What to do next about an attempt, and what may be deleted: decisions about what was seen in a store, without I/O.

A save writes under a prefix of its own: its plan first, then segments, then a part record for each rank. Then the
manifest, by one conditional write, makes it the checkpoint: where none was, or in place of the one that the plan names.
Until then readers see the checkpoint before or none, and from then on all of the new one. All that the last step needs
is in the store, so that any process may take it, whatever has become of the one that began.

Nothing in a store says that an attempt may no longer be committed, but for its plan: who commits looks at the manifest,
then for the plan, and then writes. So an attempt goes in two sweeps, and only when nothing has happened to it for a
grace period: the first one deletes the plan, and the next one the rest. A process would have to pause between its look
and its write for as long as that to commit what is no longer whole, and a reader would refuse it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fastload.checkpoint.records import MANIFEST_NAME, Manifest, Plan, part_name, plan_name

# What writes there leave, by name; all else below a checkpoint's URL is not ours to delete.
_CUT_OFF = r"\.(?:tmp-put|fastload-probe)-[0-9a-f]{16}"
_OURS = re.compile(
    rf"([0-9a-f]{{16}})/(?:plan\.json|r[0-9]{{5,7}}\.part|r[0-9]{{5,7}}-[0-9]{{4,7}}\.safetensors|{_CUT_OFF})"
)
_PART = re.compile(r"[0-9a-f]{16}/r([0-9]{5,7})\.part")
_LEFT = re.compile(rf"(?:[0-9a-f]{{16}}/)?{_CUT_OFF}")


class Step(enum.Enum):
    """The next step for an attempt."""

    COMMITTED = "it is the checkpoint"
    COMMIT = "its manifest is to be written"
    WAIT = "ranks have not finished"
    LOST = "another attempt is the checkpoint, or that which it was to replace is gone"
    GONE = "it was given up, and its plan deleted"


@dataclass(frozen=True, slots=True)
class Current:
    """The manifest that is there, None where it is damaged, with its ETag."""

    manifest: Manifest | None
    etag: str


def next_step(attempt: str, current: Current | None, plan: Plan | None, parts: Iterable[int]) -> Step:
    """`current` was seen first, then the attempt's `plan` and the ranks whose `parts` are there."""
    if current is not None and current.manifest is not None and current.manifest.attempt == attempt:
        return Step.COMMITTED
    if plan is None:
        return Step.GONE
    if (current.etag if current is not None else None) != plan.replaces:
        return Step.LOST
    return Step.COMMIT if len({rank for rank in parts if rank < plan.ranks}) == plan.ranks else Step.WAIT


def attempts(names: Iterable[str]) -> set[str]:
    """Those that have left something among the objects of these names, below the checkpoint's URL."""
    return {match[1] for match in map(_OURS.fullmatch, names) if match is not None}


def ranks(names: Iterable[str], plan: Plan) -> list[int]:
    """Those of the plan whose part records are among the objects of these names. What a plan says may be hostile, so
    that it is the names that are gone through.
    """
    of_parts = ((name, match) for name in names if (match := _PART.fullmatch(name)) is not None)
    found = {int(match[1]) for name, match in of_parts if name == part_name(plan.attempt, int(match[1]))}
    return sorted(rank for rank in found if rank < plan.ranks)


def is_ours(name: str) -> bool:
    """Whether an object of this name, below a checkpoint's URL, is a part of checkpoints or attempts."""
    return name == MANIFEST_NAME or _OURS.fullmatch(name) is not None or _LEFT.fullmatch(name) is not None


def is_plan(name: str) -> bool:
    match = _OURS.fullmatch(name)
    return match is not None and name == plan_name(match[1])


def is_of(attempt: str, name: str) -> bool:
    """Whether an object of this name, below the checkpoint's URL, is what the attempt has left."""
    match = _OURS.fullmatch(name)
    return match is not None and match[1] == attempt


def leftovers(
    modified_s: Mapping[str, float],
    committed: str | None,
    grace_s: float,
    now_s: float,
    referred: Collection[str] = (),
) -> Iterator[str]:
    """What may be deleted now of the objects of these names; `modified_s` says when each was written.

    Of an attempt that is not the one `committed`, where neither it nor the manifest has changed for `grace_s` (of one
    that was replaced readers may still be under way): its plan, or where that has gone before, the rest. And what
    writes that were cut off have left. An object of which the time is not known (0) stays, and keeps its attempt. What
    other checkpoints have `referred` to stays as well.
    """
    before_s = now_s - grace_s
    yield from (name for name, at in modified_s.items() if _LEFT.fullmatch(name) and 0 < at < before_s)
    groups: dict[str, list[str]] = {}
    for name in modified_s:
        if (match := _OURS.fullmatch(name)) is not None and match[1] != committed:
            groups.setdefault(match[1], []).append(name)
    for attempt, group in groups.items():
        times = [modified_s[name] for name in group]
        if min(times) > 0 and max(*times, modified_s.get(MANIFEST_NAME, 0.0)) < before_s:
            plan = plan_name(attempt)
            rest = (name for name in group if not _LEFT.fullmatch(name) and name not in referred)
            yield from [plan] if plan in group else rest
