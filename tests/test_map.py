"""Functions of the user's on samples and batches: in worker processes, in one beside, in threads, in the caller; always
with the same result.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

import fastload
from fastload.errors import ConfigError, DecodeError, WaitTimeoutError, WorkerError
from tests.processes import until
from tests.shards import Corpus, corpus, tar_of

DECODE = {"bin": fastload.decode.raw(), "cls": fastload.decode.integer()}
PLACES = [("auto", 0), ("thread", 2), ("process", 2), ("side", 2)]


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus(4, 15)


@pytest.fixture
def new(data: Corpus, cache, tmp_path: Path) -> Callable[[], fastload.StreamingDataset]:
    """Makes a data set; one that pytest held until later would seem left behind."""
    url = data.write(tmp_path / "data")
    options = {"shuffle": True, "shuffle_window": "64KiB", "seed": 3, "decode": DECODE}
    return lambda **others: fastload.StreamingDataset(url, cache=cache, **{**options, **others})


def closing(dataset: Any, workers: str = "process", num_workers: int = 2, **options: Any) -> fastload.DataLoader:
    options = {"batch_size": 8, **options}
    return fastload.DataLoader(dataset, num_workers=num_workers, workers=workers, **options)


def run(dataset: Any, *args: Any, **options: Any) -> list[Any]:
    loader = closing(dataset, *args, **options)
    try:
        return list(loader)
    finally:
        loader.close()


def measured(sample: dict[str, Any]) -> dict[str, Any]:
    return {"cls": sample["cls"], "length": len(sample["bin"]), "key": sample["__key__"]}


def shouted(value: bytes) -> str:
    return value.decode("latin-1").upper()


def tenfold(value: bytes) -> tuple[int, float]:
    return 10 * int(value), random.random()


@pytest.mark.parametrize(("workers", "num_workers"), PLACES)
def test_a_column_is_decoded_by_any_function_of_bytes(new, data, workers, num_workers):
    dataset = new(decode={"CLS": tenfold, "bin": fastload.decode.raw()})
    batches = run(dataset.map(lambda sample: {**sample, "length": len(sample["bin"])}), workers, num_workers)
    plain = run(new(), "thread", 0)
    assert [batch["__key__"] for batch in batches] == [list(batch["__key__"]) for batch in plain]
    for batch, expected in zip(batches, plain, strict=True):
        numbers, chance = batch["CLS"]
        assert numbers.tolist() == [10 * number for number in expected["cls"].tolist()]
        assert batch["length"].tolist() == [len(value) for value in expected["bin"]]
        assert len(set(chance.tolist())) == len(chance)  # each sample has draws of its own
    if workers == "process":
        again = run(new(decode={"CLS": tenfold}), workers, 1)
        assert [batch["CLS"][1].tolist() for batch in again] == [batch["CLS"][1].tolist() for batch in batches]


def test_functions_of_bytes_in_tuples_and_of_columns_that_samples_may_lack(cache, tmp_path):
    samples = {f"{n:03d}": {"cls": b"7", **({"txt": b"abc"} if n % 2 else {})} for n in range(6)}
    (tmp_path / "a.tar").write_bytes(tar_of(samples))
    decode = {"cls": int, "txt?": shouted}
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode=decode, as_tuple=True)
    assert list(dataset) == [(7, "ABC" if n % 2 else None) for n in range(6)]
    (batch,) = run(dataset, "thread", 0)
    assert [batch[0].tolist(), list(batch[1])] == [[7] * 6, [None, "ABC"] * 3]
    broken = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode={"cls": float.fromhex, "txt?": int})
    with pytest.raises(TypeError) as caught:
        list(broken)
    assert "decode={'cls': float.fromhex, 'txt': int}, called with sample '000'" in "".join(caught.value.__notes__)


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "twice": batch["cls"] * 2}


@pytest.mark.parametrize(("workers", "num_workers"), PLACES)
def test_functions_are_applied_to_samples_and_then_to_batches(new, data, workers, num_workers):
    dataset = new()
    batches = run(dataset.map(measured).map_batch(doubled), workers, num_workers)
    plain = run(dataset, "thread", 0)
    assert [batch["key"] for batch in batches] == [batch["__key__"] for batch in plain]
    for batch, expected in zip(batches, plain, strict=True):
        assert batch["cls"].tolist() == expected["cls"].tolist()
        assert batch["twice"].tolist() == [2 * number for number in expected["cls"].tolist()]
        assert batch["length"].tolist() == [len(data.samples[key]["bin"]) for key in batch["key"]]


@pytest.mark.parametrize(("workers", "num_workers"), PLACES)
def test_a_batch_is_the_same_wherever_it_is_made(new, workers, num_workers):
    """Raw columns cross as they are: there and back without a copy."""
    dataset = new()
    made = run(dataset, workers, num_workers)
    dataset.set_epoch(0)
    for batch, expected in zip(made, run(dataset, "thread", 1), strict=True):
        assert batch["__key__"] == expected["__key__"]
        assert batch["bin"] == expected["bin"]
        assert torch.equal(batch["cls"], expected["cls"])
        batch["cls"].zero_()
        batch["bin"].values[:] = 0


def test_large_batches_cross_in_shared_memory_and_stay_as_they_are(cache, tmp_path):
    samples = {f"{n:03d}": {"npy": _npy(np.full((64, 1024), n, np.float32))} for n in range(24)}
    (tmp_path / "a.tar").write_bytes(tar_of(samples))
    dataset = fastload.StreamingDataset(
        tmp_path / "a.tar", cache=cache, decode={"npy": fastload.decode.array(shape=(64, 1024), dtype="float32")}
    )
    kept = run(dataset.map_batch(_halved), batch_size=2)
    for number, batch in enumerate(kept):
        assert batch["npy"][:, 0, 0].tolist() == [number, number + 0.5]
        assert (batch["npy"] == batch["npy"][:, :1, :1]).all()


def _npy(array: np.ndarray) -> bytes:
    import io

    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _halved(batch: dict[str, Any]) -> dict[str, Any]:
    batch["npy"] /= 2
    return batch


def whereabouts(sample: Any) -> tuple[int, str, int | None]:
    info = get_worker_info()
    return os.getpid(), threading.current_thread().name, None if info is None else info.id


def test_functions_run_in_processes_unless_they_are_to_share_the_trainers(new):
    dataset = new()
    mapped = dataset.map(whereabouts)
    pids, _, numbers = zip(*(place for batch in run(mapped, "auto", collate_fn=list) for place in batch), strict=True)
    assert len(set(pids) - {os.getpid()}) == 2
    assert set(numbers) == {0, 1}
    here = {place[0] for batch in run(mapped, "thread", collate_fn=list) for place in batch}
    assert here == {os.getpid()}
    pids, names, _ = zip(*(place for batch in run(mapped, "side", collate_fn=list) for place in batch), strict=True)
    assert len(set(pids)) == 1
    assert len(set(names)) == 2
    assert {place[0] for batch in run(mapped, "auto", 0, collate_fn=list) for place in batch} == {os.getpid()}


def noisy(sample: dict[str, Any]) -> tuple[Any, ...]:
    return sample["cls"], random.random(), float(np.random.rand()), float(torch.rand(()))


def drawn(batches: list[Any]) -> list[Any]:
    return [batch if isinstance(batch, dict) else [column.tolist() for column in batch] for batch in batches]


def test_what_functions_draw_is_the_same_with_any_number_of_workers_and_after_a_resume(new):
    dataset = new()
    mapped = dataset.map(noisy)
    expected = drawn(run(mapped, num_workers=1))
    assert len({number for batch in expected for number in batch[1]}) == sum(len(batch[0]) for batch in expected)
    mapped.set_epoch(0)
    loader = closing(mapped, num_workers=3)
    iterator = iter(loader)
    first = drawn([next(iterator) for _ in range(3)])
    state = loader.state_dict()
    loader.close()
    loader = closing(mapped, num_workers=2)
    loader.load_state_dict(state)
    assert first + drawn(list(loader)) == expected
    assert drawn(list(loader)) != expected  # another epoch
    loader.close()


def test_what_a_collate_fn_draws_for_single_samples_is_the_same_with_any_number_of_workers(new):
    dataset = new()
    options = {"batch_size": None, "collate_fn": lambda sample: random.random()}
    expected = run(dataset, num_workers=1, **options)
    dataset.set_epoch(0)
    assert run(dataset, num_workers=3, **options) == expected
    assert len(set(expected)) == len(expected)


def test_later_steps_draw_other_numbers(new):
    source = new().map(lambda sample: random.random())
    mixed = fastload.Mixture([(source, 1)]).map(lambda drawn: (drawn, random.random()))
    mixed = mixed.map_batch(lambda batch: [*batch, random.random()])
    for first, second, third in run(mixed, num_workers=1, batch_size=1):
        assert len({float(first), float(second), third}) == 3


def test_the_trainers_generators_are_left_alone(new):
    dataset = new()
    torch.manual_seed(1)
    expected = torch.rand(3).tolist()
    torch.manual_seed(1)
    run(dataset.map(noisy), "thread")
    untouched = [torch.rand(()).item() for _ in range(3)]
    assert untouched != expected  # the functions drew from them, as they would without us
    torch.manual_seed(1)
    run(dataset.map(noisy), "process")
    assert torch.rand(3).tolist() == expected


def test_samples_are_mapped_where_they_are_iterated(new):
    dataset = new()
    assert [sample["length"] for sample in dataset.map(measured)] == [len(sample["bin"]) for sample in dataset]
    loader = torch.utils.data.DataLoader(dataset.map(measured), batch_size=8, num_workers=1)
    assert sum(len(batch["cls"]) for batch in loader) == len(dataset)


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_samples_without_batches(new, workers):
    dataset = new()
    lengths = run(dataset.map(measured), workers, batch_size=None, collate_fn=lambda sample: sample["length"])
    assert lengths == [len(sample["bin"]) for sample in dataset]


def failing(sample: dict[str, Any]) -> Any:
    if sample["cls"] == 13:
        raise ZeroDivisionError("unlucky")
    return sample["cls"]


@pytest.mark.parametrize(("workers", "num_workers"), PLACES)
def test_an_error_comes_with_its_traceback_and_says_of_which_sample(new, workers, num_workers):
    dataset = new()
    with pytest.raises(ZeroDivisionError, match="unlucky") as raised:
        run(dataset.map(failing), workers, num_workers)
    assert any("failing, called with sample" in note and "000013" in note for note in raised.value.__notes__)
    if workers in ("process", "side"):
        assert 'raise ZeroDivisionError("unlucky")' in str(raised.value.__cause__)


class OddError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def oddly(sample: Any) -> Any:
    raise OddError(1, 2)


def test_an_error_that_does_not_pickle_is_told_in_words(new):
    dataset = new()
    with pytest.raises(WorkerError, match="raised OddError, which cannot be pickled: odd") as raised:
        run(dataset.map(oddly))
    assert "in oddly" in str(raised.value.__cause__)


def test_a_batch_that_does_not_pickle(new):
    dataset = new()
    with pytest.raises(Exception, match="pickle"):
        run(dataset.map_batch(lambda batch: lambda: batch))
    with pytest.raises(Exception, match="pickle"):
        closing(dataset.map(lambda sample: sample), multiprocessing_context="spawn").__iter__()


def test_stop_iteration_does_not_end_the_epoch(new):
    dataset = new()

    def stop(batch: Any) -> Any:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        run(dataset.map_batch(stop))


def kill_self(sample: dict[str, Any]) -> Any:
    if sample["cls"] == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return sample["cls"]


def test_a_worker_that_is_killed_is_an_error_and_the_next_epoch_has_others(new, tmp_path):
    dataset = new()
    flag = tmp_path / "die"
    flag.touch()

    def once(sample: dict[str, Any]) -> Any:
        return kill_self(sample) if flag.exists() else sample["cls"]

    loader = closing(dataset.map(once))
    with pytest.raises(WorkerError, match=r"worker process \d+ of the loader was ended by SIGKILL .*num_workers"):
        list(loader)
    flag.unlink()
    assert sorted(number for batch in loader for number in batch.tolist()) == list(range(len(dataset)))
    loader.close()


def sleepy(batch: Any) -> Any:
    time.sleep(600)


def test_a_timeout_names_the_worker(new):
    dataset = new()
    with pytest.raises(WaitTimeoutError, match=r"timeout=0.5 s waiting for worker process"):
        run(dataset.map_batch(sleepy), timeout=0.5)


def test_an_iteration_that_is_left_does_not_wait_for_a_function_for_ever(new, monkeypatch):
    dataset = new()
    monkeypatch.setattr("fastload.pipeline.workers._END_S", 0.2)
    loader = closing(dataset.map_batch(sleepy))
    iterator = iter(loader)
    pids = [process.pid for process in loader._stream._workers._processes]
    iterator.close()
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def started(number: int) -> None:
    random.seed("other")
    os.environ["STARTED_AS"] = str(number)


def test_worker_init_fn_runs_in_each_worker_and_its_error_is_told(new):
    dataset = new()
    mapped = dataset.map(lambda sample: int(os.environ["STARTED_AS"]))
    assert {n for batch in run(mapped, worker_init_fn=started, collate_fn=list) for n in batch} == {0, 1}

    def broken(number: int) -> None:
        raise KeyError(f"init of {number}")

    with pytest.raises(KeyError, match="init of"):
        run(mapped, worker_init_fn=broken)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_ways_to_start_workers(new, data, method):
    dataset = new()
    batches = run(dataset.map(measured), num_workers=1, multiprocessing_context=method)
    assert sorted(n for batch in batches for n in batch["cls"].tolist()) == list(range(len(data.samples)))


def looked_up(sample: Any) -> tuple[str, str, int]:
    info = get_worker_info()
    assert info is not None
    return type(info.dataset).__name__, info.dataset.label, info.num_workers


@pytest.mark.parametrize("options", [{}, {"workers": "side"}, {"multiprocessing_context": "forkserver"}])
def test_functions_find_the_data_set_in_the_worker_info(new, options):
    mapped = new().map(looked_up)
    mapped.label = "mine"
    found = {seen for batch in run(mapped, collate_fn=list, **options) for seen in batch}
    assert found == {("StreamingDataset", "mine", 1 if "workers" in options else 2)}


def test_torchs_own_collate_given_by_name_is_as_none(new):
    named = run(new(), "auto", collate_fn=torch.utils.data.default_collate)
    assert [batch["cls"].tolist() for batch in named] == [batch["cls"].tolist() for batch in run(new(), "auto")]
    assert all(isinstance(batch["bin"], fastload.Ragged) for batch in named)


def test_bad_samples_are_left_out_before_functions_see_them(cache, tmp_path):
    samples = {f"{n:03d}": {"cls": b"x" if n % 5 == 2 else str(n).encode(), "bin": b""} for n in range(30)}
    (tmp_path / "a.tar").write_bytes(tar_of(samples))
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode=DECODE, on_error="skip")
    with pytest.warns(UserWarning, match="skipped a sample"):
        batches = run(dataset.map(lambda sample: sample["cls"]))
    assert [number for batch in batches for number in batch.tolist()] == [n for n in range(30) if n % 5 != 2]
    strict = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode=DECODE)
    with pytest.raises(DecodeError, match="sample '002', column 'cls'"):
        run(strict.map_batch(doubled))


@pytest.mark.parametrize(("workers", "num_workers"), PLACES)
def test_mixtures(data, cache, tmp_path, workers, num_workers):
    urls = [data.write(tmp_path / name) for name in "ab"]
    first, second = (fastload.StreamingDataset(url, cache=cache, decode=DECODE, seed=n) for n, url in enumerate(urls))
    plain = run(fastload.Mixture([(first, 1), (second, 2)]), "thread", 1)
    mixed = fastload.Mixture([(first.map(measured), 1), (second.map(measured), 2)]).map_batch(doubled)
    batches = run(mixed, workers, num_workers)
    assert [batch["__source__"].tolist() for batch in batches] == [batch["__source__"].tolist() for batch in plain]
    assert [batch["key"] for batch in batches] == [batch["__key__"] for batch in plain]
    assert [batch["twice"].tolist() for batch in batches] == [(batch["cls"] * 2).tolist() for batch in plain]


def test_what_is_wrong_is_said_at_once(new):
    dataset = new()
    with pytest.raises(ConfigError, match=r"map\(3\): give a function"):
        dataset.map(3)
    with pytest.raises(ConfigError, match="call map"):
        dataset.map_batch(doubled).map(measured)
    with pytest.raises(ConfigError, match="workers='fibre'"):
        closing(dataset, "fibre")
    with pytest.raises(ConfigError, match="map_batch"):
        iter(dataset.map_batch(doubled))
    with pytest.raises(ConfigError, match="batch_size"):
        iter(closing(dataset.map_batch(doubled), batch_size=None))
    with pytest.raises(ConfigError, match="give them to the mixture"):
        fastload.Mixture([(dataset.map_batch(doubled), 1)])


def test_workers_end_with_the_loader_that_is_dropped(new):
    dataset = new()
    loader = closing(dataset.map(measured))
    iterator = iter(loader)
    next(iterator)
    pids = [process.pid for process in loader._stream._workers._processes]
    del loader, iterator
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert len(pids) == 2


def test_workers_end_at_once_also_while_another_loader_has_some(new, monkeypatch):
    """Whoever is forked later has inherited the ends of those before."""
    loaders = [closing(new().map(measured), num_workers=1) for _ in range(2)]
    iterators = [iter(loader) for loader in loaders]
    for iterator in iterators:
        next(iterator)
    terminated: list[BaseProcess] = []
    monkeypatch.setattr("fastload.pipeline.workers._END_S", 30.0)
    monkeypatch.setattr(BaseProcess, "terminate", terminated.append)
    for loader in loaders:
        loader.close()
    assert not terminated
