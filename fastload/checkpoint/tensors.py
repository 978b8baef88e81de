"""Which of torch's dtypes are which of the format's, and the bytes of tensors."""

from __future__ import annotations

import numpy as np
import torch

from fastload.checkpoint.errors import CheckpointError
from fastload.checkpoint.gathering import Bytes

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def array_of(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor, in its shape and behind that those of an element."""
    return np.asarray(bytes_of(tensor)).reshape(*tensor.shape, tensor.element_size())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    # Of one element any stride is contiguous, and only one of 1 can be viewed.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def dtype_of(dtype: str, where: str, name: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: {name} is {dtype}, which torch {torch.__version__} does not have")
    return DTYPES[dtype]
