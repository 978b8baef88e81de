"""How well each way to shuffle does, with limits, on data sorted by class; and the statistics themselves."""

from __future__ import annotations

import numpy as np
import pytest

from bench.quality import (
    DISTANCE_MOVED_PERFECT,
    SampleLine,
    class_imbalance,
    distance_moved,
    epoch_line,
    same_shard_neighbours,
    same_shard_neighbours_perfect,
    stored_positions,
)
from fastload.plan import DEFAULT_WINDOW_BYTES, Manifest, OrderOptions, epoch_orders
from fastload.store.types import ObjectInfo

# ImageNet's shape: 1000 classes in 1024 shards of 110 MB; a default window holds four.
SHARDS, CLASSES, BATCH = 1024, 1000, 256
COUNTS = np.full(SHARDS, 1000)
MANIFEST = Manifest(ObjectInfo(f"s3://bucket/{i:04}.tar", 110_000_000, "a") for i in range(SHARDS))
TOTAL = int(COUNTS.sum())


def line_of(shuffle: str, partitions: int = 1, window_bytes: int = DEFAULT_WINDOW_BYTES, epoch: int = 0) -> SampleLine:
    return epoch_line(epoch_orders(MANIFEST, OrderOptions(5, shuffle, window_bytes, partitions), epoch), COUNTS)


def classes_of(line: SampleLine) -> np.ndarray:
    return stored_positions(line, COUNTS) * CLASSES // TOTAL


def figures(line: SampleLine) -> tuple[float, float, float]:
    return distance_moved(line, COUNTS), same_shard_neighbours(line), class_imbalance(classes_of(line), BATCH)


def perfect_line() -> SampleLine:
    order = np.random.default_rng(5).permutation(TOTAL)
    return SampleLine((order // 1000).astype(np.int32), order % 1000)


def test_a_perfect_shuffle_has_the_figures_that_are_called_perfect():
    moved, neighbours, imbalance = figures(perfect_line())
    assert moved == pytest.approx(DISTANCE_MOVED_PERFECT, rel=0.005)
    assert neighbours == pytest.approx(same_shard_neighbours_perfect(COUNTS), rel=0.1)
    assert imbalance == pytest.approx(1, rel=0.01)


def test_without_shuffling_every_figure_is_at_its_worst():
    moved, neighbours, imbalance = figures(line_of("none"))
    assert moved == 0
    assert neighbours == pytest.approx(0.999, abs=1e-4)
    assert imbalance == pytest.approx(BATCH, rel=0.001)


@pytest.mark.parametrize("partitions", [1, 8])
def test_a_global_shuffle_is_as_good_as_a_perfect_one(partitions):
    line = line_of("global", partitions)
    assert len(set(zip(*map(np.ndarray.tolist, line), strict=True))) == TOTAL
    moved, neighbours, imbalance = figures(line)
    assert moved == pytest.approx(DISTANCE_MOVED_PERFECT, rel=0.005)
    assert neighbours <= same_shard_neighbours_perfect(COUNTS) * 1.1
    assert imbalance == pytest.approx(1, rel=0.01)


def test_one_epoch_of_a_global_shuffle_tells_nothing_of_the_next():
    first, second = (stored_positions(line_of("global", epoch=epoch), COUNTS) for epoch in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.005
    place_in_first = np.argsort(first)
    neighbours_stay = np.abs(np.diff(place_in_first[second])) == 1
    assert neighbours_stay.sum() <= 12  # 2 expected of a perfect shuffle


@pytest.mark.parametrize(
    ("shuffle", "partitions", "window_mib", "neighbours_max", "imbalance_max"),
    [
        ("shards", 1, 512, 0.9991, 256),
        ("window", 1, 512, 0.26, 50),
        ("window", 1, 2048, 0.07, 13),
        ("window", 8, 512, 0.001, 8),
        ("window", 64, 512, 0.001, 2),
        ("shards", 64, 512, 0.001, 5),
    ],
)
def test_what_windows_and_partitions_do(shuffle, partitions, window_mib, neighbours_max, imbalance_max):
    moved, neighbours, imbalance = figures(line_of(shuffle, partitions, window_mib << 20))
    assert moved == pytest.approx(DISTANCE_MOVED_PERFECT, rel=0.06)
    assert neighbours <= neighbours_max
    assert 1 < imbalance <= imbalance_max


def test_distance_is_counted_from_the_data_as_stored():
    counts = np.array([2, 0, 2])
    line = SampleLine(np.array([2, 2, 0, 0], np.int32), np.array([1, 0, 0, 1]))
    assert stored_positions(line, counts).tolist() == [3, 2, 0, 1]
    assert distance_moved(line, counts) == (3 + 1 + 2 + 2) / 4 / 4


def test_neighbours_of_shards_of_different_sizes():
    line = SampleLine(np.array([2, 2, 0, 0, 0], np.int32), np.arange(5))
    assert same_shard_neighbours(line) == 3 / 4
    assert same_shard_neighbours_perfect(np.array([3, 0, 2])) == pytest.approx(3 / 5 * 2 / 4 + 2 / 5 * 1 / 4)


def test_imbalance_is_pearsons_chi_square():
    classes, size = np.random.default_rng(0).integers(0, 5, 1003) * 2, 50  # odd classes have no samples
    of_class = np.array([(classes == c).sum() for c in range(0, 10, 2)])
    expected = of_class * (size / 1003)
    batches = classes[:1000].reshape(20, 50)
    chi = [
        (((batch == np.arange(0, 10, 2)[:, None]).sum(axis=1) - expected) ** 2 / expected).sum() for batch in batches
    ]
    assert class_imbalance(classes, size) == pytest.approx(np.mean(chi) / 4 / ((1003 - 50) / 1002))
