"""What verbs have in common that fill a cache: the options that name it, and a bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from fastload.config import parse_bytes

if TYPE_CHECKING:
    from fastload.client.cache import Cache

CachePath = Annotated[Path | None, typer.Option(help="Cache directory; else $FASTLOAD_CACHE, or ~/.cache/fastload.")]
RamBytes = Annotated[str | None, typer.Option(help="Size of the RAM tier, such as 8GiB.")]
DiskBytes = Annotated[str | None, typer.Option(help="Size of the disk tier, such as 500GiB.")]
ChunkBytes = Annotated[str | None, typer.Option(help="Size of a chunk, such as 8MiB.")]


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Which cache, and its limits where they are given."""

    directory: Path | None
    ram_bytes: str | None
    disk_bytes: str | None
    chunk_bytes: str | None

    def open(self) -> Cache:
        """The cache; to be closed."""
        from fastload.client.cache import Cache

        return Cache(
            self.directory,
            ram_bytes=_size("--ram-bytes", self.ram_bytes),
            disk_bytes=_size("--disk-bytes", self.disk_bytes),
            chunk_bytes=_size("--chunk-bytes", self.chunk_bytes),
        )


def _size(option: str, text: str | None) -> int | None:
    """Read here, so that an error names the option as it was written."""
    return None if text is None else parse_bytes(text, option)


class Bar:
    """How far one piece of work is, whose size is not known while the store is listed."""

    def __init__(self, bar: Progress, doing: str) -> None:
        self._bar, self._doing = bar, doing
        self._task = bar.add_task("listing", total=None)

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, description=self._doing, total=total, completed=done)


@contextmanager
def shown(console: Console, doing: str, *units: ProgressColumn) -> Iterator[Bar]:
    """A bar while the block runs; `units` stand behind it."""
    with Progress(TextColumn("{task.description}"), BarColumn(), *units, TimeRemainingColumn(), console=console) as bar:
        yield Bar(bar, doing)
