"""Steps side by side below one URL: which are there, which are kept (`expendable`), and how the others go.

A step is a folder that is called by its number, and there is no list of them besides: what a listing shows of manifests
is what is committed. With `dedup` a step refers to objects of others, which therefore outlive their own step.

Two things must not happen: that an attempt is committed again whose segments go, and that a save refers to what is
deleted meanwhile. So the plans of a step that goes are deleted first, its manifest then, and segments last, of which
those stay that a committed step refers to, or that are of a step that the plan of an attempt under way names. A save
with references writes its plan first, and then looks whether the step that it refers to is unchanged; a prune deletes
the manifest first, and then lists. So one of the two sees the other.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from fastload.checkpoint import attempts
from fastload.checkpoint import commit as decisions
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.records import MANIFEST_NAME, Manifest, Plan, part_name, plan_name
from fastload.errors import CheckpointError, ConfigError, ObjectChangedError, ObjectMissingError
from fastload.store.types import ObjectInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What a run keeps; a step stays that any of these names.

    The newest `last` steps; those that `every` divides; and the `best` by their metric, of which the lowest, or the
    highest, `best_is` good. 0: none for that reason. The newest step, and the one that was saved last, always stay.
    """

    last: int = 1
    every: int = 0
    best: int = 0
    best_is: Literal["lowest", "highest"] = "lowest"

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 0), ("best", 0)):
            count = getattr(self, name)
            if type(count) is not int or count < least:
                why = ", since the newest step always stays" if least else ""
                raise ConfigError(f"Keep({name}={count!r}): give a whole number of {least} or more{why}")
        if self.best_is not in ("lowest", "highest"):
            raise ConfigError(f"Keep(best_is={self.best_is!r}): write lowest or highest")


@dataclass(frozen=True, slots=True)
class Committed:
    """A step that is one: when it was committed, and its metric."""

    step: int
    at_s: float
    metric: float | None = None


def expendable(steps: Iterable[Committed], keep: Keep, under_way: Collection[int] = ()) -> list[int]:
    """The steps that may go, in order. Those `under_way` are being saved anew, or in use, and stay."""
    in_order = sorted(steps, key=lambda each: each.step)
    if not in_order:
        return []
    sign = 1 if keep.best_is == "lowest" else -1
    # Of several that are as good the newest.
    by_metric = sorted(
        (each for each in in_order if each.metric is not None),
        key=lambda each: (sign * each.metric, -each.step),  # type: ignore[operator]
    )
    kept = {each.step for each in (*in_order[-keep.last :], *by_metric[: keep.best])}
    # After a run has gone back to an earlier step, that is not the one with the highest number.
    kept.add(max(in_order, key=lambda each: (each.at_s, each.step)).step)
    return [
        each.step
        for each in in_order
        if each.step not in kept and each.step not in under_way and not (keep.every and each.step % keep.every == 0)
    ]


_log = logging.getLogger("fastload.checkpoint")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_AT_ONCE = 16
_LOOKS = 20
GRACE_S = 86400.0
# What lies in the folder of each step, by its name below that.
Folders = dict[int, dict[str, ObjectInfo]]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Steps that are gone, or would be, and how much was deleted with them, or was left over by others."""

    steps: list[int]
    objects: int = 0
    bytes: int = 0

    def __add__(self, other: Pruned) -> Pruned:
        return Pruned(self.steps + other.steps, self.objects + other.objects, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Known:
    """What was read before, and cannot have changed: manifests by their ETag, and what attempts refer to."""

    manifests: dict[str, Manifest] = field(default_factory=dict)
    referred: dict[str, frozenset[str]] = field(default_factory=dict)


@dataclass(slots=True)
class _Seen:
    """What a run holds, as one listing shows it and the records that it lists say."""

    folders: Folders
    manifests: dict[int, Manifest] = field(default_factory=dict)
    plans: dict[int, list[Plan]] = field(default_factory=dict)  # of attempts that are not committed

    def held(self) -> set[int]:
        """Steps that an attempt under way may refer to."""
        names = (name for plans in self.plans.values() for plan in plans for name in plan.refers)
        return {step for step in map(number_of, names) if step is not None}


def number_of(name: str) -> int | None:
    """The step whose folder is called so; None where it is of none."""
    return int(name) if _NUMBER.fullmatch(name) else None


def folder_of(run: Place, step: int) -> Place:
    return Place(run.store, f"{run.folder}{step}/")


def run_of(place: Place) -> tuple[Place, int | None]:
    """The run of which the checkpoint at a place would be a step, and which; None: its name is no number."""
    above, _, name = place.folder.rstrip("/").rpartition("/")
    return Place(place.store, above + "/"), number_of(name)


def folders(run: Place) -> Folders:
    """By one listing of all that lies below the run's URL."""
    found: Folders = {}
    for name, info in run.names().items():
        above, _, below = name.partition("/")
        if (step := number_of(above)) is not None and below:
            found.setdefault(step, {})[below] = info
    return found


def steps(run: Place) -> list[int]:
    """Those that are committed, in order."""
    return sorted(step for step, names in folders(run).items() if MANIFEST_NAME in names)


def begun(run: Place) -> list[int]:
    """Steps behind the newest that is committed, of which attempts have been begun and not given up."""
    there = folders(run)
    newest = max((step for step, names in there.items() if MANIFEST_NAME in names), default=-1)
    return sorted(step for step, names in there.items() if step > newest and any(map(decisions.is_plan, names)))


def prune(
    run: Place,
    keep: Keep | None,
    *,
    now_s: float,
    grace_s: float = GRACE_S,
    steps: Collection[int] = (),
    is_trial: bool = False,
    known: Known | None = None,
    at_hand: int | None = None,
) -> Pruned:
    """Delete the steps that `keep` lets go, and these `steps` whatever it says of them; and what attempts have left for
    `grace_s`. An attempt that has all it needs is committed. With `is_trial` nothing changes.

    `at_hand` is a step that stays, since the caller has just saved or loaded it: stores date objects by the second, so
    that they may not say which one was saved last. `known` remembers what was read, from one call to the next.
    """
    known = known or Known()
    seen = _look(run, known)
    if not is_trial and _repair(run, seen):
        seen = _look(run, known)
    doomed = sorted({*steps, *_let_go(run, seen, keep, now_s - grace_s, at_hand)} & seen.folders.keys())
    if is_trial:
        seen, stays = _look_again(run, seen, known)
        going: list[int] = []
        for step, names in seen.folders.items():
            left: Iterable[str] = _leftovers(seen, step, stays, (), grace_s, now_s)
            if step in doomed and step not in seen.held():
                left = filter(decisions.is_ours, names)
            going += (names[name].size for name in left if f"{step}/{name}" not in stays)
        return Pruned(doomed, len(going), sum(going))
    return _delete(run, seen, doomed, grace_s, now_s, known)


def sweep(place: Place, *, now_s: float, grace_s: float = GRACE_S, is_trial: bool = False) -> Pruned:
    """Delete what attempts have left for `grace_s` in the folder of one checkpoint, but for what others of its run
    refer to. Nothing, where the place is a run itself. With `is_trial` nothing changes.
    """
    names = place.names()
    if not any(map(decisions.is_ours, names)):
        return Pruned([])
    run, step = run_of(place)
    referred: set[str] = set()
    if step is not None:
        seen, stays = _look_again(run, None, Known())
        referred = {each.partition("/")[2] for each in stays if each.startswith(f"{step}/")}
        if step in seen.held():  # perhaps by the plans of attempts that were to replace it, which go first
            referred = {each for each in names if not decisions.is_plan(each)}
    gone = attempts.sweep(place, grace_s, now_s, referred, is_trial=is_trial)
    return Pruned([], len(gone), sum(info.size for info in gone.values()))


def remove(place: Place) -> Pruned:
    """Delete one checkpoint, but for what others of its run refer to, and what attempts have left in its folder. Raises
    `ObjectMissingError` where there is none.
    """
    run, step = run_of(place)
    if step is not None:
        seen = _look(run, known := Known())
        if any(map(decisions.is_ours, seen.folders.get(step, ()))):
            return _delete(run, seen, [step], math.inf, 0.0, known)
    else:
        names = {each: info for each, info in place.names().items() if decisions.is_ours(each)}
        if names:
            for each in sorted(names, key=_deletion_order):
                place.store.delete(place.folder + each)
            return Pruned([], len(names), sum(info.size for info in names.values()))
    raise ObjectMissingError(f"{place.folder}: no checkpoint is here ({MANIFEST_NAME}); check its name")


def _delete(run: Place, seen: _Seen, doomed: list[int], grace_s: float, now_s: float, known: Known) -> Pruned:
    ended: dict[int, set[str]] = {}
    count = size = 0
    for step in doomed:
        names, folder = seen.folders[step], folder_of(run, step).folder
        ended[step] = decisions.attempts(names)
        first = sorted(filter(lambda name: _deletion_order(name) < 2, names), key=_deletion_order)
        for name in first:
            run.store.delete(folder + name)
        count, size = count + len(first), size + sum(names[name].size for name in first)
    seen, stays = _look_again(run, None if doomed else seen, known)
    for step, names in seen.folders.items():
        folder = folder_of(run, step).folder
        going = _leftovers(seen, step, stays, ended.get(step, set()), grace_s, now_s)
        with ThreadPoolExecutor(_AT_ONCE, "fastload-prune") as pool:
            for _ in pool.map(run.store.delete, [folder + name for name in going]):
                pass
        if going == names.keys():  # of a file system also the folder, which goes with a file that was right in it
            run.store.delete(folder + MANIFEST_NAME + ".gone")
        count, size = count + len(going), size + sum(names[name].size for name in going)
    return Pruned(doomed, count, size)


def _deletion_order(name: str) -> int:
    """Plans, so that nothing is committed any more; the manifest, so that it is read no more; the rest."""
    return 0 if decisions.is_plan(name) else 1 if name == MANIFEST_NAME else 2


def _look_again(run: Place, seen: _Seen | None, known: Known) -> tuple[_Seen, set[str]]:
    """What is there, unless that was `seen` already, and what of it committed steps refer to."""
    for _ in range(_LOOKS):
        seen = seen or _look(run, known)
        try:
            return seen, _referred(run, seen, known.referred)
        except ObjectMissingError:  # a step was replaced or went since it was listed
            seen = None
    raise CheckpointError(f"{run.folder} changes each time that it is looked at; prune it again")


def _has_its_parts(run: Place, step: int, manifest: Manifest, names: dict[str, ObjectInfo]) -> bool:
    """A step that has lost some does not count: others would go in favour of one that cannot be loaded."""
    sizes = {part_name(manifest.attempt, rank): size for rank, (size, _) in enumerate(manifest.parts)}
    lost = [name for name, size in sizes.items() if name not in names or names[name].size != size]
    if lost:
        _log.warning("%s%s is damaged, and does not count: it has lost %s", run.folder, step, lost[0])
    return not lost


def _let_go(run: Place, seen: _Seen, keep: Keep | None, before_s: float, at_hand: int | None) -> list[int]:
    if keep is None:
        return []
    committed = [
        Committed(step, seen.folders[step][MANIFEST_NAME].mtime_ns / 1e9, manifest.metric)
        for step, manifest in seen.manifests.items()
        if _has_its_parts(run, step, manifest, seen.folders[step])
    ]
    stays = {step for step, plans in seen.plans.items() if any(plan.began_s > before_s for plan in plans)}
    return expendable(committed, keep, stays if at_hand is None else {*stays, at_hand})


def _leftovers(
    seen: _Seen, step: int, stays: Collection[str], ended: Collection[str], grace_s: float, now_s: float
) -> set[str]:
    """What goes of a step's folder; the attempts that `ended` go at once, but for what `stays`. Of one that an attempt
    refers to only plans go, since it may be its own that do.
    """
    names, manifest = seen.folders[step], seen.manifests.get(step)
    if MANIFEST_NAME in names and manifest is None:
        return set()  # it is damaged, and does not say what it needs
    kept = {name.partition("/")[2] for name in stays if name.startswith(f"{step}/")}
    committed = manifest.attempt if manifest is not None else None
    there = {name: info.mtime_ns / 1e9 for name, info in names.items()}
    at_once = {name for name in names for attempt in ended if decisions.is_of(attempt, name) and attempt != committed}
    going = (at_once - kept) | set(decisions.leftovers(there, committed, grace_s, now_s, kept))
    return set(filter(decisions.is_plan, going)) if going and step in seen.held() else going


def _look(run: Place, known: Known) -> _Seen:
    """Manifests and plans that change or go meanwhile are looked at again, with all that is listed."""
    for look in range(_LOOKS):
        seen = _Seen(folders(run))
        try:
            _read_manifests(run, seen, known.manifests)
            _read_plans(run, seen)
        except (ObjectMissingError, ObjectChangedError):
            if look == _LOOKS - 1:
                raise
            continue
        return seen
    raise AssertionError


def _read_manifests(run: Place, seen: _Seen, known: dict[str, Manifest]) -> None:
    def read(step: int) -> Manifest | None:
        etag = seen.folders[step][MANIFEST_NAME].etag
        if etag is not None and etag in known:
            return known[etag]
        data, info = folder_of(run, step).read(MANIFEST_NAME)
        if info.etag != etag:
            raise ObjectChangedError(f"{info.url}: it was replaced since it was listed")
        try:
            manifest = Manifest.decode(data, info.url)
        except CheckpointError as error:
            _log.warning("%s", error)
            return None
        if etag is not None:
            known[etag] = manifest
        return manifest

    committed = [step for step, names in seen.folders.items() if MANIFEST_NAME in names]
    with ThreadPoolExecutor(_AT_ONCE, "fastload-prune") as pool:
        for step, manifest in zip(committed, pool.map(read, committed), strict=True):
            if manifest is not None:
                seen.manifests[step] = manifest


def _read_plans(run: Place, seen: _Seen) -> None:
    for step, names in seen.folders.items():
        manifest = seen.manifests.get(step)
        for attempt in decisions.attempts(names):
            if plan_name(attempt) in names and (manifest is None or manifest.attempt != attempt):
                data, info = folder_of(run, step).read(plan_name(attempt))
                try:
                    seen.plans.setdefault(step, []).append(Plan.decode(data, info.url))
                except CheckpointError as error:  # which cannot be committed either
                    _log.warning("%s", error)


def _repair(run: Place, seen: _Seen) -> bool:
    """Commit attempts that seem to have all they need; whether there were such."""
    begun = {step for step, plans in seen.plans.items() for plan in plans if _has_parts(seen.folders[step], plan)}
    committed = [attempts.repair(folder_of(run, step)) for step in sorted(begun)]
    return any(attempt is not None for attempt in committed)


def _has_parts(names: Collection[str], plan: Plan) -> bool:
    return len(decisions.ranks(names, plan)) == plan.ranks


def _referred(run: Place, seen: _Seen, known: dict[str, frozenset[str]]) -> set[str]:
    """What committed steps refer to, by its name below the run's URL. Raises `ObjectMissingError` for one that has gone
    since it was listed.
    """
    stays: set[str] = set()
    for step, manifest in seen.manifests.items():
        if not manifest.refers:
            continue
        if manifest.attempt not in known:
            folder = folder_of(run, step)
            try:
                known[manifest.attempt] = frozenset(attempts.references(folder, manifest))
            except (CheckpointError, ObjectMissingError) as error:
                now = attempts.current(folder)
                if now is None or now.manifest != manifest:
                    raise ObjectMissingError(f"{folder.folder}: it went since it was listed") from error
                _log.warning("%s", error)  # it cannot be loaded; what it may refer to stays all the same
                others = {step for step in map(number_of, manifest.refers) if step is not None}
                stays.update(f"{other}/{name}" for other in others for name in seen.folders.get(other, ()))
                continue
        stays |= known[manifest.attempt]
    return stays
