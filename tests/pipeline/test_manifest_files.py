"""Manifest files: written once by the first, read by all, refused where they are not what was asked for."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from fastload.cache import syscalls
from fastload.errors import ConfigError, ObjectMissingError, StateError, WaitTimeoutError
from fastload.pipeline.manifest_files import find, keep, path_of, shared_manifest
from fastload.plan import Manifest
from fastload.store.types import ObjectInfo
from fastload.waiting import Waits
from tests.patience import PATIENCE_S

URLS = ["s3://user:secret@bucket/train/", "s3://bucket/more-{0..3}.tar"]


def manifest(*names: str) -> Manifest:
    return Manifest([ObjectInfo(f"s3://bucket/{name}.tar", 10, "e") for name in names], promised=[1] * len(names))


ONE, TWO = manifest("a"), manifest("a", "b")


def never() -> Manifest:
    raise AssertionError("nobody should have listed")


def test_the_first_rank_writes_it_and_the_others_wait(tmp_path: Path) -> None:
    path, found, waits = tmp_path / "train.json", [], Waits()

    def other_rank() -> None:
        found.append(shared_manifest(path, URLS, is_first=False, list_shards=never, waits=waits))

    threads = [threading.Thread(target=other_rank) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert shared_manifest(path, URLS, is_first=True, list_shards=lambda: TWO) == TWO
    for thread in threads:
        thread.join(PATIENCE_S)
    assert [each.says_the_same_as(TWO) for each in found] == [True] * 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["train.json"]
    assert b"secret" not in path.read_bytes()


def test_a_file_that_is_there_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    shared_manifest(path, URLS, is_first=True, list_shards=lambda: ONE)
    for is_first in (True, False):
        assert shared_manifest(str(path), URLS, is_first=is_first, list_shards=never) == ONE


def test_of_two_who_write_at_once_the_first_counts(tmp_path: Path) -> None:
    path = tmp_path / "train.json"

    def slow() -> Manifest:
        assert shared_manifest(path, URLS, is_first=True, list_shards=lambda: ONE) == ONE
        return TWO

    assert shared_manifest(path, URLS, is_first=True, list_shards=slow) == ONE


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(syscalls, "link", no_links)
    path = tmp_path / "train.json"
    assert shared_manifest(path, URLS, is_first=True, list_shards=lambda: TWO) == TWO
    assert os.listdir(tmp_path) == ["train.json"]


def test_nobody_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "train.json"
    with pytest.raises(WaitTimeoutError, match=rf"waiting for rank 0 to write manifest='{path}'.*init_process_group"):
        shared_manifest(path, URLS, is_first=False, list_shards=never, deadline_s=0.01)


def test_a_listing_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def fails() -> Manifest:
        raise ObjectMissingError("nothing there")

    with pytest.raises(ObjectMissingError):
        shared_manifest(tmp_path / "train.json", URLS, is_first=True, list_shards=fails)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"absent/train\.json' cannot be written: No such file or directory; name"):
        shared_manifest(tmp_path / "absent" / "train.json", URLS, is_first=True, list_shards=lambda: ONE)

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(syscalls, "link", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        shared_manifest(tmp_path / "train.json", URLS, is_first=True, list_shards=lambda: ONE)
    assert os.listdir(tmp_path) == []
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        shared_manifest(tmp_path, URLS, is_first=True, list_shards=never)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-10], "is not a manifest file"),
        (lambda data: b"", "is not a manifest file"),
        (lambda data: ONE.to_json(), "is not a manifest file"),
        (lambda data: data.replace(b"a.tar", b"z.tar"), "damaged or edited"),
        (lambda data: data.replace(b'"fastload_manifest":1', b'"fastload_manifest":7'), "has version 7"),
        (
            lambda data: data.replace(b"more-", b"less-"),
            r"made of s3://bucket/train/ and 1 more, and this data set is s3://bucket/train/ and 1 more",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, change, says: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "train.json"
    shared_manifest(path, URLS, is_first=True, list_shards=lambda: ONE)
    path.write_bytes(change(path.read_bytes()))
    for is_first in (True, False):
        with pytest.raises(ConfigError, match=rf"manifest='{path}' .*{says}"):
            shared_manifest(path, URLS, is_first=is_first, list_shards=never)


def test_the_urls_of_a_file_may_carry_other_credentials(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    shared_manifest(path, URLS, is_first=True, list_shards=lambda: ONE)
    assert shared_manifest(path, ["s3://bucket/train/", URLS[1]], is_first=True, list_shards=never) == ONE


def test_each_epoch_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "train.v1.json"
    for epoch, each in ((0, ONE), (1, TWO)):
        assert shared_manifest(path, URLS, is_first=True, list_shards=lambda each=each: each, epoch=epoch) == each  # type: ignore[misc]
    assert sorted(os.listdir(tmp_path)) == ["train.v1.epoch-0.json", "train.v1.epoch-1.json"]
    assert shared_manifest(path, URLS, is_first=False, list_shards=never, epoch=0) == ONE
    for each in (ONE, TWO):
        assert find(each.fingerprint, tmp_path / "cache", URLS, path) == each
    assert path_of("~/x.json") == Path.home() / "x.json"


# What is kept in the cache directory


def test_versions_are_kept_and_found(tmp_path: Path) -> None:
    for each in (ONE, TWO, ONE):
        keep(tmp_path, URLS, each)
    for each in (ONE, TWO):
        assert find(each.fingerprint, tmp_path, URLS, None).says_the_same_as(each)
    files = list((tmp_path / "manifests").iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "manifests").stat().st_mode) == 0o700


def test_the_last_few_of_each_data_set_are_kept(tmp_path: Path) -> None:
    versions = [manifest(*map(str, range(number))) for number in range(12)]
    keep(tmp_path, ["s3://other/"], ONE)
    for number, each in enumerate(versions):
        keep(tmp_path, URLS, each)
        for file in (tmp_path / "manifests").glob(f"*{each.fingerprint}.json"):
            os.utime(file, (number, number))
        keep(tmp_path, URLS, versions[0])  # in use all the time
    kept = [each for each in versions if list((tmp_path / "manifests").glob(f"*{each.fingerprint}.json"))]
    assert kept == [versions[0], *versions[5:]]
    with pytest.raises(
        StateError, match=rf"{versions[1].fingerprint}, which is not among the last 8 .*/manifests; res"
    ):
        find(versions[1].fingerprint, tmp_path, URLS, None)
    assert find(ONE.fingerprint, tmp_path, ["s3://other/"], None) == ONE
    with pytest.raises(StateError, match=r"nor beside .*train\.json; resume where"):
        find(versions[1].fingerprint, tmp_path, URLS, tmp_path / "train.json")


def test_a_kept_version_that_is_damaged_is_none(tmp_path: Path) -> None:
    keep(tmp_path, URLS, ONE)
    (file,) = (tmp_path / "manifests").iterdir()
    data = json.loads(file.read_bytes())
    data["manifest"]["objects"][0][1] += 1
    file.write_text(json.dumps(data))
    with pytest.raises(StateError, match="is not among the last 8"):
        find(ONE.fingerprint, tmp_path, URLS, None)


def test_a_directory_that_keeps_nothing_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "manifests").write_text("")
    with pytest.warns(RuntimeWarning, match=r"cannot be kept in .*/manifests \(Not a directory\).*manifest="):
        keep(tmp_path, URLS, ONE)
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StateError):
            find(ONE.fingerprint, directory, URLS, None)
