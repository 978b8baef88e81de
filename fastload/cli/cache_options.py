"""What verbs have in common that work on a cache: the options that name it, and how its filling is shown."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fastload.config import CacheLimits, default_cache_dir, default_ram_bytes, format_bytes, parse_bytes
from fastload.errors import ConfigError

if TYPE_CHECKING:
    from fastload.client.cache import Cache

# Whether it can be read is not typer's to say: our error names whose it is.
CachePath = Annotated[
    Path | None, typer.Option(help="Cache directory; else $FASTLOAD_CACHE, or ~/.cache/fastload.", readable=False)
]
RamBytes = Annotated[str | None, typer.Option(help="Size of the RAM tier, such as 8GiB.")]
DiskBytes = Annotated[str | None, typer.Option(help="Size of the disk tier, such as 500GiB.")]
FormatOption = Annotated[
    str,
    typer.Option(
        "--format",
        help="Of the shards that a prefix stands for: tar, mds, jsonl, tfrecord, litdata, 'tokens(2048, uint16)', or "
        "auto, by their endings.",
    ),
]
SplitOption = Annotated[str | None, typer.Option(help="Which of the splits under a prefix, such as train.")]
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

        given = self._given()
        return Cache(
            self.directory,
            ram_bytes=given.get("ram_bytes"),
            disk_bytes=given.get("disk_bytes"),
            chunk_bytes=given.get("chunk_bytes"),
        )

    def limits(self) -> CacheLimits:
        """Those of a cache that is not there yet."""
        return CacheLimits(**{"ram_bytes": default_ram_bytes(), "disk_bytes": 0, **self._given()})

    def _given(self) -> dict[str, int]:
        sizes = {
            "ram_bytes": _size("--ram-bytes", self.ram_bytes),
            "disk_bytes": _size("--disk-bytes", self.disk_bytes),
            "chunk_bytes": _size("--chunk-bytes", self.chunk_bytes),
        }
        return {name: size for name, size in sizes.items() if size is not None}


def _size(option: str, text: str | None) -> int | None:
    """Read here, so that an error names the option as it was written."""
    return None if text is None else parse_bytes(text, option)


def cache_directory(cache: Path | None) -> Path:
    """The directory that `--cache` names, or the environment, or the default; it need not be there."""
    return (default_cache_dir() if cache is None else cache).expanduser().absolute()


def existing_cache(cache: Path | None) -> Path:
    """The same, for what looks at a cache and fills none: ConfigError where one was named and is none, or one that may
    not be looked at.
    """
    from fastload.cache import limits
    from fastload.history.archive import Archive

    path = cache_directory(cache)
    try:
        is_there = limits.path_of(path).exists() or Archive(path).folder.exists()
    except OSError as error:
        raise ConfigError(
            f"the cache directory {path} cannot be looked at: {error.strerror}; name another one"
        ) from error
    if (cache is not None or os.environ.get("FASTLOAD_CACHE")) and not is_there:
        said = f"--cache={cache}" if cache is not None else f"FASTLOAD_CACHE={os.environ['FASTLOAD_CACHE']}"
        raise ConfigError(f"{said}: there is no cache at {path}; give the directory that the job was given")
    return path


class Shown:
    """How far one piece of work is, whose size is not known while the store is listed. Thread-safe."""

    def __init__(self) -> None:
        self.done, self.total = 0, -1  # -1: not known

    def show(self, done: int, total: int) -> None:
        self.done, self.total = done, total


class _Bar(Shown):
    """In a terminal."""

    def __init__(self, bar: Progress, doing: str) -> None:
        super().__init__()
        self._bar, self._doing = bar, doing
        self._task = bar.add_task("listing", total=None)

    def show(self, done: int, total: int) -> None:
        self._bar.update(self._task, description=self._doing, total=total, completed=done)


# A line of progress in a pipe.
_LINE_EVERY_S = 10.0


@contextmanager
def shown(console: Console, doing: str, unit: str = "bytes", every_s: float = _LINE_EVERY_S) -> Iterator[Shown]:
    """How far it is while the block runs, in bytes or in so many of `unit`: a bar in a terminal; elsewhere a line at
    the start and each ten seconds, also while nothing moves.
    """
    if console.is_terminal:
        is_bytes = unit == "bytes"
        units: list[ProgressColumn] = (
            [DownloadColumn(binary_units=True), TransferSpeedColumn()]
            if is_bytes
            else [MofNCompleteColumn(), TextColumn(unit)]
        )
        with Progress(
            TextColumn("{task.description}"), BarColumn(), *units, TimeRemainingColumn(), console=console
        ) as bar:
            yield _Bar(bar, doing)
        return
    work, has_ended = Shown(), threading.Event()
    began = time.monotonic()

    def write_lines() -> None:
        while not has_ended.wait(every_s):
            line = progress_line(doing, unit, work.done, work.total, time.monotonic() - began)
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    console.print(f"{doing}: begun", soft_wrap=True, markup=False, highlight=False)
    writer = threading.Thread(target=write_lines, name="fastload-progress", daemon=True)
    writer.start()
    try:
        yield work
    finally:
        has_ended.set()
        writer.join()


def progress_line(doing: str, unit: str, done: int, total: int, took_s: float) -> str:
    """One line of a log: how far it is after `took_s` seconds; `total` is -1 while the store is listed."""
    after = f"after {took_s:.0f} s"
    if total < 0:
        return f"{doing}: listing, {after}"
    share = f"{100 * done / total:.0f} %" if total else "100 %"
    if unit != "bytes":
        return f"{doing}: {done} of {total} {unit} ({share}), {after}"
    rate = format_bytes(done / took_s) if took_s else "0 B"
    return f"{doing}: {format_bytes(done)} of {format_bytes(total)} ({share}), {after}, {rate}/s on average"
