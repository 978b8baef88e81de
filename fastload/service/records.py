"""What is where, and who wants it: the records of a core, which all of its parts share and change by their methods."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fastload.service.buffers import BufferTable
from fastload.service.consumers import ConsumerState
from fastload.service.diskorder import DiskOrder
from fastload.service.ledger import Ledger
from fastload.service.model import Chunk, ObjectEntry, Objects
from fastload.service.parts import Parts
from fastload.service.pins import Pins
from fastload.service.planset import PlanSet
from fastload.service.tiers import Disk


@dataclass(frozen=True, slots=True)
class Records:
    """See the module's text."""

    disk: Disk
    objects: Objects
    pins: Pins
    table: BufferTable
    disk_order: DiskOrder
    ledger: Ledger
    plans: PlanSet

    @classmethod
    def of_parts(cls, parts: Parts, consumers: Collection[ConsumerState]) -> Records:
        """Those of a service that begins; `consumers` are the ones that are connected."""
        pins = Pins(parts.disk, parts.limits.ram_bytes)
        table = BufferTable(parts.arena.buffer_count, lambda chunk: pins.belongs_in_ram(chunk.entry, chunk.index))
        disk_order = DiskOrder(parts.disk.keys())

        def used(chunk: Chunk) -> None:
            """It was read before, and is again, from RAM."""
            table.use(chunk)
            disk_order.use(chunk.entry.key(chunk.index))

        return cls(
            disk=parts.disk,
            objects=Objects(parts.limits.chunk_bytes),
            pins=pins,
            table=table,
            disk_order=disk_order,
            ledger=Ledger(table, used),
            plans=PlanSet(consumers, table, disk_order, pins),
        )

    def on_disk(self, entry: ObjectEntry, index: int) -> bool:
        """Whether the disk tier holds a chunk."""
        return self.disk.readable and self.disk.contains(entry.key(index))

    def chunk_in(self, buffer: int) -> Chunk:
        """What lies in a buffer that is not empty."""
        chunk = self.table.chunks[buffer]
        assert chunk is not None, f"buffer {buffer} is empty"
        return chunk
