"""Code that was written for webdataset, with the import changed, gives what it gave there."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

import fastload
import fastload.adapters.webdataset as wds
from fastload.errors import ConfigError
from tests.conftest import Bucket

SHARDS, SAMPLES_A_SHARD = 3, 7
COUNT = SHARDS * SAMPLES_A_SHARD

# webdataset itself leaves its shards open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def _jpeg(number: int) -> bytes:
    picture = np.random.default_rng(number).integers(0, 256, (8 + number % 3, 10, 3), np.uint8)
    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "JPEG", quality=95)
    return stored.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as webdataset writes them; some samples have a text, some a PNG where others have a JPEG."""
    where = tmp_path_factory.mktemp("webdataset")
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(where / f"train-{shard:03}.tar")) as writer:
            for at in range(SAMPLES_A_SHARD):
                number = shard * SAMPLES_A_SHARD + at
                sample = {"__key__": f"dir/{number:04}", "cls": number, "json": {"n": number}, "jpg": _jpeg(number)}
                if number % 4 == 0:
                    sample["txt"] = f"näme {number}"
                if number % 5 == 0:
                    sample["png"] = np.full((3, 4, 3), number, np.uint8)
                    del sample["jpg"]
                writer.write(sample)
    return where


@pytest.fixture
def urls(folder: Path, s3: Bucket) -> str:
    for path in folder.iterdir():
        s3.put(path.name, path.read_bytes())
    return f"{s3.url}/train-{{000..002}}.tar"


@pytest.fixture
def options(tmp_path: Path) -> Iterator[dict[str, Any]]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as cache:
        yield {"cache": cache}


def _pairs(batches: Any) -> list[tuple[Any, ...]]:
    return [pair for numbers, texts in batches for pair in zip(numbers.tolist(), texts, strict=True)]


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, np.ndarray | torch.Tensor | Image.Image):
        return type(found) is type(expected) and bool((np.asarray(found) == np.asarray(expected)).all())
    if isinstance(expected, dict):
        return set(found) == set(expected) and all(_same(found[name], value) for name, value in expected.items())
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(map(_same, found, expected)) and len(found) == len(expected)
    return bool(found == expected)


def _image_and_class(dataset: Any) -> Any:
    return dataset.decode("rgb8").to_tuple("jpg;png", "cls")


PIPELINES = {
    "bytes": lambda dataset: dataset,
    "pictures": lambda dataset: dataset.decode("pil"),
    "tensors": lambda dataset: dataset.decode("torchrgb").rename(image="jpg;png", label="cls"),
    "tuples": _image_and_class,
    "functions of columns": lambda dataset: dataset.decode().map_dict(cls=lambda number: -number),
    "a function, and a choice": lambda dataset: dataset.decode().map(lambda s: s["cls"]).select(lambda n: n % 3),
    "batches": lambda dataset: dataset.decode().to_tuple("cls", "json").batched(4),
    "no last batch": lambda dataset: dataset.to_tuple("cls").batched(4, partial=False),
    "lists": lambda dataset: dataset.to_tuple("cls", "__key__").listed(5),
    "a part": lambda dataset: dataset.to_tuple("cls").slice(3, 9),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_give_what_they_give_there(name: str, folder: Path, urls: str, options: dict[str, Any]) -> None:
    pipeline = PIPELINES[name]
    expected = list(pipeline(webdataset.WebDataset(str(folder / "train-{000..002}.tar"), shardshuffle=False)))
    with pipeline(wds.WebDataset(urls, shardshuffle=False, **options)) as dataset:
        found = list(dataset)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, dict):  # but where the shards lie
            one, other = (
                {k: v for k, v in each.items() if k not in ("__url__", "__local_path__")} for each in (one, other)
            )
        assert _same(one, other), (one, other)


def test_stages_in_a_list_are_read_as_well(folder: Path, urls: str, options: dict[str, Any]) -> None:
    def stages(library: Any, where: str) -> list[Any]:
        return [
            library.SimpleShardList(where), library.split_by_node, library.split_by_worker,
            library.tarfile_to_samples(), library.decode("rgb8"), library.to_tuple("cls", "jpg;png"),
        ]  # fmt: skip

    expected = list(webdataset.DataPipeline(*stages(webdataset, str(folder / "train-{000..002}.tar"))))
    pipeline = wds.DataPipeline(*stages(wds, urls), **options)
    assert _same(list(pipeline), expected)
    pipeline.close()
    assert len(list(wds.DataPipeline(wds.MockDataset({"cls": b"1"}, 3), wds.decode()))) == 3  # which reads no shards


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loader", [DataLoader, wds.WebLoader])
def test_each_sample_comes_once_an_epoch_however_many_workers(
    urls: str, options: dict[str, Any], loader: Any, workers: int
) -> None:
    dataset = wds.WebDataset(urls, shardshuffle=100, **options).shuffle(1000).decode("rgb8").to_tuple("cls", "__key__")
    epochs = []
    for batches in [loader(dataset.batched(4), batch_size=None, num_workers=workers)] * 2:
        found = _pairs(batches)
        assert sorted(found) == [(number, f"dir/{number:04}") for number in range(COUNT)]
        epochs.append(found)
    assert len({str(sorted(epoch)) for epoch in epochs}) == 1
    assert len({str(epoch) for epoch in epochs}) == 2  # each in an order of its own
    dataset.close()


def test_a_loader_can_be_rebatched_and_has_a_length(urls: str, options: dict[str, Any]) -> None:
    dataset = wds.WebDataset(urls, shardshuffle=False, **options).decode().to_tuple("cls", "__key__").batched(4)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=2).unbatched().shuffle(10).batched(5)
    loader = loader.with_length(7, silent=True).with_epoch(7)
    found = list(loader)
    assert len(loader) == 7 == len(found)
    assert {len(numbers) for numbers, _ in found} == {5, 1}  # COUNT is 21: the fifth batch of each epoch has one
    dataset.close()


def test_without_end_all_come_before_any_comes_again(urls: str, options: dict[str, Any]) -> None:
    dataset = wds.WebDataset(urls, resampled=True, **options).shuffle(100).to_tuple("cls").with_epoch(3 * COUNT)
    found = [int(number) for (number,) in dataset]
    orders = [found[at : at + COUNT] for at in range(0, len(found), COUNT)]
    assert [sorted(order) for order in orders] == [list(range(COUNT))] * 3
    assert len(set(map(str, orders))) == 3
    dataset.close()


def test_ranks_share_an_epoch(urls: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node, **options) as dataset:
            found += [int(sample["cls"]) for sample in dataset]
        with wds.WebDataset(urls, shardshuffle=False, nodesplitter=None, **options) as dataset:
            assert [int(sample["cls"]) for sample in dataset] == list(range(COUNT))
    assert sorted(set(found)) == list(range(COUNT))
    assert len(found) == COUNT + 1  # the ranks have as many each


def test_files_are_chosen_by_their_names(urls: str, options: dict[str, Any]) -> None:
    with wds.WebDataset(
        urls, shardshuffle=False, select_files=lambda name: name.endswith(".txt"), **options
    ) as dataset:
        assert [sorted(sample) for sample in dataset] == [["__key__", "__url__", "txt"]] * len(range(0, COUNT, 4))


def test_several_lists_and_files_on_this_machine(folder: Path, options: dict[str, Any]) -> None:
    shards = sorted(map(str, folder.iterdir()))
    for named in (shards, "::".join(shards), [f"file:{shard}" for shard in shards]):
        with wds.WebDataset(named, shardshuffle=False, **options) as dataset:
            assert [int(sample["cls"]) for sample in dataset] == list(range(COUNT))


def test_other_names_are_webdatasets() -> None:
    assert wds.TarWriter is webdataset.TarWriter
    assert wds.warn_and_continue is webdataset.warn_and_continue
    with pytest.raises(AttributeError, match="has 'Nonsense'"):
        wds.Nonsense  # noqa: B018


def test_what_is_not_used_is_said(urls: str, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match=r"cache_dir='/tmp/x' is not used: fastload keeps what it fetches"):
        wds.WebDataset(urls, shardshuffle=False, cache_dir="/tmp/x", **options)
    with pytest.warns(UserWarning, match="handler=warn_and_continue is not used where shards are read"):
        wds.WebDataset(urls, shardshuffle=False, handler=wds.warn_and_continue, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wds.WebDataset(urls, shardshuffle=100, detshuffle=True, nodesplitter=wds.split_by_node, seed=3, **options)


REFUSED: dict[str, tuple[Any, str]] = {
    "a command": (
        lambda urls: wds.WebDataset("pipe:aws s3 cp s3://mine/train-000.tar -"),
        r"runs no commands.*write 's3://mine/train-000.tar'",
    ),
    "a command without an URL": (lambda urls: wds.WebDataset(["pipe:cat x.tar"]), "give the URL of the shard"),
    "several data sets": (lambda urls: wds.WebDataset({"datasets": []}), r"fastload.Mixture"),
    "a file that names several": (lambda urls: wds.WebDataset("all.yaml"), r"'all.yaml' names several.*Mixture"),
    "other names in shards": (lambda urls: wds.WebDataset(urls, rename_files=str.lower), r"\.rename\(new='old'\)"),
    "another way to split by node": (lambda urls: wds.WebDataset(urls, nodesplitter=list), "nodesplitter=list: fa"),
    "no way to split by worker": (lambda urls: wds.WebDataset(urls, workersplitter=None), "each worker would give all"),
    "a stage before the samples": (
        lambda urls: wds.DataPipeline(wds.SimpleShardList(urls), wds.map(dict), wds.tarfile_to_samples()),
        "map stands before tarfile_to_samples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_cure(name: str) -> None:
    make, says = REFUSED[name]
    with pytest.raises(ConfigError, match=says):
        make("/data/train-{000..002}.tar")


def test_batches_of_samples_with_columns_of_their_own_are_refused(urls: str, options: dict[str, Any]) -> None:
    dataset = fastload.StreamingDataset(urls, columns=["*?"], **options)
    with pytest.raises(ConfigError, match=r"columns=\['\*\?'\]: samples have different columns"):
        next(iter(fastload.DataLoader(dataset, batch_size=4)))
    lengths = [found for batch in fastload.DataLoader(dataset.map(len), batch_size=4) for found in batch.tolist()]
    assert len(lengths) == COUNT
    with pytest.raises(ConfigError, match="is all columns, and stands alone"):
        fastload.StreamingDataset(urls, columns=["*?", "cls"], **options)
    with pytest.raises(ConfigError, match="name the columns for decode and tuples"):
        fastload.StreamingDataset(urls, columns=["*?"], as_tuple=True, **options)
    dataset.close()
