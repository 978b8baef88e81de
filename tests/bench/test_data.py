"""The data set and the proof that a consumer saw all of it."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import data
from bench.data import Tally


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SAMPLES_PER_SHARD", 6)


def _samples(path: Path) -> Iterator[tuple[str, bytes, bytes]]:
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for key in sorted({name.partition(".")[0] for name in members}):
        yield key, members[f"{key}.jpg"], members[f"{key}.cls"]


@pytest.mark.usefixtures("small")
def test_it_is_made_once_and_always_the_same(tmp_path: Path) -> None:
    first = data.prepare(tmp_path / "a", shard_count=2, report=lambda text: None)
    again = data.prepare(tmp_path / "a", shard_count=2, report=pytest.fail)
    other = data.prepare(tmp_path / "b", shard_count=2, report=lambda text: None)
    assert first == again
    assert first.samples == 12
    assert [path.read_bytes() for path in first.paths] == [path.read_bytes() for path in other.paths]
    assert first.bytes == sum(path.stat().st_size for path in first.paths)


@pytest.mark.usefixtures("small")
def test_a_tally_knows_each_sample_exactly_once(tmp_path: Path) -> None:
    data_set = data.prepare(tmp_path, shard_count=2, report=lambda text: None)
    samples = [sample for path in data_set.paths for sample in _samples(path)]
    data_set.check(_tally(samples[::-1]))
    key, jpg, cls = samples[0]
    swapped = [(key, jpg, samples[1][2] + b"x"), *samples[1:]]
    damaged = [(key, jpg[:-1] + bytes([jpg[-1] ^ 1]), cls), *samples[1:]]
    for wrong in (samples[1:], [samples[1], *samples[1:]], swapped, damaged):
        with pytest.raises(AssertionError):
            data_set.check(_tally(wrong))


def _tally(samples: list[tuple[str, bytes, bytes]]) -> Tally:
    tally = Tally()
    for key, jpg, cls in samples:
        tally.add(key, jpg, cls)
    return tally
