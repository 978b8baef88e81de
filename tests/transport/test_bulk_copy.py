"""What another process will read is what torch and numpy would have written, whichever way it is written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastload.transport import bulk_copy

ROWS = 6
PIECE = 24 << 10


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each call of the kernel was given; here batches are large from 64 KiB on."""
    seen: list[int] = []
    plain = bulk_copy.stack

    def stack(addresses: np.ndarray, piece_bytes: int, out: np.ndarray) -> None:
        seen.append(addresses.size)
        plain(addresses, piece_bytes, out)

    monkeypatch.setattr(bulk_copy, "stack", stack)
    monkeypatch.setattr(bulk_copy, "PAST_CACHES_BYTES", 64 << 10)
    return seen


def rows(dtype: torch.dtype = torch.uint8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 100, (ROWS, PIECE // dtype.itemsize), generator=generator).to(dtype))


def test_large_batches_of_like_tensors_are_written_past_the_caches(stacked: list[int]) -> None:
    for dtype in (torch.uint8, torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        batch = rows(dtype)
        out = torch.empty((ROWS, *batch[0].shape), dtype=dtype)
        assert bulk_copy.stack_into(out, batch) is out
        assert torch.equal(out, torch.stack(batch))
    assert stacked == [ROWS] * 5


ODD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "strided": lambda row: torch.stack([row, row], 1)[:, 0],
    "wider": lambda row: row.to(torch.complex128),
    "negated lazily": lambda row: torch.complex(torch.zeros(()), row).conj().imag,
    "a parameter": lambda row: torch.nn.Parameter(row, requires_grad=False),
}


@pytest.mark.parametrize("kind", ODD)
def test_others_are_left_to_torch(stacked: list[int], kind: str) -> None:
    for place in (0, 3):
        batch = rows(torch.float32)
        batch[place] = ODD[kind](batch[place])
        out = torch.empty((ROWS, *batch[0].shape), dtype=torch.result_type(batch[0], batch[3]))
        assert torch.equal(bulk_copy.stack_into(out, batch), torch.stack(batch))
    assert not stacked


def test_small_batches_and_small_pieces_are_left_to_torch(stacked: list[int]) -> None:
    few = rows()[:2]
    assert torch.equal(bulk_copy.stack_into(torch.empty(2, PIECE, dtype=torch.uint8), few), torch.stack(few))
    narrow = list(torch.ones(100, 1 << 10))
    assert torch.equal(bulk_copy.stack_into(torch.empty(100, 1 << 10), narrow), torch.stack(narrow))
    assert not stacked


def test_what_is_stacked_is_an_ordinary_tensor(stacked: list[int]) -> None:
    few = [torch.ones(4), torch.ones(4, requires_grad=True)]
    out = bulk_copy.stack_into(torch.empty(2, 4), few)
    assert not out.requires_grad
    assert not out.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (out * weight).sum().backward()  # which remembers it
    assert weight.grad is not None
    assert weight.grad.tolist() == [2.0] * 4
    assert not stacked


def test_what_cannot_be_stacked_is_told_in_torchs_words(stacked: list[int]) -> None:
    batch = rows()
    batch[2] = batch[2][1:]
    with pytest.raises(RuntimeError, match="equal size"):
        bulk_copy.stack_into(torch.empty(ROWS, PIECE, dtype=torch.uint8), batch)
    batch[2] = torch.ones(PIECE, dtype=torch.uint8).to_sparse()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bulk_copy.stack_into(torch.empty(ROWS, PIECE, dtype=torch.uint8), batch)
    assert not stacked


def test_a_copy(stacked: list[int]) -> None:
    for size in (1000, (64 << 10) + 7):
        source = np.random.default_rng(size).integers(0, 256, size, np.uint8)
        out = np.zeros(size, np.uint8)
        bulk_copy.copy_into(out, source)
        assert np.array_equal(out, source)
    assert stacked == [1]
