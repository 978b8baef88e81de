"""Pickling in which tensors and arrays are taken apart into their memory, which may cross beside the pickle.

A tensor is pickled as its memory, whichever way it is laid out, and as what is needed to see it as it was. What torch
can do that this cannot (sparse, quantised and nested tensors, subclasses) is left to torch, down to the plain tensors
inside. Whatever is made again is writable, where the buffers that it is made from are.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]

# By name, since pickle looks through all modules for what a type of torch's may be a part of.
_DTYPES = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
_NAMES = {kind: name for name, kind in _DTYPES.items()}


class _ForkingTable:
    """How `ForkingPickler` pickles what Python cannot, torch's tensors among that, as a `dispatch_table`. It copies its
    own for each pickle, which brings a hundred objects into the caches that a pickle has no use for. Users add to what
    there is and replace it at any time.
    """

    def __getitem__(self, kind: type) -> Callable[[Any], Any]:
        others: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        return others[kind] if kind in others else copyreg.dispatch_table[kind]


FORKING_TABLE: Any = _ForkingTable()


def forking_dumps(value: Any) -> bytes:
    """What `ForkingPickler.dumps` gives."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, pickle.DEFAULT_PROTOCOL)
    pickler.dispatch_table = FORKING_TABLE
    pickler.dump(value)
    return stream.getvalue()


def reduced(value: Any) -> Any:
    """For `reducer_override` of a pickler of protocol 5: tensors and arrays as their memory, the rest as ever."""
    if type(value) is torch.Tensor and is_plain(value):
        return tensor_parts(value)
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        return value.copy().__reduce_ex__(5)  # a buffer that may not be written to would arrive as one
    return NotImplemented


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is no more than memory of this machine, seen in some order."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.requires_grad
    )


def tensor_parts(tensor: torch.Tensor) -> tuple[Any, ...]:
    """For pickle: how to make this plain tensor again from its memory. Dense ones keep their strides."""
    dense = tensor if _is_dense(tensor) else tensor.contiguous()
    flat = dense.as_strided((dense.numel(),), (1,)) if dense.numel() else dense.new_empty(0)
    memory = flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)
    return tensor_over(memory.numpy(), dense)


def tensor_over(memory: Bytes, tensor: torch.Tensor) -> tuple[Any, ...]:
    """The same, of a dense tensor whose memory this is."""
    name = _NAMES.get(tensor.dtype, tensor.dtype)
    return _tensor_of, (pickle.PickleBuffer(memory.data), name, tuple(tensor.shape), tensor.stride())


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie next to each other, in whatever order (channels_last, a transposed matrix)."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _tensor_of(memory: Any, dtype: str | torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    kind = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    if not memoryview(memory).nbytes:
        return torch.empty_strided(shape, stride, dtype=kind, device="cpu")
    return torch.frombuffer(memory, dtype=kind).as_strided(shape, stride)
