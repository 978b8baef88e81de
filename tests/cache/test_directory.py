"""The cache directory: refused when it is not safe, its limits agreed on, its service elected."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from fastload.cache import CacheDirectory, limits, syscalls
from fastload.client import Handle as Cache
from fastload.config import CacheLimits
from fastload.errors import CacheError, ConfigError
from tests.cache.faults import failing

MIB = 1 << 20
LIMITS = {"ram_bytes": 64 * MIB, "disk_bytes": 256 * MIB, "chunk_bytes": MIB}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "some" / "cache"


# Whose it is


def test_it_is_made_for_its_owner_only(place: Path) -> None:
    directory = CacheDirectory.open(place, **LIMITS)
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE(limits.path_of(directory.path).stat().st_mode) == 0o600
    assert directory.path == place
    assert directory.warnings == ()
    assert {path.parent for path in (directory.socket_path, directory.log_path, directory.lock_path)} == {place}


def test_a_link_to_a_directory_of_ones_own_will_do(place: Path, tmp_path: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    (tmp_path / "link").symlink_to(place)
    assert CacheDirectory.open(tmp_path / "link").limits == CacheLimits(**LIMITS)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777, 0o720])
def test_writable_by_others_is_refused(place: Path, mode: int) -> None:
    place.mkdir(parents=True)
    place.chmod(mode)
    with pytest.raises(CacheError, match=f"mode {mode:04o}.*run chmod 700 {place}"):
        CacheDirectory.open(place, **LIMITS)
    assert list(place.iterdir()) == []


def test_readable_by_others_is_their_owners_business(place: Path) -> None:
    place.mkdir(parents=True)
    place.chmod(0o755)
    CacheDirectory.open(place, **LIMITS)
    assert (place / "cache.json").exists()
    assert place.stat().st_mode & 0o777 == 0o755


def test_a_foreign_one_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CacheDirectory.open(place, **LIMITS)
    owner = place.stat().st_uid
    monkeypatch.setattr(syscalls, "geteuid", lambda: owner + 1)
    with pytest.raises(CacheError, match=rf"{place} belongs to user {owner}.*runs as user {owner + 1}.*name a"):
        CacheDirectory.open(place)


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(CacheError, match=f"{path} cannot be used: Not a directory; name another one"):
            CacheDirectory.open(path, **LIMITS)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_every_call_of_opening_may_fail(tmp_path: Path, number: int) -> None:
    with failing() as calls:
        CacheDirectory.open(tmp_path / "count", **LIMITS)
    for nth, name in enumerate(calls.names):
        place = tmp_path / str(nth)
        with failing(nth, number) as made:
            try:
                CacheDirectory.open(place, **LIMITS)
            except CacheError as error:
                assert f"{place} cannot be used: {os.strerror(number)}" in str(error)  # noqa: PT017 - may pass
            else:
                # Without our own start time, without hard links, and with a temp file left, it works.
                assert name in ("read_file", "link", "unlink")
        assert made.failed
        assert CacheDirectory.open(place, **LIMITS).limits == CacheLimits(**LIMITS)
        for left in place.glob(".tmp-*"):
            assert name == "unlink"
            left.unlink()


def test_temp_files_of_the_dead_are_swept(place: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    (place / ".tmp-4194999-1-00000000-0").write_text("half")
    CacheDirectory.open(place)
    assert [path.name for path in place.iterdir()] == ["cache.json"]


# Limits


def test_the_first_writes_the_limits_and_they_stay(place: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    later = CacheDirectory.open(place)
    assert later.limits == CacheLimits(**LIMITS)
    assert later.warnings == ()
    assert json.loads(limits.path_of(later.path).read_text()) == {"format": 1, **asdict(later.limits)}


def test_the_same_again_is_no_change(place: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    assert CacheDirectory.open(place, **LIMITS).warnings == ()


def test_an_explicit_change_wins_with_one_warning(place: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    changed = CacheDirectory.open(place, disk_bytes=0, ram_bytes=32 * MIB)
    assert changed.limits == CacheLimits(32 * MIB, 0, MIB)
    (warning,) = changed.warnings
    assert "ram_bytes from '64MiB' to '32MiB', disk_bytes from '256MiB' to 0" in warning
    assert "fetched again" not in warning
    assert CacheDirectory.open(place).limits == changed.limits
    assert "fetched again" in CacheDirectory.open(place, chunk_bytes=2 * MIB).warnings[0]


def test_defaults_are_written_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CacheDirectory.open(place)
    assert first.limits.chunk_bytes == 8 * MIB
    monkeypatch.setattr("fastload.config.default_ram_bytes", lambda: 99 * MIB)
    monkeypatch.setattr("fastload.config.default_disk_bytes", lambda directory: 99 * MIB)
    assert CacheDirectory.open(place).limits == first.limits


def test_a_full_disk_is_not_used_by_default(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.config.default_disk_bytes", lambda directory: 1000)
    assert CacheDirectory.open(place).limits.disk_bytes == 0


def test_impossible_limits_are_refused_and_not_kept(place: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    with pytest.raises(ConfigError, match="ram_bytes=1 is below two chunks"):
        CacheDirectory.open(place, ram_bytes=1)
    with pytest.raises(ConfigError, match="ram_bytes='1PiB' is more memory than this process may use"):
        CacheDirectory.open(place, ram_bytes=1 << 50)
    assert CacheDirectory.open(place).limits == CacheLimits(**LIMITS)


@pytest.mark.parametrize("directory", ["", 5, b"cache", [], "s3://bucket/cache", "a\0b"])
def test_what_is_no_local_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: object
) -> None:
    """An empty name would make a cache of the working directory, and a URL a folder in it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not a local directory; give a path"):
        Cache(directory)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [1.5, "8", True, float("nan"), -1])
def test_requests_in_flight_are_a_whole_number(place: Path, value: object) -> None:
    """What no message carries is not kept: every later job would inherit it."""
    with pytest.raises(ConfigError, match=f"requests_in_flight={value!r} must be between 1 and 1024"):
        Cache(place, requests_in_flight=value)
    assert not (place / "cache.json").exists()


@pytest.mark.parametrize("name", ["ram_bytes", "disk_bytes", "disk_write_bytes_per_s"])
@pytest.mark.parametrize("value", [1 << 63, 1 << 80, "9" * 400, "99999999 TiB"])
def test_sizes_that_no_machine_has_are_refused(place: Path, name: str, value: int | str) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r} is more bytes than any machine has"):
        Cache(place, **{name: value})
    assert not place.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 1, "ram_bytes": "x"}', "\xff"])
def test_damaged_limits_are_set_anew(place: Path, content: str) -> None:
    path = limits.path_of(CacheDirectory.open(place, **LIMITS).path)
    path.write_bytes(content.encode("latin-1"))
    again = CacheDirectory.open(place, **LIMITS)
    assert again.limits == CacheLimits(**LIMITS)
    assert len(again.warnings) == 1
    assert f"{path} was damaged" in again.warnings[0]
    assert CacheDirectory.open(place).warnings == ()


def test_limits_of_a_later_format_are_refused(place: Path) -> None:
    path = limits.path_of(CacheDirectory.open(place, **LIMITS).path)
    path.write_text('{"format": 2}')
    with pytest.raises(CacheError, match=f"{path} is of format 2"):
        CacheDirectory.open(place)


def test_of_two_creators_the_first_wins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = syscalls.link

    def raced(source: Path, target: Path) -> None:
        monkeypatch.setattr(syscalls, "link", link)
        CacheDirectory.open(place, **LIMITS)
        link(source, target)

    monkeypatch.setattr(syscalls, "link", raced)
    second = CacheDirectory.open(place)
    assert second.limits == CacheLimits(**LIMITS)
    assert second.warnings == ()


# The socket


@pytest.mark.parametrize("length", [10, 107, 108, 200])
def test_a_socket_path_of_any_length(tmp_path: Path, length: int) -> None:
    folder = "d" * max(1, length - len(os.fsencode(tmp_path)) - len("//socket"))
    directory = CacheDirectory.open(tmp_path / folder, **LIMITS)
    with directory.socket_address() as address, socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(1)
        assert directory.socket_path.is_socket()
        assert address.startswith("/proc/self/fd/")
        with directory.socket_address() as other, socket.socket(socket.AF_UNIX) as client:
            client.connect(other)
    directory.socket_path.unlink()


# The election


def test_one_holds_the_lock(place: Path) -> None:
    one, two = CacheDirectory.open(place, **LIMITS), CacheDirectory.open(place)
    assert one.try_lock()
    assert one.try_lock()
    assert not two.try_lock()
    one.unlock()
    one.unlock()
    assert two.try_lock()
    assert not one.try_lock()
    two.unlock()


def test_the_lock_ends_with_its_holder_even_when_it_left_a_child(place: Path) -> None:
    CacheDirectory.open(place, **LIMITS)
    code = (
        "import os, sys, time; from fastload.cache import CacheDirectory;"
        "directory = CacheDirectory.open(sys.argv[1]); assert directory.try_lock();"
        "os.fork() or print(os.getpid(), flush=True);"  # the child speaks, so it has come to its senses
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            directory = CacheDirectory.open(place)
            assert not directory.try_lock()
            holder.kill()
            holder.wait()
            assert directory.try_lock()
            directory.unlock()
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_fork_does_not_unlock_its_parent(place: Path) -> None:
    directory = CacheDirectory.open(place, **LIMITS)
    assert directory.try_lock()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if directory._lock_fd < 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not CacheDirectory.open(place).try_lock()
    directory.unlock()


def test_the_lock_of_a_deleted_file_is_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = CacheDirectory.open(place, **LIMITS)
    flock = syscalls.flock

    def emptied_meanwhile(fd: int, operation: int) -> None:
        flock(fd, operation)
        directory.lock_path.unlink()

    monkeypatch.setattr(syscalls, "flock", emptied_meanwhile)
    assert not directory.try_lock()
    monkeypatch.setattr(syscalls, "flock", flock)
    assert directory.try_lock()
    directory.unlock()


@pytest.mark.parametrize("name", ["open", "flock", "fstat", "stat"])
def test_every_call_of_locking_may_fail(place: Path, name: str) -> None:
    directory = CacheDirectory.open(place, **LIMITS)
    with (
        failing(0, errno.ENOLCK, frozenset({name})),
        pytest.raises(CacheError, match=f"cannot lock {directory.lock_path}: No locks available.*local disk"),
    ):
        directory.try_lock()
    assert directory.try_lock()
    directory.unlock()
