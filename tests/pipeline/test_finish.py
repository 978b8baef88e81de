"""Collating what the user's functions made, and the generators that they draw from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from fastload.pipeline.columns import ColumnSet
from fastload.pipeline.finish import BatchBuilder, Finish, Gathered, GatheredBatch, SourceBuilder, reseed_all
from fastload.pipeline.names import KeyTable, Names, UrlTable
from fastload.transport.slots import SlotPool
from tests.golden.states import random_numbers_kept

COUNT = 8


def batch_of(function: Callable[[int], Any], slots: SlotPool) -> Any:
    """What becomes of a batch whose sample n is mapped to `function(n)`."""
    names = Names([(None, keys(), np.arange(COUNT))], np.zeros(COUNT, np.int32), UrlTable(lambda _: ["s3://b/0.tar"]))
    gathered = Gathered(COUNT, names, {}, None)
    mapped = SourceBuilder(ColumnSet((), {}, False, ()), (lambda sample: function(int(sample["__key__"])),))
    return Finish(BatchBuilder((mapped,)))(GatheredBatch([gathered], [0]), slots)


def keys() -> KeyTable:
    return KeyTable(np.frombuffer(b"01234567", np.uint8), np.arange(COUNT + 1), 1)


SAMPLES: dict[str, Callable[[int], Any]] = {
    "large": lambda number: torch.full((3, 100, 100), float(number)),
    "very large": lambda number: torch.full((3, 1000, 300), float(number)),
    "small": lambda number: torch.arange(number, number + 3),
    "empty": lambda number: torch.empty(0, 5),
    "half": lambda number: torch.full((20_000,), number, dtype=torch.bfloat16),
    "not contiguous": lambda number: torch.arange(20_000.0).view(100, 200).T + number,
    "numpy": lambda number: np.full((100, 100), number),
    "of two types": lambda number: torch.full((20_000,), number, dtype=torch.float64 if number % 2 else torch.int64),
    "nested": lambda number: {"a": [torch.full((10_000,), number), 3], "b": (number, 1.5)},
}


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_are_collated_as_torch_does(kind: str) -> None:
    slots = SlotPool(1 << 26)
    made, expected = batch_of(SAMPLES[kind], slots), default_collate([SAMPLES[kind](number) for number in range(COUNT)])
    torch.testing.assert_close(made, expected, rtol=0, atol=0)
    lies_in_slot = kind not in ("small", "empty", "of two types")
    assert (slots.held_bytes > 0) == lies_in_slot


def test_what_torch_has_to_collate_itself_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, weight = SlotPool(1 << 26), torch.ones(20_000, requires_grad=True)
    made = batch_of(lambda number: weight * number, slots)
    assert made.requires_grad  # as torch's own loader has it in threads
    monkeypatch.setitem(default_collate_fn_map, torch.Tensor, lambda batch, *, collate_fn_map: "the user's")
    assert batch_of(lambda number: torch.zeros(20_000), slots) == "the user's"
    assert slots.held_bytes == 0


@pytest.mark.parametrize("key", [0, 7, (1 << 64) - 1])
def test_generators_are_seeded_as_by_their_own_functions(key: int) -> None:
    with random_numbers_kept():
        reseed_all(key)
        drawn = random.random(), np.random.random(), torch.rand(3)
        random.seed(key)
        np.random.seed(key % (1 << 32))
        torch.manual_seed(key % (1 << 63))
        assert drawn[:2] == (random.random(), np.random.random())
        assert torch.equal(drawn[2], torch.rand(3))
