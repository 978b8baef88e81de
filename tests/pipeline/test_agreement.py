"""Ranks that meet before they begin, over a real store of torch.distributed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as distributed

from fastload.errors import ConfigError, FastloadError, ServiceError, WaitTimeoutError
from fastload.pipeline import agreement
from fastload.plan import Ranks
from tests.patience import PATIENCE_S


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    shared = distributed.HashStore()
    monkeypatch.setattr(agreement, "store", lambda name: distributed.PrefixStore(name, shared))
    return shared


def all_meet(places: list[str], world_size: int, deadline_s: float = PATIENCE_S, meeting: str = "0/1") -> list[Any]:
    """What came of it for each rank that comes."""
    found: list[Any] = [None] * len(places)

    def come(rank: int) -> None:
        try:
            agreement.meet(Ranks(rank, world_size, rank, world_size), meeting, places[rank], deadline_s)
        except FastloadError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_begin_at_the_same_place_go_on(store: Any) -> None:
    for meeting in ("0/1", "0/2", "1/1"):
        assert all_meet(["epoch 3"] * 4, 4, meeting=meeting) == [None] * 4


def test_ranks_that_begin_elsewhere_are_an_error_on_all(store: Any) -> None:
    for rank, error in enumerate(all_meet(["epoch 3", "epoch 3", "epoch 4"], 3)):
        assert isinstance(error, ConfigError)
        assert f"on rank {rank}" in str(error)
        assert "'epoch 3'" in str(error)
        assert "'epoch 4'" in str(error)


def test_a_rank_that_does_not_come_is_named(store: Any) -> None:
    for error in all_meet(["epoch 3"] * 2, 12, deadline_s=0.2):
        assert isinstance(error, WaitTimeoutError)
        assert "for ranks 2, 3, 4, 5, 6, 7, 8, 9 and 2 more, which do not begin" in str(error)


def test_a_store_that_ends_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            raise distributed.DistNetworkError("connection reset by peer")

    monkeypatch.setattr(agreement, "store", lambda name: Gone())
    with pytest.raises(ServiceError, match=r"store .* ended while rank 1 waited .*\(epoch 3\)"):
        agreement.meet(Ranks(1, 2, 1, 2), "0/1", "epoch 3")
