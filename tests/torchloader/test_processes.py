"""Worker processes over data sets that are not ours: what torch's loader gives, through memory that is used again, with
nothing left behind.
"""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import IterDataPipe, get_worker_info

import fastload
from fastload.errors import WorkerError
from fastload.torchloader.process_iterator import ProcessIterator
from fastload.transport.packing import Arrived
from tests.processes import until
from tests.programs import Program
from tests.torchloader.datasets import Mapped, Ranges, as_is

Pair = namedtuple("Pair", "x y")
LARGE = 20_000  # float64 values: more than what stays in the pickle


class Pinnable:
    """An object of the user's."""

    def __init__(self, number: int) -> None:
        self.number, self.is_pinned = number, False

    def pin_memory(self) -> Pinnable:
        self.is_pinned = True
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pinnable) and self.number == other.number


def of_any_kind(number: int) -> dict[str, Any]:
    return {
        "large": torch.full((LARGE,), number, dtype=torch.float64),
        "small": torch.full((3,), number),
        "array": np.full((100, 300), number),
        "nested": [Pair(number, {"text": str(number), "bytes": bytes([number])}), (number, 0.5)],
    }


def of_kinds_that_are_not_collated(number: int) -> Any:
    frozen = np.full(LARGE, number)
    frozen.flags.writeable = False
    return [
        Pinnable(number),
        torch.eye(300).to_sparse() * number,
        torch.nested.nested_tensor([torch.full((100, 200), 1.0 * number), torch.ones(2, 200)], layout=torch.jagged),
        torch.nested.nested_tensor([torch.full((100, 200), 1.0 * number), torch.ones(2, 9)]),
        torch.full((300, 200), number).t(),
        frozen,
        np.array(["a", None], object),
        b"x" * LARGE,
        None,
    ]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if a.is_nested or a.is_sparse:
            return type(a) is type(b) and a.layout == b.layout and all(map(same, _parts(a), _parts(b)))
        return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tolist() == b.tolist()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.unbind()) if tensor.is_nested else [tensor.to_dense()]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, of what it makes itself
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_batches_are_those_that_torch_gives(method):
    cases = [(of_any_kind, None, 4), (of_any_kind, None, None), (of_kinds_that_are_not_collated, as_is, 3)]
    for make, collate, batch_size in cases[2 * (method == "spawn") :]:  # a start takes seconds
        loaders = [
            kind(
                Mapped(6, make),
                batch_size=batch_size,
                num_workers=1,
                collate_fn=collate,
                multiprocessing_context=method if kind is fastload.DataLoader else "fork",
            )
            for kind in (torch.utils.data.DataLoader, fastload.DataLoader)
        ]
        for theirs, ours in zip(*loaders, strict=True):
            assert same(theirs, ours)


def test_what_the_user_gets_is_writable_and_stays_as_it_is_for_as_long_as_it_is_kept():
    kept = []
    loader = fastload.DataLoader(Mapped(60, of_any_kind), num_workers=2, batch_size=1)
    for number, batch in enumerate(loader):
        batch["large"] += 1
        batch["array"] += 1
        batch["small"] += 1
        if number % 3:
            kept.append((number + 1, batch["large"], batch["array"][:, 50:], batch["small"]))
    for number, *tensors in kept:
        assert all((tensor == number).all() for tensor in tensors)
    del batch, loader
    gc.collect()
    assert (kept[0][1] == kept[0][0]).all()  # also when the workers are gone


def test_memory_is_used_again_and_an_epoch_that_is_kept_as_a_whole_does_not_wait():
    loader = fastload.DataLoader(Mapped(100, open_descriptors), num_workers=1)
    iterator = iter(loader)
    assert isinstance(iterator, ProcessIterator)
    for _ in range(60):
        next(iterator)
    assert iterator._receiver is not None
    assert len(iterator._receiver._bases) < 10
    kept = list(iterator)
    assert len(kept) == 40
    counts = [int(count) for _, count in kept]
    assert max(counts) - min(counts) < 10  # the worker lets go of descriptors of what is kept
    assert (torch.stack([values[0, 0] for values, _ in kept]) == torch.arange(60, 100)).all()


def open_descriptors(number: int) -> Any:
    return torch.full((LARGE,), number), len(os.listdir("/proc/self/fd"))


def test_several_iterators_at_once_and_some_that_are_broken_off():
    loader = fastload.DataLoader(Mapped(12, of_any_kind), num_workers=1, batch_size=2)
    first, second = iter(loader), iter(loader)
    for a, b in zip(first, second, strict=True):
        assert same(a, b)
    for _ in range(2):
        for batch in loader:
            assert batch["small"][1, 0] == 1
            break


def test_persistent_workers_are_the_same_in_every_epoch():
    loader = fastload.DataLoader(Mapped(6, pid_of), num_workers=2, persistent_workers=True)
    epochs = [[int(pid) for _, pid in loader] for _ in range(2)]
    for _ in loader:  # some of an epoch that is broken off are on their way when the next begins
        break
    epochs.append([int(pid) for values, pid in loader if (values >= 0).all()])
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(set(epochs[0])) == 2
    loader.close()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in epochs[0]))
    assert [int(values[0, 0]) for values, _ in loader] == list(range(6))
    loader.close()


def pid_of(number: int) -> Any:
    return torch.full((LARGE,), number), os.getpid()


def seeds_of(number: int) -> Any:
    info = get_worker_info()
    return number, info.id, info.seed, torch.rand(1).item(), np.random.rand()


def test_order_and_seeds_are_those_of_torch():
    epochs = []
    for kind in (torch.utils.data.DataLoader, fastload.DataLoader):
        torch.manual_seed(3)
        loader = kind(Mapped(10, seeds_of), batch_size=2, shuffle=True, num_workers=2, collate_fn=as_is)
        epochs.append([list(loader), list(loader)])
    assert epochs[0] == epochs[1]
    assert epochs[0][0] != epochs[0][1]


class Marked(Ranges):
    """Refuses to be anything else than what the user gave."""

    mark = "as given"

    def __iter__(self) -> Any:
        assert self.mark == "found by worker_init_fn"
        return super().__iter__()


def find_dataset(worker: int) -> None:
    dataset = get_worker_info().dataset
    assert type(dataset) is Marked
    dataset.mark = "found by worker_init_fn"


def test_the_users_own_data_set_is_in_the_worker_info_already_when_worker_init_fn_runs():
    loader = fastload.DataLoader(Marked((3, 3)), num_workers=2, worker_init_fn=find_dataset)
    assert sorted(int(number) for number in loader) == list(range(6))


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(one, two)


def fails(number: int) -> Any:
    class LocalError(Exception):
        pass

    if number == 0:
        raise KeyError("no such thing")
    if number == 1:
        raise LocalError("that cannot be pickled")
    if number == 2:
        return [torch.zeros(LARGE), lambda: None]
    if number == 3:
        raise OddError(1, 2)
    return number


def test_errors_have_the_traceback_of_the_worker_and_the_next_batch_comes():
    iterator = iter(fastload.DataLoader(Mapped(5, fails), num_workers=1, collate_fn=as_is))
    with pytest.raises(KeyError, match="in fails"):
        next(iterator)
    with pytest.raises(WorkerError, match=r"(?s)worker process 0.*LocalError: that cannot be pickled"):
        next(iterator)
    with pytest.raises(AttributeError, match=r"(?s)in DataLoader worker process 0.*pickle"):
        next(iterator)
    with pytest.raises(RuntimeError, match=r"(?s)Caught OddError in DataLoader worker process 0"):
        next(iterator)
    assert next(iterator) == [4]


def init_fails(worker: int) -> None:
    raise ValueError(f"worker {worker} does not want to")


def test_an_error_of_worker_init_fn_is_raised():
    with pytest.raises(ValueError, match="does not want to"):
        list(fastload.DataLoader(Mapped(5, as_is), num_workers=1, worker_init_fn=init_fails))


def dies(number: int) -> Any:
    if number >= 100:
        os._exit(number - 100)
    if number:
        os.kill(os.getpid(), number)
    return number


@pytest.mark.parametrize(
    ("index", "message"),
    [(signal.SIGKILL, "SIGKILL.*lower num_workers"), (signal.SIGSEGV, "SIGSEGV.*spawn"), (103, "status 3")],
)
def test_a_worker_that_dies_is_an_error_with_the_signal_and_a_cure(index, message):
    loader = fastload.DataLoader(Mapped(200, dies), num_workers=2, sampler=[0, 0, index, 0], prefetch_factor=4)
    with pytest.raises(RuntimeError, match=f"(?s)DataLoader worker .*exited unexpectedly: worker .*{message}"):
        list(loader)


def interrupts(number: int) -> Any:
    if number == 3:
        os.kill(os.getppid(), signal.SIGINT)
    return number


def test_ctrl_c_ends_an_iteration():
    with pytest.raises(KeyboardInterrupt):
        list(fastload.DataLoader(Mapped(400, interrupts), num_workers=2))


def sleeps(number: int) -> Any:
    signal.pause()


def test_timeout(monkeypatch):
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1
    )  # how long it is waited for at the end
    with pytest.raises(RuntimeError, match=r"DataLoader timed out after 0\.2 seconds"):
        list(fastload.DataLoader(Mapped(4, sleeps), num_workers=1, timeout=0.2))


class Pipe(IterDataPipe[int]):
    def __iter__(self) -> Any:
        yield from range(20)


def test_data_pipes_are_sharded_and_shuffled_as_by_torch():
    epochs = []
    for kind in (torch.utils.data.DataLoader, fastload.DataLoader):
        torch.manual_seed(1)
        pipe = Pipe().shuffle().sharding_filter()
        epochs.append(list(kind(pipe, num_workers=2, batch_size=None, shuffle=True)))
    assert epochs[0] == epochs[1]
    assert sorted(epochs[0]) == list(range(20))


def test_what_is_pinned_is_the_batch():
    arrived = Arrived([Pinnable(1)], state={"a": 1}).pin_memory()
    assert arrived.batch[0].is_pinned
    assert arrived.state == {"a": 1}


def refused(*_: Any, **__: Any) -> Any:
    raise PermissionError("not here")


@pytest.mark.parametrize("call", ["memfd_create", "readlink"])
def test_where_the_kernel_refuses_batches_cross_in_torchs_way(monkeypatch, call):
    monkeypatch.setattr(os, call, refused)
    loader = fastload.DataLoader(Mapped(6, of_any_kind), num_workers=1)
    with pytest.warns(RuntimeWarning, match="torch's way, which is slower: not here"):
        batches = [batch["large"] for batch in loader]
    monkeypatch.undo()
    assert [batch[0, -1].item() for batch in batches] == list(range(6))


def no_more_memory(worker: int) -> None:
    os.memfd_create = refused
    warnings.simplefilter("ignore")


def test_a_worker_without_memory_sends_in_torchs_way():
    loader = fastload.DataLoader(Mapped(6, of_any_kind), num_workers=1, worker_init_fn=no_more_memory)
    assert [batch["large"][0, -1].item() for batch in loader] == list(range(6))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_nothing_is_left_when_the_trainer_is_killed(tmp_path, method):
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys, time, torch\n"
        "from torch.utils.data._utils import worker\n"
        "import fastload\n"
        "worker.MP_STATUS_CHECK_INTERVAL = 0.1  # how often a worker looks whether the trainer lives\n"
        "class Many(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 100\n"
        "    def __getitem__(self, i): return [torch.zeros(20_000, dtype=torch.uint8) for _ in range(20)]\n"
        "if __name__ == '__main__':\n"
        "    method, num_workers = sys.argv[1], int(sys.argv[2])\n"
        "    torch.multiprocessing.set_forkserver_preload(['fastload', 'torch'])\n"
        "    options = dict(num_workers=num_workers, prefetch_factor=4, multiprocessing_context=method)\n"
        "    iterator = iter(fastload.DataLoader(Many(), collate_fn=list, **options))\n"
        "    next(iterator)\n"
        "    print(*[w.pid for w in iterator._workers], flush=True)\n"
        "    time.sleep(1000)\n"
    )
    count = 1 if method == "spawn" else 2  # a start takes seconds
    with Program(script.read_text(), method, count, path=script) as trainer:
        pids = trainer.stdout.readline().split()
        trainer.kill()
    assert len(pids) == count
    until(lambda: not any(Path(f"/proc/{int(pid)}").exists() for pid in pids))
