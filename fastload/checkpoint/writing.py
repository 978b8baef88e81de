"""What a rank saves, on its way from tensors to the store.

It is copied once, into an image (`images`), which holds the segments as they will be stored; what `async_save` has
staged lies in one already. The node's cache service
takes it from there (`start`), and the trainer goes on. What is too large for that, or so small that it is not worth it
for a call that waits for the store anyway, goes straight to the store (`store_segments`); and so does all where no
service can be had.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from fastload import callers
from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place, opened
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.commit import Step
from fastload.checkpoint.images import Image, Images
from fastload.checkpoint.records import Part, Record, Reference, object_name
from fastload.checkpoint.saving import WAIT_S, Here, Saving, Stored, checked_level
from fastload.checkpoint.segments import (
    BLOCK_BYTES,
    PAGE_BYTES,
    SEGMENT_BYTES,
    Arrangement,
    Piece,
    Segment,
    arrange,
    checksums,
    cut_to,
    lay_out,
)
from fastload.checkpoint.staging import home_of, shared_memory
from fastload.checkpoint.values import DTYPES, bytes_of
from fastload.client.cache import AnyCache, Handle, handle_of
from fastload.client.saver import Saver
from fastload.config import format_bytes
from fastload.errors import CacheError, CheckpointError, ServiceError, WaitTimeoutError
from fastload.plan.ranks import resolve_ranks
from fastload.protocol import Begin, Level, Save, SaveState
from fastload.store import normalise

# Segments in flight, of which each takes its size in memory until it is stored.
_IN_FLIGHT = 4
# What takes no longer to store than to hand over.
SMALL_BYTES = 8 << 20
# How often is looked whether other ranks have finished.
_LOOK_S = 0.5

# A whole tensor, or of one of which the rank holds parts, each of them and where it lies.
Held = torch.Tensor | Sequence[tuple[torch.Tensor, Box]]


def start(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None,
    attempt: str,
    rank: int,
    pieces: Sequence[Piece],
    tensors: Mapping[str, Held],
    values: Sequence[tuple[str, str, bytes]] = (),
    references: Sequence[Reference] = (),
    hashes: Mapping[Piece, bytes] | None = None,
    *,
    cache: AnyCache = None,
    until: Level = "store",
    commits: bool,
    begun: Callable[[], Begin | None] = lambda: None,
    timeout_s: float = WAIT_S,
    is_staged: bool = False,
) -> Saving:
    """Save a rank's part of an attempt by the node's cache service. The tensors may change once this returns; the
    `Saving` is to be waited for, until the level `until`.

    `commits`: once this part is there, and those of the attempt's other ranks, it is committed. `begun` is called when
    all is copied: it waits until the attempt has begun, or gives what is still to be done for that. Where memory has to
    be waited for, that ends with an error once no byte has moved for `timeout_s`.
    """
    checked_level(until, "until")
    path = os.fspath(url)
    pieces = list(cut_to(pieces, SEGMENT_BYTES))
    shared = _shared(pieces, tensors)
    pieces = [piece for piece in pieces if piece not in shared] if shared else pieces
    others = partial(Part.of, values=values, references=references, hashes=hashes, shared=shared)
    segments = tuple(lay_out(pieces, SEGMENT_BYTES))
    save = _Save(path, storage_options, attempt, begun, rank, segments, tensors, others, commits, timeout_s)
    if until == "store" and save.total_bytes < SMALL_BYTES:
        return save.straight()
    handle = handle_of(cache)
    home = home_of(held_of(piece, tensors[piece.name]) for piece in pieces)
    if home is not None and home[0].is_moved:
        raise CheckpointError(
            f"{save.url}: this state was staged for another save, which has its memory; stage it anew"
        )
    # What another process has sent is only its own again once it is stored, for which other levels do not wait.
    if home is not None and home[0].saving is None and (until == "store" or not home[0].is_received):
        return save.in_place(home[0], arrange(list(zip(pieces, home[1], strict=True)), SEGMENT_BYTES), handle)
    draft, starts = save.draft(segments), _starts(segments)
    images = images_of(handle)
    need_bytes, room = starts[-1] + len(draft), room_bytes(handle)
    # The copy of a state that was staged does not wait for other states that were, which may wait for this one.
    taken = images.take(need_bytes, room, timeout_s, waits_for_states=not is_staged)
    if taken is None and need_bytes <= room:
        return save.straight()
    if taken is None:
        callers.warn(
            f"{save.url}: a checkpoint of {format_bytes(save.total_bytes)} is more than checkpoint_ram_bytes leaves to "
            f"a process ({format_bytes(room)}), so that the call waits until it is stored; raise it",
            RuntimeWarning,
        )
        return save.straight()
    try:
        saving = save.by_image(taken, starts, draft, handle, lambda: _fill(taken.view, segments, starts, tensors))
    except BaseException:
        images.release(taken)
        raise
    images.handed_over(taken, saving)
    return saving


def images_of(handle: Handle) -> Images:
    return handle.shared("checkpoint images", Images)


def room_bytes(handle: Handle) -> int:
    """What images of a process may take."""
    return handle.limits.checkpoint_ram() // resolve_ranks().local_world_size


@dataclass(frozen=True, slots=True)
class _Save:
    """What `start` was called with."""

    url: str
    storage_options: Mapping[str, Any] | None
    attempt: str
    begun: Callable[[], Begin | None]
    rank: int
    segments: tuple[Segment, ...]
    tensors: Mapping[str, Held]
    part_of: Callable[[str, int, Sequence[tuple[Segment, bytes]]], Part]
    commits: bool
    timeout_s: float

    @property
    def total_bytes(self) -> int:
        return sum(segment.size for segment in self.segments)

    def straight(self) -> Saving:
        """Without an image and a service."""
        began, begin = time.monotonic(), self.begun()
        with opened(self.url, self.storage_options) as place:
            self._begin(place, begin)
            stored = store_segments(place, self.attempt, self.rank, self.segments, self.tensors)
            self._finish(place, self.part_of(self.attempt, self.rank, stored))
        state = self._state("store", self.total_bytes)
        return Saving(place.folder, self.rank, self.total_bytes, time.monotonic() - began, Stored(state))

    def in_place(self, image: Image, arrangement: Arrangement | None, handle: Handle) -> Saving:
        """From an image in which all lies; straight from there, where it cannot be arranged in it."""
        if arrangement is None:
            return self.straight()
        segments, starts = arrangement.segments, arrangement.starts
        draft = self.draft(segments)
        if starts[-1] + len(draft) > image.byte_count - PAGE_BYTES:  # the last byte is a mark
            return self.straight()

        def fill() -> None:
            image.protect(writable=True)
            image.is_moved = bool(arrangement.moves)
            image.move(arrangement.moves)
            for segment, start in zip(segments, starts, strict=False):
                image.view[start : start + len(segment.header)] = segment.header
            image.is_handed_over_elsewhere = image.is_received

        saving = replace(self, segments=tuple(segments)).by_image(image, starts, draft, handle, fill)
        images_of(handle).handed_over(image, saving)
        return saving

    def draft(self, segments: Sequence[Segment]) -> bytes:
        """The part record, in which checksums are missing."""
        return self.part_of(self.attempt, self.rank, [(each, _no_sums(each)) for each in segments]).encode()

    def by_image(
        self, image: Image, starts: Sequence[int], draft: bytes, handle: Handle, fill: Callable[[], None]
    ) -> Saving:
        """Have `fill` lay all out in an image, and the service carry it, or where none can be had a thread of this
        process.
        """
        began = time.monotonic()
        with ThreadPoolExecutor(1, "fastload-checkpoint-connect") as pool:
            connecting = pool.submit(self._connected, handle)
            try:
                fill()
                image.view[starts[-1] : starts[-1] + len(draft)] = draft
                image.protect(writable=False)
                begin = self.begun()
            except BaseException:
                if (saver := connecting.result()) is not None:
                    saver.close()
                raise
            stall_s = time.monotonic() - began
            saver = connecting.result()
        place = normalise(self.url).rstrip("/") + "/"
        message = Save(
            place,
            self.attempt,
            self.rank,
            image.byte_count,
            [(start, each.size) for start, each in zip(starts, self.segments, strict=False)],
            (starts[-1], len(draft)),
            self.commits,
            begin,
        )
        waiting = self._state("", 0)
        # What goes on does not keep the tensors, which are laid out: they may be the copy of a whole state.
        of_image = replace(self, tensors={})
        here = partial(Here, waiting, partial(of_image._store_image, image, message))
        carrier = here() if saver is None else saver
        saving = Saving(place, self.rank, self.total_bytes, stall_s, carrier)
        if saver is not None:
            saver.ended = lambda: saving.go_on(here())
            saver.hand_over(message, image.fd)
        return saving

    def _connected(self, handle: Handle) -> Saver | None:
        try:
            return handle.saver(self.storage_options, f"checkpoint {self.url}")
        except (CacheError, ServiceError) as error:
            _warn_once(
                f"the cache {handle.directory} cannot carry checkpoints ({error}); they are stored by this process, "
                "which waits for that"
            )
            return None

    def _store_image(self, image: Image, message: Save, stored: Callable[[int], None]) -> None:
        """Store what has been laid out, in this process."""
        parts = [image.view[start : start + size] for start, size in message.segments]
        start, size = message.record
        draft = Record.decode(bytes(image.view[start : start + size]), self.attempt, self.rank, self.url)
        byte_count = 0
        with opened(self.url, self.storage_options) as place, ThreadPoolExecutor(_IN_FLIGHT) as pool:

            def store(number: int) -> bytes:
                place.store.put(place.folder + object_name(self.attempt, self.rank, number), parts[number])
                return checksums([parts[number]])

            self._begin(place, message.begin)
            sums = []
            for each, part in zip(pool.map(store, range(len(parts))), parts, strict=True):
                sums.append(each)
                byte_count += len(part)
                stored(byte_count)
            self._finish(place, draft.with_sums(sums))

    def _begin(self, place: Place, how: Begin | None) -> None:
        if how is not None:
            attempts.begin_once(place, self.attempt, overwrite=how.overwrite, now_s=how.began_s, metric=how.metric)

    def _finish(self, place: Place, part: Part | Record) -> None:
        attempts.finish_rank(place, part)
        deadline = time.monotonic() + self.timeout_s
        while self.commits and attempts.commit_with(place, part.attempt, part.rank) is not Step.COMMITTED:
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{place.folder}: rank {self.rank} is stored, and not all others within {self.timeout_s:g} s; look "
                    "what became of them, and save again"
                )
            time.sleep(_LOOK_S)

    def _state(self, level: Level | Literal[""], store_bytes: int) -> SaveState:
        return SaveState(self.attempt, self.rank, level, 0, store_bytes)


def store_segments(
    place: Place, attempt: str, rank: int, segments: Sequence[Segment], tensors: Mapping[str, Held]
) -> list[tuple[Segment, bytes]]:
    """Store a rank's segments; each with the checksums of its blocks. `tensors` are called as their pieces are, which
    lie within what is held of them.
    """

    def store(number: int) -> bytes:
        segment = segments[number]
        data = memoryview(bytearray(segment.size))
        _fill(data, [segment], [0], tensors)
        place.store.put(place.folder + object_name(attempt, rank, number), data)
        return checksums([data])

    with ThreadPoolExecutor(_IN_FLIGHT, "fastload-checkpoint") as pool:
        sums: deque[Future[bytes]] = deque(pool.submit(store, number) for number in range(len(segments)))
        try:
            return [(segment, sums.popleft().result()) for segment in segments]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fill(view: memoryview, segments: Sequence[Segment], starts: Sequence[int], tensors: Mapping[str, Held]) -> None:
    """Lay segments out, each from its start on: the one copy that a save takes. torch splits it among its threads."""
    for segment, start in zip(segments, starts, strict=False):
        view[start : start + len(segment.header)] = segment.header
        for piece, offset in zip(segment.pieces, segment.offsets, strict=True):
            if piece.length:
                out = torch.frombuffer(view, dtype=DTYPES[piece.dtype], count=piece.box.elements, offset=start + offset)
                out.view(piece.box.sizes).copy_(held_of(piece, tensors[piece.name]))


def data_of(piece: Piece, tensors: Mapping[str, Held]) -> memoryview:
    """The bytes of a piece, in this process's memory; a copy of them only where they do not lie there side by side."""
    return bytes_of(held_of(piece, tensors[piece.name]).cpu().resolve_conj().resolve_neg().contiguous())


def held_of(piece: Piece, held: Held) -> torch.Tensor:
    """The part of a tensor that is the piece."""
    parts = [(held, Box.whole(piece.shape))] if isinstance(held, torch.Tensor) else held
    tensor, box = next((tensor, box) for tensor, box in parts if piece.box in box)
    return tensor.detach()[piece.box.within(box)]


def _shared(pieces: Sequence[Piece], tensors: Mapping[str, Held]) -> dict[Piece, tuple[Piece, int]]:
    """Those whose bytes are those of another one in memory, or a part of them: which one, and where in it."""

    def of(number: int) -> torch.Tensor:
        return held_of(pieces[number], tensors[pieces[number].name])

    if not pieces or of(0).data_ptr() != of(0).data_ptr():
        return {}  # a planner makes them anew each time
    found = {}
    for number, at in enumerate(shared_memory(map(of, range(len(pieces))))):
        if at is not None:
            host, offset = at
            # Both at once: the memory of one that was made for this, and has gone, may be that of the next.
            both = of(host), of(number)
            if both[1].data_ptr() - both[0].data_ptr() == offset:
                found[pieces[number]] = pieces[host], offset
    return found


def _starts(segments: Sequence[Segment]) -> list[int]:
    """Where each begins in an image, and where the last ends: on pages, so that they can be written from there."""
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + -(-segment.size // PAGE_BYTES) * PAGE_BYTES)
    return starts


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        callers.warn(message, RuntimeWarning)


def _no_sums(segment: Segment) -> bytes:
    return bytes(8 * -(-segment.size // BLOCK_BYTES))
