"""What a load costs a node: bytes from the store, memory and time, for one, four and eight processes.

    python -m bench.loads                    # 1 GB of float32, three rounds: a few minutes
    python -m bench.loads --quick            # an eighth of it, one round: a look

The store is a sink that keeps what it gets (`bench.sink`), on this machine. Processes run before the clock starts,
load at once into nothing, as `checkpoint.load(url)` does, and then look at every byte.

*remote bytes*: what the store has sent, of the bytes of the tensors.
*memory*: of the shared memory, what Linux counts as each process's part (PSS), in all, and of the bytes of the tensors.
*time alone*: of the time without a service, in the same process one after the other; and so the CPU time, that of the
service included.
*against a cap*: of 200 MB/s, with a service and a proxy before the store.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import fastload
from bench.checkpoint import KEYS, control, counters, sink
from bench.proxy import Profile, Proxy
from bench.targets import Figure, show
from fastload import checkpoint
from fastload.bench.measure import cpu_s

TENSORS = 32
COUNTS = (1, 4, 8)
CAP = 200e6
URL = "s3://bench/run/1"


def main() -> None:
    """Measure and print; the status is 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="an eighth of the bytes, one round")
    parser.add_argument("--process", nargs=2, metavar=("DIRECTORY", "ENDPOINT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        be_a_process(*options.process)
        return
    gb, rounds = (options.gb / 8, 1) if options.quick else (options.gb, options.rounds)
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    taken: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="fastload-bench-") as folder, sink() as (url, _):
        control(url, "keep")
        state = {f"layer.{n}.weight": torch.rand(int(gb * 1e9 / 4 / TENSORS)) for n in range(TENSORS)}
        byte_count = sum(tensor.nbytes for tensor in state.values())
        with fastload.Cache(Path(folder) / "save", ram_bytes="64MiB", disk_bytes=0, checkpoint_disk_bytes=0) as cache:
            checkpoint.save(state, URL, cache=cache, storage_options={"endpoint_url": url, **KEYS})
        del state
        for number in range(rounds):
            for count in COUNTS:
                together(Path(folder) / f"{number}-{count}", url, count, byte_count, taken)
            alone(Path(folder) / f"{number}-alone", url, taken)
            capped(Path(folder) / f"{number}-cap", url, byte_count, taken)
    figures = [
        figure
        for count in COUNTS
        for figure in (
            Figure(f"remote bytes, processes: {count}", "of the tensors", taken[f"bytes {count}"], at_most=1.02),
            Figure("memory of these", "of the tensors", taken[f"memory {count}"], at_most=1.1),
            Figure("until all have loaded", "s", taken[f"time {count}"]),
        )
    ]
    figures += [
        Figure("time alone", "of that without a service", taken["alone"], at_most=1.1),
        Figure("CPU time alone", "of that without a service", taken["alone cpu"], at_most=1.1),
        Figure("against a cap", "of it", taken["cap"], at_least=0.95),
    ]
    sys.exit(show(f"{gb:g} GB of float32", figures))


def cache_at(directory: Path) -> fastload.Cache:
    return fastload.Cache(directory, ram_bytes="64MiB", disk_bytes=0, checkpoint_disk_bytes=0)


def together(directory: Path, url: str, count: int, byte_count: int, taken: dict[str, list[float]]) -> None:
    with cache_at(directory) as cache, cache._handle.consumer(), ExitStack() as stack:
        command = [sys.executable, "-m", "bench.loads", "--process", str(directory), url]
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for process in processes:
            say(process, "ready")
        before, began = counters(url)["get_bytes"], time.perf_counter()
        for process in processes:
            say(process)
        for process in processes:
            say(process, "loaded")
        taken[f"time {count}"].append(time.perf_counter() - began)
        taken[f"bytes {count}"].append((counters(url)["get_bytes"] - before) / byte_count)
        for process in processes:
            say(process)
        found = [json.loads(say(process, "")) for process in processes]
        taken[f"memory {count}"].append(sum(found) / byte_count)
        for process in processes:
            process.communicate()


def say(process: subprocess.Popen[str], expected: str | None = None) -> str:
    """A line to it, or one from it."""
    assert process.stdin is not None
    assert process.stdout is not None
    if expected is None:
        process.stdin.write("go\n")
        process.stdin.flush()
        return ""
    line = process.stdout.readline().strip()
    assert line.startswith(expected), line
    return line


def be_a_process(directory: str, endpoint_url: str) -> None:
    """One that loads when it is asked to, and then says how much shared memory is its own part."""
    with cache_at(Path(directory)) as cache:
        print("ready", flush=True)
        sys.stdin.readline()
        state = load(cache, endpoint_url)
        for tensor in state.values():
            tensor.sum()
        print("loaded", flush=True)
        sys.stdin.readline()
        print(shared_bytes(), flush=True)
        sys.stdin.read()


def load(cache: fastload.Cache | str, endpoint_url: str) -> dict[str, Any]:
    return checkpoint.load(URL, cache=cache, storage_options={"endpoint_url": endpoint_url, **KEYS})


def shared_bytes() -> int:
    found, is_load = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_load = "memfd:fastload" in line
        elif is_load and line.startswith("Pss:"):
            found += int(line.split()[1]) << 10
    return found


def alone(directory: Path, url: str, taken: dict[str, list[float]]) -> None:
    """One process, with the service and without."""
    with cache_at(directory) as cache, cache._handle.consumer():
        pids = [os.getpid(), int(cache.stats()["pid"])]
        spent = []
        for where in (cache, str(directory / "none")):
            before, began = cpu_s(pids), time.perf_counter()
            load(where, url)
            spent.append((time.perf_counter() - began, cpu_s(pids) - before))
    (with_s, with_cpu), (without_s, without_cpu) = spent
    taken["alone"].append(with_s / without_s)
    taken["alone cpu"].append(with_cpu / without_cpu)


def capped(directory: Path, url: str, byte_count: int, taken: dict[str, list[float]]) -> None:
    with (
        cache_at(directory) as cache,
        cache._handle.consumer(),
        Proxy(url, Profile(delay_s=0.01, total_bytes_per_s=CAP)) as proxy,
    ):
        began = time.perf_counter()
        load(cache, proxy.url)
        taken["cap"].append(byte_count / CAP / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
