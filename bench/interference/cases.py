"""The kinds of data that are read, as users declare them, and loaders of them."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fastload
from bench import data
from bench.decode import MEAN, STD
from fastload import decode

SHARDS = 24
RECORD_SHARDS, RECORDS_A_SHARD, RECORD_BYTES = 16, 20_000, 600


def raw_images(folder: Path, cache: fastload.Cache) -> Any:
    """JPEGs as they are."""
    return fastload.StreamingDataset(image_shards(folder), cache=cache, shuffle=True, columns=["jpg", "cls"])


def images(folder: Path, cache: fastload.Cache) -> Any:
    """Random resized crops to float32."""
    decoder = decode.image(224, random_resized_crop=True, hflip=0.5, mean=MEAN, std=STD)
    decoders = {"jpg": decoder, "cls": decode.integer()}
    return fastload.StreamingDataset(image_shards(folder), cache=cache, shuffle=True, decode=decoders)


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
    """A kind of data. `environment`: its process's variables; `has_target`: whether the targets are meant.

    `trained_per_s`: batches a second that a machine of eight GPUs would train on, where a loader makes many times more.
    """

    what: str
    batch_size: int
    dataset: Callable[[Path, fastload.Cache], Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    has_target: bool = True
    trained_per_s: float | None = None


CASES = {
    "raw": Case("images of 91 kB, raw, batches of 256", 256, raw_images, trained_per_s=100),
    "images": Case("images decoded, batches of 256", 256, images),
    # simplejpeg and its checks are called for each image.
    "fallback": Case("images without the C unit", 256, images, {"FASTLOAD_NATIVE": "0"}, has_target=False),
    "records": Case("records of 600 bytes, batches of 1024", 1024, records, trained_per_s=200),
    "mixture": Case("two sources of records, batches of 1024", 1024, mixture, trained_per_s=200),
}


@contextmanager
def loader(folder: Path, name: str, threads: int) -> Iterator[Any]:
    """A loader over a cache of its own, which is empty, and as large as all the data, which lies in `folder`."""
    case = CASES[name]
    with (
        # The service may end, and write down what was read, while its directory is removed.
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place,
        fastload.Cache(place, ram_bytes="2GiB", disk_bytes=0) as cache,
    ):
        dataset = case.dataset(folder, cache)
        made: Any = fastload.DataLoader(dataset, batch_size=case.batch_size, num_workers=threads)
        try:
            yield made
        finally:
            made.close()


def prepare(folder: Path) -> None:
    """Make the data of all cases, where it is not there."""
    image_shards(folder)
    prepare_records(folder)


def image_shards(folder: Path) -> list[str]:
    """Shards of photographs, made where they are not there."""
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
