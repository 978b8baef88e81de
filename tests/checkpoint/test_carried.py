"""Saves that the service carries: what each level promises, with real processes that are really killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload import checkpoint
from fastload.cache import syscalls
from fastload.checkpoint import attempts, reading, single
from fastload.checkpoint.images import Images
from fastload.checkpoint.saving import Saving
from fastload.client.cache import handle_of
from fastload.client.connector import Connector
from fastload.errors import CheckpointError, CheckpointExistsError, ServiceError, WaitTimeoutError
from fastload.protocol import Level, SaveState
from tests.checkpoint.gate import Gate, gate_to
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.processes import kill_service, service_pids, until
from tests.programs import Program

SMALL = {"ram_bytes": "1MiB", "disk_bytes": "1MiB", "chunk_bytes": "64KiB"}
COUNT = 5 << 18  # of float32 in a state: 5 MiB


def state(content: int) -> dict[str, Any]:
    return {"w": torch.arange(COUNT, dtype=torch.float32) + content, "step": content, "none": torch.empty(0)}


def content(loaded: dict[str, Any]) -> int:
    step = loaded["step"]
    assert torch.equal(loaded["w"], state(step)["w"])
    return int(step)


@pytest.fixture
def gate(s3: Bucket) -> Iterator[Gate]:
    with gate_to(s3) as gate:
        yield gate


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        yield cache


def options(gate: Gate) -> dict[str, Any]:
    return {"endpoint_url": gate.url}


def received(gate: Gate, what: str = "safetensors") -> int:
    """Bytes of segments that the store has sent."""
    return sum(size for method, path, size in gate.seen if method == "GET" and what in path)


# What a trainer does: it saves as it is told to by its arguments, says "saved", and goes on when it is asked to.
TRAINER = """
import json, sys, torch, fastload
from fastload import checkpoint
from tests.checkpoint.test_carried import SMALL, state
url, directory, until, options = sys.argv[1:]
with fastload.Cache(directory, **SMALL) as cache:
    saving = checkpoint.save(state(7), url, until=until, cache=cache, storage_options=json.loads(options))
    print("saved", flush=True)
    sys.stdin.readline()
    saving.wait("store")
    print("stored", flush=True)
"""


def trainer(url: str, directory: Path, until: str, gate: Gate) -> Program:
    return Program(TRAINER, url, directory, until, json.dumps(options(gate)))


def load(url: str, directory: Path | None = None, **more: Any) -> dict[str, Any]:
    return checkpoint.load(url, cache=directory or "/nonexistent/fastload", **more)


def test_a_save_goes_through_all_levels_and_the_state_may_change_at_once(
    s3: Bucket, gate: Gate, cache: fastload.Cache
) -> None:
    with cache._handle.consumer():  # by whom the service stays, and its figures
        url, saved = f"{s3.url}/run/1", state(1)
        gate.shut("safetensors")
        saving = checkpoint.save(saved, url, until="memory", cache=cache, storage_options=options(gate))
        saved["w"].zero_()
        saving.wait("disk", PATIENCE_S)
        assert saving.done("disk")
        assert not saving.done("store")
        progress = saving.progress()
        assert progress.disk_bytes == progress.total_bytes > 4 * COUNT
        assert progress.store_bytes == 0
        until(lambda: saving.progress().reason)
        with pytest.raises(
            WaitTimeoutError, match=r"rank 0 of .* s3:.*/run/1/ to reach 'store' \(.*SlowDown.*; the save"
        ):
            saving.wait("store", 0.1)
        with pytest.raises(fastload.ObjectMissingError):
            load(url)
        gate.open()
        saving.wait("store", PATIENCE_S)
        assert saving.progress().store_bytes == progress.total_bytes
        assert saving.progress().reason == ""
        assert content(load(url)) == 1
        with pytest.raises(CheckpointExistsError):
            checkpoint.save(state(2), url, until="memory", cache=cache)
        checkpoint.save(state(2), url, until="memory", overwrite=True, cache=cache).wait("store", PATIENCE_S)
        assert content(load(url)) == 2
        figures = cache.stats()
        assert (figures["checkpoints_saved"], figures["checkpoints_failed"], figures["checkpoints_under_way"]) == (
            2,
            0,
            0,
        )


def test_a_trainer_that_starts_again_reads_from_memory_then_disk_then_the_store(
    s3: Bucket, gate: Gate, cache: fastload.Cache
) -> None:
    url = f"{s3.url}/run/1"
    checkpoint.save(state(3), url, until="memory", cache=cache).wait("store", PATIENCE_S)
    given = {"cache": cache, "storage_options": options(gate)}
    assert content(checkpoint.load(url, **given)) == 3
    (file,) = (cache.directory / "checkpoints").glob("*.safetensors")
    hidden = file.rename(file.with_suffix(".hidden"))  # the image serves it
    assert content(checkpoint.load(url, **given)) == 3
    hidden.rename(file)
    cache.close()
    until(lambda: not service_pids(cache.directory))
    assert content(checkpoint.load(url, **given)) == 3
    assert received(gate) == 0
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert content(checkpoint.load(url, **given)) == 3
    assert received(gate) > 0


def test_memory_that_changes_after_it_was_verified_is_not_what_is_loaded(
    s3: Bucket, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(state(3), f"{s3.url}/1", until="memory", cache=cache).wait("store", PATIENCE_S)
    (image,) = cache._handle.shared("checkpoint images", Images)._images
    verified, verify = [], reading.damaged_block

    def verify_and_write(sums: bytes, start: int, data: memoryview) -> int | None:
        damaged = verify(sums, start, data)
        verified.append(damaged)
        image.protect(writable=True)
        image.view[-4096:] = image.view[:4096] = bytes(4096)
        image.view[4096:8192] = bytes(4096)
        return damaged

    monkeypatch.setattr(reading, "damaged_block", verify_and_write)
    assert content(checkpoint.load(f"{s3.url}/1", cache=cache)) == 3
    assert verified[0] is None


def test_a_run_that_does_not_wait_for_the_store(
    s3: Bucket, gate: Gate, cache: fastload.Cache, caplog: pytest.LogCaptureFixture
) -> None:
    url, keep = f"{s3.url}/run", checkpoint.Keep(last=1)
    run = checkpoint.Run(url, keep=keep, on_error="warn", dedup=True, cache=cache, storage_options=options(gate))
    run.save(1, state(1))
    gate.shut("safetensors")
    saving = run.save(2, state(2), until="memory")
    assert saving is not None
    assert not saving.done("store")
    assert run.steps() == [1]
    with pytest.raises(WaitTimeoutError):
        run.wait(0.1)
    gate.open()
    run.wait(PATIENCE_S)
    assert saving.done("store")
    assert run.steps() == [2]
    assert content(run.load()) == 2
    assert {name for name, _ in checkpoint.stream(run.step_url(2), cache=cache)} == {"w", "none"}
    assert received(gate) == 0
    # Another one is first, which is known when this one has returned.
    gate.shut("safetensors")
    run.save(3, state(3), until="memory")
    checkpoint.save({"step": 0, **state(4)}, run.step_url(3), cache="/nonexistent/fastload")
    gate.open()
    assert caplog.records == []
    run.wait(PATIENCE_S)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"step 3 of {url} was not saved: CheckpointExistsError: ")
    assert content(run.load()) == 4


def test_the_cache_is_cleared_and_what_it_carries_stays(s3: Bucket, gate: Gate, cache: fastload.Cache) -> None:
    gate.shut("safetensors")
    saving = checkpoint.save(state(4), f"{s3.url}/1", until="disk", cache=cache, storage_options=options(gate))
    cache.clear(history=True, pins=True)
    gate.open()
    saving.wait("store", PATIENCE_S)
    assert content(load(f"{s3.url}/1")) == 4


@pytest.mark.parametrize(
    ("step", "until_level"),
    [
        ("safetensors", "memory"),
        ("manifest.json", "disk"),
        *(
            pytest.param(*each, marks=pytest.mark.thorough)
            for each in [("safetensors", "disk"), (".part", "memory"), (".part", "disk"), ("manifest.json", "memory")]
        ),
    ],
)
def test_the_trainer_is_killed(s3: Bucket, gate: Gate, tmp_path: Path, until_level: str, step: str) -> None:
    """The service goes on without it, and ends only then."""
    url, directory = f"{s3.url}/1", tmp_path / "cache"
    gate.shut(step)
    with trainer(url, directory, until_level, gate) as program:
        assert program.stdout.readline() == "saved\n", program.stderr.read()
        assert gate.refused.wait(PATIENCE_S)
        program.kill()
        program.wait()
    gate.open()
    until(lambda: not service_pids(directory))
    assert content(load(url)) == 7


@pytest.mark.parametrize("step", ["safetensors", pytest.param(".part", marks=pytest.mark.thorough), "manifest.json"])
def test_the_service_is_killed_and_the_trainer_hands_over_again(
    s3: Bucket, gate: Gate, cache: fastload.Cache, step: str
) -> None:
    url = f"{s3.url}/1"
    gate.shut(step)
    saving = checkpoint.save(state(5), url, until="memory", cache=cache, storage_options=options(gate))
    for _ in range(2):
        assert gate.refused.wait(PATIENCE_S)
        gate.refused.clear()
        kill_service(cache.directory)
    gate.open()
    saving.wait("store", PATIENCE_S)
    assert content(load(url)) == 5
    # A service that was only taken for dead may read its memory yet.
    assert saving.take_back(PATIENCE_S) is False


@pytest.mark.parametrize("step", ["safetensors", pytest.param(".part", marks=pytest.mark.thorough), "manifest.json"])
def test_both_are_killed_and_the_next_service_goes_on_from_the_disk(
    s3: Bucket, gate: Gate, tmp_path: Path, step: str
) -> None:
    url, directory = f"{s3.url}/1", tmp_path / "cache"
    gate.shut(step)
    with trainer(url, directory, "disk", gate) as program:
        assert program.stdout.readline() == "saved\n", program.stderr.read()
        assert gate.refused.wait(PATIENCE_S)
        program.kill()
        program.wait()
        kill_service(directory)
    gate.open()
    with fastload.Cache(directory) as cache, cache._handle.consumer(options(gate)):  # which brings the credentials
        until(lambda: cache.stats()["checkpoints_saved"] == 1)
    assert content(load(url)) == 7


@pytest.mark.parametrize(("level", "refused"), [("memory", "safetensors"), ("disk", "safetensors"), ("disk", "")])
def test_a_run_that_starts_again_waits_for_what_is_carried(
    s3: Bucket, gate: Gate, tmp_path: Path, level: str, refused: str
) -> None:
    """Nothing is lost of what was promised; from the disk, when the service has ended as well. Where the store has
    taken nothing at all, the service begins the attempt itself, at the latest when the run has come.
    """
    run = checkpoint.Run(f"{s3.url}/run", cache=tmp_path / "cache", storage_options=options(gate))
    run.save(1, state(1))
    gate.shut(refused)
    with trainer(run.step_url(7), tmp_path / "cache", level, gate) as program:
        assert program.stdout.readline() == "saved\n", program.stderr.read()
        assert gate.refused.wait(PATIENCE_S)
        program.kill()
        program.wait()
    if level == "disk":
        kill_service(tmp_path / "cache")
    seen = len(gate.seen)
    if not refused:
        gate.open()
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(run.load, wait_s=PATIENCE_S)
        until(lambda: len(gate.seen) > seen)  # it has looked
        gate.open()
        assert content(loaded.result()) == 7
    assert run.step == 7
    handle_of(tmp_path / "cache").close()


def test_a_service_that_is_to_end_puts_what_only_it_has_on_the_disk_first(
    s3: Bucket, gate: Gate, tmp_path: Path
) -> None:
    url, directory = f"{s3.url}/1", tmp_path / "cache"
    gate.shut("safetensors")
    with trainer(url, directory, "memory", gate) as program:
        assert program.stdout.readline() == "saved\n", program.stderr.read()
        (service,) = service_pids(directory)
        program.kill()
        os.kill(service, signal.SIGTERM)
        program.wait()
    until(lambda: not service_pids(directory))
    gate.open()
    with fastload.Cache(directory) as cache, cache._handle.consumer(options(gate)):
        until(lambda: cache.stats()["checkpoints_saved"] == 1)
    assert content(load(url)) == 7


def test_the_store_denies_access_until_other_credentials_come(s3: Bucket, gate: Gate, cache: fastload.Cache) -> None:
    url = f"{s3.url}/1"
    gate.shut("safetensors", status=403)
    saving = checkpoint.save(state(6), url, until="memory", cache=cache, storage_options=options(gate))
    with pytest.raises(fastload.AccessDeniedError, match="rank 0"):
        saving.wait("store", PATIENCE_S)
    saving.wait("disk", PATIENCE_S)
    gate.open()
    with cache._handle.consumer({**options(gate), "region": "eu-west-3"}):
        until(lambda: saving.progress().level == "store")
    saving.wait("store")
    assert content(load(url)) == 6


def files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in (directory / "checkpoints").iterdir())


def test_the_bucket_is_gone_and_comes_back(s3: Bucket, gate: Gate, cache: fastload.Cache) -> None:
    """What was promised stays on the disk, and is stored in the end, also where the trainer was told that it fails."""
    url = f"{s3.url}/1"
    gate.shut("safetensors", status=404)
    saving = checkpoint.save(state(6), url, until="disk", cache=cache, storage_options=options(gate))
    with pytest.raises(fastload.ObjectMissingError, match="rank 0"):
        saving.wait("store", PATIENCE_S)
    assert saving.done("disk")
    assert not saving.done("store")
    assert saving.progress().reason
    assert files(cache.directory) == [".log", ".part", ".safetensors"]
    gate.open()
    until(lambda: saving.done("store"))
    assert content(load(url)) == 6


def test_a_run_says_what_is_in_the_way_of_a_step(
    s3: Bucket, gate: Gate, cache: fastload.Cache, caplog: pytest.LogCaptureFixture
) -> None:
    run = checkpoint.Run(f"{s3.url}/run", on_error="warn", cache=cache, storage_options=options(gate))
    gate.shut(status=404)
    gate.refuses = lambda method, path: method == "PUT" and "/run/1/" in path and "safetensors" in path
    saving = run.save(1, state(1), until="memory")
    assert saving is not None
    until(lambda: saving.progress().reason)
    run.save(2, state(2))
    run.save(3, state(3))
    (record,) = caplog.records
    assert record.getMessage().startswith(f"step 1 of {s3.url}/run is not in the store yet: ")
    gate.open()
    until(lambda: saving.done("store"))
    assert run.steps() == [1, 2, 3]


def test_the_attempt_was_given_up_and_its_files_stay_until_a_younger_one_is_stored(
    s3: Bucket, gate: Gate, cache: fastload.Cache
) -> None:
    gate.shut("safetensors")
    given: dict[str, Any] = {"until": "disk", "cache": cache, "storage_options": options(gate)}
    with cache._handle.consumer():  # by whom the service stays
        saving = checkpoint.save(state(6), f"{s3.url}/run/1", **given)
        with attempts.opened(f"{s3.url}/run/1", None) as place:
            for name in place.names():
                place.store.delete(place.folder + name)
        gate.open()
        with pytest.raises(CheckpointError, match="was given up"):
            saving.wait("store", PATIENCE_S)
        assert files(cache.directory) == [".log", ".part", ".safetensors"]
        checkpoint.save(state(7), f"{s3.url}/run/2", **given).wait("store", PATIENCE_S)
        until(lambda: files(cache.directory) == [".log", ".part", ".safetensors"])


@pytest.mark.parametrize("damaged", ["safetensors", "part", None])
def test_the_next_service_does_not_store_what_is_damaged_and_deletes_nothing(
    s3: Bucket,
    gate: Gate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    damaged: str | None,
) -> None:
    """Nor does one error of the disk, while it starts, end a save: that is tried again."""
    url, directory = f"{s3.url}/1", tmp_path / "cache"
    gate.shut("safetensors")
    with trainer(url, directory, "disk", gate) as program:
        assert program.stdout.readline() == "saved\n", program.stderr.read()
        program.kill()
        program.wait()
        kill_service(directory)
    gate.open()
    read_file, failures = syscalls.read_file, [errno.EIO]

    def failing(path: Any) -> bytes:
        if damaged is None and str(path).endswith(".part") and failures:
            raise OSError(failures.pop(), "no")
        return read_file(path)

    monkeypatch.setattr(syscalls, "read_file", failing)
    if damaged is not None:
        (file,) = (directory / "checkpoints").glob(f"*.{damaged}")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    counter = "checkpoints_saved" if damaged is None else "checkpoints_failed"
    with fastload.Cache(directory, service="inprocess") as cache, cache._handle.consumer(options(gate)):
        until(lambda: cache.stats()[counter] == 1)
        assert files(directory) == [".log", ".part", ".safetensors"]
    if damaged is None:
        assert failures == []
        assert content(load(url)) == 7
        return
    assert any(f"{file.name} is damaged" in record.getMessage() for record in caplog.records)
    with pytest.raises(fastload.ObjectMissingError):
        load(url)


@pytest.mark.parametrize("level", ["memory", pytest.param("disk", marks=pytest.mark.thorough)])
def test_a_save_that_does_not_wait_for_the_store_does_not_need_it(
    s3: Bucket, gate: Gate, cache: fastload.Cache, level: Any
) -> None:
    """The service begins the attempt then, also the next one, and finds whether a checkpoint is there."""
    url = f"{s3.url}/1"
    given: dict[str, Any] = {"until": level, "cache": cache, "storage_options": options(gate)}
    gate.refuses = lambda method, path: True
    saving = checkpoint.save(state(6), url, **given)
    assert saving.done(level)
    kill_service(cache.directory)
    gate.open()
    saving.wait("store", PATIENCE_S)
    assert content(load(url)) == 6
    gate.refuses = lambda method, path: True
    other, third = (checkpoint.save(state(number), url, overwrite=number == 8, **given) for number in (7, 8))
    gate.open()
    with pytest.raises(CheckpointExistsError, match=r"pass overwrite=True .*\(rank 0\)"):
        other.wait("store", PATIENCE_S)
    third.wait("store", PATIENCE_S)
    assert content(load(url)) == 8


@pytest.mark.parametrize("ram_bytes", ["1GiB", "1MiB"])
def test_a_process_that_stores_by_itself_begins_the_attempt_later_as_well(
    s3: Bucket, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ram_bytes: str
) -> None:
    """From an image, or where there is no memory for one straight from the state."""

    def connect(*_: object) -> None:
        raise ServiceError("none can be had")

    monkeypatch.setattr(Connector, "connect", connect)
    monkeypatch.setattr(single, "_PATIENCE_S", 0.1)
    gate.refuses = lambda method, path: True
    opening = threading.Timer(1.0, gate.open)
    opening.start()
    with fastload.Cache(tmp_path / "cache", **SMALL, checkpoint_ram_bytes=ram_bytes) as cache:
        with pytest.warns(RuntimeWarning):
            saving = checkpoint.save(
                state(6), f"{s3.url}/1", until="memory", cache=cache, storage_options=options(gate)
            )
        saving.wait("store", PATIENCE_S)
    opening.join()
    assert content(load(f"{s3.url}/1")) == 6


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_save_that_waits_gives_up_where_no_byte_moves_and_goes_on(
    s3: Bucket, gate: Gate, cache: fastload.Cache, on_error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = checkpoint.Run(f"{s3.url}/run", on_error=on_error, cache=cache, storage_options=options(gate))
    saved = {"w": torch.arange(3 << 20, dtype=torch.float32)}
    gate.shut("safetensors")
    if on_error == "raise":
        with pytest.raises(
            WaitTimeoutError, match=r"gave up after 0.5 s .*no byte has moved.*; the save goes on"
        ) as caught:
            run.save(1, saved, timeout_s=0.5)
        saving = caught.value.saving
    else:
        saving = run.save(1, saved, timeout_s=0.5)
        assert "gave up after 0.5 s" in caplog.text
    assert run.step == 1
    assert not saving.done()
    gate.open()
    run.wait(PATIENCE_S)
    assert saving.done()
    assert run.load()["w"].equal(saved["w"])


def test_as_long_as_bytes_move_a_save_is_waited_for() -> None:
    class Moving:
        """It gets on four times, and then no more."""

        waits = 0

        @property
        def state(self) -> SaveState:
            return SaveState("0" * 16, 0, "memory", 0, min(self.waits, 4))

        def wait_level(self, level: Level, what: str, timeout_s: float) -> SaveState:
            self.waits += 1
            raise WaitTimeoutError("gave up")

        def take_back(self, what: str, timeout_s: float) -> bool:
            self.wait_level("disk", what, timeout_s)
            raise AssertionError

    for wait in (lambda saving: saving.wait_while_moving("store", 600.0), lambda saving: saving.take_back(600.0)):
        carrier = Moving()
        with pytest.raises(WaitTimeoutError, match="gave up"):
            wait(Saving("s3://bucket/1/", 0, 4, 0.0, carrier))
        assert carrier.waits == 5


def test_another_writer_is_first(s3: Bucket, gate: Gate, cache: fastload.Cache) -> None:
    url = f"{s3.url}/1"
    gate.shut("safetensors")
    saving = checkpoint.save(state(6), url, until="memory", cache=cache, storage_options=options(gate))
    checkpoint.save({"step": 1}, url)
    gate.open()
    with pytest.raises(CheckpointExistsError, match=r"another checkpoint .* \(rank 0\)"):
        saving.wait("store", PATIENCE_S)
    with pytest.raises(CheckpointExistsError):
        saving.done()
    assert load(url) == {"step": 1}
    until(lambda: not list((cache.directory / "checkpoints").iterdir()))


def test_what_has_no_room_on_the_disk_in_any_case_takes_none(s3: Bucket, tmp_path: Path) -> None:
    with fastload.Cache(tmp_path / "cache", **SMALL, checkpoint_disk_bytes="6MiB") as cache:
        given: dict[str, Any] = {"cache": cache, "storage_options": {"endpoint_url": s3.server.endpoint_url}}
        checkpoint.save(state(0), f"{s3.url}/0", until="disk", **given).wait("store", PATIENCE_S)
        before = cache.stats()["checkpoint_disk_bytes"]
        files = sorted((cache.directory / "checkpoints").iterdir())
        larger = {"w": torch.ones(2 * COUNT)}
        with pytest.warns(RuntimeWarning, match="checkpoint_disk_bytes='6MiB' leaves no room for 10"):
            checkpoint.save(larger, f"{s3.url}/other/1", until="disk", **given).wait("store", PATIENCE_S)
        assert cache.stats()["checkpoint_disk_bytes"] == before > 0
        assert sorted((cache.directory / "checkpoints").iterdir()) == files


def test_a_third_save_waits_for_memory_that_is_used_again(s3: Bucket, gate: Gate, tmp_path: Path) -> None:
    """With the disk the service gives an image back while the store is down, else when it is stored."""
    with fastload.Cache(tmp_path / "cache", **SMALL, checkpoint_disk_bytes=0) as cache:
        given: dict[str, Any] = {"until": "memory", "cache": cache, "storage_options": options(gate)}
        gate.shut("safetensors")
        savings = [checkpoint.save(state(number), f"{s3.url}/{number}", **given) for number in range(2)]
        images = cache._handle.shared("checkpoint images", Images)
        assert len(images._images) == 2
        with pytest.raises(WaitTimeoutError, match="/0/ to reach 'disk', so that its memory can be used"):
            images.take(4096, 1 << 30, 0.1)
        with (
            pytest.warns(RuntimeWarning, match="not kept on disk .*no disk for checkpoints"),
            pytest.raises(WaitTimeoutError),
        ):
            savings[0].wait("disk", 0.1)
        gate.open()
        before = {image.fd for image in images._images}
        savings += [checkpoint.save(state(number), f"{s3.url}/{number}", **given) for number in range(2, 5)]
        assert {image.fd for image in images._images} == before
        assert savings[0].take_back(PATIENCE_S) is True
        for number, saving in enumerate(savings):
            saving.wait("store", PATIENCE_S)
            assert content(load(f"{s3.url}/{number}")) == number
    with fastload.Cache(tmp_path / "other", **SMALL) as cache:
        given["cache"] = cache
        gate.shut("safetensors")
        savings = [checkpoint.save(state(number), f"{s3.url}/b{number}", **given) for number in range(4)]
        gate.open()
        for number, saving in enumerate(savings):
            saving.wait("store", PATIENCE_S)
            assert content(load(f"{s3.url}/b{number}")) == number


def test_a_second_image_is_made_only_for_a_save_that_comes_while_the_first_is_in_use(
    s3: Bucket, gate: Gate, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was not used for some time goes, but for what is not stored yet."""
    given: dict[str, Any] = {"until": "memory", "cache": cache, "storage_options": options(gate)}
    images = cache._handle.shared("checkpoint images", Images)
    found = set()
    for number in range(3):
        checkpoint.save(state(number), f"{s3.url}/{number}", **given).wait("store", PATIENCE_S)
        (image,) = images._images
        found.add(image.fd)
    assert len(found) == 1
    gate.shut("safetensors")
    savings = [checkpoint.save(state(number), f"{s3.url}/{number}", **given) for number in (3, 4)]
    assert len(images._images) == 2
    monkeypatch.setattr("fastload.checkpoint.images._IDLE_S", 0.0)
    assert images.give_back_unused()
    assert len(images._images) == 2
    gate.open()
    for saving in savings:
        saving.wait("store", PATIENCE_S)
    assert not images.give_back_unused()
    assert images._images == []
    assert cache.stats()["checkpoint_ram_bytes"] == 0
    checkpoint.save(state(5), f"{s3.url}/5", **given).wait("store", PATIENCE_S)
    for number in range(6):
        assert content(load(f"{s3.url}/{number}")) == number


def test_an_image_goes_by_itself(s3: Bucket, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.checkpoint.images._IDLE_S", 0.2)
    images = cache._handle.shared("checkpoint images", Images)
    saving = checkpoint.save(state(1), f"{s3.url}/1", until="memory", cache=cache)
    saving.wait("store", PATIENCE_S)
    until(lambda: not images._images)
    until(lambda: cache.stats()["checkpoint_ram_bytes"] == 0)
    assert saving.done()


def test_what_is_larger_than_may_be_goes_straight_to_the_store(s3: Bucket, tmp_path: Path) -> None:
    with fastload.Cache(tmp_path / "cache", **SMALL, checkpoint_ram_bytes="1MiB") as cache:
        with pytest.warns(RuntimeWarning, match="more than checkpoint_ram_bytes"):
            saving = checkpoint.save(state(1), f"{s3.url}/1", until="memory", cache=cache)
        assert saving.done()
    assert content(load(f"{s3.url}/1")) == 1


def test_a_stray_write_crashes(s3: Bucket, tmp_path: Path) -> None:
    code = TRAINER.replace(
        "    sys.stdin.readline()",
        "    import ctypes\n    from fastload.checkpoint.images import Images\n"
        "    (image,) = cache._handle.shared('checkpoint images', Images)._busy\n"
        "    ctypes.memset(image._address + 5000, 1, 1)",
    )
    url = f"{s3.url}/1"
    with Program(code, url, tmp_path / "cache", "memory", "{}") as program:
        assert program.stdout.readline() == "saved\n", program.stderr.read()
        assert program.wait() == -signal.SIGSEGV
    until(lambda: not service_pids(tmp_path / "cache"))
    assert content(load(url)) == 7
