"""Mixtures of real data sets, end to end."""

import json
from collections import Counter
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fastload
from fastload.pipeline import agreement
from tests.shards import Corpus, corpus, tar_of

WEIGHTS = (0.5, 0.3, 0.2)
PLAIN = {"bin": fastload.decode.raw(), "cls": fastload.decode.integer()}


def named(prefix: str, count: int, shard_count: int = 4) -> Corpus:
    """A corpus whose keys begin with `prefix`."""
    samples = {f"{prefix}/{n:04d}": {"bin": prefix.encode() * (n + 1), "cls": str(n).encode()} for n in range(count)}
    keys = sorted(samples)
    cuts = [len(keys) * i // shard_count for i in range(shard_count + 1)]
    parts = [keys[first:stop] for first, stop in pairwise(cuts)]
    return Corpus({f"{i}.tar": tar_of({key: samples[key] for key in part}) for i, part in enumerate(parts)}, samples)


CORPORA = [named("a", 200), named("b", 90), named("c", 31, shard_count=2)]


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="16MiB", disk_bytes="64MiB", chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


@pytest.fixture
def urls(tmp_path: Path) -> list[str]:
    return [data.write(tmp_path / f"data{number}") for number, data in enumerate(CORPORA)]


def mixture(urls: list[str], cache: fastload.Cache, weights: Any = WEIGHTS, **options: Any) -> fastload.Mixture:
    names = ("rank", "world_size", "partitions")
    common = {
        "shuffle": True,
        "shuffle_window": "16KiB",
        "decode": PLAIN,
        **{n: options.pop(n) for n in names if n in options},
    }
    data_sets = [fastload.StreamingDataset(url, cache=cache, seed=n, **common) for n, url in enumerate(urls)]
    return fastload.Mixture(list(zip(data_sets, weights, strict=True)), **options)


def check(batch: dict[str, Any]) -> list[str]:
    """The keys of a batch, whose rows must be whole."""
    for key, source, value, number in zip(
        batch["__key__"], batch["__source__"].tolist(), batch["bin"], batch["cls"].tolist(), strict=True
    ):
        prefix, n = key.split("/")
        assert "abc".index(prefix) == source
        assert int(n) == number
        assert value == prefix.encode() * (number + 1)
    return batch["__key__"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_weights_hold_in_every_batch_and_samples_come_once(urls, cache, num_workers: int) -> None:
    loader = fastload.DataLoader(mixture(urls, cache), batch_size=10, num_workers=num_workers)
    keys = [check(batch) for batch in loader]
    every = [key for batch in keys for key in batch]
    assert max(Counter(every).values()) == 1
    for number, prefix in enumerate("abc"):
        for delivered in range(10, len(every), 10):
            assert abs(sum(key[0] == prefix for key in every[:delivered]) - WEIGHTS[number] * delivered) < 1.5
    # c is the first to end: all of it, but for what its weight leaves.
    assert 29 <= sum(key[0] == "c" for key in every) <= 31
    lengths = len(loader), len(loader.dataset)  # of the next epoch
    again = [check(batch) for batch in loader]
    assert again != keys
    assert lengths == (len(again), sum(map(len, again)))
    assert loader.stats()["samples"] == lengths[1]
    loader.dataset.set_epoch(0)
    assert (len(loader), len(loader.dataset)) == (len(keys), len(every))
    loader.close()


def test_all_goes_through_every_source_and_repeats_the_others_in_another_order(urls, cache) -> None:
    loader = fastload.DataLoader(mixture(urls, cache, (1, 1, 1), stop="all"), batch_size=8)
    counts = Counter(key for batch in loader for key in check(batch))
    assert set(counts) == {key for data in CORPORA for key in data.samples}
    by_source = {prefix: {n for key, n in counts.items() if key[0] == prefix} for prefix in "abc"}
    assert by_source["a"] == {1}
    assert by_source["b"] <= {2, 3}
    assert by_source["c"] <= {6, 7}
    loader.close()


def test_interrupting_a_pass_interrupts_all_of_its_consumers(urls, cache) -> None:
    one = fastload.StreamingDataset(urls[0], cache=cache)
    several = mixture(urls, cache)
    with closing(one), closing(several):
        for current in (one.begin(0, 8), several.begin(0, 8)):
            consumers = [each.attached.consumer for each in current.sources]
            with current.interrupted():
                assert all(consumer.is_interrupted for consumer in consumers)
            assert not any(consumer.is_interrupted for consumer in consumers)
            current.end()


def test_never_ends_and_says_so(urls, cache) -> None:
    loader = fastload.DataLoader(mixture(urls, cache, stop="never"), batch_size=50, num_workers=1)
    with pytest.raises(TypeError, match='stop="never" has no end'):
        len(loader)
    batches = [check(batch) for batch, _ in zip(loader, range(60), strict=False)]
    counts = Counter(key for batch in batches for key in batch)
    assert {counts[key] for key in CORPORA[2].samples} <= {19, 20}
    loader.close()


@pytest.mark.parametrize("stop", ["first", "all"])
def test_a_run_goes_on_exactly_at_another_size(urls, cache, stop: str) -> None:
    def loader_of(batch_size: int, **ranks: int) -> fastload.DataLoader:
        return fastload.DataLoader(mixture(urls, cache, stop=stop, **ranks), batch_size=batch_size, num_workers=1)

    whole = loader_of(12)
    expected = [set(check(batch)) for batch in whole]
    whole.close()
    whole = loader_of(12)
    batches = iter(whole)
    for _ in range(5):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))
    whole.close()
    parts = []
    for rank in range(3):
        loader = loader_of(4, rank=rank, world_size=3)
        loader.load_state_dict(state)
        parts.append([check(batch) for batch in loader])
        loader.close()
    together = [set().union(*map(set, batches)) for batches in zip(*parts, strict=True)]
    assert together[:-1] == expected[5:-1]
    assert together[-1] >= expected[-1]  # some are repeated


def test_a_schedule_of_weights(urls, cache) -> None:
    loader = fastload.DataLoader(mixture(urls, cache, (1, [(0, 0.0), (100, 1.0)], [(0, 0.0)])), batch_size=10)
    sources = [batch["__source__"].tolist() for batch in loader]
    assert {source for batch in sources[:10] for source in batch} == {0}
    assert all(4 <= sum(batch) <= 6 for batch in sources[10:-1])
    loader.close()


def test_samples_one_by_one_and_in_workers(urls, cache) -> None:
    dataset = mixture(urls, cache, batch_size=10)
    expected = [sample["__key__"] for sample in dataset]
    dataset.set_epoch(0)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=10, num_workers=2, collate_fn=list, multiprocessing_context="forkserver"
    )
    samples = [sample for batch in loader for sample in batch]
    assert [sample["__key__"] for sample in samples] == expected
    assert all("abc"[sample["__source__"]] == sample["__key__"][0] for sample in samples)
    dataset.set_epoch(0)
    some = iter(dataset)
    for _ in range(33):
        next(some)
    state = dataset.state_dict()
    dataset.load_state_dict(state)
    assert [sample["__key__"] for sample in dataset] == expected[33:]
    dataset.close()


def test_bad_samples_are_left_out_of_their_batch(urls, cache, tmp_path: Path) -> None:
    samples = {key: dict(sample) for key, sample in CORPORA[1].samples.items()}
    samples["b/0007"]["cls"] = b"seven"
    url = Corpus({"0.tar": tar_of(samples)}, samples).write(tmp_path / "bad")
    bad = fastload.StreamingDataset(url, cache=cache, decode=PLAIN, on_error="skip")
    good = fastload.StreamingDataset(urls[0], cache=cache, decode=PLAIN)
    loader = fastload.DataLoader(fastload.Mixture([(good, 1), (bad, 1)]), batch_size=10)
    with pytest.warns(UserWarning, match="skipped a sample"):
        batches = [check(batch) for batch in loader]
    assert [len(batch) for batch in batches[:-1]].count(9) == 1
    assert loader.stats()["skipped"] == 1
    assert "b/0007" not in {key for batch in batches for key in batch}
    loader.close()


def test_images_text_and_arrays_interleave(cache, tmp_path: Path) -> None:
    data = corpus(shard_count=2, samples_per_shard=20)
    decode = {"bin": fastload.decode.raw(), "cls": fastload.decode.text()}
    sets = [
        fastload.StreamingDataset(data.write(tmp_path / name), cache=cache, decode=decode, as_tuple=True, seed=n)
        for n, name in enumerate("xy")
    ]
    loader = fastload.DataLoader(fastload.Mixture([(each, 1) for each in sets]), batch_size=6)
    for values, texts in loader:
        by_number = {sample["cls"].decode(): sample["bin"] for sample in data.samples.values()}
        assert [by_number[text] for text in texts] == list(values)
    loader.close()


def test_what_does_not_go_together_is_refused(urls, cache) -> None:
    def one(**options: Any) -> fastload.StreamingDataset:
        return fastload.StreamingDataset(urls[0], cache=cache, **options)

    plain = one(decode=PLAIN)
    for sources, says in [
        ([], "must be a list of"),
        ([plain], "must be a list of"),
        ([(urls[0], 1)], "source 0 is a str"),
        ([(plain, 1), (plain, 2)], "source 1 is there twice"),
        ([(plain, -1)], "weight of source 0 must be"),
        ([(plain, 1), (one(decode={"cls": fastload.decode.text()}), 1)], "have the columns"),
        ([(plain, 1), (one(decode=PLAIN, as_tuple=True), 1)], "some dicts"),
    ]:
        with pytest.raises(fastload.ConfigError, match=says):
            fastload.Mixture(sources)  # type: ignore[arg-type]
    with pytest.raises(fastload.ConfigError, match="stop='last' must be"):
        fastload.Mixture([(plain, 1)], stop="last")  # type: ignore[arg-type]
    texts = fastload.Mixture([(plain, 1), (one(decode={**PLAIN, "cls": fastload.decode.text()}), 1)])
    loader = fastload.DataLoader(texts, batch_size=4)
    with pytest.raises(fastload.ConfigError, match=r"column 'cls' is a list and a tensor of int64\[\] in the sources"):
        next(iter(loader))
    loader.close()


def test_a_source_whose_columns_have_other_names_is_mapped(urls, cache) -> None:
    def sources(function) -> fastload.Mixture:
        one = fastload.StreamingDataset(urls[0], cache=cache, columns=["cls"]).map(function)
        other = fastload.StreamingDataset(urls[1], cache=cache, columns=["bin"])
        return fastload.Mixture([(one, 1), (other, 1)])

    def renamed(sample: dict[str, Any]) -> dict[str, Any]:
        return {"bin" if name == "cls" else name: value for name, value in sample.items()}

    with fastload.DataLoader(sources(renamed), batch_size=4, workers="thread") as loader:
        batch = next(iter(loader))
    assert set(batch) == {"__key__", "__url__", "__source__", "bin"}
    assert set(batch["__source__"].tolist()) == {0, 1}
    says = (
        r"have the columns \['__key__', '__url__', .*, and others of it .*; let the functions given to map\(\) return"
    )
    with (
        fastload.DataLoader(sources(lambda sample: sample), batch_size=4, workers="thread") as loader,
        pytest.raises(fastload.ConfigError, match=says),
    ):
        next(iter(loader))


def test_a_length_asks_no_other_rank(urls, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fastload.DataLoader(mixture(urls, cache), batch_size=10)
    count = sum(1 for _ in whole)
    whole.close()
    monkeypatch.setattr(agreement, "is_collective", lambda processes: pytest.fail("only rank 0 may want to know"))
    loader = fastload.DataLoader(mixture(urls, cache), batch_size=10)
    assert len(loader) == count
    loader.close()


def test_a_state_of_another_mixture_is_refused(urls, cache) -> None:
    loader = fastload.DataLoader(mixture(urls, cache), batch_size=10)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    for other, says in [
        (mixture(urls, cache, (0.5, 0.3, 0.3)), "weights"),
        (mixture(urls, cache, seed=1), "seed"),
        (mixture(urls[:2], cache, (1, 1)), "sources"),
        (mixture(urls[::-1], cache), "source 0"),
    ]:
        wrong = fastload.DataLoader(other, batch_size=10)
        wrong.load_state_dict(state)
        with pytest.raises(fastload.StateError, match=says):
            next(iter(wrong))
        wrong.close()
    single = fastload.DataLoader(fastload.StreamingDataset(urls[0], cache=cache), batch_size=10)
    with pytest.raises(fastload.StateError):
        single.load_state_dict(state)
    single.close()
