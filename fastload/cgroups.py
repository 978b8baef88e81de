"""What control groups allow this process: memory and processor time, of its own group and of all above it.

Schedulers and container runtimes set limits at any level, and where the levels are to be seen differs: the group's path
in `/proc/self/cgroup` counts from the root of the hierarchy or of a namespace, while the mount in
`/proc/self/mountinfo` may show only a part of it. So each mount is matched with the path, and all groups from ours up
to the mount's root are looked at; of those above, which a container does not see, version 1 gives the least in
`memory.stat`. Versions 1 and 2 may both be there (hybrid), each with some of the controllers.

Everything is a function of what `read` gives for a path, "" for no such file; so tests pass recorded trees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

__all__ = ["MemoryLimit", "cpu_quotas", "memory_limits", "read_file"]

Read = Callable[[str], str]

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The limit of one group, and how much of it is taken by what the kernel cannot drop, both in bytes."""

    limit_bytes: int
    used_bytes: int


def memory_limits(read: Read) -> list[MemoryLimit]:
    """All limits on memory that hold for this process; empty where there are none."""
    found = []
    for group, is_v2, is_own in _groups("memory", read):
        if not is_v2 and not is_own and read(f"{group}/memory.use_hierarchy").strip() == "0":
            continue  # before Linux 5.11 a group could be set not to count its children
        stat = _fields(read(f"{group}/memory.stat"))
        names = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
        limits = [_number(read(f"{group}/{name}")) for name in names]
        if not is_v2:
            limits += [stat.get("hierarchical_memory_limit"), stat.get("hierarchical_memsw_limit")]
        known = [limit for limit in limits if limit is not None]
        if known:
            used = _number(read(f"{group}/{'memory.current' if is_v2 else 'memory.usage_in_bytes'}")) or 0
            prefix = "" if is_v2 else "total_"
            cached = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            found.append(MemoryLimit(min(known), max(0, used - cached)))
    return found


def cpu_quotas(read: Read) -> list[float]:
    """All limits on processor time that hold for this process, in processors; empty where there are none."""
    found = []
    for group, is_v2, _ in _groups("cpu", read):
        if is_v2:
            quota, period = ([*read(f"{group}/cpu.max").split(), "", ""])[:2]
        else:
            quota, period = read(f"{group}/cpu.cfs_quota_us"), read(f"{group}/cpu.cfs_period_us")
        allowed, of = _number(quota), _number(period)
        if allowed is not None and of:
            found.append(allowed / of)
    return found


def read_file(path: str) -> str:
    """The content of a file of the system, "" where there is none."""
    try:
        return Path(path).read_text(errors="surrogateescape")
    except OSError:  # no such limit here: another version of control groups, or none
        return ""


def _groups(controller: str, read: Read) -> Iterator[tuple[str, bool, bool]]:
    """The folders of our group and of those above it: (folder, whether of version 2, whether it is our own)."""
    ours = _own_paths(controller, read("/proc/self/cgroup"))
    for is_v2, own in ours.items():
        mounts = _mounts(controller, is_v2, read("/proc/self/mountinfo"))
        below = [(point, own.relative_to(root)) for root, point in mounts if own.is_relative_to(root)]
        # A path that no mount shows is one of another namespace; what is mounted was meant for us to see.
        for point, path in below or [(point, PurePosixPath()) for _, point in mounts]:
            folder = point / path
            while True:
                yield str(folder), is_v2, folder == point / path
                if folder == point:
                    break
                folder = folder.parent


def _own_paths(controller: str, text: str) -> dict[bool, PurePosixPath]:
    """The path of our group, by whether it is of version 2."""
    found = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" or controller in controllers.split(","):
            found[number == "0"] = PurePosixPath(path)
    return found


def _mounts(controller: str, is_v2: bool, text: str) -> list[tuple[PurePosixPath, PurePosixPath]]:
    """The mounts of a hierarchy: (which of its groups is the root, where it is mounted)."""
    found = []
    for line in text.splitlines():
        fields, _, kind = line.partition(" - ")
        placed, described = fields.split(" "), kind.split(" ")
        if len(placed) < 5 or len(described) < 3:
            continue
        is_v1 = described[0] == "cgroup" and controller in described[2].split(",")
        if (described[0] == "cgroup2") if is_v2 else is_v1:
            root, point = (
                PurePosixPath(_ESCAPED.sub(lambda match: chr(int(match[1], 8)), each)) for each in placed[3:5]
            )
            found.append((root, point))
    return found


def _fields(text: str) -> dict[str, int]:
    """The numbers of a file of "name number" lines."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _number(text: str) -> int | None:
    """A limit; None for none: "max", -1, no such file."""
    return int(text) if text.strip().isdigit() else None
