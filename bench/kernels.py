"""Kernels compiled ahead of time against kernels as numba's own dispatchers: `python -m bench.kernels`, five minutes.

`fastload.kernels.jit` chooses the first, for the reasons given there as figures; `FASTLOAD_PLAIN_NUMBA=1` takes the
second. Both take turns within a round; figures are medians over rounds, of CPU-seconds (user and system) and of wall
seconds.

*first batch*: a start of `bench.start` with the cache service running and everything compiled, beyond a process that
imports torch alone. The others are processes without torch that load, or compile, the kernels of a first batch, beyond
one that imports numpy alone. *warm*: compiled before. *cold*: nothing is compiled, nor installed. *nowhere to write*:
fastload is installed, and its user has no folder that can be written. *eight at once*: eight processes that begin at
the same time; CPU-seconds of all, and the time until the last has ended.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from bench.start import JOB, TORCH, Took, keep_service, run, write_shards
from fastload.kernels import objects
from fastload.kernels.jit import PLAIN

WAYS: dict[str, dict[str, str]] = {"ahead of time": {}, "numba's own": {PLAIN: "1"}}
AT_ONCE = 8
COLD_ROUNDS = 2
UNINSTALLED = "from pathlib import Path\nfrom fastload.kernels import objects\nobjects.INSTALLED = Path('/nowhere')\n"
NUMPY = "import numpy"
LOAD = """
from fastload.kernels import FIRST_BATCH, OF_DECODERS, warm_up
warm_up(*FIRST_BATCH, *OF_DECODERS["integer"])
"""
AFTER_TORCH = f"import torch, time\nbegan = time.process_time()\n{LOAD}\nprint(time.process_time() - began)"
MEMORY = (
    LOAD
    + """
import os
print(sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Pss_Anon")) / 1024)
"""
)
CALLS = """
import numpy as np, time
from fastload.kernels.parse import parse_integers
values, offsets, out = np.frombuffer(b"12", np.uint8), np.array([0, 2]), np.empty(1, np.int64)
parse_integers(values, offsets, out)
began = time.process_time()
for _ in range(200_000):
    parse_integers(values, offsets, out)
print((time.process_time() - began) * 5)
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="fastload-bench-") as folder:
        took, other = measure(Path(folder), options.rounds)
    report(took, other)
    print(f"load after: {os.getloadavg()[0]:.1f}")


def measure(folder: Path, rounds: int) -> tuple[dict[tuple[str, str], list[Took]], dict[tuple[str, str], list[float]]]:
    """Starts, and other figures, by what was done and in which way."""
    write_shards(folder / "data")
    job = [f"{folder}/data/", f"{folder}/cache"]
    took: dict[tuple[str, str], list[Took]] = defaultdict(list)
    other: dict[tuple[str, str], list[float]] = defaultdict(list)

    def note(what: str, way: str, one: Took) -> None:
        took[what, way].append(one)
        print(
            f"load {os.getloadavg()[0]:4.1f}  {what:30} {way:14} {one.cpu_s:6.2f} CPU-s {one.wall_s:6.2f} s", flush=True
        )

    with ExitStack() as stack:
        keep_service(stack, job[1])
        for way, environ in WAYS.items():  # compiles, and does not count
            kept = {**environ, objects.VARIABLE: f"{folder}/{way}"}
            run(JOB, *job, environ=kept)
            at_once(1, LOAD, kept)
        for number in range(rounds):
            for way, environ in WAYS.items():
                kept = {**environ, objects.VARIABLE: f"{folder}/{way}"}
                torch, numpy = run(TORCH), at_once(1, NUMPY, {})
                one = run(JOB, *job, environ=kept)
                note("first batch, warm", way, Took(one.wall_s - torch.wall_s, one.cpu_s - torch.cpu_s))
                starts = [("kernels, warm", 1, LOAD, kept), ("kernels, eight at once, warm", AT_ONCE, LOAD, kept)]
                if number < COLD_ROUNDS:
                    alone, eight = ({**environ, objects.VARIABLE: f"{folder}/{way} {number} {n}"} for n in (1, AT_ONCE))
                    starts += [
                        ("kernels, cold", 1, UNINSTALLED + LOAD, alone),
                        ("kernels, nowhere to write", 1, LOAD, {**environ, objects.VARIABLE: "/dev/null"}),
                        ("kernels, eight at once, cold", AT_ONCE, UNINSTALLED + LOAD, eight),
                    ]
                for what, count, code, where in starts:
                    one = at_once(count, code, where)
                    note(what, way, Took(one.wall_s - numpy.wall_s, one.cpu_s - count * numpy.cpu_s))
                other["kernels in a process with torch, CPU-s", way].append(printed(AFTER_TORCH, kept))
                other["memory of a process, MiB", way].append(printed(MEMORY, kept))
                other["a call, us", way].append(printed(CALLS, kept))
    return took, other


def at_once(count: int, code: str, environ: dict[str, str]) -> Took:
    """Processes that begin at once: until the last has ended, and the CPU-seconds of all."""
    began, before = time.monotonic(), cpu_s()
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environ}, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]
    assert [process.wait() for process in processes] == [0] * count
    return Took(time.monotonic() - began, cpu_s() - before)


def cpu_s() -> float:
    """Of the processes that have been waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def printed(code: str, environ: dict[str, str]) -> float:
    """The number that a process prints."""
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, env={**os.environ, **environ}, stdout=subprocess.PIPE, check=True).stdout)


def report(took: dict[tuple[str, str], list[Took]], other: dict[tuple[str, str], list[float]]) -> None:
    """Two tables."""
    print(f"{'':38} {'':>14} {'CPU-s':>6} {'range':>13} {'wall s':>7} {'range':>13}")
    for (what, way), runs in sorted(took.items(), key=lambda item: item[0][0]):
        cells = [shown([getattr(one, name) for one in runs]) for name in ("cpu_s", "wall_s")]
        print(f"{what:38} {way:>14} {cells[0]} {cells[1]:>21}")
    for (what, way), values in sorted(other.items(), key=lambda item: item[0][0]):
        print(f"{what:38} {way:>14} {shown(values)}")


def shown(values: list[float]) -> str:
    """The median and the range."""
    return f"{statistics.median(values):6.2f} {f'{min(values):.2f}-{max(values):.2f}':>13}"


if __name__ == "__main__":
    main()
