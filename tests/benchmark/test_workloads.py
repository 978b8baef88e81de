"""Data with the sizes of MLPerf Storage's workloads: the same each time, also in part, and what is said of it."""

from __future__ import annotations

import hashlib
import statistics
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from fastload.bench.verdict import Demand, sentences
from fastload.bench.workloads import WORKLOADS, Workload, make, shards
from fastload.errors import AccessDeniedError, ConfigError
from fastload.store import StoreOptions, open_store
from tests.benchmark.test_pure import FOUND
from tests.conftest import Bucket
from tests.programs import run_cli, run_cli_here

SMALL = Workload("small", 3000, 2000, 40, 4, 0.01, 0.9)


def quiet(words: str) -> None:
    pass


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=str)
def test_sizes_have_the_mean_and_the_deviation_that_are_said(workload: Workload) -> None:
    sizes = [workload.size_of(number) for number in range(2000)]
    assert statistics.fmean(sizes) == pytest.approx(workload.sample_bytes, rel=0.02)
    assert statistics.pstdev(sizes) == pytest.approx(workload.stdev_bytes, rel=0.1)
    assert min(sizes) > 0


def test_contents_never_change() -> None:
    digest = hashlib.sha256(b"".join(SMALL.value(number) for number in range(10)))
    assert digest.hexdigest()[:16] == "1a93ee8252d73611"


def test_every_sample_is_in_one_shard_in_order() -> None:
    found = list(shards(SMALL, 40, shard_bytes=20_000))
    assert [number for each in found for number in each] == list(range(40))
    assert len(found) > 3
    assert list(shards(SMALL, 5, shard_bytes=1)) == [range(number, number + 1) for number in range(5)]


def test_data_is_the_same_each_time_and_more_begins_with_less(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 1.0), ("c", 0.5)):
        make(SMALL, f"{tmp_path}/{name}/", scale, StoreOptions.from_environment(None), quiet)
    whole, again, half = (tmp_path / name / "small-000000.tar" for name in "abc")
    assert whole.read_bytes() == again.read_bytes()
    with tarfile.open(whole) as archive, tarfile.open(half) as part:
        names = archive.getnames()
        assert names[:4] == ["000000000.bin", "000000000.cls", "000000001.bin", "000000001.cls"]
        assert len(names) == 80
        assert part.getnames() == names[:40]
        for name in part.getnames():
            one, two = archive.extractfile(name), part.extractfile(name)
            assert one is not None
            assert two is not None
            assert one.read() == two.read()
    assert not list(tmp_path.rglob(".making*"))


def test_data_is_made_in_a_store_and_only_where_there_is_none(s3: Bucket) -> None:
    url = f"{s3.url}/data/"
    (made,) = make(SMALL, url, 0.5, s3.options, quiet)
    store = open_store(url, s3.options)
    (found,) = store.list(url)
    store.close()
    assert (found.url, found.size > 20 * 1000) == (made, True)
    with pytest.raises(ConfigError, match="is not empty"):
        make(SMALL, url, 0.5, s3.options, quiet)
    with pytest.raises(AccessDeniedError):
        make(SMALL, f"{s3.url}/other/", 0.5, s3.denied_options, quiet)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["make", "nothing", "/tmp/a/"], "--profile nothing: must be one of unet3d, resnet50, cosmoflow"),
        (["make", "unet3d", "/tmp/a"], "data is made under a prefix; write /tmp/a/"),
        (["make", "unet3d", "https://host/a/"], "data is made in a local folder, or in S3"),
        (["make", "unet3d", "/tmp/a/", "--scale=2"], "--scale 2: must be a part"),
        (["/tmp/a/", "--profile=nothing"], "--profile nothing: must be one of"),
        (["/tmp/a/", "--accelerators=2"], "--accelerators are those of a --profile"),
        (["/tmp/a/", "--profile=unet3d", "--ranks=2", "--accelerators=2"], "leave out --ranks"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], says: str) -> None:
    done = run_cli_here("bench", *arguments)
    assert done.returncode == 1
    assert says in done.stderr


def test_the_verdict_says_what_was_asked_for_and_that_it_is_no_result_of_mlperf() -> None:
    demand = Demand("Cached", 0.0035, 0.72, is_given=True)
    said = sentences(replace(FOUND, demands=(demand,), profile="cosmoflow", busy=0.7, ranks=4, batch_size=1))
    assert said[0] == (
        "Cached: 4 accelerators, each of which takes 3.5 ms a batch of 1 would be used to 72%; the consumer limits it, "
        "and the loader keeps up (70% is asked for)."
    )
    assert "no result of MLPerf Storage" in said[1]


@pytest.mark.thorough
def test_a_workload_is_made_and_run_with_its_batch_and_step(tmp_path: Path) -> None:
    url = f"{tmp_path}/data/"
    made = run_cli("bench", "make", "cosmoflow", url, "--scale=0.00002")
    assert "1 shard in" in made.stdout
    done = run_cli(
        "bench", url, "--profile=cosmoflow", "--accelerators=2", "--skip=store,disk,memory,ram,disk epoch",
        "--for=2s", "--cache", tmp_path / "cache",
    )  # fmt: skip
    assert "From the store: 2 accelerators, each of which takes 3.5 ms a batch of 1 would be used to" in done.stdout
    assert "(70% is asked for)" in done.stdout
    assert "no result of MLPerf Storage" in done.stdout
