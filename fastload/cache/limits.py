"""The limits of a cache directory, in its file `cache.json`.

    {"format": 1, "ram_bytes": ..., "disk_bytes": ..., "chunk_bytes": ..., "disk_write_bytes_per_s": ...,
     "requests_in_flight": ..., "history_bytes": ..., "checkpoint_ram_bytes": ..., "checkpoint_disk_bytes": ...}

The process that makes the directory writes them; a later one that gives other values explicitly changes them, with
one warning. The file is published whole: by link where there was none (of two creators the first wins), by
rename where one is replaced (of two changes the last wins).
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from fastload import config
from fastload.cache import syscalls, tempfiles
from fastload.cache.chunkfile import transfer
from fastload.config import CacheLimits
from fastload.errors import CacheError, ConfigError

FORMAT_VERSION = 1


def path_of(directory: Path) -> Path:
    """Where the limits of `directory` are kept."""
    return directory / "cache.json"


def stored(directory: Path) -> CacheLimits | None:
    """The limits as written in `directory`, None where there are none; raises as `settle`."""
    return _read(directory, directory)[0]


def settle(
    directory: Path, root: Path, explicit: dict[str, int], otherwise: CacheLimits | None = None
) -> tuple[CacheLimits, tuple[str, ...]]:
    """The limits of `directory` once the `explicit` ones hold, and warnings for the user. Where none are written, those
    of `otherwise` hold, or defaults; its `chunk_bytes` holds here in any case. `root`: where the directory is reached.

    OSError as the calls give it, CacheError for a directory of a later format, ConfigError for limits that
    cannot be.
    """
    _check_memory(explicit.get("ram_bytes", 0))
    stored, warning = _read(directory, root)
    warnings: tuple[str, ...] = (warning,) if warning else ()
    if stored is None:
        wanted = _first(root, explicit) if otherwise is None else replace(otherwise, **explicit)
        if _publish(root, wanted, replaces=bool(warning)):
            return wanted, warnings
        stored = _read(directory, root)[0] or wanted  # another process made the directory's limits first
    changed = replace(stored, **explicit)
    if changed != stored:
        _publish(root, changed, replaces=True)
        warnings += (_change(directory, stored, changed),)
    if otherwise is not None:
        changed = _in_chunks_of(otherwise, changed)
    fitting, warning = _fitting(directory, changed)
    return fitting, warnings + ((warning,) if warning else ())


def _in_chunks_of(ours: CacheLimits, changed: CacheLimits) -> CacheLimits:
    """What another process changed since, for a job that goes on with chunks of our size."""
    try:
        return replace(changed, chunk_bytes=ours.chunk_bytes)
    except ConfigError:  # too small for chunks of that size
        return ours


def _fitting(directory: Path, found: CacheLimits) -> tuple[CacheLimits, str]:
    """The limits as they can hold here, and a warning where they cannot as they are: they may be those of a larger
    machine or control group, for which they stay as they are.
    """
    there = config.memory_limit_bytes()
    if found.ram_bytes <= there:
        return found, ""
    fitting = config.default_ram_bytes()
    return replace(found, ram_bytes=fitting), (
        f"the cache {directory} has ram_bytes={config.exact_bytes(found.ram_bytes)}, more memory "
        f"than this process may use ({config.format_bytes(there)}); it has {config.format_bytes(fitting)} here. "
        "Name ram_bytes to change that"
    )


def _check_memory(ram_bytes: int) -> None:
    """Refuse an arena that could not be filled: it takes its memory bit by bit, and the kernel would kill a process for
    it in the middle of a job.
    """
    there = config.memory_limit_bytes()
    if ram_bytes > there:
        raise ConfigError(
            f"ram_bytes={config.exact_bytes(ram_bytes)} is more memory than this process may use "
            f"({config.format_bytes(there)}); a quarter of that is the default"
        )


def _read(directory: Path, root: Path) -> tuple[CacheLimits | None, str]:
    """The limits as written, or None where there are none; and a warning about what makes no sense."""
    path = path_of(directory)
    try:
        content = syscalls.read_file(path_of(root))
    except FileNotFoundError:
        return None, ""
    try:
        fields = json.loads(content)
        version = fields.pop("format")
        if version == FORMAT_VERSION:
            return CacheLimits(**{name: int(value) for name, value in fields.items()}), ""
    except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
        return None, f"{path} was damaged ({error}); the limits of the cache are set anew"
    raise CacheError(f"{path} is of format {version}, which this fastload does not know; name another cache directory")


def _first(directory: Path, explicit: dict[str, int]) -> CacheLimits:
    """The limits of a new directory: what was said, else defaults. A disk too full for a chunk stays off."""
    wanted = {"ram_bytes": config.default_ram_bytes(), "disk_bytes": 0} | explicit
    found = CacheLimits(**wanted)
    free = config.default_disk_bytes(directory)
    if "disk_bytes" in explicit or free < found.chunk_bytes + 8192:
        return found
    return replace(found, disk_bytes=free)


def _publish(directory: Path, limits: CacheLimits, *, replaces: bool) -> bool:
    """Write the limits; False where there are some already and `replaces` is false."""
    path, temp = path_of(directory), directory / next(tempfiles.temp_names())
    try:
        _write(temp, json.dumps({"format": FORMAT_VERSION, **asdict(limits)}).encode() + b"\n")
        if replaces:
            syscalls.rename(temp, path)
            return True
        try:
            syscalls.link(temp, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: of two creators the last wins
            syscalls.rename(temp, path)
        return True
    finally:
        _discard(temp)


def _write(path: Path, content: bytes) -> None:
    fd = syscalls.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        transfer(syscalls.pwritev, fd, (memoryview(content),), "write")
    finally:
        syscalls.close(fd)


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone by rename; or left, and swept when this process is gone
        syscalls.unlink(path)


def _change(directory: Path, before: CacheLimits, after: CacheLimits) -> str:
    """The one warning about a change of limits."""
    old, new = asdict(before), asdict(after)
    changes = ", ".join(
        f"{name} from {config.exact_bytes(old[name])} to {config.exact_bytes(new[name])}"
        for name in old
        if old[name] != new[name]
    )
    lost = before.chunk_bytes != after.chunk_bytes
    return f"the limits of the cache {directory} were changed: {changes}" + (
        "; with another chunk_bytes, what it holds is fetched again" if lost else ""
    )
