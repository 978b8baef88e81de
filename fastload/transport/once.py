"""Arguments of several processes, pickled once for all of them instead of once for each.

A process that is spawned is sent its arguments through a pipe, and reads them only when it has imported what they need.
So eight workers with a large data set are started one after another, each after a pickling of its own, and the data
exists eight times. Here it is pickled once, into an anonymous file; little goes through the pipe, so all processes
start at the same time, and each maps the file.

The memory of numpy arrays is written to the file once and mapped privately: copy-on-write for each process. Tensors
cross in torch's way, which shares their memory already. A pickle that contains things of a single process (descriptors,
as queues and connections have) is made for each process; arrays are still written once. The same holds for tensors:
torch shares their memory by a descriptor, or by a name (of a file, or of CUDA's) with a reference count.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Sequence
from functools import partial
from multiprocessing import context, reduction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastload.transport.slots import SMALL_BYTES, map_private

Bytes = npt.NDArray[np.uint8]
FileRange = tuple[int, int]  # offset and length in the file

# Where arrays begin: a page, so that a write to one copies nothing of another.
_ALIGNMENT = mmap.PAGESIZE
# Types that torch pickles as a reference to shared memory.
_OF_TORCH = (torch.Tensor, torch.UntypedStorage, torch.TypedStorage)


class Once:
    """The objects, until the processes have been started. Used by one thread. Unpickled in a process, it is the tuple
    of the objects.
    """

    def __init__(self, objects: Sequence[Any], beside: Sequence[Any] = ()) -> None:
        """`beside`: objects that these refer to and that are pickled for each process.

        Raises `OSError` where the kernel has no anonymous files.
        """
        self._objects, self._beside = tuple(objects), tuple(beside)
        self._file = _StartFile()
        self._arrays = _Arrays(self._file)
        self._pickled: tuple[FileRange, list[FileRange]] | None = None  # once it is known to suit every process

    def parts(self) -> tuple[OnceItem, ...]:
        """Placeholders to pass to processes, where each becomes its object."""
        return tuple(OnceItem(self, number) for number in range(len(self._objects)))

    def __getitem__(self, number: int) -> Any:
        return self._objects[number]

    def __reduce__(self) -> tuple[Any, ...]:
        popen = context.get_spawning_popen()
        assert popen is not None, "it is pickled for a process that is being started"
        pickled = self._pickled or self._pickle(popen)
        return _loaded, (reduction.DupFd(self._file.fd), self._file.byte_count, *pickled, self._beside)

    def close(self) -> None:
        """Call it when all processes have been started. Idempotent."""
        self._file.close()
        self._arrays.clear()

    def _pickle(self, popen: Any) -> tuple[FileRange, list[FileRange]]:
        noticing: Any = _Noticing(popen)
        stream, places = io.BytesIO(), list[FileRange]()
        context.set_spawning_popen(noticing)
        try:
            _Pickler(stream, places, self._arrays, self._beside, noticing).dump(self._objects)
        finally:
            context.set_spawning_popen(popen)
        pickled = self._file.append(stream.getbuffer()), places
        if not noticing.is_of_one_process:
            self._pickled = pickled
        return pickled


class OnceItem:
    """The placeholder of one object."""

    def __init__(self, once: Once, number: int) -> None:
        self._once, self._number = once, number

    def __reduce__(self) -> tuple[Any, ...]:
        return _part, (self._once, self._number)

    def __repr__(self) -> str:
        return repr(self._once[self._number])  # in messages


class _StartFile:
    """An anonymous file that grows."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fastload-start", os.MFD_CLOEXEC)
        self.byte_count = 0

    def append(self, data: memoryview) -> FileRange:
        """Write at the next page boundary."""
        offset = -(-self.byte_count // _ALIGNMENT) * _ALIGNMENT
        written = 0
        while written < data.nbytes:
            written += os.pwrite(self.fd, data[written:], offset + written)
        self.byte_count = offset + data.nbytes
        return offset, data.nbytes

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class _Arrays:
    """Where the memory of arrays lies in the file. Arrays are kept alive, so that an address identifies one."""

    def __init__(self, file: _StartFile) -> None:
        self._file = file
        self._places: dict[tuple[int, int], FileRange] = {}
        self._kept: list[pickle.PickleBuffer] = []
        self._writable: dict[int, tuple[Any, Any]] = {}

    def place(self, buffer: pickle.PickleBuffer) -> FileRange:
        """The range of this memory in the file; it is written there first if it is new."""
        raw = buffer.raw()
        where = np.frombuffer(raw, np.uint8).ctypes.data, raw.nbytes
        if where not in self._places:
            self._places[where] = self._file.append(raw)
            self._kept.append(buffer)
        return self._places[where]

    def writable(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A writable copy of a read-only array, which arrives writable, as from a plain pickle."""
        if id(array) not in self._writable:
            self._writable[id(array)] = array, array.copy()
        return self._writable[id(array)][1]  # type: ignore[no-any-return]

    def clear(self) -> None:
        self._places.clear()
        self._kept.clear()
        self._writable.clear()


class _Pickler(reduction.ForkingPickler):
    """Writes arrays that are not small to the file; `places` lists their ranges, in order."""

    def __init__(
        self,
        stream: io.BytesIO,
        places: list[FileRange],
        arrays: _Arrays,
        beside: tuple[Any, ...],
        noticing: _Noticing,
    ) -> None:
        super().__init__(stream, 5, True, partial(_put_aside, places, arrays))
        self._arrays, self._noticing = arrays, noticing
        self._beside = {id(each): number for number, each in enumerate(beside)}

    def reducer_override(self, value: Any) -> Any:
        if (number := self._beside.get(id(value))) is not None:
            return _given, (number,)  # a persistent id would cost a call for each string and number
        if isinstance(value, _OF_TORCH):
            self._noticing.is_of_one_process = True
        if type(value) is np.ndarray and not value.flags.writeable and value.nbytes >= SMALL_BYTES:
            return self._arrays.writable(value).__reduce_ex__(5)
        return NotImplemented


def _put_aside(places: list[FileRange], arrays: _Arrays, buffer: pickle.PickleBuffer) -> bool:
    """True for a small buffer, which stays in the pickle."""
    if buffer.raw().nbytes < SMALL_BYTES:
        return True
    places.append(arrays.place(buffer))
    return False


class _Noticing:
    """Wraps multiprocessing's state of a process start, to detect things that are made for this process only."""

    def __init__(self, popen: Any) -> None:
        self._popen = popen
        self.is_of_one_process = False

    def duplicate_for_child(self, fd: int) -> Any:
        self.is_of_one_process = True
        return self._popen.duplicate_for_child(fd)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._popen, name)


# In the started process


# The objects `beside`, while objects that refer to them are unpickled.
_came_beside: tuple[Any, ...] = ()


def _loaded(
    fd: Any, byte_count: int, pickled: FileRange, places: list[FileRange], beside: tuple[Any, ...]
) -> tuple[Any, ...]:
    global _came_beside
    descriptor = fd.detach()
    try:
        memory = map_private(descriptor, byte_count)
    finally:
        os.close(descriptor)
    _came_beside = beside
    try:
        objects: tuple[Any, ...] = pickle.loads(
            _at(memory, pickled).data, buffers=[_at(memory, place) for place in places]
        )
    finally:
        _came_beside = ()
    return objects


def _given(number: int) -> Any:
    return _came_beside[number]


def _at(memory: Bytes, place: FileRange) -> Bytes:
    offset, byte_count = place
    return memory[offset : offset + byte_count]


def _part(objects: tuple[Any, ...], number: int) -> Any:
    return objects[number]
