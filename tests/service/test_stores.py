"""The service's table of stores: which are open."""

from __future__ import annotations

from collections import Counter

from fastload.service.fetching.stores import StoreTable
from fastload.store import StoreOptions
from fastload.store.types import ObjectInfo
from tests.service.helpers import FakeStore


class Stores:
    """A table whose stores are counted, by URL."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.inside: list[int] = []  # how many were open while one was read
        self.table = StoreTable(self._open)
        self.key = self.table.add({})

    def _open(self, url: str, options: StoreOptions) -> FakeStore:
        self.opened[url] += 1
        store = FakeStore({url: b"12"}, before_read=lambda url, start: self.inside.append(self.open_count))
        store.close = lambda: self.closed.update([url])  # type: ignore[method-assign]
        return store

    @property
    def open_count(self) -> int:
        return self.opened.total() - self.closed.total()

    def read(self, host: int) -> None:
        out = memoryview(bytearray(2))
        self.table.read_into(self.key, ObjectInfo(f"https://host{host}.example/object", 2), 0, out)
        assert bytes(out) == b"12"


def test_single_objects_of_any_number_of_hosts_keep_few_stores_open() -> None:
    """Each kept a connection for as long as the reader was there, until no descriptor was left."""
    stores = Stores()
    for host in range(300):
        stores.read(host)
        stores.read(0)  # used all the time
    assert stores.opened["https://host0.example/object"] == 1
    assert max(stores.inside) <= 65
    assert stores.open_count == 64
    stores.read(299)
    assert stores.opened["https://host299.example/object"] == 1
    stores.read(5)  # opened again
    assert stores.opened["https://host5.example/object"] == 2
    stores.table.remove(stores.key)
    assert stores.open_count == 0
    assert max(stores.closed.values()) <= 2


def test_a_store_in_use_stays_open() -> None:
    stores = Stores()
    with stores.table._use(stores.key, "https://host0.example/object"):
        for host in range(1, 100):
            stores.read(host)
        assert not stores.closed["https://host0.example/object"]
        stores.table.remove(stores.key)
        assert not stores.closed["https://host0.example/object"]
    assert stores.open_count == 0
