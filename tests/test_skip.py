"""Samples that cannot be read, left out where the user says so."""

from pathlib import Path
from typing import Any

import pytest

import fastload
from tests.shards import Corpus, tar_of

COUNT = 40
BAD = {3, 4, 17, 31}  # these have no number in `cls`, or no `cls`
DECODE = {"bin": fastload.decode.raw(), "cls": fastload.decode.integer()}

NO_JSON = {"bin": fastload.decode.json(), "cls": fastload.decode.integer()}


@pytest.fixture
def url(tmp_path: Path) -> str:
    samples = {f"s/{n:03d}": {"bin": b"x" * n, "cls": str(n).encode()} for n in range(COUNT)}
    for number in BAD:
        samples[f"s/{number:03d}"]["cls"] = b"many"
    del samples["s/017"]["cls"]
    keys = sorted(samples)
    shards = {f"{i}.tar": tar_of({key: samples[key] for key in keys[i * 10 : (i + 1) * 10]}) for i in range(4)}
    return Corpus(shards, samples).write(tmp_path / "data")


def data_set(url: str, tmp_path: Path, **options: Any) -> fastload.StreamingDataset:
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="4MiB", disk_bytes="16MiB", chunk_bytes="64KiB")
    return fastload.StreamingDataset(url, cache=cache, on_error="skip", **{"decode": DECODE, **options})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_get_shorter_and_not_fewer(url: str, tmp_path: Path, num_workers: int) -> None:
    loader = fastload.DataLoader(data_set(url, tmp_path), batch_size=2, num_workers=num_workers)
    with pytest.warns(UserWarning, match=r"skipped a sample.*\.tar: sample 's/0\d\d'") as told:
        batches = [batch["cls"].tolist() for batch in loader]
    assert len(told) == 1
    assert batches == [[n for n in (first, first + 1) if n not in BAD] for first in range(0, COUNT, 2)]
    stats = loader.stats()
    assert (stats["batches"], stats["samples"], stats["skipped"]) == (COUNT // 2, COUNT - len(BAD), len(BAD))
    loader.close()


def test_a_batch_of_which_nothing_is_left_is_empty(url: str, tmp_path: Path) -> None:
    loader = fastload.DataLoader(data_set(url, tmp_path), batch_size=1)
    with pytest.warns(UserWarning, match="skipped a sample"):
        batches = list(loader)
    assert [len(batch["cls"]) for batch in batches] == [n not in BAD for n in range(COUNT)]
    assert batches[3]["cls"].dtype == batches[0]["cls"].dtype
    assert (batches[3]["__key__"], len(batches[3]["bin"])) == ([], 0)
    loader.close()


@pytest.mark.filterwarnings("ignore:skipped a sample")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_of_which_nothing_is_left_is_told_at_its_end(url: str, tmp_path: Path, num_workers: int) -> None:
    dataset = data_set(url, tmp_path, decode=NO_JSON)
    loader = fastload.DataLoader(dataset, batch_size=8, num_workers=num_workers)
    message = (
        rf'all {COUNT} samples that were read of epoch {{}} were skipped.*"skip"; the first error: .*/0\.tar: sample '
        "'s/000', column 'bin': .*; mend decode= or columns=, or leave on_error out"
    )
    for epoch in range(2):
        with pytest.warns(RuntimeWarning, match=message.format(epoch)) as told:
            assert sum(len(batch["__key__"]) for batch in loader) == 0
        assert [each.filename for each in told if each.category is RuntimeWarning] == [__file__]
    loader.close()
    with pytest.warns(RuntimeWarning, match=message.format(2)):
        assert list(dataset) == []
    mixture = fastload.Mixture([(data_set(url, tmp_path, decode=NO_JSON), 1), (data_set(url, tmp_path), 1)])
    assert len(list(mixture)) > 0  # of the other source: a RuntimeWarning would be an error here


@pytest.mark.filterwarnings("ignore:skipped a sample")
def test_samples_one_by_one(url: str, tmp_path: Path) -> None:
    expected = [n for n in range(COUNT) if n not in BAD]
    dataset = data_set(url, tmp_path)
    assert [sample["cls"] for sample in dataset] == expected
    loader = fastload.DataLoader(dataset, batch_size=None)
    assert [sample["cls"] for sample in loader] == expected
    loader.close()
    lists = fastload.DataLoader(dataset, batch_size=4, collate_fn=lambda samples: [s["cls"] for s in samples])
    assert [n for batch in lists for n in batch] == expected
    lists.close()


@pytest.mark.filterwarnings("ignore:skipped a sample")
def test_a_resumed_run_goes_on_after_what_was_skipped(url: str, tmp_path: Path) -> None:
    loader = fastload.DataLoader(data_set(url, tmp_path, shuffle=True), batch_size=2)
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    state = loader.state_dict()
    rest = [batch["cls"].tolist() for batch in batches]
    loader.load_state_dict(state)
    assert [batch["cls"].tolist() for batch in loader] == rest
    loader.close()


def test_what_to_do_is_one_of_two_words(tmp_path: Path) -> None:
    with pytest.raises(fastload.ConfigError, match="on_error='ignore' must be"):
        fastload.StreamingDataset("x.tar", cache=fastload.Cache(tmp_path), on_error="ignore")  # type: ignore[arg-type]
