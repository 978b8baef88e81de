"""The data that is measured on: 24 tar shards of 64 MB, of JPEG crops of real photographs of about 90 kB, and labels.

Made once and kept; every byte follows from the seed. What a consumer must have seen is kept with it: how many samples
there are, and the sum of their digests. A sample's digest ties key, picture and label to each other, so the sum differs
when a sample is lost, comes twice, is damaged, or has another's label; the order does not matter to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash

from fastload.bench.peers import module
from fastload.demo import photos

SHARD_COUNT = 24
SAMPLES_PER_SHARD = 690
# At this quality a crop takes 91 kB: 690 of them with their labels make a shard of 64 MB.
QUALITY = 97
SEED = 24
# Part of the folder's name, so that data made by another version of this file is made again.
VERSION = 1

_MASK = (1 << 64) - 1


def sample_digest(key: str, jpg: bytes | memoryview, cls: bytes | memoryview) -> int:
    """64 bits over all of a sample. Multiplied, not added, so that swapped labels show in the sum."""
    label = xxhash.xxh3_64_intdigest(cls, seed=xxhash.xxh3_64_intdigest(key.encode()))
    return (xxhash.xxh3_64_intdigest(jpg) * (label | 1)) & _MASK


class Tally:
    """Counts and digests what a consumer gets."""

    def __init__(self) -> None:
        self.samples = self.bytes = self.digest = 0

    def add(self, key: str, jpg: bytes | memoryview, cls: bytes | memoryview) -> None:
        """One sample."""
        self.samples += 1
        self.bytes += len(jpg) + len(cls)
        self.digest = (self.digest + sample_digest(key, jpg, cls)) & _MASK


@dataclass(frozen=True, slots=True)
class DataSet:
    """Where the data lies and what is in it. `bytes` are those of the shards, headers included."""

    folder: str
    shards: tuple[str, ...]
    samples: int
    bytes: int
    payload_bytes: int
    digest: int

    @property
    def paths(self) -> list[Path]:
        """The shards' files, in order."""
        return [Path(self.folder) / name for name in self.shards]

    def check(self, tally: Tally) -> None:
        """AssertionError unless `tally` has seen each sample exactly once and unharmed."""
        assert tally.samples == self.samples, f"{tally.samples} samples came, {self.samples} are there"
        assert tally.digest == self.digest, "the samples that came are not those that are there"


def default_folder() -> Path:
    """`fastload-bench` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastload-bench"


def prepare(folder: Path, *, shard_count: int = SHARD_COUNT, report: Callable[[str], None] = print) -> DataSet:
    """The data set of `shard_count` shards under `folder`; made first where it is not there. Under a minute."""
    name = f"images-v{VERSION}-{shard_count}x{SAMPLES_PER_SHARD}"
    final = folder / name
    about = final / "about.json"
    if not about.exists():
        report(f"making {shard_count} shards of 64 MB in {final} ...")
        part = folder / f"{name}.part-{os.getpid()}"
        try:
            _make(part, shard_count, final)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    fields = json.loads(about.read_text())
    return DataSet(**{**fields, "folder": str(final), "shards": tuple(fields["shards"])})


def _make(part: Path, shard_count: int, final: Path) -> None:
    part.mkdir(parents=True)
    pictures = photos.photographs()
    tally = Tally()
    names = [f"train-{number:06d}.tar" for number in range(shard_count)]
    for number, name in enumerate(names):
        _write_shard(part / name, pictures, number, tally)
    size = sum((part / name).stat().st_size for name in names)
    data_set = DataSet(str(final), tuple(names), tally.samples, size, tally.bytes, tally.digest)
    (part / "about.json").write_text(json.dumps(asdict(data_set)))


def _write_shard(path: Path, pictures: list[photos.Pixels], number: int, tally: Tally) -> None:
    import webdataset

    crops = photos.random_crops(pictures, SAMPLES_PER_SHARD, np.random.default_rng((SEED, number)))
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for sample in photos.samples(pictures, crops, QUALITY, first_key=number * SAMPLES_PER_SHARD):
            tally.add(sample["__key__"], sample["jpg"], sample["cls"])
            writer.write(sample)


# What reads a format of its own: the prefix in the bucket.
FORMATS = {"streaming": "mds", "litdata": "litdata"}


def prepare_format(system: str, data_set: DataSet) -> tuple[str, Path] | None:
    """The prefix and the folder of what `system` reads, made first where it is not there; None where it reads tar."""
    prefix = FORMATS.get(system)
    if prefix is None:
        return None
    final = Path(f"{data_set.folder}-{prefix}")
    if not final.exists():
        part = final.with_name(f"{final.name}.part-{os.getpid()}")
        try:
            module(system).convert(data_set.paths, ("jpg", "cls"), part)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return prefix, final


if __name__ == "__main__":
    print(prepare(default_folder()))
