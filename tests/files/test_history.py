"""A data set of single objects, read in the same order by two jobs: the second has its objects before it asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.history.archive import Archive
from fastload.history.record import Recorder
from fastload.store.types import ObjectInfo
from tests.conftest import Bucket
from tests.files.test_open import content
from tests.processes import service_pids, until
from tests.programs import run, run_cli

COUNT = 60

# As users write it: a map-style data set, a seeded sampler, two worker processes. Prints what the service counted.
JOB = """
import json, sys
import torch.utils.data
import fastload

class Objects(torch.utils.data.Dataset):
    def __init__(self, urls, cache):
        self.urls, self.cache = urls, cache
    def __len__(self):
        return len(self.urls)
    def __getitem__(self, number):
        with fastload.open(self.urls[number], self.cache) as file:
            return len(file.read())

if __name__ == "__main__":
    cache = fastload.Cache(sys.argv[1], **json.loads(sys.argv[2]))
    urls = sys.argv[3:]
    order = torch.randperm(len(urls), generator=torch.Generator().manual_seed(3)).tolist()
    loader = torch.utils.data.DataLoader(Objects(urls, cache), batch_size=4, num_workers=2, sampler=order)
    read = sum(int(batch.sum()) for batch in loader)
    node = cache.stats()
    print(json.dumps({"read": read, **{name: node[name] for name in ("replayed_reads", "fetched_chunks")}}))
"""


@pytest.fixture
def urls(s3: Bucket) -> list[str]:
    return [s3.put(f"{number:03d}", content(3000 + number, number)) for number in range(COUNT)]


def job(folder: Path, urls: list[str], **limits: Any) -> dict[str, int]:
    """Run it, and wait until its service has ended."""
    settings = json.dumps({"ram_bytes": "8MiB", "disk_bytes": 0, "chunk_bytes": "64KiB"} | limits)
    done = run(JOB, folder / "cache", settings, *urls, path=folder / "job.py")
    until(lambda: not service_pids(folder / "cache"))
    found: dict[str, int] = json.loads(done.stdout)
    return found


def history(folder: Path, *arguments: str) -> str:
    """What `fastload history` says."""
    return run_cli("history", *arguments, "--cache", folder / "cache").stdout


def test_the_second_job_is_fetched_ahead_and_not_with_history_switched_off(
    urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "2")  # the job asks for its figures after its last worker has gone
    read = sum(3000 + number for number in range(COUNT))
    first, second, off = job(tmp_path, urls), job(tmp_path, urls), job(tmp_path, urls, history_bytes=0)
    assert [each["read"] for each in (first, second, off)] == [read] * 3
    assert [each["fetched_chunks"] for each in (first, second, off)] == [COUNT] * 3
    assert first["replayed_reads"] == off["replayed_reads"] == 0
    assert second["replayed_reads"] >= 0.9 * COUNT

    runs = json.loads(history(tmp_path, "ls", "--json"))
    assert [each["program"] for each in runs] == ["job.py"] * 2
    assert [(each["read_count"], each["object_count"]) for each in runs] == [(COUNT, COUNT)] * 2
    assert runs[0]["lanes"]["fastload.open"] == 2
    shown = json.loads(history(tmp_path, "show", "latest", "--json", "--reads", "3"))
    assert shown["run"] == runs[0]["run"]
    assert all(url in urls for _, _, _, url in shown["reads"])
    assert runs[0]["run"] in history(tmp_path, "ls")
    assert "60 reads of 60 objects" in history(tmp_path, "show", runs[1]["run"], "--reads", "2")
    history(tmp_path, "rm", runs[0]["run"])
    assert [each["run"] for each in json.loads(history(tmp_path, "ls", "--json"))] == [runs[1]["run"]]


def test_a_cache_is_warmed_with_what_a_run_read(
    s3: Bucket, urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.2")
    odd = s3.put("a {strange} name", content(5000, 99))
    job(tmp_path, [*urls, odd])
    s3.delete(urls[7].rpartition("/")[2])
    done = run_cli("warm", "--from-history=latest", "--cache", tmp_path / "cache", "--disk-bytes=64MiB")
    assert f"{COUNT} objects, 1 are gone" in " ".join(done.stderr.split())
    until(lambda: not service_pids(tmp_path / "cache"))
    left = [url for url in [*urls, odd] if url != urls[7]]
    with fastload.Cache(tmp_path / "cache") as cache:
        assert sum(len(fastload.open(url, cache).read()) for url in left) > 0
        assert cache.stats()["fetched_chunks"] == 0


def test_clearing_leaves_history_unless_told(urls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.2")
    job(tmp_path, urls, disk_bytes="64MiB")
    with fastload.Cache(tmp_path / "cache") as cache:
        assert cache.clear() >= 3000 * COUNT
        assert cache.stats()["disk_used_bytes"] == 0
        assert len(json.loads(history(tmp_path, "ls", "--json"))) == 1
        assert cache.clear(history=True) > 0
        assert json.loads(history(tmp_path, "ls", "--json")) == []
        assert cache.clear() == 0


def test_names_are_shown_as_they_are_and_damage_is_named(tmp_path: Path) -> None:
    url = "s3://bucket/[bold]" + "a" * 100
    recorder = Recorder("[red]train\x1b[31m.py", 1.8e9, 65536)
    recorder.read(recorder.begin_trace("reader"), 1, ObjectInfo(url, 10, "e", -1), 0, 0.0)
    (tmp_path / "cache").mkdir()
    archive = Archive(tmp_path / "cache")
    archive.append("20270115-080000-00000000", recorder.take(9.0, {}).pieces())
    archive.append("20270116-080000-00000000", [b"damaged"])
    listed = history(tmp_path, "ls")
    assert "(damaged)" in listed
    assert "[red]train\\x1b[31m.py" in listed
    shown = history(tmp_path, "show", "20270115", "--reads", "1")
    assert url in shown
    assert "\x1b" not in listed + shown
    done = run_cli("history", "show", "latest", "--cache", tmp_path / "cache", check=False)
    assert done.returncode == 1
    assert "is damaged; `fastload history rm 20270116-080000-00000000` removes it" in done.stderr
    history(tmp_path, "rm", "latest", "20270115", "20270115-080000-00000000")
    assert archive.runs() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["history", "show", "nothing"], "there is no run 'nothing'"),
        (["history", "rm"], "name the runs to forget, or --all"),
        (["warm", "--from-history=2020"], "there is no run '2020'"),
        (["warm"], "name either URLs (or --list), or --job=FILE, or --from-history=RUN"),
    ],
)
def test_errors_are_one_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0)
    done = run_cli(*arguments, "--cache", cache.directory, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("fastload: ConfigError: ")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
