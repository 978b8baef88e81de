"""`fastload bench` as users run it: against a real store behind a proxy that holds it to a rate."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.proxy import Profile, Proxy
from fastload.bench import limits, schema
from fastload.store import ObjectInfo, StoreOptions
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.processes import until
from tests.programs import run_cli, run_cli_here
from tests.shards import corpus

CAP_BYTES_PER_S = 6e6
CORPUS = corpus(shard_count=6, samples_per_shard=80, value_bytes=30_000)


@pytest.fixture
def capped(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Some shards behind a link that is capped; their prefix."""
    for name, content in CORPUS.shards.items():
        s3.put(f"train/{name}", content)
    with Proxy(s3.server.endpoint_url, Profile(delay_s=0.005, total_bytes_per_s=CAP_BYTES_PER_S)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield f"s3://{s3.name}/train/"


def bench(tmp_path: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run_cli("bench", *arguments, "--cache", tmp_path / "cache", check=check)


def test_a_benchmark_measures_says_what_it_means_and_leaves_nothing(capped: str, tmp_path: Path) -> None:
    done = bench(
        tmp_path, capped, "--skip=disk,memory,demand", "--batch-size=32",
        "--json", tmp_path / "a.json", "--html", tmp_path / "a.html",
    )  # fmt: skip
    result = schema.read(tmp_path / "a.json")
    store = result.phase("store")
    assert store is not None
    goodput = store.value("goodput")
    assert goodput is not None
    assert goodput < 1.1 * CAP_BYTES_PER_S
    cold, ram = result.phase("cold"), result.phase("ram")
    assert cold is not None
    assert ram is not None
    assert cold.value("samples of an epoch") == len(CORPUS.samples)
    assert cold.value("bytes from the store") == result.work.byte_count
    assert ram.value("bytes from the store") == 0
    # Which limit it names depends on what else the machine does: `bench.causes` looks at that.
    assert result.verdict[0].startswith("A first epoch runs at")
    assert done.stdout.startswith("\n".join(result.verdict))
    assert "127.0.0.1" not in (tmp_path / "a.json").read_text()
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.html", "a.json"]


@pytest.mark.thorough
def test_the_store_limit_is_that_of_the_link(capped: str) -> None:
    objects = [ObjectInfo(f"{capped}{name}", len(content)) for name, content in CORPUS.shards.items()]
    phase = limits.store(objects, StoreOptions.from_environment(None), limits.Budget(1 << 30), lambda words: None)
    goodput = phase.value("goodput")
    assert goodput is not None
    assert 0.5 * CAP_BYTES_PER_S < goodput < 1.1 * CAP_BYTES_PER_S  # a busy machine gives less


@pytest.mark.thorough
def test_a_step_is_tried_and_two_results_compare(capped: str, tmp_path: Path) -> None:
    common = [capped, "--skip=store,disk,memory,ram,disk epoch", "--batch-size=32", "--step-ms=30", "--for=2s"]
    for name in ("a", "b"):
        done = bench(tmp_path, *common, "--json", tmp_path / f"{name}.json")
        assert "an accelerator that takes 30 ms a batch of 32 would be used to" in done.stdout
    compared = run_cli("bench", "compare", tmp_path / "a.json", tmp_path / "b.json", "--all", "--fail-above=90%")
    assert "cold: bytes from the store" in compared.stdout
    assert "no change: " in compared.stdout
    result = schema.read(tmp_path / "b.json")
    for phase in result.phases:
        for figure in phase.figures:
            figure.values = [value * 3 for value in figure.values]
    schema.write(result, tmp_path / "worse.json")
    worse = run_cli("bench", "compare", tmp_path / "a.json", tmp_path / "worse.json", "--fail-above=5%", check=False)
    assert worse.returncode == 5
    for phase in result.phases:
        phase.figures, phase.error = [], "it failed"
    schema.write(result, tmp_path / "failed.json")
    failed = run_cli("bench", "compare", tmp_path / "a.json", tmp_path / "failed.json", "--fail-above=5%", check=False)
    assert failed.returncode == 3
    assert "cold: not compared, it failed in the second result: it failed" in failed.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--decode", "jpg"], "--decode jpg names no column"),
        (["--decode", "jpg=picture"], "no decoder is called 'picture'"),
        (["--decode", "cls=integer:3"], "only an image takes a size"),
        (["--skip", "everything"], "--skip everything: must be one of"),
        (["--cache-share", "2"], "--cache-share 2: must be a part"),
        (["--for", "soon"], "--for='soon' is not a length of time"),
        (["--shuffle", "well"], "--shuffle well: must be one of"),
        (["--json", "/no/such/folder/a.json"], "there is no folder /no/such/folder"),
        (["--max-bytes", "1MiB"], "a shard is the least that can be read"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_measured(
    capped: str, tmp_path: Path, arguments: list[str], says: str
) -> None:
    done = run_cli_here("bench", capped, *arguments, "--cache", tmp_path / "cache")
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("fastload: ConfigError") == 1
    assert not list(tmp_path.iterdir())


def test_data_that_is_not_there_is_an_error(s3: Bucket, tmp_path: Path) -> None:
    done = bench(tmp_path, f"s3://{s3.name}/nothing/", check=False)
    assert done.returncode == 1
    assert f"s3://{s3.name}/nothing/" in done.stderr
    assert not list(tmp_path.iterdir())


def test_packed_shards_are_measured_as_the_store_has_them(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for part in range(3):
        lines = b"".join(b'{"id": %d, "text": "%s"}\n' % (number, b"x" * 500) for number in range(40))
        (tmp_path / "data" / f"p-{part}.jsonl.gz").write_bytes(gzip.compress(lines))
    done = bench(
        tmp_path, f"{tmp_path}/data/", "--skip=disk,memory,demand,ram,disk epoch", "--json", tmp_path / "a.json"
    )
    result = schema.read(tmp_path / "a.json")
    store, cold = result.phase("store"), result.phase("cold")
    assert store is not None
    assert not store.error
    assert cold is not None
    assert cold.value("samples of an epoch") == 120
    assert "(packed " in done.stderr


@pytest.mark.thorough
def test_decoders_are_measured_on_columns_that_some_samples_lack_of_a_format_that_is_named(tmp_path: Path) -> None:
    lines = b"".join(b'{"id": %d%s}\n' % (number, b', "n": 1' * (number % 2)) for number in range(40))
    (tmp_path / "data.txt").write_bytes(lines)
    bench(
        tmp_path, tmp_path / "data.txt", "--format=jsonl", "--decode=n?=json", "--decode=id=integer",
        "--skip=store,disk,memory,demand,ram,disk epoch", "--json", tmp_path / "a.json",
    )  # fmt: skip
    decode = schema.read(tmp_path / "a.json").phase("decode")
    assert decode is not None
    assert {figure.name for figure in decode.figures} >= {"decode n?, 1 thread", "decode id, 1 thread"}


@pytest.mark.thorough
def test_a_phase_that_fails_is_a_line_and_the_others_go_on(capped: str, tmp_path: Path) -> None:
    done = bench(
        tmp_path, capped, "--skip=store,disk,memory,demand,ram,disk epoch", "--decode=nosuch=integer", check=False
    )
    assert done.returncode == 3
    assert "failed: " in done.stdout
    assert "nosuch" in done.stdout


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_reports_what_is_there_and_leaves_nothing(
    capped: str, tmp_path: Path, number: signal.Signals
) -> None:
    command = [
        sys.executable,
        "-c",
        "from fastload.cli import main; main()",
        "bench",
        capped,
        "--cache",
        tmp_path / "cache",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "FASTLOAD_IDLE_S": "0"}
    )
    until(lambda: any((each / "full").exists() for each in tmp_path.glob("cache-bench-*")))
    time.sleep(0.2)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert "Interrupted: this is what was measured until then." in printed
    assert "The store by itself" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_what_a_killed_run_left_is_removed_by_the_next(capped: str, tmp_path: Path) -> None:
    left = tmp_path / "cache-bench-999999999"
    left.mkdir()
    (left / "chunk").write_bytes(b"x")
    bench(tmp_path, capped, "--skip=store,disk,memory,demand,ram,disk epoch")
    assert not left.exists()
