"""Settings: sizes as people write them, and what this machine allows.

Everything here is read once, where a `Cache`, data set or loader is made, and passed on in small frozen groups; nothing
further down looks at the environment by itself.
"""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from fastload.cgroups import cpu_quotas, memory_limits, read_file
from fastload.errors import ConfigError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "pb": 10**15,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": 1 << 40,
    "pib": 1 << 50,
}
_REQUESTS_IN_FLIGHT_MAX = 1024
# What an arena takes by default also where hardly anything is left just now: below it, nothing works well.
_RAM_BYTES_LEAST = 64 * MIB
# What a signed number of 64 bits holds, which is what messages and the system take.
_BYTES_MAX = (1 << 63) - 1
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SECONDS_MAX = 100 * 366 * 86400


def parse_bytes(value: int | str, name: str) -> int:
    """`"8GiB"`, `"500 MB"` or an int, as bytes; `name` is the argument's name, for the error."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return _bounded(value, value, name)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(
            f'{name}={value!r} is not a size; give bytes as an int of at least 0, or a string such as "8GiB"'
        )
    return _bounded(int(Fraction(match[1]) * _UNITS[match[2].lower()]), value, name)


def parse_seconds(value: float | str, name: str) -> float:
    """`"5m"`, `"14d"` or a number, as seconds; `name` is the argument's name, for the error."""
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    seconds = -1.0
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif match is not None and match[2].lower() in _SECONDS:
        seconds = float(match[1]) * _SECONDS[match[2].lower()]
    if not 0 <= seconds <= _SECONDS_MAX:
        raise ConfigError(f'{name}={value!r} is not a length of time; write "30s", "5m", "2h" or "14d"')
    return seconds


def parse_rate(value: int | str, name: str) -> int:
    """`"200MB/s"` or an int, as bytes a second; `name` is the argument's name, for the error."""
    text = value.strip().removesuffix("/s") if isinstance(value, str) else value
    try:
        return parse_bytes(text, name)
    except ConfigError:
        raise ConfigError(f'{name}={value!r} is not a rate; write bytes a second, such as "200MB/s"') from None


def _bounded(count: int, value: int | str, name: str) -> int:
    if count > _BYTES_MAX:
        raise ConfigError(f"{name}={value!r} is more bytes than any machine has (8 EiB and above); give what is meant")
    return count


def exact_bytes(count: int) -> str:
    """`count` bytes as people write them, to the byte: `'8TiB'`, with quotes, or `8796093022209`."""
    units = [(unit, size) for unit, size in _UNITS.items() if size >= KIB and count and count % size == 0]
    written = [repr(f"{count // size}{unit.upper().replace('I', 'i')}") for unit, size in units]
    return min([*written, str(count)], key=lambda text: len(text.strip("'")))


def format_bytes(count: float) -> str:
    """`count` bytes for people: `"8.0 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """How much a cache may hold. They belong to its directory, not to a process.

    `ram_bytes` is the arena, per node. `disk_bytes` counts allocated blocks; 0 switches the disk tier off.
    `chunk_bytes` is the unit of fetching: 8 MiB is where an object store's per-request cost no longer shows and eight
    requests in flight hide 20 ms; a multiple of 4 KiB, for direct I/O. `disk_write_bytes_per_s` bounds what is written
    to disk on average; 0: no bound. `requests_in_flight` is how many requests each endpoint of a store is sent at a
    time; 0: as measuring finds. `history_bytes` is what the history of runs may take on disk; 0: none is kept or used.
    `checkpoint_ram_bytes` is what checkpoints may take of memory until they are stored; 0: half of it.
    `checkpoint_disk_bytes` is what may be kept of them on disk, beside `disk_bytes`; 0: nothing.
    """

    ram_bytes: int
    disk_bytes: int
    chunk_bytes: int = 8 * MIB
    disk_write_bytes_per_s: int = 0
    requests_in_flight: int = 0
    history_bytes: int = 64 * MIB
    checkpoint_ram_bytes: int = 0
    checkpoint_disk_bytes: int = 256 * GIB

    def checkpoint_ram(self) -> int:
        """What memory checkpoints may take up on this node, on their way to the store."""
        return self.checkpoint_ram_bytes or memory_limit_bytes() // 2

    def __post_init__(self) -> None:
        if not _is_count(self.requests_in_flight) or not 0 <= self.requests_in_flight <= _REQUESTS_IN_FLIGHT_MAX:
            raise ConfigError(
                f"requests_in_flight={self.requests_in_flight!r} must be between 1 and {_REQUESTS_IN_FLIGHT_MAX}, "
                "or 0 to leave it to measurement"
            )
        if self.chunk_bytes < 64 * KIB or self.chunk_bytes > GIB or self.chunk_bytes % 4096:
            raise ConfigError(
                f"chunk_bytes={exact_bytes(self.chunk_bytes)} must be a multiple of 4096 between 64 KiB and 1 GiB; "
                "8 MiB is the default"
            )
        if self.ram_bytes < 2 * self.chunk_bytes:
            raise ConfigError(
                f"ram_bytes={exact_bytes(self.ram_bytes)} is below two chunks ({2 * self.chunk_bytes} bytes); "
                "raise ram_bytes or lower chunk_bytes"
            )
        if 0 < self.disk_bytes < self.chunk_bytes + 8192:
            raise ConfigError(
                f"disk_bytes={exact_bytes(self.disk_bytes)} is below one chunk on disk ({self.chunk_bytes + 8192} "
                "bytes); raise disk_bytes, or set it to 0 to cache in RAM only"
            )


def _is_count(value: object) -> bool:
    """Whether it is a whole number, as messages carry one: not 1.5, not True."""
    return isinstance(value, int) and not isinstance(value, bool)


def default_cache_dir() -> Path:
    """`$FASTLOAD_CACHE`, else `fastload` in the user's cache directory."""
    named = os.environ.get("FASTLOAD_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastload"


def default_ram_bytes() -> int:
    """8 GiB or a quarter of the memory that this process may use, whichever is less; less again where its control
    groups have little left.
    """
    limit = memory_limit_bytes()
    left = min((each.limit_bytes - each.used_bytes for each in memory_limits(read_file)), default=limit)
    return min(8 * GIB, limit // 4, max(left // 2, _RAM_BYTES_LEAST))


def default_disk_bytes(directory: Path) -> int:
    """What is free on the file system of `directory`, less 10 %."""
    while not os.path.exists(directory):  # or may not be looked at
        directory = directory.parent
    stat = os.statvfs(directory)
    return int(stat.f_bavail * stat.f_frsize * 0.9)


def memory_limit_bytes() -> int:
    """The machine's memory, or what a control group or `ulimit -v` leaves of it to this process."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [each.limit_bytes for each in memory_limits(read_file)]
    return min(machine, *limits, addresses if addresses != resource.RLIM_INFINITY else machine)


def cpu_count() -> int:
    """The CPUs that this process may use: its affinity, cut down to the quotas of its control groups."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *cpu_quotas(read_file)])))
