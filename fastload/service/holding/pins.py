"""Pins: claims to objects that last without a consumer. State and decisions only; time is passed in.

A pin has a name, objects, a time to live since they were last used, and a quota. While one names an object, the
object's chunks stay on disk: no plan, warm or live, displaces them, and clearing leaves them (see `eviction`). A pin
may be set before a byte of it is there, and then keeps room for what comes.

What pins claim must fit: each its own quota, and all together what the disk can be sure to hold of chunks. More is
refused when a pin is set. A quota of the disk that is lowered later leaves the pins as they are.

Moments are seconds of a clock that never goes back. What is stored is wall time, converted by the caller, who takes a
last use in the future, which a clock that was set back gives, for one just now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from fastload import shares
from fastload.config import format_bytes
from fastload.errors import CacheError

PINS_MAX = 256


@dataclass(frozen=True, slots=True)
class Pin:
    """One claim."""

    name: str
    sizes: Mapping[bytes, int]  # of its objects, in bytes, by object id
    ttl_s: float = 0.0  # after the last use of any of them; 0: it does not end by itself
    quota_bytes: int = 0  # 0: as much as the disk holds

    @property
    def byte_count(self) -> int:
        """What all of its objects hold."""
        return sum(self.sizes.values())


class Pins:
    """All pins of a cache. Changed by the loop's thread only."""

    def __init__(self, file_bytes: Callable[[int], int]) -> None:
        """`file_bytes(size)`: what all chunks of an object of so many bytes take on disk."""
        self._file_bytes_of = file_bytes
        self._pins: dict[str, Pin] = {}
        self._used_at: dict[str, float] = {}
        self._names: dict[bytes, tuple[str, ...]] = {}  # by object
        self._sizes: dict[bytes, int] = {}
        self.byte_count = self.file_bytes = 0  # of all pinned objects, each counted once: their size, and room on disk

    def __contains__(self, object_id: bytes) -> bool:
        """Whether a pin names the object."""
        return object_id in self._names

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins.values())

    def __len__(self) -> int:
        return len(self._pins)

    def get(self, name: str) -> Pin | None:
        return self._pins.get(name)

    def used_at(self, name: str) -> float:
        """When an object of the pin was last used, or the pin was set."""
        return self._used_at[name]

    def size_of(self, object_id: bytes) -> int:
        """How large a pinned object is."""
        return self._sizes[object_id]

    def names_of(self, object_id: bytes) -> tuple[str, ...]:
        """The pins that name an object, the one that was set first in front."""
        return self._names.get(object_id, ())

    # What changes

    def check(self, pin: Pin, disk_bytes: int) -> None:
        """CacheError where `pin` is more than it may be, or a disk tier of `disk_bytes` can hold beside other pins."""
        if not disk_bytes:
            raise CacheError(
                f"the cache keeps nothing on disk (disk_bytes=0), so that pin {pin.name!r} would not last; set "
                "disk_bytes, such as 500GiB"
            )
        if pin.quota_bytes and pin.byte_count > pin.quota_bytes:
            raise CacheError(
                f"pin {pin.name!r} names {format_bytes(pin.byte_count)}, and its quota is "
                f"{format_bytes(pin.quota_bytes)}; raise the quota, or pin less"
            )
        if pin.name not in self._pins and len(self._pins) >= PINS_MAX:
            raise CacheError(f"{PINS_MAX} pins are set, and pin {pin.name!r} would be one more; unpin some")
        beside = self._file_bytes_beside(pin)
        need = sum(self._file_bytes_of(size) for size in pin.sizes.values())
        room = int(shares.DISK_CHUNKS * disk_bytes)
        if beside + need > room:
            others = f" beside {format_bytes(beside)} that other pins name" if beside else ""
            raise CacheError(
                f"pin {pin.name!r} takes {format_bytes(need)} on disk{others}, and disk_bytes holds "
                f"{format_bytes(room)} of chunks; raise disk_bytes, or unpin something"
            )

    def _file_bytes_beside(self, pin: Pin) -> int:
        """What the objects take that only other pins name."""
        before = self._pins.get(pin.name)
        only_mine = [key for key in (before.sizes if before else ()) if self._names[key] == (pin.name,)]
        mine = {*only_mine, *(key for key in pin.sizes if key in self._names)}
        return self.file_bytes - sum(self._file_bytes_of(self._sizes[key]) for key in mine)

    def put(self, pin: Pin, now: float) -> tuple[set[bytes], set[bytes]]:
        """Set a pin, in place of that of its name; which objects are pinned since, and which are not any more."""
        _, gone = self.remove(pin.name)
        self._pins[pin.name], self._used_at[pin.name] = pin, now
        alone, came = (pin.name,), set()
        for object_id, size in pin.sizes.items():
            names = self._names.get(object_id)
            if names is None:
                self._names[object_id], self._sizes[object_id] = alone, size
                self.byte_count += size
                self.file_bytes += self._file_bytes_of(size)
                came.add(object_id)
            else:
                self._names[object_id] = (*names, pin.name)
        return came - gone, gone - came

    def remove(self, name: str) -> tuple[set[bytes], set[bytes]]:
        """End a pin, if there is one of that name; returns as `put`."""
        pin = self._pins.pop(name, None)
        self._used_at.pop(name, None)
        gone: set[bytes] = set()
        for object_id in pin.sizes if pin else ():
            names = tuple(each for each in self._names[object_id] if each != name)
            if names:
                self._names[object_id] = names
                continue
            del self._names[object_id]
            size = self._sizes.pop(object_id)
            self.byte_count -= size
            self.file_bytes -= self._file_bytes_of(size)
            gone.add(object_id)
        return set(), gone

    def without(self, object_ids: Iterable[bytes]) -> list[Pin]:
        """What the pins that name some of these would be without them; one that names nothing else would be empty."""
        drop = {key for key in object_ids if key in self._names}
        names = {name: None for key in drop for name in self._names[key]}
        return [self._less(self._pins[name], drop) for name in names]

    @staticmethod
    def _less(pin: Pin, drop: set[bytes]) -> Pin:
        sizes = {key: size for key, size in pin.sizes.items() if key not in drop}
        return Pin(pin.name, sizes, pin.ttl_s, pin.quota_bytes)

    # Time

    def use(self, object_id: bytes, now: float) -> None:
        """A plan or another pin names the object, or it was read."""
        for name in self._names.get(object_id, ()):
            self._used_at[name] = max(now, self._used_at[name])

    def used(self, name: str, at: float) -> None:
        """What is known of an earlier run: a pin that is set was last used then."""
        self._used_at[name] = at

    def expired(self, now: float) -> list[str]:
        """The pins that were not used for as long as they live."""
        return [name for name, pin in self._pins.items() if pin.ttl_s and now - self._used_at[name] >= pin.ttl_s]
