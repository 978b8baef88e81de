"""Ours, measured as the others are: a service with an arena and a disk tier, and threads that make batches.

The service is up before an epoch begins, and ends with the last that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastload.bench import measure
from fastload.bench.peers.job import About, Batch, Job, subfolder

ABOUT = About(("fastload",), "README.md")


class Loader:
    """`StreamingDataset` in `DataLoader`."""

    def __init__(self, job: Job, *, is_kept: bool = True) -> None:
        """Unless it `is_kept`, the service runs from the first epoch on only."""
        import fastload
        from fastload.client.cache import handle_of

        # Names of fastload are imported when they are first used: now, before the clock starts.
        self._data_set_class, self._loader_class = fastload.StreamingDataset, fastload.DataLoader
        self._job = job
        self._loader: Any = None
        self._directory = subfolder(job, "fastload")
        self._cache = fastload.Cache(self._directory, ram_bytes=job.ram_bytes, disk_bytes=job.cache_bytes)
        # Starts the service and keeps it. What that costs is a figure of its own.
        self._keeper = handle_of(self._cache).consumer(name="keeper") if is_kept else None
        if is_kept:
            measure.wait_until_idle(self.processes())

    def _build(self) -> Any:
        from fastload.bench.runs import decoders

        job = self._job
        self._dataset = self._data_set_class(
            job.urls,
            cache=self._cache,
            shuffle=False if job.shuffle == "none" else job.shuffle,  # type: ignore[arg-type]
            seed=job.seed,
            columns=list(job.columns),
            decode=decoders(job.decode),
        )
        return self._loader_class(self._dataset, batch_size=job.batch_size, num_workers=job.workers)

    def slots_bytes(self) -> int:
        """Memory of batches, in use and kept for later."""
        held: int = self._dataset._source.slots.held_bytes
        return held

    def epoch(self, number: int) -> Iterator[Batch]:
        """Columns are `Ragged`, or arrays where they are decoded."""
        if self._loader is None:
            self._loader = self._build()
        self._loader.set_epoch(number)
        for batch in self._loader:
            yield Batch(batch["__key__"], {name: batch[name] for name in self._job.columns})

    def processes(self) -> list[int]:
        """The cache service, which has a session of its own."""
        return measure.find_processes("fastload.service", self._directory)

    def close(self) -> None:
        """Loader first, then cache; the service ends by itself."""
        if self._loader is not None:
            self._loader.close()
        if self._keeper is not None:
            self._keeper.close()
        self._cache.close()
