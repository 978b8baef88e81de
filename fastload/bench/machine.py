"""Where a benchmark runs: the versions of what it uses, and the machine."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fastload.bench.schema import Machine
from fastload.cgroups import cpu_quotas, read_file

_PACKAGES = ("fastload", "torch", "numpy", "numba", "obstore", "pyarrow")


def versions() -> dict[str, str]:
    """Of Python and the packages that move and decode data."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(folder: Path, load_before: float) -> Machine:
    """The machine, the file system of `folder`, and the load before and now."""
    match = re.search(r"^model name\s*:\s*(.+)$", read_file("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+) kB$", read_file("/proc/meminfo"), re.MULTILINE)
    cores = min([float(len(os.sched_getaffinity(0))), *cpu_quotas(read_file)])
    return Machine(
        cpu=match[1] if match else platform.machine(),
        cores=cores,
        memory_bytes=int(memory[1]) << 10 if memory else 0,
        kernel=platform.release(),
        file_system=_file_system(folder),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    best, kind = "", "unknown"
    for line in read_file("/proc/mounts").splitlines():
        _, mounted, name, *_ = line.split()
        mounted = mounted.replace("\\040", " ")
        if len(mounted) >= len(best) and (str(folder) + "/").startswith(mounted.rstrip("/") + "/"):
            best, kind = mounted, name
    return kind
