"""Where compiled kernels are kept, and whose are believed."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastload.kernels import objects
from tests.kernels.example import command, run

ANNOUNCED = "fastload compiles its kernels now, some ten seconds in all, since "
NAME = "example-0123.x86-64-v3.o"


def test_what_is_kept_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder is named, it is in the usual places: XDG's, or the home directory."""
    for name in ("FASTLOAD_KERNELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert objects.users_folder() == tmp_path / "home/.cache/fastload-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert objects.users_folder() == tmp_path / "xdg/fastload-kernels"
    before = os.umask(0)
    try:
        objects.keep(NAME, b"code")
    finally:
        os.umask(before)
    assert objects.find(NAME) == b"code"
    assert stat.S_IMODE((tmp_path / "xdg/fastload-kernels").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "xdg/fastload-kernels" / NAME).stat().st_mode) == 0o600


def test_a_damaged_object_is_compiled_again(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    run(source, cache)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    for damaged in (b"", whole[:100], whole[:-1] + bytes([whole[-1] ^ 1])):
        kept.write_bytes(damaged)
        assert objects.find_in(cache, kept.name) is None
    output, log = run(source, cache)
    assert output == "7 8 compiled"
    assert "kernels are compiled anew, since a file of those that were kept is damaged" in log
    assert kept.read_bytes() == whole
    assert run(source, cache) == ("7 8 loaded", "")


def test_what_cannot_be_kept_is_compiled_and_said_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    output, log = run(tmp_path / "source", tmp_path / "cache")
    assert output == "7 8 compiled"
    announced, *_, line = log.splitlines()  # on a busy machine it also says how far it is
    assert announced.startswith(ANNOUNCED)
    assert log.count(str(tmp_path / "cache")) == 1
    assert str(tmp_path / "cache") in line
    assert "Not a directory; set FASTLOAD_KERNELS to a folder of yours, or to one that `fastload compile" in line


@pytest.mark.parametrize("others", [0o020, 0o002])
@pytest.mark.parametrize("of", ["folder", "file"])
def test_what_others_can_write_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, of: str, others: int
) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTLOAD_KERNELS", str(folder))
    objects.keep(NAME, b"code")
    place = folder if of == "folder" else folder / NAME
    place.chmod(place.stat().st_mode | others)
    assert objects.find(NAME) is None
    objects.keep(NAME, b"code")
    (said,) = caplog.messages
    assert f"others can write {place}" in said
    # A file is replaced; what is wrong with a folder is the user's to find out.
    assert objects.find(NAME) == (None if of == "folder" else b"code")


def test_links_are_not_followed(tmp_path: Path) -> None:
    objects.write(tmp_path / "one", NAME, b"code")
    (tmp_path / "two").mkdir(0o700)
    (tmp_path / "two" / NAME).symlink_to(tmp_path / "one" / NAME)
    assert objects.find_in(tmp_path / "one", NAME) == b"code"
    with pytest.raises(OSError, match="symbolic links"):
        objects.find_in(tmp_path / "two", NAME)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="fastload-kernels-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


AS_ANOTHER = """
import logging, os, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
from pathlib import Path
from fastload.kernels import objects
name, uid = sys.argv[1:]
os.seteuid(int(uid))
print(objects.find(name))
with objects.alone():
    objects.keep("other-4567.x86-64-v3.o", b"code")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")
@pytest.mark.parametrize(
    ("owner", "mode", "parent_owner", "parent_mode", "is_named", "says"),
    [
        (0, 0o755, 0, 0o755, True, "Permission denied"),  # built by root: used, and cannot be written to
        (0, 0o755, 0, 0o755, False, "Permission denied"),
        (4321, 0o755, 0, 0o755, True, "Permission denied"),  # built by another user, and named
        (4321, 0o755, 4321, 0o755, True, "Permission denied"),
        (4321, 0o755, 0, 0o1777, True, "Permission denied"),  # as in /tmp, where nobody can put another in its place
        (4321, 0o755, 0, 0o755, False, "belongs to user 4321"),
        (4321, 0o775, 0, 0o755, True, "others can write"),
        (4321, 0o755, 0, 0o777, True, "and others can write"),
        (4321, 0o755, 5678, 0o755, True, "to user 5678"),
        (1234, 0o755, 5678, 0o755, True, ""),
    ],
)
def test_whose_code_is_run(
    shared: Path, owner: int, mode: int, parent_owner: int, parent_mode: int, is_named: bool, says: str
) -> None:
    parent = shared / "above"
    folder = parent / "fastload-kernels"
    objects.write(folder, NAME, b"code", is_public=True)
    for path in (folder, folder / NAME):
        os.chown(path, owner, owner)
    os.chown(parent, parent_owner, parent_owner)
    folder.chmod(mode)
    parent.chmod(parent_mode)
    environ = {"FASTLOAD_KERNELS": str(folder)} if is_named else {"XDG_CACHE_HOME": str(parent)}
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER, NAME, "1234"],
        env={**os.environ, "FASTLOAD_KERNELS": "", **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    is_used = says in ("", "Permission denied")
    assert done.stdout.strip() == ("b'code'" if is_used else "None")
    assert says in done.stderr
    assert done.stderr.count("FASTLOAD_KERNELS") == (0 if not says else 1)


def test_many_processes_that_begin_at_once(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    started = command(source, cache)
    processes = [
        subprocess.Popen(**started, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # type: ignore[call-overload]
        for _ in range(8)
    ]
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    # One has compiled while the others waited for it, and one has said so.
    assert sorted(output for output, _ in said) == ["7 8 compiled\n", *["7 8 loaded\n"] * 7]
    assert [log.count(ANNOUNCED) for _, log in said].count(1) == "".join(log for _, log in said).count(ANNOUNCED) == 1
    assert len(list(cache.iterdir())) == 1


def test_one_process_of_a_job_says_that_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a job whose processes begin at once, and which compile one after another."""
    monkeypatch.setenv("FASTLOAD_KERNELS", str(tmp_path / "cache"))
    with objects.alone():
        assert objects.is_first_to_compile()
        objects.keep("example-1.x86-64-v3.o", b"code")
        assert not objects.is_first_to_compile()
    os.utime(tmp_path / "cache/example-1.x86-64-v3.o", (1, 1))
    assert objects.is_first_to_compile()
    monkeypatch.setenv("FASTLOAD_KERNELS", "/dev/null")  # nobody can keep anything: all compile all
    assert objects.is_first_to_compile()


def test_why_the_installation_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "INSTALLED", tmp_path / "compiled")
    assert objects.why_not_installed(NAME) == f"pip has not installed it ({tmp_path / 'compiled'} has none)"
    objects.write(objects.INSTALLED, NAME.replace("v3", "v4"), b"code")
    assert objects.why_not_installed(NAME) == (
        "it was installed for other processors than this one, which is of level x86-64-v3"
    )
    objects.write(objects.INSTALLED, NAME.replace("0123", "4567"), b"code")
    assert objects.why_not_installed(NAME) == "its source has changed since it was installed"
    objects.write(objects.INSTALLED, NAME, b"code")
    assert objects.why_not_installed(NAME) == f"{objects.INSTALLED / NAME} is damaged"


def test_whoever_compiles_may_be_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_KERNELS", str(tmp_path / "cache"))
    code = (
        "import sys, time; from fastload.kernels import objects\n"
        "with objects.alone(): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        # Nobody waits for ever, either.
        monkeypatch.setattr(objects, "_ALONE_S_MAX", 0.1)
        with objects.alone():
            pass
        monkeypatch.undo()
        monkeypatch.setenv("FASTLOAD_KERNELS", str(tmp_path / "cache"))
        process.send_signal(signal.SIGKILL)
        with objects.alone():
            pass


def test_what_is_old_goes(tmp_path: Path) -> None:
    for number in range(12):
        objects.write(tmp_path / "cache", f"example-{number:02}.x86-64-v3.o", b"code")
        os.utime(tmp_path / "cache" / f"example-{number:02}.x86-64-v3.o", (number, number))
    objects.write(tmp_path / "cache", "example-00.x86-64-v2.o", b"code")
    (tmp_path / "cache" / f"{NAME}.1-2.tmp").touch()
    os.utime(tmp_path / "cache" / f"{NAME}.1-2.tmp", (1, 1))
    (tmp_path / "cache" / f"{NAME}.1-3.tmp").touch()  # somebody writes it
    objects.write(tmp_path / "cache", "example-12.x86-64-v3.o", b"code")
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    kept = {f"example-{number:02}.x86-64-v3.o" for number in range(5, 13)}
    assert names == kept | {"example-00.x86-64-v2.o", f"{NAME}.1-3.tmp"}
