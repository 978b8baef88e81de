"""What everybody types first works, and what was made says what it is."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler, TensorDataset

import fastload
from fastload import prepare
from fastload import prepare as warming
from fastload.client import cache as cache_module
from fastload.plan import RequestedOrder
from tests.processes import service_pids, until
from tests.shards import check_samples, corpus, samples_of

LIMITS = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}
DATA = corpus()


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(tmp_path / "cache", **LIMITS, service="inprocess") as cache:
        yield cache


@pytest.fixture
def url(tmp_path: Path) -> str:
    return DATA.write(tmp_path / "shards")


def dataset_of(url: str, cache: fastload.Cache, **options: Any) -> fastload.StreamingDataset:
    return fastload.StreamingDataset(url, cache=cache, **options)


def keys_of(batches: Any) -> list[str]:
    return [key for batch in batches for key in check_samples(DATA, samples_of(batch))]


# shuffle=True of the loader


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shuffle_of_the_loader_is_that_of_the_data_set(url: str, cache: fastload.Cache, num_workers: int) -> None:
    """Order, epochs and states are the same, and either goes on with the other's state."""
    options = {"batch_size": 16, "num_workers": num_workers}
    theirs, ours = dataset_of(url, cache, seed=3, shuffle=True), dataset_of(url, cache, seed=3)
    with (
        fastload.DataLoader(theirs, **options) as expected,
        fastload.DataLoader(ours, shuffle=True, **options) as loader,
        fastload.DataLoader(ours, **options) as plain,
    ):
        assert (loader.dataset.shuffle, plain.dataset) == (True, ours)
        for _ in range(2):
            keys = keys_of(expected)
            assert keys_of(loader) == keys != list(DATA.samples)
            assert loader.state_dict() == expected.state_dict()
        iterator = iter(loader)
        begun = keys_of([next(iterator), next(iterator)])
        state = loader.state_dict()
        expected.load_state_dict(state)
        rest = keys_of(expected)
        assert keys_of(iterator) == rest
        assert sorted(begun + rest) == sorted(DATA.samples)
        loader.load_state_dict(state)
        assert keys_of(loader) == rest
        assert len(loader) == len(expected)
        # Another loader of the data set reads it in its own order.
        assert keys_of(plain) == list(DATA.samples)
        assert ours.shuffle is False


def test_who_makes_a_loader_again_from_its_attributes_shuffles_too(url: str, cache: fastload.Cache) -> None:
    """As accelerate does, which takes neither our class nor `shuffle`."""
    with fastload.DataLoader(dataset_of(url, cache, seed=3), batch_size=16, shuffle=True) as loader:
        keys = keys_of(loader)
        loader.set_epoch(0)
        again = torch.utils.data.DataLoader(loader.dataset, batch_size=16, collate_fn=list)
        assert [sample["__key__"] for batch in again for sample in batch] == keys != list(DATA.samples)


def test_the_epochs_of_a_data_set_and_of_a_loader_that_shuffles_are_the_same(url: str, cache: fastload.Cache) -> None:
    dataset = dataset_of(url, cache)
    with fastload.DataLoader(dataset, batch_size=16, shuffle=True) as loader:
        first = keys_of(loader)
        assert dataset.epoch == 0
        dataset.set_epoch(0)
        assert keys_of(loader) == first
        assert keys_of(pickle.loads(pickle.dumps(loader))) != first
        dataset.set_epoch(0)
        with pickle.loads(pickle.dumps(loader)) as copy:
            assert keys_of(copy) == first


def test_shuffle_of_the_loader_leaves_a_data_set_that_shuffles_its_own_way(url: str, cache: fastload.Cache) -> None:
    dataset = dataset_of(url, cache, shuffle="shards")
    with fastload.DataLoader(dataset, batch_size=16, shuffle=True) as loader:
        keys = keys_of(loader)
        dataset.set_epoch(0)
        with fastload.DataLoader(dataset, batch_size=16, shuffle=False) as other:
            assert keys_of(other) == keys != list(DATA.samples)


def test_shuffle_of_the_loader_is_for_each_source_of_a_mixture(url: str, cache: fastload.Cache) -> None:
    def mixture(**options: Any) -> fastload.Mixture:
        sources = [dataset_of(url, cache, seed=seed, **options) for seed in (0, 1)]
        return fastload.Mixture([(source, 1) for source in sources])

    with fastload.DataLoader(mixture(shuffle=True), batch_size=16) as loader:
        expected = [batch["__key__"] for batch in loader]
    with fastload.DataLoader(mixture(), batch_size=16, shuffle=True) as loader:
        assert [batch["__key__"] for batch in loader] == expected
    with pytest.raises(fastload.ConfigError, match=r"shuffle=True of the loader contradicts shuffle=False of"):
        fastload.DataLoader(mixture(shuffle=False), batch_size=16, shuffle=True)


def test_shuffle_and_samplers_that_cannot_be_meant(url: str, cache: fastload.Cache) -> None:
    dataset = dataset_of(url, cache)
    with pytest.raises(fastload.ConfigError, match=r"contradicts shuffle=False of StreamingDataset\("):
        fastload.DataLoader(dataset_of(url, cache, shuffle=False), shuffle=True)
    with pytest.raises(fastload.ConfigError, match=r"write StreamingDataset\(\.\.\., shuffle='global'\)"):
        fastload.DataLoader(dataset, shuffle="global")
    for name, given in (("sampler", RandomSampler(range(3))), ("batch_sampler", [[1], [2]])):
        with pytest.raises(fastload.ConfigError, match=rf"DataLoader\(dataset\.indexed\(\), {name}=\.\.\.\)"):
            fastload.DataLoader(dataset, **{name: given})


def test_the_error_about_a_sampler_says_what_works(url: str, cache: fastload.Cache) -> None:
    with fastload.DataLoader(dataset_of(url, cache), batch_size=16) as loader:
        list(loader)  # now the counts are known
    view = dataset_of(url, cache).indexed()
    sampler = DistributedSampler(view, num_replicas=2, rank=0, seed=1)
    with fastload.DataLoader(view, batch_size=16, sampler=sampler, collate_fn=list) as loader:
        first = [sample["__key__"] for batch in loader for sample in batch]
        loader.set_epoch(1)  # reaches the sampler
        assert sampler.epoch == 1
        assert [sample["__key__"] for batch in loader for sample in batch] != first
    view.close()


# A directory in the place of a cache


def test_a_directory_is_taken_where_a_cache_is(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who name one share a handle; a path counts as it is meant, whatever way it is written."""
    directory = tmp_path / "cache"
    fastload.Cache(directory, **LIMITS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTLOAD_CACHE", str(directory))
    handles = {cache_module.handle_of(each) for each in (directory, str(directory), "cache", f"{directory}/", None)}
    assert len(handles) == 1
    dataset = fastload.StreamingDataset(url, cache=directory)
    with fastload.DataLoader(dataset, batch_size=16) as loader:
        assert keys_of(loader) == list(DATA.samples)
    path = Path(url) / "shard-0000.tar"
    with fastload.open(path, "cache") as file:
        assert file.read() == path.read_bytes()
    job = warming.WarmJob([url], RequestedOrder())
    assert warming.warm(job, directory).sample_count == prepare.index([url], directory).sample_count
    cache_module.handle_of(directory).close()


def test_a_directory_that_was_removed_is_a_cache_anew(url: str, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    for _ in range(2):
        fastload.Cache(directory, **LIMITS)
        dataset = fastload.StreamingDataset(url, cache=directory)
        with fastload.DataLoader(dataset, batch_size=16) as loader:
            assert keys_of(loader) == list(DATA.samples)
        until(lambda: not service_pids(directory))
        shutil.rmtree(directory)


def test_a_directory_that_others_made_again_with_other_chunks(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    fastload.Cache(directory, **LIMITS)
    assert cache_module.handle_of(directory).limits.chunk_bytes == 64 << 10
    shutil.rmtree(directory)
    fastload.Cache(directory, **{**LIMITS, "chunk_bytes": "128KiB"})
    with cache_module.handle_of(directory) as handle, handle.consumer() as consumer:
        assert consumer.chunk_bytes == handle.limits.chunk_bytes == 128 << 10
        assert not consumer.beside


def test_a_directory_that_was_removed_gets_the_limits_that_its_users_have(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    fastload.Cache(directory, **LIMITS)
    before = repr(cache_module.handle_of(directory))
    shutil.rmtree(directory)
    with cache_module.handle_of(directory) as handle, handle.consumer() as consumer:
        assert not consumer.beside
        assert repr(handle) == repr(fastload.Cache(directory)) == before


def test_what_is_no_directory_of_a_cache(url: str) -> None:
    with pytest.raises(fastload.ConfigError, match=r"cache=3 must be a fastload\.Cache, or the directory of one"):
        fastload.StreamingDataset(url, cache=3)  # type: ignore[arg-type]
    with pytest.raises(fastload.ConfigError, match="the cache directory 's3://b/cache' is not a local directory"):
        fastload.StreamingDataset(url, cache="s3://b/cache")


def test_a_cache_shows_what_its_users_need(url: str, tmp_path: Path, cache: fastload.Cache) -> None:
    shown = {name for name in dir(cache) if not name.startswith("_")}
    assert shown == {"chunk_bytes", "clear", "close", "directory", "disk_bytes", "pin", "ram_bytes", "stats", "unpin"}
    assert repr(cache).startswith(f"Cache('{tmp_path / 'cache'}', ram_bytes='16.0 MiB', ")
    with pickle.loads(pickle.dumps(cache)) as copy:
        assert repr(copy) == repr(cache)
        with fastload.DataLoader(dataset_of(url, copy), batch_size=16) as loader:
            list(loader)
            assert cache.stats()["fetched_bytes"] == DATA.byte_count


# What data sets and loaders say of themselves


def test_properties_of_data_sets(url: str, cache: fastload.Cache) -> None:
    dataset = dataset_of(url, cache, shuffle="shards", seed=7)
    assert (dataset.urls, dataset.shuffle, dataset.seed, dataset.epoch) == ((url,), "shards", 7, 0)
    for name in ("urls", "shuffle", "seed", "epoch"):
        with pytest.raises(AttributeError):
            setattr(dataset, name, 1)
    epochs = []
    with fastload.DataLoader(dataset, batch_size=16) as loader:
        for _ in range(2):
            epochs += [dataset.epoch for _ in loader]
        assert epochs == [0] * (len(epochs) // 2) + [1] * (len(epochs) // 2)
        loader.set_epoch(5)
        assert dataset.epoch == 5
        assert [dataset.epoch for _ in loader][-1] == dataset.epoch == 5
    assert next(iter(dataset))["__key__"]
    assert dataset.epoch == 6
    dataset.close()
    mixture = fastload.Mixture([(dataset, 1)], seed=4)
    assert (mixture.seed, mixture.epoch) == (4, 0)


def test_the_epoch_is_known_where_torchs_workers_read_it(url: str, cache: fastload.Cache) -> None:
    dataset = dataset_of(url, cache)
    for epoch in range(2):
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
        assert {dataset.epoch for _ in loader} == {epoch}


def test_reprs_are_short_and_without_secrets(tmp_path: Path, cache: fastload.Cache) -> None:
    urls = [f"https://user:pass-word@host/{n:03d}.tar" for n in range(500)]
    options = {"access_key_id": "AKIA-1", "secret_access_key": "s3cr3t"}
    dataset = dataset_of(urls, cache, shuffle=True, columns=["jpg"], storage_options=options)
    text = repr(dataset)
    assert text == (
        "StreamingDataset(['https://host/000.tar', 'https://host/001.tar'] and 498 more, shuffle=True, seed=0, "
        f"epoch=0, columns=['jpg'], cache={tmp_path / 'cache'})"
    )
    loader = fastload.DataLoader(dataset, batch_size=8, num_workers=2)
    assert repr(loader) == f"DataLoader({text}, batch_size=8, num_workers=2)"
    mixture = repr(fastload.Mixture([(dataset, 2), (dataset_of("a.tar", cache), [(0, 1.0), (9, 0.5)])]))
    for part in (f"Mixture([({text}, 2.0), (", "StreamingDataset('a.tar', shuffle=False", "[(0, 1.0), (9, 0.5)])]"):
        assert part in mixture, mixture
    foreign = fastload.DataLoader(TensorDataset(torch.zeros(100_000, 3)), batch_size=4, drop_last=True)
    assert repr(foreign) == "DataLoader(<TensorDataset>, batch_size=4, num_workers=0, drop_last=True)"
    assert not any(secret in shown for secret in ("pass-word", "s3cr3t", "AKIA") for shown in (text, repr(loader)))


def test_a_loader_with_persistent_workers_is_closed_by_with() -> None:
    with fastload.DataLoader(
        TensorDataset(torch.arange(8)), num_workers=1, persistent_workers=True, multiprocessing_context="fork"
    ) as loader:
        list(loader)
        (worker,) = loader._iterator._workers
        assert worker.is_alive()
    assert not worker.is_alive()
    with pytest.raises(ZeroDivisionError), fastload.DataLoader(TensorDataset(torch.arange(8))) as loader:
        raise ZeroDivisionError


def test_a_state_from_the_middle_of_another_epoch_is_stronger_than_set_epoch(url: str, cache: fastload.Cache) -> None:
    with fastload.DataLoader(dataset_of(url, cache), batch_size=16, shuffle=True) as loader:
        loader.set_epoch(3)
        iterator = iter(loader)
        next(iterator)
        state = loader.state_dict()
        rest = keys_of(iterator)
        loader.load_state_dict(state)
        with pytest.warns(UserWarning, match=r"set_epoch\(0\): .* the middle of epoch 3"):
            loader.set_epoch(0)
        assert keys_of(loader) == rest
        loader.load_state_dict(state)
        loader.set_epoch(3)
        assert keys_of(loader) == rest
        with pytest.raises(fastload.ConfigError, match="epoch='1'"):
            loader.set_epoch("1")


# The command line


def test_the_command_line_says_its_version_and_has_a_module() -> None:
    for command in ([Path(sys.executable).parent / "fastload"], [sys.executable, "-m", "fastload"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"fastload {fastload.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "fastload", "nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage: fastload " in done.stderr


def test_the_command_line_names_a_size_as_it_was_written(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fastload",
        "warm",
        "/data/a.tar",
        "--cache",
        tmp_path / "cache",
        "--ram-bytes=8 gigs",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--ram-bytes='8 gigs' is not a size" in done.stderr


# A look at a batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_look_uses_up_nothing(url: str, cache: fastload.Cache, num_workers: int) -> None:
    with fastload.DataLoader(dataset_of(url, cache), batch_size=16, shuffle=True, num_workers=num_workers) as loader:
        state, epoch = loader.state_dict(), loader.dataset.epoch
        first = keys_of([loader.peek()])
        assert keys_of([loader.peek()]) == first
        assert (loader.state_dict(), loader.dataset.epoch) == (state, epoch)
        assert loader.stats()["batches"] == 0
        keys = keys_of(loader)
        assert keys[:16] == first
        assert sorted(keys) == sorted(DATA.samples)
        assert keys_of([loader.peek()]) != first  # of the next epoch
        # In the middle of an epoch: what comes next after the iteration is another epoch, and it goes on as it was.
        iterator = iter(loader)
        begun = keys_of([next(iterator)])
        state, stats = loader.state_dict(), loader.stats()
        ahead = keys_of([loader.peek()])
        assert loader.state_dict() == state
        assert loader.stats()["batches"] == stats["batches"] == 1
        rest = keys_of(iterator)
        assert sorted(begun + rest) == sorted(DATA.samples)
        assert keys_of([next(iter(loader))]) == ahead
        # Where a state says, it is what comes after that.
        loader.load_state_dict(state)
        assert keys_of([loader.peek()]) == rest[:16]
        assert loader.state_dict() == state
        assert keys_of(loader) == rest


def test_a_look_at_what_functions_make_in_workers(url: str, cache: fastload.Cache) -> None:
    """What they draw at random is what they will draw."""
    dataset = dataset_of(url, cache).map(with_a_random_number)
    with fastload.DataLoader(dataset, batch_size=8, num_workers=1, multiprocessing_context="fork") as loader:
        looked = loader.peek()
        assert torch.equal(looked["drawn"], next(iter(loader))["drawn"])


def with_a_random_number(sample: dict[str, Any]) -> dict[str, Any]:
    return {"drawn": torch.rand(())}
