"""Loads through the node: its processes read a checkpoint from the store once, and have one copy of it in memory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastload
from fastload import checkpoint
from fastload.checkpoint import copies, writing
from fastload.checkpoint.foreign import ENDING
from fastload.client import loader
from fastload.client.cache import handle_of
from fastload.errors import AccessDeniedError
from fastload.store import open_store
from tests.checkpoint.gate import Gate, gate_to
from tests.conftest import Bucket
from tests.jobs.pool import Rank, RankPool
from tests.patience import PATIENCE_S
from tests.processes import service_pids, until
from tests.programs import Program

SMALL = {"ram_bytes": "1MiB", "disk_bytes": "1MiB", "chunk_bytes": "64KiB", "checkpoint_disk_bytes": 0}
ROWS, COLUMNS = 64, 40 << 10  # of float32: 10 MiB
BYTES = 4 * ROWS * COLUMNS


def state() -> dict[str, Any]:
    rows = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    return {"w": rows, "odd": torch.arange(1000, dtype=torch.uint8), "half": rows[0].to(torch.bfloat16), "step": 7}


def check(loaded: dict[str, Any]) -> None:
    for name, expected in state().items():
        assert torch.equal(loaded[name], expected) if isinstance(expected, torch.Tensor) else loaded[name] == expected


def places(status: str) -> int:
    """Bytes, as /proc says, of the memory of loads that this process maps."""
    found, is_load = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_load = "memfd:fastload-arena" in line
        elif is_load and line.startswith(f"{status}:"):
            found += int(line.split()[1]) << 10
    return found


@pytest.fixture
def gate(s3: Bucket) -> Iterator[Gate]:
    with gate_to(s3) as gate:
        yield gate


@pytest.fixture
def url(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a checkpoint that was saved without a service."""
    url = f"{s3.url}/run/1"
    with monkeypatch.context() as patch:
        patch.setattr(writing, "SMALL_BYTES", 1 << 30)
        checkpoint.save(state(), url, storage_options=options(s3.server.endpoint_url))
    return url


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    """Whose service runs."""
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache, cache._handle.consumer():
        yield cache


def options(endpoint_url: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint_url}


def received(gate: Gate) -> int:
    """Bytes of segments that the store has sent."""
    return sum(size for method, path, size in gate.seen if method == "GET" and ENDING in path)


def load(url: str, cache: Any, gate: Gate, **more: Any) -> dict[str, Any]:
    return checkpoint.load(url, cache=cache, storage_options=options(gate.url), **more)


def test_tensors_that_are_stored_once_are_apart(
    s3: Bucket, cache: fastload.Cache, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory that is shared, what is written to one is not seen in another one."""
    rows = state()["w"]
    with monkeypatch.context() as patch:
        patch.setattr(writing, "SMALL_BYTES", 1 << 30)
        tied = {"part": rows[3:5], "w": rows, "head": rows}
        checkpoint.save(tied, f"{s3.url}/tied", storage_options=options(s3.server.endpoint_url))
    loaded = load(f"{s3.url}/tied", cache, gate)
    assert received(gate) < 1.02 * BYTES
    assert places("Rss") >= BYTES
    for name in ("part", "w", "head"):
        loaded[name].fill_(-1)
        for other in tied.keys() - {name}:
            assert torch.equal(loaded[other], tied[other])
        loaded[name].copy_(tied[name])


# It loads, and does what it is asked to.
LOADER = """
import json, sys, fastload
from fastload import checkpoint
from tests.checkpoint.test_shared_loads import SMALL, check, places
url, directory, options = sys.argv[1:]
with fastload.Cache(directory, **SMALL) as cache:
    loaded = checkpoint.load(url, cache=cache, storage_options=json.loads(options))
    check(loaded)
    print("loaded", flush=True)
    for line in sys.stdin:
        if line == "write\\n":
            loaded["w"].fill_(-1)
        else:
            check(loaded)
        print(places("Pss"), places("Anonymous"), flush=True)
"""


def program(url: str, directory: Path, gate: Gate) -> Program:
    return Program(LOADER, url, directory, json.dumps(options(gate.url)))


def say(program: Program, what: str) -> list[int]:
    program.stdin.write(f"{what}\n")
    program.stdin.flush()
    return [int(word) for word in program.stdout.readline().split()]


@pytest.mark.parametrize("count", [4, *(pytest.param(n, marks=pytest.mark.thorough) for n in (1, 8))])
def test_processes_that_load_at_once_read_once_and_share_memory(
    url: str, gate: Gate, cache: fastload.Cache, count: int
) -> None:
    with ExitStack() as stack:
        programs = [stack.enter_context(program(url, cache.directory, gate)) for _ in range(count)]
        for each in programs:
            assert each.stdout.readline() == "loaded\n", each.stderr.read()
        assert BYTES <= received(gate) <= 1.02 * BYTES
        found = [say(each, "look") for each in programs]
        assert sum(proportional for proportional, _ in found) < 1.02 * BYTES  # the service maps it as well
        assert sum(own for _, own in found) == 0
        # What is written is a process's own: neither others see it, nor who loads later.
        (_, own) = say(programs[0], "write")
        assert BYTES <= own < 1.02 * BYTES
        for each in programs[1:]:
            assert say(each, "look")[1] == 0
        check(load(url, cache, gate))
        assert received(gate) <= 1.02 * BYTES
    stats = cache.stats()
    assert stats["checkpoint_fetched_bytes"] == received(gate)
    assert stats["checkpoint_given_bytes"] == (count + 1) * received(gate)
    assert stats["checkpoint_shared_bytes"] >= BYTES


def test_ranks_that_need_other_parts_read_their_union_once(
    url: str, gate: Gate, cache: fastload.Cache, pool: RankPool
) -> None:
    ranks = [Rank(number, 4, 4, "loads") for number in range(4)]
    answers = pool.run("loads", load_parts, ranks, url, str(cache.directory), options(gate.url))
    assert answers == [None] * 4, answers
    assert BYTES <= received(gate) <= 1.02 * BYTES


def load_parts(rank: Rank, url: str, directory: str, storage_options: dict[str, Any]) -> None:
    """Rows, columns, and both on a square; with `into=` and as a stream as well."""
    given: dict[str, Any] = {"cache": directory, "storage_options": storage_options}
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for mesh, placements in [(line, [Shard(1)]), (line, [Shard(0)]), (square, [Shard(1), Shard(0)])]:
        part = {"w": distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, placements)}
        dcp.load(part, storage_reader=checkpoint.Reader(url, **given))
        assert torch.equal(part["w"].to_local(), distribute_tensor(state()["w"], mesh, placements).to_local())
    into = {name: torch.zeros_like(leaf) if name != "step" else 0 for name, leaf in state().items()}
    checkpoint.load(url, into, **given)
    check(into)
    streamed = dict(checkpoint.stream(url, **given))
    check({**streamed, "step": 7})


def test_a_process_that_copies_and_has_no_others_reads_by_itself(
    url: str, gate: Gate, cache: fastload.Cache, tmp_path: Path
) -> None:
    """So does one for which a service would have to be started."""
    into = {"w": torch.zeros(ROWS, COLUMNS)}
    load(url, cache, gate, into=into)
    assert torch.equal(into["w"], state()["w"])
    assert cache.stats()["checkpoint_given_bytes"] == 0
    check(load(url, tmp_path / "other", gate))
    assert not (tmp_path / "other").exists()


def test_what_others_have_written_is_shared_too(s3: Bucket, gate: Gate, cache: fastload.Cache) -> None:
    """A folder of safetensors files, without checksums: the version is what was looked at."""
    names = ["a.safetensors", "b.safetensors"]
    for number, name in enumerate(names):
        header = json.dumps({name: {"dtype": "F32", "shape": [3 << 20], "data_offsets": [0, 12 << 20]}}).encode()
        header = header.ljust(len(header) + 8 - (len(header) + 8) % 8 + 4 * number)  # one begins at an odd place
        content = torch.full((3 << 20,), float(number)).numpy().tobytes()
        s3.put(f"model/{name}", len(header).to_bytes(8, "little") + header + content)
    for _ in range(3):
        loaded = load(f"{s3.url}/model", cache, gate)
        for number, name in enumerate(names):
            assert (loaded[name] == number).all()
    headers = 3 * 2 * (256 << 10)
    assert received(gate) <= 1.02 * (24 << 20) + headers
    assert cache.stats()["checkpoint_given_bytes"] >= 3 * (24 << 20)


class Paused:
    """The first answer but `after` of the store waits, for a segment."""

    def __init__(self, gate: Gate, after: int = 1) -> None:
        self.came, self.goes_on = threading.Event(), threading.Event()
        self._left, self._lock = after, threading.Lock()
        gate.refuses = self._refuses

    def _refuses(self, method: str, path: str) -> bool:
        if method == "GET" and ENDING in path:
            with self._lock:
                self._left -= 1
                is_held = self._left < 0
            if is_held:
                self.came.set()
                assert self.goes_on.wait(PATIENCE_S)
        return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_service_ends_or_hangs_in_the_middle(
    url: str,
    gate: Gate,
    cache: fastload.Cache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: signal.Signals,
) -> None:
    monkeypatch.setattr(loader, "_QUIET_S", 0.05)
    monkeypatch.setattr(loader, "_SILENCE_S", 0.3)
    paused = Paused(gate)
    (service,) = service_pids(cache.directory)
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load, url, cache, gate)
        assert paused.came.wait(PATIENCE_S)
        os.kill(service, how)
        if how is signal.SIGSTOP:
            until(lambda: "has not answered for" in caplog.text)
        paused.goes_on.set()
        check(loaded.result(PATIENCE_S))
    assert "is read by this process alone" in caplog.text
    if how is signal.SIGSTOP:
        os.kill(service, signal.SIGCONT)


def test_a_process_that_is_killed_in_the_middle_leaves_nothing_and_others_go_on(
    url: str, gate: Gate, cache: fastload.Cache
) -> None:
    (service,) = service_pids(cache.directory)
    before = memories(service)
    paused = Paused(gate)
    with program(url, cache.directory, gate) as one, program(url, cache.directory, gate) as two:
        assert paused.came.wait(PATIENCE_S)
        until(lambda: loads_under_way(cache) == 2)
        one.kill()
        paused.goes_on.set()
        assert two.stdout.readline() == "loaded\n", two.stderr.read()
    assert received(gate) <= 1.02 * BYTES
    assert cache.stats()["checkpoint_shared_bytes"] >= BYTES
    assert memories(service) == before + 2  # of the object, and of its mapping


def memories(pid: int) -> int:
    """Descriptors of shared memory that a process has."""
    found = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found += "memfd:fastload-arena" in os.readlink(path)
    return found


def loads_under_way(cache: fastload.Cache) -> int:
    with cache._handle.consumer() as consumer:
        return sum(each["name"].startswith("load ") for each in consumer.stats()["consumers"])


def test_a_byte_that_flips_in_the_nodes_memory_is_read_from_the_store(
    url: str, gate: Gate, cache: fastload.Cache, caplog: pytest.LogCaptureFixture
) -> None:
    check(load(url, cache, gate))
    before = received(gate)
    flip(cache.directory, 4 << 20)
    for _ in range(2):
        loaded = load(url, cache, gate)
        check(loaded)
        assert "is damaged: the 65536 bytes from 4194304 on are not what was written; it is not used" in caplog.text
    assert before < received(gate) <= before + 2 * (9 << 20)
    into = {"w": torch.zeros(ROWS, COLUMNS)}
    load(url, cache, gate, into=into)
    assert torch.equal(into["w"], loaded["w"])


def flip(directory: Path, offset: int) -> None:
    """One bit of the memory that the service holds for a load."""
    (service,) = service_pids(directory)
    starts = [
        int(line.split("-")[0], 16)
        for line in Path(f"/proc/{service}/maps").read_text().splitlines()
        if "memfd:fastload-arena" in line
        and int(line.split("-")[1].split()[0], 16) - int(line.split("-")[0], 16) > BYTES
    ]
    assert len(starts) == 1
    with open(f"/proc/{service}/mem", "r+b", buffering=0) as memory:
        memory.seek(starts[0] + offset)
        byte = memory.read(1)
        memory.seek(starts[0] + offset)
        memory.write(bytes([byte[0] ^ 1]))


def test_memory_that_is_too_small_takes_what_fits(
    url: str, gate: Gate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {**SMALL, "checkpoint_ram_bytes": "9MiB"}
    with fastload.Cache(tmp_path / "cache", **given) as cache, cache._handle.consumer():
        for _ in range(2):
            check(load(url, cache, gate))
        assert 8 << 20 <= cache.stats()["checkpoint_shared_bytes"] <= 9 << 20
    (record, _) = caplog.records
    assert re.search(
        r"some of s3:.* is read by this process alone: checkpoint_ram_bytes='9MiB' leaves no room", record.getMessage()
    )


def test_a_save_takes_the_memory_of_loads(url: str, s3: Bucket, gate: Gate, tmp_path: Path) -> None:
    given = {**SMALL, "checkpoint_ram_bytes": "12MiB"}
    with fastload.Cache(tmp_path / "cache", **given) as cache, cache._handle.consumer():
        check(load(url, cache, gate))
        assert cache.stats()["checkpoint_shared_bytes"] >= BYTES
        gate.shut(ENDING)
        saving = checkpoint.save(
            state(), f"{s3.url}/run/2", until="memory", cache=cache, storage_options=options(gate.url)
        )
        stats = cache.stats()
        assert stats["checkpoint_ram_bytes"] >= BYTES
        assert stats["checkpoint_shared_bytes"] == 0
        check(load(url, cache, gate))  # for which there is no room: it reads by itself
        gate.open()
        saving.wait("store", PATIENCE_S)


def test_another_identity_gets_nothing_of_it(url: str, s3: Bucket, gate: Gate, cache: fastload.Cache) -> None:
    check(load(url, cache, gate))
    (path,) = {path for _, path, _ in gate.seen if ENDING in path}
    segment = "s3:/" + path
    denied = s3.denied_options
    keys = {"key": denied.access_key_id, "secret": denied.secret_access_key}
    another = cache._handle.loader({**options(gate.url), **keys}, "another")
    with pytest.raises(AccessDeniedError):
        another.load(segment, object_size(s3, segment), None)[1].result(PATIENCE_S)
    another.close()
    with pytest.raises(AccessDeniedError):
        checkpoint.load(url, cache=cache, storage_options={**options(gate.url), **keys})
    # With other options, who may read it gets the memory that is there.
    before = received(gate)
    again = checkpoint.load(url, cache=cache, storage_options={**options(gate.url), "region": "eu-west-3"})
    check(again)
    assert received(gate) == before


def object_size(s3: Bucket, url: str) -> int:
    store = open_store(url, s3.options)
    try:
        return store.head(url).size
    finally:
        store.close()


def test_without_a_service_a_load_goes_on(
    url: str, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(copies, "_STARTING_BYTES", 1 << 20)
    (tmp_path / "file").write_text("")
    check(load(url, tmp_path / "file" / "cache", gate))
    assert "is read by this process alone" in caplog.text
    caplog.clear()
    check(load(url, tmp_path / "cache", gate))  # one is started
    assert "serving" in (tmp_path / "cache" / "service.log").read_text()
    handle_of(tmp_path / "cache").close()
    with fastload.Cache(tmp_path / "here", service="inprocess", **SMALL) as cache, cache._handle.consumer():
        check(load(url, cache, gate))
        assert cache.stats()["checkpoint_fetched_bytes"] >= BYTES
    assert caplog.records == []
    until(lambda: not service_pids(tmp_path / "cache"))
