"""Whether the verdict names the one cause by which a run is bound: on real runs, once each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.causes import CASES, Case, Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder: Path = tmp_path_factory.mktemp("causes")
    with Place(folder) as there:
        yield there


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_verdict_names_the_cause(place: Place, case: Case) -> None:
    said = place.run(case)
    assert case.says in " ".join(said), said
