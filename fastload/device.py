"""Batches that arrive on a CUDA device: `DataLoader(device="cuda")`.

A batch takes three steps. The thread that makes it calls `Mover.begin`, which pins it: its tensors are copied to memory
of torch's caching host allocator. Then it is sent: on the *side stream* of the device its tensors are copied from
pinned memory asynchronously, and an event is recorded behind the copies. The consumer calls `Mover.deliver`. The design
relies on these guarantees of torch:

- Work on one stream runs in order. On delivery the consumer's current stream is made to wait for the event, so what the
  user queues there runs after the copies. No thread waits for the device.
- Memory of a tensor belongs to the stream that was current when it was allocated, here the side stream, which may reuse
  it as soon as the tensor is freed. So each tensor is `record_stream`ed on the consumer's stream: its memory is then
  reused only after the work that was queued there when the tensor was freed.
- A pinned block from which a stream copies is not reused before the copy is done: `copy_` notifies the host allocator.
  So no reference to the source has to be kept.
- A batch that is dropped before its delivery was used by the side stream alone, and needs nothing.

At most `AHEAD_MAX` batches are sent and not delivered. The thread that makes a batch sends it if there is room;
otherwise the batch waits, pinned, until a delivery makes room, for which the oldest is sent first, or until its own
delivery. So no call here waits for anything but the lock, and the moment at which a batch is sent changes only timing.
The mover holds batches by weak references: a dropped batch, when an iteration is closed for example, frees its room.

`record_stream` needs the tensors themselves. A part that cannot pass them to a stream (it has `to`, but not
`record_stream`), or is not a plain tensor in host memory (sparse, nested, a subclass with a dispatch of its own), is
moved on delivery, on the consumer's own stream.

There is one side stream for each device, shared by all loaders of the process: the allocator keeps freed memory for the
stream that used it, so with a stream for each loader every loader would retain some.

`map_tensors` goes through the nested containers of a batch: those that torch's `pin_memory` goes into (mappings,
tuples, named tuples and other sequences, each rebuilt as its own type), and dataclasses. The parts are tensors and
objects that can be moved or pinned as a whole (`to`, `pin_memory`), even if they are containers too, since they know
best how. All other values stay as they are. Lists of numbers or text, such as the keys of a batch, are recognised by
the set of their types, without a step of Python for each item.
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
    """The value in page-locked memory, as torch's loader pins it."""
    return pin_memory.pin_memory(value)  # type: ignore[no-untyped-call]  # torch has no types here


class Side(Protocol):
    """The side stream of a device. Its methods may be called in any thread."""

    def entered(self) -> AbstractContextManager[None]:
        """Make the side stream this thread's current stream within the block."""
        ...

    def pinned(self, part: Any) -> Any:
        """A copy in page-locked memory."""
        ...

    def copied(self, part: Any) -> Any:
        """A copy on the device, which is valid once the current stream has reached this point."""
        ...

    def mark(self) -> Any:
        """An event behind all work that is queued on the side stream."""
        ...

    def join(self, mark: Any) -> None:
        """Make the current stream wait for the event."""
        ...

    def keep(self, part: Any) -> None:
        """Do not reuse its memory, once freed, before the work that is queued on the current stream then is done."""
        ...


@dataclass(slots=True, eq=False, weakref_slot=True)
class Moving:
    """A batch between `begin` and `deliver`. Once `is_sent`, it is on the device behind `mark`, or there is an `error`;
    `parts` are the copies on the side stream, and `has_later` says that some parts are moved on delivery.
    """

    batch: Any
    is_sent: bool = False
    mark: Any = None
    parts: list[Any] = field(default_factory=list)
    has_later: bool = False
    error: Exception | None = None


class Mover:
    """Moves the batches of one iteration. `mover_of(number)` finds it where only data can be passed on."""

    def __init__(self, side: Side) -> None:
        self.number = next(_numbers)
        self._side = side
        self._lock = threading.Lock()  # held while copies are queued, which takes microseconds
        self._waiting: deque[weakref.ref[Moving]] = deque()  # the oldest first; some may be sent, or dropped
        self._ahead: weakref.WeakSet[Moving] = weakref.WeakSet()  # sent and not delivered
        _movers[self.number] = self

    def begin(self, batch: Any) -> Moving:
        """Pin a batch, in the thread that made it. Raises what pinning raises."""
        with self._side.entered():  # so that its device is current
            moving = Moving(map_tensors(batch, self._pinned))
        with self._lock:
            self._waiting.append(weakref.ref(moving))
            self._send_waiting()
        return moving

    def deliver(self, moving: Moving) -> Any:
        """The batch on the device, for the consumer's thread. Raises what sending this batch raised."""
        with self._lock:
            if not moving.is_sent:
                self._send(moving)
            self._ahead.discard(moving)
            self._send_waiting()
        try:
            return self._arrived(moving)
        except StopIteration as error:  # which would end the consumer's loop
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
        except Exception as error:  # raised on this batch's delivery
            moving.error, moving.batch, moving.parts = error, None, []
        moving.is_sent = True

    def _sent(self, moving: Moving, part: Any) -> Any:
        if _goes_ahead(part):
            copy = self._side.copied(part)
            moving.parts.append(copy)
            return copy
        if not has_method(part, "to"):
            return part  # it is pinned, and stays in host memory
        moving.has_later = True
        return _Later(part)

    def _arrived(self, moving: Moving) -> Any:
        error, batch, parts = moving.error, moving.batch, moving.parts
        moving.error, moving.batch, moving.parts = None, None, []  # the user owns them now
        if error is not None:
            try:
                raise error
            finally:
                del error  # it refers to this frame: a cycle, which would live until garbage collection
        self._side.join(moving.mark)
        for part in parts:
            self._side.keep(part)
        return map_tensors(batch, self._moved_late) if moving.has_later else batch

    def _moved_late(self, part: Any) -> Any:
        return part.to(self._side) if isinstance(part, _Later) else part


@dataclass(slots=True, frozen=True)
class _Later:
    """A placeholder for a part of a batch that is moved on delivery."""

    part: Any

    def to(self, side: Side) -> Any:
        """The part on the device. The name makes the placeholder a part for `map_tensors`."""
        return side.copied(self.part)


def _goes_ahead(part: Any) -> bool:
    """Whether it can be copied on the side stream and handed to the consumer's."""
    if not isinstance(part, torch.Tensor):
        return has_method(part, "to") and has_method(part, "record_stream")
    is_plain = type(part).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not part.is_nested
    return is_plain and part.layout is torch.strided and part.device.type == "cpu"


_numbers = itertools.count()
_movers: weakref.WeakValueDictionary[int, Mover] = weakref.WeakValueDictionary()


def mover_of(number: int) -> Mover | None:
    """The mover with that number in this process; None if its iteration is over."""
    return _movers.get(number)


def mover_to(device: Any) -> Mover | None:
    """For a new iteration of the calling thread; None where batches stay in host memory. Raises `ConfigError`."""
    checked = checked_device(device)
    if checked is None:
        return None
    return Mover(Cuda(torch.cuda.current_device() if checked.index is None else checked.index))


def checked_device(device: Any) -> torch.device | None:
    """An existing CUDA device; None for host memory. Raises `ConfigError`."""
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
        # The device too: a thread begins with device 0, and going back from another device's stream to a stream of
        # device 0 would open a context there, of some hundred MB. Leaving `torch.cuda.device` does not.
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
    except ValueError:  # a function in C may have no signature
        return False
    return name in parameters or any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())


_INERT = frozenset({str, bytes, bytearray, memoryview, int, float, complex, bool, type(None)})


def map_tensors(value: Any, change: Callable[[Any], Any]) -> Any:
    """`value` with `change(part)` in place of each part. Its containers are copied and keep their types."""
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
    """Whether the attribute is callable; a mere field of that name does not count."""
    return callable(getattr(value, name, None))


def _are_inert(items: Iterable[Any]) -> bool:
    return _INERT.issuperset(map(type, items))


def _mapping_like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """As torch does it: a copy, which keeps a mapping's other attributes, or a new one, or else a dict."""
    try:
        if isinstance(value, MutableMapping):
            clone = copy.copy(value)
            clone.update(items)
            return clone
        return type(value)(items)  # type: ignore[call-arg]  # as most are made
    except TypeError:
        return items


def _sequence_like(value: Sequence[Any], items: list[Any]) -> Any:
    """The same for sequences; a type that cannot be constructed from items, such as range, becomes a list."""
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
            # Also where it is frozen: this instance is new, and not shared yet.
            object.__setattr__(clone, each.name, map_tensors(getattr(value, each.name), change))
    return clone
