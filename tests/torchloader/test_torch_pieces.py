"""What is used of torch beside its public interface: where a release changes it, this says what."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import _utils
from torch.utils.data._utils import collate, fetch, pin_memory, worker
from torch.utils.data.dataloader import (
    _BaseDataLoaderIter,
    _DatasetKind,
    _InfiniteConstantSampler,
    _MultiProcessingDataLoaderIter,
    _SingleProcessDataLoaderIter,
)

BASE, SINGLE, MANY = _BaseDataLoaderIter, _SingleProcessDataLoaderIter, _MultiProcessingDataLoaderIter


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (BASE.__init__, ["self", "loader"]),
        (SINGLE.__init__, ["self", "loader"]),
        (MANY.__init__, ["self", "loader"]),
        (MANY._reset, ["self", "loader", "first_iter"]),
        (MANY._try_put_index, ["self"]),
        (MANY._try_get_data, ["self", "timeout"]),
        (MANY._get_data, ["self"]),
        (MANY._mark_worker_as_unavailable, ["self", "worker_id", "shutdown"]),
        (MANY._shutdown_workers, ["self"]),
        (ExceptionWrapper.__init__, ["self", "exc_info", "where"]),
        (collate.collate_tensor_fn, ["batch", "collate_fn_map"]),
        (pin_memory.pin_memory, ["data", "device"]),
        (_DatasetKind.create_fetcher, ["kind", "dataset", "auto_collation", "collate_fn", "drop_last"]),
    ],
)
def test_functions_take_what_they_took(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters


def test_an_answer_is_processed_with_or_without_whose_it_is():
    """With, in newer releases."""
    assert list(inspect.signature(MANY._process_data).parameters) in (["self", "data"], ["self", "data", "worker_idx"])


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (BASE.__init__, "self._base_seed self._shared_seed self._sampler_iter = iter(self._index_sampler)"),
        (BASE._reset, "self._num_yielded = 0 self._sampler_iter = iter(self._index_sampler)"),
        (MANY.__init__, "super().__init__(loader) self._worker_init_fn = loader.worker_init_fn self._workers"),
        (MANY._reset, "super()._reset(loader self._send_idx = 0 self._task_info = {} self._worker_queue_idx_cycle"),
        (MANY._next_data, "self._rcvd_idx self._tasks_outstanding -= 1 self._task_info[idx] += (data,)"),
        (MANY._next_data, "self._workers_status isinstance(data, _utils.worker._IterableDatasetStopIteration)"),
        (worker._worker_loop, "_worker_info = WorkerInfo( init_fn(worker_id) _DatasetKind.create_fetcher("),
        (worker._worker_loop, "_IterableDatasetStopIteration(worker_id) ExceptionWrapper( "),
        (worker._worker_loop, "watchdog = ManagerWatchdog() watchdog.is_alive() MP_STATUS_CHECK_INTERVAL"),
        (collate.collate_tensor_fn, "torch.utils.data.get_worker_info() _new_shared("),
        (fetch._IterableDatasetFetcher, "self.dataset_iter = iter(dataset) self.ended self.collate_fn(data)"),
    ],
)
def test_code_that_is_built_upon_is_there(source, names):
    """Words that are looked for in torch's source, in any order."""
    text = inspect.getsource(source)
    missing = [word for word in names.split() if word not in text]
    assert not missing, f"{source.__qualname__} of torch {torch.__version__} lacks {missing}"


def test_other_names():
    assert isinstance(_utils.MP_STATUS_CHECK_INTERVAL, float)
    assert collate.default_collate_fn_map[torch.Tensor] is collate.collate_tensor_fn
    assert worker._IterableDatasetStopIteration(3).worker_id == 3
    assert next(iter(_InfiniteConstantSampler())) is None
    loader: Any = torch.utils.data.DataLoader(range(3), batch_size=2)  # type: ignore[arg-type]
    assert loader._dataset_kind == _DatasetKind.Map
    assert loader._index_sampler is loader.batch_sampler
