"""What the cache holds and keeps: pins, and how much of whose data lies in which tier.

The decisions about pins are in `pins`, what follows from them in `eviction`. What is held is counted in `data_sets` as
chunks come and go. Both are remembered in the directory's catalog, by `catalog_keeper`. This ties them together: each
use of an object is noted in all of them, at most every few minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice

from fastload import protocol, snapshot
from fastload.cache import ChunkKey
from fastload.cache.catalog import CatalogObject, CatalogPin, folder_of
from fastload.config import format_bytes
from fastload.errors import CacheError, FastloadError, to_wire
from fastload.service.disk_io import DiskWatch
from fastload.service.events import Event
from fastload.service.holding.catalog_keeper import CatalogKeeper, called, shown_url
from fastload.service.holding.data_sets import DataSets
from fastload.service.holding.pins import Pin
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk, ChunkState, ConsumerState, ObjectEntry

# Objects that are looked at in one go for `Held`: some milliseconds.
_AT_ONCE = 5000
# A use of an object is noted again after so long.
_NOTED_FOR_S = 300.0
# How often is looked for pins that were not used for as long as they live.
_EXPIRE_EVERY_S = 15.0


class Holdings:
    """Used by the loop's thread only."""

    def __init__(self, resources: Resources, shared: SharedState, watch: DiskWatch) -> None:
        self._loop, self._now, self._wall = resources.pools.loop, resources.now, resources.wall
        self._disk, self._shared, self._pins = resources.disk, shared, shared.pins
        self._order, self._warnings = shared.disk_order, resources.warnings
        self._chunk_bytes = resources.limits.chunk_bytes
        self._sets = DataSets(self._chunk_bytes, self._order.indexes_of)
        self._keeper = CatalogKeeper(resources, watch, self._stored_pins)
        self._is_timed = False
        # For a daemon, which is told of processes by their ids: one names what it warms or asks for, one sets a pin, or
        # may not; and a pin has ended or become smaller, the catalog's pins are known, or the quota has changed.
        self.named: Event[[int, Collection[ObjectEntry]]] = Event()
        self.pin_set: Event[[int, str]] = Event()
        self.pin_refused: Event[[int, str]] = Event()
        self.room_changed: Event[[]] = Event()
        self.move_count = 0  # chunks that came to disk or RAM, or left it
        for key in resources.disk.keys():  # noqa: SIM118  # a method of the tier
            self._sets.on_disk(key, 1)
        self._order.watch(self._on_disk)
        shared.table.watch(self._in_ram)
        resources.events.written.connect(self._written)
        self._keeper.load(self._found_pins)

    @property
    def counters(self) -> dict[str, int]:
        """What went wrong with the catalog."""
        return self._keeper.counters

    # What earlier services left

    def took_stock(self) -> None:
        """What the disk holds is known: find out what it is."""
        self._keeper.read(self._found_objects)

    def _found_pins(self, stored: list[CatalogPin]) -> None:
        now, wall = self._now(), self._wall()
        for each in stored:
            if self._pins.get(each.name) is None:  # which may have been set since, where the catalog was in use
                self._shared.repin(*self._pins.put(Pin(each.name, each.sizes, each.ttl_s, each.quota_bytes), now))
                # A clock that was set back since has it in the future.
                self._pins.used(each.name, now - max(0.0, wall - each.used_at))
        for pin in self._pins:
            for object_id, size in pin.sizes.items():
                self._sets.learn(object_id, size, "", pin=self._name_of_pin(object_id))
        self._warn_of_room()
        self._expire()
        self.room_changed()
        if self._disk.quota_bytes:
            self.took_stock()

    def _found_objects(self, stored: list[CatalogObject]) -> None:
        for each in stored:
            if not self._is_kept(each.object_id):
                self._keeper.forget(each.object_id)
                continue
            is_given = each.data_set is not None
            pin = self._name_of_pin(each.object_id)
            self._sets.learn(each.object_id, each.size, each.set_name, is_given=is_given, pin=pin)
            self._sets.use(each.object_id, min(each.used_at, self._wall()))

    def _is_kept(self, object_id: bytes) -> bool:
        """Whether the catalog is to have it."""
        return object_id in self._pins or bool(self._order.indexes_of(object_id))

    def _name_of_pin(self, object_id: bytes) -> str | None:
        names = self._pins.names_of(object_id)
        return names[0] if names else None

    # What comes, goes and is used

    def _on_disk(self, key: ChunkKey, times: int) -> None:
        self.move_count += 1
        self._sets.on_disk(key, times)
        if times > 0:
            self._keeper.keep(key.object_id)
        elif not self._is_kept(key.object_id):
            self._keeper.forget(key.object_id)

    def _in_ram(self, chunk: Chunk, times: int) -> None:
        self.move_count += 1
        if times > 0:
            self._learn(chunk.entry)
            self._sets.use(chunk.entry.id, self._wall())
        self._sets.in_ram(chunk.entry.id, times * chunk.length)

    def _written(self, chunk: Chunk, written: bool) -> None:
        if written:
            self._learn(chunk.entry)
            self._keeper.note(chunk.entry, self._wall())

    def _learn(self, entry: ObjectEntry) -> None:
        if entry.id not in self._sets:
            home, is_given = entry.data_set or _home(folder_of(entry.info.url)), bool(entry.data_set)
            self._sets.learn(entry.id, entry.info.size, home, is_given=is_given, pin=self._name_of_pin(entry.id))

    def use(self, entries: Iterable[ObjectEntry]) -> None:
        """A plan names these, or they were read."""
        now = self._now()
        for entry in entries:
            if now - entry.noted_at >= _NOTED_FOR_S:
                entry.noted_at = now
                self._note(entry, now)

    def _note(self, entry: ObjectEntry, now: float) -> None:
        wall = self._wall()
        self._pins.use(entry.id, now)
        self._sets.use(entry.id, wall)
        for name in self._pins.names_of(entry.id):
            self._keeper.pin_used(name, wall)
        if self._is_kept(entry.id):
            self._learn(entry)
            self._keeper.note(entry, wall)

    def label(self, consumer: ConsumerState, message: protocol.Label) -> None:
        """These objects are the data set of this name."""
        for number in message.objects:
            entry = consumer.entry(number)
            entry.data_set = message.name
            if entry.id in self._sets:
                pin = self._name_of_pin(entry.id)
                self._sets.learn(entry.id, entry.info.size, message.name, is_given=True, pin=pin)
                if self._is_kept(entry.id):
                    self._keeper.note(entry, self._wall())

    # Pins

    def pin(self, consumer: ConsumerState, message: protocol.Pin) -> None:
        """Set a pin, and answer when it is stored."""
        entries = {entry.id: entry for entry in map(consumer.entry, message.objects)}
        sizes = {object_id: entry.info.size for object_id, entry in entries.items()}
        pin = Pin(message.name, sizes, message.ttl_s, message.quota_bytes)
        try:
            self._pins.check(pin, self._disk.quota_bytes)
        except FastloadError as error:
            self.pin_refused(consumer.pid, message.name)
            consumer.send(protocol.RequestFailed(message.request, *to_wire(error)))
            return
        now = self._now()
        self.pin_set(consumer.pid, message.name)
        self._repin(*self._pins.put(pin, now))
        for entry in entries.values():
            entry.noted_at = now
            self._learn(entry)
            self._sets.pin(entry.id, self._name_of_pin(entry.id))
            self._note(entry, now)
        self._expire_later()

        def stored(error: CacheError | None) -> None:
            if error is None:
                consumer.send(protocol.Done(message.request, {"byte_count": pin.byte_count}))
                return
            failed = CacheError(
                f"pin {pin.name!r} holds, but is lost with the service, since it could not be stored: {error}"
            )
            consumer.send(protocol.RequestFailed(message.request, *to_wire(failed)))

        self._keeper.put_pins({pin.name: self._stored(pin)}, stored)

    def unpin(self, names: Iterable[str]) -> None:
        """End the pins of these names."""
        gone = [name for name in names if self._pins.get(name) is not None]
        for name in gone:
            self._repin(*self._pins.remove(name))
        if gone:
            self._keeper.put_pins(dict.fromkeys(gone))
            self.room_changed()

    def unpin_called(self, send: Callable[[protocol.Message], None], message: protocol.Unpin) -> None:
        """End the pins of these names; what else is called so is taken out of all pins. Answer when that is stored."""
        names = [name for name in message.what if self._pins.get(name) is not None]
        others = [each for each in message.what if each not in names]

        def found(object_ids: set[bytes]) -> None:
            before = self._pins.byte_count
            changes: dict[str, CatalogPin | None] = dict.fromkeys(names)
            for name in names:
                self._repin(*self._pins.remove(name))
            for pin in self._pins.without(object_ids):
                used_at = self._pins.used_at(pin.name)
                self._repin(*(self._pins.put(pin, used_at) if pin.sizes else self._pins.remove(pin.name)))
                changes[pin.name] = self._stored(pin) if pin.sizes else None
            done = protocol.Done(
                message.request, {"byte_count": before - self._pins.byte_count, "names": sorted(changes)}
            )

            def stored(error: CacheError | None) -> None:
                send(done if error is None else protocol.RequestFailed(message.request, *to_wire(error)))

            if changes:
                self._keeper.put_pins(changes, stored)
                self.room_changed()
            else:
                send(done)

        if others:
            self.search(others, found)
        else:
            found(set())

    def search(self, what: Sequence[str], found: Callable[[set[bytes]], None]) -> None:
        """Call `found` with the ids of objects that are called so, by URL, prefix, data set or pin."""
        here = {key for name in what for key in getattr(self._pins.get(name), "sizes", ())}
        chunks = (chunk for chunk in self._shared.table.chunks if chunk is not None)
        entries = {chunk.entry.id: chunk.entry for chunk in chunks}
        here |= called(what, entries.values())
        self._keeper.search(what, lambda stored: found(stored | here))

    def _repin(self, came: Collection[bytes], gone: Collection[bytes]) -> None:
        self._shared.repin(came, gone)
        for object_id in gone:
            self._sets.pin(object_id, None)
            if not self._is_kept(object_id):
                self._keeper.forget(object_id)

    def _stored(self, pin: Pin) -> CatalogPin:
        idle_s = self._now() - self._pins.used_at(pin.name)
        return CatalogPin(pin.name, dict(pin.sizes), pin.ttl_s, pin.quota_bytes, max(0.0, self._wall() - idle_s))

    def _stored_pins(self) -> list[CatalogPin]:
        return [self._stored(pin) for pin in self._pins]

    def _expire_later(self) -> None:
        if not self._is_timed and any(pin.ttl_s for pin in self._pins):
            self._is_timed = True
            self._loop.call_later(_EXPIRE_EVERY_S, self._expire)

    def _expire(self) -> None:
        self._is_timed = False
        self.unpin(self._pins.expired(self._now()))
        self._expire_later()

    def quota_changed(self, quota_bytes: int) -> None:
        """The disk may hold so much from now on."""
        self._warn_of_room(quota_bytes)
        self.room_changed()

    def pin_names(self) -> set[str] | None:
        """The names of all pins; None where those that were stored are not known yet."""
        return {pin.name for pin in self._pins} if self._keeper.is_loaded else None

    def _warn_of_room(self, quota_bytes: int | None = None) -> None:
        quota_bytes = self._disk.quota_bytes if quota_bytes is None else quota_bytes
        if self._pins.file_bytes > quota_bytes:
            self._warnings.add(
                f"pins name {format_bytes(self._pins.file_bytes)}, more than the disk cache {self._disk.directory} may "
                f"hold ({format_bytes(quota_bytes)}): a part of that is fetched again; raise disk_bytes, or unpin "
                "something"
            )

    # How much is held

    def data_sets(self) -> list[snapshot.DataSet]:
        """By data set, those first of which most is held."""
        return self._sets.rows()

    @property
    def pinned_disk_bytes(self) -> int:
        """What pinned objects hold on disk."""
        return self._sets.pinned_disk_bytes

    def held(self, consumer: ConsumerState, message: protocol.Held) -> None:
        """Answer, when all of its objects were looked at: some at a time, since they may be a million."""
        self.named(consumer.pid, consumer.entries)
        entries = iter(dict.fromkeys(consumer.entries))
        values = dict.fromkeys(("byte_count", "ram_bytes", "disk_bytes", "held_bytes", "pinned_bytes"), 0)

        def look() -> None:
            if self._add(entries, values):
                self._loop.call_soon(look)
            else:
                consumer.send(protocol.Done(message.request, values))

        look()

    def _add(self, entries: Iterator[ObjectEntry], values: dict[str, int]) -> bool:
        """Add the next to the values; whether there were any."""
        some = list(islice(entries, _AT_ONCE))
        for entry in some:
            in_ram = {index for index, chunk in entry.chunks.items() if chunk.state is ChunkState.RESIDENT}
            on_disk = self._order.indexes_of(entry.id)
            values["byte_count"] += entry.info.size
            values["ram_bytes"] += _bytes_of(entry, in_ram)
            values["disk_bytes"] += _bytes_of(entry, on_disk)
            values["held_bytes"] += _bytes_of(entry, in_ram.union(on_disk))
            values["pinned_bytes"] += entry.info.size if entry.id in self._pins else 0
        return bool(some)

    def held_bytes(self, objects: Iterable[tuple[bytes, int]]) -> int:
        """How much of these objects, of which ids and sizes are given, is held to stay: on disk, where that takes
        chunks, since RAM is given back at rest; else in either tier.
        """
        in_ram: dict[bytes, set[int]] = {}
        for chunk in () if self._disk.writable else self._shared.table.chunks:
            if chunk is not None and chunk.state is ChunkState.RESIDENT:
                in_ram.setdefault(chunk.entry.id, set()).add(chunk.index)
        held = 0
        for object_id, size in objects:
            indexes = self._order.indexes_of(object_id)
            if object_id in in_ram:
                indexes = in_ram[object_id].union(indexes)
            if len(indexes) == -(-size // self._chunk_bytes):
                held += size
            else:
                held += sum(min(self._chunk_bytes, size - index * self._chunk_bytes) for index in indexes)
        return held

    def close(self) -> None:
        """Have the last uses written."""
        self._keeper.close()


@lru_cache(4096)
def _home(folder: str) -> str:
    """As it is shown."""
    return shown_url(folder)


def _bytes_of(entry: ObjectEntry, indexes: Collection[int]) -> int:
    """The length of these chunks of an object."""
    if len(indexes) == entry.chunk_count:
        return entry.info.size
    return sum(map(entry.length, indexes))
