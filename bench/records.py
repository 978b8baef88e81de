"""Warm and end to end: small records against webdataset, the tar index against tarfile, photographs against the kernel.

    python -m bench.records                     # ten minutes
    python -m bench.records --quick             # a tenth of the records, one round: a look, not a figure
    python -m bench.records --question index

*records*: a million records of 600 bytes in 25 tar shards on the local disk, in batches of 1024. webdataset reads the
files themselves, which the page cache holds, shuffles in its own way and gives lists of bytes, as `batched` makes them;
fastload has them in its cache and gives `Ragged`, keys and URLs. Each with no worker and with two, and the better of
both counts; each in a process of its own, whose imports and first epoch do not count.

*index*: one shard of records and one of photographs of 90 kB, both in memory: fastload's index, `tarfile`, and
webdataset's iterators, which cannot but read the data as well.

*tokens*: sequences of 2048 uint16 in batches of 32, as a tensor and as one that a function of `map_batch` has had, each
out of a warm cache and with two workers, beside torch's loader with two over a memory-mapped file in the page cache,
shuffled; and from one bare file of tokens, beside slices of that file, memory-mapped, that numpy stacks in a loop.

*photographs*: a random resized crop of JPEGs of 91 kB to 224 x 224 float32, out of a warm cache through the loader,
against the decoder alone on the same bytes in memory, with one thread and with two.

Systems take turns within a round; figures are medians over rounds, and ratios are taken within a round, but where it
says "at its best": what was disturbed least.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bench import data
from bench.decode import MEAN, SIZE, STD, in_parts
from bench.targets import Figure, show
from fastload.bench import measure

SHARDS, RECORDS_A_SHARD, RECORD_BYTES = 25, 40_000, 600
BATCH_SIZE = 1024
WORKERS = (0, 2)
SEED = 6
VERSION = 1
PHOTO_SHARDS = 8
PHOTO_BATCH_SIZE = 256
THREADS = (1, 2)
RAM_BYTES = 3 << 30

FASTER_THAN_WEBDATASET = 20.0
FASTER_THAN_TARFILE = 20.0
SHARE_OF_KERNEL = 0.9
TOKENS_A_SECOND = 250e3  # sequences
MAPPED_FASTER_THAN_MEMMAP = 4.0
BARE_FASTER_THAN_NUMPY = 2.0


@dataclass(frozen=True, slots=True)
class Took:
    """What an epoch took, all processes together."""

    count: int
    wall_s: float
    cpu_s: float

    @property
    def per_s(self) -> float:
        """Samples a second."""
        return self.count / self.wall_s

    @property
    def cpu_us(self) -> float:
        """CPU time a sample."""
        return self.cpu_s / self.count * 1e6


def main() -> int:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="bench.records", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the records, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="data sets and caches; a real disk")
    parser.add_argument("--run", nargs=3, metavar=("SYSTEM", "WORKERS", "SHARDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        system, workers, shards = options.run
        print(json.dumps(SYSTEMS[system](prepare(options.folder), int(shards), int(workers))))
        return 0
    if options.quick:
        options.rounds = 1
    print(f"load before: {os.getloadavg()[0]:.1f}")
    return int(sum(QUESTIONS[question](options) for question in options.question) > 0)


# Small records.


def prepare(folder: Path) -> Path:
    """The folder with the shards of records; made first where it is not there."""
    final = folder / f"records-v{VERSION}-{SHARDS}x{RECORDS_A_SHARD}"
    if not final.exists():
        part = folder / f"{final.name}.part-{os.getpid()}"
        part.mkdir(parents=True)
        rng = np.random.default_rng(SEED)
        for number in range(SHARDS):
            contents = rng.integers(0, 256, (RECORDS_A_SHARD, RECORD_BYTES), np.uint8)
            (part / f"train-{number:06d}.tar").write_bytes(tar_of(number * RECORDS_A_SHARD, contents, "bin"))
        part.rename(final)
    return final


def tar_of(first: int, contents: npt.NDArray[np.uint8], column: str) -> bytes:
    """An archive of records `first`, `first` + 1, ..., named by eight digits, with these `contents`, uint8[n, bytes];
    all at once: tarfile takes a minute.
    """
    count, record_bytes = contents.shape
    info = tarfile.TarInfo(f"00000000.{column}")
    info.size = record_bytes
    blocks = np.zeros((count, 512 + -(-record_bytes // 512) * 512), np.uint8)
    blocks[:, :512] = np.frombuffer(info.tobuf(tarfile.USTAR_FORMAT), np.uint8)
    blocks[:, :8] = digits(np.arange(first, first + count), 8, 10)
    blocks[:, 148:156] = 32  # a checksum is taken with blanks in its place
    checksums = blocks[:, :512].sum(1, dtype=np.int64)
    blocks[:, 148:154], blocks[:, 154] = digits(checksums, 6, 8), 0
    blocks[:, 512 : 512 + record_bytes] = contents
    return blocks.tobytes() + bytes(1024)


def digits(numbers: npt.NDArray[np.int64], count: int, base: int) -> npt.NDArray[np.uint8]:
    """Each number as text of `count` digits."""
    places = base ** np.arange(count - 1, -1, -1)
    return (numbers[:, None] // places % base + ord("0")).astype(np.uint8)


def fastload_epochs(folder: Path, shards: int, workers: int) -> list[tuple[int, float, float]]:
    """Epochs after the first: records, seconds, CPU-seconds with the cache service's."""
    with warm_loaders(f"{folder}/train-{{000000..{shards - 1:06d}}}.tar", BATCH_SIZE, [workers]) as (loaders, pids):
        return [timed(lambda: count_of(loaders[workers]), pids) for _ in range(3)]


@contextmanager
def warm_loaders(
    urls: str | list[str],
    batch_size: int,
    workers: Sequence[int],
    function: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Iterator[tuple[dict[int, Any], list[int]]]:
    """fastload's loaders with so many workers each, over a cache that holds everything; and the processes at work.
    `function` is applied to batches.
    """
    import fastload

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastload-records-"))
        cache = stack.enter_context(fastload.Cache(folder, ram_bytes=RAM_BYTES, disk_bytes=0))
        dataset: Any = fastload.StreamingDataset(urls, cache=cache, shuffle=True, seed=0, **options)
        dataset = dataset if function is None else dataset.map_batch(function)
        loaders: dict[int, Any] = {}
        for count in workers:
            loaders[count] = fastload.DataLoader(dataset, batch_size=batch_size, num_workers=count)
            stack.callback(loaders[count].close)
            count_of(loaders[count])
        yield loaders, [os.getpid(), *measure.find_processes("fastload.service", folder)]


def webdataset_epochs(folder: Path, shards: int, workers: int) -> list[tuple[int, float, float]]:
    """One epoch, since that takes long enough; its workers' start is some hundredths of it."""
    import webdataset

    urls = [str(folder / f"train-{number:06d}.tar") for number in range(shards)]
    for url in urls:
        Path(url).read_bytes()  # into the page cache
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000)
    batches = dataset.to_tuple("__key__", "bin").batched(BATCH_SIZE)
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=workers)
    return [timed(lambda: sum(len(keys) for keys, _ in loader), [os.getpid()])]


SYSTEMS: dict[str, Callable[[Path, int, int], list[tuple[int, float, float]]]] = {
    "fastload": fastload_epochs,
    "webdataset": webdataset_epochs,
}


def count_of(loader: Any) -> int:
    """How many samples its batches have."""
    return sum(len(batch["__key__"]) for batch in loader)


def timed(work: Callable[[], int], pids: list[int]) -> tuple[int, float, float]:
    """What `work` counted, the seconds it took, and the CPU-seconds of these processes and all below them."""
    cpu_s, began = measure.cpu_s(pids), time.perf_counter()
    count = work()
    return count, time.perf_counter() - began, measure.cpu_s(pids) - cpu_s


def records(options: argparse.Namespace) -> bool:
    """Both systems with every number of workers; whether a target is missed."""
    prepare(options.folder)
    shards = SHARDS // 10 if options.quick else SHARDS
    took: dict[tuple[str, int], list[Took]] = {(system, n): [] for n in WORKERS for system in SYSTEMS}
    for _ in range(options.rounds):
        for (system, workers), runs in took.items():
            epochs = run(system, workers, shards, options.folder)
            assert {epoch.count for epoch in epochs} == {shards * RECORDS_A_SHARD}, (system, epochs)
            runs.append(sorted(epochs, key=lambda epoch: epoch.wall_s)[len(epochs) // 2])
    figures = []
    for (system, workers), runs in took.items():
        title = f"{system}, {workers or 'no'} workers"
        figures.append(Figure(f"{title}, 1000 samples a second", "", [one.per_s / 1000 for one in runs]))
        figures.append(Figure(f"{title}, CPU time a sample", "us", [one.cpu_us for one in runs]))
    ratios = [best(took, "fastload", number) / best(took, "webdataset", number) for number in range(options.rounds)]
    figures.append(
        Figure("the better of fastload's rates, of webdataset's", "", ratios, at_least=FASTER_THAN_WEBDATASET)
    )
    return show(f"{shards * RECORDS_A_SHARD:,} records of {RECORD_BYTES} bytes, batches of {BATCH_SIZE}", figures)


def best(took: dict[tuple[str, int], list[Took]], system: str, number: int) -> float:
    """The system's highest rate in a round."""
    return max(runs[number].per_s for (name, _), runs in took.items() if name == system)


def run(system: str, workers: int, shards: int, folder: Path) -> list[Took]:
    """One system in a process of its own."""
    command = [sys.executable, "-m", "bench.records", "--folder", str(folder)]
    command += ["--run", system, str(workers), str(shards)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return [Took(*epoch) for epoch in json.loads(done.stdout)]


# Sequences of tokens.

TOKENS, TOKEN_SHARDS, SEQUENCES_A_SHARD, TOKEN_BATCH_SIZE = 2048, 8, 5000, 32
TOKEN_WORKERS = 2


def tokens(options: argparse.Namespace) -> bool:
    """fastload's rates, mapped and not, and torch's over a memory-mapped file; whether a target is missed."""
    from fastload import decode, formats

    folder = prepare_tokens(options.folder)
    urls, columns = f"{folder}/train-{{000000..{TOKEN_SHARDS - 1:06d}}}.tar", {"bin": decode.flat("uint16", TOKENS)}
    bare, sliced = "fastload, one bare file", "numpy, slices of it"
    rates: dict[str, list[float]] = {"fastload": [], "fastload, map_batch": [], "torch, memory-mapped": []}
    rates |= {bare: [], sliced: []}
    cpu_us: dict[str, list[float]] = {system: [] for system in rates}

    def take(system: str, loader: Any, pids: list[int]) -> None:
        took = [Took(*timed(lambda: sum(len(first_column(batch)) for batch in loader), pids)) for _ in range(3)]
        assert {one.count for one in took} == {TOKEN_SHARDS * SEQUENCES_A_SHARD}, (system, took)
        median = sorted(took, key=lambda one: one.wall_s)[1]
        rates[system].append(median.per_s)
        cpu_us[system].append(median.cpu_us)

    for _ in range(options.rounds):
        for system, function in (("fastload", None), ("fastload, map_batch", as_it_is)):
            with warm_loaders(urls, TOKEN_BATCH_SIZE, [TOKEN_WORKERS], function=function, decode=columns) as found:
                take(system, found[0][TOKEN_WORKERS], found[1])
        loader = memory_mapped(folder / "tokens.bin")
        sum(1 for _ in loader)
        take("torch, memory-mapped", loader, [os.getpid()])
        how = formats.tokens(TOKENS, "uint16", overlap=0)
        with warm_loaders(str(folder / "tokens.bin"), TOKEN_BATCH_SIZE, [TOKEN_WORKERS], format=how) as found:
            take(bare, found[0][TOKEN_WORKERS], found[1])
        take(sliced, NumpySlices(folder / "tokens.bin"), [os.getpid()])
    figures = []
    for system, per_s in rates.items():
        target = TOKENS_A_SECOND / 1000 if system == "fastload" else None
        figures.append(Figure(f"{system}, 1000 sequences a second", "", [one / 1000 for one in per_s], at_least=target))
        figures.append(Figure(f"{system}, CPU time a sequence", "us", cpu_us[system]))
    pairs = zip(rates["fastload, map_batch"], rates["torch, memory-mapped"], strict=True)
    ratios = [mapped / plain for mapped, plain in pairs]
    figures.append(Figure("map_batch, times torch's rate", "", ratios, at_least=MAPPED_FASTER_THAN_MEMMAP))
    ratios = [one / other for one, other in zip(rates[bare], rates[sliced], strict=True)]
    figures.append(Figure("one bare file, times numpy's rate", "", ratios, at_least=BARE_FASTER_THAN_NUMPY))
    return show(f"sequences of {TOKENS} uint16, batches of {TOKEN_BATCH_SIZE}", figures)


def prepare_tokens(folder: Path) -> Path:
    """The folder with shards of sequences, and the same in one file; made first where it is not there."""
    final = folder / f"tokens-v{VERSION}-{TOKEN_SHARDS}x{SEQUENCES_A_SHARD}"
    if not final.exists():
        part = folder / f"{final.name}.part-{os.getpid()}"
        part.mkdir(parents=True)
        rng = np.random.default_rng(SEED)
        with open(part / "tokens.bin", "wb") as whole:
            for number in range(TOKEN_SHARDS):
                sequences = rng.integers(0, 50_000, (SEQUENCES_A_SHARD, TOKENS), np.uint16)
                shard = tar_of(number * SEQUENCES_A_SHARD, sequences.view(np.uint8), "bin")
                (part / f"train-{number:06d}.tar").write_bytes(shard)
                whole.write(sequences.tobytes())
        part.rename(final)
    return final


class MemoryMapped(torch.utils.data.Dataset[torch.Tensor]):
    """Sequences of one file, opened in each worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sequences: Any = None

    def __len__(self) -> int:
        return TOKEN_SHARDS * SEQUENCES_A_SHARD

    def __getitem__(self, number: int) -> torch.Tensor:
        if self._sequences is None:
            self._sequences = np.memmap(self._path, np.uint16, "r").reshape(-1, TOKENS)
        return torch.from_numpy(self._sequences[number].copy())


def memory_mapped(path: Path) -> Any:
    """torch's own loader over `MemoryMapped`."""
    return torch.utils.data.DataLoader(
        MemoryMapped(path), TOKEN_BATCH_SIZE, shuffle=True, num_workers=TOKEN_WORKERS, persistent_workers=True
    )


class NumpySlices:
    """Batches of one file in random order, stacked from slices of its memory map in a loop."""

    def __init__(self, path: Path) -> None:
        self._path, self._rng = path, np.random.default_rng(SEED)

    def __iter__(self) -> Iterator[torch.Tensor]:
        text = np.memmap(self._path, np.uint16, "r")
        order = self._rng.permutation(TOKEN_SHARDS * SEQUENCES_A_SHARD).tolist()
        for start in range(0, len(order), TOKEN_BATCH_SIZE):
            numbers = order[start : start + TOKEN_BATCH_SIZE]
            yield torch.from_numpy(np.stack([text[n * TOKENS : (n + 1) * TOKENS] for n in numbers]))


def as_it_is(batch: Any) -> Any:
    """A function of `map_batch`."""
    return batch


def first_column(batch: Any) -> Any:
    """The sequences of a batch."""
    return batch.get("bin", batch.get("tokens")) if isinstance(batch, dict) else batch


# The index of a shard.


def index(options: argparse.Namespace) -> bool:
    """fastload's index, tarfile and webdataset on a shard of each kind; whether a target is missed."""
    of_photographs = data.prepare(options.folder, shard_count=PHOTO_SHARDS).paths[0]
    missed = index_one(prepare(options.folder) / "train-000000.tar", FASTER_THAN_TARFILE, 3 * options.rounds)
    return index_one(of_photographs, None, 3 * options.rounds) or missed


def index_one(path: Path, target: float | None, rounds: int) -> bool:
    """All systems on one shard."""
    shard = path.read_bytes()
    readers = {"fastload": samples_by_fastload, "tarfile": samples_by_tarfile, "webdataset": samples_by_webdataset}
    took: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(rounds + 1):
        for name, read in readers.items():
            began = time.process_time()
            count = read(shard)
            if number > 0:
                took[name].append((time.process_time() - began) / count * 1e6)
    figures = [Figure(f"{name}, CPU time a sample", "us", values) for name, values in took.items()]
    for name in ("tarfile", "webdataset"):
        times = [other / own for other, own in zip(took[name], took["fastload"], strict=True)]
        figures.append(Figure(f"{name}, times fastload", "", times, at_least=target if name == "tarfile" else None))
    return show(f"the index of a shard of {len(shard) / 1e6:.0f} MB, {count:,} samples", figures)


def samples_by_fastload(shard: bytes, chunk_bytes: int = 8 << 20) -> int:
    """The samples of fastload's index, made of chunks as they come; those without a header are passed over."""
    from fastload.formats import indexer_for

    memory, indexer = np.frombuffer(shard, np.uint8), indexer_for("shard.tar", len(shard))
    while not indexer.done:
        start = indexer.next_offset // chunk_bytes * chunk_bytes
        indexer.feed(memory[start : start + chunk_bytes], start)
    return indexer.finish().sample_count


def samples_by_tarfile(shard: bytes) -> int:
    """By tarfile's headers: as many samples as there are names up to the dot."""
    with tarfile.open(fileobj=io.BytesIO(shard), mode="r:") as archive:
        return len({member.name.partition(".")[0] for member in archive})


def samples_by_webdataset(shard: bytes) -> int:
    """The samples that webdataset's own iterators group, with their data."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    files = ({**each, "__url__": "shard.tar"} for each in tar_file_iterator(io.BytesIO(shard)))
    return sum(1 for _ in group_by_keys(files))


# Photographs.


def photographs(options: argparse.Namespace) -> bool:
    """The loader against its decoder; whether a target is missed."""
    from fastload import decode

    data_set = data.prepare(options.folder, shard_count=1 if options.quick else PHOTO_SHARDS)
    decoder = decode.image(SIZE, random_resized_crop=True, hflip=0.5, mean=MEAN, std=STD)
    groups, urls = grouped_files(data_set), [str(path) for path in data_set.paths]
    took: dict[tuple[str, int], list[Took]] = {(what, n): [] for n in THREADS for what in ("loader", "decoder alone")}
    with warm_loaders(urls, PHOTO_BATCH_SIZE, THREADS, decode={"jpg": decoder}) as (loaders, pids):
        works: dict[tuple[str, int], Callable[[], int]]
        works = {("loader", n): partial(count_of, loaders[n]) for n in THREADS}
        works |= {("decoder alone", n): decoder_work(decoder, groups, n) for n in THREADS}
        for _ in range(options.rounds):
            for key, runs in took.items():
                runs.append(Took(*timed(works[key], pids)))
    figures = []
    for (what, threads), runs in took.items():
        title = f"{what}, {threads} thread{'s' * (threads > 1)}"
        figures.append(Figure(f"{title}, photographs a second", "", [one.per_s for one in runs]))
        figures.append(Figure(f"{title}, CPU time a photograph", "us", [one.cpu_us for one in runs]))
    for threads in THREADS:
        loader, alone = took["loader", threads], took["decoder alone", threads]
        count = f"{threads} thread{'s' * (threads > 1)}"
        at_best = max(one.per_s for one in loader) / max(one.per_s for one in alone)
        figures.append(
            Figure(
                f"the loader's rate, of the decoder's, each at its best, {count}",
                "",
                [at_best],
                at_least=SHARE_OF_KERNEL,
            )
        )
        shares = [other.cpu_us / one.cpu_us for one, other in zip(loader, alone, strict=True)]
        figures.append(
            Figure(f"CPU time of the decoder alone, of the loader's, {count}", "", shares, at_least=SHARE_OF_KERNEL)
        )
    size = data_set.payload_bytes / data_set.samples / 1e3
    return show(f"{data_set.samples:,} photographs of {size:.0f} kB, batches of {PHOTO_BATCH_SIZE}", figures)


Group = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.uint64]]


def grouped_files(data_set: data.DataSet) -> list[Group]:
    """Every JPEG of the data set in batches, as a decoder is given them: bytes end to end, offsets, keys."""
    from fastload.decode.base import sample_keys

    files = []
    for path in data_set.paths:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    content = archive.extractfile(member)
                    assert content is not None
                    files.append(content.read())
    order = np.random.default_rng(SEED).permutation(len(files))
    groups = []
    for start in range(0, len(files), PHOTO_BATCH_SIZE):
        chosen = order[start : start + PHOTO_BATCH_SIZE]
        mine = [files[number] for number in chosen]
        offsets = np.cumsum([0, *map(len, mine)], dtype=np.int64)
        keys = sample_keys(SEED, 0, np.zeros(len(mine), np.int64), chosen)
        groups.append((np.frombuffer(b"".join(mine), np.uint8), offsets, keys))
    return groups


def decoder_work(decoder: Any, groups: list[Group], threads: int) -> Callable[[], int]:
    """Decodes every group, each thread into memory that it keeps, and says how many photographs that was."""
    shape, dtype = decoder.fixed()
    kept = threading.local()

    def part(begin: int, end: int) -> None:
        if not hasattr(kept, "out"):
            kept.out = np.zeros((PHOTO_BATCH_SIZE, *shape), dtype)
        for values, offsets, keys in groups[begin:end]:
            decoder.decode_into(values, offsets, kept.out[: len(keys)], str, keys)

    decode_all = in_parts(part, len(groups), threads)
    decode_all()

    def work() -> int:
        decode_all()
        return sum(len(keys) for _, _, keys in groups)

    return work


QUESTIONS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "records": records,
    "tokens": tokens,
    "index": index,
    "photographs": photographs,
}


if __name__ == "__main__":
    sys.exit(main())
