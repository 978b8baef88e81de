"""Files in torch's worker processes, and in children that inherit them."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.utils.data

import fastload
from fastload.client.cache import handle_of
from tests.conftest import Bucket
from tests.files.conftest import CHUNK_BYTES
from tests.files.test_open import content, node
from tests.patience import PATIENCE_S
from tests.programs import run as program
from tests.service.test_fork import in_child

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class Objects(torch.utils.data.Dataset[bytes]):
    """As users write them: one object for each sample, opened when it is asked for."""

    def __init__(self, urls: list[str], cache: fastload.Cache | str) -> None:
        self.urls, self.cache = urls, cache

    def __len__(self) -> int:
        return len(self.urls)

    def __getitem__(self, number: int) -> bytes:
        with fastload.open(self.urls[number], self.cache) as file:
            return file.read()


def as_they_are(samples: list[bytes]) -> list[bytes]:
    return samples


@pytest.fixture
def cache(served: fastload.Cache) -> fastload.Cache:
    return served


@pytest.fixture
def objects(s3: Bucket) -> dict[str, bytes]:
    return {s3.put(f"{number:03d}", data): data for number in range(40) if (data := content(3000 + 7 * number, number))}


def read(dataset: Objects, method: str, workers: int = 2) -> list[bytes]:
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=8,
        num_workers=workers,
        multiprocessing_context=method,
        collate_fn=as_they_are,
        timeout=PATIENCE_S,
    )
    return [data for batch in loader for data in batch]


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes(cache: fastload.Cache, objects: dict[str, bytes], method: str) -> None:
    dataset = Objects(list(objects), cache)
    workers = 1 if method == "spawn" else 2  # a start takes seconds
    with handle_of(cache).consumer():  # so that one service serves both epochs
        assert read(dataset, method, workers) == list(objects.values())
        fetched = node(cache)["node"]["fetched_bytes"]
        assert read(dataset, method, workers) == list(objects.values())
        figures = node(cache)
        assert figures["node"]["fetched_bytes"] == fetched == sum(map(len, objects.values()))
        # One question for each object and one answer with its bytes, in whichever process it was opened; but for those
        # that were sent a second time since the first was late.
        assert figures["store"]["requests"] - figures["node"]["hedged_requests"] == 2 * len(objects)


def test_a_parent_that_has_files_open(cache: fastload.Cache, objects: dict[str, bytes]) -> None:
    dataset = Objects(list(objects), cache)
    url, data = next(iter(objects.items()))
    with fastload.open(url, cache) as file:
        assert dataset[3] == objects[dataset.urls[3]]
        assert read(dataset, "fork") == list(objects.values())
        assert file.read() == data


def test_an_open_file_in_a_forked_child(cache: fastload.Cache, s3: Bucket) -> None:
    data = content(8 * CHUNK_BYTES)
    file = fastload.open(s3.put("object", data), cache)
    assert file.read(CHUNK_BYTES + 1) == data[: CHUNK_BYTES + 1]

    def child() -> None:
        assert file.read(2 * CHUNK_BYTES) == data[CHUNK_BYTES + 1 : 3 * CHUNK_BYTES + 1]
        with fastload.open(file.url, cache) as again:
            assert again.read() == data
        file.close()
        cache.close()

    assert in_child(child) == ""
    assert file.read() == data[CHUNK_BYTES + 1 :]
    file.close()


def test_a_service_in_this_process(s3: Bucket, tmp_path: Path, objects: dict[str, bytes]) -> None:
    with fastload.Cache(
        tmp_path / "inprocess", ram_bytes="4MiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        dataset = Objects(list(objects), cache)
        assert dataset[0] == next(iter(objects.values()))
        assert read(dataset, "fork") == list(objects.values())


def run(code: Callable[[], object] | str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_a_directory_or_the_environment_names_the_cache(
    tmp_path: Path, cache: fastload.Cache, objects: dict[str, bytes]
) -> None:
    """And a process ends, with files that nobody has closed, without having to say so."""
    code = (
        "import sys, json, fastload\n"
        "urls = json.loads(sys.argv[1])\n"
        "files = [fastload.open(url, *sys.argv[2:]) for url in urls]\n"
        "sizes = [len(file.read(100)) + len(file.read()) for file in files]\n"
        "for file in files:\n"
        "    file.raw.seek(0)\n"
        "    file.raw.readinto(bytearray(10))\n"  # in the middle of a chunk
        "assert 'torch' not in sys.modules and 'numba' not in sys.modules\n"
        "print(json.dumps(sizes))\n"
    )
    urls = random.Random(0).sample(sorted(objects), 10)
    sizes = [len(objects[url]) for url in urls]
    directory = str(cache.directory)
    assert json.loads(run(code, json.dumps(urls), directory)) == sizes
    assert json.loads(run(code, json.dumps(urls), FASTLOAD_CACHE=directory)) == sizes


def test_the_example(tmp_path: Path, objects: dict[str, bytes]) -> None:
    example = Path(__file__).parents[2] / "examples" / "open_objects.py"
    environment = {**os.environ, "FASTLOAD_CACHE": str(tmp_path / "cache")}
    done = program(example.read_text(), *objects, env=environment, path=example)
    total = sum(map(len, objects.values()))
    expected = [
        rf"rank 0 epoch {epoch}: {total} bytes in \S+ s; the node has fetched {total} so far\n" for epoch in (0, 1)
    ]
    assert re.fullmatch("".join(expected), done.stdout), done.stdout
