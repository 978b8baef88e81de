"""`torch.utils.data.get_worker_info()` in worker threads.

torch keeps the worker info in a global of a module, one for a whole process. Worker threads have one each, and threads
of the trainer none. Users hold the function itself (`from torch.utils.data import get_worker_info`), so replacing it in
the module would not reach them; and outside workers it has to return None, so the global cannot hold an object that
distinguishes threads. So while there are worker threads, the function has other *code*, which looks up the calling
thread before the global; when the last of them ends, its own code is restored.

torch's collate calls it too, and in a worker stacks tensors into shared memory, to send them to another process.
Batches of threads are not sent; so for collate it returns None.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch.utils.data._utils import collate as torch_collate
from torch.utils.data._utils import worker as torch_worker

from fastload.lifecycle import on_fork


class _Thread(threading.local):
    """The info of each thread, if it has one."""

    info: Any = None

    def seen(self, otherwise: Any) -> Any:
        """The return value of `get_worker_info()` for its caller."""
        if self.info is None:
            return otherwise
        caller = sys._getframe(2)
        return None if caller.f_code is torch_collate.collate_tensor_fn.__code__ else self.info


_changing = threading.Lock()
_threads = 0  # that have an info now
_original: CodeType | None = None  # the function's own code, while it is replaced

# Names as in torch's module, whose globals this code sees once it is the code of torch's function.
_worker_info: Any = None
_fastload_thread = _Thread()


def _of_thread_or_process() -> Any:
    return _fastload_thread.seen(_worker_info)


@contextmanager
def worker_thread(info: Any) -> Iterator[None]:
    """Within the block, `get_worker_info()` returns `info` in this thread."""
    _look_at_threads()
    _fastload_thread.info = info
    try:
        yield
    finally:
        _fastload_thread.info = None
        _one_thread_less()


def info_of_thread(number: int, count: int, base_seed: int, dataset: Any) -> Any:
    """torch's `WorkerInfo`, as in a worker process, with generators where this version of torch has a field for them.

    The global generators of Python, numpy and torch are the trainer's, so a thread does not seed them.
    """
    seed = base_seed + number
    more: dict[str, Any] = {}
    if hasattr(torch_worker, "_RNG"):
        generator = torch.Generator()
        generator.manual_seed(seed)
        numpy_seed = torch_worker._generate_state(base_seed, number)  # type: ignore[no-untyped-call]
        rng = torch_worker._RNG(random.Random(seed), generator, np.random.default_rng(numpy_seed))
        more = {"rng": rng, "worker_method": "thread"}
    return torch_worker.WorkerInfo(id=number, num_workers=count, seed=seed, dataset=dataset, **more)


def _look_at_threads() -> None:
    global _threads, _original
    with _changing:
        if not _threads:
            vars(torch_worker)["_fastload_thread"] = _fastload_thread
            _original = torch_worker.get_worker_info.__code__
            torch_worker.get_worker_info.__code__ = _of_thread_or_process.__code__
        _threads += 1


def _one_thread_less() -> None:
    global _threads
    with _changing:
        _threads -= 1
        if not _threads:
            _restore()


def _restore() -> None:
    global _original
    if _original is not None:
        torch_worker.get_worker_info.__code__ = _original
        _original = None  # the name in torch's module stays: a caller may be about to look it up


@on_fork
def _begin_as_child() -> None:
    """A child that a worker thread forked is not a worker, and has none of the other threads."""
    global _changing, _threads, _fastload_thread
    _changing, _threads = threading.Lock(), 0
    _fastload_thread = _Thread()
    _restore()
