"""Shards of known content for end-to-end tests, and what a correct reader makes of them."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Sample = Mapping[str, bytes]


def tar_of(samples: Mapping[str, Sample]) -> bytes:
    """A tar with one member for each column of each sample."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for key, sample in samples.items():
            for column, data in sample.items():
                info = tarfile.TarInfo(f"{key}.{column}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass(frozen=True)
class Corpus:
    """Shards by name, and the samples that they hold: key -> column -> bytes."""

    shards: dict[str, bytes]
    samples: dict[str, dict[str, bytes]]

    @property
    def byte_count(self) -> int:
        return sum(map(len, self.shards.values()))

    def put(self, bucket: Any, prefix: str = "data") -> str:
        """Upload all shards; the URL of their prefix."""
        for name, data in self.shards.items():
            bucket.put(f"{prefix}/{name}", data)
        return f"{bucket.url}/{prefix}/"

    def write(self, folder: Path) -> str:
        """Write all shards to a folder; its path with a slash."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.shards.items():
            (folder / name).write_bytes(data)
        return f"{folder}/"


def corpus(shard_count: int = 6, samples_per_shard: int = 20, value_bytes: int = 3000, seed: int = 0) -> Corpus:
    """Shards of samples with columns `bin` (random bytes of varying length) and `cls` (the sample's number)."""
    rng = random.Random(seed)
    shards, samples = {}, {}
    number = 0
    for shard in range(shard_count):
        here = {}
        for _ in range(samples_per_shard + shard % 3):
            data = rng.randbytes(rng.randint(1, 2 * value_bytes))
            here[f"s{shard:02d}/{number:06d}"] = {"bin": data, "cls": str(number).encode()}
            number += 1
        shards[f"shard-{shard:04d}.tar"] = tar_of(here)
        samples.update(here)
    return Corpus(shards, samples)


def check_samples(expected: Corpus, samples: Iterable[Mapping[str, Any]]) -> list[str]:
    """Assert that these are whole samples of the corpus, unharmed; their keys."""
    keys = []
    for sample in samples:
        key = sample["__key__"]
        assert {name: bytes(sample[name]) for name in ("bin", "cls")} == expected.samples[key]
        keys.append(key)
    return keys


def samples_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A batch of raw columns, taken apart."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
