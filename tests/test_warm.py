"""`fastload warm` fills a cache for exactly one job, which then fetches nothing."""

import io
import json
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

import fastload
from fastload.cli.cache_options import shown
from fastload.history.archive import Archive
from fastload.history.library import Library
from tests.processes import service_pids, until
from tests.programs import run_cli
from tests.shards import check_samples, corpus, samples_of


def warm(url: str, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    limits = ("--ram-bytes=1MiB", "--chunk-bytes=64KiB")
    done = run_cli("warm", url, "--cache", directory, *limits, *options, check=False)
    until(lambda: not service_pids(directory))
    return done


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_job_that_follows_fetches_nothing(s3, tmp_path: Path, shuffle: bool) -> None:
    data = corpus()
    url, directory = data.put(s3), tmp_path / "cache"
    done = warm(url, directory, "--disk-bytes=64MiB", "--shuffle" if shuffle else "--no-shuffle", "--seed=3")
    assert done.returncode == 0, done.stderr
    assert f"{len(data.shards)} shards, {len(data.samples)} samples" in done.stderr
    with fastload.Cache(directory) as cache:
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=shuffle, seed=3)
        # Nothing was read yet, and the number of samples is known.
        assert len(dataset) == len(data.samples)
        loader = fastload.DataLoader(dataset, batch_size=16)
        keys = [key for batch in loader for key in check_samples(data, samples_of(batch))]
        assert sorted(keys) == sorted(data.samples)
        stats = loader.stats()
        assert stats["fetched_bytes"] == stats["remote_bytes"] == 0
        loader.close()
    again = warm(url, directory, "--seed=3")
    assert again.returncode == 0
    assert "0 B fetched" in again.stderr


def test_what_was_warmed_is_remembered_as_a_run(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order, also where all was there; so a cache that was emptied can be filled with it again."""
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.2")
    data = corpus()
    url, directory = data.put(s3), tmp_path / "cache"
    for _ in range(2):
        assert warm(url, directory, "--disk-bytes=64MiB", "--seed=3").returncode == 0
    archive = Archive(directory)
    again, first = (archive.read(each) for each in archive.runs())
    chunks = sum(-(-len(content) // (64 << 10)) for content in data.shards.values())
    assert len(first.reads) == len(again.reads) == chunks
    assert first.summary.traces == {"warm": 1}
    assert first.summary.read_bytes == sum(map(len, data.shards.values()))
    orders = [[info.url for info in run.objects] for run in (first, again)]
    assert orders[0] == orders[1] != sorted(orders[0])
    assert len(orders[0]) == len(data.shards)
    # Whoever reads in an order that nobody told is not led by it.
    assert len(Library([first, again], 64 << 10)) == 0
    # What was found out about the store serves the next run.
    (endpoint,) = first.summary.endpoints.values()
    assert endpoint.request_count > 0

    with fastload.Cache(directory) as cache:
        assert cache.clear() > 0
    until(lambda: not service_pids(directory))
    done = run_cli("warm", "--from-history=latest", "--cache", directory)
    assert f"{len(data.shards)} objects" in done.stderr
    assert "0 B fetched" not in done.stderr
    until(lambda: not service_pids(directory))


def test_a_cache_that_is_too_small_says_so(s3, tmp_path: Path) -> None:
    data = corpus()
    done = warm(data.put(s3), tmp_path / "cache", "--disk-bytes=300KiB")
    assert done.returncode == 3, done.stderr
    assert "The cache is full: raise disk_bytes" in done.stderr
    assert re.search(r"\d.* KiB of .* cached", done.stderr)


@pytest.mark.parametrize(
    ("url", "says"),
    [("s3://no-such-bucket/x.tar", "ObjectMissingError"), ("{bucket}/none/", "ObjectMissingError")],
)
def test_errors_are_one_line(s3, tmp_path: Path, url: str, says: str) -> None:
    done = warm(url.format(bucket=s3.url), tmp_path / "cache", "--disk-bytes=1MiB")
    assert done.returncode == 1
    assert f"fastload: {says}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_node_that_the_job_does_not_have_and_an_epoch_that_never_is(tmp_path: Path) -> None:
    done = warm("s3://bucket/", tmp_path / "cache", "--nodes=2", "--node=2")
    assert "fastload: ConfigError: --node=2 must be from 0 to 1, since --nodes=2" in done.stderr
    done = warm("s3://bucket/", tmp_path / "cache", "--epoch=-1")
    assert done.returncode == 2
    assert "--epoch" in done.stderr


def test_a_damaged_shard_is_named_and_holds_up_no_others(s3, tmp_path: Path) -> None:
    (sound,) = corpus(shard_count=1).shards.values()
    s3.put("bad/0.tar", b"\x5a" * 200_000)
    s3.put("bad/1.tar", sound)
    done = warm(f"{s3.url}/bad/", tmp_path / "cache", "--disk-bytes=1MiB", "--shuffle=none", "--json")
    assert done.returncode == 3
    assert f"failed: {s3.url}/bad/0.tar: ShardError: " in done.stderr
    assert "The cache is full" not in done.stderr
    (found,) = json.loads(done.stdout)["data"]
    assert list(found["failed"]) == [f"{s3.url}/bad/0.tar"]
    assert found["held_bytes"] == found["fetched_bytes"] == 200_000 + len(sound)


def test_a_bar_says_what_is_done_once_its_size_is_known() -> None:
    drawn = io.StringIO()
    with shown(Console(file=drawn, force_terminal=True, width=80), "indexing", "shards") as bar:
        bar.show(3, 7)
    before, _, after = drawn.getvalue().partition("indexing")
    assert "listing" in before
    assert "3/7" in after
