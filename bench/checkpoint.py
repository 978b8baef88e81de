"""What a checkpoint costs: the stall, the disk, the upload, and starting again on the same node.

    python -m bench.checkpoint                    # 2 GB of float32, five rounds: some minutes
    python -m bench.checkpoint --quick            # an eighth of it, two rounds: a look

Everything is measured in turn within a round, and is a ratio within it; figures are medians over rounds. The store is a
sink (`bench.sink`), which costs little, on this machine.

*stall*: from the call of `checkpoint.save(until="memory")` to its return, of the time of a plain `copy_` of the same
bytes into memory that was used before: the limit. torch's own calls save to a file on the same disk.
*disk*: from then until the level `disk`, of the time in which one thread writes as many bytes with O_DIRECT and fsync.
*upload*: CPU-seconds of trainer and service a GB, of those of obstore's `put` of as many bytes, four at a time.
Then, with the sink taking no more than 200 MB/s in all, the rate from when the service has the memory to the commit.
*starting again*: `checkpoint.load(into=)` of what the service's memory has, of the time of the copy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import fastload
from bench.targets import Figure, show
from fastload import checkpoint
from fastload.bench.measure import cpu_s, die_with_parent

TENSORS = 32
KEYS: dict[str, Any] = {"access_key_id": "bench", "secret_access_key": "bench", "region": "us-east-1"}
_WRITE_BYTES = 16 << 20
_SEGMENT_BYTES = 256 << 20
_CAP_BYTES_PER_S = 200_000_000


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
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache", help="on the disk that is measured")
    options = parser.parse_args()
    gb, rounds = (options.gb / 8, 2) if options.quick else (options.gb, options.rounds)
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    options.folder.mkdir(parents=True, exist_ok=True)
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
