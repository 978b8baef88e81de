"""Code that was written for litdata, with the import changed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import fastload
from fastload.adapters.litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
from fastload.errors import ConfigError
from fastload.formats.litdata import tree
from tests.conftest import Bucket
from tests.formats.test_litdata import COUNT, WRITTEN, check


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


@pytest.fixture
def url(s3: Bucket) -> str:
    for path in (WRITTEN / "litdata").iterdir():
        s3.put(f"lit/{path.name}", path.read_bytes())
    return f"s3://{s3.name}/lit"


def flat(sample: dict[str, Any]) -> dict[str, Any]:
    """With the paths of leaves as names."""
    meta = sample["meta"]
    return {
        **{name: value for name, value in sample.items() if name not in ("meta", "words")},
        "meta/näme": meta["näme"], "meta/ok": meta["ok"],
        **{f"meta/pair/{at}": value for at, value in enumerate(meta["pair"])},
        **{f"words/{name}": value for name, value in sample.get("words", {}).items()},
    }  # fmt: skip


class Doubled(StreamingDataset):
    """As litdata's users write theirs."""

    def __getitem__(self, index: Any) -> Any:
        sample = super().__getitem__(index)
        return 2 * int(sample["id"]), sample["meta"]["näme"]


def shortened(sample: dict[str, Any]) -> tuple[int, bool]:
    return int(sample["id"]), bool(sample["meta"]["ok"])


def test_samples_are_the_trees_that_were_written(url: str, cache: fastload.Cache) -> None:
    dataset = StreamingDataset(url, cache=cache)
    assert len(dataset) == COUNT
    samples = list(dataset)
    for i, sample in enumerate(samples):
        assert isinstance(sample["meta"]["pair"], tuple)
        assert "__key__" not in sample
        check(flat(sample), i)
    check(flat(dataset[5]), 5)
    assert [int(sample["id"]) for sample in dataset[3:6]] == [0, 1, 2]
    dataset.close()


def test_leaves_are_what_litdata_gives(url: str, cache: fastload.Cache, tmp_path: Path) -> None:
    dataset = StreamingDataset(url, cache=cache)
    sample, by_number = next(iter(dataset)), dataset[0]
    for leaves in (flat(sample), flat(by_number)):
        kinds = {name: type(leaf) for name, leaf in leaves.items() if name[:5] != "words"}
        assert kinds == {
            "id": int, "meta/näme": str, "meta/ok": bool, "meta/pair/0": float, "meta/pair/1": bytes,
            "matrix": torch.Tensor, "row": torch.Tensor, "grid": np.ndarray, "line": np.ndarray,
            "png": torch.Tensor, "bare": Image.Image, "jpegs": list,
        }  # fmt: skip
        assert type(leaves["jpegs"][0]) is torch.Tensor
    batches = {size: next(iter(StreamingDataLoader(dataset, batch_size=size))) for size in (1, 2)}
    assert (batches[1]["row"].shape, batches[1]["grid"].shape) == ((1, 0), (1, 1, 2))
    assert (batches[2]["row"].lengths.tolist(), len(batches[2]["grid"])) == ([0, 1], 2)
    dataset.close()
    about = json.loads((WRITTEN / "litdata" / "index.json").read_bytes())
    version, root = json.loads(about["config"]["data_spec"])
    keys = json.loads(root["context"])
    root["context"] = json.dumps([*keys, "none", "nothing"])
    empty = {"context": "[]", "children_spec": []}
    root["children_spec"] += [{"type": "builtins.dict", **empty}, {"type": "builtins.tuple", **empty}]
    about["config"]["data_spec"] = json.dumps([version, root])
    shutil.copytree(WRITTEN / "litdata", tmp_path / "lit")
    (tmp_path / "lit" / "index.json").write_text(json.dumps(about))
    sample = StreamingDataset(str(tmp_path / "lit"), cache=cache)[0]
    assert (sample["none"], sample["nothing"]) == ({}, ())


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_trees_of_columns(url: str, cache: fastload.Cache, workers: int) -> None:
    dataset = StreamingDataset(url, shuffle=True, cache=cache)
    seen = []
    for batch in StreamingDataLoader(dataset, batch_size=5, num_workers=workers):
        assert batch["id"].dtype == torch.int64
        assert batch["meta"]["pair"][0].dtype == torch.float64
        seen += batch["id"].tolist()
    assert sorted(seen) == [i - 3 for i in range(COUNT)]
    assert seen != sorted(seen)
    straight = StreamingDataLoader(dataset, batch_size=5, num_workers=workers, shuffle=False)
    assert [number for batch in straight for number in batch["id"].tolist()] == sorted(seen)
    assert [each for ids in StreamingDataLoader(dataset, batch_size=5, collate_fn=_ids) for each in ids] == sorted(seen)
    straight.close()


def _ids(samples: list[dict[str, Any]]) -> list[int]:
    return [int(sample["id"]) for sample in samples]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_go_through_a_subclass_or_a_transform(url: str, cache: fastload.Cache, workers: int) -> None:
    expected = [(2 * (i - 3), f"é{i}") for i in range(COUNT)]
    for loader in (DataLoader, StreamingDataLoader):
        dataset = Doubled(url, cache=cache)
        batches = loader(dataset, batch_size=5, num_workers=workers)
        found = [pair for numbers, names in batches for pair in zip(numbers.tolist(), names, strict=True)]
        # torch's workers take turns
        assert found == expected or (loader is DataLoader and workers and sorted(found) == sorted(expected))
        assert dataset[7] == expected[7]
        dataset.close()
    for transform in (shortened, [shortened, tuple]):
        dataset = StreamingDataset(url, cache=cache, transform=transform)
        assert list(dataset) == [(i - 3, i % 3 == 0) for i in range(COUNT)]
        loaded = StreamingDataLoader(dataset, batch_size=7, num_workers=workers)
        assert [number for numbers, _ in loaded for number in numbers.tolist()] == [i - 3 for i in range(COUNT)]
        loaded.close()


def test_the_loader_resumes_where_it_was(url: str, cache: fastload.Cache) -> None:
    def opened() -> StreamingDataLoader:
        return StreamingDataLoader(StreamingDataset(url, shuffle=True, cache=cache), batch_size=5)

    loader = opened()
    batches = iter(loader)
    seen = [number for _ in range(2) for number in next(batches)["id"].tolist()]
    state = loader.state_dict()
    rest = [number for batch in batches for number in batch["id"].tolist()]
    resumed = opened()
    resumed.load_state_dict(state)
    assert [number for batch in resumed for number in batch["id"].tolist()] == rest
    assert sorted(seen + rest) == [i - 3 for i in range(COUNT)]
    loader.close()
    resumed.close()


def test_several_data_sets_are_combined(url: str, cache: fastload.Cache) -> None:
    def one(**options: Any) -> StreamingDataset:
        return StreamingDataset(url, cache=cache, transform=shortened, **options)

    whole = CombinedStreamingDataset([one(), one(seed=1)])
    drawn = [number for numbers, _ in StreamingDataLoader(whole, batch_size=6) for number in numbers.tolist()]
    assert sorted(drawn) == sorted([i - 3 for i in range(COUNT)] * 2)
    assert sorted(number for number, _ in whole) == sorted(drawn)
    more = CombinedStreamingDataset([one(), one()], weights=[0.75, 0.25], iterate_over_all=False)
    assert COUNT < len(list(more)) < 2 * COUNT
    trees = CombinedStreamingDataset([StreamingDataset(url, cache=cache), StreamingDataset(url, cache=cache)])
    sample = next(iter(trees))
    check(flat(sample), int(sample["id"]) + 3)
    for dataset in (whole, more, trees):
        dataset.close()


def test_what_has_no_part_here_is_said_and_what_cannot_be_is_refused(url: str, cache: fastload.Cache) -> None:
    with pytest.warns(UserWarning, match=r"max_cache_size='1GB' is not used: fastload's cache has limits of its own"):
        StreamingDataset(url, cache=cache, max_cache_size="1GB")
    with pytest.warns(UserWarning, match="cache_dir='/tmp/lit' is not used"):
        StreamingDataset(url, cache_dir="/tmp/lit", cache=cache)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StreamingDataset(url, shuffle=True, drop_last=True, seed=3, cache=cache)
    for arguments, says in (
        ({"item_loader": 1}, r"TokensLoader\(block_size"),
        ({"encryption": 1}, "write the chunks without"),
        ({"subsample": 0.5}, r"dataset.filter\(\)"),
    ):
        with pytest.raises(ConfigError, match=says):
            StreamingDataset(url, cache=cache, **arguments)
    with pytest.raises(ConfigError, match="batching_method='per_stream'"):
        CombinedStreamingDataset([StreamingDataset(url, cache=cache)], batching_method="per_stream")
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        StreamingDataset(url, nonsense=1)
    with pytest.raises(ConfigError, match=r"call state_dict\(\) of the StreamingDataLoader"):
        StreamingDataset(url, cache=cache).state_dict(3, 1, 2)


LEAF = {"type": None, "context": None, "children_spec": []}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LEAF, "0"),
        ({"type": "builtins.list", "context": "null", "children_spec": [LEAF]}, ["0"]),
        ({"type": "builtins.tuple", "context": "null", "children_spec": [LEAF]}, ("0",)),
        ({"type": "builtins.dict", "context": '["a"]', "children_spec": [LEAF]}, {"a": "a"}),
    ],
)
def test_a_tree_has_the_shape_of_what_was_written(spec: dict[str, Any], expected: Any) -> None:
    config = {"data_format": ["int"], "data_spec": json.dumps([1, spec]), "compression": None, "encryption": None}
    assert tree(json.dumps({"chunks": [], "config": config}).encode(), "s3://b/index.json") == expected


def test_leaves_are_left_out_and_a_loaders_shuffle_is_not_ignored(url: str, cache: fastload.Cache) -> None:
    few = StreamingDataset(url, cache=cache, columns=["id", "meta/ok"])
    assert [set(sample) for sample in few] == [{"id", "meta"}] * COUNT
    (first, *_) = few
    assert set(first["meta"]) == {"ok"}
    combined = CombinedStreamingDataset([few, StreamingDataset(url, cache=cache, columns=["id", "meta/ok"])])
    with pytest.raises(ConfigError, match="shuffle=True of the loader: the data set shuffles, or not"):
        StreamingDataLoader(combined, shuffle=True)
    StreamingDataLoader(combined, shuffle=False).close()
    with pytest.raises(TypeError):
        few["id"]
    combined.close()


class TokensLoader:
    """As litdata's, as far as it is asked."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size


def test_blocks_of_tokens_are_read(cache: fastload.Cache) -> None:
    dataset = StreamingDataset(f"{WRITTEN}/litdata_tokens", item_loader=TokensLoader(16), cache=cache)
    assert len(dataset) == 68
    first = [100 * i + n for i in range(3) for n in range(1 + 7 * i)][:16]
    assert dataset[0].tolist() == next(iter(dataset)).tolist() == first
    batch = next(iter(StreamingDataLoader(dataset, batch_size=4)))
    assert (batch.shape, batch.dtype, batch[0].tolist()) == ((4, 16), torch.int32, first)
