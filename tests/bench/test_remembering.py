"""What `bench.history --costs` measures with; what costs time is not measured here."""

from __future__ import annotations

from bench import remembering
from bench.remembering import library, library_figures, vain_share


def test_a_library_is_of_the_reads_that_were_told() -> None:
    kept = library([[(3, 0), (3, 1), (1, 0)], [(2, 1)]], chunks=2)
    found = [kept.chunk(place) for place in range(len(kept))]
    assert [(info.url, index) for info, index in found] == [
        (remembering.info(number).url, index) for number, index in ((3, 0), (3, 1), (1, 0), (2, 1))
    ]


def test_of_few_objects_a_little_is_predicted_in_vain() -> None:
    shares = [vain_share(30, 4, seed) for seed in range(4)]
    assert shares == [vain_share(30, 4, seed) for seed in range(4)]
    assert 0 < max(shares) < 0.2


def test_reads_and_objects_are_told_apart() -> None:
    figures = library_figures(reads=4000, objects=1000)
    found = {f"{figure.what}, {figure.unit}": figure.values[0] for figure in figures}
    assert 20 < found["file of a run, bytes an object"] < 80  # an ETag alone is 16 bytes
    assert 1 < found["file of a run, bytes a read"] < 14  # the columns, before they are packed
    assert 30 < found["memory, bytes a read in reach"] < 80
