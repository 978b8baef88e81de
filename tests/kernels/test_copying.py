"""Pieces put end to end past the caches, against plain Python, wherever they begin and end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels.copying import stack

AROUND = 80  # bytes before and after, which stay as they are


@settings(max_examples=80, deadline=None)
@given(
    pieces=st.integers(0, 5),
    piece_bytes=st.integers(0, 300),
    source_at=st.integers(0, 70),
    out_at=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_pieces_of_any_length_anywhere(pieces: int, piece_bytes: int, source_at: int, out_at: int, seed: int) -> None:
    data = np.random.default_rng(seed).integers(1, 256, (pieces, source_at + piece_bytes), np.uint8)
    sources = [each[source_at:] for each in data]
    memory = np.zeros(AROUND + out_at + pieces * piece_bytes + AROUND, np.uint8)
    out = memory[AROUND + out_at : memory.size - AROUND]
    stack(np.array([each.ctypes.data for each in sources], np.int64), piece_bytes, out)
    assert out.tobytes() == b"".join(each.tobytes() for each in sources)
    assert not memory[: AROUND + out_at].any()
    assert not memory[memory.size - AROUND :].any()


def test_pieces_have_to_fill_what_they_are_put_into() -> None:
    piece = np.ones(100, np.uint8)
    addresses = np.array([piece.ctypes.data] * 3, np.int64)
    for wrong in (299, 301):
        with pytest.raises(IndexError, match=f"3 pieces of 100 bytes do not fill {wrong}"):
            stack(addresses, 100, np.zeros(wrong, np.uint8))
    with pytest.raises(IndexError):
        stack(addresses, -100, np.zeros(0, np.uint8))
