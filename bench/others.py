"""Two more loaders, measured where they are installed (`pip install fastload[bench]`): MosaicML streaming and LitData.

Both read formats of their own, so the same samples are written in them once, beside the tar shards, in shards of the
same size. Both are set up as their documentation says for shards in S3 with a local cache.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
