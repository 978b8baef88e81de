"""Pickling in which tensors and arrays are taken apart into their memory, which crosses beside the pickle.

A tensor is pickled as how it lies in its storage, and of the storage goes what the tensors of one pickle need: so those
that share memory still do, and one that is expanded takes no more than it did. What torch can do that this cannot
(sparse, quantised and nested tensors, subclasses) is left to torch, down to the storages inside. Whatever is made again
is writable, where the memory that it is made from is.

Which part of a storage goes is known once all has been pickled. So a pickle only says that memory comes here, by a
mark; `buffers_of` says what goes, and `memory_of` gives for each mark, in order, what it is there.

A storage may be far larger than what is seen of it: a row of a table, or a column. Then goes what lies between the
first and the last byte of tensors that overlap; and where most of that is nobody's, as with a column, each tensor by
itself, without the gaps, so that its strides are others.
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

from fastload.transport.slots import SMALL_BYTES, Owner

Bytes = npt.NDArray[np.uint8]

# By name, since pickle looks through all modules for what a type of torch's may be a part of.
_DTYPES = {name: kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)}
_NAMES = {kind: name for name, kind in _DTYPES.items()}

_CPU = torch.device("cpu")

# What stands in a pickle for memory of a storage.
_MARK = pickle.PickleBuffer(bytearray())
# What nobody sees is sent along where all that is sent is not more than so many times what is seen, and a little.
_TIMES_MAX, _MORE_BYTES = 4, SMALL_BYTES
# A storage of which it is not known what is needed: a larger one crosses in torch's way, which need not copy it.
_WHOLE_BYTES_MAX = 1 << 20
# Where memory may begin: all of torch's types can lie there.
_ALIGNMENT = 16


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


class Use(NamedTuple):
    """The bytes of a storage, from `low` up to `high`, in which `tensor` lies; without one, all of the storage."""

    storage: torch.UntypedStorage
    low: int
    high: int
    tensor: torch.Tensor | None

    @property
    def seen_bytes(self) -> int:
        """How many of them somebody sees."""
        return self.high - self.low if self.tensor is None else min(self.high - self.low, self.tensor.nbytes)


Part: TypeAlias = "Use | Bytes"
Where: TypeAlias = tuple[int, int]
"""Of a part, the number of its buffer, and which byte of the storage is the buffer's first; or one of the following."""
_ALONE = -1  # the buffer is this tensor's alone, without gaps
_NO_STORAGE = -2  # the part is the buffer


def dump_apart(value: Any, stream: io.BytesIO, dispatch_table: Any = None) -> list[Part]:
    """Pickle, but for memory of plain tensors, and of other buffers that are not small: what is left out, in order."""
    pickler = _Apart(stream)
    if dispatch_table is not None:
        pickler.dispatch_table = dispatch_table
    pickler.dump(value)
    return pickler.parts


class _Apart(pickle.Pickler):
    def __init__(self, stream: io.BytesIO) -> None:
        self.parts: list[Part] = []
        # Not a method: a cycle would keep the batch, which the pickler remembers, until the collector comes by.
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
                self.parts.append(Use(value, 0, value.nbytes(), None))
                return _storage_over, (_MARK,)
        elif isinstance(value, np.ndarray) and not value.flags.writeable:
            return value.copy().__reduce_ex__(5)  # a buffer that may not be written to would arrive as one
        return NotImplemented


def _put_aside(parts: list[Part], buffer: pickle.PickleBuffer) -> bool:
    """Whether it is small, and stays in the pickle."""
    if buffer is _MARK:
        return False
    raw = buffer.raw()
    if raw.nbytes < SMALL_BYTES:
        return True
    parts.append(np.frombuffer(raw, np.uint8))
    return False


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


def _use_of(tensor: torch.Tensor, storage: torch.UntypedStorage) -> Use:
    size = tensor.element_size()
    low = int(tensor.storage_offset()) * size
    if tensor.is_contiguous():
        return Use(storage, low, low + tensor.nbytes, tensor)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Use(storage, low, low + (last + 1) * size, tensor)


def buffers_of(parts: Sequence[Part]) -> tuple[list[Bytes], list[Where]]:
    """The memory that has to cross, and where in it each part is."""
    buffers: list[Bytes] = []
    where: list[Where] = [(0, _NO_STORAGE)] * len(parts)
    by_storage: dict[int, list[tuple[int, Use]]] = {}
    for number, part in enumerate(parts):
        if isinstance(part, Use):
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


_Uses: TypeAlias = "list[tuple[int, Use]]"


def _memories(uses: _Uses) -> Iterator[tuple[_Uses, int, Bytes]]:
    """What goes of one storage: which uses lie in it, where in the storage it begins, and the memory."""
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
    """The uses in groups, of which no two lie in the same bytes."""
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


class _InStorage(Owner):
    """Bytes of a storage, which stays as long as an array of them."""

    __slots__ = ("_storage",)

    def __init__(self, storage: torch.UntypedStorage, low: int, high: int) -> None:
        self._storage = storage
        super().__init__(storage.data_ptr() + low, high - low)


def memory_of(buffers: Sequence[Any], where: Sequence[Where], *, is_shared: bool = False) -> Iterator[Any]:
    """What `pickle.loads` wants as its `buffers`, from those that have crossed, which may be written to.

    `is_shared`: they are shared memory, and tensors over them say so, as those that torch hands over do.
    """
    memories: dict[int, _Memory] = {}
    for number, low in where:
        if low == _NO_STORAGE:
            yield buffers[number]
        else:
            if number not in memories:
                memories[number] = _Memory(buffers[number], low, is_shared)
            yield memories[number]


class _Memory:
    """A storage that begins at byte `low` of the one that was, made with the first tensor over it."""

    __slots__ = ("_buffer", "_is_shared", "_storage", "low")

    def __init__(self, buffer: Any, low: int, is_shared: bool) -> None:
        self._buffer, self.low, self._is_shared = buffer, low, is_shared
        self._storage: torch.UntypedStorage | None = None

    def begin(self, dtype: torch.dtype) -> tuple[Any, torch.UntypedStorage]:
        """Some tensor of that type, to be set to the storage, which is given, too."""
        if self._storage is not None:
            return torch.empty(0, dtype=dtype, device=_CPU), self._storage
        byte_count = memoryview(self._buffer).nbytes
        if not byte_count:
            tensor = torch.empty(0, dtype=dtype, device=_CPU)
        else:  # of that type at once, where that is possible, which takes half the time
            tensor = torch.frombuffer(self._buffer, dtype=torch.uint8 if byte_count % dtype.itemsize else dtype)
        self._storage = tensor.untyped_storage()
        if self._is_shared:
            # torch keeps this object, with its attributes, as long as there are tensors over the storage.
            self._storage.is_shared = _yes  # type: ignore[method-assign]
        return tensor if tensor.dtype is dtype else torch.empty(0, dtype=dtype, device=_CPU), self._storage


def _yes() -> bool:
    return True


def _storage_over(memory: _Memory) -> torch.UntypedStorage:
    return memory.begin(torch.uint8)[1]


def _tensor_over(
    memory: _Memory, dtype: str | torch.dtype, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]
) -> torch.Tensor:
    kind = _DTYPES[dtype] if isinstance(dtype, str) else dtype
    tensor, storage = memory.begin(kind)
    if memory.low == _ALONE:
        tensor.set_(storage, 0, shape)
    else:
        tensor.set_(storage, offset - memory.low // kind.itemsize, shape, stride)
    return tensor  # type: ignore[no-any-return]
