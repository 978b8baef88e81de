"""What a loader is given, what it gives, and what several of them share: samples of archives, decoding, collating."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import msgspec

from fastload.errors import ConfigError

# Samples that wait to be drawn from, where a loader lets one choose: webdataset's own example has 1000.
SHUFFLE_BUFFER = 1000
PREFETCH = 4
SHARD_BYTES = 64 << 20  # of formats that data is converted to


class Job(msgspec.Struct, kw_only=True):
    """What to read, and what it may take.

    `source` is where the data lies that was converted for a loader: a folder, or a prefix in S3. `ram_bytes` is our
    arena's; others have the page cache beside their processes.
    """

    urls: list[str]  # of the tar shards
    columns: list[str]
    decode: dict[str, str] = {}  # column -> "image:224", "integer", ...
    batch_size: int
    workers: int
    folder: str  # for a cache
    ram_bytes: int = 2 << 30
    cache_bytes: int = 8 << 30
    source: str = ""
    shuffle: str = "window"  # of ours; the others shuffle as they do
    seed: int = 0


class Batch(NamedTuple):
    """Keys of samples, and their columns: lists of bytes, or what they were decoded to."""

    keys: Sequence[str]
    columns: dict[str, Any]


class Loader(Protocol):
    """A loader under measurement, made of a `Job`: `__init__` imports it, the first epoch builds it."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch; epochs are asked for in order."""
        ...

    def processes(self) -> list[int]:
        """Processes that work for it and are not below this one."""
        ...

    def close(self) -> None:
        """Stop all that it started."""
        ...


class BelowThisProcess:
    """What most loaders have in common: all they start is below this process, and ends with the torch loader."""

    _loader: Any = None

    def processes(self) -> list[int]:
        """None."""
        return []

    def close(self) -> None:
        """Workers end with their loader."""
        self._loader = None


@dataclass(frozen=True, slots=True)
class About:
    """A loader: what has to be installed, where its set-up is from, and what is said beside its figures.

    `reads` is "shards" (the tar shards in the store), "copies" of them on this machine, or what is made of those first:
    "mds", "litdata", "files".
    """

    distributions: tuple[str, ...]
    documentation: str
    reads: str = "shards"
    caches: bool = True  # else every epoch reads the store
    notes: tuple[str, ...] = ()


class Request(msgspec.Struct, kw_only=True):
    """Read these epochs, or write the samples of `shards` to `folder` in the loader's own format."""

    peer: str
    job: Job | None = None
    epochs: list[int] = []
    shards: list[str] = []
    columns: list[str] = []
    folder: str = ""


class Reading(msgspec.Struct, kw_only=True):
    """One epoch; `payload_bytes` is of columns that are not decoded, None where some came decoded all the same."""

    seconds: float
    first_batch_s: float
    payload_bytes: int | None
    cpu_s: float
    peak_memory_bytes: int
    keys: list[str]
    batch_sizes: list[int]


class Answer(msgspec.Struct, kw_only=True):
    """What came of it; `seconds` are those of converting."""

    epochs: list[Reading] = []
    seconds: float = 0.0


# Archives


def split_name(name: str) -> tuple[str, str]:
    """Key and column of a member, as webdataset has them: the key ends at the first dot of the file's own name."""
    folder, slash, file = name.rpartition("/")
    key, _, column = file.partition(".")
    return folder + slash + key, column


def samples_of_members(members: Iterable[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    """Samples as columns with "__key__"; a sample's members follow one another."""
    sample: dict[str, Any] = {}
    for name, content in members:
        key, column = split_name(name)
        if not column:
            continue
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        sample |= {"__key__": key, column: content}
    if sample:
        yield sample


def members_of(stream: IO[bytes] | io.RawIOBase) -> Iterator[tuple[str, bytes]]:
    """The files of an archive that is read from front to back."""
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member)
            if content is not None:
                yield member.name, content.read()


def samples_of(path: str) -> Iterator[dict[str, Any]]:
    """The samples of one shard on this machine."""
    with open(path, "rb") as file:
        yield from samples_of_members(members_of(file))


def stored_samples(path: str) -> Iterator[dict[str, Any]]:
    """The same with the key as "key", for formats whose columns are names of their own. LitData pickles it."""
    for sample in samples_of(path):
        yield {"key": sample.pop("__key__"), **sample}


def shuffled(samples: Iterable[Any], seed: int) -> Iterator[Any]:
    """Samples by way of a shuffle buffer."""
    rng, held = random.Random(seed), []
    for sample in samples:
        held.append(sample)
        if len(held) >= SHUFFLE_BUFFER:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    rng.shuffle(held)
    yield from held


# Values


def decoders(specs: dict[str, str]) -> dict[str, Callable[[bytes], Any]]:
    """By column what users of torch write by hand for the decoder that is declared with ours."""
    made: dict[str, Callable[[bytes], Any]] = {}
    for column, spec in specs.items():
        name, _, argument = spec.partition(":")
        made[column] = _Picture(int(argument or 224)) if name == "image" else _PLAIN[name]
    return made


class _Picture:
    """torchvision: decoded as RGB, resized with antialias, float32 in [0, 1], (3, size, size)."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, value: bytes) -> Any:
        import torch
        from torchvision.io import ImageReadMode, decode_image
        from torchvision.transforms.v2.functional import resize

        pixels = decode_image(torch.frombuffer(bytearray(value), dtype=torch.uint8), ImageReadMode.RGB)
        return resize(pixels, [self._size, self._size], antialias=True).to(torch.float32) / 255


def _array(value: bytes) -> Any:
    import numpy as np
    import torch

    return torch.from_numpy(np.load(io.BytesIO(value), allow_pickle=False))


_PLAIN: dict[str, Callable[[bytes], Any]] = {"integer": int, "text": bytes.decode, "json": json.loads, "array": _array}


class Collate:
    """Samples that are dictionaries become a `Batch`: decoded, and stacked where that makes tensors. For workers."""

    def __init__(self, job: Job, key: str = "__key__") -> None:
        self._columns, self._key = job.columns, key
        self._decoders = decoders(job.decode)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        columns = {name: self._column(name, samples) for name in self._columns}
        return Batch([sample[self._key] for sample in samples], columns)

    def _column(self, name: str, samples: Sequence[dict[str, Any]]) -> Any:
        values = [sample[name] for sample in samples]
        decoder = self._decoders.get(name)
        if decoder is None:
            return values
        from torch.utils.data import default_collate

        decoded = [decoder(bytes(value)) for value in values]
        return decoded if isinstance(decoded[0], dict | list) else default_collate(decoded)


def worker_options(job: Job) -> dict[str, Any]:
    """For a torch loader, whose workers then stay from epoch to epoch."""
    if not job.workers:
        return {"num_workers": 0}
    return {"num_workers": job.workers, "prefetch_factor": PREFETCH, "persistent_workers": True}


# Stores


def s3_endpoint() -> str | None:
    """Where S3 is, None for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def s3_region() -> str:
    """Of the environment, else S3's oldest."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def is_local(url: str) -> bool:
    """Whether it is a path on this machine."""
    return "://" not in url


def only_s3(job: Job, loader: str) -> None:
    """ConfigError for shards that lie elsewhere."""
    other = next((url for url in job.urls if not url.startswith("s3://")), None)
    if other is not None:
        raise ConfigError(f"{loader} reads s3:// only, and not {other}")


def subfolder(job: Job, name: str) -> str:
    """A folder of a loader's own in the job's, made."""
    path = Path(job.folder) / name
    path.mkdir(parents=True, exist_ok=True)
    return str(path)
