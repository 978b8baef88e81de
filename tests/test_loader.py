"""The main job, end to end: shards in a real object store, through the cache service, into batches."""

import contextlib
import copy
import gc
import json
import os
import pickle
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastload
from fastload.pipeline.delivery import RunClosedError
from tests.patience import PATIENCE_S
from tests.processes import until
from tests.programs import run
from tests.shards import Corpus, check_samples, corpus, samples_of, tar_of

SMALL = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}


@pytest.fixture
def cache(tmp_path: Path):
    """With the service in this process, which starts at once."""
    with fastload.Cache(tmp_path / "cache", service="inprocess", **SMALL) as cache:
        yield cache


@pytest.fixture
def served(tmp_path: Path):
    """With a service that is a process."""
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        yield cache


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus()


def keys_of(loader: fastload.DataLoader, data: Corpus) -> list[str]:
    return [key for batch in loader for key in check_samples(data, samples_of(batch))]


# The order is the plan's, which does not know of threads: each is read with and without, if not in all ways.
@pytest.mark.parametrize(("shuffle", "num_workers"), [(False, 0), (False, 2), (True, 2), ("shards", 0)])
def test_every_sample_once_and_unharmed(s3, served, data: Corpus, num_workers: int, shuffle) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=served, shuffle=shuffle)
    loader = fastload.DataLoader(dataset, batch_size=16, num_workers=num_workers)
    keys = keys_of(loader, data)
    assert sorted(keys) == sorted(data.samples)
    assert (keys == list(data.samples)) == (shuffle is False)
    assert len(dataset) == dataset.sample_count == len(data.samples)
    assert len(loader) == -(-len(keys) // 16)
    second = keys_of(loader, data)
    assert sorted(second) == sorted(data.samples)
    assert (second == keys) == (shuffle is False)
    assert loader.stats()["fetched_bytes"] == 0
    loader.close()


def test_the_order_is_the_same_in_a_new_process_and_for_any_number_of_threads(s3, served, data: Corpus) -> None:
    url = data.put(s3)
    code = (
        "import sys, json, fastload\n"
        "cache = fastload.Cache(sys.argv[2], **json.loads(sys.argv[3]))\n"
        "dataset = fastload.StreamingDataset(sys.argv[1], cache=cache, shuffle=True, seed=5)\n"
        "loader = fastload.DataLoader(dataset, batch_size=7, num_workers=2)\n"
        "print(json.dumps([list(batch['__key__']) for batch in loader]))\n"
    )
    printed = run(code, url, served.directory, json.dumps(SMALL)).stdout
    for num_workers in (0, 1, 3):
        dataset = fastload.StreamingDataset(url, cache=served, shuffle=True, seed=5)
        loader = fastload.DataLoader(dataset, batch_size=7, num_workers=num_workers)
        assert [batch["__key__"] for batch in loader] == json.loads(printed)
        loader.close()


def test_local_files_patterns_and_lists(tmp_path: Path, cache, data: Corpus) -> None:
    folder = data.write(tmp_path / "shards")
    for urls in (
        folder,
        f"{folder}shard-{{0000..0005}}.tar",
        sorted(Path(folder).iterdir()),
        Path(folder) / "shard-0002.tar",
    ):
        dataset = fastload.StreamingDataset(urls, cache=cache)
        loader = fastload.DataLoader(dataset, batch_size=16)
        keys = keys_of(loader, data)
        if isinstance(urls, Path):
            assert keys == [key for key in data.samples if key.startswith("s02/")]
        else:
            assert keys == list(data.samples)
        loader.close()


def test_samples_of_iter(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
    with pytest.raises(TypeError, match="fastload warm"):
        len(dataset)
    samples = list(dataset)
    assert check_samples(data, samples) == list(data.samples)
    assert samples[0]["__url__"].endswith("shard-0000.tar")
    assert len(dataset) == len(samples)
    dataset.close()


def test_batches_are_the_users_own(s3, cache, data: Corpus) -> None:
    decode = {"cls": fastload.decode.integer(), "bin": fastload.decode.raw()}
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, decode=decode)
    loader = fastload.DataLoader(dataset, batch_size=10, num_workers=2)
    kept = []
    for batch in loader:
        assert isinstance(batch["cls"], torch.Tensor)
        assert batch["cls"].dtype == torch.int64
        assert isinstance(batch["bin"], fastload.Ragged)
        batch["cls"] += 1000
        batch["bin"].values[:] ^= 0xFF
        kept.append(batch)
    for batch in kept:
        for key, number, value in zip(batch["__key__"], batch["cls"].tolist(), batch["bin"], strict=True):
            assert number == 1000 + int(data.samples[key]["cls"])
            assert bytes(np.frombuffer(value, np.uint8) ^ 0xFF) == data.samples[key]["bin"]
    again = [batch["cls"] for batch in loader]
    assert torch.cat(again).tolist() == list(range(len(data.samples)))
    loader.close()


def test_columns_and_tuples(s3, cache, data: Corpus) -> None:
    url = data.put(s3)
    dataset = fastload.StreamingDataset(url, cache=cache, columns=["cls"])
    loader = fastload.DataLoader(dataset, batch_size=4)
    assert set(next(iter(loader))) == {"__key__", "__url__", "cls"}
    loader.close()
    decode = {"cls": fastload.decode.integer()}
    dataset = fastload.StreamingDataset(url, cache=cache, columns=["bin", "cls"], decode=decode, as_tuple=True)
    loader = fastload.DataLoader(dataset, batch_size=4)
    value, number = next(iter(loader))
    assert number.tolist() == [0, 1, 2, 3]
    assert value[2] == data.samples["s00/000002"]["bin"]
    loader.close()
    assert next(iter(dataset)) == (data.samples["s00/000000"]["bin"], 0)
    dataset.close()


def test_threads_say_what_they_ignore(cache) -> None:
    dataset = fastload.StreamingDataset("s3://bucket/a.tar", cache=cache)
    settings = {"num_workers": 1, "timeout": 5, "worker_init_fn": print, "in_order": False}
    ignored = r"worker_init_fn, timeout=5, in_order=False: ignored .* are heeded with workers=\"process\""
    with pytest.warns(UserWarning, match=ignored):
        fastload.DataLoader(dataset, **settings)
    with pytest.warns(UserWarning, match=ignored):
        fastload.DataLoader(dataset.map(dict), workers="thread", **settings)
    fastload.DataLoader(dataset.map(dict), **settings)  # processes heed them, and no warning comes


def test_a_users_collate_fn_gets_samples(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
    loader = fastload.DataLoader(
        dataset, batch_size=5, num_workers=2, collate_fn=lambda samples: [sample["__key__"] for sample in samples]
    )
    assert [key for batch in loader for key in batch] == list(data.samples)
    loader.close()


def test_batch_size_none_gives_samples(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
    loader = fastload.DataLoader(dataset, batch_size=None)
    assert check_samples(data, loader) == list(data.samples)
    loader.close()


def test_batch_sizes_must_agree(cache) -> None:
    dataset = fastload.StreamingDataset("s3://bucket/x.tar", cache=cache, batch_size=8)
    with pytest.raises(fastload.ConfigError, match=r"batch_size=4.*batch_size=8"):
        fastload.DataLoader(dataset, batch_size=4)
    fastload.DataLoader(dataset, batch_size=8)


@pytest.mark.parametrize(("tail", "world_size"), [("pad", 3), ("drop", 3), ("uneven", 3), ("pad", 2)])
def test_ranks_share_the_samples(s3, cache, data: Corpus, tail: str, world_size: int) -> None:
    url, keys, batches = data.put(s3), [], []
    repeats = 0
    for rank in range(world_size):
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, tail=tail, rank=rank, world_size=world_size)
        loader = fastload.DataLoader(dataset, batch_size=8, num_workers=1)
        mine = keys_of(loader, data)
        assert len(mine) == len(dataset)
        batches.append(len(loader))
        repeats += loader.stats()["repeats"]
        keys += mine
        loader.close()
    extra = len(keys) - len(data.samples)
    assert len(set(keys)) == len(keys) - max(extra, 0)
    if tail == "pad":
        assert set(keys) == set(data.samples)
        assert extra == repeats == -len(data.samples) % world_size
    elif tail == "drop":
        assert extra == -(len(data.samples) % world_size)
    else:
        assert sorted(keys) == sorted(data.samples)
    assert tail == "uneven" or len(set(batches)) == 1


# Where it stops is the same to the loader with and without threads.
@pytest.mark.parametrize(("stop_after", "num_workers"), [(0, 2), (1, 0), (5, 2), (16, 0)])
def test_resume_at_the_exact_next_sample(s3, tmp_path: Path, data: Corpus, num_workers: int, stop_after: int) -> None:
    url = data.put(s3)

    def loader_with(name: str) -> fastload.DataLoader:
        cache = fastload.Cache(tmp_path / name, **SMALL)
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, seed=3, shuffle_window="128KiB")
        return fastload.DataLoader(dataset, batch_size=8, num_workers=num_workers)

    whole = loader_with("one")
    expected = [[batch["__key__"] for batch in whole] for _ in range(2)]
    whole.close()
    broken = loader_with("one")
    for number, _ in enumerate(iter(broken)):
        if number + 1 >= stop_after:
            break
    if stop_after == 0:
        broken = loader_with("one")
    state = json.loads(json.dumps(broken.state_dict()))
    assert len(json.dumps(state)) < 1000
    broken.close()
    # Another cache: no shard is indexed there.
    resumed = loader_with("two")
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert [batch["__key__"] for batch in resumed] == expected[0][stop_after:]
    assert [batch["__key__"] for batch in resumed] == expected[1]
    resumed.close()


def test_state_of_another_run_is_refused(s3, cache, data: Corpus) -> None:
    url = data.put(s3)
    loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=8)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    other = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True, seed=1), batch_size=8)
    other.load_state_dict(state)
    with pytest.raises(fastload.StateError, match=r"seed 0.*seed 1|seed.*0.*1"):
        next(iter(other))
    for broken in ({}, {"version": 99}, {**state, "epoch": -1}, {**state, "position": {"version": 0}}, None):
        with pytest.raises(fastload.StateError):
            other.load_state_dict(broken)
    other.close()


def test_an_auto_window_goes_on_as_it_was_saved(s3, tmp_path: Path, data: Corpus) -> None:
    url = data.put(s3)

    def loader_with(name: str, ram_bytes: str, window: str = "auto") -> fastload.DataLoader:
        cache = fastload.Cache(tmp_path / name, **{**SMALL, "ram_bytes": ram_bytes})
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, shuffle_window=window)
        return fastload.DataLoader(dataset, batch_size=8)

    small = loader_with("small", "512KiB")
    expected = [[batch["__key__"] for batch in small] for _ in range(2)]
    small.close()
    small = loader_with("small", "512KiB")
    next(iter(small))
    state = small.state_dict()
    small.close()
    large = loader_with("large", "16MiB")
    large.load_state_dict(state)
    assert [batch["__key__"] for batch in large] == expected[0][1:]
    assert [batch["__key__"] for batch in large] == expected[1]
    large.close()
    fixed = loader_with("large", "16MiB", window="256KiB")
    fixed.load_state_dict(state)
    with pytest.raises(fastload.StateError, match=r"shuffle_window 131072.*262144"):
        next(iter(fixed))
    fixed.close()


def test_a_window_that_does_not_fit_is_made_smaller_with_one_warning(s3, tmp_path: Path, data: Corpus) -> None:
    url = data.put(s3)

    def loader_with(name: str, ram_bytes: str, window: str) -> fastload.DataLoader:
        cache = fastload.Cache(tmp_path / name, **{**SMALL, "ram_bytes": ram_bytes})
        dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, shuffle_window=window)
        return fastload.DataLoader(dataset, batch_size=8)

    fits = loader_with("a", "1MiB", "256KiB")
    expected = [batch["__key__"] for batch in fits]
    fits.close()
    shrunk = loader_with("a", "1MiB", "1MiB")
    with pytest.warns(
        UserWarning,
        match=r"shuffle_window=1.0 MiB is too large for 1.0 MiB of ram_bytes.*it is 256.0 KiB now. "
        r"Raise ram_bytes to 4.0 MiB",
    ):
        assert [batch["__key__"] for batch in shrunk] == expected
    with warnings.catch_warnings(action="error"):
        list(shrunk)
    shrunk.close()
    roomy = loader_with("b", "16MiB", "1MiB")
    batches = iter(roomy)
    next(batches)
    state = roomy.state_dict()
    rest = [batch["__key__"] for batch in batches]
    roomy.close()
    small = loader_with("a", "1MiB", "1MiB")
    small.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"the saved run has it, so it stays"):
        assert [batch["__key__"] for batch in small] == rest
    small.close()


def test_epochs(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
    loader = fastload.DataLoader(dataset, batch_size=50)
    first, second = ([batch["__key__"] for batch in loader] for _ in range(2))
    dataset.set_epoch(0)
    assert [batch["__key__"] for batch in loader] == first
    assert [batch["__key__"] for batch in loader] == second
    with pytest.raises(fastload.ConfigError, match="epoch=-1"):
        dataset.set_epoch(-1)
    loader.close()


def test_two_iterators_at_once(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
    loader = fastload.DataLoader(dataset, batch_size=16, num_workers=1)
    for one, other in zip(loader, loader, strict=True):
        assert one["__key__"] == other["__key__"]
    loader.close()


def train_and_fail(loader: fastload.DataLoader) -> None:
    for _batch in loader:
        raise RuntimeError("the user's own")


def feeders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastload-feed"]


def test_break_and_drop_leave_nothing(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
    loader = fastload.DataLoader(dataset, batch_size=4, num_workers=2)
    for _ in range(3):
        for _batch in loader:
            break
    until(lambda: not feeders())
    with pytest.raises(RuntimeError, match="the user's own"):
        train_and_fail(loader)
    for _sample in dataset:
        break
    del loader, dataset
    gc.collect()


def test_an_iterator_in_a_cycle_is_collected_in_any_thread(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)

    def collate(samples: list[dict]) -> int:
        if len(samples) < 4 or samples[0]["cls"] == b"0":
            gc.collect()  # in a decode thread, where the iterator's end would wait for itself
        return len(samples)

    loader = fastload.DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate)
    for _ in range(3):
        cycle = [iter(loader)]
        next(cycle[0])
        cycle.append(cycle)
        del cycle
        assert sum(loader) == len(data.samples)
    loader.close()


def test_close_in_mid_epoch_keeps_the_place(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
    for num_workers in (0, 2):
        loader = fastload.DataLoader(dataset, batch_size=4, num_workers=num_workers)
        batches = iter(loader)
        next(batches)
        loader.close()
        with pytest.raises(fastload.ServiceError, match="closed in mid-epoch"):
            next(batches)
        assert loader.state_dict()["position"]["batches"] == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_close_while_an_iteration_begins(s3, cache, data: Corpus, num_workers: int) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
    loader = fastload.DataLoader(dataset, batch_size=4, num_workers=num_workers)
    for number in range(8):
        closing = threading.Timer(0.004 * number, loader.close)
        closing.start()
        with contextlib.suppress(RunClosedError):
            assert sum(len(batch["__key__"]) for batch in loader) == len(data.samples)
        closing.join()
    loader.close()


def test_what_could_not_begin_is_begun_again(s3, cache, data: Corpus) -> None:
    url = data.put(s3)
    loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=8)
    expected = [batch["__key__"] for batch in loader]
    loader.close()
    loader = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=8)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    wrong = fastload.DataLoader(fastload.StreamingDataset(url, cache=cache, shuffle=True), batch_size=7)
    wrong.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(fastload.StateError, match="batch_size=7"):
            iter(wrong)
    assert wrong.state_dict() == state
    wrong.close()
    absent = fastload.StreamingDataset(f"{s3.url}/later/", cache=cache, shuffle=True)
    loader = fastload.DataLoader(absent, batch_size=8)
    for _ in range(2):
        with pytest.raises(fastload.ObjectMissingError):
            iter(loader)
    data.put(s3, "later")
    assert [batch["__key__"] for batch in loader] != []
    assert absent.next_epoch() == 1
    assert len(expected) == len(loader)
    loader.close()


def test_a_cache_that_was_closed_is_opened_again(s3, cache, data: Corpus) -> None:
    loader = fastload.DataLoader(fastload.StreamingDataset(data.put(s3), cache=cache), batch_size=8, num_workers=1)
    assert len(keys_of(loader, data)) == len(data.samples)
    cache.close()
    assert len(keys_of(loader, data)) == len(data.samples)
    batches = iter(loader)
    next(batches)
    cache.close()
    loader.close()
    assert len(keys_of(loader, data)) == len(data.samples)
    loader.close()


def test_iterations_side_by_side_have_their_own_progress(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
    loader = fastload.DataLoader(dataset, batch_size=8)
    old = iter(loader)
    next(old)
    new = iter(loader)
    del old
    for _ in range(2):
        next(new)
    assert loader.stats()["batches"] == 2
    assert loader.state_dict()["epoch"] == 1
    assert loader.state_dict()["position"]["batches"] == 2
    loader.close()


def test_a_subclass_with_samples_of_its_own(s3, cache, data: Corpus) -> None:
    class Named(fastload.StreamingDataset):
        def __iter__(self):
            return ({"name": sample["__key__"]} for sample in super().__iter__())

    dataset = Named(data.put(s3), cache=cache)
    loader = fastload.DataLoader(dataset, batch_size=8)
    assert [name for batch in loader for name in batch["name"]] == list(data.samples)
    dataset.close()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_copies_of_a_loader(s3, cache, data: Corpus, copied) -> None:
    loader = fastload.DataLoader(fastload.StreamingDataset(data.put(s3), cache=cache), batch_size=8, num_workers=1)
    next(iter(loader))
    twin = copied(loader)
    loader.close()
    del loader
    twin.dataset.set_epoch(0)
    assert keys_of(twin, data) == list(data.samples)
    twin.close()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_iterates_a_loader_in_use(s3, served, data: Corpus) -> None:
    loader = fastload.DataLoader(fastload.StreamingDataset(data.put(s3), cache=served), batch_size=8, num_workers=2)
    batches = iter(loader)
    next(batches)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(fastload.FastloadError, match=f"begun by process {os.getppid()}.*iterate anew"):
                next(batches)
            loader.dataset.set_epoch(0)
            status = 0 if keys_of(loader, data) == list(data.samples) else 2
            loader.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sum(len(batch["__key__"]) for batch in batches) == len(data.samples) - 8
    loader.close()


def test_what_is_in_use_when_a_data_set_is_closed_is_disconnected_when_it_ends(tmp_path: Path, data: Corpus) -> None:
    cache = fastload.Cache(tmp_path / "cache", service="inprocess", **SMALL)
    dataset = fastload.StreamingDataset(data.write(tmp_path / "data"), cache=cache)
    samples = iter(dataset)
    next(samples)
    dataset.close()
    consumers = [thread for thread in threading.enumerate() if thread.name.startswith("fastload-consumer")]
    assert consumers
    assert sum(1 for _ in samples) == len(data.samples) - 1
    for thread in consumers:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    cache.close()


def test_shards_with_other_columns_are_refused(s3, cache) -> None:
    s3.put("mixed/0.tar", tar_of({"a/0": {"x": b"0", "y": b"0"}}))
    s3.put("mixed/1.tar", tar_of({"b/0": {"x": b"1"}}))
    for batch_size in (1, 2):
        loader = fastload.DataLoader(fastload.StreamingDataset(f"{s3.url}/mixed/", cache=cache), batch_size=batch_size)
        with pytest.raises(fastload.MissingColumnError, match="columns="):
            list(loader)
        loader.close()


def test_stats(s3, served, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=served)
    loader = fastload.DataLoader(dataset, batch_size=16, num_workers=2)
    assert loader.stats()["batches"] == 0
    keys_of(loader, data)
    stats = loader.stats()
    assert stats["samples"] == len(data.samples)
    assert stats["batches"] == len(loader)
    assert stats["remote_bytes"] == stats["fetched_bytes"] == data.byte_count
    assert stats["remote_share"] == 1.0
    assert stats["requests"] >= 6
    assert 0 < stats["first_batch_s"] <= stats["elapsed_s"]
    keys_of(loader, data)
    stats = loader.stats()
    assert stats["epoch"] == 1
    assert stats["ram_share"] == 1.0
    assert stats["fetched_bytes"] == stats["requests"] == 0
    loader.close()
    assert loader.stats() == stats


def test_an_arena_of_two_chunks_is_enough(s3, tmp_path: Path) -> None:
    data = corpus(shard_count=3, samples_per_shard=10, value_bytes=60_000)
    with fastload.Cache(tmp_path / "cache", service="inprocess", **{**SMALL, "ram_bytes": "128KiB"}) as cache:
        dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
        loader = fastload.DataLoader(dataset, batch_size=8, num_workers=2)
        for _ in range(2):
            assert sorted(keys_of(loader, data)) == sorted(data.samples)
        assert loader.stats()["fetched_bytes"] == 0
        loader.close()


def test_samples_that_span_chunks(s3, tmp_path: Path) -> None:
    data = corpus(shard_count=2, samples_per_shard=8, value_bytes=400_000)
    with fastload.Cache(tmp_path / "cache", service="inprocess", **{**SMALL, "disk_bytes": 0}) as cache:
        dataset = fastload.StreamingDataset(data.put(s3), cache=cache, shuffle=True)
        loader = fastload.DataLoader(dataset, batch_size=4, num_workers=2)
        assert sorted(keys_of(loader, data)) == sorted(data.samples)
        loader.close()


def test_empty_shards_and_few_samples(s3, cache) -> None:
    data = corpus(shard_count=1, samples_per_shard=1)
    s3.put("odd/0.tar", b"\0" * 1024)
    s3.put("odd/1.tar", next(iter(data.shards.values())))
    s3.put("odd/3.tar", b"\0" * 10240)
    for rank in range(3):
        dataset = fastload.StreamingDataset(f"{s3.url}/odd/", cache=cache, shuffle=True, rank=rank, world_size=3)
        loader = fastload.DataLoader(dataset, batch_size=8)
        assert keys_of(loader, data) == list(data.samples)
        loader.close()


def test_the_default_cache(s3, tmp_path: Path, data: Corpus, monkeypatch) -> None:
    monkeypatch.setenv("FASTLOAD_CACHE", str(tmp_path / "named"))
    loader = fastload.DataLoader(fastload.StreamingDataset(data.put(s3)), batch_size=16)
    assert keys_of(loader, data) == list(data.samples)
    assert (tmp_path / "named" / "cache.json").exists()
    loader.close()


def test_other_data_sets_are_torchs(tmp_path: Path) -> None:
    loader = fastload.DataLoader(list(range(10)), batch_size=4, shuffle=False)
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert isinstance(loader, torch.utils.data.DataLoader)
    assert len(loader) == 3
    loader.close()
    with pytest.raises(TypeError, match=r"peek\(\) needs a fastload.StreamingDataset"):
        loader.peek()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cache": 3}, r"cache=3 must be a fastload.Cache, or the directory of one"),
        ({"decode": ["bin"]}, r"decode=\['bin'\] is not a dict"),
        ({"decode": {"jpg": "pil"}}, r"decode\['jpg'\]='pil' is not a decoder"),
        ({"decode": {"jpg": fastload.decode.image}}, r"call it: fastload.decode.image\(...\)"),
        ({"decode": {"__key__": str}}, r"__key__ is given with every sample and cannot be decoded"),
        ({"columns": "jpg"}, r"columns='jpg' is one string"),
        ({"columns": [".jpg"]}, r"'.jpg' is not a name such as 'jpg'"),
        ({"as_tuple": True}, "as_tuple=True needs columns or decode"),
        ({"shuffle": "samples"}, 'shuffle=.samples. must be False, True, "window", "shards" or "global"'),
        ({"replicas": 0}, "replicas=0 must be an integer of at least 1"),
        ({"partitions": True}, "partitions=True must be an integer of at least 1"),
        ({"rank": 0, "world_size": 3, "replicas": 2}, "replicas=2 must divide world_size=3"),
        ({"shuffle_window": 0}, "shuffle_window=0 must be at least 1"),
        ({"seed": "x"}, "seed='x' must be an integer"),
        ({"tail": "cut"}, "tail='cut' must be"),
        ({"batch_size": "16"}, "batch_size='16' must be an integer"),
        ({"world_size": 2}, "world_size is set but rank is not"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be from 0 to 1"),
        ({"urls": []}, "names no shard"),
    ],
)
def test_arguments_that_cannot_be_used(cache, options: dict, says: str) -> None:
    arguments = {"urls": "s3://bucket/x.tar", "cache": cache, **options}
    with pytest.raises(fastload.ConfigError, match=says):
        fastload.StreamingDataset(**arguments)
