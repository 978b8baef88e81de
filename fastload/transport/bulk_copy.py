"""Copying arrays and tensors into memory that another process will read.

A batch that fits in no CPU cache is written with stores that bypass the caches (`fastload.kernels.copying`). A worker
that stacks tensors then needs 0.4 to 0.9 of the time. At 8 MiB this gained nothing, and a trainer that reads the whole
batch took twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastload.kernels.copying import PAST_CACHES_BYTES, stack
from fastload.transport.pickling import is_plain
from fastload.transport.slots import address_of

Bytes = npt.NDArray[np.uint8]

# Inspecting a tensor from Python takes as long as copying so much.
_PIECE_BYTES_MIN = 16 << 10

# What tensors that are copied as bytes must have in common, in this order: other layouts lack the later properties.
_LOOKS: tuple[Callable[[torch.Tensor], Any], ...] = (
    attrgetter("layout"),
    attrgetter("is_cpu"),
    attrgetter("dtype"),
    attrgetter("requires_grad"),
    torch.Tensor.is_neg,
    torch.Tensor.is_conj,
    torch.Tensor.size,
    torch.Tensor.is_contiguous,
)


def copy_into(out: Bytes, source: Bytes) -> None:
    """Copy `source`, which is contiguous and of the same length, to `out`."""
    if source.size < PAST_CACHES_BYTES:
        out[...] = source
    else:
        stack(np.array([address_of(source)], np.int64), source.size, out)


def stack_into(out: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.stack(tensors, out=out)`, for an `out` that is plain, contiguous, and of the right shape and type."""
    if out.nbytes < PAST_CACHES_BYTES or out.nbytes < _PIECE_BYTES_MIN * len(tensors) or not _are_alike(tensors):
        # Small tensors take a sixth less time where torch need not check whether to record operations for autograd.
        # So a tensor that requires grad becomes its values here; torch's loader cannot send it at all.
        with torch.inference_mode():
            return torch.stack(tensors, out=out)  # type: ignore[arg-type]  # any sequence will do
    addresses = np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))
    stack(addresses, tensors[0].nbytes, out.view(-1).view(torch.uint8).numpy())
    return out


def _are_alike(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are contiguous tensors in host memory with the same properties."""
    first = tensors[0]
    if set(map(type, tensors)) != {torch.Tensor} or not is_plain(first) or not first.is_contiguous():
        return False
    return all(set(map(look, tensors)) == {look(first)} for look in _LOOKS)
