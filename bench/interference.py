"""What the loader costs the thread that trains: how often our threads take the GIL, and how late that thread wakes up.

    python -m bench.interference                      # fifteen minutes; status 1 where a target is missed
    python -m bench.interference --case records       # one kind of data
    python -m bench.interference --where              # also which lines let go of the GIL, and what they did before

Taking the GIL is counted exactly, by a library that is loaded before libc (`gil.c`); without a C compiler that part is
left out. The figures are medians over runs of batches in an epoch, and means over it, in which what is done once for a
window or shard is spread over all batches. Each kind of data is read twice: as it comes from the cache service, which
has to fetch it, and again from the service's memory. `work` is processor time, in the longest stretch for which a
thread of ours kept the GIL.

Wake-up gaps are those of a Python thread that sleeps half a millisecond again and again, and of one that computes in
steps of a tenth of that, while another takes batches as fast as they come; idle and loaded spells alternate within a
process. `later` is the median over rounds of how much later than idle one wake-up in a thousand comes, and `GIL` how
long it waits for the GIL alone: what else the machine does is in `later`, unless `--first` gives our processes
real-time priority, and the thread that wakes up the highest. For comparison: a thread that hashes, which needs a core
and hardly the GIL, and one that decodes with Pillow, image by image, as loaders do whose threads run Python for each
sample.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastload
from bench import data, gil
from bench.decode import MEAN, STD
from fastload import decode

TAKEN_MAX = 20
LATER_MS_MAX = 1.0

WARM_UP = 4  # batches, of each epoch
RUN = 8  # batches that are counted together: threads work ahead, so one batch's share falls on another now and then
QUANTILES = (0.5, 0.99, 0.999)
ROUNDS, SPELL_S = 5, 2.0
NAP_S, STEP = 0.0005, 4000
ROLES = ("decode", "feed", "reader", "others", "trainer")
SERVED, WARM = "from the service", "warm"
SHARDS = 24
RECORD_SHARDS, RECORDS_A_SHARD, RECORD_BYTES = 16, 20_000, 600


def raw_images(folder: Path, cache: fastload.Cache) -> Any:
    """JPEGs as they are."""
    return fastload.StreamingDataset(_images(folder), cache=cache, shuffle=True, columns=["jpg", "cls"])


def images(folder: Path, cache: fastload.Cache) -> Any:
    """Random resized crops to float32."""
    decoder = decode.image(224, random_resized_crop=True, hflip=0.5, mean=MEAN, std=STD)
    decoders = {"jpg": decoder, "cls": decode.integer()}
    return fastload.StreamingDataset(_images(folder), cache=cache, shuffle=True, decode=decoders)


def records(folder: Path, cache: fastload.Cache, half: slice = slice(None)) -> Any:
    """Small raw values and a number."""
    urls = [str(path) for path in prepare_records(folder)[half]]
    decoders = {"bin": decode.raw(), "cls": decode.integer()}
    return fastload.StreamingDataset(urls, cache=cache, shuffle=True, decode=decoders)


def mixture(folder: Path, cache: fastload.Cache) -> Any:
    """Two sources of small records, one sample in three from the second."""
    first, second = (records(folder, cache, half) for half in (slice(0, None, 2), slice(1, None, 2)))
    return fastload.Mixture([(first, 2), (second, 1)])


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of data. `environment`: what its process is told beside; `has_target`: whether the targets are meant."""

    what: str
    batch_size: int
    dataset: Callable[[Path, fastload.Cache], Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    has_target: bool = True


CASES = {
    "raw": Case("images of 91 kB, raw, batches of 256", 256, raw_images),
    "images": Case("images decoded, batches of 256", 256, images),
    # simplejpeg and its checks are called for each image.
    "fallback": Case("images without the C unit", 256, images, {"FASTLOAD_NATIVE": "0"}, has_target=False),
    "records": Case("records of 600 bytes, batches of 1024", 1024, records),
    "mixture": Case("two sources of records, batches of 1024", 1024, mixture),
}
PEERS = {"hash": "SHA-256", "pillow": "Pillow, image by image"}


def main() -> int:
    """Measure what the arguments ask for."""
    options = _arguments()
    if options.run:
        kind, *arguments = options.run
        print(json.dumps(run_count(options, *arguments) if kind == "count" else run_gaps(options, *arguments)))
        return 0
    data.prepare(options.folder, shard_count=SHARDS)
    prepare_records(options.folder)
    print(f"{os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        environment = gil.environment(Path(folder))
        met = [report_counts(options, environment), report_gaps(options, environment or os.environ)]
    return int(not all(met))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--where", action="store_true", help="show where the GIL is let go (CPython 3.11)")
    parser.add_argument("--first", action="store_true", help="real-time priority for what wakes up (needs root)")
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="where the data sets are kept")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)  # what a process of ours does
    return parser.parse_args()


def _verdict(*, is_met: bool, has_target: bool) -> str:
    return "" if not has_target else "met" if is_met else "missed"


# How often


def report_counts(options: argparse.Namespace, environment: Mapping[str, str] | None) -> bool:
    """Print a table of how often each kind of thread takes the GIL; whether all targets are met."""
    if environment is None:
        print("\nno C compiler (`cc`): how often the GIL is taken is not counted")
        return True
    print(f"\nhow often the GIL is taken a batch, median [mean]; by our threads at most {TAKEN_MAX} times\n")
    heads = " ".join(f"{role:>7}" for role in ROLES)
    print(f"{'':42} {'threads':7} {heads} {'ours':>15} {'work, ms':>9}")
    met = True
    for name in options.case:
        case = CASES[name]
        for threads in options.threads:
            found = _process(options, {**environment, **case.environment}, "count", name, str(threads))
            for source in (SERVED, WARM):
                met &= _print_counts(case, source, threads, found[source])
    return met


def _print_counts(case: Case, source: str, threads: int, found: Mapping[str, Any]) -> bool:
    batches = found["batches"]
    by_role = {role: [each.get(role, 0) for each in batches] for role in ROLES}
    middles = [statistics.median(_runs(counts)) for counts in by_role.values()]
    ours = [sum(of_batch) for of_batch in zip(*(by_role[role] for role in ROLES if role != "trainer"), strict=True)]
    middle = statistics.median(_runs(ours))
    is_met = middle <= TAKEN_MAX
    print(
        f"{case.what if source == SERVED else '':42} {threads:7} "
        + " ".join(f"{each:7.1f}" for each in middles)
        + f" {middle:7.1f} [{statistics.mean(ours):5.1f}] {found['work_ms']:9.2f}"
        + f"  {_verdict(is_met=is_met, has_target=case.has_target):6} {source}"
    )
    for line in found["places"]:
        print(f"    {line}")
    return is_met or not case.has_target


def _runs(counts: Sequence[int]) -> list[float]:
    """Means of batches that follow one another."""
    return [statistics.mean(counts[at : at + RUN]) for at in range(len(counts) - RUN + 1)]


def run_count(options: argparse.Namespace, name: str, threads: str) -> dict[str, Any]:
    """In a process of its own: two epochs, counted batch by batch."""
    counter = gil.Counter()
    with _loader(options, name, int(threads)) as loader:
        return {source: _counted(loader, counter, options.where) for source in (SERVED, WARM)}


def _counted(loader: Any, counter: gil.Counter, where: bool) -> dict[str, Any]:
    """By role, how often each batch took the GIL; the most work that a thread of ours did with it; and where it is let
    go.
    """
    names: dict[int, str] = {}

    def taken() -> Counter[str]:
        names.update({thread.native_id: thread.name for thread in threading.enumerate() if thread.native_id})
        sums: Counter[str] = Counter()
        for number, figures in counter.threads().items():
            sums[_role(names.get(number, ""))] += figures.taken
        return sums

    batches: list[Counter[str]] = []
    epoch = iter(loader)
    for _ in range(WARM_UP):
        next(epoch)
    counter.forget_longest()
    watching: AbstractContextManager[list[gil.Place]] = counter.watched() if where else nullcontext([])
    with watching as places:
        before = taken()
        for _ in epoch:
            now = taken()
            batches.append(now - before)
            before = now
    work_ms = [each.work_ms_max for number, each in counter.threads().items() if _is_ours(names.get(number, ""))]
    return {"batches": batches, "work_ms": max(work_ms), "places": _described(places, names, len(batches))}


def _role(name: str) -> str:
    if name == "MainThread":
        return "trainer"
    ours, _, rest = name.partition("-")
    known = {"feed": "feed", "decode": "decode", "consumer": "reader"}
    return known.get(rest.partition("-")[0], "others") if ours == "fastload" else "others"


def _is_ours(name: str) -> bool:
    return _role(name) != "trainer"


def _described(places: Sequence[gil.Place], names: Mapping[int, str], batches: int) -> list[str]:
    """What is worth a line: places where a thread of ours lets go often, or after much work."""
    counts: Counter[tuple[str, str]] = Counter()
    works: dict[tuple[str, str], float] = {}
    for place in places:
        name = names.get(place.thread_id, "")
        if _is_ours(name):
            key = _role(name), str(place)
            counts[key] += place.count
            works[key] = max(works.get(key, 0.0), place.work_ns_max / 1e6)
    return [
        f"{role:7} {count / batches:6.2f} a batch, after {works[role, where]:5.2f} ms of work at most: {where}"
        for (role, where), count in counts.most_common()
        if count / batches >= 0.1 or works[role, where] >= 0.3
    ]


# How late


def report_gaps(options: argparse.Namespace, environment: Mapping[str, str]) -> bool:
    """Print tables of wake-up gaps; whether all targets are met."""
    met = True
    for how in ("sleeps", "computes"):
        print(
            f"\ngaps between the wake-ups of a thread that {how}, ms; with one decode thread at most {LATER_MS_MAX:g} "
            "later than idle\n"
        )
        heads = "  ".join(f"{f'{which} p{100 * q:g}':>12}" for which in ("idle", "loaded") for q in QUANTILES)
        print(f"{'':42} {'threads':7} {'batch/s':>8} {heads} {'later':>7} {'GIL p99.9':>10}")
        cases = [(name, threads) for name in options.case for threads in options.threads]
        for name, threads in [*cases, *((peer, 1) for peer in PEERS)]:
            extra = CASES[name].environment if name in CASES else {}
            found = _process(options, {**environment, **extra}, "gaps", name, str(threads), how)
            met &= _print_gaps(name, threads, found)
    return met


def _print_gaps(name: str, threads: int, found: Mapping[str, Any]) -> bool:
    has_target = name in CASES and CASES[name].has_target and threads == 1
    is_met = found["later_ms"] <= LATER_MS_MAX
    what = CASES[name].what if name in CASES else PEERS[name]
    cells = "  ".join(f"{gap:12.2f}" for gap in (*found["idle_ms"], *found["loaded_ms"]))
    waits = "" if found["gil_ms"] is None else f"{found['gil_ms']:10.2f}"
    print(
        f"{what:42} {threads:7} {found['per_s']:8.1f} {cells} {found['later_ms']:7.2f} {waits}"
        f"  {_verdict(is_met=is_met, has_target=has_target)}"
    )
    return is_met or not has_target


def run_gaps(options: argparse.Namespace, name: str, threads: str, how: str) -> dict[str, Any]:
    """In a process of its own: gaps of the main thread, by turns alone and beside a load."""
    if options.first:
        come_first(1)  # as will the threads that are started from here on
    counter = gil.Counter() if gil.is_there() else None
    measure = sleeping if how == "sleeps" else computing
    idle, loaded = list[list[float]](), list[list[float]]()
    waits_ms = list[float]()
    with _load(options, name, int(threads)) as load:
        if options.first:
            come_first(2)
        for _ in range(ROUNDS):
            load.pause()
            idle.append(measure(SPELL_S))
            load.go_on()
            with _waits(counter if how == "sleeps" else None) as waits:
                loaded.append(measure(SPELL_S))
            waits_ms += waits
        done = load.done
    worst = [[float(np.quantile(gaps, QUANTILES[-1])) for gaps in spells] for spells in (idle, loaded)]
    return {
        "idle_ms": _quantiles_ms(idle),
        "loaded_ms": _quantiles_ms(loaded),
        "later_ms": statistics.median(late - soon for soon, late in zip(*worst, strict=True)) * 1e3,
        "gil_ms": float(np.quantile(waits_ms, QUANTILES[-1])) if waits_ms else None,
        "per_s": done / (ROUNDS * SPELL_S),
    }


def _waits(counter: gil.Counter | None) -> AbstractContextManager[list[float]]:
    """For a thread that wakes up: how long it waits for the GIL each time."""
    return nullcontext([]) if counter is None else counter.waits_ms()


def come_first(priority: int) -> None:
    """Let this thread run before all that has no real-time priority, or a lower one."""
    os.sched_setscheduler(threading.get_native_id(), os.SCHED_RR, os.sched_param(priority))


def _quantiles_ms(spells: Sequence[Sequence[float]]) -> list[float]:
    found: list[float] = (np.quantile(np.concatenate(spells), QUANTILES) * 1e3).tolist()
    return found


def sleeping(seconds: float) -> list[float]:
    """The times between wake-ups of a thread that has next to nothing to do."""
    clock, sleep, gaps = time.perf_counter, time.sleep, []
    before = clock()
    end = before + seconds
    while before < end:
        sleep(NAP_S)
        now = clock()
        gaps.append(now - before)
        before = now
    return gaps


def computing(seconds: float) -> list[float]:
    """How long steps of a thread take that computes in Python."""
    clock, gaps = time.perf_counter, []
    before = clock()
    end = before + seconds
    while before < end:
        for _ in range(STEP):
            pass
        now = clock()
        gaps.append(now - before)
        before = now
    return gaps


class Load:
    """Does `work` again and again in a thread; counts how often."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.done = 0
        self._work, self._may, self._is_ended = work, threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._may.wait()
            if self._is_ended:
                return
            self._work()
            self.done += 1

    def go_on(self) -> None:
        """Work, and let it get going."""
        self._may.set()
        time.sleep(0.3)

    def pause(self) -> None:
        """No more work, and let what was begun end."""
        self._may.clear()
        time.sleep(0.7)

    def close(self) -> None:
        """End."""
        self._is_ended = True
        self._may.set()
        self._thread.join()


@contextmanager
def _load(options: argparse.Namespace, name: str, threads: int) -> Iterator[Load]:
    work: Callable[[], object]
    with ExitStack() as stack:
        if name == "hash":
            work = hashing
        elif name == "pillow":
            work = pillow_decoding(options.folder)
        else:
            work = taking(stack.enter_context(_loader(options, name, threads)))
        load = Load(work)
        stack.callback(load.close)
        yield load


def taking(loader: Any) -> Callable[[], object]:
    """Takes the next batch, epoch after epoch; what it reads is warm by then."""
    for _ in loader:
        pass

    def endless() -> Iterator[Any]:
        while True:
            yield from loader

    batches = endless()
    return lambda: next(batches)


def hashing() -> None:
    """A core's work that hardly needs the GIL."""
    for _ in range(16):
        hashlib.sha256(_BLOCK).digest()


_BLOCK = bytes(1 << 20)


def pillow_decoding(folder: Path) -> Callable[[], None]:
    """A batch of images as threads of Python make it."""
    from PIL import Image

    with tarfile.open(_images(folder)[0]) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:256]
        files = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)

    def work() -> None:
        for file in files:
            picture = Image.open(io.BytesIO(file)).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
            np.ascontiguousarray(((np.asarray(picture, np.float32) / 255 - mean) / std).transpose(2, 0, 1))

    return work


# Data and processes


@contextmanager
def _loader(options: argparse.Namespace, name: str, threads: int) -> Iterator[Any]:
    """A loader over a cache of its own, which is empty, and as large as all the data."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder, fastload.Cache(folder, ram_bytes="2GiB", disk_bytes=0) as cache:
        dataset = case.dataset(options.folder, cache)
        loader: Any = fastload.DataLoader(dataset, batch_size=case.batch_size, num_workers=threads)
        try:
            yield loader
        finally:
            loader.close()


def _process(options: argparse.Namespace, environment: Mapping[str, str], *arguments: str) -> Any:
    """What a process of ours prints."""
    command = [sys.executable, "-m", "bench.interference", "--folder", str(options.folder)]
    command += ["--where"] * options.where + ["--first"] * options.first + ["--run", *arguments]
    environment = {**environment, "FASTLOAD_IDLE_S": "0"}
    return json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)


def _images(folder: Path) -> list[str]:
    return [str(path) for path in data.prepare(folder, shard_count=SHARDS).paths]


def prepare_records(folder: Path) -> list[Path]:
    """Shards of small records, made where they are not there; half a minute."""
    final = folder / f"numbered-records-v1-{RECORD_SHARDS}x{RECORDS_A_SHARD}"
    if not final.exists():
        part = folder / f"{final.name}.part-{os.getpid()}"
        part.mkdir(parents=True)
        rng = np.random.default_rng(data.SEED)
        for shard in range(RECORD_SHARDS):
            _write_records(part / f"records-{shard:03d}.tar", shard * RECORDS_A_SHARD, rng)
        part.rename(final)
    return sorted(final.glob("*.tar"))


def _write_records(path: Path, first: int, rng: np.random.Generator) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(first, first + RECORDS_A_SHARD):
            for column, value in (("bin", rng.bytes(RECORD_BYTES)), ("cls", b"%d" % (number % 1000))):
                member = tarfile.TarInfo(f"{number:08d}.{column}")
                member.size = len(value)
                archive.addfile(member, io.BytesIO(value))


if __name__ == "__main__":
    sys.exit(main())
