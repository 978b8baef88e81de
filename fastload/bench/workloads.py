"""Workloads of MLPerf Storage: sizes of samples, how many make a batch, and how long an accelerator takes for it.

The figures are those of the workload files of DLIO, which MLPerf Storage runs, for an H100
(https://github.com/argonne-lcf/dlio_benchmark, `dlio_benchmark/configs/workload/*_h100.yaml`), with the number of
samples and the accelerator use that is asked for from https://github.com/mlcommons/storage (`configs/dlio/workload`).
What is measured with them is no result of MLPerf Storage: data is in tar where theirs is npz or TFRecord, no framework
trains, no checkpoint is written, caches are not excluded by five times the memory, and no review takes place.

Data is made of a sample's number alone, so it is the same everywhere, and more of it begins with what less of it is.
Sizes have the mean and the deviation of the file. They are log-normal, since a normal distribution as wide as that of
resnet50 would have sizes below zero, and they follow a sequence that is evenly spread, so that a few samples have the
mean of many. Contents do not compress.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from fastload.config import format_bytes
from fastload.errors import ConfigError
from fastload.store import StoreOptions, store_root
from fastload.store.objectstore import SCHEMES, ObjectStore
from fastload.store.urls import normalise, scheme

SHARD_BYTES = 128 << 20
_GOLDEN = (math.sqrt(5) - 1) / 2
_LEAST_BYTES = 64


@dataclass(frozen=True, slots=True)
class Workload:
    """A workload. `busy` is the accelerator use that is asked for."""

    name: str
    sample_bytes: float
    stdev_bytes: float
    samples: int  # of the whole data set
    batch_size: int
    step_s: float
    busy: float

    def size_of(self, number: int) -> int:
        """The size of a sample."""
        sigma = math.sqrt(math.log1p((self.stdev_bytes / self.sample_bytes) ** 2))
        place = (0.5 + number * _GOLDEN) % 1.0
        quantile = NormalDist().inv_cdf(min(max(place, 1e-6), 1 - 1e-6))
        return max(_LEAST_BYTES, round(self.sample_bytes * math.exp(sigma * quantile - sigma**2 / 2)))

    def value(self, number: int) -> bytes:
        """The content of a sample."""
        size = self.size_of(number)
        words = np.random.PCG64(number).random_raw(-(-size // 8))  # of all of numpy's, the streams that never change
        return words.astype("<u8").tobytes()[:size]


WORKLOADS = {
    each.name: each
    for each in (
        Workload("unet3d", 146_600_628, 68_341_808, 168, 7, 0.323, 0.9),
        Workload("resnet50", 114_660.07, 136_075.82, 1024 * 1251, 64, 0.103, 0.9),
        Workload("cosmoflow", 2_828_486, 71_311, 524_288, 1, 0.0035, 0.7),
    )
}


def find(name: str) -> Workload:
    """The workload of that name; ConfigError where there is none."""
    if name not in WORKLOADS:
        raise ConfigError(f"--profile {name}: must be one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def shards(workload: Workload, count: int, shard_bytes: int = SHARD_BYTES) -> Iterator[range]:
    """Which of `count` samples go into each shard: about as many bytes each, at least one sample."""
    begin = held = 0
    for number in range(count):
        held += workload.size_of(number)
        if held >= shard_bytes:
            yield range(begin, number + 1)
            begin, held = number + 1, 0
    if begin < count:
        yield range(begin, count)


def write_shard(path: Path, workload: Workload, numbers: range) -> None:
    """A tar with these samples: `bin`, and `cls`, the number modulo 1000."""
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in numbers:
            for column, value in (("bin", workload.value(number)), ("cls", str(number % 1000).encode())):
                info = tarfile.TarInfo(f"{number:09d}.{column}")
                info.size = len(value)
                archive.addfile(info, io.BytesIO(value))


def make(workload: Workload, url: str, scale: float, options: StoreOptions, report: Callable[[str], None]) -> list[str]:
    """Write so large a part of the workload's data under `url`, a local folder or a prefix of a store; the shards'
    URLs. ConfigError where something else than shards could be meant, or where there is one already.
    """
    kind = scheme(url)
    if kind not in SCHEMES | {"file"}:
        raise ConfigError(f"{url}: data is made in a local folder, or in S3, Google's or Azure's store")
    if not url.endswith("/"):
        raise ConfigError(f"{url}: data is made under a prefix; write {url}/")
    count = math.ceil(workload.samples * scale)
    made: list[str] = []
    with contextlib.ExitStack() as stack:
        # A shard is written here first, so that none is ever there in part.
        local = Path(normalise(url)) if kind == "file" else None
        if local is not None:
            local.mkdir(parents=True, exist_ok=True)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".making-", dir=local)))
        bucket = None
        if local is None:
            bucket = stack.enter_context(contextlib.closing(ObjectStore(store_root(url), options.of_scheme(kind))))
        there = next(iter(bucket.list(url)), None) if bucket else next(local.glob("*.tar"), None) if local else None
        if there is not None:
            raise ConfigError(f"{url} is not empty; name a prefix with nothing under it")
        for number, numbers in enumerate(shards(workload, count)):
            name = f"{workload.name}-{number:06d}.tar"
            report(f"making {name}: sample {numbers.stop:,} of {count:,}")
            path = scratch / name
            write_shard(path, workload, numbers)
            if local is not None:
                os.rename(path, local / name)
            else:
                assert bucket is not None
                bucket.put(url + name, path.read_bytes())
                path.unlink()
            made.append(url + name)
    return made


def described(workload: Workload, scale: float) -> str:
    """What `make` writes, in words."""
    count = math.ceil(workload.samples * scale)
    return f"{count:,} samples, about {format_bytes(count * workload.sample_bytes)}"
