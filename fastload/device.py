"""Batches that arrive on a CUDA device: `DataLoader(device="cuda")`.

A batch takes two steps. Whoever makes it calls `Mover.begin`, which pins it: its tensors are copied to memory of
torch's caching host allocator. Whoever wants it calls `Mover.deliver`. In between it is sent: under the *side stream*
of the device its tensors are copied from pinned memory without waiting, and an event is recorded behind the copies.
What this rests upon are promises of torch:

- Work of one stream is done in order. On delivery the consumer's current stream is made to wait for the event, so what
  the user queues there comes after the copies. No thread waits for the device.
- Memory of a tensor belongs to the stream that was current when it was allocated, the side stream here, and that one
  may use it again as soon as the tensor is gone. So each tensor is `record_stream`ed on the consumer's stream: then it
  may only once that is past what was queued when the tensor went.
- A pinned block from which a stream copies is not used again before that stream is past the copy: `copy_` tells the
  host allocator. So nobody has to keep the source.
- A batch that is dropped before its delivery was used by the side stream alone, and so needs nothing.

At most `AHEAD_MAX` batches are sent and not delivered. Whoever makes a batch sends it if there is room; otherwise it
waits, pinned, until a delivery makes room, for which the oldest is sent first; one that is wanted sooner is sent then.
So nothing here waits for anything but the lock, and which batch was sent when changes nothing but the time. The mover
refers to batches only weakly: what is dropped, when an iteration is closed for example, is gone, and its room is free.

`record_stream` needs to know the tensors. A part that cannot name them to a stream (it has `to`, but not
`record_stream`), or is no plain tensor in host memory (sparse, nested, a subclass with a dispatch of its own), is moved
on delivery, on the consumer's own stream, for which there is nothing to know.

There is one side stream for each device, for all loaders of the process: freed memory is kept for the stream that had
it, and with a stream for each loader every loader would keep some.

Batches are nested: what holds their parts, and the same with other parts in it.

The containers are those that torch's `pin_memory` goes into (mappings, tuples, named tuples and other sequences, each
made again as its own type), and dataclasses. The parts are tensors and objects that can be moved or pinned as a whole
(`to`, `pin_memory`), even if they are containers too: they know best how. All else stays as it is. Lists of numbers or
text, the keys of a batch for example, are told by the set of their types, without a step of Python for each item.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data._utils import pin_memory

from fastload.errors import ConfigError

# One that the consumer will want next, and one behind it.
AHEAD_MAX = 2
NO_MOVER = -1


def pinned(value: Any) -> Any:
    """As torch's loader pins it. For whoever wants no more than that."""
    return pin_memory.pin_memory(value)  # type: ignore[no-untyped-call]  # torch has no types here


class Side(Protocol):
    """The side stream of a device. Its methods may be called in any thread."""

    def entered(self) -> AbstractContextManager[None]:
        """While it is entered, this thread's current stream is the side stream."""
        ...

    def pinned(self, part: Any) -> Any:
        """The same in page-locked memory."""
        ...

    def copied(self, part: Any) -> Any:
        """The same on the device, once the current stream has come so far."""
        ...

    def mark(self) -> Any:
        """An event behind all that the side stream was given so far."""
        ...

    def join(self, mark: Any) -> None:
        """Let the current stream go on only after the event."""
        ...

    def keep(self, part: Any) -> None:
        """When it is gone, its memory is not to be used again before the current stream is past what it has then."""
        ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class Moving:
    """A batch between `begin` and `deliver`. Once `is_sent`, it is on the device behind `mark`, or there is an error;
    `parts` are what the side stream was given of it, `has_later` says that not all was.
    """

    batch: Any
    is_sent: bool = False
    mark: Any = None
    parts: list[Any] = field(default_factory=list)
    has_later: bool = False
    error: Exception | None = None


class Mover:
    """Moves the batches of one iteration. `number` finds it (see `mover_of`) where only data can be passed on."""

    def __init__(self, side: Side) -> None:
        self.number = next(_numbers)
        self._side = side
        self._lock = threading.Lock()  # held while copies are queued, which takes microseconds
        self._waiting: deque[weakref.ref[Moving]] = deque()  # the oldest first; some may be sent, or gone
        self._ahead: weakref.WeakSet[Moving] = weakref.WeakSet()  # sent and not delivered
        _movers[self.number] = self

    def begin(self, batch: Any) -> Moving:
        """In the thread that made it. Raises what pinning raises."""
        with self._side.entered():  # whose device is the current one then
            moving = Moving(map_tensors(batch, self._pinned))
        with self._lock:
            self._waiting.append(weakref.ref(moving))
            self._send_waiting()
        return moving

    def deliver(self, moving: Moving) -> Any:
        """In the thread that wants it. Raises what sending raised, for this batch and no other."""
        with self._lock:
            if not moving.is_sent:
                self._send(moving)
            self._ahead.discard(moving)
            self._send_waiting()
        try:
            return self._arrived(moving)
        except StopIteration as error:  # which whoever iterates would take for the end
            raise RuntimeError("moving a batch to its device raised StopIteration") from error

    def _pinned(self, part: Any) -> Any:
        if isinstance(part, torch.Tensor) and not _goes_ahead(part):
            return part
        return self._side.pinned(part)

    def _send_waiting(self) -> None:
        while self._waiting and len(self._ahead) < AHEAD_MAX:
            moving = self._waiting.popleft()()
            if moving is not None and not moving.is_sent:
                self._send(moving)
                self._ahead.add(moving)

    def _send(self, moving: Moving) -> None:
        try:
            with self._side.entered():
                moving.batch = map_tensors(moving.batch, functools.partial(self._sent, moving))
                moving.mark = self._side.mark()
        except Exception as error:  # told when it is this batch's turn
            moving.error, moving.batch, moving.parts = error, None, []
        moving.is_sent = True

    def _sent(self, moving: Moving, part: Any) -> Any:
        if _goes_ahead(part):
            copy = self._side.copied(part)
            moving.parts.append(copy)
            return copy
        if not has_method(part, "to"):
            return part  # it is pinned, and stays where it is
        moving.has_later = True
        return _Later(part)

    def _arrived(self, moving: Moving) -> Any:
        error, batch, parts = moving.error, moving.batch, moving.parts
        moving.error, moving.batch, moving.parts = None, None, []  # they are the user's now
        if error is not None:
            try:
                raise error
            finally:
                del error  # which refers to this frame, and would be there until the garbage collector comes by
        self._side.join(moving.mark)
        for part in parts:
            self._side.keep(part)
        return map_tensors(batch, self._moved_late) if moving.has_later else batch

    def _moved_late(self, part: Any) -> Any:
        return part.to(self._side) if isinstance(part, _Later) else part


@dataclass(slots=True, frozen=True)
class _Later:
    """Stands in a batch for a part of it that is moved on delivery."""

    part: Any

    def to(self, side: Side) -> Any:
        """What it stands for, moved. So named that it is a part too."""
        return side.copied(self.part)


def _goes_ahead(part: Any) -> bool:
    """Whether it can be copied on one stream and given to another."""
    if not isinstance(part, torch.Tensor):
        return has_method(part, "to") and has_method(part, "record_stream")
    is_plain = type(part).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not part.is_nested
    return is_plain and part.layout is torch.strided and part.device.type == "cpu"


_numbers = itertools.count()
_movers: weakref.WeakValueDictionary[int, Mover] = weakref.WeakValueDictionary()


def mover_of(number: int) -> Mover | None:
    """The mover of that number in this process, if its iteration is not over."""
    return _movers.get(number)


def mover_to(device: Any) -> Mover | None:
    """For a new iteration of the calling thread; None where batches stay in host memory. Raises `ConfigError`."""
    checked = checked_device(device)
    if checked is None:
        return None
    return Mover(Cuda(torch.cuda.current_device() if checked.index is None else checked.index))


def checked_device(device: Any) -> torch.device | None:
    """A CUDA device that there is; None for host memory. Raises `ConfigError`."""
    if device is None:
        return None
    if not isinstance(device, str | torch.device):
        raise ConfigError(f'device={device!r} must be a torch.device, or a str such as "cuda" or "cuda:0"')
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f'device={device!r} is no device of torch; give one such as "cuda" or "cuda:0"') from error
    if checked.type == "cpu":
        return None
    if checked.type != "cuda":
        raise ConfigError(
            f"device={str(device)!r}: batches are moved to CUDA devices only; leave device out, and move each batch "
            f"yourself: .to({str(device)!r})"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device={str(device)!r}: torch {torch.__version__} finds no CUDA device here; install a torch that is "
            "built for CUDA and see that nvidia-smi lists a device, or leave device out"
        )
    count = torch.cuda.device_count()
    if checked.index is not None and checked.index >= count:
        raise ConfigError(f"device={str(device)!r}: the CUDA devices here are cuda:0 to cuda:{count - 1}; give one")
    return checked


class Cuda:
    """torch's streams of the CUDA device `index`."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._stream = _side_stream(index)

    @contextmanager
    def entered(self) -> Iterator[None]:
        # The device too: a thread begins with device 0, and to go back from another device's stream to a stream of
        # that one would open a context there, of some hundred MB. What `torch.cuda.device` does on leaving does not.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def pinned(self, part: Any) -> Any:
        return pinned(part)

    def copied(self, part: Any) -> Any:
        if isinstance(part, torch.Tensor) or _takes(part.to, "non_blocking"):
            return part.to(self._device, non_blocking=True)
        return part.to(self._device)

    def mark(self) -> Any:
        return self._stream.record_event()

    def join(self, mark: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def keep(self, part: Any) -> None:
        part.record_stream(torch.cuda.current_stream(self._device))


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", index))  # type: ignore[no-untyped-call]


def _takes(function: Any, name: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # one that is not Python's may have none
        return False
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


_INERT = frozenset({str, bytes, bytearray, memoryview, int, float, complex, bool, type(None)})


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change(part)` in the place of each part. Its containers are copied, and stay what they are."""
    if type(value) in _INERT or isinstance(value, (str, bytes, type)):
        return value
    if isinstance(value, torch.Tensor) or has_method(value, "to") or has_method(value, "pin_memory"):
        return change(value)
    if isinstance(value, Mapping):
        if _are_inert(value.values()):
            return value
        return _mapping_like(value, {key: map_tensors(item, change) for key, item in value.items()})
    if isinstance(value, Sequence):
        return value if _are_inert(value) else _sequence_like(value, [map_tensors(item, change) for item in value])
    if dataclasses.is_dataclass(value):
        return _dataclass_like(value, change)
    return value


def has_method(value: Any, name: str) -> bool:
    """Whether it can be called; a field of that name is something else."""
    return callable(getattr(value, name, None))


def _are_inert(items: Iterable[Any]) -> bool:
    return _INERT.issuperset(map(type, items))


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """As torch makes it: a copy has what a mapping has beside its items; what can be neither is a dict."""
    try:
        if isinstance(value, MutableMapping):
            clone = copy.copy(value)
            clone.update(items)
            return clone
        return type(value)(items)  # type: ignore[call-arg]  # as most are made
    except TypeError:
        return items


def _sequence_like(value: Sequence[Any], items: list[Any]) -> Any:
    """The same for sequences; what cannot be made again, as a range cannot, is a list."""
    if isinstance(value, tuple):
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    try:
        if isinstance(value, MutableSequence):
            clone = copy.copy(value)
            for number, item in enumerate(items):
                clone[number] = item
            return clone
        return type(value)(items)  # type: ignore[call-arg]  # as most are made
    except TypeError:
        return items


def _dataclass_like(value: Any, change: Callable[[Any], Any]) -> Any:
    clone = copy.copy(value)
    for each in dataclasses.fields(value):
        if hasattr(value, each.name):
            # Frozen ones too: this one is new, and nobody else has seen it.
            object.__setattr__(clone, each.name, map_tensors(getattr(value, each.name), change))
    return clone
