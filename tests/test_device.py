"""Batches that arrive on a device, without one: a side stream that copies as late as it may; and with one, if there is.

What only a CUDA device can show is in the tests named `test_on_cuda_...`: run this file on a machine that has one.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import IterableDataset

import fastload
from fastload import device as transfer
from fastload.device import AHEAD_MAX, Mover, Moving
from tests.shards import corpus
from tests.torchloader.datasets import Mapped

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; run tests/test_device.py on a machine with one"
)


class LateSide:
    """A side stream that does nothing until something waits for it, and an allocator that reports what it would reuse.

    What was copied holds zeros until then. A copy that is gone before it was done is never done.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.queued: list[Callable[[], None]] = []
        self.done = 0
        self.copies: list[weakref.ref[torch.Tensor]] = []
        self._kept: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.pinned_in: list[str] = []
        self._in = threading.local()

    @contextmanager
    def entered(self) -> Iterator[None]:
        assert not self.is_entered
        self._in.side = True
        try:
            yield
        finally:
            self._in.side = False

    @property
    def is_entered(self) -> bool:
        return getattr(self._in, "side", False)

    def pinned(self, part: Any) -> Any:
        assert self.is_entered
        self.pinned_in.append(threading.current_thread().name)
        if isinstance(part, torch.Tensor):
            assert part.device.type == "cpu"
            return part.clone()
        return part.pin_memory() if hasattr(part, "pin_memory") else part

    def copied(self, part: Any) -> Any:
        if not self.is_entered:
            self.log.append("moved late")
            return part.to("cpu") if isinstance(part, torch.Tensor) else part.to(self)
        self.log.append("copied")
        if not isinstance(part, torch.Tensor):
            return part.to(self)
        made = torch.zeros_like(part)
        there = weakref.ref(made)
        self.copies.append(there)
        self.queued.append(lambda: _copy(part, there))
        return made

    def mark(self) -> int:
        assert self.is_entered
        self.log.append("mark")
        return len(self.queued)

    def join(self, mark: int) -> None:
        assert not self.is_entered
        self.log.append("join")
        while self.done < mark:
            self.queued[self.done]()
            self.done += 1

    def keep(self, part: Any) -> None:
        assert not self.is_entered
        self.log.append("keep")
        self._kept[id(part)] = part
        if not isinstance(part, torch.Tensor):
            part.record_stream(self)

    def has_kept(self, part: Any) -> bool:
        """Whether it was asked to."""
        return self._kept.get(id(part)) is part

    @property
    def copy_count(self) -> int:
        """Copies that are there."""
        return sum(each() is not None for each in self.copies)


def _copy(source: torch.Tensor, there: weakref.ref[torch.Tensor]) -> None:
    made = there()
    if made is not None:
        made.copy_(source)


@pytest.fixture
def side() -> LateSide:
    return LateSide()


@pytest.fixture
def mover(side: LateSide) -> Mover:
    return Mover(side)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, side: LateSide) -> str:
    """A device that is not there, but looks so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(transfer, "Cuda", lambda index: side)
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    else:
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    return "cuda"


@pytest.fixture
def no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `Ragged` pins itself, which takes an accelerator."""
    monkeypatch.setattr(fastload.Ragged, "pin_memory", lambda self: self)


def full(value: int, size: int = 4) -> torch.Tensor:
    return torch.full((size,), value)


# The mover


def test_a_batch_is_waited_for_before_it_is_delivered_and_its_memory_is_kept(side: LateSide, mover: Mover) -> None:
    moving = mover.begin({"x": full(1), "y": [full(2), "text"]})
    assert side.log == ["copied", "copied", "mark"]
    assert (side.copies[0]() == 0).all()  # on its way
    batch = mover.deliver(moving)
    assert side.log == ["copied", "copied", "mark", "join", "keep", "keep"]
    assert (batch["x"] == 1).all()
    assert (batch["y"][0] == 2).all()
    assert side.has_kept(batch["x"])
    assert side.has_kept(batch["y"][0])
    assert batch["x"] is side.copies[0]()


Pair = namedtuple("Pair", "x y")


@dataclass
class Sample:
    x: torch.Tensor


class Box:
    """An object that can name its tensors to a stream."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.recorded_on = tensor, None

    def to(self, side: LateSide) -> Box:
        return Box(side.copied(self.tensor))

    def record_stream(self, side: LateSide) -> None:
        side.keep(self.tensor)


class Opaque:
    """One that cannot."""

    def __init__(self, tensor: torch.Tensor, was_moved_on_side: bool | None = None) -> None:
        self.tensor, self.was_moved_on_side, self.is_pinned = tensor, was_moved_on_side, False

    def pin_memory(self) -> Opaque:
        self.is_pinned = True
        return self

    def to(self, side: LateSide) -> Opaque:
        assert self.is_pinned
        return Opaque(self.tensor, side.is_entered)


@pytest.mark.usefixtures("no_pinning")
def test_nothing_is_skipped_in_nested_batches(side: LateSide, mover: Mover) -> None:
    ragged = fastload.Ragged.from_items([b"a"])
    given = [full(1), (full(2), Pair(full(3), {"a": Sample(full(4))})), Box(full(5)), ("text", 6), None]
    found = mover.deliver(mover.begin(given))
    tensors = [found[0], found[1][0], found[1][1].x, found[1][1].y["a"].x, found[2].tensor]
    assert [int(tensor[0]) for tensor in tensors] == [1, 2, 3, 4, 5]
    assert all(map(side.has_kept, tensors))
    assert len(side.copies) == 5
    assert found[3:] == [("text", 6), None]
    assert mover.deliver(mover.begin([ragged, full(1)]))[0] == ragged


@pytest.mark.usefixtures("no_pinning")
def test_what_cannot_be_named_to_a_stream_is_moved_by_the_consumer(side: LateSide, mover: Mover) -> None:
    sparse = torch.eye(2).to_sparse()
    moving = mover.begin(
        {"x": full(1), "opaque": Opaque(full(2)), "sparse": [sparse], "empty": fastload.Ragged.from_items([])}
    )
    assert side.log == ["copied", "mark"]
    batch = mover.deliver(moving)
    assert side.log[2:] == ["join", "keep", "moved late", "moved late"]
    assert batch["opaque"].was_moved_on_side is False
    assert torch.equal(batch["sparse"][0].to_dense(), torch.eye(2))
    assert torch.equal(batch["x"], full(1))


def test_tensors_of_a_dispatch_of_their_own_are_moved_by_the_consumer() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's nested tensors are a prototype, it says
        nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged)
        strided = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    later = [nested, strided, torch.eye(2).to_sparse(), torch.ones(1, device="meta"), pack_sequence([torch.ones(1)])]
    assert not any(map(transfer._goes_ahead, later))
    assert all(map(transfer._goes_ahead, [torch.ones(1), torch.nn.Parameter(torch.ones(1)), torch.ones(2, 2).T]))


def test_so_many_are_ahead_and_the_oldest_come_first(side: LateSide, mover: Mover) -> None:
    begun = [mover.begin(full(number)) for number in range(6)]
    assert [moving.is_sent for moving in begun] == [True] * AHEAD_MAX + [False] * (6 - AHEAD_MAX)
    for number, moving in enumerate(begun):
        assert (mover.deliver(moving) == number).all()
        assert sum(moving.is_sent for moving in begun[number + 1 :]) == min(AHEAD_MAX, 5 - number)


def test_one_that_is_wanted_out_of_turn_is_sent_then(side: LateSide, mover: Mover) -> None:
    begun = [mover.begin(full(number)) for number in range(5)]
    for number in (4, 0, 3, 1, 2):
        assert (mover.deliver(begun[number]) == number).all()
        assert len(mover._ahead) <= AHEAD_MAX
    assert not mover._ahead


def test_what_is_dropped_is_gone_and_makes_room(side: LateSide, mover: Mover) -> None:
    begun = [mover.begin(full(number)) for number in range(4)]
    assert side.copy_count == AHEAD_MAX
    del begun[:AHEAD_MAX]
    assert side.copy_count == 0
    assert not mover._ahead
    last = mover.begin(full(9))  # and now the two that waited are sent
    assert [moving.is_sent for moving in (*begun, last)] == [True, True, False]
    batches = [weakref.ref(moving) for moving in (*begun, last)]
    del begun, last
    assert [batch() for batch in batches] == [None] * 3
    assert side.copy_count == 0


def test_an_error_of_a_copy_comes_when_it_is_the_turn_of_its_batch(side: LateSide, mover: Mover) -> None:
    class NoRoomError(MemoryError):
        pass

    class Broken(Box):
        def to(self, side: LateSide) -> Box:
            raise NoRoomError("of batch 1")

    begun = [mover.begin(batch) for batch in (full(0), [full(1), Broken(full(1))], full(2))]
    assert (mover.deliver(begun[0]) == 0).all()
    gc.disable()
    try:
        with pytest.raises(NoRoomError, match="of batch 1") as caught:
            mover.deliver(begun[1])
        error = weakref.ref(caught.value)
        del caught
        assert error() is None  # at once: its frames hold whatever is iterated
    finally:
        gc.enable()
    assert (mover.deliver(begun[2]) == 2).all()
    assert side.copy_count == 0


def test_a_stop_iteration_is_not_taken_for_the_end(mover: Mover) -> None:
    class Ending(Opaque):
        def to(self, side: Any) -> Any:
            raise StopIteration

    with pytest.raises(RuntimeError, match="moving a batch to its device raised StopIteration"):
        mover.deliver(mover.begin(Ending(full(1))))


def test_threads_begin_while_another_delivers(side: LateSide, mover: Mover) -> None:
    begun: dict[int, Moving] = {}

    def begin(first: int) -> None:
        for number in range(first, 400, 4):
            begun[number] = mover.begin({"x": full(number)})

    threads = [threading.Thread(target=begin, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for number in range(400):
        while number not in begun:
            pass
        assert (mover.deliver(begun.pop(number))["x"] == number).all()
        assert len(mover._ahead) <= AHEAD_MAX
    for thread in threads:
        thread.join()


# Loaders


def numbers_of(batches: Any) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


class Counting(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return (full(number) for number in range(start, 24, step))


KINDS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 2, "workers": "thread"},
    {"num_workers": 2, "workers": "process"},
    {"num_workers": 2, "workers": "thread", "persistent_workers": True},
    {"num_workers": 2, "workers": "process", "persistent_workers": True},
]


@pytest.mark.parametrize("dataset", [Mapped(24, full), Counting()], ids=["map", "iterable"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_foreign_batches_and_states_are_the_same(
    device: str, side: LateSide, dataset: Any, kind: dict[str, Any]
) -> None:
    host = fastload.DataLoader(dataset, batch_size=2, **kind)
    there = fastload.DataLoader(dataset, batch_size=2, device=device, **kind)
    expected = numbers_of(host)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batches = []
            for batch in there:
                assert side.has_kept(batch)
                batches.append(batch.tolist())
        assert batches == expected
    iterator = iter(there)
    for _ in range(5):
        next(iterator)
    state = there.state_dict()
    assert numbers_of(iterator) == expected[5:]
    there.load_state_dict(state)
    assert numbers_of(there) == expected[5:]
    host.load_state_dict(state)
    assert numbers_of(host) == expected[5:]
    host.close()
    there.close()
    del iterator, batch
    gc.collect()
    assert side.copy_count == 0


def test_foreign_batches_are_begun_where_they_are_pinned(device: str, side: LateSide) -> None:
    list(fastload.DataLoader(Mapped(4, full), num_workers=1, workers="thread", device=device))
    assert set(side.pinned_in) == {"fastload-worker-0"}
    side.pinned_in.clear()
    list(fastload.DataLoader(Mapped(4, full), num_workers=1, device=device))
    assert len(side.pinned_in) == 4
    assert threading.current_thread().name not in side.pinned_in


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_an_error_of_a_foreign_copy_comes_in_its_turn_and_the_rest_goes_on(
    device: str, side: LateSide, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    _fail_copies_of(monkeypatch, side, 3)
    iterator = iter(fastload.DataLoader(Mapped(8, full), batch_size=None, device=device, **kind))
    assert [int(next(iterator)[0]) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(MemoryError, match="no room for 3"):
        next(iterator)
    assert [int(batch[0]) for batch in iterator] == [4, 5, 6, 7]


def _fail_copies_of(monkeypatch: pytest.MonkeyPatch, side: LateSide, number: int) -> None:
    plain = side.copied

    def copied(part: Any) -> Any:
        if int(part.flatten()[0]) == number:
            raise MemoryError(f"no room for {number}")
        return plain(part)

    monkeypatch.setattr(side, "copied", copied)


DECODE = {"cls": fastload.decode.integer(), "bin": fastload.decode.raw()}


@pytest.fixture
def streamed(tmp_path: Path) -> Iterator[Callable[..., fastload.DataLoader[Any]]]:
    url = corpus(shard_count=3).write(tmp_path / "data")
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as cache:

        def make(**options: Any) -> fastload.DataLoader[Any]:
            dataset = fastload.StreamingDataset(
                url, cache=cache, shuffle=True, decode=DECODE, **options.pop("data", {})
            )
            return fastload.DataLoader(dataset, **{"batch_size": 4, **options})

        yield make


@pytest.mark.usefixtures("no_pinning")
@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 3}, {"num_workers": 1, "batch_size": None}])
def test_batches_and_states_of_our_data_sets_are_the_same(
    device: str, side: LateSide, streamed: Callable[..., Any], options: dict[str, Any]
) -> None:
    host, there = streamed(**options), streamed(**options, device=device)
    expected = [(batch["__key__"], torch.as_tensor(batch["cls"]).tolist()) for batch in host]
    iterator = iter(there)
    found = []
    for number, batch in enumerate(iterator):
        if isinstance(batch["cls"], torch.Tensor):
            assert side.has_kept(batch["cls"])
            assert isinstance(batch["bin"], fastload.Ragged)
        found.append((batch["__key__"], torch.as_tensor(batch["cls"]).tolist()))
        if number == 4:
            state = there.state_dict()
    assert found == expected
    host.load_state_dict(state)
    assert [batch["__key__"] for batch in host] == [key for key, _ in expected[5:]]
    there.load_state_dict(state)
    iterator = iter(there)
    assert next(iterator)["__key__"] == expected[5][0]
    there.close()  # with batches in flight
    host.close()
    del iterator, batch
    gc.collect()
    assert side.copy_count == 0


@pytest.mark.usefixtures("no_pinning")
def test_an_error_of_a_copy_of_ours_ends_the_iteration_and_can_be_resumed_before_it(
    device: str, side: LateSide, streamed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = streamed(num_workers=2, device=device)
    first = [batch["cls"].tolist() for batch in loader]
    loader = streamed(num_workers=2, device=device)
    with monkeypatch.context() as patched:
        _fail_copies_of(patched, side, first[3][0])
        iterator = iter(loader)
        assert [next(iterator)["cls"].tolist() for _ in range(3)] == first[:3]
        with pytest.raises(MemoryError, match="no room for"):
            next(iterator)
    loader.load_state_dict(loader.state_dict())
    assert [batch["cls"].tolist() for batch in loader] == first[3:]
    loader.close()


# The constructor


def test_it_stays_an_attribute_and_copies_have_it(device: str) -> None:
    for given in (None, "cpu", device, "cuda:1", torch.device("cuda", 0)):
        loader = fastload.DataLoader(Mapped(4, full), device=given)
        assert loader.device is given
        for other in (copy.copy(loader), copy.deepcopy(loader), pickle.loads(pickle.dumps(loader))):
            assert other.device == given
            assert numbers_of(other) == numbers_of(loader)


def test_host_memory_is_as_without_it() -> None:
    for given in (None, "cpu", torch.device("cpu")):
        assert transfer.mover_to(given) is None
    assert numbers_of(fastload.DataLoader(Mapped(2, full), device="cpu")) == [[[0] * 4], [[1] * 4]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mps", r"device='mps': batches are moved to CUDA devices only; .*\.to\('mps'\)"),
        (torch.device("meta"), r"device='meta': batches are moved to CUDA devices only"),
        ("gpu", "device='gpu' is no device of torch; give one such as"),
        (0, 'device=0 must be a torch.device, or a str such as "cuda"'),
        (True, "device=True must be"),
        ("cuda:2", "device='cuda:2': the CUDA devices here are cuda:0 to cuda:1"),
    ],
)
def test_devices_that_will_not_do(device: str, given: Any, message: str) -> None:
    with pytest.raises(fastload.ConfigError, match=message):
        fastload.DataLoader(Mapped(2, full), device=given)


def test_without_cuda_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(fastload.ConfigError, match=r"device='cuda:0': torch .* finds no CUDA device here; install"):
        fastload.DataLoader(Mapped(2, full), device="cuda:0")
    loader = fastload.DataLoader(Mapped(2, full))
    loader.device = "cuda"  # as frameworks set attributes
    with pytest.raises(fastload.ConfigError, match="finds no CUDA device here"):
        iter(loader)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_pin_memory_without_a_device_warns_as_torchs_and_does_no_more(
    streamed: Callable[..., Any], num_workers: int
) -> None:
    ours = streamed(pin_memory=True, num_workers=num_workers)
    with pytest.warns(UserWarning, match="pin_memory=True: there is no CUDA device here"):
        assert not any(batch["cls"].is_pinned() for batch in ours)
    ours.close()
    foreign = fastload.DataLoader(Mapped(4, full), pin_memory=True, num_workers=num_workers)
    with pytest.warns(UserWarning, match="'pin_memory' argument is set as true but no accelerator is found"):
        assert not any(batch.is_pinned() for batch in foreign)


# torch's streams, as `Cuda` calls them


def test_what_is_called_of_torch_and_in_which_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextmanager
    def entering(what: str) -> Iterator[None]:
        log.append(f"enter {what}")
        yield
        log.append(f"leave {what}")

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.name = f"side of {device}"

        def record_event(self) -> str:
            log.append(f"record on {self.name}")
            return "event"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    def current_stream(device: torch.device) -> Stream:
        stream = Stream(device)
        stream.name = f"current of {device}"
        return stream

    def to(self: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        log.append(f"to {device}, {non_blocking=}")
        return self

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entering(str(device)))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: entering(stream.name))
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: log.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: log.append(f"recorded on {stream.name}"))
    monkeypatch.setattr(transfer, "_side_stream", transfer._side_stream.__wrapped__)
    mover = Mover(transfer.Cuda(3))
    mover.deliver(mover.begin([full(1)]))
    enter = ["enter cuda:3", "enter side of cuda:3"]
    leave = ["leave side of cuda:3", "leave cuda:3"]
    assert log == [
        *(*enter, "pin", *leave),
        *(*enter, "to cuda:3, non_blocking=True", "record on side of cuda:3", *leave),
        *("current of cuda:3 waits for event", "recorded on current of cuda:3"),
    ]


class Plain:
    def to(self, device: Any) -> str:
        return "blocking"


class Patient:
    def to(self, *args: Any, **kwargs: Any) -> str:
        return f"non_blocking={kwargs['non_blocking']}"


def test_objects_are_moved_without_waiting_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_side_stream", lambda index: None)
    cuda = transfer.Cuda(0)
    assert (cuda.copied(Plain()), cuda.copied(Patient())) == ("blocking", "non_blocking=True")


# Many batches, with a device and without

BATCHES = 10_000
SLEEP_CYCLES = 50_000  # some ten microseconds


class SlowCuda(transfer.Cuda):
    """Sleeps before each copy."""

    def copied(self, part: Any) -> Any:
        torch.cuda._sleep(SLEEP_CYCLES)
        return super().copied(part)


@pytest.fixture(scope="module", autouse=True)
def _driver_is_up() -> None:
    """What the driver has open it keeps: it is to be there before the first test looks for what is left behind."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def torn_count(
    loader: Any, numbers_in: Callable[[Any], tuple[torch.Tensor, int]], is_consumer_slow: bool, on: str = "cuda"
) -> int:
    """How many elements were not what they were to be; `numbers_in` a batch: a tensor, and what it is full of.

    Nothing waits for the device before the end, and each batch is dropped as soon as its check is queued, so that its
    memory is used again for others while the check is still to run.
    """
    torn = torch.zeros((), dtype=torch.int64, device=on)
    for batch in loader:
        found, expected = numbers_in(batch)
        assert found.device.type == on
        if is_consumer_slow:
            torch.cuda._sleep(SLEEP_CYCLES)
        torn += (found != expected).sum()
        del batch, found
    return int(torn)


def large(number: int) -> tuple[torch.Tensor, int]:
    return full(number, 1 << 18), number


def small(number: int) -> tuple[torch.Tensor, int]:
    return full(number), number


def numbers_in_ours(batch: Any) -> tuple[torch.Tensor, int]:
    return batch["cls"], int(batch["__key__"][0].rpartition("/")[2])


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_no_batch_of_a_foreign_data_set_is_torn(device: str, side: LateSide, kind: dict[str, Any]) -> None:
    loader = fastload.DataLoader(Mapped(500, small), batch_size=None, device=device, **kind)
    assert torn_count(loader, lambda batch: batch, is_consumer_slow=False, on="cpu") == 0
    assert side.done == len(side.queued) == 500


@pytest.mark.usefixtures("no_pinning")
def test_no_batch_of_ours_is_torn(device: str, side: LateSide, streamed: Callable[..., Any]) -> None:
    loader = streamed(batch_size=1, num_workers=3, device=device)
    assert torn_count(loader, numbers_in_ours, is_consumer_slow=False, on="cpu") == 0
    assert side.done == len(side.queued) == len(loader)
    loader.close()


@needs_cuda
@pytest.mark.parametrize("slow", ["side", "consumer"])
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_on_cuda_no_batch_of_ten_thousand_is_torn(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], slow: str
) -> None:
    if slow == "side":
        monkeypatch.setattr(transfer, "Cuda", SlowCuda)
    loader = fastload.DataLoader(Mapped(BATCHES, large), batch_size=None, device="cuda", **kind)
    assert torn_count(loader, lambda batch: batch, slow == "consumer") == 0


@needs_cuda
@pytest.mark.parametrize("slow", ["side", "consumer"])
@pytest.mark.parametrize("num_workers", [0, 4])
def test_on_cuda_batches_of_our_data_sets_are_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_workers: int, slow: str
) -> None:
    if slow == "side":
        monkeypatch.setattr(transfer, "Cuda", SlowCuda)
    url = corpus(shard_count=10, samples_per_shard=BATCHES // 10, value_bytes=10).write(tmp_path / "data")
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes=0, service="inprocess") as cache:
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, decode=DECODE)
        loader = fastload.DataLoader(dataset, batch_size=1, num_workers=num_workers, device="cuda")
        assert torn_count(loader, numbers_in_ours, slow == "consumer") == 0
        loader.close()


@needs_cuda
def test_on_cuda_the_consumers_own_stream_is_the_one_that_waits() -> None:
    stream = torch.cuda.Stream()
    loader = fastload.DataLoader(Mapped(200, large), batch_size=None, num_workers=2, workers="thread", device="cuda")
    with torch.cuda.stream(stream):
        assert torn_count(loader, lambda batch: batch, is_consumer_slow=True) == 0


@needs_cuda
def test_on_cuda_the_device_that_is_named_is_used_and_the_current_one_stays() -> None:
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    for kind in KINDS:
        for batch in fastload.DataLoader(Mapped(4, full), device=f"cuda:{last}", **kind):
            assert batch.device == torch.device("cuda", last)
            assert torch.cuda.current_device() == before
