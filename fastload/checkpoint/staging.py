"""The copy of a state that `async_save` makes, so that training may go on while it is saved.

It goes into an image (`images`) as it will be stored: tensors end to end, with room for the headers of segments before
them. What is saved then is known only later, when torch has planned: the names and boxes for the headers, and which of
the tensors that several ranks have alike this one is to write. So those that other ranks may have as well lie behind
the others; headers are written where they have room, and what lies where it is to be stored is not touched again. The
rest is moved within the image: what is behind a tensor that another rank writes, as far as the segment goes, and the
parts of one that is too large for a segment.

What is small, and goes straight to the store, is in memory of its own.

Sent to another process, a staged state is one descriptor, where torch's own way takes one for each tensor. That process
hands the same memory to the service, and takes it back before it says that it is done. A mark in the memory says that
it is handed over: if that process ends in between, this one does not fill it again.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import reduction
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastload.checkpoint.images import Image, Images
from fastload.checkpoint.saving import Saving
from fastload.checkpoint.segments import PAGE_BYTES, SEGMENT_BYTES
from fastload.checkpoint.values import NAMES
from fastload.errors import FastloadError
from fastload.lifecycle import on_drop

_log = logging.getLogger("fastload.checkpoint")
# What a part record takes beside what is counted.
_RECORD_BYTES = 1 << 20

# Called with a tensor that holds elements, what it is called, and whether this rank alone has it.
Copy = Callable[[torch.Tensor, str, bool], torch.Tensor]

# Those that states are in, of this process.
_images: weakref.WeakSet[Image] = weakref.WeakSet()
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a state goes in an image of so many bytes, in the order in which they are found; those that
    are `tied` share the memory of others.
    """

    offsets: list[int]
    tied: frozenset[int]
    data_bytes: int
    byte_count: int

    @classmethod
    def of(cls, state: Mapping[str, Any], piece_bytes: int = SEGMENT_BYTES) -> Layout:
        """Where tensors will be cut in pieces of so many bytes."""
        tensors: list[torch.Tensor] = []
        found: list[tuple[str, bool]] = []
        value_bytes = 0

        def seen(tensor: torch.Tensor, name: str, is_own: bool) -> torch.Tensor:
            tensors.append(tensor)
            found.append((name, is_own))
            return tensor

        def other(value: Any) -> Any:
            nonlocal value_bytes
            value_bytes += getattr(value, "nbytes", len(value) if isinstance(value, str | bytes | bytearray) else 0)
            value_bytes += 256
            return value

        _rebuilt(state, seen, other)
        tied = {number: at for number, at in enumerate(shared_memory(tensors)) if at is not None}
        stored = [number for number, tensor in enumerate(tensors) if tensor.dtype in NAMES and number not in tied]
        # As a segment has them, wide ones come first; and so behind those that no other rank has.
        stored.sort(key=lambda number: (not found[number][1], -tensors[number].itemsize))
        offsets, end, data_bytes = [0] * len(tensors), 0, 0
        for number in set(range(len(tensors))) - set(stored) - tied.keys():  # they are values, and pickled
            offsets[number] = end
            end = _aligned(end + tensors[number].nbytes, PAGE_BYTES)
            value_bytes += tensors[number].nbytes + PAGE_BYTES
        for group in _areas([tensors[number].nbytes for number in stored], [found[number][1] for number in stored]):
            numbers = [stored[place] for place in group]
            room = sum(
                _entry_bytes(found[number][0], tensors[number].dim())
                * (1 + 2 * (tensors[number].nbytes // piece_bytes))
                for number in numbers
            )
            end = _aligned(end + room, PAGE_BYTES)
            for number in numbers:
                offsets[number] = end
                end += tensors[number].nbytes
                data_bytes += tensors[number].nbytes
            # One that is larger than a segment is cut, and its parts get headers.
            end = _aligned(end, PAGE_BYTES) + 4 * PAGE_BYTES * (tensors[numbers[-1]].nbytes // SEGMENT_BYTES)
        for number, (host, within) in tied.items():
            offsets[number] = offsets[host] + within
        record = sum(5 * len(name) + 40 * tensor.dim() + 200 for tensor, (name, _) in zip(tensors, found, strict=True))
        # And checksums, or hashes of small pieces.
        end += record + value_bytes + data_bytes // 2048 + _RECORD_BYTES
        return cls(offsets, frozenset(tied), data_bytes, _aligned(end, PAGE_BYTES))


def shared_memory(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int] | None]:
    """Of each tensor that has the elements of another one, or contiguous ones a part of them: the number of that one,
    and where in its bytes they begin. None of those that are named is itself one of these.
    """
    found: list[tuple[int, int] | None] = []
    same: dict[tuple[Any, ...], int] = {}
    ranges: list[tuple[str, torch.dtype, int, int, int]] = []
    for number, tensor in enumerate(tensors):
        found.append(None)
        if not tensor.numel() or tensor.is_meta:
            continue
        start = tensor.data_ptr()
        # Conjugated and negated views have the same memory, and other values.
        key = tensor.device, tensor.dtype, start, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
        if key in same:
            found[number] = same[key], 0
            continue
        same[key] = number
        if tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
            ranges.append((str(tensor.device), tensor.dtype, start, start + tensor.nbytes, number))
    host: tuple[str, torch.dtype, int, int, int] | None = None
    for each in sorted(ranges, key=lambda each: (each[0], each[2], -each[3], each[4])):
        device, dtype, start, end, number = each
        if host is not None and host[:2] == (device, dtype) and end <= host[3]:
            found[number] = host[4], start - host[2]
        elif host is None or host[0] != device or start >= host[3]:
            host = each
    # One that is the same as one that is a part of another is that part as well.
    return [each if each is None or (of := found[each[0]]) is None else (of[0], of[1] + each[1]) for each in found]


def _areas(sizes: Sequence[int], are_own: Sequence[bool]) -> list[list[int]]:
    """What will be in a segment each, as `lay_out` has it."""
    areas: list[list[int]] = []
    held = 0
    for number, (size, is_own) in enumerate(zip(sizes, are_own, strict=True)):
        if not areas or held + size > SEGMENT_BYTES or is_own != are_own[number - 1]:
            areas.append([])
            held = 0
        areas[-1].append(number)
        held += size
    return areas


def _entry_bytes(name: str, dimensions: int) -> int:
    """At most, in a header."""
    return 128 + len(json.dumps(name)) + 30 * dimensions


def stage(
    state: Mapping[str, Any], layout: Layout, images: Images | None, room_bytes: int, timeout_s: float
) -> dict[str, Any]:
    """A copy of a state that no longer depends on it, in one of the images; without any, in memory of its own. Raises
    what `Images.take` does; `room_bytes` are more, where that is for one image.
    """
    if images is None:
        image = Image(layout.byte_count)
        array = image.array()
        on_drop(array, _forget, image)  # which it keeps
    else:
        taken = images.take(layout.byte_count, max(room_bytes, layout.byte_count), timeout_s)
        assert taken is not None
        image, array = taken, images.lend(taken)
    held = torch.from_numpy(array)
    del array
    numbers = iter(range(len(layout.offsets)))
    devices: set[torch.device] = set()

    def staged(tensor: torch.Tensor, name: str, is_own: bool) -> torch.Tensor:
        if not tensor.is_cpu and tensor.device not in devices:
            devices.add(tensor.device)
            if images is not None:
                _register(image, tensor.device)
        number = next(numbers)
        offset = layout.offsets[number]
        there = held[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return there if number in layout.tied else there.copy_(tensor.detach(), non_blocking=True)

    with torch.no_grad():
        copied = _rebuilt(state, staged, copy.deepcopy)
    for device in devices:
        getattr(torch, device.type).synchronize(device)
    image.protect(writable=False)
    with _lock:
        _images.add(image)
    return Staged(copied, image)


def home_of(tensors: Iterable[torch.Tensor]) -> tuple[Image, list[int]] | None:
    """The image in which all of them lie, and where; None where that is not so, which may be known by the first."""
    with _lock:
        images = [image for image in _images if not image.is_closed]
    found: Image | None = None
    offsets: list[int] = []
    for tensor in tensors if images else ():
        if not tensor.numel():
            offsets.append(0)
            continue
        if not tensor.is_cpu or not tensor.is_contiguous():
            return None
        own = tensor.data_ptr(), tensor.nbytes
        found = found or next((image for image in images if image.offset_of(*own) is not None), None)
        at = found.offset_of(*own) if found is not None else None
        if at is None:
            return None
        offsets.append(at)
    return None if found is None else (found, offsets)


def take_back(saving: Saving, timeout_s: float) -> None:
    """The image of a save that is over, where it is another process's, which is to fill it again."""
    with _lock:
        images = [image for image in _images if image.is_received and image.saving is saving]
    for image in images:
        try:
            is_free = saving.take_back(timeout_s)
        except FastloadError as error:
            _log.info("the memory of %r is not used again: %s", saving, error)
            continue
        if is_free:
            image.protect(writable=True)
            image.is_handed_over_elsewhere = False


def _forget(image: Image) -> None:
    """It goes with the last that refers to it."""


def _register(image: Image, device: torch.device) -> None:
    """With CUDA, once, so that copies to it need no buffer between."""
    if device.type == "cuda" and not image.is_registered:
        address, runtime = image.array().ctypes.data, torch.cuda.cudart()  # type: ignore[no-untyped-call]
        image.is_registered = int(runtime.cudaHostRegister(address, image.byte_count, 0)) == 0
        if image.is_registered:
            image.before_close = lambda: runtime.cudaHostUnregister(address)


class Staged(dict[str, Any]):
    """A dict as any other, which takes its memory along to another process."""

    def __init__(self, state: Mapping[str, Any], image: Image) -> None:
        super().__init__(state)
        self._image = image

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        _Pickler(file, self._image).dump(dict(self))
        return _received, (reduction.DupFd(self._image.fd), self._image.byte_count, file.getvalue())


class _Pickler(reduction.ForkingPickler):
    """Tensors of the image are where they lie in it."""

    def __init__(self, file: io.BytesIO, image: Image) -> None:
        super().__init__(file)
        self._address = image.array().ctypes.data

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not value.is_cpu or value.layout is not torch.strided:
            return None
        storage = value.untyped_storage()
        if storage.data_ptr() != self._address:
            return None
        return value.data_ptr() - self._address, value.dtype, tuple(value.shape)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            # By what it wraps. Its own storage has no memory, which torch would copy all the same.
            names, context = value.__tensor_flatten__()
            inner = {name: getattr(value, name) for name in names}
            return _unflattened, (type(value), inner, context, value.shape, value.stride())
        return NotImplemented


def _unflattened(kind: Any, inner: dict[str, Any], context: Any, shape: torch.Size, stride: tuple[int, ...]) -> Any:
    return kind.__tensor_unflatten__(inner, context, shape, stride)


class _Unpickler(pickle.Unpickler):
    """Only for what a trainer sends to a process that it has started."""

    def __init__(self, file: io.BytesIO, held: torch.Tensor) -> None:
        super().__init__(file)
        self._held = held

    def persistent_load(self, where: Any) -> torch.Tensor:
        offset, dtype, shape = where
        size = math.prod(shape) * dtype.itemsize
        return self._held[offset : offset + size].view(dtype).view(shape)


def _received(descriptor: Any, size: int, data: bytes) -> dict[str, Any]:
    image = Image(size, descriptor.detach())
    image.is_received = True
    array = image.array()
    on_drop(array, _forget, image)
    with _lock:
        _images.add(image)
    state: dict[str, Any] = _Unpickler(io.BytesIO(data), torch.from_numpy(array)).load()
    return state


def _rebuilt(value: Any, of_tensor: Copy, of_other: Callable[[Any], Any], name: str = "", is_own: bool = False) -> Any:
    """The same structure, of other tensors: those that hold the elements, wherever they are wrapped."""

    def inner(each: Any, name: str = name, is_own: bool = is_own) -> Any:
        return _rebuilt(each, of_tensor, of_other, name, is_own)

    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):  # DTensor, quantised ones
            names, context = value.__tensor_flatten__()
            placements = getattr(value, "placements", ())  # of a DTensor
            is_own = bool(placements) and all(each.is_shard() for each in placements)
            parts = {name: getattr(value, name) for name in names}
            rebuilt = {
                part: inner(each, is_own=is_own) if isinstance(each, torch.Tensor) else each
                for part, each in parts.items()
            }
            return type(value).__tensor_unflatten__(rebuilt, context, value.shape, value.stride())
        if isinstance(value, ShardedTensor):
            rebuilt = copy.copy(value)
            rebuilt._local_shards = [
                Shard(inner(shard.tensor, is_own=True), shard.metadata) for shard in value.local_shards()
            ]
            return rebuilt
        if (
            type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.layout is torch.strided
            and not value.is_quantized
        ):
            return of_tensor(value, name, is_own)
        return of_other(value)
    if isinstance(value, Mapping):
        return {key: inner(each, f"{name}.{key}") for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(inner(each, f"{name}.{number}") for number, each in enumerate(value))
    return of_other(value)


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
