"""The service's stores: one per bucket and set of credentials, opened at first use, forgotten with their users, or when
many others were used since.

Used by the pools' threads, hence the lock. Credentials live in this table and nowhere else: they come over the socket
and are gone when the last consumer that brought them is. A set of options is known by its `key`, a hash of all that the
consumer resolved: no consumer shares a store, or what was asked of it, with one of other settings.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from fastload.errors import AccessDeniedError
from fastload.service import unpacking
from fastload.service.fetching import request_limit
from fastload.service.unpacked_sizes import UnpackedSizes
from fastload.store import Counters, RequestOptions, StoreOptions, Watched, open_store, resolve, store_root
from fastload.store.listing import present
from fastload.store.types import ObjectInfo, Store
from fastload.store.watch import Watch

# No limit: how many are sent at a time is for `control`, and what lists and reads besides is little.
_REQUESTS_MAX = 4 * request_limit.REQUESTS_MAX

# Open at a time, besides those in use: each keeps its last connection, and single objects may come from any number of
# hosts.
_OPENED_MAX = 64

StoreFactory = Callable[[str, StoreOptions], Store]


@dataclass(slots=True, eq=False)
class _OpenStore:
    store: Store
    user_count: int = 0
    retired: bool = False


class StoreTable:
    """See the module's text."""

    def __init__(
        self, factory: StoreFactory | None = None, make_file: Callable[[int], int] = unpacking.memory_file
    ) -> None:
        """`factory` stands in for the real stores in tests. `make_file`: for unpacked bytes, see `Unpacking`."""
        self.unpacking = unpacking.Unpacking(self.read_watched, make_file)
        self.unpacked_sizes = UnpackedSizes(self.unpacking)
        self.counters = Counters()
        self._salt = os.urandom(16)  # so that a key does not show whether a guess at a secret is right
        self._requests = RequestOptions(_REQUESTS_MAX, counters=self.counters)
        self._factory = self._open if factory is None else lambda url, options: Watched(factory(url, options))
        self._lock = threading.Lock()
        self._options: dict[str, StoreOptions] = {}
        self._consumers: Counter[str] = Counter()
        self._opened: dict[tuple[str, str], _OpenStore] = {}  # the one used last is the last

    def _open(self, url: str, options: StoreOptions) -> Store:
        return open_store(url, options, self._requests)

    def add(self, wire: dict[str, Any]) -> str:
        """One more consumer has these options; returns their key."""
        options = StoreOptions.from_wire(wire)
        key = hashlib.blake2b(
            msgspec.json.encode(wire, order="deterministic"), digest_size=16, key=self._salt
        ).hexdigest()
        with self._lock:
            self._options[key] = options
            self._consumers[key] += 1
        return key

    def remove(self, key: str) -> None:
        """One consumer less has them; the last one takes them along."""
        with self._lock:
            self._consumers[key] -= 1
            if self._consumers[key] > 0:
                return
            del self._consumers[key], self._options[key]
            idle = [self._retire(place) for place in list(self._opened) if place[0] == key]
        for store in idle:
            if store is not None:
                store.close()

    def share(self, key: str) -> None:
        """One more user has the options of this key, which are there."""
        with self._lock:
            assert key in self._options, key
            self._consumers[key] += 1

    def endpoint(self, key: str) -> str:
        """The endpoint of a set of options, "" for the provider's own."""
        return self._options[key].endpoint

    def read_into(self, key: str, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` from the object, or the piece of one; the store's errors. Of what is in a packed object: see
        `read_unpacked`.
        """
        assert not info.packing, info
        with self._use(key, info.url) as store:
            store.read_into(info.stored, info.start + start, out)

    def read_watched(self, watch: Watch, key: str, info: ObjectInfo, start: int, out: memoryview) -> None:
        """The same under a watch, which hears of each attempt."""
        with watch.over():
            self.read_into(key, info, start, out)

    def read_unpacked(
        self,
        watch: Watch,
        watches: Callable[[], Watch],
        key: str,
        info: ObjectInfo,
        start: int,
        out: memoryview,
    ) -> None:
        """Fill `out` from what is in a packed object. `watch` may cancel that; `watches` makes one for each request."""
        with watch.over():
            self.unpacking.read_into(key, info, start, out, watches)

    def head(self, key: str, url: str) -> ObjectInfo:
        """The object at `url`; the store's errors."""
        with self._use(key, url) as store:
            return store.head(url)

    def resolve(
        self, key: str, urls: Sequence[str], endings: Sequence[str], beside: Sequence[str] = ()
    ) -> list[ObjectInfo]:
        """The objects that `urls` stand for; the store's errors."""
        with self._opening(key) as open_at:
            return resolve(urls, open_at, endings=tuple(endings), beside=beside)

    def present(self, key: str, names: Sequence[str]) -> list[ObjectInfo]:
        """Those of the objects called `names` that are there; the store's errors."""
        with self._opening(key) as open_at:
            return present(names, open_at)

    @contextmanager
    def _opening(self, key: str) -> Iterator[Callable[[str], Store]]:
        """Stores for a listing, which last as long."""
        options = self._get_options(key)
        opened: dict[str, Store] = {}

        def open_at(url: str) -> Store:
            root = store_root(url)
            if root not in opened:
                opened[root] = self._factory(url, options)
            return opened[root]

        try:
            yield open_at
        finally:
            for store in opened.values():
                store.close()

    def close(self) -> None:
        """Close what is open; requests that are being tried again end with their last error."""
        self.unpacked_sizes.close()
        self.unpacking.close()
        with self._lock:
            opened = list(self._opened.values())
            self._opened.clear()
        for entry in opened:
            entry.store.close()

    def _get_options(self, key: str) -> StoreOptions:
        with self._lock:
            options = self._options.get(key)
        if options is None:
            raise options_gone()
        return options

    def opened(self, key: str, url: str, deadline_s: float) -> AbstractContextManager[Store]:
        """The store of `url`, for the block, with so much patience at most."""
        return self._use(key, url, deadline_s)

    @contextmanager
    def _use(self, key: str, url: str, deadline_s: float | None = None) -> Iterator[Store]:
        place = key, store_root(url)
        options = self._get_options(key)
        if deadline_s is not None:
            place = key, f"{place[1]} within {deadline_s} s"
            options = replace(options, deadline_s=min(deadline_s, options.deadline_s))
        with self._lock:
            entry = self._opened.pop(place, None) or _OpenStore(self._factory(url, options))
            self._opened[place] = entry
            entry.user_count += 1
            left_over = self._retire_left_over()
        for store in left_over:
            store.close()
        try:
            yield entry.store
        finally:
            with self._lock:
                entry.user_count -= 1
                done = entry.retired and entry.user_count == 0
            if done:
                entry.store.close()

    def _retire_left_over(self) -> list[Store]:
        """Take out of use what was used longest ago, where there are too many; returns it."""
        excess = len(self._opened) - _OPENED_MAX
        if excess <= 0:
            return []
        idle = [place for place, entry in self._opened.items() if entry.user_count == 0]
        retired = (self._retire(place) for place in idle[:excess])
        return [store for store in retired if store is not None]

    def _retire(self, place: tuple[str, str]) -> Store | None:
        """Take a store out of use; returns it if no thread is reading from it (else the last reader closes it)."""
        entry = self._opened.pop(place)
        entry.retired = True
        return entry.store if entry.user_count == 0 else None


def options_gone() -> AccessDeniedError:
    """A read comes too late for the options that it was to use. As good as denied: who has others tries with those."""
    return AccessDeniedError("the consumer whose credentials these were has gone, or has got others")
