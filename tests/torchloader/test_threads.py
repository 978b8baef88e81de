"""Worker threads do what torch's worker processes do."""

import functools
import inspect
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.data.datapipes.iter import IterableWrapper

import fastload
from fastload.torchloader import thread_workers, worker_info
from tests.patience import PATIENCE_S
from tests.processes import until

FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Squares(Dataset):
    """`gates`: samples that wait for an event before they come."""

    def __init__(self, count: int = 20, gates: dict[int, threading.Event] | None = None) -> None:
        self.count, self.gates = count, gates or {}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if index in self.gates:
            assert self.gates[index].wait(60)
        if index >= self.count:
            raise IndexError(index)
        return index**2


class Uneven(IterableDataset):
    """Worker k has k + 2 samples, of the ten numbers from 10 k on."""

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        yield from range(10 * worker.id, 10 * worker.id + worker.id + 2)


def threaded(dataset, num_workers: int = 2, **options) -> fastload.DataLoader:
    return fastload.DataLoader(dataset, num_workers=num_workers, workers="thread", **options)


def values(loader) -> list:
    return [batch.tolist() if isinstance(batch, torch.Tensor) else batch for batch in loader]


def infos(batch: list) -> list:
    return [get_worker_info(), *batch]


@settings(deadline=None)
@given(
    count=st.integers(0, 30),
    batch_size=st.one_of(st.none(), st.integers(1, 7)),
    num_workers=st.integers(1, 4),
    prefetch=st.integers(1, 3),
    in_order=st.booleans(),
    seed=st.integers(0, 3),
)
def test_as_torch_reads_it(count, batch_size, num_workers, prefetch, in_order, seed) -> None:
    options = {"batch_size": batch_size, "shuffle": count > 0}
    torch.manual_seed(seed)
    expected = values(torch.utils.data.DataLoader(Squares(count), **options))
    torch.manual_seed(seed)
    found = values(threaded(Squares(count), num_workers, prefetch_factor=prefetch, in_order=in_order, **options))
    assert (found == expected) if in_order else (sorted(found) == sorted(expected))


@FORKS
@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_order_and_the_seeds_of_worker_processes(batch_size) -> None:
    options = {"batch_size": batch_size, "num_workers": 2, "multiprocessing_context": "fork", "timeout": 60}
    torch.manual_seed(5)
    expected = values(torch.utils.data.DataLoader(Uneven(), **options))
    del options["multiprocessing_context"]
    torch.manual_seed(5)
    assert values(threaded(Uneven(), **options)) == expected
    torch.manual_seed(5)
    base_seed = iter(torch.utils.data.DataLoader(Uneven()))._base_seed
    torch.manual_seed(5)
    found = [batch[0] for batch in threaded(Squares(4), collate_fn=infos)]
    assert [(worker.id, worker.num_workers, worker.seed) for worker in found] == [
        (k % 2, 2, base_seed + k % 2) for k in range(4)
    ]


def test_slow_workers_are_waited_for_or_not() -> None:
    gate = threading.Event()
    batches = iter(threaded(Squares(8, {0: gate}), in_order=False, batch_size=None))
    early = [next(batches) for _ in range(4)]
    assert 0 not in early
    gate.set()
    assert sorted([*early, *batches]) == [k**2 for k in range(8)]

    gates = {0: threading.Event()}
    batches = iter(threaded(Squares(8, gates), batch_size=None))
    opener = threading.Timer(0.05, gates[0].set)
    opener.start()
    assert list(batches) == [k**2 for k in range(8)]
    opener.join()


def test_no_more_than_prefetch_factor_batches_are_made_ahead() -> None:
    asked = []

    class Asked(Squares):
        def __getitem__(self, index: int) -> int:
            asked.append(index)
            return index

    for taken, _ in enumerate(threaded(Asked(40), prefetch_factor=3, batch_size=2)):
        assert max(asked) < 2 * (taken + 1 + 2 * 3)


def test_errors_come_in_their_place_with_the_traceback_of_the_thread() -> None:
    class Broken(Squares):
        def __getitem__(self, index: int) -> int:
            if index == 2:
                raise KeyError("no such sample")
            if index == 3:
                raise SystemExit(3)
            return index

    batches = iter(threaded(Broken(6), batch_size=None))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(
        KeyError, match=r"Caught KeyError in DataLoader worker thread 0(.|\n)*__getitem__(.|\n)*no such"
    ):
        next(batches)
    with pytest.raises(fastload.WorkerError, match=r"in DataLoader worker thread 1(.|\n)*SystemExit: 3"):
        next(batches)
    assert list(batches) == [4, 5]


def test_what_fails_at_the_start_fails_at_the_first_batch() -> None:
    def init(worker_id: int) -> None:
        raise ValueError(f"worker {worker_id} cannot begin")

    with pytest.raises(ValueError, match=r"in DataLoader worker thread 0(.|\n)*worker 0 cannot begin"):
        next(iter(threaded(Squares(), worker_init_fn=init)))

    class NoIterator(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            raise OSError("the tape is torn")

    with pytest.raises(OSError, match=r"in DataLoader worker thread 0(.|\n)*the tape is torn"):
        next(iter(threaded(NoIterator())))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_batches_of_threads_are_not_stacked_into_memory_for_another_process(make) -> None:
    dataset = [make([n, n]) for n in range(4)]
    for batch in threaded(dataset, batch_size=2):
        assert not batch.is_shared()


def test_worker_info_is_of_the_thread_that_asks_and_gone_with_the_last() -> None:
    own_code = get_worker_info.__code__
    dataset = Squares(4)
    batches = iter(threaded(dataset, collate_fn=infos))
    first = next(batches)[0]
    assert get_worker_info() is None
    assert first.dataset is dataset  # shared: no copies are needed
    if "rng" in inspect.signature(torch_worker.WorkerInfo).parameters:
        assert first.worker_method == "thread"
        second = next(batches)[0]
        draws = [worker.rng.torch_generator.initial_seed() for worker in (first, second)]
        assert draws == [first.seed, second.seed]
        assert first.rng.numpy_generator.random() != second.rng.numpy_generator.random()
    list(batches)
    until(lambda: not any(thread.name.startswith("fastload-worker") for thread in threading.enumerate()))
    assert get_worker_info.__code__ is own_code
    assert get_worker_info() is None


def test_a_data_set_is_copied_with_what_refers_to_it_if_it_has_to_be() -> None:
    class Collate:
        def __init__(self, dataset) -> None:
            self.dataset = dataset

        def __call__(self, batch: list) -> tuple:
            return self.dataset, get_worker_info().dataset

        def init(self, worker_id: int) -> None:
            assert get_worker_info().dataset is self.dataset
            self.dataset.number = worker_id

    dataset = Squares(4)
    collate = Collate(dataset)
    assert {id(found) for pair in threaded(dataset, collate_fn=collate) for found in pair} == {id(dataset)}
    pairs = list(threaded(dataset, collate_fn=collate, worker_init_fn=collate.init))
    assert [(mine.number, mine is other, mine is dataset) for mine, other in pairs] == [
        (k % 2, True, False) for k in range(4)
    ]
    assert not hasattr(dataset, "number")
    stream = Uneven()
    pairs = list(threaded(stream, collate_fn=Collate(stream)))
    assert len({id(mine) for mine, _ in pairs}) == 2
    assert all(mine is other and mine is not stream for mine, other in pairs)


def test_what_cannot_be_copied_is_shared_with_a_warning() -> None:
    stream = Uneven()
    stream.lock = threading.Lock()
    with pytest.warns(UserWarning, match=r'Uneven.*could not be copied.*lock.*workers="process"') as caught:
        assert values(threaded(stream, batch_size=None)) == [0, 10, 1, 11, 12]
    assert len(caught) == 1


def test_a_dropped_iterator_waits_for_nothing() -> None:
    gates = {k: threading.Event() for k in range(4, 20)}
    for batch in threaded(Squares(20, gates)):
        assert batch.tolist() == [0]
        break
    # Were anything waited for, the gates would open only after it.
    for gate in gates.values():
        gate.set()


def test_persistent_workers_go_on_from_epoch_to_epoch() -> None:
    begun = []

    def where(batch: list[int]) -> tuple:
        return batch, threading.get_ident()

    loader = threaded(
        Squares(9), batch_size=2, collate_fn=where, persistent_workers=True, worker_init_fn=begun.append, shuffle=True
    )
    epochs = [list(loader)]
    for batch in loader:  # broken off, with batches on their way
        del batch
        break
    epochs.append(list(loader))
    for epoch in epochs:
        assert sorted(sample for batch, _ in epoch for sample in batch) == [k**2 for k in range(9)]
    assert len({ident for epoch in epochs for _, ident in epoch}) == 2
    assert sorted(begun) == [0, 1]
    stream = threaded(Uneven(), batch_size=None, persistent_workers=True)
    assert values(stream) == values(stream) == [0, 10, 1, 11, 12]


def test_a_worker_init_fn_that_takes_too_long_is_an_error() -> None:
    gate = threading.Event()
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"):
        iter(threaded(Squares(3), timeout=0.05, worker_init_fn=lambda _: gate.wait(PATIENCE_S)))
    gate.set()


def test_a_batch_that_takes_too_long_is_an_error() -> None:
    gate = threading.Event()
    batches = iter(threaded(Squares(3, {0: gate}), timeout=0.05))
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.05 seconds"):
        next(batches)
    gate.set()
    del batches


def test_torch_has_one_thread_in_a_worker_and_elsewhere_what_it_had() -> None:
    def of_another_thread() -> int:
        found = []
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        return found[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = list(threaded(Squares(2), batch_size=None, collate_fn=lambda _: torch.get_num_threads()))
        assert (found, torch.get_num_threads(), of_another_thread()) == ([1, 1], 3, 3)
    finally:
        torch.set_num_threads(before)


def test_where_no_more_threads_can_be_had_those_that_began_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(worker: Any) -> None:
        if worker.name.endswith("-2"):
            raise RuntimeError("can't start new thread")
        start_thread(worker)

    start_thread = threading.Thread.start
    before = torch.get_num_threads()
    monkeypatch.setattr(thread_workers._WorkerThread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        iter(threaded(Squares(), num_workers=3))
    until(lambda: not any(isinstance(thread, thread_workers._WorkerThread) for thread in threading.enumerate()))
    assert torch.get_num_threads() == before


@FORKS
def test_a_forked_process_is_no_worker_and_has_no_threads() -> None:
    def child() -> None:
        with pytest.raises(RuntimeError, match="belong to the process that this one was forked from"):
            next(batches)
        assert get_worker_info() is None
        assert values(persistent) == [0, 1, 4]

    def forking(batch: list[int]) -> int:
        pid = os.fork()
        if not pid:
            os._exit(0 if get_worker_info() is None else 1)
        return os.waitpid(pid, 0)[1]

    persistent = threaded(Squares(3), batch_size=None, persistent_workers=True)
    assert values(persistent) == [0, 1, 4]
    batches = iter(threaded(Squares(3), batch_size=None))
    pid = os.fork()
    if not pid:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert list(batches) == [0, 1, 4]
    assert list(threaded(Squares(2), collate_fn=forking)) == [0, 0]


def test_a_process_ends_cleanly_with_threads_at_work(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, fastload\n"
        "class Endless(torch.utils.data.IterableDataset):\n"
        "    def __iter__(self):\n"
        "        while True:\n"
        "            yield torch.rand(64, 64) @ torch.rand(64, 64)\n"
        "kept = fastload.DataLoader(Endless(), num_workers=2, workers='thread', persistent_workers=True)\n"
        "next(iter(kept))\n"
        "batches = iter(fastload.DataLoader(Endless(), num_workers=2, workers='thread', prefetch_factor=100))\n"
        "next(batches)\n"
        "next(iter(fastload.DataLoader(Endless(), num_workers=2, workers='thread')))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (ended.returncode, ended.stderr) == (0, "")


class Pinnable:
    def __init__(self, samples: list) -> None:
        self.samples, self.pinned_in = samples, ""

    def pin_memory(self) -> "Pinnable":
        self.pinned_in = threading.current_thread().name
        return self


@pytest.mark.skipif(not hasattr(torch, "accelerator"), reason="this torch asks for CUDA itself")
def test_workers_pin_for_the_device_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would beside an accelerator, which need not be there."""
    used = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 5)
    monkeypatch.setattr(torch.accelerator, "set_device_index", used.append)
    batches = list(threaded(Squares(4), collate_fn=Pinnable, pin_memory=True))
    assert [batch.samples for batch in batches] == [[0], [1], [4], [9]]
    assert [batch.pinned_in for batch in batches] == ["fastload-worker-0", "fastload-worker-1"] * 2
    assert used == [5] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_pinned() -> None:
    for batch in threaded(Squares(4), pin_memory=True):
        assert batch.is_pinned()


def test_data_pipes_are_sharded_and_shuffled_alike() -> None:
    pipes = torch.utils.data.datapipes.iter
    pipe = pipes.IterableWrapper(range(20)).shuffle().sharding_filter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about data pipes
        loader = threaded(pipe, batch_size=None, persistent_workers=True, shuffle=True)
        torch.manual_seed(3)
        epochs = [values(loader), values(loader)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(20))] * 2
    assert epochs[0] != epochs[1]


def test_data_pipes_are_looked_through_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sets a hook of their class for that, and fails where another thread has set it."""
    alone = threading.Lock()

    def looked_through(look: Callable[..., Any], *arguments: Any) -> Any:
        assert alone.acquire(blocking=False)
        time.sleep(0.01)  # the others come meanwhile, if they may
        try:
            return look(*arguments)
        finally:
            alone.release()

    for name in ("apply_random_seed", "apply_sharding"):
        look = getattr(torch.utils.data.graph_settings, name)
        monkeypatch.setattr(torch.utils.data.graph_settings, name, functools.partial(looked_through, look))
    pipe = torch.utils.data.datapipes.iter.IterableWrapper(range(20)).shuffle().sharding_filter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about data pipes
        loader = threaded(pipe, batch_size=None, shuffle=True, num_workers=4)
        assert sorted(values(loader)) == list(range(20))


class Counting(Dataset):
    """Says how many samples were asked of this copy; the value of a sample is that number."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        self.asked += 1
        return 1000 * index + self.asked

    def state_dict(self) -> dict:
        return vars(self)  # which it goes on to change

    def load_state_dict(self, state: dict) -> None:
        self.asked = state["asked"]


class Stateful(Uneven):
    """Its iterations can say where they are."""

    def __init__(self, count: int = 9) -> None:
        self.count, self.next = count, 0

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        while self.next < self.count + worker.id:
            self.next += 1
            yield 100 * worker.id + self.next
        self.next = 0

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]


@settings(deadline=None)
@given(
    dataset=st.sampled_from([Squares, Counting, Stateful, Uneven]),
    batch_size=st.one_of(st.none(), st.integers(1, 4)),
    num_workers=st.integers(1, 3),
    prefetch=st.integers(1, 3),
    stop=st.integers(0, 8),
    persistent=st.booleans(),
    epoch=st.integers(0, 1),
)
def test_a_loader_goes_on_where_another_was(
    dataset, batch_size, num_workers, prefetch, stop, persistent, epoch
) -> None:
    def loader() -> fastload.DataLoader:
        options = {"shuffle": True} if issubclass(dataset, (Squares, Counting)) else {}
        return threaded(
            dataset(),
            num_workers,
            batch_size=batch_size,
            prefetch_factor=prefetch,
            persistent_workers=persistent,
            **options,
        )

    torch.manual_seed(stop)
    whole = loader()
    for _ in range(epoch):
        list(whole)
    batches = iter(whole)
    for _ in zip(range(stop), batches, strict=False):
        pass  # to the end of the epoch, it may be
    state = whole.state_dict()
    expected = values(whole if state["_iterator_finished"] else batches)
    other = loader()
    other.load_state_dict(state)
    assert values(other) == expected
    whole.close()
    other.close()


@FORKS
def test_states_are_the_same_for_threads_and_processes() -> None:
    for first, second in (("thread", "process"), ("process", "thread")):
        options = {"num_workers": 2, "batch_size": 2}
        batches = iter(loader := fastload.DataLoader(Stateful(), workers=first, **options))
        for _ in range(3):
            next(batches)
        state = loader.state_dict()
        other = fastload.DataLoader(Stateful(), workers=second, **options)
        other.load_state_dict(state)
        assert values(other) == values(batches)


def test_batches_out_of_order_are_not_given_again() -> None:
    gate = threading.Event()
    batches = iter(loader := threaded(Squares(8, {0: gate}), in_order=False, batch_size=None))
    early = [next(batches) for _ in range(4)]
    other = threaded(Squares(8), in_order=False, batch_size=None)
    other.load_state_dict(loader.state_dict())
    assert sorted([*early, *other]) == [k**2 for k in range(8)]
    gate.set()
    list(batches)


def test_the_loader_says_what_it_cannot_do() -> None:
    with pytest.raises(fastload.ConfigError, match=r'workers="side" is for a StreamingDataset.*not for Squares'):
        fastload.DataLoader(Squares(), num_workers=1, workers="side")
    with pytest.raises(fastload.ConfigError, match="workers='threads' must be"):
        fastload.DataLoader(Squares(), workers="threads")
    with pytest.warns(UserWarning, match="multiprocessing_context: ignored"):
        assert values(threaded(Squares(2), multiprocessing_context="fork", batch_size=None)) == [0, 1]
    cores = len(os.sched_getaffinity(0))
    threaded(Squares(), cores + 1)  # torch's warning is about processes
    with pytest.warns(UserWarning, match="worker processes"):
        fastload.DataLoader(Squares(), num_workers=cores + 1, workers="process")


def test_the_private_parts_of_torch_that_threads_use() -> None:
    """One that a release changes fails here first, by name."""
    assert get_worker_info.__code__.co_names == ("_worker_info",)
    assert get_worker_info is torch_worker.get_worker_info
    assert get_worker_info.__code__.co_freevars == worker_info._of_thread_or_process.__code__.co_freevars == ()
    known = set(inspect.signature(torch_worker.WorkerInfo).parameters)
    assert known == {"kwargs"} or {"id", "num_workers", "seed", "dataset"} <= known
    if hasattr(torch_worker, "_RNG"):
        assert list(inspect.signature(torch_worker._RNG).parameters) == [
            "random_generator",
            "torch_generator",
            "numpy_generator",
        ]
    kind = torch.utils.data.dataloader._DatasetKind
    assert list(inspect.signature(kind.create_fetcher).parameters) == [
        "kind",
        "dataset",
        "auto_collation",
        "collate_fn",
        "drop_last",
    ]
    assert list(inspect.signature(_BaseDataLoaderIter._reset).parameters) == ["self", "loader", "first_iter"]
    batches = iter(torch.utils.data.DataLoader(Squares()))
    assert isinstance(batches, _BaseDataLoaderIter)
    expected = {
        *("_dataset", "_dataset_kind", "_auto_collation", "_collate_fn", "_drop_last", "_num_workers", "_world_size"),
        *("_rank", "_pin_memory", "_pin_memory_device", "_timeout", "_base_seed", "_shared_seed"),
        *("_persistent_workers", "_sampler_iter", "_next_index"),
    }
    assert expected <= set(dir(batches))


def seed_all(worker: int) -> None:
    """As frameworks' functions for worker processes do."""
    random.seed(worker)
    np.random.seed(worker)
    torch.manual_seed(worker)


@pytest.mark.parametrize("persistent", [False, True])
def test_an_init_function_that_seeds_leaves_the_callers_generators_alone(persistent: bool) -> None:
    """The sampler's order comes from them, and so does what the trainer draws."""

    def drawn(workers: str) -> list[Any]:
        seed_all(7)
        loader = fastload.DataLoader(
            range(40),
            batch_size=4,
            shuffle=True,
            num_workers=2,
            worker_init_fn=seed_all,
            persistent_workers=persistent,
            workers=workers,
        )
        found: list[Any] = []
        for _ in range(2):
            for batch in loader:
                found += [batch.tolist(), random.random(), float(np.random.rand()), float(torch.rand(()))]
        loader.close()
        return found

    assert drawn("thread") == drawn("process")


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_data_pipes_are_seeded_as_in_torchs_workers(persistent_workers: bool) -> None:
    def epochs(kind: Any, **options: Any) -> list[list[int]]:
        torch.manual_seed(3)
        pipe = IterableWrapper(range(20)).shuffle().sharding_filter()
        loader = kind(pipe, batch_size=None, num_workers=2, persistent_workers=persistent_workers, **options)
        return [list(map(int, loader)) for _ in range(2)]

    expected = epochs(torch.utils.data.DataLoader)
    assert epochs(fastload.DataLoader, workers="thread") == expected
    assert sorted(expected[0]) == list(range(20)) != expected[0]
