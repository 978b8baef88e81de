"""Processes die; the others go on, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fastload
from tests.patience import PATIENCE_S
from tests.processes import kill_service, service_pids, until
from tests.programs import Program, run
from tests.shards import check_samples, corpus, samples_of

SMALL = {"ram_bytes": "1MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}

CONSUMER = """
import json, sys, fastload
cache = fastload.Cache(sys.argv[2], **json.loads(sys.argv[3]))
dataset = fastload.StreamingDataset(sys.argv[1], cache=cache, shuffle=True)
loader = fastload.DataLoader(dataset, batch_size=8, num_workers=2)
for batch in loader:
    print(json.dumps(list(batch["__key__"])), flush=True)
    sys.stdin.readline()
loader.close()
"""


def start_consumer(url: str, directory: Path) -> Program:
    return Program(CONSUMER, url, directory, json.dumps(SMALL))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_service_is_killed_in_mid_epoch(s3, tmp_path: Path, num_workers: int) -> None:
    data = corpus(shard_count=8, samples_per_shard=24)
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True, shuffle_window="256KiB")
        loader = fastload.DataLoader(dataset, batch_size=8, num_workers=num_workers)
        undisturbed = [batch["__key__"] for batch in loader]
        dataset.set_epoch(0)
        keys = []
        for number, batch in enumerate(loader):
            keys.append(check_samples(data, samples_of(batch)))
            if number in (2, 9, 10):
                kill_service(tmp_path / "cache")
        assert keys == undisturbed
        loader.close()


def test_the_service_is_killed_between_epochs(s3, tmp_path: Path) -> None:
    data = corpus()
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        loader = fastload.DataLoader(fastload.StreamingDataset(data.put(s3), cache=cache), batch_size=8)
        for _ in range(3):
            assert [key for batch in loader for key in batch["__key__"]] == list(data.samples)
            kill_service(tmp_path / "cache")
        loader.close()


def test_a_consumer_is_killed_and_the_other_goes_on(s3, tmp_path: Path) -> None:
    data = corpus(shard_count=8, samples_per_shard=24)
    url, directory = data.put(s3), tmp_path / "cache"
    victim = start_consumer(url, directory)
    with victim:
        assert json.loads(victim.stdout.readline())  # it holds leases now, and most of the small arena
        with fastload.Cache(directory, **SMALL) as cache:
            dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True)
            loader = fastload.DataLoader(dataset, batch_size=8, num_workers=2)
            keys = []
            for number, batch in enumerate(loader):
                keys += check_samples(data, samples_of(batch))
                if number == 3:
                    victim.kill()
                    victim.wait()
            assert sorted(keys) == sorted(data.samples)
            loader.close()


def test_a_job_that_was_killed_resumes_from_the_cache(s3, tmp_path: Path) -> None:
    data = corpus()
    url, directory = data.put(s3), tmp_path / "cache"
    victim = start_consumer(url, directory)
    with victim:
        for _ in range(4):
            assert victim.stdout.readline()
            victim.stdin.write("\n")
            victim.stdin.flush()
        victim.kill()
    until(lambda: not service_pids(directory))
    with fastload.Cache(directory, **SMALL) as cache:
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True)
        loader = fastload.DataLoader(dataset, batch_size=8)
        keys = [key for batch in loader for key in check_samples(data, samples_of(batch))]
        assert sorted(keys) == sorted(data.samples)
        assert loader.stats()["disk_bytes"] > 0
        loader.close()


def test_a_script_that_fails_in_mid_epoch_ends_promptly(s3, tmp_path: Path) -> None:
    code = CONSUMER.replace("sys.stdin.readline()", "raise RuntimeError('mine')")
    done = run(code, corpus().put(s3), tmp_path / "cache", json.dumps(SMALL), check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("RuntimeError: mine")
    until(lambda: not service_pids(tmp_path / "cache"))


def test_ctrl_c_ends_a_job_promptly(s3, tmp_path: Path) -> None:
    data = corpus()
    command = [sys.executable, "-c", CONSUMER, data.put(s3), str(tmp_path / "cache"), json.dumps(SMALL)]
    job = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    with job:
        assert job.stdout.readline()
        os.kill(job.pid, signal.SIGINT)
        assert job.wait(timeout=PATIENCE_S) != 0
    until(lambda: not service_pids(tmp_path / "cache"))
