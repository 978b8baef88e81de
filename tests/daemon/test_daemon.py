"""A real daemon warms, keeps, reloads, hands over and is killed; jobs beside it lose nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastload
from bench.proxy import Profile, Proxy
from fastload.cache import CacheDirectory
from fastload.cache.catalog import Catalog
from fastload.client.operator import NotServedError, Operator
from fastload.daemon.config import DataTable
from fastload.daemon.submission import submit
from fastload.errors import CacheError, ConfigError, ServiceError
from fastload.metrics.serving import readiness
from fastload.page.listener import running
from fastload.snapshot import Tier
from tests.daemon.running import LIMITS, Daemon, data_table
from tests.golden.frames import FROM_OPERATOR
from tests.processes import is_running, service_pids, until
from tests.programs import run_cli
from tests.shards import Corpus, check_samples, corpus, samples_of

SMALL = {"ram_bytes": 1 << 20, "disk_bytes": 64 << 20, "chunk_bytes": 64 << 10}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A cache with small chunks."""
    directory = tmp_path / "cache"
    CacheDirectory.open(directory, **SMALL)
    return directory


def read_all(url: str, directory: Path, data: Corpus, **options: object) -> dict[str, float]:
    """One epoch of a job, every sample checked; its figures."""
    with fastload.Cache(directory) as cache:
        loader = fastload.DataLoader(
            fastload.StreamingDataset(url, cache=cache, shuffle=True, **options),  # type: ignore[arg-type]
            batch_size=16,
        )
        keys = [key for batch in loader for key in check_samples(data, samples_of(batch))]
        assert sorted(keys) == sorted(data.samples)
        stats = loader.stats()
        loader.close()
        return stats


def chunk_count(data: Corpus) -> int:
    return sum(-(-len(shard) // SMALL["chunk_bytes"]) for shard in data.shards.values())


# Jobs


def test_what_the_configuration_names_is_there_when_the_job_comes(s3, place: Path) -> None:
    data = corpus()
    url = data.put(s3)
    with Daemon(place, LIMITS + data_table("train", url, job={"seed": 3})) as daemon:
        job = daemon.wait_done("train")
        assert job.held_bytes == job.total_bytes == job.fetched_bytes == data.byte_count
        assert (job.shard_count, job.failed_shards, job.error) == (len(data.shards), 0, "")
        stats = read_all(url, place, data, seed=3)
        assert stats["fetched_bytes"] == stats["remote_bytes"] == 0
        shown = daemon.snapshot()
        assert shown.node.is_daemon
        assert shown.node.pid == daemon.pid
        # It stays, without any consumer.
        until(lambda: not daemon.snapshot().consumers)
        assert daemon.serves()
        # What was warmed and then removed is not there any more, and it says so.
        with Operator.connect(place, "test") as operator:
            operator.evict([f"{url}shard-0000.tar"])
        lost = daemon.wait_for("train", lambda job: not job.is_ready)
        assert lost.held_bytes == data.byte_count - len(data.shards["shard-0000.tar"])
        assert (lost.state, " held: the rest was evicted or damaged since" in lost.error) == ("done", True)
        is_ready, says = readiness(daemon.snapshot(), ["train"])
        assert not is_ready
        assert " held" in says
    assert any("job train (train) is done" in message for message in daemon.messages())
    with pytest.raises(NotServedError):
        Operator.connect(place, "test")


def test_without_a_configuration_it_serves_and_takes_jobs(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)
    with Daemon(place, None) as daemon:
        assert daemon.snapshot().jobs == []
        number = submit(place, {"name": "a", "urls": [url]})
        assert submit(place, {"name": "a", "urls": [url]}) == number
        job = daemon.wait_done(number)
        assert (job.name, job.is_submitted, job.held_bytes) == ("a", True, data.byte_count)
        other = submit(place, {"name": "a", "urls": [url], "priority": 1})
        assert other != number
        daemon.wait_done(other)
        assert [each.id for each in daemon.snapshot().jobs] == [other]
        assert submit(place, {"name": "a", "urls": [url]}) == number
        with Operator.connect(place, "test") as operator:
            operator.retry_job("a")
            assert daemon.wait_done("a").fetched_bytes == 0
            operator.cancel_job(number)
            assert daemon.job(number).state == "cancelled"
            with pytest.raises(ConfigError, match="no job 'none'"):
                operator.cancel_job("none")
            with pytest.raises(ConfigError, match=r"nam is no key; did you mean name\?"):
                operator.submit({"nam": "a"})


def test_a_service_that_is_no_daemon_takes_no_jobs(place: Path) -> None:
    with (
        fastload.Cache(place, service="inprocess") as cache,
        cache._handle.consumer(name="train"),
        Operator.connect(place, "test") as operator,
    ):
        assert not operator.is_daemon
        with pytest.raises(ServiceError, match="no daemon serves this cache"):
            operator.submit({"name": "a", "urls": ["s3://b/"]})


def test_one_that_is_wrong_does_not_hold_up_the_others(s3, place: Path, tmp_path: Path) -> None:
    """A bucket, a shard, a profile and a file of credentials that are not there; each says so in a line, and again."""
    data = corpus(shard_count=4)
    url = data.put(s3)
    secrets = tmp_path / "secret.toml"
    secrets.write_text('access_key_id = "a"\nsecret_access_key = "geheim"')
    secrets.chmod(0o644)
    s3.delete("data/shard-0002.tar")
    config = LIMITS + "".join(
        [
            data_table("bucket", "s3://no-such-bucket-here/x.tar", priority=9),
            data_table("profile", "s3://other/", credentials="profile:none", priority=8),
            data_table("file", "s3://another/", credentials=f"file:{secrets}", priority=7),
            data_table("shard", url.rstrip("/") + "/shard-{0000..0003}.tar"),
        ]
    )
    with Daemon(place, config) as daemon:
        errors = {
            name: daemon.wait_for(name, lambda job: job.state == "failed")
            for name in ("bucket", "profile", "file", "shard")
        }
        assert "ObjectMissingError: " in errors["bucket"].error
        assert "profile 'none' is in neither" in errors["profile"].error
        assert "others may read it (mode 0644); run chmod 600" in errors["file"].error
        shard = errors["shard"]
        assert "1 of 3 shards failed" in shard.error or "1 of 4 shards failed" in shard.error
        assert list(shard.failed) == [url + "shard-0002.tar"]
        assert shard.held_bytes == data.byte_count - len(data.shards["shard-0002.tar"])
        assert shard.next_at > 0
        troubles: set[str] = set()

        def are_named() -> bool:  # while one is tried again it is no trouble
            troubles.update(daemon.snapshot().troubles)
            return all(any(f"job {name}: " in trouble for trouble in troubles) for name in errors)

        until(are_named)
        # It is tried again, and then it is there.
        s3.put("data/shard-0002.tar", data.shards["shard-0002.tar"])
        done = daemon.wait_done("shard")
        assert done.held_bytes == data.byte_count
        # None of the others twice; and nothing, where another that failed had displaced it just before it was done.
        assert done.fetched_bytes in (0, len(data.shards["shard-0002.tar"]))
    everything = "".join(daemon.lines) + json.dumps(sorted(troubles))
    assert "geheim" not in everything


@pytest.mark.thorough
def test_new_shards_are_warmed_as_they_come(s3, place: Path) -> None:
    data = corpus(shard_count=4)
    names = list(data.shards)
    for name in names[:3]:
        s3.put(f"data/{name}", data.shards[name])
    with Daemon(place, LIMITS + data_table("grows", f"{s3.url}/data/", watch="1s")) as daemon:
        first = daemon.wait_done("grows")
        assert first.shard_count == 3
        s3.put(f"data/{names[3]}", data.shards[names[3]])
        second = daemon.wait_for("grows", lambda job: job.state == "done" and job.shard_count == 4)
        assert second.held_bytes == data.byte_count
        assert second.fetched_bytes == len(data.shards[names[3]])


@pytest.mark.thorough
def test_a_pattern_is_watched_although_a_member_is_not_there_yet(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    url, late = data.put(s3), "shard-0002.tar"
    s3.delete(f"data/{late}")
    with Daemon(place, LIMITS + data_table("train", f"{url}shard-{{0000..0002}}.tar", watch="1s")) as daemon:
        job = daemon.wait_for("train", lambda job: job.state == "failed")
        assert list(job.failed) == [url + late]
        assert job.held_bytes == data.byte_count - len(data.shards[late])
        s3.put(f"data/{late}", data.shards[late])
        assert daemon.wait_done("train").held_bytes == data.byte_count


@pytest.mark.thorough
def test_a_cache_that_is_too_small_says_so_and_is_not_tried_in_vain(s3, place: Path) -> None:
    data = corpus()
    config = 'disk_bytes = "300KiB"\n' + data_table("train", data.put(s3))
    with Daemon(place, config) as daemon:
        job = daemon.wait_for("train", lambda job: job.state == "failed")
        assert "the cache is full: " in job.error
        assert "raise disk_bytes" in job.error
        assert job.next_at == 0


def test_a_job_whose_process_is_killed_is_run_again(s3, place: Path) -> None:
    data = corpus()
    with Proxy(s3.server.endpoint_url, Profile(0.0, total_bytes_per_s=200_000)) as proxy:
        environ = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        with Daemon(place, LIMITS + data_table("train", data.put(s3)), env=environ) as daemon:
            daemon.wait_for("train", lambda job: job.done_bytes > 0)
            (child,) = children_of(daemon.pid)
            os.kill(child, signal.SIGKILL)
            job = daemon.wait_for("train", lambda job: job.state == "failed")
            assert job.error == "its process was ended by signal 9"
            proxy.change(Profile(0.0))
            assert daemon.wait_done("train").held_bytes == data.byte_count


def children_of(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                words = (folder / "cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent == pid and "fastload.daemon.job" in words:
                found.append(int(folder.name))
    return found


# When they run


@pytest.mark.thorough
def test_a_job_waits_for_its_window(s3, place: Path) -> None:
    data = corpus(shard_count=2)
    now = time.localtime()
    closed = f"{(now.tm_hour + 11) % 24:02d}:00-{(now.tm_hour + 13) % 24:02d}:00"
    url = data.put(s3)
    config = LIMITS + data_table("night", url, when=closed)
    with Daemon(place, config + data_table("day", "s3://no-such-bucket/a.tar")) as daemon:
        daemon.wait_for("day", lambda job: job.state == "failed")  # others had their turn
        night = daemon.job("night")
        assert (night.state, night.fetched_bytes, children_of(daemon.pid)) == ("waiting", 0, [])
        daemon.reload(LIMITS + data_table("night", url))
        daemon.wait_done("night")


@pytest.mark.thorough
def test_the_more_urgent_one_displaces_another(s3, place: Path) -> None:
    data = corpus(shard_count=9)
    names = list(data.shards)
    data.put(s3)

    def table(name: str, first: int, **more: object) -> dict[str, object]:
        return {"name": name, "urls": [f"{s3.url}/data/{each}" for each in names[first : first + 3]], **more}

    with (
        Proxy(s3.server.endpoint_url, Profile(0.0, total_bytes_per_s=30_000)) as proxy,
        Daemon(place, LIMITS, env={**os.environ, "AWS_ENDPOINT_URL": proxy.url}) as daemon,
    ):
        submit(place, table("first", 0))
        submit(place, table("second", 3))
        for name in ("first", "second"):
            daemon.wait_for(name, lambda job: job.state == "warming")
        submit(place, table("urgent", 6, deadline="1h"))
        daemon.wait_for("urgent", lambda job: job.state == "warming")
        daemon.wait_for("second", lambda job: job.state == "waiting")
        assert daemon.job("first").state == "warming"
        until(lambda: len(children_of(daemon.pid)) == 2)
        proxy.change(Profile(0.0))
        for name in ("first", "second", "urgent"):
            daemon.wait_done(name)


@pytest.mark.thorough
def test_the_limit_of_the_timetable_is_that_of_all_jobs(s3, place: Path) -> None:
    """At a byte a second nothing is ever done; without the limit it is."""
    data = corpus()
    table = data_table("train", data.put(s3))
    with Daemon(place, LIMITS + '[warm]\nbandwidth = "1B/s"\n' + table) as daemon:
        daemon.wait_for("train", lambda job: job.state == "warming" and job.total_bytes > 0)
        daemon.reload(LIMITS + '[warm]\nbandwidth = "1B/s"\nrequests_in_flight = 1\n' + table)
        until(lambda: any("was read again" in line for line in daemon.lines))
        assert daemon.job("train").fetched_bytes < data.byte_count
        daemon.reload(LIMITS + table)
        assert daemon.wait_done("train").held_bytes == data.byte_count


@pytest.mark.thorough
def test_once_is_once(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    config = LIMITS + data_table("train", data.put(s3), when="once")
    with Daemon(place, config) as daemon:
        daemon.wait_done("train")
        with fastload.Cache(place) as cache:
            assert cache.clear() > 0
    with Daemon(place, config + data_table("other", "s3://no-such-bucket/a.tar")) as daemon:
        daemon.wait_for("other", lambda job: job.state == "failed")
        assert daemon.wait_done("train").held_bytes == 0
        assert not daemon.job("train").is_ready
        assert daemon.snapshot().node.counters["fetched_bytes"] == 0
        with Operator.connect(place, "test") as operator:
            operator.retry_job("train")
        daemon.wait_for("train", lambda job: job.state == "done" and job.fetched_bytes == data.byte_count)


# What is kept


def tier(daemon: Daemon, name: str) -> Tier:
    return next(each for each in daemon.snapshot().tiers if each.name == name)


@pytest.mark.thorough
def test_what_is_pinned_stays_while_the_configuration_names_it(s3, place: Path) -> None:
    data, other = corpus(seed=1), corpus(seed=2, shard_count=12)
    url, other_url = data.put(s3, "data"), other.put(s3, "other")
    limits = 'disk_bytes = "1200KiB"\n'  # not enough for both
    pinned = limits + data_table("train", url, pin=True, ttl="14d", quota="1TiB")
    with Daemon(place, pinned) as daemon:
        daemon.wait_done("train")
        assert tier(daemon, "disk").pinned_bytes >= data.byte_count
        for _ in range(2):
            read_all(other_url, place, other)
        assert read_all(url, place, data)["fetched_bytes"] == 0
    # It outlives the daemon.
    with Daemon(place, pinned) as daemon:
        assert daemon.wait_done("train").fetched_bytes == 0
        daemon.reload(limits)
        until(lambda: tier(daemon, "disk").pinned_bytes == 0)


def test_a_quota_below_the_pin_is_said_with_both_sizes(s3, place: Path) -> None:
    data = corpus()
    with Daemon(place, LIMITS + data_table("train", data.put(s3), pin=True, quota="100KiB")) as daemon:
        job = daemon.wait_for("train", lambda job: job.state == "failed")
        assert "its quota is 100.0 KiB; raise the quota, or pin less" in job.error
        assert job.fetched_bytes == 0


def pins_of(place: Path) -> set[str]:
    """As they are stored."""
    catalog = Catalog(place, read_only=True)
    try:
        catalog.open()
        return {pin.name for pin in catalog.pins()}
    finally:
        catalog.close()


def test_a_pin_that_is_refused_is_set_when_there_is_room(s3, place: Path) -> None:
    data, other = corpus(seed=1), corpus(seed=2)
    url, other_url = data.put(s3, "data"), other.put(s3, "other")
    limits = f'ram_bytes = "1MiB"\ndisk_bytes = {int(1.5 * data.byte_count)}\n'
    with Daemon(place, limits) as daemon:
        with fastload.Cache(place) as cache:
            cache.pin([other_url], name="theirs")
        daemon.reload(limits + data_table("train", url, pin=True))
        job = daemon.wait_for("train", lambda job: job.state == "failed")
        assert "pin 'train' takes" in job.error
        assert "that other pins name" in job.error
        assert job.next_at > time.time() + 300
        with Operator.connect(place, "test") as operator:
            operator.unpin(["theirs"])
        assert daemon.wait_done("train").held_bytes == data.byte_count
    assert sum("pin 'train' takes" in message for message in daemon.messages()) == 1


def test_the_daemon_ends_pins_that_it_set_and_no_job_names(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)
    one, two, three = (f"{url}shard-000{number}.tar" for number in range(3))
    with Daemon(place, LIMITS + data_table("train", one, pin=True)) as daemon:
        submit(place, {"name": "more", "urls": [two], "pin": True})
        daemon.wait_done("train")
        daemon.wait_done("more")
        with fastload.Cache(place) as cache:
            cache.pin([three], name="mine")
        assert pins_of(place) == {"train", "more", "mine"}
        submit(place, {"name": "more", "urls": [two]})
        until(lambda: pins_of(place) == {"train", "mine"})
    with Daemon(place, LIMITS):  # it was taken out while none ran
        until(lambda: pins_of(place) == {"mine"})


@pytest.mark.thorough
def test_shards_that_are_gone_lose_their_pin_and_their_chunks(s3, place: Path) -> None:
    data = corpus(shard_count=4)
    url = data.put(s3)
    with Daemon(place, LIMITS + data_table("train", url, watch="1s", pin=True)) as daemon:
        daemon.wait_done("train")
        before = tier(daemon, "disk")
        gone = "shard-0003.tar"
        s3.delete(f"data/{gone}")
        left = data.byte_count - len(data.shards[gone])
        daemon.wait_for("train", lambda job: job.state == "done" and job.total_bytes == left)
        until(lambda: tier(daemon, "disk").used_bytes <= before.used_bytes - len(data.shards[gone]))
        (data_set,) = [each for each in daemon.snapshot().data_sets if each.name == "train"]
        assert (data_set.object_count, data_set.pinned_bytes, data_set.disk_bytes) == (3, left, left)


@pytest.mark.thorough
def test_idle_chunks_are_checked_and_damage_is_healed(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)
    config = LIMITS + data_table("train", url, verify="3s")
    with Daemon(place, config) as daemon:
        daemon.wait_done("train")
        victim = max(
            (path for path in (place / "chunks").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        until(lambda: daemon.snapshot().node.counters["verify_damaged"] == 1)
        # Its job has it put back, from RAM or from the store.
        until(lambda: victim.exists() and victim.read_bytes() != bytes(content))
        assert daemon.wait_done("train").held_bytes == data.byte_count
        with pytest.warns(RuntimeWarning, match="was damaged"):
            assert read_all(url, place, data)["fetched_bytes"] == 0


@pytest.mark.thorough
def test_denied_halfway_it_goes_on_when_it_may_again(s3, place: Path, tmp_path: Path) -> None:
    data = corpus(shard_count=8)
    secrets = tmp_path / "secrets.toml"

    def write(key: str, secret: str, url: str) -> None:
        secrets.write_text(f'access_key_id = "{key}"\nsecret_access_key = "{secret}"\nendpoint_url = "{url}"\n')
        secrets.chmod(0o600)

    server = s3.server
    with Proxy(server.endpoint_url, Profile(0.0, total_bytes_per_s=200_000)) as proxy:
        write(server.access_key_id, server.secret_access_key, proxy.url)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
            "AWS_REGION": "us-east-1"
        }
        config = LIMITS + data_table("train", data.put(s3), credentials=f"file:{secrets}")
        with Daemon(place, config, env=environ) as daemon:
            half = daemon.wait_for("train", lambda job: job.done_bytes > data.byte_count // 4)
            write(server.denied_access_key_id, server.denied_secret_access_key, proxy.url)
            (child,) = children_of(daemon.pid)
            os.kill(child, signal.SIGKILL)
            denied = daemon.wait_for("train", lambda job: "AccessDeniedError: " in job.error)
            assert denied.state == "failed"
            assert server.denied_secret_access_key not in denied.error
            proxy.change(Profile(0.0))
            write(server.access_key_id, server.secret_access_key, proxy.url)
            done = daemon.wait_done("train")
            assert done.held_bytes == data.byte_count
            assert done.fetched_bytes <= data.byte_count - half.held_bytes


FULL = """
import errno, os
from fastload.daemon import supervisor
def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
supervisor.write_kept = full
"""


@pytest.mark.thorough
def test_a_job_that_cannot_be_stored_is_not_taken(s3, place: Path) -> None:
    with Daemon(place, LIMITS, prelude=FULL) as daemon:
        with pytest.raises(CacheError, match=r"the job cannot be stored in .*No space left on device.*make room there"):
            submit(place, {"name": "a", "urls": [f"{s3.url}/data/"]})
        assert daemon.snapshot().jobs == []
        assert any("make room on the disk" in trouble for trouble in daemon.snapshot().troubles)


DISK_FULL = """
import errno, os
from fastload.cache import syscalls
def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
syscalls.pwrite = syscalls.pwritev = full
"""


@pytest.mark.thorough
def test_a_disk_that_is_full_costs_that_job_and_no_other_work(s3, place: Path) -> None:
    data = corpus()
    url = data.put(s3)
    with Daemon(place, LIMITS + data_table("train", url), prelude=DISK_FULL) as daemon:
        job = daemon.wait_for("train", lambda job: job.state == "failed")
        assert "raise disk_bytes" in job.error
        assert daemon.snapshot().troubles
        with pytest.warns(RuntimeWarning, match="is full"):
            read_all(url, place, data)
        assert daemon.serves()


# Killed and ended


KILLS = 10


@pytest.mark.thorough
def test_killed_ten_times_it_fetches_nothing_twice_but_what_was_in_flight(s3, place: Path) -> None:
    data = corpus(shard_count=40, samples_per_shard=40)
    url = data.put(s3)
    rng = random.Random(7)
    killed_at: list[float] = []
    children: set[int] = set()
    with Proxy(s3.server.endpoint_url, Profile(0.0, total_bytes_per_s=250_000)) as proxy:
        environ = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        daemon = Daemon(place, LIMITS, env=environ).start()
        number = submit(place, {"name": "all", "urls": [url]})
        daemon.kill()
        while len(killed_at) < KILLS:
            daemon = Daemon(place, LIMITS, env=environ).start()
            before = daemon.wait_for(number, lambda job: job.state == "warming")
            enough = before.fetched_bytes + rng.randrange(1, 6) * SMALL["chunk_bytes"]
            daemon.wait_for(number, lambda job, enough=enough: job.fetched_bytes >= enough)  # type: ignore[misc]
            children |= set(children_of(daemon.pid))
            killed_at.append(time.monotonic())
            daemon.kill()
        until(lambda: not any(map(is_running, children)))
        proxy.change(Profile(0.0))
        with Daemon(place, LIMITS, env=environ) as daemon:
            assert daemon.wait_done(number).held_bytes == data.byte_count
            assert read_all(url, place, data)["fetched_bytes"] == 0
        requests = sorted((each for each in proxy.log() if each["range"]), key=lambda each: each["began"])
    first: dict[tuple[str, str], dict[str, float]] = {}
    lost_on_their_way_to_disk = 0
    for each in requests:
        chunk = each["path"], each["range"]
        if chunk in first:
            before = first[chunk]
            # The one before was begun, and a kill came before the next.
            (*_, kill) = [moment for moment in killed_at if before["began"] <= moment <= each["began"]]
            lost_on_their_way_to_disk += before["done"] < kill
        first[chunk] = each
    assert len(first) == chunk_count(data)
    assert lost_on_their_way_to_disk <= 2 * KILLS


def test_ended_it_ends_its_children_and_loaders_elect_a_service_of_their_own(s3, place: Path) -> None:
    data = corpus(shard_count=8, samples_per_shard=24)
    url = data.put(s3)
    with Proxy(s3.server.endpoint_url, Profile(0.0, total_bytes_per_s=400_000)) as proxy:
        environ = {**os.environ, "AWS_ENDPOINT_URL": proxy.url}
        daemon = Daemon(place, LIMITS + data_table("train", url), env=environ).start()
        daemon.wait_for("train", lambda job: job.done_bytes > 0)
        (child,) = children_of(daemon.pid)
        with fastload.Cache(place) as cache:
            loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=8)
            keys = []
            for number, batch in enumerate(loader):
                keys += check_samples(data, samples_of(batch))
                if number == 2:
                    began = time.monotonic()
                    assert daemon.stop() == 0
                    assert time.monotonic() - began < 60  # ten on a machine that does nothing else
                    assert not is_running(child)
            assert sorted(keys) == sorted(data.samples)
            assert service_pids(place)
            loader.close()


# One serves


def test_it_takes_over_in_mid_epoch(s3, place: Path) -> None:
    data = corpus(shard_count=8, samples_per_shard=24)
    url = data.put(s3)
    with fastload.Cache(place) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=8)
        undisturbed = [batch["__key__"] for batch in loader]
        loader.dataset.set_epoch(0)
        keys = []
        daemon = None
        for number, batch in enumerate(loader):
            keys.append(check_samples(data, samples_of(batch)))
            if number == 3:
                before = service_pids(place)
                assert before
                daemon = Daemon(place, LIMITS).start()
                until(lambda: not service_pids(place))
        assert daemon is not None
        with daemon:
            assert keys == undisturbed
            assert [each.name for each in daemon.snapshot().consumers] != []
            loader.close()


@pytest.mark.thorough
def test_it_takes_over_from_a_service_in_a_job_s_process(place: Path) -> None:
    with (
        fastload.Cache(place, service="inprocess") as cache,
        cache._handle.consumer(name="train") as consumer,
        Daemon(place, LIMITS) as daemon,
    ):
        until(lambda: [each.name for each in daemon.snapshot().consumers] == ["train"])
        assert consumer.stats()["node"]["pid"] == daemon.pid


def test_another_daemon_there_is_named(place: Path) -> None:
    with Daemon(place, LIMITS) as daemon:
        done = run_cli("daemon", f"--cache={place}", check=False)
        assert done.returncode == 1
        assert f"a daemon serves {place} already (process {daemon.pid})" in done.stderr
        assert "Traceback" not in done.stderr
        with (
            Operator.connect(place, "test") as operator,
            pytest.raises(ServiceError, match="a daemon serves this cache"),
        ):
            operator.hand_over()
        assert daemon.serves()


def test_of_two_at_once_exactly_one_serves(place: Path) -> None:
    with fastload.Cache(place) as cache, cache._handle.consumer(name="train"):
        both = [Daemon(place, LIMITS), Daemon(place, LIMITS)]
        until(lambda: any(each.program.returncode is not None for each in both))
        (lost,) = [each for each in both if each.program.returncode is not None]
        (won,) = [each for each in both if each is not lost]
        with won:
            assert lost.stop() == 1
            assert "already (process" in "".join(lost.lines)


# Reloading


def test_a_bad_file_changes_nothing_and_a_good_one_all(s3, place: Path) -> None:
    data = corpus(shard_count=2)
    url = data.put(s3)
    old = LIMITS + data_table("old", url)
    with Daemon(place, old) as daemon:
        daemon.wait_done("old")
        daemon.reload(old + "[[data]]\nnaem = 1\n")
        until(lambda: daemon.snapshot().troubles)
        (trouble,) = daemon.snapshot().troubles
        assert "the one before stays" in trouble
        assert "naem is no key; did you mean name?" in trouble
        assert [job.name for job in daemon.snapshot().jobs] == ["old"]
        daemon.reload('ram_bytes = "2MiB"\ndisk_bytes = "64MiB"\n')
        until(lambda: "ram_bytes holds from the next start on" in daemon.snapshot().troubles[0])
        assert [job.name for job in daemon.snapshot().jobs] == ["old"]
        daemon.reload('ram_bytes = "1MiB"\ndisk_bytes = "48MiB"\n' + data_table("new", url))
        until(lambda: [job.name for job in daemon.snapshot().jobs] == ["new"])
        assert daemon.wait_done("new").fetched_bytes == 0
        assert daemon.snapshot().troubles == []
        assert tier(daemon, "disk").limit_bytes == 48 << 20


HUNG_UP = """
import os, signal
from fastload.daemon import process
def take_over(directory, really=process._take_over):
    os.kill(os.getpid(), signal.SIGHUP)
    really(directory)
process._take_over = take_over
"""


def test_a_reload_before_it_serves_is_done_when_it_does(place: Path) -> None:
    with Daemon(place, LIMITS, prelude=HUNG_UP) as daemon:
        until(lambda: any("was read again" in line for line in daemon.lines))


# Its surroundings


@pytest.mark.thorough
def test_what_the_init_system_is_told(place: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
        notices.bind(str(tmp_path / "notify"))
        notices.settimeout(60)
        environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "300000"}

        def next_with(word: str) -> str:
            while word not in (text := notices.recv(4096).decode()):
                pass
            return text

        with Daemon(place, LIMITS, env=environ) as daemon:
            assert "STATUS=0 jobs" in next_with("READY=1")
            next_with("WATCHDOG=1")
            daemon.reload(LIMITS)
            assert int(next_with("RELOADING=1").partition("MONOTONIC_USEC=")[2]) <= time.monotonic_ns() // 1000
            next_with("READY=1")
            # A loop that is stuck says nothing any more.
            os.kill(daemon.pid, signal.SIGCONT)
            os.kill(daemon.pid, signal.SIGTERM)
            next_with("STOPPING=1")


def test_no_secret_shows(s3, place: Path) -> None:
    data = corpus(shard_count=2)
    with Proxy(s3.server.endpoint_url, Profile(0.0, total_bytes_per_s=20_000)) as proxy:
        environ = {**os.environ, "AWS_ENDPOINT_URL": proxy.url, "NOTIFY_SOCKET": "/nowhere"}
        with Daemon(place, LIMITS + data_table("train", data.put(s3), watch="1s"), env=environ) as daemon:
            number = submit(place, {"name": "more", "urls": [f"{s3.url}/data/shard-0000.tar"]})
            daemon.wait_for("train", lambda job: job.state == "warming")
            until(lambda: children_of(daemon.pid))
            shown = json.dumps([str(daemon.snapshot()), number])
            for child in children_of(daemon.pid):
                shown += Path(f"/proc/{child}/cmdline").read_text()
                assert "NOTIFY_SOCKET" not in Path(f"/proc/{child}/environ").read_text()
        shown += "".join(daemon.lines) + (place / "jobs.json").read_text()
        secret = s3.server.secret_access_key
        assert secret
        assert secret not in shown
        assert (place / "jobs.json").stat().st_mode & 0o077 == 0


@pytest.mark.thorough
def test_a_directory_that_is_removed_ends_it_with_an_error(place: Path) -> None:
    daemon = Daemon(place, LIMITS).start()
    shutil.rmtree(place)
    assert daemon.program.wait() == 1
    assert daemon.stop() == 1
    assert "was removed or emptied; start the daemon again" in "".join(daemon.lines)


def test_jobs_that_cannot_be_read_are_put_aside(place: Path) -> None:
    (place / "jobs.json").write_text("{broken")
    with Daemon(place, LIMITS) as daemon:
        (trouble,) = daemon.snapshot().troubles
        assert "the submitted jobs cannot be read" in trouble
        assert daemon.snapshot().jobs == []
    assert (place / "jobs.json.damaged").read_text() == "{broken"


def test_as_a_command_a_bad_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("cash = 1")
    done = run_cli("daemon", "--config", tmp_path / "bad.toml", "--cache", tmp_path / "cache", check=False)
    assert done.returncode == 1
    assert done.stderr == f"fastload: ConfigError: {tmp_path / 'bad.toml'}: cash is no key; did you mean cache?\n"
    assert not (tmp_path / "cache").exists()


# The command line


def test_jobs_are_listed_shown_cancelled_and_tried_again(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)

    def jobs(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run_cli("jobs", *arguments, f"--cache={place}", check=check)

    with Daemon(
        place, LIMITS + data_table("train", url, priority=2) + data_table("bad", "s3://no-such-bucket/a.tar")
    ) as daemon:
        daemon.wait_done("train")
        daemon.wait_for("bad", lambda job: job.state == "failed")
        listed = json.loads(jobs("ls", "--json").stdout)
        assert [job["id"] for job in listed] == ["train", "bad"]
        assert listed[0]["state"] == "done"
        lines: list[str] = []
        # It is being tried again now and then.
        until(lambda: lines.extend(jobs("ls").stdout.splitlines()) or "ObjectMissingError" in lines[-1])
        assert lines[0].split()[:4] == ["job", "data", "set", "state"]
        shown = jobs("show", "train").stdout
        assert f"urls:        {url}\n" in shown
        assert "state:       done\n" in shown
        assert json.loads(jobs("show", "train", "--json").stdout)["held_bytes"] == data.byte_count
        assert jobs("cancel", "train").stdout == ""
        assert daemon.job("train").state == "cancelled"
        jobs("retry", "train")
        daemon.wait_done("train")
        done = jobs("cancel", "none", check=False)
        assert (done.returncode, "no job 'none'; `fastload jobs ls`" in done.stderr) == (1, True)
    for verb in (["ls"], ["show", "a"], ["cancel", "a"], ["retry", "a"]):
        assert jobs(*verb, check=False).returncode == 3


def test_warm_hands_a_job_over(s3, place: Path) -> None:
    data = corpus(shard_count=3)
    url = data.put(s3)
    with Daemon(place, None) as daemon:
        number = run_cli("warm", url, "--daemon", "--seed=3", "--pin", f"--cache={place}").stdout.strip()
        job = daemon.wait_done(number)
        assert (job.is_submitted, job.is_pinned, job.held_bytes) == (True, True, data.byte_count)
        assert run_cli("warm", url, "--daemon", "--seed=3", "--pin", f"--cache={place}").stdout.strip() == number
        assert read_all(url, place, data, seed=3)["fetched_bytes"] == 0
        assert len(daemon.snapshot().jobs) == 1


def test_jobs_of_a_service_that_is_no_daemon(place: Path) -> None:
    with fastload.Cache(place) as cache, cache._handle.consumer(name="train"):
        done = run_cli("jobs", "ls", f"--cache={place}", check=False)
        assert done.returncode == 3
        assert "`fastload daemon` takes over" in done.stderr


@pytest.mark.thorough
def test_the_page_runs_beside_it_and_says_what_it_lacks(place: Path) -> None:
    with Daemon(place, LIMITS + "[page]\n") as daemon:
        if find_spec("starlette") is None or find_spec("uvicorn") is None:
            until(lambda: daemon.snapshot().troubles)
            (trouble,) = daemon.snapshot().troubles
            assert "pip install 'fastload[page]'" in trouble
            daemon.reload(LIMITS)
            until(lambda: not daemon.snapshot().troubles)
            return
        until(lambda: running(place) is not None)
        first = running(place)
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        until(lambda: (page := running(place)) is not None and page.pid != first.pid)
        daemon.reload(LIMITS)
        until(lambda: running(place) is None)


@pytest.mark.thorough
def test_metrics_are_served_beside_it(place: Path, tmp_path: Path) -> None:
    config = LIMITS + f'[metrics]\nlisten = "unix:{tmp_path / "metrics"}"\n'
    with Daemon(place, config) as daemon:
        if find_spec("prometheus_client") is None:
            until(lambda: daemon.snapshot().troubles)
            assert "pip install 'fastload[metrics]'" in daemon.snapshot().troubles[0]
        else:
            until(lambda: (tmp_path / "metrics").exists())
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(60)
                sock.connect(str(tmp_path / "metrics"))
                sock.sendall(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
                answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            assert b" 200 " in answer.splitlines()[0]
            assert b"fastload_" in answer
        daemon.reload(LIMITS)
        until(lambda: not (tmp_path / "metrics").exists() and not daemon.snapshot().troubles)
        daemon.reload(LIMITS + '[metrics]\nlisten = "off"\n')
        until(lambda: daemon.snapshot().troubles)
        assert "name where metrics are to be had" in daemon.snapshot().troubles[0]


# Nonsense

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=9)
    | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
FIELDS = sorted(field.name for field in msgspec.structs.fields(DataTable))
TABLES = st.dictionaries(st.sampled_from(FIELDS), ANYTHING) | st.builds(
    lambda more: {"name": "a", "urls": ["s3://no-such-bucket/a.tar"], **more},
    st.dictionaries(st.sampled_from(FIELDS[:-1]), ANYTHING, max_size=2),
)


def test_whatever_an_operator_sends_ends_its_own_connection_at_most(place: Path) -> None:
    """Fields of any type and value, bytes that are changed, and jobs that make no sense."""

    @given(
        st.sampled_from(sorted(FROM_OPERATOR)), st.lists(ANYTHING, max_size=5), TABLES, st.integers(0, 3), st.randoms()
    )
    def send(kind: str, fields: list[object], table: dict[str, object], changes: int, rng: random.Random) -> None:
        given_fields = rng.choice([fields, [*FROM_OPERATOR[kind]], [7, table]])
        payload = bytearray(msgspec.msgpack.encode([kind, *given_fields]))
        for _ in range(changes):
            payload[rng.randrange(len(payload))] = rng.randrange(256)
        with Operator.connect(place, "nonsense") as operator:
            operator._sock.sendall(struct.pack("<I", len(payload)) + payload)
            operator._sock.shutdown(socket.SHUT_WR)
            operator._sock.settimeout(60)
            while operator._sock.recv(1 << 16):  # to the end of what it has to say
                pass
        assert daemon.snapshot().node.pid == daemon.pid

    with Daemon(place, LIMITS) as daemon:
        send()
    assert "Traceback" not in "".join(daemon.lines)
