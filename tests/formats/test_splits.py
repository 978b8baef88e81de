"""Splits under a prefix: which shards belong to one, by names or by Energon's files; and what is then read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload import prepare
from fastload.bench.plan import Options
from fastload.bench.session import Session
from fastload.cli.warm_tasks import Asked, tables_of, task_of_table
from fastload.client import Handle as Cache
from fastload.errors import ConfigError, ObjectMissingError, ShardError, StateError
from fastload.formats import splits
from fastload.store.objectstore import ObjectStore
from tests.conftest import Bucket
from tests.formats import test_contract
from tests.formats.side_indexes import energons
from tests.formats.test_contract import LIMITS
from tests.programs import run_cli
from tests.shards import tar_of
from tests.test_pinned import pins_of

PREPARED = Path(__file__).parent / "written" / "energon"
YAML = """
exclude:
- shards/b.tar
- shards/c.tar/00011
- shards/c.tar/00012
split_parts:
  train: ["shards/{c,b,a}.tar"]
  val:
  - shards/d.tar
"""
SHARDS = {
    "shards/a.tar": range(5),
    "shards/b.tar": range(5, 10),
    "shards/c.tar": range(10, 17),
    "shards/d.tar": [20, 21],
}
TRAIN = [10, 13, 14, 15, 16, 0, 1, 2, 3, 4]
INFO: dict[str, Any] = {"energon_version": "7.2", "shard_counts": {name: len(ids) for name, ids in SHARDS.items()}}


def write(folder: Path, shards: Mapping[str, Any]) -> str:
    for name, ids in shards.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_of({f"{i:05}": {"id": str(i).encode()} for i in ids}))
    return f"{folder}/"


def energon(folder: Path, text: str = YAML, name: str = "split.yaml", info: Any = INFO) -> str:
    url = write(folder, SHARDS)
    (folder / ".nv-meta").mkdir(exist_ok=True)
    (folder / ".nv-meta" / name).write_text(text)
    if info is not None:
        (folder / ".nv-meta" / ".info.json").write_text(json.dumps(info))
    return url


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache", **LIMITS) as opened:
        yield opened


def data_set(url: Any, cache: Cache, split: str | None = None, **options: Any) -> fastload.StreamingDataset:
    decode = {"id": fastload.decode.integer()}
    return fastload.StreamingDataset(url, cache=cache, split=split, decode=decode, **options)


def ids(dataset: fastload.StreamingDataset, **options: Any) -> list[int]:
    loader = fastload.DataLoader(dataset, **{"batch_size": 3, **options})
    return [int(i) for batch in loader for i in batch["id"]]


# Names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/0.mds", "train"), ("train/deep/0.mds", "train"), ("sft/0.mds", "sft"), ("data/val/0.tar", "val"),
        ("train-00000-of-00006.tar", "train"), ("data/validation-0.tar", "validation"), ("test.tar", "test"),
        ("eval_0.tar", "eval"), ("0.tar", None), ("data/0.tar", None), ("trainer-0.tar", None), ("train0.tar", None),
        ("Train-0.tar", None), ("en/train-0.tar", "en"),
    ],
)  # fmt: skip
def test_names_say_the_split(name: str, split: str | None) -> None:
    assert splits.split_of(name) == split


def test_only_usual_names_show_that_there_are_splits() -> None:
    assert splits.usual_splits(["train/0.tar", "val/0.tar", "sft/0.tar"]) == ["train", "val"]
    for names in (["train/0.tar"], ["a/0.tar", "b/0.tar"], ["train/0.tar", "sft/0.tar"], ["0.tar", "train-0.tar"]):
        assert splits.usual_splits(names) == []


def test_a_split_is_read_by_its_name(tmp_path: Path, cache: Cache) -> None:
    url = write(tmp_path / "data", {"train/0.tar": [0, 1], "val/0.tar": [2], "train/1.tar": [3], "extra/0.tar": [4]})
    assert ids(data_set(url, cache, "train")) == [0, 1, 3]
    assert ids(data_set(url, cache, "extra")) == [4]
    assert ids(data_set(f"{url}train/", cache)) == [0, 1, 3]
    with pytest.raises(ConfigError, match=r"/data/ has splits: 'train', 'val'; name one of them, split='train'"):
        ids(data_set(url, cache))
    with pytest.raises(ConfigError, match=r"/data/ has no split 'dev'; there are 'extra', 'train', 'val'$"):
        ids(data_set(url, cache, "dev"))
    assert ids(data_set([f"{url}train/", f"{url}val/"], cache)) == [0, 1, 3, 2]  # where both are wanted


def test_a_split_of_several_prefixes_is_read(tmp_path: Path, cache: Cache) -> None:
    write(tmp_path, {"x/train/0.tar": [0], "x/val/0.tar": [1], "y/train/0.tar": [2], "y/train/1.tar": [3]})
    assert ids(data_set([f"{tmp_path}/y/", f"{tmp_path}/x/"], cache, "train")) == [2, 3, 0]
    assert ids(data_set(f"{tmp_path}/{{x,y}}/", cache, "train")) == [0, 2, 3]
    with pytest.raises(ConfigError, match=r"/y/ has no split 'val'; there are 'train'"):
        ids(data_set(f"{tmp_path}/{{x,y}}/", cache, "val"))


def test_files_of_the_hub_are_split(tmp_path: Path, cache: Cache) -> None:
    names = {
        "data/train-00000-of-00002.tar": [0],
        "data/train-00001-of-00002.tar": [1],
        "data/test-00000-of-00001.tar": [2],
    }
    url = write(tmp_path / "repository", names)
    assert ids(data_set(url, cache, "train")) == [0, 1]
    assert ids(data_set(f"{url}data/", cache, "test")) == [2]
    with pytest.raises(ConfigError, match=r"has splits: 'test', 'train'"):
        ids(data_set(url, cache))


def test_a_folder_without_splits_is_read_as_ever(tmp_path: Path, cache: Cache) -> None:
    url = write(tmp_path / "data", {"a/0.tar": [0], "b/0.tar": [1], "train/0.tar": [2], "0.tar": [3]})
    assert ids(data_set(url, cache)) == [3, 0, 1, 2]
    url = write(tmp_path / "flat", {"0.tar": [0], "1.tar": [1]})
    says = r"/flat/ has no split 'train'; it has none at all; leave it out, or name a folder with train/ in it"
    with pytest.raises(ConfigError, match=says):
        ids(data_set(url, cache, "train"))


@pytest.mark.parametrize("split", ["", "a/b", 3, ["train"]])
def test_what_is_no_name_of_a_split_is_an_error_at_once(split: Any, cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"split=.* must be the name of a split"):
        data_set("/data/", cache, split)


@pytest.mark.parametrize("name", ["0.tar", "{0,1}.tar", "list.json"])
def test_a_split_of_what_is_no_prefix_is_an_error(name: str, tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(ConfigError, match=r"split='train' is one of those under a prefix, and .* is no prefix"):
        ids(data_set(f"{tmp_path}/{name}", cache, "train"))


@pytest.mark.parametrize("name", ["tar", "mds", "litdata", "jsonl.gz", "tfrecord"])
def test_splits_of_any_format(name: str, tmp_path: Path, cache: Cache) -> None:
    for split, parts in (("train", [range(5), range(5, 9)]), ("val", [range(9, 12)])):
        (tmp_path / "data" / split).mkdir(parents=True)
        test_contract.FORMATS[name](tmp_path / "data" / split, parts)
    url = f"{tmp_path}/data/"
    read = test_contract.data_set(name, url, cache, split="val", shuffle=False)
    assert test_contract.order(read) == [9, 10, 11]
    assert test_contract.order(test_contract.data_set(name, url, cache, split="train", shuffle=False)) == [*range(9)]
    with pytest.raises(ConfigError, match=r"has splits: 'train', 'val'"):
        test_contract.order(test_contract.data_set(name, url, cache))


def test_splits_of_tokens(tmp_path: Path, cache: Cache) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.bin").write_bytes(bytes([0, len(split)]) * 16)
    how = fastload.formats.tokens(4, "uint16", overlap=0)
    options: dict[str, Any] = {"cache": cache, "format": how, "shuffle": False}
    with pytest.raises(ConfigError, match=r"has splits: 'train', 'val'"):
        list(fastload.StreamingDataset(f"{folder}/", **options))
    found = list(fastload.StreamingDataset(f"{folder}/", split="val", **options))
    assert [sample["tokens"].tolist() for sample in found] == [[3 << 8] * 4] * 4


def test_an_index_beside_one_split_counts_its_samples(tmp_path: Path, cache: Cache) -> None:
    for split, part in (("train", range(5)), ("val", range(3))):
        (tmp_path / "data" / split).mkdir(parents=True)
        test_contract.mds(tmp_path / "data" / split, [part])
    assert len(test_contract.data_set("mds", f"{tmp_path}/data/", cache, split="val")) == 3


def test_a_list_of_shards_belongs_to_its_split(tmp_path: Path, cache: Cache) -> None:
    url = write(tmp_path / "data", {"train/0.tar": [0, 1], "val/0.tar": [2]})
    file = tmp_path / "list.json"
    assert ids(data_set(url, cache, "train", manifest=file)) == [0, 1]
    assert ids(data_set(url, cache, "train", manifest=file)) == [0, 1]
    with pytest.raises(ConfigError, match=r"was made of .*/data/ split=train, and this data set is .*/data/ split=val"):
        ids(data_set(url, cache, "val", manifest=file))


@pytest.mark.parametrize("is_energons", [False, True])
def test_one_listing_finds_a_split_in_a_bucket(
    is_energons: bool, s3: Bucket, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, part in SHARDS.items():
        s3.put(f"data/{name}", tar_of({f"{i:05}": {"id": str(i).encode()} for i in part}))
    if is_energons:
        s3.put("data/.nv-meta/split.yaml", YAML.encode())
        s3.put("data/.nv-meta/.info.json", json.dumps(INFO).encode())
    asked = []
    for verb in ("list", "head"):
        ask = getattr(ObjectStore, verb)
        monkeypatch.setattr(ObjectStore, verb, lambda self, url, ask=ask: asked.append(url) or ask(self, url))
    assert ids(data_set(f"{s3.url}/data/", cache, "train" if is_energons else "shards")) == (
        TRAIN if is_energons else [i for part in SHARDS.values() for i in part]
    )
    assert asked == [f"{s3.url}/data/"]


# Energon


@pytest.mark.parametrize("how", ["yaml", "json", "yaml counts", "no counts"])
def test_energons_splits_are_read(how: str, tmp_path: Path, cache: Cache) -> None:
    import yaml

    text = json.dumps(yaml.safe_load(YAML)) if how == "json" else YAML
    url = energon(
        tmp_path / "data", text, "split.json" if how == "json" else "split.yaml", INFO if "c" not in how else None
    )
    if how == "yaml counts":
        (tmp_path / "data/.nv-meta/.info.yaml").write_text(yaml.safe_dump(INFO))
    assert ids(data_set(url, cache, "train")) == TRAIN
    assert ids(data_set(url, cache, "val")) == [20, 21]
    with pytest.raises(ConfigError, match=r"/data/ has splits \(.*/split\.\w+\): 'train', 'val'; name one of them"):
        ids(data_set(url, cache))
    with pytest.raises(ConfigError, match=r"/data/ has no split 'test'; there are 'train', 'val'$"):
        ids(data_set(url, cache, "test"))


def test_counts_are_known_before_anything_is_read(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    assert len(data_set(url, cache, "val")) == 2
    assert data_set(url, cache, "train").known_counts().tolist() == [5, 5]  # of which c.tar was indexed for that


def test_a_count_that_is_wrong_is_an_error(tmp_path: Path, cache: Cache) -> None:
    info = {"shard_counts": {name: len(part) for name, part in SHARDS.items()} | {"shards/d.tar": 3}}
    url = energon(tmp_path / "data", info=info)
    with pytest.raises(ShardError, match=r"d\.tar holds 2 samples, but .* says 3"):
        ids(data_set(url, cache, "val"))


def test_samples_that_are_excluded_are_in_no_way_there(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    dataset = data_set(url, cache, "train")
    assert (len(dataset), dataset.sample_count) == (10, 10)
    assert [int(dataset[number]["id"]) for number in (0, 1, 4, 5)] == [10, 13, 16, 0]
    assert dataset[1]["__key__"] == "00013"
    assert [len(batch["id"]) for batch in fastload.DataLoader(dataset, batch_size=4)] == [4, 4, 2]
    # What the cache keeps is of whole shards, also where it was read with some left out.
    assert ids(data_set(f"{url}shards/c.tar", cache)) == [*range(10, 17)]
    assert len(data_set(f"{url}shards/c.tar", cache)) == 7
    assert ids(data_set(url, cache, "train")) == TRAIN


@pytest.mark.parametrize("how", ["file", "beside", "cache"])
def test_the_order_is_the_same_with_an_index(how: str, tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "shuffle_window": "1KiB"}
    found = ids(data_set(url, cache, "train", **options))
    assert sorted(found) == sorted(TRAIN)
    file = tmp_path / ("data/fastload-index.arrow" if how == "beside" else "index.arrow")
    with Cache(tmp_path / "another", **LIMITS) as another:
        indexed = prepare.index([url], another, split="train", output=None if how == "cache" else file)
        assert (indexed.shard_count, indexed.sample_count) == (2, 12)  # of whole shards
        index = str(file) if how == "file" else None
        assert ids(data_set(url, another, "train", index=index, **options)) == found
        assert len(data_set(url, another, "train", index=index)) == 10
        if how == "file":
            assert ids(data_set(f"{url}shards/c.tar", another, index=index)) == [*range(10, 17)]


def test_a_state_goes_on_at_the_next_sample(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    options: dict[str, Any] = {"shuffle": True, "seed": 3, "shuffle_window": "1KiB"}
    whole = ids(data_set(url, cache, "train", **options), batch_size=2)
    for stop in range(1, 5):
        loader = fastload.DataLoader(data_set(url, cache, "train", **options), batch_size=2)
        batches = iter(loader)
        begun = [int(i) for _ in range(stop) for i in next(batches)["id"]]
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
        again = fastload.DataLoader(data_set(url, cache, "train", **options), batch_size=2)
        again.load_state_dict(state)
        assert begun + [int(i) for batch in again for i in batch["id"]] == whole
    energon(tmp_path / "data", YAML.replace("00012", "00014"))
    other = fastload.DataLoader(data_set(url, cache, "train", **options), batch_size=2)
    other.load_state_dict(state)
    with pytest.raises(StateError):
        list(other)


def test_batches_are_the_same_at_every_number_of_ranks(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    options: dict[str, Any] = {"shuffle": True, "shuffle_window": "1KiB"}
    whole = ids(data_set(url, cache, "train", rank=0, world_size=1, **options), batch_size=2)
    ranks = [
        ids(data_set(url, cache, "train", rank=rank, world_size=2, tail="uneven", **options), batch_size=1)
        for rank in range(2)
    ]
    assert sorted(ranks[0] + ranks[1]) == sorted(whole)
    assert [sorted(pair) for pair in zip(*ranks, strict=True)] == [sorted(whole[at : at + 2]) for at in range(0, 10, 2)]


def test_workers_and_lists_of_shards_leave_the_same_out(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    file = tmp_path / "list.json"
    assert ids(data_set(url, cache, "train", manifest=file), num_workers=2) == TRAIN
    (tmp_path / "data/.nv-meta/split.yaml").write_text("split_parts: {train: [shards/a.tar]}")
    assert ids(data_set(url, cache, "train", manifest=file)) == TRAIN
    assert ids(data_set(url, cache, "train")) == [0, 1, 2, 3, 4]


def test_a_split_that_grows_leaves_out_what_is_excluded_then(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    loader = fastload.DataLoader(data_set(url, cache, "train", refresh="epoch"), batch_size=3)
    assert [int(i) for batch in loader for i in batch["id"]] == TRAIN
    energon(tmp_path / "data", YAML.replace("- shards/c.tar/00011", "- shards/a.tar/00003"))
    assert [int(i) for batch in loader for i in batch["id"]] == [10, 11, 13, 14, 15, 16, 0, 1, 2, 4]


def test_a_sample_to_be_left_out_that_is_not_there_is_a_warning(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data", YAML.replace("00012", "99999"))
    with pytest.warns(RuntimeWarning, match=r"c\.tar: of 2 samples that are to be left out it does not hold 1"):
        assert ids(data_set(url, cache, "train")) == [10, 12, *TRAIN[1:]]


def test_keys_with_folders_are_excluded(tmp_path: Path, cache: Cache) -> None:
    samples = {"in/a": {"id": b"0"}, "in/b": {"id": b"1"}, "b": {"id": b"2"}, "é": {"id": b"3"}}
    folder = tmp_path / "data"
    (folder / ".nv-meta").mkdir(parents=True)
    (folder / "a.tar").write_bytes(tar_of(samples))
    text = "split_parts: {train: [./a.tar]}\nexclude: [a.tar/in/b, a.tar/é]"
    (folder / ".nv-meta/split.yaml").write_text(text)
    assert ids(data_set(f"{folder}/", cache, "train")) == [0, 2]


BAD = {
    "no table": ("[1, 2]", r"is no table of names"),
    "no parts": ("exclude: []", r"has no split_parts"),
    "parts are no table": ("split_parts: [a]", r"has no split_parts"),
    "empty": ("split_parts: {}", r"has no split_parts"),
    "a part is no list": ("split_parts: {train: a.tar}", r"has no split_parts that are lists"),
    "a shard is no text": ("split_parts: {train: [[a]]}", r"names \['a'\], which is no text"),
    "not there": ("split_parts: {train: [shards/x.tar]}", r"split\.yaml names shards/x\.tar, which is no shard under"),
    "elsewhere": ("split_parts: {train: [../other/x.tar]}", r"names \.\./other/x\.tar, which is no shard under"),
    "braces": ("split_parts: {train: ['a{b']}", r"the braces of 'a\{b' do not match"),
    "far too many": ("split_parts: {train: ['{0..99999999999}.tar']}", r"names more than \d+ shards"),
    "many times many": ("split_parts: {train: ['%s']}" % ("{a,b}" * 64), r"names more than \d+ shards"),
    "a huge number": ("split_parts: {train: ['{0..1%s}']}" % ("0" * 5000), r"names more than \d+ shards"),
    "too many steps": ("split_parts: {train: ['%s']}" % ("{0..9..1}" * 9), r"names more than \d+ shards"),
    "deep braces": ("split_parts: {train: ['" + "{" * 5000 + "}" * 5000 + "']}", r"names more than \d+ shards"),
    "exclude is no list": ("split_parts: {train: []}\nexclude: a.tar", r"exclude is no list"),
    "no YAML": ("split_parts: {train: [", r"split\.yaml is no YAML: .*; write it again"),
    "control": ("split_parts: \x01", r"split\.yaml is no YAML"),
    "an object": ("!!python/object/apply:os.system ['true']", r"is no table of names"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_say_no_splits_are_errors_that_name_them(case: str, tmp_path: Path, cache: Cache) -> None:
    text, message = BAD[case]
    url = energon(tmp_path / "data", text)
    with pytest.raises(ConfigError, match=message):
        ids(data_set(url, cache, "train"))


@pytest.mark.parametrize("count", ['"x"', "-1", "1.5", "[1]", "9999999999999999999999"])
def test_counts_that_are_none_are_errors(count: str, tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data", info=None)
    (tmp_path / "data/.nv-meta/.info.json").write_text('{"shard_counts": {"shards/d.tar": ' + count + "}}")
    with pytest.raises(ConfigError, match=r"\.info\.json: shards/d\.tar has .* samples, which is no number"):
        ids(data_set(url, cache, "val"))


def test_without_pyyaml_the_error_names_it(tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    url = energon(tmp_path / "data")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(ConfigError, match=r"is YAML, which needs PyYAML: pip install 'fastload\[energon\]'"):
        ids(data_set(url, cache, "train"))


def test_a_split_may_have_no_shard(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data", "split_parts: {train: [shards/a.tar]}\nexclude: [shards/a.tar]")
    with pytest.raises(ObjectMissingError, match=r"no shards at all"):
        ids(data_set(url, cache, "train"))


def test_samples_of_other_formats_are_not_left_out(tmp_path: Path, cache: Cache) -> None:
    folder = tmp_path / "data"
    (folder / ".nv-meta").mkdir(parents=True)
    (folder / "a.jsonl").write_text('{"id": 1}\n')
    (folder / ".nv-meta/split.yaml").write_text("split_parts: {train: [a.jsonl]}\nexclude: [a.jsonl/0]")
    with pytest.raises(ConfigError, match=r"excludes samples of a\.jsonl, and single ones are left out of tars only"):
        list(fastload.StreamingDataset(f"{folder}/", cache=cache, split="train", columns=["id"]))


def test_what_energon_prepared(tmp_path: Path, cache: Cache) -> None:
    """By megatron-energon 7.4 itself, of tars by webdataset."""
    columns: dict[str, Any] = {"cache": cache, "columns": ["txt"]}
    train = fastload.StreamingDataset(f"{PREPARED}/", split="train", **columns)
    assert train.known_counts().tolist() == [2, 3]
    assert [bytes(sample["txt"]).decode() for sample in train] == [f"text {i}" for i in (0, 1, 3, 4, 5)]
    held_out = fastload.StreamingDataset(f"{PREPARED}/", split="val", **columns)
    assert [sample["__key__"] for sample in held_out] == ["in/002"]
    bare = fastload.StreamingDataset(f"{PREPARED}/shards/", **columns)  # with `.tar.idx` alone
    assert bare.known_counts().tolist() == [2, 1, 3]
    shutil.copytree(PREPARED, tmp_path / "data")
    text = (tmp_path / "data/.nv-meta/split.yaml").read_text().replace("exclude: []", "exclude: [shards/2.tar/in/004]")
    (tmp_path / "data/.nv-meta/split.yaml").write_text(text)
    left = fastload.StreamingDataset(f"{tmp_path}/data/", split="train", **columns)
    assert [sample["__key__"] for sample in left] == ["in/000", "in/001", "in/003", "in/005"]
    for path in (PREPARED / "shards").glob("*.tar"):  # the writer of other tests is as true
        assert path.with_name(path.name + ".idx").read_bytes() == energons(path.read_bytes())


# Everywhere


def test_warming_and_schemas_are_of_a_split(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    size = sum((tmp_path / "data" / f"shards/{name}.tar").stat().st_size for name in "ac")
    warmed = fastload.warm(url, cache=cache, split="train")
    assert (warmed.object_count, warmed.total_bytes, warmed.sample_count) == (2, size, 10)
    assert fastload.warm(url, cache=cache, split="train", check=True).is_complete
    assert list(fastload.schema(url, cache=cache, split="train")) == ["id"]
    with pytest.raises(ConfigError, match=r"has splits .*: 'train', 'val'"):
        fastload.warm(url, cache=cache)
    with pytest.raises(ConfigError, match=r"has no split 'x'"):
        fastload.schema(url, cache=cache, split="x")


def test_pins_of_two_splits_are_two(tmp_path: Path, cache: Cache) -> None:
    url = energon(tmp_path / "data")
    fastload.warm(url, cache=cache, split="train", pin=True)
    fastload.warm(url, cache=cache, split="val", pin=True)
    assert sorted(name.rpartition(" ")[2] for name in pins_of(cache.directory)) == ["split=train", "split=val"]


def test_commands_are_of_a_split(tmp_path: Path) -> None:
    url = energon(tmp_path / "data")
    cache = ["--cache", tmp_path / "cache", "--ram-bytes", "16MiB", "--disk-bytes", "64MiB", "--chunk-bytes", "64KiB"]
    assert "2 shards, 12 samples" in run_cli("index", url, "--split=train", *cache).stderr
    looked = json.loads(run_cli("warm", url, "--split=val", "--dry-run", "--json", *cache).stdout)
    assert looked["data"][0]["total_bytes"] == (tmp_path / "data/shards/d.tar").stat().st_size
    failed = run_cli("index", url, *cache, check=False)
    assert (failed.returncode, "--split=train" in failed.stderr) == (1, True)


def test_tables_of_the_daemon_name_a_split(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[[data]]\nname = "a"\nurls = ["/data/"]\njob = { split = "train" }\n')
    (table,) = tables_of(file, {})
    job = task_of_table(table, Asked(None, None, None, False, None)).job
    assert job is not None
    assert job.split == "train"
    file.write_text('[[data]]\nname = "a"\nurls = ["/data/"]\njob = { split = "a/b" }\n')
    with pytest.raises(ConfigError, match=r"split='a/b' must be the name of a split"):
        tables_of(file, {})


def test_a_benchmark_reads_a_split(tmp_path: Path) -> None:
    options = Options([energon(tmp_path / "data")], split="train", cache=tmp_path / "bench")
    with Session(options, [], lambda words: None) as session:
        assert [each.url.rpartition("/")[2] for each in session.plan().objects] == ["c.tar", "a.tar"]
