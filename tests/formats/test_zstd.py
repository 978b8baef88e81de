"""How large files of zstd are unpacked, as the heads of their frames and blocks say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.formats import zstd
from tests.formats.packing import by_arrow, zstd_stream

PACK = by_arrow("zstd")
SKIPPED = b"\x5f\x2a\x4d\x18\3\0\0\0abc"


def part(size: int, seed: int, is_noise: bool) -> bytes:
    """Noise is stored in raw blocks, zeros in repeated ones."""
    return np.random.default_rng(seed).bytes(size) if is_noise else bytes(size)


def said(data: bytes, step: int) -> int | None:
    return zstd.unpacked_bytes(len(data), lambda start: data[start : start + max(step, 18)])


PARTS = st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 9), st.booleans()), min_size=1, max_size=4)


@given(PARTS, st.integers(18, 200_000), st.booleans(), st.data())
def test_frames_are_as_large_as_they_say(
    parts: list[tuple[int, int, bool]], step: int, has_skipped: bool, draw: st.DataObject
) -> None:
    frames = [PACK(part(*each)) for each in parts]
    data = (SKIPPED if has_skipped else b"").join(frames)
    total = sum(size for size, *_ in parts)
    assert said(data, step) == total
    cut = draw.draw(st.integers(1, len(data) - 1))
    whole = [len(frame) for frame in frames]
    ends = {
        0,
        *(
            sum(whole[:number]) + len(SKIPPED) * has_skipped * (number - near)
            for number in range(1, len(whole) + 1)
            for near in (0, 1)
        ),
    }
    assert (said(data[:cut], step) is None) == (cut not in ends)
    assert said(data + b"more", step) is None


def test_what_does_not_say_it_is_unpacked() -> None:
    assert said(zstd_stream(b"some" * 1000), 100) is None
    assert said(PACK(b"some") + zstd_stream(b"some" * 1000), 100) is None
    assert said(b"no zstd at all", 100) is None


def test_very_many_heads_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = PACK(b"some") * 100
    assert said(data, 100) == 400
    monkeypatch.setattr(zstd, "HEADS_MAX", 150)
    assert said(data, 100) is None
    empty_blocks = data[:5] + bytes(3) * 1000
    assert said(empty_blocks, 100) is None
