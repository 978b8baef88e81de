"""`fastload warm` and `fastload.warm`: what they are told, what they say, and how they end."""

from __future__ import annotations

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload import cli, protocol
from fastload.cli.warm_tasks import Asked, task_of_run
from fastload.client.cache import Handle
from fastload.config import format_bytes
from fastload.errors import ConfigError, ObjectMissingError
from fastload.formats import tokens
from fastload.history.archive import Archive
from fastload.history.record import Recorder
from fastload.prepare import EarlierRun
from fastload.store.types import ObjectInfo
from tests.conftest import Bucket
from tests.daemon.running import Daemon
from tests.processes import service_pids, until
from tests.programs import Program, run_cli
from tests.shards import Corpus, corpus

LIMITS = ("--ram-bytes=4MiB", "--disk-bytes=64MiB", "--chunk-bytes=64KiB")


@pytest.fixture(autouse=True)
def _short_lived_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.2")


@pytest.fixture
def data(s3: Bucket) -> Corpus:
    """Six shards, under `train/`."""
    found = corpus()
    for name, content in found.shards.items():
        s3.put(f"train/{name}", content)
    return found


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def warm(place: Path, *arguments: object, said: str | None = None) -> subprocess.CompletedProcess[str]:
    """`fastload warm`, to its end."""
    words = ("warm", f"--cache={place}", *LIMITS, *arguments)
    program = Program("from fastload.cli import main; main()", *words)
    printed, errors = program.communicate(said or "")
    until(lambda: not service_pids(place))
    return subprocess.CompletedProcess([*map(str, words)], program.returncode or 0, printed, errors)


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object, said: str = "") -> str:
    """What `fastload warm` says to words that it refuses at once, in this process: one line."""
    monkeypatch.setattr(sys, "argv", ["fastload", "warm", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed, errors = capsys.readouterr()
    assert (ended.value.code, printed) == (1, "")
    assert errors.startswith("fastload: ConfigError: ")
    assert errors.count("\n") == 1, errors
    return errors


def handle_of(place: Path) -> Handle:
    """Of a cache with the same limits."""
    return Handle(place, ram_bytes="4MiB", disk_bytes="64MiB", chunk_bytes="64KiB")


def size_of(data: Corpus) -> int:
    return sum(map(len, data.shards.values()))


def fetched_by(place: Path, url: str, **job: Any) -> int:
    """What a job fetches now."""
    with fastload.Cache(place) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, **job), batch_size=16)
        for _ in loader:
            pass
        fetched: int = loader.stats()["remote_bytes"]
        loader.close()
    until(lambda: not service_pids(place))
    return fetched


# What to warm


def test_a_list_has_blank_lines_and_comments(s3: Bucket, data: Corpus, place: Path, tmp_path: Path) -> None:
    names = [f"{s3.url}/train/{name}" for name in data.shards]
    text = "# the first half\n\n" + "\n".join(names[:3]) + "\n  \n#" + names[3] + "\r\n"
    done = warm(place, "--list=-", "--json", said=text)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["data"]
    assert found["shards"] == 3
    file = tmp_path / "list.txt"
    file.write_text("\n".join(names[3:5]))
    done = warm(place, names[5], f"--list={file}")
    assert "3 shards" in done.stderr


@pytest.mark.parametrize("shuffle", ["window", "shards", "global", "none"])
def test_each_order_is_that_of_a_job_which_fetches_nothing(s3: Bucket, data: Corpus, place: Path, shuffle: str) -> None:
    url = f"{s3.url}/train/"
    assert warm(place, url, f"--shuffle={shuffle}", "--seed=3").returncode == 0
    assert fetched_by(place, url, shuffle=False if shuffle == "none" else shuffle, seed=3) == 0


def test_the_old_flags_still_work(s3: Bucket, data: Corpus, place: Path) -> None:
    url = f"{s3.url}/train/"
    for words in (["--shuffle", url], ["--no-shuffle", url], [url, "--shuffle"]):
        assert warm(place, *words, "--dry-run").returncode == 0


def test_a_job_file_may_hold_one_table_or_several(s3: Bucket, data: Corpus, place: Path, tmp_path: Path) -> None:
    s3.put("more/0.tar", data.shards["shard-0000.tar"])
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text(f'urls = ["{s3.url}/train/"]\njob = {{seed = 3, shuffle = "shards"}}')
    done = warm(place, f"--job={one}", "--nodes=2", "--node=1")
    assert done.returncode == 0, done.stderr
    assert "one: 3 shards" in done.stderr
    done = warm(place, f"--job={one}")
    assert done.returncode == 0, done.stderr
    assert "one: 6 shards" in done.stderr
    second = f'name = "more"\nurls = ["{s3.url}/more/"]\npin = true'
    two.write_text(f'[[data]]\nurls = ["{s3.url}/train/"]\n[[data]]\n{second}')
    done = warm(place, f"--job={two}", "--json")
    assert done.returncode == 0, done.stderr
    first, more = json.loads(done.stdout)["data"]
    assert (first["name"], first["shards"], first["fetched_bytes"]) == ("two 1", 6, 0)
    assert (more["name"], more["shards"], more["fetched_bytes"]) == ("more", 1, len(data.shards["shard-0000.tar"]))


def test_a_profile_is_that_of_the_stores_credentials(
    s3: Bucket, data: Corpus, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[other]\naws_access_key_id = {os.environ['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {os.environ['AWS_SECRET_ACCESS_KEY']}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    assert warm(place, f"{s3.url}/train/", "--profile=other").returncode == 0
    assert warm(place, f"{s3.url}/train/", "--profile=nobody", "--check").returncode == 1


@pytest.mark.parametrize(
    ("words", "said", "says"),
    [
        ([], "", "name either URLs (or --list), or --job=FILE, or --from-history=RUN"),
        (["s3://b/", "--from-history=latest"], "", "not more than one"),
        (["--list=none.txt"], "", "--list=none.txt: it cannot be read: No such file or directory"),
        (["--list=-"], "# nothing\n\n", "--list=- names no URL; write one a line"),
        (["--list=-"], "s3://b/x.tar\n\tgopher://b/x.tar\n", "'gopher://b/x.tar': neither fastload nor fsspec"),
        (["--list=-"], "s3://b/{0..5.tar\n", "its braces do not match"),
        (["--job=none.toml"], "", "none.toml: it cannot be read: No such file or directory"),
        (["s3://b/", "--bandwidth=fast"], "", "--bandwidth='fast' is not a rate; write bytes a second"),
        (["s3://b/", "--bandwidth=0"], "", "--bandwidth=0 lets nothing through; leave it out for no limit"),
        (["s3://b/", "--bandwidth=-5MB/s"], "", "--bandwidth='-5MB/s' is not a rate"),
        (["s3://b/", "--deadline=yesterday"], "", "--deadline='yesterday' is not a length of time"),
        (["s3://b/", "--deadline=2001-01-01T00:00"], "", "--deadline=2001-01-01T00:00 has passed; give a time to come"),
        (["s3://b/", "--deadline=2001-13-01"], "", "--deadline=2001-13-01 is no time; write 2h, or 2027-01-31T08:00"),
        (["s3://b/", "--deadline=-5m"], "", "--deadline='-5m' is not a length of time"),
        (["s3://b/", "--deadline=0"], "", "--deadline='0' is not a length of time"),
        (["s3://b/", "--ttl=14d"], "", "--ttl=14d is that of a pin; add --pin, or leave it out"),
        (["s3://b/", "--pin", "--ttl=long"], "", "--ttl='long' is not a length of time"),
        (["s3://b/", "--shuffle=random"], "", "--shuffle=random must be window, shards, global or none"),
        (["s3://b/", "--shuffle-window=big"], "", "shuffle_window='big' is not a size"),
        (["s3://b/", "--shuffle-window=0"], "", "shuffle_window='0' must be at least 1 byte"),
        (["s3://b/", "--partitions=0"], "", "partitions=0 must be an integer of at least 1"),
        (["s3://b/", "--check", "--dry-run"], "", "--check, --dry-run and --daemon exclude each other"),
        (["s3://b/", "--ram-bytes=much"], "", "--ram-bytes='much' is not a size"),
        (["--from-history=latest", "--daemon"], "", "--daemon takes URLs, --list or --job"),
        (["--from-history=latest", "--pin"], "", "--pin goes with URLs, --list or --job"),
        (["--from-history=latest", "--shuffle-window=1GiB"], "", "--shuffle-window goes with URLs, --list or --job"),
        (["s3://b/", "--pin", "--ttl=0s"], "", "--ttl=0s would end the pin at once"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_cure(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
    says: str,
) -> None:
    assert says in refused(monkeypatch, capsys, f"--cache={place}", *words, said=said)
    assert not place.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("urls = 5", "urls: expected `array`, got `int`"),
        ('url = ["s3://b/"]', "url is no key; did you mean urls?"),
        ('urls = ["s3://b/"]\nseed = 3', "seed is no key"),
        ('urls = ["s3://b/"]\njob = {sed = 3}', "job.sed is no key; did you mean seed?"),
        ("urls = []", "urls is empty; name at least one shard, pattern or prefix"),
        ('urls = ["s3://b/"]\njob = {nodes = 2, node = 2}', "node=2 must be from 0 to nodes-1"),
        ("[[data", "it is no TOML"),
        ("data = []", "it has no [[data]] table; name what to warm in one"),
        ("data = [5]", "data[0]: expected `object`, got `int`"),
        ('urls = ["s3://$BUCKET_THAT_IS_NOT/"]', "the environment has no variable BUCKET_THAT_IS_NOT"),
        ('urls = ["s3://b/"]\nttl = "2d"', "ttl and quota are those of a pin"),
    ],
)
def test_a_job_file_that_cannot_be_is_one_line_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    file = tmp_path / "job.toml"
    file.write_text(text)
    error = refused(monkeypatch, capsys, f"--job={file}", f"--cache={tmp_path / 'cache'}")
    assert error.startswith(f"fastload: ConfigError: {file}: ")
    assert says in error


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nodes=1"], "node=1 must be from 0 to nodes-1"),
        (["--partitions=0"], "partitions=0 must be at least 1"),
        (["--ttl=2d"], "--ttl=2d is that of a pin"),
    ],
)
def test_options_hold_for_a_job_file_and_are_checked_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    file = tmp_path / "job.toml"
    file.write_text('urls = ["s3://b/"]\njob = {nodes = 2, node = 1}')
    assert says in refused(monkeypatch, capsys, f"--job={file}", f"--cache={tmp_path / 'cache'}", *words)


# Looking


def test_a_check_says_what_is_held_by_tier_and_fetches_nothing(s3: Bucket, data: Corpus, place: Path) -> None:
    url, total = f"{s3.url}/train/", size_of(data)
    before = warm(place, url, "--check", "--json")
    assert before.returncode == 3
    assert not place.exists()
    (found,) = json.loads(before.stdout)["data"]
    assert (found["held_bytes"], found["total_bytes"], found["shards"]) == (0, total, 6)
    first = f"{s3.url}/train/shard-0000.tar"
    assert warm(place, first).returncode == 0
    assert warm(place, first, "--check").returncode == 0
    some = warm(place, url, "--check")
    assert some.returncode == 3
    assert "6 shards: " in some.stdout
    assert " on disk, 0 B in RAM)" in some.stdout
    assert warm(place, url).returncode == 0
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    after = warm(place, url, "--check", "--json")
    assert after.returncode == 0, after.stderr
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == files  # no service was started for it
    (found,) = json.loads(after.stdout)["data"]
    assert found["disk_bytes"] == found["held_bytes"] == total
    assert json.loads(after.stdout)["is_complete"]


def test_a_dry_run_says_what_would_be_fetched(s3: Bucket, data: Corpus, place: Path) -> None:
    url, total = f"{s3.url}/train/", size_of(data)
    chunks = sum(-(-len(content) // (64 << 10)) for content in data.shards.values())
    done = warm(place, url, "--dry-run", "--bandwidth=1000", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["data"]
    assert (found["shards"], found["to_fetch_bytes"], found["requests"]) == (6, total, chunks)
    assert found["seconds"] == pytest.approx(total / 1000)
    assert f"to fetch in {chunks} requests; how long that takes is not known" in warm(place, url, "--dry-run").stdout
    assert warm(place, url).returncode == 0
    done = warm(place, url, "--dry-run", "--json")
    (found,) = json.loads(done.stdout)["data"]
    assert (found["to_fetch_bytes"], found["requests"], found["seconds"]) == (0, 0, 0.0)


def test_of_packed_shards_it_is_said_what_the_store_sends(s3: Bucket, place: Path) -> None:
    lines = b'{"a": 1}\n' * 50_000
    packed = gzip.compress(lines)
    s3.put("packed/a.jsonl.gz", packed)
    url = f"{s3.url}/packed/"
    (found,) = json.loads(warm(place, url, "--dry-run", "--json").stdout)["data"]
    assert (found["total_bytes"], found["stored_bytes"], found["to_fetch_bytes"]) == (len(lines), *[len(packed)] * 2)
    assert found["requests"] == 1
    sizes = f"{format_bytes(len(lines))} fetched ({format_bytes(len(packed))} packed)"
    assert sizes in warm(place, url).stderr


def test_of_a_prefix_only_shards_of_the_format_that_is_named(s3: Bucket, place: Path) -> None:
    (content,) = corpus(shard_count=1).shards.values()
    s3.put("mixed/a.tar", content)
    s3.put("mixed/a.jsonl", b'{"a": 1}\n')
    assert "a data set has one format" in warm(place, f"{s3.url}/mixed/", "--check").stderr
    for name, size in (("tar", len(content)), ("jsonl", 9)):
        done = warm(place, f"{s3.url}/mixed/", "--check", f"--format={name}", "--json")
        (found,) = json.loads(done.stdout)["data"]
        assert (found["shards"], found["total_bytes"]) == (1, size)
    job = place.with_name("job.toml")
    job.write_text(f'urls = ["{s3.url}/mixed/"]\njob = {{format = "tar"}}\n')
    done = warm(place, f"--job={job}", "--format=jsonl", "--check", "--json")
    assert json.loads(done.stdout)["data"][0]["total_bytes"] == 9


def test_what_a_run_read_can_be_looked_at_too(s3: Bucket, data: Corpus, place: Path) -> None:
    assert warm(place, f"{s3.url}/train/").returncode == 0
    assert warm(place, "--from-history=latest", "--check").returncode == 0
    with fastload.Cache(place) as cache:
        cache.clear()
    until(lambda: not service_pids(place))
    assert warm(place, "--from-history=latest", "--check").returncode == 3


# Pins and limits


@pytest.mark.parametrize(
    ("readers", "given", "how"),
    [
        (["s3://b/"], "auto", "auto"),
        (["s3://b/", "fastload.open"], "tokens(8)", tokens(8)),
        (["fastload.open"], "auto", None),
    ],
)
def test_what_data_sets_read_in_pieces_is_warmed_so(tmp_path: Path, readers: list[str], given: str, how: Any) -> None:
    recorder, archive = Recorder("train.py", 0.0, 1 << 20), Archive(tmp_path)
    for name in readers:
        recorder.read(recorder.begin_trace(name), 7, ObjectInfo("s3://b/a.jsonl", 1 << 30), 0, 0.0)
    archive.append(archive.new_name(0.0), recorder.take(1.0, {}).pieces())
    task = task_of_run(tmp_path, "latest", given, Asked(None, None, None, False, None))
    assert task.run == EarlierRun(["s3://b/a.jsonl"], how)


def test_what_is_pinned_stays_through_epochs_of_another_job(s3: Bucket, place: Path) -> None:
    """Which fills what the cache has left many times over."""
    kept, other = corpus(4, seed=1), corpus(12, seed=2)
    for prefix, data in (("kept", kept), ("other", other)):
        for name, content in data.shards.items():
            s3.put(f"{prefix}/{name}", content)
    disk_bytes = int(1.5 * size_of(kept))
    done = warm(place, f"{s3.url}/kept/", "--pin", f"--disk-bytes={disk_bytes}", "--ram-bytes=1MiB")
    assert done.returncode == 0, done.stderr
    for epoch in range(2):
        assert fetched_by(place, f"{s3.url}/other/", shuffle=True, seed=epoch) > 0
    assert fetched_by(place, f"{s3.url}/kept/", shuffle=True) == 0


def test_a_bandwidth_is_not_exceeded_by_a_real_store(s3: Bucket, data: Corpus, place: Path) -> None:
    began, total = time.monotonic(), size_of(data)
    done = warm(place, f"{s3.url}/train/", f"--bandwidth={total // 3}")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began > 0.95 * 3 * (1 - (64 << 10) / total)


def test_what_is_damaged_on_disk_is_found_and_fetched_again(s3: Bucket, data: Corpus, place: Path) -> None:
    url = f"{s3.url}/train/"
    done = warm(place, url, "--verify")
    assert done.returncode == 0, done.stderr
    assert "read back, and is sound" in done.stderr
    files = [path for path in (place / "chunks").rglob("*") if path.is_file() and path.stat().st_size > 4096]
    with files[0].open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    checked = warm(place, url, "--check", "--verify", "--json")
    assert (checked.returncode, json.loads(checked.stdout)["damaged_chunks"]) == (4, 1)
    done = warm(place, url, "--verify", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["damaged_chunks"], found["is_complete"]) == (0, 1, True)
    assert 0 < found["data"][0]["fetched_bytes"] <= 64 << 10
    assert warm(place, url, "--check", "--verify").returncode == 0


# Handing over


def test_a_daemon_takes_it_over_and_its_id_is_printed(s3: Bucket, data: Corpus, place: Path, tmp_path: Path) -> None:
    url = f"{s3.url}/train/"
    file = tmp_path / "job.toml"
    file.write_text(f'urls = ["{url}shard-0000.tar"]\nname = "costs $$HOME"')
    handle_of(place).close()  # which makes the directory
    with Daemon(place, None) as daemon:
        done = run_cli("warm", url, "--daemon", f"--cache={place}", "--pin", "--deadline=2h", "--seed=3")
        (number,) = done.stdout.split()
        job = daemon.wait_done(number)
        assert (job.held_bytes, job.total_bytes) == (size_of(data), size_of(data))
        done = run_cli("warm", f"--job={file}", "--daemon", f"--cache={place}", "--json")
        (number,) = json.loads(done.stdout)["ids"]
        assert daemon.wait_done(number).name == "costs $HOME"


def test_without_a_daemon_it_is_not_handed_over(place: Path) -> None:
    done = run_cli("warm", "s3://b/x.tar", "--daemon", f"--cache={place}", check=False)
    assert done.returncode == 3
    assert "no cache service runs for" in done.stderr


# How it ends


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_a_word_on_what_is_held(
    s3: Bucket, data: Corpus, place: Path, number: signal.Signals, code: int
) -> None:
    total = size_of(data)
    words = ("warm", f"{s3.url}/train/", f"--cache={place}", *LIMITS, f"--bandwidth={total // 10}")
    program = Program("from fastload.cli import main; main()", *words)
    with handle_of(place) as handle, handle.consumer() as consumer:
        until(lambda: consumer.stats()["node"]["written_chunks"] >= 2)
    os.kill(program.pid, number)
    _, errors = program.communicate()
    assert program.returncode == code
    assert "Traceback" not in errors
    assert " are held, and stay; the same command goes on from there." in errors
    assert "Stopped: 0 B" not in errors
    until(lambda: not service_pids(place))
    done = warm(place, f"{s3.url}/train/", "--json")
    (found,) = json.loads(done.stdout)["data"]
    assert 0 < found["fetched_bytes"] < total
    assert found["held_bytes"] == total


def test_a_signal_before_anything_was_listed_says_so(place: Path, tmp_path: Path) -> None:
    """The store does not answer."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.tar"
        program = Program("from fastload.cli import main; main()", "warm", url, f"--cache={place}", *LIMITS)
        connection, _ = server.accept()
        os.kill(program.pid, signal.SIGTERM)
        _, errors = program.communicate()
        connection.close()
    assert program.returncode == 143
    assert "Stopped before anything was fetched" in errors
    until(lambda: not service_pids(place))


def test_in_a_pipe_it_says_that_it_begins(s3: Bucket, data: Corpus, place: Path) -> None:
    assert warm(place, f"{s3.url}/train/").stderr.startswith("warming: begun\n")


def test_a_deadline_that_passed_meanwhile_is_said(s3: Bucket, data: Corpus, place: Path) -> None:
    done = warm(place, f"{s3.url}/train/", "--deadline=1ms")
    assert done.returncode == 0
    assert "The deadline has passed " in done.stderr


# In Python


def test_the_function_warms_for_a_job_and_says_how_far_it_is(s3: Bucket, data: Corpus, place: Path) -> None:
    seen = list[tuple[int, int]]()
    with fastload.Cache(place, ram_bytes="4MiB", disk_bytes="64MiB", chunk_bytes="64KiB") as cache:
        nothing = fastload.warm(f"{s3.url}/train/", cache=cache, check=True)
        assert (nothing.held_bytes, nothing.total_bytes, nothing.is_complete) == (0, size_of(data), False)
        done = fastload.warm(
            [f"{s3.url}/train/"], cache=cache, shuffle=True, seed=3, on_progress=lambda *each: seen.append(each)
        )
        assert done.is_complete
        assert (done.object_count, done.sample_count) == (6, len(data.samples))
        assert done.fetched_bytes == size_of(data)
        assert seen[-1] == (size_of(data), size_of(data))
        assert fastload.warm(f"{s3.url}/train/", cache=cache, check=True).is_complete
    until(lambda: not service_pids(place))
    assert fetched_by(place, f"{s3.url}/train/", shuffle=True, seed=3) == 0


def test_it_may_pin_under_a_name(s3: Bucket, data: Corpus, place: Path) -> None:
    with fastload.Cache(place, ram_bytes="4MiB", disk_bytes="64MiB", chunk_bytes="64KiB") as cache:
        fastload.warm(f"{s3.url}/train/", cache=cache, pin="train", ttl="14d")
        with cache._handle.consumer() as consumer:
            consumer.attach(consumer.resolve([f"{s3.url}/train/"], [".tar"]))
            assert consumer.held().pinned_bytes == size_of(data)
    until(lambda: not service_pids(place))


def test_one_node_of_several_warms_its_part(s3: Bucket, data: Corpus, place: Path) -> None:
    with fastload.Cache(place, ram_bytes="4MiB", disk_bytes="64MiB", chunk_bytes="64KiB") as cache:
        parts = [fastload.warm(f"{s3.url}/train/", cache=cache, nodes=2, node=node, check=True) for node in range(2)]
    assert sum(part.object_count for part in parts) == 6
    assert all(part.object_count == 3 for part in parts)
    until(lambda: not service_pids(place))


def test_what_goes_on_past_shards_that_cannot_be_had_names_them(s3: Bucket, data: Corpus, place: Path) -> None:
    from fastload import prepare
    from fastload.plan import RequestedOrder

    bad = f"{s3.url}/train/shard-0002.tar"
    s3.put("train/shard-0002.tar", b"\x5a" * 200_000)
    job = prepare.WarmJob([f"{s3.url}/train/"], RequestedOrder())
    with handle_of(place) as handle:
        with pytest.raises(fastload.ShardError):
            prepare.warm(job, handle)
        done = prepare.warm(job, handle, terms=protocol.WarmTerms(goes_on=True))
    assert list(done.failed) == [bad]
    assert isinstance(done.failed[bad], fastload.ShardError)
    assert not done.is_complete
    assert done.held_bytes == done.total_bytes
    until(lambda: not service_pids(place))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"shuffle": "random"}, 'shuffle=\'random\' must be "window", "shards", "global" or "none"'),
        ({"shuffle_window": 0}, "shuffle_window=0 must be at least 1 byte"),
        ({"node": 2, "nodes": 2}, "node=2 must be from 0 to 1, since nodes=2"),
        ({"nodes": 0}, "nodes=0 must be an integer of at least 1"),
        ({"epoch": -1}, "epoch=-1 must be an integer from 0 on"),
        ({"seed": "3"}, "seed='3' must be an integer"),
        ({"bandwidth": 0}, "bandwidth=0 lets nothing through"),
        ({"bandwidth": "fast"}, "bandwidth='fast' is not a rate"),
        ({"deadline": -1}, "deadline=-1 is not a length of time"),
        ({"deadline": 0}, "deadline=0 has passed"),
        ({"pin": ""}, "pin='' must be True, False, or a name"),
        ({"ttl": "14d"}, "ttl='14d' is that of a pin; add pin=True, or leave it out"),
        ({"pin": True, "ttl": "long"}, "ttl='long' is not a length of time"),
        ({"index": 5}, "index=5 must be the path of a file"),
        ({"cache": 5}, "cache=5 must be a fastload.Cache"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_is_done(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        fastload.warm("s3://bucket/train/", **arguments)
    assert says in str(error.value)


def test_errors_of_the_store_come_as_they_are(s3: Bucket, place: Path) -> None:
    with handle_of(place) as cache, pytest.raises(ObjectMissingError):
        fastload.warm(f"{s3.url}/none.tar", cache=cache)
    until(lambda: not service_pids(place))
