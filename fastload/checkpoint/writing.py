"""What a rank saves, on its way from tensors to the store."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastload.checkpoint.attempts import Place
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.records import object_name
from fastload.checkpoint.segments import Piece, Segment, checksums
from fastload.checkpoint.tensors import bytes_of

# Segments in flight, of which each takes its size in memory until it is stored.
_IN_FLIGHT = 4

# A whole tensor, or of one of which the rank holds parts, each of them and where it lies.
Held = torch.Tensor | Sequence[tuple[torch.Tensor, Box]]


def store_segments(
    place: Place, attempt: str, rank: int, segments: Sequence[Segment], tensors: Mapping[str, Held]
) -> list[tuple[Segment, bytes]]:
    """Store a rank's segments; each with the checksums of its blocks. `tensors` are called as their pieces are, which
    lie within what is held of them.
    """

    def store(number: int) -> bytes:
        segment = segments[number]
        data = memoryview(bytearray(segment.size))
        data[: len(segment.header)] = segment.header
        for piece, offset in zip(segment.pieces, segment.offsets, strict=True):
            data[offset : offset + piece.length] = data_of(piece, tensors)
        place.store.put(place.folder + object_name(attempt, rank, number), data)
        return checksums([data])

    with ThreadPoolExecutor(_IN_FLIGHT, "fastload-checkpoint") as pool:
        sums: deque[Future[bytes]] = deque(pool.submit(store, number) for number in range(len(segments)))
        try:
            return [(segment, sums.popleft().result()) for segment in segments]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def data_of(piece: Piece, tensors: Mapping[str, Held]) -> memoryview:
    """The bytes of a piece, in this process's memory; a copy of them only where they do not lie there side by side."""
    return bytes_of(held_of(piece, tensors[piece.name]).cpu().resolve_conj().resolve_neg().contiguous())


def held_of(piece: Piece, held: Held) -> torch.Tensor:
    """The part of a tensor that is the piece."""
    parts = [(held, Box.whole(piece.shape))] if isinstance(held, torch.Tensor) else held
    tensor, box = next((tensor, box) for tensor, box in parts if piece.box in box)
    return tensor.detach()[piece.box.within(box)]
