"""What a checkpoint costs: the stall, the disk, the upload, and starting again on the same node.

    python -m bench.checkpoint                    # 2 GB of float32, five rounds: some minutes
    python -m bench.checkpoint --quick            # an eighth of it, two rounds: a look
    python -m bench.checkpoint --peer             # beside s3torchconnector (pip install 'fastload[bench]'), 0.3 GB

Everything is measured in turn within a round, and is a ratio within it; figures are medians over rounds. The store is a
sink (`bench.sink`), which costs little, on this machine.

*stall*: from the call of `checkpoint.save(until="memory")` to its return, of the time of a plain `copy_` of the same
bytes into memory that was used before: the limit. torch's own calls save to a file on the same disk.
*disk*: from then until the level `disk`, of the time in which one thread writes as many bytes with O_DIRECT and fsync.
*upload*: CPU-seconds of trainer and service a GB, of those of obstore's `put` of as many bytes, four at a time.
Then, with the sink taking no more than 200 MB/s in all, the rate from when the service has the memory to the commit.
*starting again*: `checkpoint.load(into=)` of what the service's memory has, of the time of the copy.
*a training thread*: how long its steps (some products of matrices) take while a save goes on, after the call has
returned, of what they take with nothing beside them; and so beside torch's `async_save` to a file.
*the peer*: to and from one real server (SeaweedFS, behind `bench.proxy`, which counts), s3torchconnector's
`S3StorageWriter` and `S3StorageReader` in torch's calls, and ours: `dcp.save` with `until="memory"`, and `dcp.load`
without anything of it on the node.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import fastload
from bench.proxy import Profile, Proxy
from bench.targets import Figure, show
from fastload import checkpoint
from fastload.bench.measure import cpu_s, die_with_parent
from fastload.demo.weed import REGION, WeedServer

TENSORS = 32
KEYS: dict[str, Any] = {"access_key_id": "bench", "secret_access_key": "bench", "region": "us-east-1"}
_WRITE_BYTES = 16 << 20
_SEGMENT_BYTES = 256 << 20
_CAP_BYTES_PER_S = 200_000_000
_PEER_GB = 0.3


@dataclass(frozen=True, slots=True)
class Setting:
    """What a round works with."""

    state: dict[str, torch.Tensor]
    folder: Path
    sink: str
    sink_pid: int

    @property
    def byte_count(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.sink, **KEYS}


def main() -> None:
    """Measure and print; the status is 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes, two rounds")
    parser.add_argument("--peer", action="store_true", help="beside s3torchconnector only")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache", help="on the disk that is measured")
    options = parser.parse_args()
    gb, rounds = (options.gb / 8, 2) if options.quick else (options.gb, options.rounds)
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.peer:
        sys.exit(show(f"{_PEER_GB:g} GB of float32 to SeaweedFS", beside_the_peer(rounds)))
    with tempfile.TemporaryDirectory(prefix="fastload-bench-", dir=options.folder) as folder, sink() as (url, pid):
        state = {f"layer.{n}.weight": torch.rand(int(gb * 1e9 / 4 / TENSORS)) for n in range(TENSORS)}
        sys.exit(show(f"{gb:g} GB of float32", measure(Setting(state, Path(folder), url, pid), rounds)))


@contextlib.contextmanager
def sink() -> Iterator[tuple[str, int]]:
    """The store, for the block: its URL, and its process."""
    command = [sys.executable, "-m", "bench.sink"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.kill()
        process.wait()


def measure(setting: Setting, rounds: int) -> list[Figure]:
    """All of it, `rounds` times."""
    taken: dict[str, list[float]] = defaultdict(list)
    into = {name: torch.zeros_like(tensor) for name, tensor in setting.state.items()}
    copy_s(setting.state, into)
    for number in range(rounds):
        one_round(setting, into, number, taken)
    return [
        Figure("stall of the first save", "times a copy", taken["first"], at_most=2.0),
        Figure("stall of the second and third", "times a copy", taken["later"], at_most=1.3),
        Figure("the same, of dcp.save to a local file", "", taken["of dcp"], at_most=0.2),
        Figure("the same, of dcp.async_save", "", taken["of async"], at_most=1 / 3),
        Figure("a copy", "GB/s", taken["copy"]),
        Figure("disk, fsync included", "times a raw write", taken["disk"], at_most=1.15),
        Figure("CPU time to the disk, of dcp.save's", "", taken["disk cpu"], at_most=0.5),
        Figure("CPU time of the upload, of obstore's put", "", taken["upload cpu"], at_most=1 / 3),
        Figure("the upload", "CPU-s a GB", taken["upload cpu a GB"]),
        Figure("obstore's put", "CPU-s a GB", taken["obstore cpu a GB"]),
        Figure("the upload", "times obstore's rate, four at a time", taken["upload rate"]),
        Figure("the upload, of a cap of 200 MB/s", "", taken["upload capped"], at_least=0.95),
        Figure("a training step beside a save, median", "times alone", taken["step"], at_most=1.1),
        Figure("the same, p99, of that beside async_save", "", taken["step p99"], at_most=0.5),
        Figure("starting again", "times a copy", taken["again"], at_most=1.5),
        Figure("starting again, from the store", "bytes of tensors", taken["again bytes"], at_most=0),
    ]


def one_round(setting: Setting, into: dict[str, torch.Tensor], number: int, taken: dict[str, list[float]]) -> None:
    state, byte_count = setting.state, setting.byte_count
    run = f"s3://bench/run{number}"
    copies = [copy_s(state, into)]
    stalls = []
    with fastload.Cache(setting.folder / f"cache{number}", ram_bytes="64MiB", disk_bytes=0) as cache:
        service = int(cache.stats()["pid"])  # which runs before the first save
        for step in range(3):
            control(setting.sink, "shut")
            copies.append(copy_s(state, into))
            cpu_before = cpu_s([os.getpid(), service])
            began = time.perf_counter()
            saving = checkpoint.save(
                state, f"{run}/{step}", until="memory", cache=cache, storage_options=setting.options
            )
            staged = time.perf_counter()
            saving.wait("disk")
            on_disk_s, cpu = time.perf_counter() - staged, cpu_s([os.getpid(), service]) - cpu_before
            stalls.append((staged - began) / copies[-1])
            control(setting.sink, "open")
            saving.wait("store")
        before = counters(setting.sink)
        began = time.perf_counter()
        checkpoint.load(f"{run}/2", into=into, cache=cache, storage_options=setting.options)
        again_s = time.perf_counter() - began
        assert all(tensor.equal(into[name]) for name, tensor in state.items())
        taken["again bytes"].append(max(0.0, counters(setting.sink)["get_bytes"] - before["get_bytes"] - (1 << 20)))
    copy = sorted(copies)[len(copies) // 2]
    raw_s = raw_write_s(setting.folder / "raw", byte_count)
    dcp_s, dcp_cpu = dcp_save(state, setting.folder / "dcp")
    async_s = dcp_async_save_s(state, setting.folder / "async")
    upload, upload_s = upload_cost(setting, f"{number}")
    puts, puts_s = obstore_cost(setting)
    control(setting.sink, f"cap/{_CAP_BYTES_PER_S}")
    _, capped_s = upload_cost(setting, f"{number}-capped")
    control(setting.sink, "cap/0")
    taken["copy"].append(byte_count / 1e9 / copy)
    taken["first"].append(stalls[0])
    taken["later"] += stalls[1:]
    taken["of dcp"].append(stalls[1] * copy / dcp_s)
    taken["of async"].append(stalls[1] * copy / async_s)
    taken["disk"].append(on_disk_s / raw_s)
    taken["disk cpu"].append(cpu / dcp_cpu)
    taken["upload cpu"].append(upload / puts)
    taken["upload cpu a GB"].append(upload / (byte_count / 1e9))
    taken["obstore cpu a GB"].append(puts / (byte_count / 1e9))
    taken["upload rate"].append(puts_s / upload_s)
    taken["upload capped"].append(byte_count / _CAP_BYTES_PER_S / capped_s)
    taken["again"].append(again_s / copy)
    beside_steps(setting, number, taken)


def copy_s(state: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> float:
    began = time.perf_counter()
    for name, tensor in state.items():
        into[name].copy_(tensor)
    return time.perf_counter() - began


def raw_write_s(path: Path, byte_count: int) -> float:
    import mmap

    buffer = memoryview(mmap.mmap(-1, _WRITE_BYTES))
    buffer[:] = os.urandom(_WRITE_BYTES)
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    for start in range(0, byte_count, _WRITE_BYTES):
        os.pwrite(fd, buffer, start)
    os.fsync(fd)
    os.close(fd)
    took_s = time.perf_counter() - began
    path.unlink()
    return took_s


def dcp_save(state: dict[str, torch.Tensor], folder: Path) -> tuple[float, float]:
    began, cpu = time.perf_counter(), cpu_s([os.getpid()])
    save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    took = time.perf_counter() - began, cpu_s([os.getpid()]) - cpu
    shutil.rmtree(folder)
    return took


def dcp_async_save_s(state: dict[str, torch.Tensor], folder: Path) -> float:
    began = time.perf_counter()
    future = async_save(state, storage_writer=FileSystemWriter(folder), no_dist=True)
    took_s = time.perf_counter() - began
    done: Any = getattr(future, "upload_completion", future)
    done.result()
    shutil.rmtree(folder)
    return took_s


def beside_steps(setting: Setting, number: int, taken: dict[str, list[float]]) -> None:
    """How long steps take: alone, beside a save of ours to disk and store, and beside torch's to a file."""
    one, other = torch.rand(256, 256), torch.rand(256, 256)

    def steps(goes_on: Callable[[], bool]) -> list[float]:
        found = []
        while goes_on():
            began = time.perf_counter()
            for _ in range(4):
                other.copy_(one @ one)
            found.append(time.perf_counter() - began)
        return found

    threads, end = torch.get_num_threads(), time.perf_counter() + 2
    torch.set_num_threads(1)
    try:
        alone = steps(lambda: time.perf_counter() < end)
        with fastload.Cache(setting.folder / f"steps{number}", ram_bytes="64MiB", disk_bytes=0) as cache:
            url = f"s3://bench/steps{number}"
            saving = checkpoint.save(setting.state, url, until="memory", cache=cache, storage_options=setting.options)
            ours = steps(lambda: not saving.done("store"))
        future: Any = async_save(setting.state, storage_writer=FileSystemWriter(setting.folder / "steps"), no_dist=True)
        theirs = steps(lambda: not getattr(future, "upload_completion", future).done())
    finally:
        torch.set_num_threads(threads)
        shutil.rmtree(setting.folder / "steps", ignore_errors=True)
    taken["step"].append(statistics.median(ours) / statistics.median(alone))
    taken["step p99"].append(statistics.quantiles(ours, n=100)[-1] / statistics.quantiles(theirs, n=100)[-1])


def beside_the_peer(rounds: int) -> list[Figure]:
    """Both save to one server and load from it, in turn."""
    from s3torchconnector import S3ClientConfig
    from s3torchconnector._s3client import S3Client
    from s3torchconnector.dcp import S3StorageReader, S3StorageWriter
    from s3torchconnector.dcp.s3_file_system import S3FileSystem

    taken: dict[str, list[float]] = defaultdict(list)
    state = {f"layer.{n}.weight": torch.rand(1024, int(_PEER_GB * 1e9 / 4 / 8 / 1024)) for n in range(8)}
    byte_count = sum(tensor.nbytes for tensor in state.values())
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastload-bench-")))
        weed = stack.enter_context(WeedServer(folder / "store"))
        weed.make_bucket("bench")
        proxy = stack.enter_context(Proxy(weed.endpoint_url, Profile()))
        os.environ |= {"AWS_ACCESS_KEY_ID": weed.access_key_id, "AWS_SECRET_ACCESS_KEY": weed.secret_access_key}
        cache = stack.enter_context(fastload.Cache(folder / "cache", ram_bytes="64MiB", disk_bytes=0))
        service = int(cache.stats()["pid"])
        mine: dict[str, Any] = {"cache": cache, "storage_options": {"endpoint_url": proxy.url, "region": REGION}}
        config = S3ClientConfig(force_path_style=True)

        def theirs(kind: Any, url: str) -> Any:
            made = kind(REGION, url, config)
            made.fs = S3FileSystem(REGION, S3Client(REGION, endpoint=proxy.url, s3client_config=config))
            return made

        def cost(name: str, do: Callable[..., Any], *values: Any, **named: Any) -> None:
            def spent() -> float:
                return cpu_s([os.getpid(), service]) - cpu_s([proxy.pid, *([weed.pid] if weed.pid is not None else [])])

            sent, cpu, began = proxy.counters()["body_bytes"], spent(), time.perf_counter()
            do(*values, **named, no_dist=True)
            taken[f"{name} s"].append(time.perf_counter() - began)
            taken[f"{name} cpu"].append(spent() - cpu)
            taken[f"{name} bytes"].append((proxy.counters()["body_bytes"] - sent) / byte_count)

        into = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        for number in range(rounds + 1):
            url = f"s3://bench/{number}/"
            writer = checkpoint.Writer(f"{url}ours", until="memory", **mine)
            cost("save", save, state, storage_writer=writer)
            assert writer.saving is not None
            writer.saving.wait("store")
            cost("their save", save, state, storage_writer=theirs(S3StorageWriter, f"{url}theirs"))
            # Nothing of it is in that cache.
            reader = checkpoint.Reader(f"{url}ours", **{**mine, "cache": folder / "none"})
            cost("load", load, into, storage_reader=reader)
            assert all(tensor.equal(into[name]) for name, tensor in state.items())
            cost("their load", load, into, storage_reader=theirs(S3StorageReader, f"{url}theirs"))
        if rounds:  # the first round, in which everything starts, does not count
            taken = defaultdict(list, {name: values[1:] for name, values in taken.items()})

    def ratio(one: str, other: str) -> list[float]:
        return [mine / yours for mine, yours in zip(taken[one], taken[other], strict=True)]

    return [
        Figure("stall of dcp.save, of s3torchconnector's", "", ratio("save s", "their save s"), at_most=1 / 20),
        Figure("dcp.load, times as fast", "", ratio("their load s", "load s"), at_least=3),
        Figure("CPU time of dcp.load, of theirs", "", ratio("load cpu", "their load cpu"), at_most=1 / 5),
        Figure("remote bytes of dcp.load", "of the tensors", taken["load bytes"], at_most=1.02),
        Figure("theirs", "of the tensors", taken["their load bytes"]),
    ]


def upload_cost(setting: Setting, name: str) -> tuple[float, float]:
    """CPU-seconds of both processes, and seconds, from when the service has the memory, without a disk."""
    folder = setting.folder / f"upload{name}"
    with fastload.Cache(folder, ram_bytes="64MiB", disk_bytes=0, checkpoint_disk_bytes=0) as cache:
        pids = [os.getpid(), int(cache.stats()["pid"])]
        url = f"s3://bench/upload{name}"
        saving = checkpoint.save(setting.state, url, until="memory", cache=cache, storage_options=setting.options)
        before, began = cpu_but_the_sinks_s(setting, pids), time.perf_counter()
        saving.wait("store")
        return cpu_but_the_sinks_s(setting, pids) - before, time.perf_counter() - began


def obstore_cost(setting: Setting) -> tuple[float, float]:
    store = obstore.store.S3Store("bench", endpoint=setting.sink, client_options={"allow_http": True}, **KEYS)
    data = memoryview(bytearray(min(_SEGMENT_BYTES, setting.byte_count)))
    before, began = cpu_but_the_sinks_s(setting, [os.getpid()]), time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        puts = range(0, setting.byte_count, len(data))
        list(pool.map(lambda at: obstore.put(store, f"put/{at}", data, use_multipart=False), puts))
    return cpu_but_the_sinks_s(setting, [os.getpid()]) - before, time.perf_counter() - began


def cpu_but_the_sinks_s(setting: Setting, pids: list[int]) -> float:
    """CPU-seconds of these processes so far; the sink, which is one of those below them, is the server's side."""
    return cpu_s(pids) - cpu_s([setting.sink_pid])


def control(url: str, what: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{url}/{what}", method="PUT"))


def counters(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/counters") as answer:
        return {"put_bytes": 0, "get_bytes": 0, **json.load(answer)}


if __name__ == "__main__":
    main()
