"""More loaders, measured where they are installed (`pip install fastload[bench]`).

MosaicML streaming and LitData read formats of their own, so the same samples are written in them once, beside the tar
shards, in shards of the same size. Both are set up as their documentation says for shards in S3 with a local cache.

SPDL and s3torchconnector read the tar shards and keep no cache: each epoch comes from the store. SPDL's threads fetch
two shards at a time and shuffle only the shards; s3torchconnector's readers stream a shard in each of two workers,
whose samples pass a shuffle buffer as long as webdataset's.
"""

from __future__ import annotations

import os
import random
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import obstore
from torch.utils.data import IterableDataset

from bench.data import DataSet
from bench.settings import BATCH_SIZE, WORKERS, Batch, Settings

SHARD_BYTES = 64 << 20
COLUMNS = {"key": "str", "jpg": "bytes", "cls": "bytes"}


def samples_of(path: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar shard. At module level, since LitData pickles it."""
    with tarfile.open(path) as tar:
        sample: dict[str, Any] = {}
        for member in tar:
            key, _, column = member.name.partition(".")
            content = tar.extractfile(member)
            assert content is not None
            sample |= {"key": key, column: content.read()}
            if len(sample) == len(COLUMNS):
                yield sample
                sample = {}


def write_mds(data_set: DataSet, folder: Path) -> None:
    """The data set as MDS."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=COLUMNS, size_limit=SHARD_BYTES) as writer:
        for path in data_set.paths:
            for sample in samples_of(str(path)):
                writer.write(sample)


def write_litdata(data_set: DataSet, folder: Path) -> None:
    """The data set as LitData's chunks."""
    import litdata

    litdata.optimize(
        fn=samples_of,
        inputs=[str(path) for path in data_set.paths],
        output_dir=str(folder),
        chunk_bytes=SHARD_BYTES,
        num_workers=1,
    )


# By system: the prefix in the bucket, and what writes the format.
FORMATS: dict[str, tuple[str, Callable[[DataSet, Path], None]]] = {
    "streaming": ("mds", write_mds),
    "litdata": ("litdata", write_litdata),
}


def prepare(system: str, data_set: DataSet) -> tuple[str, Path] | None:
    """The prefix and the folder of what `system` reads, made first where it is not there; None where it reads tar."""
    if system not in FORMATS:
        return None
    prefix, write = FORMATS[system]
    final = Path(f"{data_set.folder}-{prefix}")
    if not final.exists():
        part = final.with_name(f"{final.name}.part-{os.getpid()}")
        try:
            write(data_set, part)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return prefix, final


class _Torch(ABC):
    """What both have in common: a torch loader with persistent workers, and batches that are lists of dicts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loader: Any = None

    def epoch(self, number: int) -> Iterator[Batch]:
        """Lists of dicts, turned into samples."""
        if self._loader is None:
            self._loader = self._build()
        for batch in self._loader:
            yield ((sample["key"], sample["jpg"], sample["cls"]) for sample in batch)

    @abstractmethod
    def _build(self) -> Any:
        """The loader."""

    def processes(self) -> list[int]:
        """None: all it starts is below this process."""
        return []

    def close(self) -> None:
        """The workers end with the loader."""
        self._loader = None


SHUFFLE_BUFFER = 1000


class Spdl:
    """SPDL: a pipeline of threads in this process."""

    def __init__(self, settings: Settings) -> None:
        import spdl.io
        import spdl.pipeline
        from obstore.store import S3Store

        self._io, self._pipeline, self._settings = spdl.io, spdl.pipeline, settings
        options = {"allow_http": True}
        self._store = S3Store(settings.bucket, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options=options)  # type: ignore[arg-type]

    def epoch(self, number: int) -> Iterator[Batch]:
        """Lists of samples, whole shards in another order each epoch."""
        names = list(self._settings.data_set.shards)
        random.Random(number).shuffle(names)
        builder = self._pipeline.PipelineBuilder().add_source(names)
        builder = builder.pipe(self._fetch, concurrency=WORKERS).pipe(self._samples, concurrency=WORKERS)
        pipeline = builder.aggregate(BATCH_SIZE).add_sink(4).build(num_threads=2 * WORKERS)
        with pipeline.auto_stop():
            yield from pipeline.get_iterator()

    def _fetch(self, name: str) -> bytes:
        return bytes(obstore.get(self._store, name).bytes())

    def _samples(self, shard: bytes) -> Iterator[tuple[str, memoryview, memoryview]]:
        yield from samples_of_members(self._io.iter_tarfile(shard))  # a pipeline asks whether it is a generator

    def processes(self) -> list[int]:
        """None: it has threads."""
        return []

    def close(self) -> None:
        """Its threads end with each epoch."""


def samples_of_members(members: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any, Any]]:
    """Key, picture and label of each sample, whose members follow one another."""
    sample: dict[str, Any] = {}
    for name, content in members:
        key, _, column = name.partition(".")
        sample[column] = content
        if len(sample) == len(COLUMNS) - 1:
            yield key, sample["jpg"], sample["cls"]
            sample = {}


class S3Connector:
    """s3torchconnector: shards that are read from front to back in torch's workers."""

    def __init__(self, settings: Settings) -> None:
        import s3torchconnector

        self._connector, self._settings = s3torchconnector, settings

    def epoch(self, number: int) -> Iterator[Batch]:
        """Lists of samples; the loader is made anew, since its shards are in another order."""
        from torch.utils.data import DataLoader

        urls = self._settings.urls
        random.Random(number).shuffle(urls)
        shards = self._connector.S3IterableDataset.from_objects(
            urls,
            region="us-east-1",
            endpoint=os.environ["AWS_ENDPOINT_URL"],
            s3client_config=self._connector.S3ClientConfig(force_path_style=True),
            enable_sharding=True,
        )
        yield from DataLoader(_TarSamples(shards), None, num_workers=WORKERS, prefetch_factor=4)

    def processes(self) -> list[int]:
        """None: the workers are below this process."""
        return []

    def close(self) -> None:
        """The workers end with each epoch."""


class _TarSamples(IterableDataset[list[Any]]):
    """Batches of the samples of tar shards that are read as streams."""

    def __init__(self, shards: Any) -> None:
        self._shards = shards

    def __iter__(self) -> Iterator[list[Any]]:
        samples = _shuffled(sample for shard in self._shards for sample in samples_of_members(_members(shard)))
        while batch := list(islice(samples, BATCH_SIZE)):
            yield batch


def _members(shard: Any) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=shard, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            yield member.name, content.read()


def _shuffled(samples: Iterable[Any]) -> Iterator[Any]:
    rng, held = random.Random(0), []
    for sample in samples:
        held.append(sample)
        if len(held) >= SHUFFLE_BUFFER:
            at = rng.randrange(len(held))
            held[at], held[-1] = held[-1], held[at]
            yield held.pop()
    rng.shuffle(held)
    yield from held


class Streaming(_Torch):
    """MosaicML streaming: MDS shards, shuffled by its default."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        import streaming

        os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
        self._streaming = streaming

    def _build(self) -> Any:
        from torch.utils.data import DataLoader

        dataset = self._streaming.StreamingDataset(
            remote=f"s3://{self._settings.bucket}/mds",
            local=os.path.join(self._settings.folder, "mds"),
            shuffle=True,
            batch_size=BATCH_SIZE,
        )
        return DataLoader(
            dataset, BATCH_SIZE, num_workers=WORKERS, collate_fn=list, prefetch_factor=4, persistent_workers=True
        )


class LitData(_Torch):
    """LitData: its own chunks, its own loader."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        import litdata
        from litdata.streaming import downloader

        # Without this its obstore client refuses any endpoint that is plain http.
        options = getattr(downloader, "_OBSTORE_CLIENT_OPTIONS", None)
        if options is not None:
            options["allow_http"] = True
        self._litdata = litdata

    def _build(self) -> Any:

        dataset = self._litdata.StreamingDataset(
            f"s3://{self._settings.bucket}/litdata",
            cache_dir=os.path.join(self._settings.folder, "litdata"),
            shuffle=True,
            drop_last=False,
            storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        )
        return self._litdata.StreamingDataLoader(
            dataset,
            batch_size=BATCH_SIZE,
            num_workers=WORKERS,
            collate_fn=list,
            prefetch_factor=4,
            persistent_workers=True,
        )
