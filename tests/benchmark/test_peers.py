"""Other loaders: what is the same for all of them, how well they shuffle, and that one that fails is a line."""

from __future__ import annotations

import io
import random
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.bench import schema
from fastload.bench.peers import NAMES, module
from fastload.bench.peers.job import (
    SHUFFLE_BUFFER,
    Job,
    Request,
    members_of,
    samples_of_members,
    shuffled,
    split_name,
)
from fastload.bench.peers.order import Stored, seen
from fastload.bench.peers.race import Race, ask, passes
from fastload.errors import ConfigError, FastloadError, ShardError
from fastload.store import ObjectInfo, StoreOptions
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.programs import run_cli
from tests.shards import corpus, tar_of

CORPUS = corpus(shard_count=4, samples_per_shard=24, value_bytes=2000)


# The order that came


def stored(shards: int, samples: int) -> Stored:
    return Stored.of([[f"{shard}/{number}" for number in range(samples)] for shard in range(shards)])


def test_an_epoch_in_stored_order_is_not_shuffled_and_a_perfect_shuffle_is_near_a_third() -> None:
    here = stored(10, 100)
    in_order = seen(here, list(here.place_of), [100] * 10)
    assert (in_order.missing, in_order.repeated) == (0, 0)
    assert in_order.distance == pytest.approx(1 / 1000)
    assert in_order.of_one_shard == 1.0
    keys = list(here.place_of)
    random.Random(0).shuffle(keys)
    perfect = seen(here, keys, [100] * 10)
    assert perfect.distance == pytest.approx(1 / 3, abs=0.03)
    assert perfect.of_one_shard is not None
    assert perfect.of_one_shard < 0.25


@given(st.lists(st.integers(0, 12), max_size=20))
def test_samples_that_are_missing_or_come_too_often_are_counted(numbers: list[int]) -> None:
    here = stored(2, 5)
    names = [*here.place_of, "no such/1", "no such/2", "no such/3"]
    found = seen(here, [names[number] for number in numbers], [len(numbers)])
    assert found.missing == len(set(range(10)) - set(numbers))
    assert found.repeated == len(numbers) - len(set(range(10)) & set(numbers))


def test_keys_that_are_not_unique_are_counted_but_say_nothing_of_the_order() -> None:
    here = Stored.of([["a", "b"], ["a", "b"]])
    found = seen(here, ["a", "b", "a", "b"], [2, 2])
    assert (found.missing, found.repeated, found.distance) == (0, 0, None)
    assert seen(here, ["a", "a", "a"], [3]).repeated == 1


# What they share


def test_samples_of_an_archive_come_once_and_shuffled() -> None:
    there = {f"k/{number:04d}": {"jpg": b"%d" % number, "cls": b"1"} for number in range(2 * SHUFFLE_BUFFER)}
    samples = list(shuffled(samples_of_members(members_of(io.BytesIO(tar_of(there)))), seed=0))
    assert {sample.pop("__key__"): sample for sample in samples} == there
    assert len(samples) == len(there)
    assert [sample["jpg"] for sample in samples] != [sample["jpg"] for sample in there.values()]


@pytest.mark.parametrize(
    ("name", "key", "column"),
    [("a.b/c.jpg", "a.b/c", "jpg"), ("c.seg.png", "c", "seg.png"), ("c", "c", ""), ("d/c.x", "d/c", "x")],
)
def test_a_key_ends_at_the_first_dot_of_the_files_own_name(name: str, key: str, column: str) -> None:
    assert split_name(name) == (key, column)


def test_every_loader_names_its_documentation_and_is_counted() -> None:
    for name in NAMES:
        about = module(name).ABOUT
        assert about.documentation.startswith("https://")
        assert about.distributions
    assert passes([], 3) == 0
    assert passes(["torch"], 2) == 3  # ours twice, and the copies that it is made from
    assert passes(["webdataset", "spdl"], 1) == 1 + 1 + 1 + 3


# In processes


def installed(name: str) -> bool:
    try:
        return bool([version(each) for each in module(name).ABOUT.distributions])
    except PackageNotFoundError:
        return False


def job(name: str, source: str, tmp_path: Path, shards: str, **more: object) -> Job:
    return Job(
        urls=[f"{shards}{each}" for each in CORPUS.shards],
        columns=["bin", "cls"],
        batch_size=16,
        workers=1,
        folder=str(tmp_path),
        source=source,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_loader_gives_each_sample_once(name: str, s3: Bucket, tmp_path: Path) -> None:
    if not installed(name):
        pytest.skip(f"{name} is not installed")
    shards, here, source = CORPUS.put(s3), CORPUS.write(tmp_path / "shards"), ""
    reads = module(name).ABOUT.reads
    if reads not in ("shards", "copies"):
        source = str(tmp_path / reads)
        paths = [f"{here}{each}" for each in CORPUS.shards]
        ask(Request(peer=name, shards=paths, columns=["bin", "cls"], folder=source), tmp_path, PATIENCE_S)
    wanted = job(name, source, tmp_path, here if reads == "copies" else shards)
    (epoch,) = ask(Request(peer=name, job=wanted, epochs=[0]), tmp_path, PATIENCE_S).epochs
    assert sorted(epoch.keys) == sorted(CORPUS.samples)
    assert sum(epoch.batch_sizes) == len(CORPUS.samples)
    payload = sum(len(value) for sample in CORPUS.samples.values() for value in sample.values())
    assert epoch.payload_bytes in (payload, None)
    assert epoch.cpu_s > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise RuntimeError('no such\\ncodec')", "RuntimeError: no such codec"),
        ("import os; os._exit(7)", "spdl ended with status 7 before it gave its figures"),
        ("import time; time.sleep(1000)", "has not ended after 6 s"),
    ],
)
def test_a_loader_that_raises_dies_or_hangs_is_an_error_in_a_line(
    code: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spdl").mkdir()
    (tmp_path / "spdl/__init__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    deadline_s = 6.0 if "sleep" in code else PATIENCE_S
    with pytest.raises(FastloadError, match=says):
        ask(Request(peer="spdl", job=job("spdl", "", tmp_path, "/"), epochs=[0]), tmp_path, deadline_s)


@pytest.mark.thorough
def test_loaders_take_turns_and_one_that_is_missing_is_a_line(s3: Bucket, tmp_path: Path) -> None:
    missing = next((name for name in NAMES if not installed(name)), "")
    done = run_cli(
        "bench", CORPUS.put(s3), "--cache", tmp_path / "cache", "--batch-size=16", "--workers=1", "--repeats=1",
        "--skip=store,disk,memory,decode,ram,disk epoch,demand", f"--peers=webdataset,{missing}",
        "--json", tmp_path / "a.json", check=False,
    )  # fmt: skip
    assert done.returncode == (3 if missing else 0), done.stderr
    result = schema.read(tmp_path / "a.json")
    ours, theirs = result.phase("peer fastload"), result.phase("peer webdataset")
    for phase in (ours, theirs):
        assert phase is not None
        assert phase.value("samples that did not come") == phase.value("samples that came too often") == 0
        assert phase.value("later epoch, page cache dropped")
        assert "each sample came exactly once in every epoch" in phase.notes
        assert 0 < (phase.value("distance of neighbours, of the data") or 0) < 1
    assert "webdataset feeds" in done.stdout
    if missing:
        assert "is not installed: pip install 'fastload[bench]'" in done.stdout
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.json"]


def test_an_unknown_loader_is_an_error_that_names_those_there_are(tmp_path: Path) -> None:
    done = run_cli("bench", "/nowhere/", "--peers=tensorflow", check=False)
    assert done.returncode == 1
    assert "--peers tensorflow: must be one of webdataset, streaming" in done.stderr


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [("a.jsonl", ConfigError, "compares loaders over tar shards, and .*a.jsonl is none; give your own"),
     ("a.tar", ShardError, "a.tar cannot be read by Python's tarfile: .*; write it again")],
)  # fmt: skip
def test_shards_that_other_loaders_do_not_read_are_an_error(
    name: str, error: type[FastloadError], says: str, tmp_path: Path
) -> None:
    shard = tmp_path / name
    shard.write_text('{"x": 1}\n' * 2000)
    race = Race(
        ["webdataset"], [ObjectInfo(str(shard), shard.stat().st_size, None)], job("webdataset", "", tmp_path, "/"),
        tmp_path, store_options=StoreOptions(), repeats=1, arena_least=1, timeout_s=9.0, report=print,
    )  # fmt: skip
    with pytest.raises(error, match=says):
        race.run()
    assert race.phases() == []
