"""Groups of samples as the pipeline passes them, and what every decoder owes its caller."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastload.decode import Decoder


def group(items: Sequence[bytes], before: bytes = b"") -> tuple[np.ndarray, np.ndarray]:
    """`values` (read-only, as from a shared arena) and `offsets`, with `before` in front of the first
    sample.
    """
    values = np.frombuffer(before + b"".join(items), np.uint8)
    offsets = np.cumsum([len(before), *map(len, items)]).astype(np.int64)
    return values, offsets


def where(number: int) -> str:
    return f"s3://b/t.tar: sample {number}: column x"


def decode(decoder: Decoder, items: Sequence[bytes], before: bytes = b"") -> Any:
    return decoder.decode(*group(items, before), where)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    """`array` as an npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=version)
    return file.getvalue()
