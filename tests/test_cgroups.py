"""What control groups allow, from recorded trees of each kind and from a real group."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastload import cgroups, config
from fastload.cache import CacheDirectory
from fastload.cgroups import MemoryLimit
from fastload.config import GIB, MIB
from fastload.errors import ConfigError

_NO_LIMIT = 9223372036854771712

_MOUNT_V2 = "30 24 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
_MOUNT_V1 = "35 31 0:32 {root} /sys/fs/cgroup/{name} rw,relatime shared:9 - cgroup cgroup rw,{name}\n"
_OTHER_MOUNTS = (
    "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
    "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
)


def _limits(files: dict[str, str]) -> list[MemoryLimit]:
    return cgroups.memory_limits(lambda path: files.get(path, ""))


def _least(files: dict[str, str]) -> int | None:
    return min((each.limit_bytes for each in _limits(files)), default=None)


def _v2(own: str, root: str = "/") -> dict[str, str]:
    return {
        "/proc/self/cgroup": f"0::{own}\n",
        "/proc/self/mountinfo": _OTHER_MOUNTS + _MOUNT_V2.format(root=root),
    }


def _v1(own: str, root: str = "/", name: str = "memory") -> dict[str, str]:
    return {
        "/proc/self/cgroup": f"9:name=systemd:/\n4:{name}:{own}\n",
        "/proc/self/mountinfo": _OTHER_MOUNTS + _MOUNT_V1.format(root=root, name=name),
    }


def test_version_2_takes_the_least_of_all_levels() -> None:
    # Slurm on version 2: the job's limit is above the task's own group.
    files = _v2("/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    job = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    files |= {
        f"{job}/step_0/user/task_0/memory.max": "max\n",
        f"{job}/step_0/memory.max": "9000\n",
        f"{job}/memory.max": "700\n",
        f"{job}/memory.high": "max\n",
        f"{job}/memory.current": "500\n",
        f"{job}/memory.stat": "anon 100\nactive_file 150\ninactive_file 50\nslab 3\n",
        "/sys/fs/cgroup/system.slice/memory.max": "8000\n",
    }
    assert _limits(files) == [MemoryLimit(9000, 0), MemoryLimit(700, 300), MemoryLimit(8000, 0)]


def test_version_2_counts_where_throttling_begins() -> None:
    files = _v2("/user.slice")
    files |= {"/sys/fs/cgroup/user.slice/memory.max": "900", "/sys/fs/cgroup/user.slice/memory.high": "600"}
    assert _least(files) == 600


def test_version_1_below_the_root() -> None:
    files = _v1("/slurm/uid_1000/job_7/step_0")
    job = "/sys/fs/cgroup/memory/slurm/uid_1000/job_7"
    files |= {
        f"{job}/step_0/memory.limit_in_bytes": f"{_NO_LIMIT}\n",
        f"{job}/memory.limit_in_bytes": "700\n",
        f"{job}/memory.usage_in_bytes": "650\n",
        f"{job}/memory.stat": "cache 7\nactive_file 1\ntotal_active_file 30\ntotal_inactive_file 20\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{_NO_LIMIT}\n",
    }
    assert _least(files) == 700
    assert MemoryLimit(700, 600) in _limits(files)
    files[f"{job}/memory.memsw.limit_in_bytes"] = "650"
    assert _least(files) == 650
    # A group of old, which did not count its children.
    files[f"{job}/memory.use_hierarchy"] = "0\n"
    assert _least(files) == _NO_LIMIT


def test_version_1_tells_of_groups_that_the_mount_does_not_show() -> None:
    # Docker without a namespace of its own, inside of a pod with a limit: only the container's own group is mounted.
    own = "/kubepods/burstable/podc0ffee/abc123"
    files = _v1(own, root=own)
    files |= {
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "5000",
        "/sys/fs/cgroup/memory/memory.stat": "rss 3\nhierarchical_memory_limit 4000\nhierarchical_memsw_limit 4100\n",
    }
    assert _limits(files) == [MemoryLimit(4000, 0)]


@pytest.mark.parametrize(
    ("own", "root", "folders"),
    [
        ("/", "/", [""]),  # Docker with a namespace of its own
        ("/docker/abc", "/docker/abc", [""]),
        ("/docker/abc/inner", "/docker/abc", ["/inner", ""]),
        ("/docker/abc", "/", ["/docker/abc", "/docker", ""]),  # the host's tree, mounted into a container
        ("/../abc", "/", [""]),  # outside of the namespace: only what is mounted can be seen
        ("/", "/docker/abc", [""]),
        ("/docker/ab", "/docker/a", [""]),  # no prefix by parts
    ],
)
def test_where_the_groups_are(own: str, root: str, folders: list[str]) -> None:
    for files, point, name in (
        (_v2(own, root), "/sys/fs/cgroup", "memory.max"),
        (_v1(own, root), "/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ):
        for number, folder in enumerate(folders):
            limits = {f"{point}{folder}/{name}": f"{number + 5}"}
            assert _limits(files | limits) == [MemoryLimit(number + 5, 0)], folder
        assert _limits(files | {f"{point}/elsewhere/{name}": "1"}) == []


def test_hybrid() -> None:
    files = {
        "/proc/self/cgroup": "4:memory:/job\n2:cpu,cpuacct:/job\n0::/user.slice/session.scope\n",
        "/proc/self/mountinfo": _MOUNT_V1.format(root="/", name="memory")
        + _MOUNT_V1.format(root="/", name="cpu,cpuacct")
        + _MOUNT_V2.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
        "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "700",
        "/sys/fs/cgroup/unified/user.slice/memory.max": "max",
        "/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "250000\n",
        "/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
    }
    assert _least(files) == 700
    assert cgroups.cpu_quotas(lambda path: files.get(path, "")) == [2.5]


def test_mounts_with_blanks_and_two_mounts() -> None:
    files = _v2("/a b/c")
    files["/proc/self/mountinfo"] = (
        r"40 1 0:26 /a\040b /mnt/seen\040here rw - cgroup2 none rw" + "\n" + files["/proc/self/mountinfo"]
    )
    files |= {"/mnt/seen here/c/memory.max": "5", "/sys/fs/cgroup/a b/memory.max": "7"}
    assert sorted(each.limit_bytes for each in _limits(files)) == [5, 7]


def test_processor_time() -> None:
    files = _v2("/a/b")
    files |= {"/sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "/sys/fs/cgroup/a/cpu.max": "150000 100000\n"}
    assert cgroups.cpu_quotas(lambda path: files.get(path, "")) == [1.5]
    files = _v1("/a/b", name="cpu")
    files |= {
        "/sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
        "/sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
        "/sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000\n",
        "/sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
    }
    assert cgroups.cpu_quotas(lambda path: files.get(path, "")) == [0.5]


@pytest.mark.parametrize("text", ["", "x", ":::", "0:", "4:memory", "\n\n", "30 24 0:26 / - cgroup2"])
def test_files_that_make_no_sense(text: str) -> None:
    files = {"/proc/self/cgroup": text, "/proc/self/mountinfo": text}
    assert _limits(files) == []
    assert cgroups.cpu_quotas(lambda path: files.get(path, "")) == []


def _have(monkeypatch: pytest.MonkeyPatch, *limits: MemoryLimit, quotas: tuple[float, ...] = ()) -> None:
    monkeypatch.setattr("fastload.config.memory_limits", lambda read: list(limits))
    monkeypatch.setattr("fastload.config.cpu_quotas", lambda read: list(quotas))


def test_the_default_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, MemoryLimit(_NO_LIMIT, 1 << 60), MemoryLimit(800 * MIB, 0))
    assert config.memory_limit_bytes() == 800 * MIB
    assert config.default_ram_bytes() == 200 * MIB
    _have(monkeypatch, MemoryLimit(800 * MIB, 600 * MIB))
    assert config.default_ram_bytes() == 100 * MIB
    _have(monkeypatch, MemoryLimit(800 * MIB, 900 * MIB))
    assert config.default_ram_bytes() == 64 * MIB
    _have(monkeypatch, MemoryLimit(100 * MIB, 100 * MIB))
    assert config.default_ram_bytes() == 25 * MIB


def test_address_space_is_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (GIB, GIB) if which == resource.RLIMIT_AS else (0, 0))
    assert config.memory_limit_bytes() == GIB


def test_the_number_of_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, quotas=(0.5, 3.0))
    assert config.cpu_count() == 1
    _have(monkeypatch, quotas=(1000.0,))
    assert config.cpu_count() == len(os.sched_getaffinity(0))


def test_limits_of_a_larger_place_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that was made by a job with more memory: here its arena would be killed. There it stays as it is."""
    _have(monkeypatch)
    large = CacheDirectory.open(tmp_path / "cache", ram_bytes=2 * GIB, disk_bytes=GIB)
    _have(monkeypatch, MemoryLimit(700 * MIB, 0))
    small = CacheDirectory.open(large.path)
    assert small.limits.ram_bytes == 175 * MIB
    (warning,) = small.warnings
    assert "ram_bytes='2GiB', more memory than this process may use (700.0 MiB); it has 175.0" in warning
    with pytest.raises(ConfigError, match="more memory than this process may use"):
        CacheDirectory.open(large.path, ram_bytes=GIB)
    _have(monkeypatch)
    assert CacheDirectory.open(large.path).limits == large.limits


@contextlib.contextmanager
def _limited_group(limit_bytes: int) -> Iterator[Path]:
    """A real group below this process's own whose parent has the limit; skips where none can be made."""
    groups = [Path(folder) for folder, _, is_own in cgroups._groups("memory", cgroups.read_file) if is_own]
    outer = next(iter(groups), Path("/nowhere")) / f"fastload-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        files = [outer / name for name in ("memory.limit_in_bytes", "memory.max")]
        limit = next((file for file in files if file.exists()), None)
        if limit is None:
            pytest.skip("the memory controller is not given on to groups here")
        inner.mkdir()
        limit.write_text(str(limit_bytes))
        yield inner
    finally:
        for folder in (inner, outer):
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()


def test_a_real_group() -> None:
    """The limit is the parent's, as that of a scheduler's job is."""
    with _limited_group(700 * MIB) as group:
        code = "from fastload import config; print(config.memory_limit_bytes(), config.default_ram_bytes())"
        enter = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
        done = subprocess.run(["/bin/sh", "-c", enter], check=True, capture_output=True, text=True, timeout=300)
        assert done.stdout.split() == [str(700 * MIB), str(175 * MIB)]
