"""What is where, and who wants it: the state that all parts of a core share, and change by its classes' methods."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastload.service.deciding import buffers
from fastload.service.deciding.buffers import BufferTable
from fastload.service.deciding.eviction import DiskAdmission, DiskOrder, TierArcs
from fastload.service.deciding.plans import PlanSet
from fastload.service.holding.pins import Pins
from fastload.service.leases import Leases
from fastload.service.resources import Disk, Resources
from fastload.service.state import Chunk, ConsumerState, ObjectEntry, Objects


@dataclass(frozen=True, slots=True)
class SharedState:
    """See the module's text. Used by the loop's thread only."""

    consumers: dict[ConsumerState, None]  # that are connected, in the order in which they came
    disk: Disk
    objects: Objects
    arcs: TierArcs
    pins: Pins
    table: BufferTable
    disk_order: DiskOrder
    admission: DiskAdmission
    leases: Leases
    plans: PlanSet
    counters: Counter[str] = field(default_factory=lambda: Counter(dropped_chunks=0, dropped_unwritten=0))

    @classmethod
    def of_resources(cls, resources: Resources) -> SharedState:
        """Those of a service that begins."""
        consumers: dict[ConsumerState, None] = {}
        objects = Objects(resources.limits.chunk_bytes)
        disk_order = DiskOrder(resources.disk.keys())
        arcs = TierArcs(resources.disk, resources.limits.ram_bytes, disk_order.is_pinned)
        table = BufferTable(resources.arena.buffer_count, arcs.belongs_in_ram)
        plans = PlanSet(consumers, table, disk_order, arcs, resources.now)
        return cls(
            consumers=consumers,
            disk=resources.disk,
            objects=objects,
            arcs=arcs,
            pins=Pins(arcs.file_bytes),
            table=table,
            disk_order=disk_order,
            admission=DiskAdmission(disk_order, arcs, plans.to_read, objects.get),
            leases=Leases(table, disk_order),
            plans=plans,
        )

    def repin(self, came: Iterable[bytes], gone: Iterable[bytes]) -> None:
        """These objects are pinned since, and those are not any more: what that changes in what stays."""
        for object_ids, change in ((came, self.disk_order.pin), (gone, self.disk_order.unpin)):
            for object_id in object_ids:
                entry = self.objects.get(object_id)
                is_covered = entry is not None and entry.plan_count > 0
                if entry is not None and is_covered:
                    self.arcs.uncover(entry)
                change(object_id)
                if entry is not None and is_covered:
                    self.arcs.cover(entry)
        self.arcs.pinned_file_bytes = self.pins.file_bytes
        self.table.recompute_eviction_classes()

    def on_disk(self, entry: ObjectEntry, index: int) -> bool:
        return self.disk.readable and self.disk.contains(entry.key(index))

    def chunk_in(self, buffer: int) -> Chunk:
        """What lies in a buffer that is not empty."""
        chunk = self.table.chunks[buffer]
        assert chunk is not None, f"buffer {buffer} is empty"
        return chunk

    def evict(self, chunk: Chunk) -> None:
        """Empty the buffer of a chunk that is neither leased nor on its way to the disk."""
        self.table.evicted(chunk)
        chunk.evict()
        self.table.clear(chunk)
        self.gone(chunk)
        self.counters["dropped_chunks"] += 1
        self.counters["dropped_unwritten"] += self.disk.quota_bytes > 0 and not self.on_disk(chunk.entry, chunk.index)

    def gone(self, chunk: Chunk) -> None:
        """It has left its buffer."""
        for plan in self.plans.all():
            plan.dropped(chunk.entry, chunk.index)
        self.leases.dropped(chunk)
        self.objects.forget_if_idle(chunk.entry)

    def borrow_buffer(self) -> int | None:
        """A buffer for a second request for a chunk that is wanted: free, or the least useful idle one. Never the last,
        since both requests may hang: a consumer that waits for another chunk next finds room.
        """
        idle, _ = self.table.by_usefulness([buffers.IDLE], 2)
        if self.table.free_count + len(idle) < 2:
            return None
        if not self.table.free_count:
            self.evict(self.chunk_in(idle[0]))
        return self.table.borrow()
