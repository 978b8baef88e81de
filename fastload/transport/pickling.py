"""Pickling in which the memory of tensors and arrays is left out of the pickle, to cross beside it.

A tensor is pickled as its layout within its storage, and of the storage only the bytes that the tensors of one pickle
need are sent: so tensors that share memory still do, and an expanded tensor takes no more than before. What torch
can do and this cannot (sparse, quantised and nested tensors, subclasses) is left to torch, down to the storages inside.
The results are writable if the memory that they are made from is.

Which bytes of a storage are sent is known once everything has been pickled. So the pickle only contains a mark for each
piece of memory; `buffers_of` computes the buffers to send, and `memory_of` returns, for each mark in order, the memory
on the receiving side.

A storage may be far larger than the tensors over it: for a row or a column of a table. Then the bytes from the first to
the last of overlapping tensors are sent. Where most of them would be gaps, as with a column, each tensor is sent by
itself, contiguous, so its strides change.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fastload.transport.slots import SMALL_BYTES, MemoryOwner

Bytes = npt.NDArray[np.uint8]

# By name, since pickle searches all modules for the one that contains a dtype of torch.
_DTYPES = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
_NAMES = {kind: name for name, kind in _DTYPES.items()}

_CPU = torch.device("cpu")

# Marks memory of a storage in a pickle.
_MARK = pickle.PickleBuffer(bytearray())
# Gaps are sent along where the bytes sent are at most so many times the bytes in use, plus a little.
_TIMES_MAX, _MORE_BYTES = 4, SMALL_BYTES
# Of a bare storage all bytes are needed. A larger one crosses in torch's way, which need not copy it.
_WHOLE_BYTES_MAX = 1 << 20
# Where memory may begin: all of torch's types can lie there.
_ALIGNMENT = 16


class _ForkingTable:
    """The reducers of `ForkingPickler`, torch's among them, as a `dispatch_table`.

    `ForkingPickler` copies its table for each pickle, which loads a hundred unused objects into the CPU's caches.
    Look-ups are live, since users may add and replace reducers at any time.
    """

    def __getitem__(self, kind: type) -> Callable[[Any], Any]:
        others: dict[type, Callable[[Any], Any]] = ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        return others[kind] if kind in others else copyreg.dispatch_table[kind]


FORKING_TABLE: Any = _ForkingTable()


def forking_dumps(value: Any) -> bytes:
    """Equivalent to `ForkingPickler.dumps`."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, pickle.DEFAULT_PROTOCOL)
    pickler.dispatch_table = FORKING_TABLE
    pickler.dump(value)
    return stream.getvalue()


class StorageUse(NamedTuple):
    """The bytes of a storage, from `low` up to `high`, in which `tensor` lies; without a tensor, the whole storage."""

    storage: torch.UntypedStorage
    low: int
    high: int
    tensor: torch.Tensor | None

    @property
    def seen_bytes(self) -> int:
        """How many of them are in use."""
        return self.high - self.low if self.tensor is None else min(self.high - self.low, self.tensor.nbytes)


OutOfBand: TypeAlias = "StorageUse | Bytes"
BufferOffset: TypeAlias = tuple[int, int]
"""The number of a part's buffer, and the byte of the storage at which the buffer begins; or one of the following."""
_ALONE = -1  # the buffer holds this tensor alone, contiguous
_NO_STORAGE = -2  # the part is the buffer


def dump_apart(value: Any, stream: io.BytesIO, dispatch_table: Any = None) -> list[OutOfBand]:
    """Pickle without the memory of plain tensors and of other buffers that are not small; returns these, in order."""
    pickler = _Apart(stream)
    if dispatch_table is not None:
        pickler.dispatch_table = dispatch_table
    pickler.dump(value)
    return pickler.parts


class _Apart(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        self.parts: list[OutOfBand] = []
        # Not a method: a cycle would keep the batch, which the pickler refers to, until garbage collection.
        super().__init__(stream, 5, buffer_callback=partial(_put_aside, self.parts))

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if kind is torch.Tensor:
            if is_plain(value) and (storage := value.untyped_storage()).nbytes():
                self.parts.append(_use_of(value, storage))
                name = _NAMES.get(value.dtype, value.dtype)
                return _tensor_over, (_MARK, name, value.storage_offset(), tuple(value.shape), value.stride())
        elif kind is torch.UntypedStorage:
            if value.device.type == "cpu" and 0 < value.nbytes() <= _WHOLE_BYTES_MAX:
                self.parts.append(StorageUse(value, 0, value.nbytes(), None))
                return _storage_over, (_MARK,)
        elif isinstance(value, np.ndarray) and not value.flags.writeable:
            return value.copy().__reduce_ex__(5)  # or else it would arrive read-only
        return NotImplemented


def _put_aside(parts: list[OutOfBand], buffer: pickle.PickleBuffer) -> bool:
    """Whether it is small, and stays in the pickle."""
    if buffer is _MARK:
        return False
    raw = buffer.raw()
    if raw.nbytes < SMALL_BYTES:
        return True
    parts.append(np.frombuffer(raw, np.uint8))
    return False


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is just strided host memory."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.requires_grad
    )


def _use_of(tensor: torch.Tensor, storage: torch.UntypedStorage) -> StorageUse:
    size = tensor.element_size()
    low = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return StorageUse(storage, low, low + tensor.nbytes, tensor)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return StorageUse(storage, low, low + (last + 1) * size, tensor)


def buffers_of(parts: Sequence[OutOfBand]) -> tuple[list[Bytes], list[BufferOffset]]:
    """The buffers that have to cross, and where each part lies in them."""
    buffers: list[Bytes] = []
    where: list[BufferOffset] = [(0, _NO_STORAGE)] * len(parts)
    by_storage: dict[int, list[tuple[int, StorageUse]]] = {}
    for number, part in enumerate(parts):
        if isinstance(part, StorageUse):
            by_storage.setdefault(part.storage._cdata, []).append((number, part))
        else:
            where[number] = len(buffers), _NO_STORAGE
            buffers.append(part)
    for uses in by_storage.values():
        number, use = uses[0]
        if len(uses) == 1 and use.high - use.low == use.storage.nbytes():  # as most are
            where[number] = len(buffers), 0
            buffers.append(_bytes_of(use.storage, 0, use.high))
            continue
        for group, low, memory in _memories(uses):
            for number, _ in group:
                where[number] = len(buffers), low
            buffers.append(memory)
    return buffers, where


_Uses: TypeAlias = "list[tuple[int, StorageUse]]"


def _memories(uses: _Uses) -> Iterator[tuple[_Uses, int, Bytes]]:
    """The memory of one storage to send: for each buffer its uses, its offset in the storage, and the bytes."""
    storage = uses[0][1].storage
    low, high = min(use.low for _, use in uses), max(use.high for _, use in uses)
    seen_bytes = sum(use.seen_bytes for _, use in uses)
    if high - low <= _TIMES_MAX * seen_bytes + _MORE_BYTES:
        if storage.nbytes() <= high - low + _MORE_BYTES:
            low, high = 0, storage.nbytes()
        low -= low % _ALIGNMENT
        yield uses, low, _bytes_of(storage, low, high)
    elif len(uses) > 1 and len(groups := _overlapping(uses)) > 1:
        for group in groups:
            yield from _memories(group)
    else:
        for number, use in uses:
            assert use.tensor is not None, "all of a storage has no gaps"
            whole = use.tensor.contiguous()
            yield [(number, use)], _ALONE, _bytes_of(whole.untyped_storage(), 0, whole.nbytes)


def _overlapping(uses: _Uses) -> list[_Uses]:
    """The uses in groups that do not overlap each other."""
    groups: list[_Uses] = []
    end = -1
    for number, use in sorted(uses, key=lambda each: each[1].low):
        if use.low >= end:
            groups.append([])
        groups[-1].append((number, use))
        end = max(end, use.high)
    return groups


def _bytes_of(storage: torch.UntypedStorage, low: int, high: int) -> Bytes:
    return np.asarray(_InStorage(storage, low, high))


class _InStorage(MemoryOwner):
    """The base object of an array over bytes of a storage, which it keeps alive."""

    __slots__ = ("_storage",)

    def __init__(self, storage: torch.UntypedStorage, low: int, high: int) -> None:
        self._storage = storage
        super().__init__(storage.data_ptr() + low, high - low)


def memory_of(buffers: Sequence[Any], where: Sequence[BufferOffset], *, is_shared: bool = False) -> Iterator[Any]:
    """The `buffers` argument of `pickle.loads`, from the buffers that have crossed, which are writable.

    `is_shared`: they are shared memory, and `is_shared()` of tensors over them is true, as of those that torch sends.
    """
    memories: dict[int, _ReceivedStorage] = {}
    for number, low in where:
        if low == _NO_STORAGE:
            yield buffers[number]
        else:
            if number not in memories:
                memories[number] = _ReceivedStorage(buffers[number], low, is_shared)
            yield memories[number]


class _ReceivedStorage:
    """A storage that begins at byte `low` of the original one. It is made with the first tensor over it."""

    __slots__ = ("_buffer", "_is_shared", "_storage", "low")

    def __init__(self, buffer: Any, low: int, is_shared: bool) -> None:
        self._buffer, self.low, self._is_shared = buffer, low, is_shared
        self._storage: torch.UntypedStorage | None = None

    def begin(self, dtype: torch.dtype) -> tuple[Any, torch.UntypedStorage]:
        """A tensor of that type, to be set to the storage, and the storage."""
        if self._storage is not None:
            return torch.empty(0, dtype=dtype, device=_CPU), self._storage
        byte_count = memoryview(self._buffer).nbytes
        if not byte_count:
            tensor = torch.empty(0, dtype=dtype, device=_CPU)
        else:  # of the right type at once where possible, which takes half the time
            tensor = torch.frombuffer(self._buffer, dtype=torch.uint8 if byte_count % dtype.itemsize else dtype)
        self._storage = tensor.untyped_storage()
        if self._is_shared:
            # torch keeps this object, with its attributes, as long as there are tensors over the storage.
            self._storage.is_shared = _yes  # type: ignore[method-assign]
        return tensor if tensor.dtype is dtype else torch.empty(0, dtype=dtype, device=_CPU), self._storage


def _yes() -> bool:
    return True


def _storage_over(memory: _ReceivedStorage) -> torch.UntypedStorage:
    return memory.begin(torch.uint8)[1]


def _tensor_over(
    memory: _ReceivedStorage, dtype: str | torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    kind = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    tensor, storage = memory.begin(kind)
    if memory.low == _ALONE:
        tensor.set_(storage, 0, shape)
    else:
        tensor.set_(storage, offset - memory.low // kind.itemsize, shape, stride)
    return tensor  # type: ignore[no-any-return]
