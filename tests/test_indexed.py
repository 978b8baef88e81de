"""Samples by number: `dataset[i]`, `take`, and samplers, in one process and in workers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
import torch.utils.data

import fastload
from fastload.client.cache import handle_of
from tests.programs import run_cli
from tests.shards import Corpus, check_samples, corpus, samples_of, tar_of

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="4MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


@pytest.fixture(scope="module")
def data() -> Corpus:
    return corpus()


def indexed(data: Corpus, s3, cache: fastload.Cache, **options) -> fastload.StreamingDataset:
    """A data set that has been read once."""
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache, **options)
    for _ in dataset:
        pass
    dataset.set_epoch(0)
    return dataset


def test_samples_by_number(s3, cache, data: Corpus) -> None:
    dataset = fastload.StreamingDataset(data.put(s3), cache=cache)
    for call in (lambda: dataset[0], lambda: dataset.take([0]), dataset.indexed):
        with pytest.raises(TypeError, match="fastload index"):
            call()
    keys = list(data.samples)
    samples = list(dataset)
    assert [dataset[number] for number in (0, 5, 70, -1, np.int64(-len(keys)))] == [
        samples[number] for number in (0, 5, 70, -1, 0)
    ]
    order = random.Random(0).choices(range(-len(keys), len(keys)), k=300)
    for numbers in (order, np.array(order), torch.tensor(order)):
        batch = dataset.take(numbers)
        assert check_samples(data, samples_of(batch)) == [keys[number] for number in order]
        assert batch["__url__"] == [samples[number]["__url__"] for number in order]
    assert samples_of(dataset.take([])) == []
    for number in (len(keys), -len(keys) - 1):
        with pytest.raises(IndexError, match=f"{number} of a data set of {len(keys)}"):
            dataset[number]
        with pytest.raises(IndexError, match=str(number)):
            dataset.take([0, number])
    for wrong in ("s", 1.0, slice(3), [1, 2]):
        with pytest.raises(TypeError, match="take"):
            dataset[wrong]
    for wrong in (3, [[1, 2]], [0.5], "12"):
        with pytest.raises(TypeError, match="whole numbers"):
            dataset.take(wrong)
    with handle_of(cache).consumer() as consumer:
        stats = consumer.stats()
        assert stats["node"]["fetched_bytes"] == data.byte_count
        assert all(each["leases"] == 0 for each in stats["consumers"])
    dataset.close()


def test_batches_are_a_loaders(s3, cache, data: Corpus) -> None:
    decode = {"cls": fastload.decode.integer()}
    dataset = indexed(data, s3, cache, columns=["bin", "cls"], decode=decode, as_tuple=True, shuffle=True)
    values, numbers = dataset.take([7, 3, 7])
    assert isinstance(values, fastload.Ragged)
    assert numbers.tolist() == [7, 3, 7]
    doubled = dataset.map(lambda sample: (len(sample[0]), 2 * sample[1]))
    assert doubled[7] == (len(values[0]), 14)
    assert doubled.take([1, 2])[1].tolist() == [2, 4]
    summed = doubled.map_batch(lambda batch: batch[1].sum())
    assert summed.take(range(4)) == 12
    with pytest.raises(fastload.ConfigError, match="take"):
        summed[0]
    for each in (dataset, doubled, summed):
        each.close()


def test_what_is_random_is_the_epochs(s3, cache) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 40, 40, 3), np.uint8)
    shards = {
        f"{shard}.tar": {f"{shard}-{number}": {"jpg": simplejpeg.encode_jpeg(pixels[number])} for number in range(6)}
        for shard in range(2)
    }
    pictures = Corpus({name: tar_of(samples) for name, samples in shards.items()}, {})
    decode = {"jpg": fastload.decode.image(size=16, random_resized_crop=True, hflip=0.5)}
    dataset = indexed(pictures, s3, cache, decode=decode, seed=3, shuffle=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        loader = fastload.DataLoader(dataset, batch_size=12)
        (batch,) = loader
        loader.close()
        by_key = dict(zip(batch["__key__"], batch["jpg"], strict=True))
        dataset.set_epoch(epoch)
        taken = dataset.take(range(12))
        for key, picture in zip(taken["__key__"], taken["jpg"], strict=True):
            assert torch.equal(picture, by_key[key])
        assert torch.equal(torch.as_tensor(dataset[4]["jpg"]), taken["jpg"][4])
    dataset.set_epoch(0)
    assert not torch.equal(dataset.take(range(12))["jpg"], taken["jpg"])
    dataset.close()


def test_a_batch_from_everywhere_in_an_arena_of_two_chunks(s3, cache, data: Corpus, tmp_path: Path) -> None:
    """And an index that another cache made is enough."""
    url = data.put(s3)
    indexes = tmp_path / "index.arrow"
    run_cli("index", url, "--cache", cache.directory, "--output", indexes)
    with fastload.Cache(
        tmp_path / "small", ram_bytes="128KiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as small:
        dataset = fastload.StreamingDataset(url, cache=small, index=indexes)
        order = random.Random(1).sample(range(len(data.samples)), len(data.samples))
        assert check_samples(data, samples_of(dataset.take(order))) == [list(data.samples)[number] for number in order]
        assert dataset[33]["__key__"] == list(data.samples)[33]
        dataset.close()


def test_a_bad_sample_is_an_error_although_it_could_be_skipped(s3, cache) -> None:
    samples = {f"{number}": {"cls": b"17" if number != 2 else b"none"} for number in range(4)}
    broken = Corpus({"0.tar": tar_of(samples)}, samples)
    with pytest.warns(UserWarning, match="skipped"):
        dataset = indexed(broken, s3, cache, decode={"cls": fastload.decode.integer()}, on_error="skip")
    with pytest.raises(fastload.DecodeError, match="none"):
        dataset[2]
    with pytest.raises(fastload.DecodeError, match="none"):
        dataset.take([0, 2])
    assert dataset.take([3, 0])["cls"].tolist() == [17, 17]
    dataset.close()


def as_they_are(samples):
    return samples


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_samplers_in_torchs_worker_processes(s3, cache, data: Corpus, method: str) -> None:
    dataset = indexed(data, s3, cache).indexed()
    assert len(dataset) == len(data.samples)
    sampler = torch.utils.data.RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    keys = list(data.samples)
    expected = [keys[number] for number in sampler]
    sampler.generator.manual_seed(0)
    options = {"num_workers": 2, "multiprocessing_context": method, "collate_fn": as_they_are, "timeout": 100}
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, sampler=sampler, **options)
    assert [key for batch in loader for key in check_samples(data, batch)] == expected
    # Whole batches, made by compiled code.
    batches = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(dataset), 16, drop_last=False)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=batches, **options)
    assert [key for batch in loader for key in check_samples(data, samples_of(batch))] == keys
    dataset.close()


@pytest.mark.parametrize("workers", ["process", "thread"])
def test_samplers_in_our_loader(s3, cache, data: Corpus, workers: str) -> None:
    dataset = indexed(data, s3, cache).indexed()
    loader = fastload.DataLoader(
        dataset, batch_size=8, shuffle=True, num_workers=2, collate_fn=as_they_are, workers=workers
    )
    keys = [key for batch in loader for key in check_samples(data, batch)]
    assert sorted(keys) == sorted(data.samples)
    assert keys != list(data.samples)
    loader.close()
    dataset.close()


def test_a_sampler_in_the_order_of_an_earlier_run_is_fetched_ahead(s3, tmp_path: Path) -> None:
    data = corpus(4, 40, 60_000)
    url, order = data.put(s3), random.Random(1).sample(range(len(data.samples)), len(data.samples))

    def run() -> tuple[list[bytes], int]:
        """A job whose arena holds little of the data; the service begins and ends with it."""
        with fastload.Cache(
            tmp_path / "cache", ram_bytes="1MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
        ) as cache:
            view = fastload.StreamingDataset(url, cache=cache).indexed()
            keys = [
                key
                for at in range(0, len(order), 8)
                for key in check_samples(data, samples_of(view[order[at : at + 8]]))
            ]
            view.close()
            return keys, cache.stats()["replayed_reads"]

    with fastload.Cache(
        tmp_path / "cache", ram_bytes="1MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        for _ in fastload.StreamingDataset(url, cache=cache):
            pass
    (first, before), (second, after) = run(), run()
    assert first == second == [list(data.samples)[number] for number in order]
    assert before < len(order) // 4 < len(order) // 2 < after
