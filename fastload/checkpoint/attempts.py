"""Attempts in a store: begun, committed, repaired and swept, as `commit` decides.

Any store with conditional writes (`fastload.store.check_conditions`) will do. A store's own patience is the deadline of
each call here.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from fastload.checkpoint import commit as decisions
from fastload.checkpoint.commit import Current, Step, next_step
from fastload.checkpoint.records import (
    MANIFEST_NAME,
    Contents,
    Manifest,
    Part,
    Plan,
    Record,
    new_attempt,
    part_name,
    plan_name,
    url_of,
)
from fastload.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointExistsError,
    ObjectChangedError,
    ObjectMissingError,
    WriteConflictError,
)
from fastload.store import StoreOptions, check_conditions, open_store, store_root
from fastload.store.types import ObjectInfo, Store
from fastload.store.urls import normalise, scheme

_log = logging.getLogger("fastload.checkpoint")
_AT_ONCE = 16
# How often something may change while it is looked at: each time another has committed or replaced in between.
_LOOKS = 20
_RECORD_BYTES_MAX = 1 << 30
# Where conditional writes were tried out by this process.
_tried: set[str] = set()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint is: the store and the folder, which ends in a slash."""

    store: Store
    folder: str

    @classmethod
    def of(cls, store: Store, url: str) -> Place:
        return cls(store, normalise(url).rstrip("/") + "/")

    def names(self, prefix: str = "") -> dict[str, ObjectInfo]:
        """What lies there, by its name below the folder."""
        return {info.url.removeprefix(self.folder): info for info in self.store.list(self.folder + prefix)}

    def read(self, name: str) -> tuple[bytes, ObjectInfo]:
        """An object that is small enough to be held; ObjectMissingError where it is not there."""
        for look in range(_LOOKS):
            info = self.store.head(self.folder + name)
            if info.size > _RECORD_BYTES_MAX:
                raise CheckpointDamagedError(f"{info.url} is damaged: it has {info.size} bytes; take another step")
            out = bytearray(info.size)
            try:
                self.store.read_into(info, 0, memoryview(out))
            except ObjectChangedError:  # it was replaced since
                if look == _LOOKS - 1:
                    raise
                continue
            return bytes(out), info
        raise AssertionError


@contextlib.contextmanager
def opened(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None, deadline_s: float | None = None
) -> Iterator[Place]:
    """The place at a URL, whose store has its own patience, or at most `deadline_s`."""
    path, options = os.fspath(url), StoreOptions.from_environment(storage_options)
    if deadline_s is not None:
        options = replace(options, deadline_s=min(deadline_s, options.deadline_s))
    store = open_store(path, options)
    try:
        yield Place.of(store, path)
    finally:
        store.close()


def try_conditions(place: Place) -> None:
    """Raises `ConfigError` where its store does not keep to conditional writes. Tried out once for each bucket, or
    folder of checkpoints, since file systems differ.
    """
    root = place.folder.rstrip("/").rpartition("/")[0] if scheme(place.folder) == "file" else store_root(place.folder)
    if root not in _tried:
        check_conditions(place.store, place.folder)
        _tried.add(root)


def current(place: Place) -> Current | None:
    """The manifest that is there; None where there is no checkpoint."""
    try:
        data, info = place.read(MANIFEST_NAME)
    except ObjectMissingError:
        return None
    try:
        return Current(Manifest.decode(data, info.url), _etag_of(info))
    except CheckpointError:
        return Current(None, _etag_of(info))


def begin(
    place: Place,
    rank_count: int,
    *,
    overwrite: bool,
    now_s: float,
    refers: Iterable[str] = (),
    metric: float | None = None,
    attempt: str | None = None,
) -> Plan:
    """Begin an attempt of so many ranks. Raises `CheckpointExistsError` where a checkpoint is there, a damaged one as
    well, unless it is to be overwritten: that one, and none that another commits meanwhile. `ConfigError`: the store
    has no conditional writes. `refers` are the folders beside it of which it may refer to objects; `attempt` is what it
    is to be called.
    """
    try:
        replaces = _etag_of(place.store.head(place.folder + MANIFEST_NAME))
    except ObjectMissingError:
        replaces = None
    if replaces is not None and not overwrite:
        raise CheckpointExistsError(
            f"{place.folder} holds a checkpoint already; pass overwrite=True to replace it, or name another URL"
        )
    plan = Plan(
        attempt=attempt or new_attempt(),
        ranks=rank_count,
        replaces=replaces,
        began_s=now_s,
        refers=tuple(refers),
        metric=metric,
    )
    # Usually there is none: the condition is there so that a store without any is found before all is uploaded.
    place.store.put_if_absent(place.folder + plan_name(plan.attempt), plan.encode())
    return plan


def begin_once(place: Place, attempt: str, *, overwrite: bool, now_s: float, metric: float | None) -> None:
    """Begin an attempt of one rank, unless it has begun already: any process that is to store it may call this, again
    and at the same time. Raises what `begin` does. One that was given up, of which something is left, is not begun
    anew: `commit` finds that.
    """
    if place.names(f"{attempt}/"):
        return
    try_conditions(place)
    with contextlib.suppress(WriteConflictError):  # another one has begun it
        begin(place, 1, overwrite=overwrite, now_s=now_s, metric=metric, attempt=attempt)


def finish_rank(place: Place, part: Part | Record) -> None:
    """Say what a rank has saved, when its segments are all there."""
    place.store.put(place.folder + part_name(part.attempt, part.rank), part.encode())


def commit(place: Place, attempt: str) -> Step:
    """Make the attempt the checkpoint, where all ranks have finished: COMMITTED or WAIT. It may be called by any
    process, by several at once, and again.

    Raises `CheckpointExistsError` where another was committed since it began, and `CheckpointError` where it was
    given up, or what the ranks have saved does not make a checkpoint.
    """
    for _ in range(_LOOKS):
        there = current(place)
        plan = _plan(place, attempt)
        names = place.names(f"{attempt}/") if plan is not None else {}
        step = next_step(attempt, there, plan, decisions.ranks(names, plan) if plan is not None else ())
        if step is Step.GONE:
            raise CheckpointError(f"{place.folder}{attempt} was given up, and its plan deleted; save again")
        if step is Step.LOST:
            raise _lost(place, attempt, there)
        if step is not Step.COMMIT:
            return step
        assert plan is not None
        manifest = _checked(place, plan, names)
        try:
            if plan.replaces is None:
                place.store.put_if_absent(place.folder + MANIFEST_NAME, manifest.encode())
            else:
                place.store.put_if_match(place.folder + MANIFEST_NAME, manifest.encode(), plan.replaces)
        except WriteConflictError:  # this attempt was committed by another process, or another attempt was
            continue
        return Step.COMMITTED
    raise CheckpointError(f"{place.folder}{MANIFEST_NAME} changes each time that it is looked at; save again")


def commit_all(place: Place, attempt: str) -> None:
    """The same for who has seen all ranks finish: `CheckpointError` as well where parts are gone since."""
    if commit(place, attempt) is not Step.COMMITTED:
        raise CheckpointError(f"{place.folder}{attempt}: a part of it was deleted before it was committed; save again")


def commit_with(place: Place, attempt: str, rank: int) -> Step:
    """The same for a rank that has finished, and waits for others: `CheckpointError` as well where its part is gone."""
    step = commit(place, attempt)
    if step is Step.WAIT:
        try:
            place.store.head(place.folder + part_name(attempt, rank))
        except ObjectMissingError as error:
            raise CheckpointError(
                f"{place.folder}{attempt}: a part of it was deleted before it was committed; save again"
            ) from error
    return step


def repair(place: Place) -> str | None:
    """Commit an attempt that has all it needs, where none is committed or the one that it replaces is; which one."""
    for attempt in sorted(decisions.attempts(place.names())):
        there = current(place)
        if there is not None and there.manifest is not None and there.manifest.attempt == attempt:
            continue
        try:
            if commit(place, attempt) is Step.COMMITTED:
                return attempt
        except (CheckpointError, CheckpointExistsError, ObjectMissingError) as error:
            _log.info("not to be repaired: %s", error)  # it lost, was given up, or is damaged: for `sweep`
    return None


def sweep(
    place: Place, grace_s: float, now_s: float, referred: Collection[str] = (), *, is_trial: bool = False
) -> dict[str, ObjectInfo]:
    """Delete what attempts have left that are not the checkpoint, once `grace_s` have passed since anything happened;
    what was deleted. One that could still be committed is, first; others go in two sweeps (see `commit`), between
    which more time must pass than a commit takes. Clocks of writers and store may differ by far less than `grace_s`.
    What checkpoints beside it have `referred` to stays. With `is_trial` nothing changes.

    Raises `CheckpointError` where the manifest is damaged, so that it does not say what it needs.
    """
    if not is_trial:
        repair(place)
    names = place.names()  # before the manifest: what is committed after this is not among them, or young
    there = current(place)
    if there is not None and there.manifest is None:
        raise CheckpointError(f"{place.folder}{MANIFEST_NAME} is damaged, and nothing is deleted; overwrite it first")
    modified_s = {name: info.mtime_ns / 1e9 for name, info in names.items()}
    committed = there.manifest.attempt if there is not None and there.manifest is not None else None
    done = {}
    for name in decisions.leftovers(modified_s, committed, grace_s, now_s, referred):
        if not is_trial:
            place.store.delete(place.folder + name)
        done[name] = names[name]
    return done


def contents(place: Place) -> Contents:
    """All that the checkpoint holds. Raises `ObjectMissingError` where there is none, and `CheckpointError`."""
    for look in range(_LOOKS):
        there = current(place)
        if there is None:
            raise ObjectMissingError(f"{place.folder}: no checkpoint is here ({MANIFEST_NAME}); check its name")
        if there.manifest is None:
            raise CheckpointDamagedError(f"{place.folder}{MANIFEST_NAME} is damaged; take another step")
        manifest = there.manifest
        try:
            parts = _parts(place, manifest.attempt, len(manifest.parts))
        except ObjectMissingError as error:
            # It may have been replaced, and swept, since its manifest was read.
            if look == _LOOKS - 1 or current(place) == there:
                raise CheckpointDamagedError(f"{place.folder} is damaged: {error}; take another step") from error
            continue
        where = [place.folder + part_name(manifest.attempt, rank) for rank in range(len(parts))]
        return Contents([manifest.part(rank, data, where[rank]) for rank, data in enumerate(parts)], place.folder)
    raise AssertionError


def references(place: Place, manifest: Manifest) -> set[str]:
    """The objects beside the checkpoint that it refers to, by their names below the folder above."""
    parts = _parts(place, manifest.attempt, len(manifest.parts))
    where = place.folder + manifest.attempt
    return {
        each.name.removeprefix("../")
        for rank, data in enumerate(parts)
        for each in manifest.part(rank, data, where).objects
        if each.beside
    }


def _etag_of(info: ObjectInfo) -> str:
    if info.etag is None:
        raise CheckpointError(f"{info.url}: its store gives no ETags, by which it could be replaced; name another")
    return info.etag


def _plan(place: Place, attempt: str) -> Plan | None:
    try:
        data, info = place.read(plan_name(attempt))
    except ObjectMissingError:
        return None
    plan = Plan.decode(data, info.url)
    if plan.attempt != attempt:
        raise CheckpointError(f"{info.url} is damaged: it is the plan of {plan.attempt}; save again")
    return plan


def _parts(place: Place, attempt: str, count: int) -> list[bytes]:
    with ThreadPoolExecutor(min(_AT_ONCE, count), "fastload-parts") as pool:
        return list(pool.map(lambda rank: place.read(part_name(attempt, rank))[0], range(count)))


def _checked(place: Place, plan: Plan, names: dict[str, ObjectInfo]) -> Manifest:
    """The manifest of an attempt of which all is there, and as its parts say."""
    encoded = _parts(place, plan.attempt, plan.ranks)
    where = [place.folder + part_name(plan.attempt, rank) for rank in range(plan.ranks)]
    parts = [Part.decode(data, plan.attempt, rank, where[rank]) for rank, data in enumerate(encoded)]
    _check_objects(place, parts, names)
    Contents(parts, place.folder + plan.attempt)
    refers = sorted({each.beside for part in parts for each in part.objects} - {""})
    if not set(refers) <= set(plan.refers):
        raise CheckpointError(
            f"{place.folder}{plan.attempt} refers to {', '.join(refers)}, and its plan to "
            f"{', '.join(plan.refers) or 'nothing'}; save again"
        )
    return Manifest.of(plan.attempt, encoded, refers, plan.metric)


def _check_objects(place: Place, parts: Sequence[Part], names: dict[str, ObjectInfo]) -> None:
    others = {each.name for part in parts for each in part.objects if each.beside}

    def look(name: str) -> tuple[str, ObjectInfo | None]:
        with contextlib.suppress(ObjectMissingError):
            return name, place.store.head(url_of(place.folder, name))
        return name, None

    with ThreadPoolExecutor(_AT_ONCE, "fastload-parts") as pool:
        known = names | {name: info for name, info in pool.map(look, others) if info is not None}
    for part in parts:
        for each in part.objects:
            there = known.get(each.name)
            if there is None or there.size != each.size:
                found = "missing" if there is None else f"of {there.size} bytes"
                url = url_of(place.folder, each.name)
                raise CheckpointError(f"{url} is {found}, and rank {part.rank} has saved {each.size}; save again")


def _lost(place: Place, attempt: str, there: Current | None) -> CheckpointExistsError:
    if there is None:
        return CheckpointExistsError(
            f"{place.folder}: the checkpoint that {attempt} was to replace was deleted meanwhile; save again"
        )
    name = there.manifest.attempt if there.manifest is not None else "which is damaged"
    return CheckpointExistsError(
        f"{place.folder}: another checkpoint ({name}) was committed while {attempt} was saved; pass "
        "overwrite=True to replace it, or name another URL"
    )
