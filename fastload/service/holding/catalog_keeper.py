"""Keeps the catalog (`cache.catalog`) up to date, in one thread whose calls are watched like all that touch the disk.

Changes are gathered and written every few seconds; a pin is written at once, since it is answered. What cannot be
written now is written later. A file that is damaged is set aside and made anew, with all pins and what is known
besides. None of it is in the way of the training: each kind of failure is counted, and the user is warned of it once.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastload.cache import url_without_credentials
from fastload.cache.catalog import ASIDE, CatalogDamagedError, CatalogError, CatalogObject, CatalogPin, Changes
from fastload.errors import CacheError
from fastload.redaction import redact
from fastload.service.disk_io import DiskWatch
from fastload.service.host.threads import Done
from fastload.service.resources import Resources
from fastload.service.state import ObjectEntry

_WRITE_AFTER_S = 5.0
_TRY_AGAIN_S = 15.0
# Objects that are read or written in one go: little beside the time after which a disk counts as hanging, and a few
# milliseconds of the loop.
_READ_AT_ONCE = 4000
_WRITE_AT_ONCE = 20_000

Answer = Callable[[CacheError | None], None]


@dataclass(slots=True)
class _Pending:
    """What is to be written."""

    objects: dict[bytes, tuple[ObjectEntry, float]] = field(default_factory=dict)  # and when each was used
    forgotten: dict[bytes, None] = field(default_factory=dict)
    pins: dict[str, CatalogPin | None] = field(default_factory=dict)  # None: it is to be removed
    pin_uses: dict[str, float] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.objects or self.forgotten or self.pins or self.pin_uses)

    def take(self, count: int) -> _Pending:
        """Take out all but objects, and so many of these."""
        some = dict(list(self.objects.items())[:count])
        taken = _Pending(some, self.forgotten, self.pins, self.pin_uses, self.answers)
        for object_id in some:
            del self.objects[object_id]
        self.forgotten, self.pins, self.pin_uses, self.answers = {}, {}, {}, []
        return taken

    def put_back(self, taken: _Pending) -> None:
        """They were not written; what came since counts more."""
        self.objects = {**taken.objects, **self.objects}
        self.forgotten = {**taken.forgotten, **self.forgotten}
        self.pins = {**taken.pins, **self.pins}
        self.pin_uses = {**taken.pin_uses, **self.pin_uses}

    def changes(self) -> Changes:
        """In the thread: as the catalog takes it."""
        return Changes(
            objects=[described(entry, used_at) for entry, used_at in self.objects.values()],
            forgotten=list(self.forgotten),
            pins=[pin for pin in self.pins.values() if pin is not None],
            unpinned=[name for name, pin in self.pins.items() if pin is None],
            pin_uses={name: at for name, at in self.pin_uses.items() if name not in self.pins},
        )


def described(entry: ObjectEntry, used_at: float) -> CatalogObject:
    """What the catalog has of an object."""
    info = entry.info
    return CatalogObject(entry.id, shown_url(info.url), info.size, info.etag, entry.data_set or None, used_at)


def shown_url(url: str) -> str:
    """Without credentials."""
    return redact(url_without_credentials(url))


class CatalogKeeper:
    """Used by the loop's thread only, except for what the pool runs."""

    def __init__(self, resources: Resources, watch: DiskWatch, all_pins: Callable[[], list[CatalogPin]]) -> None:
        """`all_pins()`: those to write where the file is made anew."""
        self._catalog, self._watch, self._all_pins = resources.catalog, watch, all_pins
        self._loop, self._is_lost, self._warnings = resources.pools.loop, resources.is_lost, resources.warnings
        self._where = resources.disk.directory
        self._pool = watch.pool("catalog", 1)
        # The last use of a run comes just before the service ends.
        self._pool.finishes = True
        self._pending = _Pending()
        self._is_writing = self._is_loaded = self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter(catalog_errors=0, catalog_set_aside=0)

    # At the start

    @property
    def is_loaded(self) -> bool:
        """Whether the pins that were stored are known."""
        return self._is_loaded

    def load(self, found: Callable[[list[CatalogPin]], None]) -> None:
        """Call `found` with the pins that are stored: now, before anything can displace what they name; where the file
        is in use by others, when it is not any more.
        """
        if self._catalog is None or not self._catalog.exists():
            self._is_loaded = True
            return
        try:
            pins = self._read_pins()
        except CatalogDamagedError as error:
            self._is_loaded = True
            self._count(error)
            try:
                self._catalog.set_aside()
            except OSError as failed:
                self._count(CatalogError(str(failed)))
        except CatalogError as error:
            self._count(error)
            self._loop.call_later(_TRY_AGAIN_S, self._load_again, found)
        else:
            self._is_loaded = True
            found(pins)

    def _load_again(self, found: Callable[[list[CatalogPin]], None]) -> None:
        if self._closed:
            return

        def done(pins: list[CatalogPin] | None, error: BaseException | None) -> None:
            if isinstance(error, CatalogError) and not isinstance(error, CatalogDamagedError):
                self._loop.call_later(_TRY_AGAIN_S, self._load_again, found)
                return
            self._is_loaded = True
            found(pins or [])
            self._settle(_Pending(), error)

        self._submit(self._read_pins, done)

    def _read_pins(self) -> list[CatalogPin]:
        assert self._catalog is not None
        self._catalog.open()
        return self._catalog.pins()

    def read(self, found: Callable[[list[CatalogObject]], None]) -> None:
        """Call `found` with all objects that are stored, some at a time."""
        if self._catalog is not None and self._catalog.is_open:
            self._read(b"", found)

    def _read(self, after: bytes, found: Callable[[list[CatalogObject]], None]) -> None:
        catalog = self._catalog
        assert catalog is not None

        def done(objects: list[CatalogObject] | None, error: BaseException | None) -> None:
            if error is not None:
                self._settle(_Pending(), error)
            elif objects:
                found(objects)
                self._read(objects[-1].object_id, found)

        self._submit(lambda: catalog.objects(after, _READ_AT_ONCE), done)

    # What changes

    def note(self, entry: ObjectEntry, used_at: float) -> None:
        """The object is to be in the catalog, and was used at that time."""
        if self._catalog is None:
            return
        self._pending.objects[entry.id] = entry, used_at
        self._pending.forgotten.pop(entry.id, None)
        self._write_later()

    def forget(self, object_id: bytes) -> None:
        """The object is not to be in the catalog."""
        if self._catalog is None:
            return
        self._pending.objects.pop(object_id, None)
        self._pending.forgotten[object_id] = None
        self._write_later()

    def keep(self, object_id: bytes) -> None:
        """What was to be forgotten is there again."""
        self._pending.forgotten.pop(object_id, None)

    def pin_used(self, name: str, at: float) -> None:
        """A pin was used at that time."""
        if self._catalog is None:
            return
        self._pending.pin_uses[name] = at
        self._write_later()

    def put_pins(self, pins: dict[str, CatalogPin | None], answer: Answer = lambda error: None) -> None:
        """Store these, or remove those that are None, at once; `answer` gets None when that is done, else why not."""
        self._pending.pins |= pins
        self._pending.answers.append(answer)
        self._write()

    def search(self, what: Iterable[str], found: Callable[[set[bytes]], None]) -> None:
        """Call `found` with the ids of what is called so (see `Catalog.find`), also of what has yet to be written."""
        names = list(what)
        pending = [entry for entry, _ in self._pending.objects.values()]
        self._write()
        catalog = self._catalog
        if catalog is None or not catalog.is_open or self._watch.stalled:
            found(called(names, pending))
            return

        def done(stored: set[bytes] | None, error: BaseException | None) -> None:
            if error is not None:
                self._settle(_Pending(), error)
            found((stored or set()) | called(names, pending))

        def hung() -> Done:
            found(called(names, pending))
            return lambda result, error: None

        self._pool.submit(lambda: catalog.find(names), done=done, hung=hung)

    # Writing

    def _write_later(self) -> None:
        if self._timer is None and not self._closed and self._catalog is not None:
            self._timer = self._loop.call_later(_WRITE_AFTER_S, self._write)

    def _write(self) -> None:
        """Write what is pending, some at a time and one after the other."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._catalog is None:
            self._answer(self._pending.take(0), CacheError("the cache has no directory"))
            return
        if self._is_writing or not self._pending:
            return
        if self._watch.stalled or not self._is_loaded:
            error = CacheError(f"the disk cache {self._where} does not answer, or others use its catalog; try again")
            self._answer(self._pending, error)
            self._pending.answers = []
            self._timer = self._loop.call_later(_TRY_AGAIN_S, self._write)
            return
        self._is_writing = True
        taken = self._pending.take(_WRITE_AT_ONCE)

        def done(_: None, error: BaseException | None) -> None:
            self._is_writing = False
            self._settle(taken, error)

        self._submit(lambda: self._put(taken), done)

    def _put(self, taken: _Pending) -> None:
        """In the thread."""
        assert self._catalog is not None
        if self._is_lost():
            if taken.answers:
                raise CatalogError("its directory was removed or emptied")
            return
        self._catalog.open()
        self._catalog.write(taken.changes())

    def _submit(self, function: Callable[[], Any], done: Done) -> None:
        def hung() -> Done:
            done(None, CatalogError("the disk does not answer"))
            return lambda result, error: None

        self._pool.submit(function, done=done, hung=hung)

    def _settle(self, taken: _Pending, error: BaseException | None) -> None:
        """What was taken is written, or was not for this reason."""
        if error is None:
            self._answer(taken, None)
            if self._pending.answers or len(self._pending.objects) >= _WRITE_AT_ONCE:
                self._write()
            elif self._pending:
                self._write_later()
            return
        self._count(error)
        self._answer(taken, _why(error))
        self._pending.put_back(taken)
        if isinstance(error, CatalogDamagedError):
            self._make_anew()
        elif self._pending and self._timer is None and not self._closed:
            self._timer = self._loop.call_later(_TRY_AGAIN_S, self._write)

    def _make_anew(self) -> None:
        catalog = self._catalog
        assert catalog is not None
        self._pending.pins = {**{pin.name: pin for pin in self._all_pins()}, **self._pending.pins}

        def done(_: None, error: BaseException | None) -> None:
            if error is not None:
                self._count(error)
            elif self._pending:
                self._write()

        self._submit(lambda: None if self._is_lost() else catalog.set_aside(), done)

    def _answer(self, taken: _Pending, error: CacheError | None) -> None:
        for answer in taken.answers:
            answer(error)

    def _count(self, error: BaseException) -> None:
        if isinstance(error, CatalogDamagedError):
            self.counters["catalog_set_aside"] += 1
            message = (
                f"the catalog of the cache {self._where} cannot be read ({error}); it was set aside as {ASIDE} and is "
                "made anew: data sets are unknown until they are used again, and pins that were set are gone"
            )
        else:
            self.counters["catalog_errors"] += 1
            message = (
                f"the catalog of the cache {self._where} cannot be used now ({error}); the cache works without it, and "
                "tries again"
            )
        self._warnings.add(message)

    def close(self) -> None:
        """Write what is pending, as the last thing."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        catalog = self._catalog
        if catalog is None or self._watch.stalled:
            return
        taken = self._pending.take(len(self._pending.objects))

        def end() -> None:
            try:
                if taken and self._is_loaded:
                    self._put(taken)
            finally:
                catalog.close()

        self._submit(end, lambda result, error: None)


def called(what: Iterable[str], entries: Iterable[ObjectEntry]) -> set[bytes]:
    """Those that are called so, as `Catalog.find` has it."""
    names = set(what)
    prefixes = tuple(name for name in names if name.endswith("/"))
    found = set()
    for entry in entries:
        url = shown_url(entry.info.url)
        if url in names or entry.data_set in names or (prefixes and url.startswith(prefixes)):
            found.add(entry.id)
    return found


def _why(error: BaseException) -> CacheError:
    return error if isinstance(error, CacheError) else CacheError(str(error))
