"""`fastload cache`, with a service in a process of its own and without one: what is held, kept, removed and checked."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastload.cache import catalog
from fastload.cache.catalog import UNKNOWN
from fastload.cli import exits
from fastload.client.cache import Handle
from tests.processes import service_pids, until
from tests.programs import run_cli

CHUNK_BYTES = 64 << 10
SIZE = 2 * CHUNK_BYTES + 1000


def warm(directory: Path, urls: list[str], **limits: Any) -> None:
    """Have the disk hold these, and wait for that."""
    sizes = {"ram_bytes": "4MiB", "disk_bytes": "16MiB", "chunk_bytes": CHUNK_BYTES, **limits}
    with Handle(directory, **sizes) as handle, handle.consumer(name="warm") as consumer:
        consumer.attach(consumer.resolve(urls, ("",)))
        consumer.set_plan(range(consumer.object_count), warm=True)
        progress = None
        while progress is None or not progress.finished:
            progress = consumer.wait_progress(progress)
        assert progress.held_chunks == progress.total_chunks


def ended(directory: Path) -> None:
    until(lambda: not service_pids(directory))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for folder in ("train", "val"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            (tmp_path / folder / f"{number}.tar").write_bytes(os.urandom(SIZE))
    return tmp_path


@pytest.fixture(params=[True, False], ids=["served", "alone"])
def cache(request: pytest.FixtureRequest, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache that holds all six files; its service runs, or has ended."""
    monkeypatch.setenv("FASTLOAD_IDLE_S", "600" if request.param else "0.1")
    directory = data / "cache"
    warm(directory, [f"{data}/train/", f"{data}/val/"])
    if request.param:
        pids = service_pids(directory)
        assert len(pids) == 1
        until(lambda: {each["data_set"] for each in listed(directory)} == {f"{data}/train/", f"{data}/val/"})
        yield directory
        assert service_pids(directory) == pids
        os.kill(pids[0], signal.SIGTERM)
    else:
        ended(directory)
        yield directory
    ended(directory)


def fastload(verb: str, directory: Path, *arguments: object, code: int = 0) -> Any:
    done = run_cli("cache", verb, *map(str, arguments), "--json", f"--cache={directory}", check=False)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def listed(directory: Path, *what: object, code: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fastload("ls", directory, *what, code=code)
    return found


@pytest.mark.thorough
def test_listing_by_name(data: Path, cache: Path) -> None:
    found = listed(cache)
    assert [each["url"] for each in found] == [f"{data}/{name}/{n}.tar" for name in ("train", "val") for n in range(3)]
    assert {(each["size"], each["chunk_count"], each["data_set"]) for each in found[:3]} == {
        (SIZE, 3, f"{data}/train/")
    }
    assert all(each["used_at"] > 1.7e9 and each["disk_bytes"] >= SIZE for each in found)
    assert len(listed(cache, f"{data}/train/")) == len(listed(cache, f"{data}/train/{{0..2}}.tar")) == 3
    assert listed(cache, f"{data}/train/7.tar", code=exits.PARTIAL) == []
    text = run_cli("cache", "ls", f"--cache={cache}").stdout.splitlines()
    assert len(text) == 7
    assert text[1].split()[-1] == f"{data}/train/0.tar"


def test_how_much_is_held_by_data_set(data: Path, cache: Path) -> None:
    rows = {row["name"]: row for row in fastload("du", cache)}
    assert {name: row["object_count"] for name, row in rows.items()} == {f"{data}/train/": 3, f"{data}/val/": 3}
    assert all(row["byte_count"] == 3 * SIZE <= row["disk_bytes"] for row in rows.values())
    assert f"{data}/train/" in run_cli("cache", "du", f"--cache={cache}").stdout


def test_what_is_in_ram_only_is_shown_while_a_service_runs(data: Path) -> None:
    limits = {"ram_bytes": "4MiB", "disk_bytes": 0, "chunk_bytes": CHUNK_BYTES}
    with Handle(data / "cache", service="inprocess", **limits) as handle, handle.consumer(name="job") as consumer:
        consumer.attach(consumer.resolve([f"{data}/train/0.tar"], ("",)))
        with consumer.acquire([0]):
            (row,) = fastload("du", data / "cache")
            assert (row["name"], row["ram_bytes"], row["disk_bytes"]) == (f"{data}/train/", CHUNK_BYTES, 0)
            assert listed(data / "cache", code=exits.PARTIAL) == []


@pytest.mark.thorough
def test_pinning_and_unpinning(data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastload("pin", cache, f"{data}/train/{{0..1}}.tar", "--name=mine", "--ttl=14d") == {"byte_count": 2 * SIZE}
    rows = {row["name"]: row for row in fastload("du", cache)}
    assert rows["mine"]["pinned_bytes"] == 2 * SIZE
    assert [each["pins"] for each in listed(cache, f"{data}/train/")] == [["mine"], ["mine"], []]
    done = run_cli("cache", "pin", f"{data}/train/", "--quota=1KB", f"--cache={cache}", check=False)
    assert done.returncode == exits.FAILED
    assert "names 386.9 KiB, and its quota is 1000 B" in done.stderr
    kept = fastload("evict", cache, f"{data}/train/", code=exits.PARTIAL)
    assert kept["pinned_bytes"] == 2 * SIZE
    assert kept["freed_bytes"] >= SIZE
    fastload("clear", cache)
    assert {each["url"] for each in listed(cache)} == {f"{data}/train/0.tar", f"{data}/train/1.tar"}
    assert fastload("unpin", cache, f"{data}/train/1.tar") == {"byte_count": SIZE, "names": ["mine"]}
    assert fastload("unpin", cache, "mine") == {"byte_count": SIZE, "names": ["mine"]}
    assert fastload("unpin", cache, "mine", code=exits.PARTIAL) == {"byte_count": 0, "names": []}
    fastload("clear", cache)
    assert listed(cache, code=exits.PARTIAL) == []


def test_evicting(data: Path, cache: Path) -> None:
    assert fastload("evict", cache, f"{data}/val/1.tar")["freed_bytes"] >= SIZE
    assert len(listed(cache)) == 5
    assert fastload("evict", cache, f"{data}/val/")["freed_bytes"] >= 2 * SIZE
    assert len(listed(cache)) == 3
    assert fastload("evict", cache, f"{data}/val/", code=exits.PARTIAL)["freed_bytes"] == 0


def test_verifying(data: Path, cache: Path) -> None:
    assert fastload("verify", cache) == {
        "chunk_count": 18, "skipped_chunks": 0, "is_repaired": False, "damaged": []
    }  # fmt: skip
    victim = next(path for path in sorted((cache / "chunks").rglob("*.chunk")))
    with victim.open("r+b") as file:
        file.seek(10)
        file.write(b"damage")
    before = victim.read_bytes()
    found = fastload("verify", cache, code=exits.DAMAGED)
    (damaged,) = found["damaged"]
    assert damaged["chunk"] == victim.stem
    assert damaged["url"].startswith(str(data))
    assert victim.read_bytes() == before
    assert fastload("verify", cache, damaged["url"], code=exits.DAMAGED)["chunk_count"] == 3
    text = run_cli("cache", "verify", f"--cache={cache}", check=False)
    assert f"damaged: {damaged['url']}" in text.stdout
    assert "--repair" in text.stdout
    assert fastload("verify", cache, "--repair", code=exits.DAMAGED)["is_repaired"]
    assert not victim.exists()
    assert fastload("verify", cache)["chunk_count"] == 17
    fastload("verify", cache, f"{data}/nothing/", code=exits.PARTIAL)


def test_looking_without_a_service_changes_no_file(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.1")
    directory = data / "cache"
    warm(directory, [f"{data}/train/"])
    ended(directory)
    chunk = next((directory / "chunks").rglob("*.chunk"))
    cut = chunk.with_name(chunk.name.replace("-00000000", "-00000100").replace("-00000001", "-00000101"))
    cut = cut.with_name(cut.name.replace("-00000002", "-00000102"))
    cut.write_bytes(b"cut by a crash")
    left = cut.with_name(f".tmp-{1 << 21}-1-0-0")
    left.write_bytes(b"by a process that was killed")

    def files() -> dict[str, tuple[int, int]]:
        found = (path for path in directory.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}

    before = files()
    assert len(listed(directory)) == 3
    fastload("du", directory)
    found = fastload("verify", directory, code=exits.DAMAGED)
    assert [each["chunk"] for each in found["damaged"]] == [cut.stem]
    assert files() == before
    assert not service_pids(directory)
    left.unlink()


@pytest.mark.parametrize("is_served", [True, False])
def test_without_a_catalog_chunks_are_unknown(data: Path, is_served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.1")
    directory = data / "cache"
    warm(directory, [f"{data}/train/"])
    ended(directory)
    (directory / catalog.NAME).write_bytes(b"no catalog" * 1000)
    done = run_cli("cache", "ls", "--json", f"--cache={directory}")
    assert "catalog" in done.stderr
    assert {each["data_set"] for each in json.loads(done.stdout)} == {UNKNOWN}
    assert len(json.loads(done.stdout)) == 3
    assert fastload("verify", directory)["chunk_count"] == 9


def test_where_there_is_no_cache_none_is_made(tmp_path: Path) -> None:
    for verb in (["ls"], ["du"], ["verify"], ["clear"], ["evict", "x"], ["unpin", "x"]):
        done = run_cli("cache", *verb, f"--cache={tmp_path / 'none'}", check=False)
        assert done.returncode == exits.FAILED
        assert "there is no cache at" in done.stderr
    assert not (tmp_path / "none").exists()
