"""Formats against their own readers: the same files, out of memory, shuffled; and how fast records are found in a file.

    python -m bench.formats                        # ten minutes; needs the extra `bench` for the other readers
    python -m bench.formats --quick                # a tenth of the samples, one round: a look, not a figure
    python -m bench.formats --question mds index

*mds*, *litdata*: 200,000 records of 570 bytes in batches of 1024, and 4,000 of 90 kB in batches of 64, written by the
format's own writer on the local disk. Its own reader and loader have the files in the page cache, fastload has them in
its cache; each without workers, in a process of its own, whose first epoch does not count. What is compared is CPU time
a sample, of all processes.

*tokens*: windows of 2048 uint16 of one file, in batches of 32, by `fastload.formats.tokens`, and by slices of a memory
map in a random order, stacked, in a loop and nothing else.

*found*: how fast the records of a file in memory are found, in one thread: JSON lines and TFRecord.

*index*: of a million JSON lines of 60 bytes: its size, and how long it takes to open.

*adapters*: the adapters of webdataset, streaming and litdata against fastload's own data set, sample by sample.

*cold*: a first epoch of 360 MB in each format from a store behind a link of 200 MB/s, with an empty cache: bytes of the
data a second, of the link's.

*ranks*: one epoch of packed JSON lines, shared by eight ranks of a node: packed bytes that come from the store, of
those that are there. Each unpacking fetches the object anew, so once means that each was unpacked once.

Systems take turns within a round; figures are medians over rounds, and ratios are taken within a round. A reader that
is not installed is left out, which is said.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench import data
from bench.proxy import Profile
from bench.records import count_of, tar_of, timed
from bench.stage import BUCKET, Stage, is_object
from bench.targets import Figure, show
from fastload.bench import measure

VERSION = 1
SIZES = {"small": (570, 200_000, 1024), "large": (90_000, 4_000, 64)}
TOKENS, TOKEN_WINDOWS, TOKEN_BATCH_SIZE = 2048, 20_000, 32
LINES, LINE_BYTES = 1_000_000, 60
RAM_BYTES = 2 << 30
EPOCHS = 2

FASTER = {
    ("mds", "small"): 50.0, ("mds", "large"): 5.0,
    ("litdata", "small"): 10.0, ("litdata", "large"): 10.0,
}  # fmt: skip
FOUND_BYTES_PER_S = 1.5e9
INDEX_BYTES, INDEX_OPENED_S = 16e6, 0.05
SHARE_OF_OWN = 0.8
CAP_BYTES_PER_S, DELAY_S, SHARE_OF_CAP = 200e6, 0.02, 0.95
RANKS = 8


def main() -> int:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(
        prog="bench.formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the samples, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--folder", type=Path, default=data.default_folder(), help="data sets and caches; a real disk")
    parser.add_argument("--run", nargs=2, metavar=("SYSTEM", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        system, folder = options.run
        print(json.dumps(list(SYSTEMS[system](Path(folder)))))
        return 0
    if options.quick:
        options.rounds = 1
    print(f"load before: {os.getloadavg()[0]:.1f}")
    return int(sum(QUESTIONS[question](options) for question in options.question) > 0)


# Data, by the formats' own writers.


def written(options: argparse.Namespace, name: str, count: int, write: Callable[[Path, int], None]) -> Path:
    """The folder with so many samples (a tenth where it is to be quick); made first where it is not there."""
    count = count // 10 if options.quick else count
    final: Path = options.folder / f"formats-v{VERSION}-{name}-{count}"
    if not final.exists():
        part = options.folder / f"{final.name}.part-{os.getpid()}"
        part.parent.mkdir(parents=True, exist_ok=True)
        write(part, count)
        part.rename(final)
    return final


def contents(size: int, count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(6)
    for _ in range(count):
        yield rng.integers(0, 256, size, np.uint8).tobytes()


def write_mds(size: int) -> Callable[[Path, int], None]:
    def write(folder: Path, count: int) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder), columns={"x": "bytes", "y": "int"}, size_limit=16 << 20) as writer:
            for number, value in enumerate(contents(size, count)):
                writer.write({"x": value, "y": number})

    return write


def write_litdata(size: int) -> Callable[[Path, int], None]:
    def write(folder: Path, count: int) -> None:
        from litdata.streaming.cache import Cache

        cache = Cache(input_dir=str(folder), chunk_bytes=16 << 20)
        for number, value in enumerate(contents(size, count)):
            cache[number] = {"x": np.frombuffer(value, np.uint8), "y": number}  # as bytes it would be a row of Arrow
        cache.done()
        cache.merge()

    return write


def write_tokens(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    values = np.random.default_rng(6).integers(0, 50_000, count * TOKENS + 1, np.uint16)
    values.tofile(folder / "train.bin")


def write_tars(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    values = np.random.default_rng(6).integers(0, 256, (count, 570), np.uint8)
    (folder / "train-000000.tar").write_bytes(tar_of(0, values, "bin"))


def write_large(ending: str, shard: Callable[[list[bytes]], bytes]) -> Callable[[Path, int], None]:
    """Eight shards of records of 90 kB, or of one eighth of `count` records each."""

    def write(folder: Path, count: int) -> None:
        folder.mkdir(parents=True)
        values = contents(SIZES["large"][0], count)
        for number in range(8):
            (folder / f"train-{number:06d}{ending}").write_bytes(shard(list(islice(values, count // 8))))

    return write


def large_tar(values: list[bytes]) -> bytes:
    return tar_of(0, np.stack([np.frombuffer(value, np.uint8) for value in values]), "bin")


def large_lines(values: list[bytes]) -> bytes:
    return b"".join(b'{"x": "%s"}\n' % base64.b64encode(value[: 3 * len(value) // 4]) for value in values)


def packed_lines(values: list[bytes]) -> bytes:
    return gzip.compress(large_lines(values), 1)


def large_records(values: list[bytes]) -> bytes:
    from tests.formats.protobuf import tfrecord

    return tfrecord(values)


# Readers: of each epoch after the first, samples, seconds and CPU-seconds.

Epochs = Iterator[tuple[int, float, float]]


def epochs_of(loader: Any, count: Callable[[Any], int], pids: list[int]) -> Epochs:
    count(loader)
    for _ in range(EPOCHS):
        yield timed(lambda: count(loader), pids)


@contextmanager
def cached() -> Iterator[tuple[Any, str]]:
    """A cache in RAM, and where its directory is."""
    import fastload

    with tempfile.TemporaryDirectory(prefix="fastload-formats-") as place, ExitStack() as stack:
        yield stack.enter_context(fastload.Cache(place, ram_bytes=RAM_BYTES, disk_bytes=0)), place


def by_fastload(folder: Path, batch_size: int, **options: Any) -> Epochs:
    import fastload

    with cached() as (cache, place):
        dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, shuffle=True, **options)
        with fastload.DataLoader(dataset, batch_size=batch_size) as loader:
            pids = [os.getpid(), *measure.find_processes("fastload.service", place)]
            yield from epochs_of(loader, count_of, pids)


def samples_of(column: str) -> Callable[[Any], int]:
    return lambda loader: sum(len(batch[column]) for batch in loader)


def by_streaming(folder: Path, batch_size: int) -> Epochs:
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    loader = StreamingDataLoader(dataset, batch_size=batch_size, collate_fn=as_columns)
    yield from epochs_of(loader, samples_of("x"), [os.getpid()])


def by_litdata(folder: Path, batch_size: int) -> Epochs:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(folder), shuffle=True)
    loader = StreamingDataLoader(dataset, batch_size=batch_size, collate_fn=as_columns)
    yield from epochs_of(loader, samples_of("x"), [os.getpid()])


def as_columns(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes as a list, numbers as an array: what costs least."""
    return {"x": [sample["x"] for sample in samples], "y": np.array([sample["y"] for sample in samples])}


def tokens_by_fastload(folder: Path) -> Epochs:
    import fastload

    return by_fastload(folder, TOKEN_BATCH_SIZE, format=fastload.formats.tokens(TOKENS, "uint16"))


def tokens_by_memmap(folder: Path) -> Epochs:
    import torch

    values = np.memmap(folder / "train.bin", np.uint16, "r")
    windows = (len(values) - TOKENS) // (TOKENS - 1) + 1

    def count(order: Any) -> int:
        numbers, found = order.permutation(windows), 0
        for at in range(0, windows, TOKEN_BATCH_SIZE):
            starts = numbers[at : at + TOKEN_BATCH_SIZE] * (TOKENS - 1)
            found += len(torch.from_numpy(np.stack([values[start : start + TOKENS] for start in starts])))
        return found

    return epochs_of(np.random.default_rng(1), count, [os.getpid()])


SYSTEMS: dict[str, Callable[[Path], Epochs]] = {
    "fastload tokens": tokens_by_fastload,
    "memmap tokens": tokens_by_memmap,
}
for _size, (_, _, _batch_size) in SIZES.items():
    SYSTEMS[f"fastload {_size}"] = partial(by_fastload, batch_size=_batch_size)
    SYSTEMS[f"streaming {_size}"] = partial(by_streaming, batch_size=_batch_size)
    SYSTEMS[f"litdata {_size}"] = partial(by_litdata, batch_size=_batch_size)


def run(system: str, folder: Path) -> tuple[float, float]:
    """One system in a process of its own: seconds and CPU-seconds a sample, of its best epoch."""
    command = [sys.executable, "-m", "bench.formats", "--run", system, str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    epochs = json.loads(done.stdout.splitlines()[-1])
    return min(wall_s / count for count, wall_s, _ in epochs), min(cpu_s / count for count, _, cpu_s in epochs)


# Questions: whether a target is missed.


def has(library: str) -> bool:
    if importlib.util.find_spec(library) is None:
        print(f"{library} is not installed; pip install '.[bench]'")
        return False
    return True


def beside(title: str, folder: Path, systems: dict[str, float | None], rounds: int) -> bool:
    """fastload's CPU time a sample, and how many times as much others take, with what is asked of that."""
    took: dict[str, list[tuple[float, float]]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system, runs in took.items():
            runs.append(run(system, folder))
    ours = next(runs for system, runs in took.items() if system.startswith("fastload"))
    figures = []
    for system, runs in took.items():
        figures.append(Figure(f"{system}: CPU time a sample", "us", [1e6 * cpu_s for _, cpu_s in runs]))
        figures.append(Figure(f"{system}: samples a second", "", [1 / wall_s for wall_s, _ in runs]))
        if runs is not ours:
            ratios = [theirs[1] / own[1] for theirs, own in zip(runs, ours, strict=True)]
            figures.append(Figure("its CPU time, of fastload's", "", ratios, at_least=systems[system]))
    return show(title, figures)


def mds(options: argparse.Namespace) -> bool:
    return has("streaming") and of_sizes("mds", "streaming", write_mds, options)


def litdata(options: argparse.Namespace) -> bool:
    return has("litdata") and of_sizes("litdata", "litdata", write_litdata, options)


def of_sizes(
    name: str, library: str, write: Callable[[int], Callable[[Path, int], None]], options: argparse.Namespace
) -> bool:
    is_missed = False
    for size, (sample_bytes, count, _) in SIZES.items():
        folder = written(options, f"{name}-{size}", count, write(sample_bytes))
        systems = {f"fastload {size}": None, f"{library} {size}": FASTER[name, size]}
        is_missed |= beside(f"{name}, samples of {sample_bytes:,} bytes", folder, systems, options.rounds)
    return is_missed


def tokens(options: argparse.Namespace) -> bool:
    folder = written(options, "tokens", TOKEN_WINDOWS, write_tokens)
    systems = {"fastload tokens": None, "memmap tokens": 2.0}
    return beside(f"windows of {TOKENS} tokens", folder, systems, options.rounds)


def json_lines(count: int) -> bytes:
    """Lines of `LINE_BYTES` bytes."""
    line = b'{"id": %08d, "text": "'
    filler = b"x" * (LINE_BYTES - len(line % 0) - 3) + b'"}\n'
    return b"".join(line % number + filler for number in range(count))


def tf_records(count: int) -> bytes:
    """Records of 1000 bytes, with their checksums."""
    from tests.formats.protobuf import tfrecord

    return tfrecord(contents(1000, 1)) * count


def indexed(name: str, stored: bytes) -> Any:
    """The index of a shard in memory, made chunk by chunk."""
    from fastload.formats import indexer_for

    values = np.frombuffer(stored, np.uint8)
    indexer = indexer_for(name, len(values))
    while not indexer.done:
        start = indexer.next_offset
        indexer.feed(values[start : start + (8 << 20)], start)
    return indexer.finish()


def found(options: argparse.Namespace) -> bool:
    count = 100_000 if options.quick else 1_000_000
    shards = {"train.jsonl": json_lines(count), "train.tfrecord": tf_records(count // 10)}
    figures = []
    for name, stored in shards.items():
        assert indexed(name, stored).sample_count == count // (10 if name.endswith("record") else 1)
        rates = []
        for _ in range(max(3, options.rounds)):
            began = time.perf_counter()
            indexed(name, stored)
            rates.append(len(stored) / (time.perf_counter() - began))
        figures.append(
            Figure(f"{name}: bytes a second", "GB/s", [rate / 1e9 for rate in rates], FOUND_BYTES_PER_S / 1e9)
        )
    return show("records found, in one thread", figures)


def index(options: argparse.Namespace) -> bool:
    from fastload.formats import stored_index

    lines = json_lines(LINES)
    stored = indexed("train.jsonl", lines).to_bytes()
    took = []
    for _ in range(max(3, options.rounds)):
        began = time.perf_counter()
        assert stored_index(stored, "train.jsonl", len(lines)).sample_count == LINES
        took.append(time.perf_counter() - began)
    return show(
        f"the index of {LINES:,} records",
        [
            Figure("its size", "MB", [len(stored) / 1e6], at_most=INDEX_BYTES / 1e6),
            Figure("opened in", "ms", [1e3 * each for each in took], at_most=1e3 * INDEX_OPENED_S),
        ],
    )


def adapters(options: argparse.Namespace) -> bool:
    """Samples one by one, by each adapter and by fastload's own data set, with everything in memory."""
    import fastload
    import fastload.adapters.litdata
    import fastload.adapters.streaming
    import fastload.adapters.webdataset as wds

    size, count, _ = SIZES["small"]
    figures = []

    def measured(name: str, folder: Path, adapted: Callable[[Any], Any]) -> None:
        with cached() as (cache, _):
            systems = fastload.StreamingDataset(f"{folder}/", cache=cache), adapted(cache)
            took: list[list[float]] = [[timed(partial(samples, system), [])[1] for system in systems]]
            took += [[timed(partial(samples, system), [])[1] for system in systems] for _ in range(options.rounds)]
            for system in systems:
                system.close()
        ratios = [own_s / adapted_s for own_s, adapted_s in took[1:]]
        what = f"{name}: rate of its adapter, of fastload's own data set"
        figures.append(Figure(what, "", ratios, at_least=SHARE_OF_OWN))

    folder = written(options, "tar", count // 4, write_tars)
    shard = f"{folder}/train-000000.tar"
    measured("webdataset", folder, lambda cache: wds.WebDataset(shard, shardshuffle=False, cache=cache))
    if has("streaming"):
        folder = written(options, "mds-small", count, write_mds(size))
        of_mds = fastload.adapters.streaming.StreamingDataset
        measured("streaming", folder, lambda cache: of_mds(local=str(folder), cache=cache))
    if has("litdata"):
        folder = written(options, "litdata-small", count, write_litdata(size))
        of_chunks = fastload.adapters.litdata.StreamingDataset
        measured("litdata", folder, lambda cache: of_chunks(str(folder), cache=cache))
    return show("adapters, sample by sample", figures)


def samples(dataset: Any) -> int:
    return sum(1 for _ in dataset)


# From a store: what is written, and how many samples that is.
STORED: dict[str, tuple[Callable[[Path, int], None], int]] = {
    "tar": (write_large(".tar", large_tar), 4_000),
    "jsonl": (write_large(".jsonl", large_lines), 4_000),
    "tfrecord": (write_large(".tfrecord", large_records), 4_000),
    "mds-large": (write_mds(SIZES["large"][0]), 4_000),
    "litdata-large": (write_litdata(SIZES["large"][0]), 4_000),
    "tokens": (write_tokens, 90_000),
    "jsonl-gz": (write_large(".jsonl.gz", packed_lines), 4_000),
}


@contextmanager
def stored(options: argparse.Namespace, name: str) -> Iterator[tuple[Stage, int]]:
    """A store with the data of that name, and its bytes."""
    write, count = STORED[name]
    folder = written(options, f"stored-{name}", count, write)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    byte_count = sum(path.stat().st_size for path in paths)
    shards = tuple(path.name for path in paths)
    with Stage(data.DataSet(str(folder), shards, count, byte_count, byte_count, 0), options.folder) as stage:
        yield stage, byte_count


def from_store(place: Path, name: str) -> Epochs:
    """A first epoch of a data set in the store, with the cache in `place`, whose service is up before."""
    import fastload
    from fastload.client.cache import handle_of

    form: dict[str, Any] = {"format": fastload.formats.tokens(TOKENS, "uint16")} if name == "tokens" else {}
    with fastload.Cache(str(place), ram_bytes=RAM_BYTES) as cache, handle_of(cache).consumer(name="keeper"):
        pids = [os.getpid(), *measure.find_processes("fastload.service", str(place))]
        measure.wait_until_idle(pids[1:])

        def epoch() -> int:
            dataset = fastload.StreamingDataset(f"s3://{BUCKET}/", cache=cache, shuffle=True, **form)
            with fastload.DataLoader(dataset, batch_size=SIZES["large"][2]) as loader:
                return count_of(loader)

        yield timed(epoch, pids)


for _name in STORED:
    SYSTEMS[f"store {_name}"] = partial(from_store, name=_name)


def cold(options: argparse.Namespace) -> bool:
    took: dict[str, list[float]] = {name: [] for name in STORED if not name.endswith("-gz")}
    for name, shares in took.items():
        with stored(options, name) as (stage, byte_count):
            for _ in range(options.rounds):
                ((_, seconds, _),), _ = read_by(stage, name, 1, Profile(DELAY_S, CAP_BYTES_PER_S))
                shares.append(byte_count / seconds / CAP_BYTES_PER_S)
    figures = [
        Figure(f"{name}: of the link's rate", "", shares, at_least=SHARE_OF_CAP) for name, shares in took.items()
    ]
    return show("a first epoch behind a link of 200 MB/s", figures)


def ranks(options: argparse.Namespace) -> bool:
    shares, samples_seen = [], []
    with stored(options, "jsonl-gz") as (stage, byte_count):
        for _ in range(options.rounds):
            epochs, fetched = read_by(stage, "jsonl-gz", RANKS, Profile(DELAY_S))
            shares.append(fetched / byte_count)
            samples_seen.append(float(sum(count for count, _, _ in epochs)))
    figures = [
        Figure("packed bytes fetched, of those there", "", shares, at_most=1.0),
        Figure("samples that came, all ranks", "", samples_seen),
    ]
    return show(f"{RANKS} ranks of a node, packed JSON lines", figures)


def read_by(stage: Stage, name: str, count: int, profile: Profile) -> tuple[list[tuple[int, float, float]], int]:
    """An epoch by so many ranks with an empty cache: what each took, and the bytes of objects that all fetched."""
    place = stage.empty_folder()
    with stage.served(profile) as (environment, proxy), ExitStack() as stack:
        processes = []
        for rank in range(count):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            world = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)} if count > 1 else {}
            command = [sys.executable, "-m", "bench.formats", "--run", f"store {name}", str(place)]
            environment_of = {**environment, **of_rank, **world, "FASTLOAD_IDLE_S": "0"}
            processes.append(
                stack.enter_context(subprocess.Popen(command, env=environment_of, stdout=subprocess.PIPE, text=True))
            )
        outputs = [process.communicate()[0] for process in processes]
        fetched = sum(each["body_bytes"] for each in proxy.log() if is_object(each))
    shutil.rmtree(place, ignore_errors=True)
    assert not any(process.returncode for process in processes), "a reader failed; its error is above"
    return [tuple(json.loads(output.splitlines()[-1])[0]) for output in outputs], fetched


QUESTIONS: dict[str, Callable[[argparse.Namespace], bool]] = {
    "mds": mds, "litdata": litdata, "tokens": tokens, "found": found, "index": index, "adapters": adapters,
    "cold": cold, "ranks": ranks,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
