"""States that earlier versions saved are loaded, and go on at the exact sample."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

import fastload
from tests.jobs.reading import SMALL
from tests.jobs.states import FOLDER, URL, Recording, shards_in_place

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def test_there_are_states_of_one_partition_and_of_several() -> None:
    assert {"one-partition", "several-partitions", "between-epochs"} <= set(NAMES)


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_an_earlier_version_goes_on(tmp_path: Path, name: str, is_given: bool) -> None:
    """At one rank with batches as large as all ranks had together; the size of windows and the number of partitions
    given as they were then, or left to the state.
    """
    recorded = Recording.load(name)
    position = recorded.state["position"]
    dataset = recorded.dataset if is_given else {**recorded.dataset, "shuffle_window": "auto", "partitions": None}
    with (
        shards_in_place(tmp_path, recorded.corpus),
        fastload.Cache(tmp_path / "cache", **SMALL, service="inprocess") as cache,
    ):
        loader = fastload.DataLoader(
            fastload.StreamingDataset(URL, cache=cache, **dataset), batch_size=recorded.global_batch
        )
        loader.load_state_dict(recorded.state)
        assert loader.state_dict() == recorded.state
        if position is not None:
            assert [batch["__key__"] for batch in loader] == [batch.split() for batch in recorded.rest]
        assert [batch["__key__"] for batch in islice(loader, 1)] == [recorded.next_epoch.split()]
        loader.close()
