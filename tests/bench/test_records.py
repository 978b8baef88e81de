"""What `bench.records` and `bench.gather` measure with: archives that are right, and what counts as a miss."""

from __future__ import annotations

import io
import tarfile

import numpy as np

from bench import gather, records
from bench.targets import Figure


def test_archives_of_records_are_what_tarfile_reads() -> None:
    shard = records.tar_of(9_999_997, np.random.default_rng(0).integers(0, 256, (5, 600), np.uint8), "bin")
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        members = archive.getmembers()
        contents = [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]
    assert [member.name for member in members] == [f"{number:08d}.bin" for number in range(9_999_997, 10_000_002)]
    assert {len(content) for content in contents} == {600}
    assert len(set(contents)) == 5
    for count in (records.samples_by_fastload, records.samples_by_tarfile, records.samples_by_webdataset):
        assert count(shard) == 5


def test_values_of_all_layouts_and_orders_are_gathered() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(*gather.SIZES, 64)
    for name, starts in gather.layouts(sizes).items():
        apart = np.diff(starts) - sizes[:-1]
        assert (apart >= 512).all() if name == "tar members" else (apart == 0).all()
        arena = rng.integers(0, 256, int(starts[-1] + sizes[-1]), np.uint8)
        batches = gather.cut(starts, sizes, 20)
        assert [len(batch.size) for batch in batches] == [20, 20, 20]
        assert gather.gather_work(arena, batches)() == 60
        assert gather.memoryview_work(arena, batches)() == 60


def test_what_is_a_miss() -> None:
    assert not Figure("", "", [1.0]).is_missed
    assert Figure("", "", [1.0, 3.0, 1.0], at_least=2).is_missed
    assert not Figure("", "", [1.0, 3.0, 3.0], at_least=2).is_missed
    assert Figure("", "", [2.1], at_most=2).is_missed
    assert Figure("", "", [], at_most=2).is_missed
