"""What the fork server of ranks imports: by one small epoch it has all that the first loader of a process loads, so
that ranks, which come and go a hundred times a minute, begin at once.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

import fastload
from bench.chaos import jobs


def _read_one_sample(folder: Path) -> None:
    with tarfile.open(folder / "one.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("one.bin")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    cache = fastload.Cache(folder / "cache", ram_bytes="1MiB", chunk_bytes="64KiB", service="inprocess")
    with cache, fastload.DataLoader(fastload.StreamingDataset(str(folder / "one.tar"), cache=cache)) as loader:
        for batch in loader:
            jobs.columns_of(batch)


with tempfile.TemporaryDirectory() as _folder:
    _read_one_sample(Path(_folder))
