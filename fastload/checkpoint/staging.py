"""Memory into which a state is copied, so that training may go on while the copy is saved.

All tensors of a state go end to end into one memfd, which is used again by the next save: what costs most of a first
copy is touching new memory. It is free again when no tensor refers to it, in any thread, and a third state waits
for one of two, since memory does not grow. Sent to another process, a staged state is one descriptor, where torch's own
way takes one for each tensor.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import mmap
import os
import pickle
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing import reduction
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastload.errors import CheckpointError
from fastload.lifecycle import on_drop

_MEMORIES = 2
_DEADLINE_S = 1800.0
_LOOK_S = 1.0
_ALIGNMENT = 64

Copy = Callable[[torch.Tensor], torch.Tensor]


class Staging:
    """The memory of a process. Thread-safe."""

    def __init__(self, deadline_s: float = _DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        # A None permits the thread that takes it to make a memory. A finalizer may put one back at any moment of any
        # thread, so that this must be the one kind of queue that can bear it.
        self._free: queue.SimpleQueue[_Memory | None] = queue.SimpleQueue()
        for _ in range(_MEMORIES):
            self._free.put(None)
        self._releases = 0

    def stage(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a state that no longer depends on it. Raises `CheckpointError` where the memory of the two states
        before it does not become free.
        """
        tensors: list[torch.Tensor] = []

        def seen(tensor: torch.Tensor) -> torch.Tensor:
            tensors.append(tensor)
            return tensor

        _rebuilt(state, seen, lambda other: other)
        size = sum(_aligned(tensor.nbytes) for tensor in tensors)
        memory = self._take(max(size, 1))
        try:
            held = memory.lend(partial(self._take_back, memory, self._releases))
        except BaseException:
            self._free.put(memory)
            raise
        offsets = _offsets(tensors)
        devices = {tensor.device for tensor in tensors if not tensor.is_cpu}
        for device in devices:
            memory.register(device)

        def staged(tensor: torch.Tensor) -> torch.Tensor:
            offset = next(offsets)
            there = held[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            return there.copy_(tensor.detach(), non_blocking=True)

        with torch.no_grad():
            copied = _rebuilt(state, staged, copy.deepcopy)
        for device in devices:
            getattr(torch, device.type).synchronize(device)
        return Staged(copied, memory)

    def release(self) -> None:
        """Give back what no state is in, now or as soon as that is so; the next one takes new memory."""
        self._releases += 1
        for _ in self._drained():
            self._free.put(None)

    def _take(self, size: int) -> _Memory:
        free = [self._next(), *self._drained()]
        best = max(free, key=lambda each: -1 if each is None else each.size)
        free.remove(best)
        for each in free:
            self._free.put(each)
        if best is not None and best.size >= size:
            return best
        try:
            return _Memory(size)
        except BaseException:
            self._free.put(best)
            raise

    def _next(self) -> _Memory | None:
        """The first that is free, which is waited for."""
        deadline = time.monotonic() + self._deadline_s
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        while True:
            # The state of a save that is over may be in a cycle of references: an exception that was caught on the way
            # keeps the frames of torch's calls. Nobody says when the next collection is, while all wait here.
            gc.collect()
            left_s = deadline - time.monotonic()
            with contextlib.suppress(queue.Empty):
                return self._free.get(timeout=max(0.0, min(_LOOK_S, left_s)))
            if left_s <= 0:
                raise CheckpointError(
                    f"the memory of the {_MEMORIES} states staged before is still in use after {self._deadline_s:g} s; "
                    "wait for the futures of earlier saves, and drop those that failed"
                )

    def _take_back(self, memory: _Memory, releases: int) -> None:
        self._free.put(memory if releases == self._releases else None)

    def _drained(self) -> list[_Memory | None]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._free.get_nowait())
        return found


class _Memory:
    """So many bytes in a memfd, mapped here."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("fastload-staging", os.MFD_CLOEXEC)
        on_drop(self, os.close, self.fd)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._is_registered = False

    def lend(self, take_back: Callable[[], None]) -> torch.Tensor:
        """All of it, as bytes; `take_back` is called once no tensor refers to it."""
        array = np.frombuffer(self._map, np.uint8)
        on_drop(array, take_back)
        return torch.from_numpy(array)

    def register(self, device: torch.device) -> None:
        """With CUDA, once, so that copies from it need no buffer between."""
        if device.type == "cuda" and not self._is_registered:
            address = np.frombuffer(self._map, np.uint8).ctypes.data
            code = torch.cuda.cudart().cudaHostRegister(address, self.size, 0)  # type: ignore[no-untyped-call]
            self._is_registered = int(code) == 0


class Staged(dict[str, Any]):
    """A dict as any other, which takes its memory along to another process."""

    def __init__(self, state: Mapping[str, Any], memory: _Memory) -> None:
        super().__init__(state)
        self._memory = memory

    def __reduce__(self) -> tuple[Any, ...]:
        file = io.BytesIO()
        _Pickler(file, self._memory).dump(dict(self))
        return _received, (reduction.DupFd(self._memory.fd), self._memory.size, file.getvalue())


class _Pickler(reduction.ForkingPickler):
    """Tensors of the memory are where they lie in it."""

    def __init__(self, file: io.BytesIO, memory: _Memory) -> None:
        super().__init__(file)
        self._address = np.frombuffer(memory._map, np.uint8).ctypes.data

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not value.is_cpu or value.layout is not torch.strided:
            return None
        storage = value.untyped_storage()
        if storage.data_ptr() != self._address:
            return None
        return value.data_ptr() - self._address, value.dtype, tuple(value.shape)


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
    fd = descriptor.detach()
    try:
        held = mmap.mmap(fd, size)
    finally:
        os.close(fd)
    state: dict[str, Any] = _Unpickler(io.BytesIO(data), torch.frombuffer(held, dtype=torch.uint8)).load()
    return state


def _rebuilt(value: Any, of_tensor: Copy, of_other: Callable[[Any], Any]) -> Any:
    """The same structure, of other tensors: those that hold the elements, wherever they are wrapped."""
    if isinstance(value, torch.Tensor):
        if is_traceable_wrapper_subclass(value):  # DTensor, quantised ones
            names, context = value.__tensor_flatten__()
            inner = {name: getattr(value, name) for name in names}
            rebuilt = {
                name: _rebuilt(each, of_tensor, of_other) if isinstance(each, torch.Tensor) else each
                for name, each in inner.items()
            }
            return type(value).__tensor_unflatten__(rebuilt, context, value.shape, value.stride())
        if isinstance(value, ShardedTensor):
            rebuilt = copy.copy(value)
            rebuilt._local_shards = [
                Shard(_rebuilt(shard.tensor, of_tensor, of_other), shard.metadata) for shard in value.local_shards()
            ]
            return rebuilt
        if (
            type(value) in (torch.Tensor, torch.nn.Parameter)
            and value.layout is torch.strided
            and not value.is_quantized
        ):
            return of_tensor(value)
        return of_other(value)
    if isinstance(value, Mapping):
        return {key: _rebuilt(each, of_tensor, of_other) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(each, of_tensor, of_other) for each in value)
    return of_other(value)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _offsets(tensors: list[torch.Tensor]) -> Iterator[int]:
    at = 0
    for tensor in tensors:
        yield at
        at += _aligned(tensor.nbytes)
