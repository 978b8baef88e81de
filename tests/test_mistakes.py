"""The table of mistakes: what people type, and the value, the place and the cure that its message must name."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastload
from fastload import decode
from tests.programs import run, run_cli
from tests.shards import corpus, tar_of

LIMITS = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB"}


@dataclass
class Desk:
    """A newcomer's: a folder of shards, and of all that is none."""

    folder: Path
    cache: fastload.Cache

    def dataset(self, urls: Any = None, **options: Any) -> fastload.StreamingDataset:
        return fastload.StreamingDataset(
            f"{self.folder}/shards/" if urls is None else urls, **{"cache": self.cache, **options}
        )

    def read(self, dataset: Any = None, **options: Any) -> None:
        dataset = self.dataset() if dataset is None else dataset
        with fastload.DataLoader(dataset, **{"batch_size": 4, **options}) as loader:
            for _ in loader:
                pass


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("desk")
    corpus(3, 6).write(folder / "shards")
    (folder / "nothing").mkdir()
    (folder / "pictures").mkdir()
    (folder / "packed").mkdir()
    (folder / "tables").mkdir()
    (folder / "indexed").mkdir()
    (folder / "indexed" / "index.json").write_text('{"version": 2, "shards": []}')
    for number in range(2):
        (folder / "tables" / f"{number}.parquet").write_bytes(b"PAR1")
    (folder / "pictures" / "0.jpg").write_bytes(b"\xff\xd8" + b"0" * 600)
    (folder / "packed" / "x.tar.lz4").write_bytes(b"\x1f\x8b" + b"0" * 600)
    (folder / "empty.tar").write_bytes(tar_of({}))
    return folder


@pytest.fixture
def desk(shelf: Path, tmp_path: Path):
    with fastload.Cache(tmp_path / "cache", **LIMITS, service="inprocess") as cache:
        yield Desk(shelf, cache)


def divides(sample: Any) -> Any:
    return 1 / 0


def same(sample: Any) -> Any:
    return sample


def forgets(sample: Any) -> None:
    """To return it."""


class Local(torch.utils.data.Dataset[int]):
    """Cannot be pickled."""

    def __init__(self) -> None:
        self.function = lambda value: value

    def __len__(self) -> int:
        return 3

    def __getitem__(self, number: int) -> int:
        return number


def closed_in_mid_epoch(desk: Desk) -> None:
    loader = fastload.DataLoader(desk.dataset(), batch_size=2)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    next(iterator)


def cache_closed_in_mid_epoch(desk: Desk) -> None:
    iterator = iter(fastload.DataLoader(desk.dataset(), batch_size=2))
    next(iterator)
    desk.cache.close()
    list(iterator)


def used_in_a_forked_child(desk: Desk) -> None:
    """The iterator is the parent's: the child's error is raised here."""
    iterator = iter(fastload.DataLoader(desk.dataset(), batch_size=2))
    next(iterator)
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            next(iterator)
        except fastload.ServiceError as error:
            os.write(writing, pickle.dumps(error))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    list(iterator)
    raise pickle.loads(told)


Mistake = tuple[Callable[[Desk], Any], type[Exception], tuple[str, ...]]
C, M, T = fastload.ConfigError, fastload.ObjectMissingError, TypeError

MISTAKES: dict[str, Mistake] = {
    # What is to be read
    "a number for a URL": (lambda d: d.dataset(3), C, ("urls=3", "a list of these")),
    "no URL": (lambda d: d.dataset([]), C, ("urls=[]", "at least one")),
    "a list in a list": (lambda d: d.dataset([["a.tar"]]), C, ("['a.tar'] is neither a URL nor a path",)),
    "an empty URL": (lambda d: d.dataset(""), C, ("urls='' names", "at least one")),
    "a dict of URLs": (lambda d: d.dataset({"train": "a.tar"}), C, ("{'train': 'a.tar'}", "a list of these")),
    "a folder without its slash": (
        lambda d: d.read(d.dataset(f"{d.folder}/shards")),
        M,
        ("/shards is a folder", "write ", "/shards/"),
    ),
    "a folder of pictures": (
        lambda d: d.read(d.dataset(f"{d.folder}/pictures/")),
        M,
        ("/pictures/: no shards", "0.jpg", "tar --sort=name -cf"),
    ),
    "a picture": (
        lambda d: d.read(d.dataset(f"{d.folder}/pictures/0.jpg")),
        fastload.ShardError,
        ("0.jpg", "it is read as a WebDataset tar", "format="),
    ),
    "a folder of tables": (
        lambda d: d.read(d.dataset(f"{d.folder}/tables/")),
        M,
        ("/tables/: no shards", "2 .parquet", "(.parquet) are not read", "to_json(", "as MDS"),
    ),
    "a table": (
        lambda d: d.read(d.dataset(f"{d.folder}/tables/0.parquet")),
        fastload.ShardError,
        ("/tables/0.parquet: tables (.parquet) are not read", 'read_parquet("x.parquet").to_json('),
    ),
    "a folder of files called otherwise": (
        lambda d: d.read(d.dataset(f"{d.folder}/pictures/", format="tfrecord")),
        M,
        ("/pictures/: no shards", "named one by one, by a pattern"),
    ),
    "an index without shards": (
        lambda d: d.read(d.dataset(f"{d.folder}/indexed/")),
        M,
        ("/indexed/: no shards", "index.json; that names the shards of MDS and LitData: upload those"),
    ),
    "an empty folder": (lambda d: d.read(d.dataset(f"{d.folder}/nothing/")), M, ("/nothing/", "nothing at all")),
    "a folder of packed tars": (lambda d: d.read(d.dataset(f"{d.folder}/packed/")), M, ("x.tar.lz4", "zstd or gzip")),
    "a packed tar": (lambda d: d.read(d.dataset(f"{d.folder}/packed/x.tar.lz4")), C, ("x.tar.lz4", "unlz4 x.tar.lz4")),
    "a pattern with too many": (
        lambda d: d.read(d.dataset(f"{d.folder}/shards/shard-{{0000..0004}}.tar")),
        M,
        ("shard-{0000..0004}.tar: 2 of its 5", "shard-0003.tar", "correct the range"),
    ),
    "a star": (lambda d: d.read(d.dataset(f"{d.folder}/shards/*.tar")), M, ('"*" stands for itself', "{000000..")),
    "an open brace": (lambda d: d.read(d.dataset("s3://b/{0..3.tar")), C, ("'s3://b/{0..3.tar'", "{000..123}")),
    "a command": (lambda d: d.dataset("pipe:curl http://h/{0..9}.tar"), C, ("pipe:curl", "https://host/train-")),
    "URLs in one": (lambda d: d.dataset("s3://a/b.tar::s3://c/d.tar"), C, ("s3://c/d.tar'", '"::"', "as a list")),
    "a chain of fsspec": (lambda d: d.dataset("simplecache::s3://a/b.tar"), C, ('leave out "simplecache::"',)),
    "a slip in s3": (lambda d: d.dataset("s4://bucket/x.tar"), C, ("'s4://bucket/x.tar'", "did you mean s3://?")),
    "a slip in https": (
        lambda d: d.dataset("htps://u:pw@h/x.tar"),
        C,
        ("'htps://u:***@h/x.tar'", "did you mean https://?"),
    ),
    "one slash": (lambda d: d.read(d.dataset("s3:/bucket/x.tar")), M, ("write s3://bucket/x.tar",)),
    "one slash before a folder": (lambda d: d.read(d.dataset("s3:/bucket/x/")), M, ("write s3://bucket/x/",)),
    "a star in a folder": (lambda d: d.read(d.dataset(f"{d.folder}/sh*/")), M, ('"*" stands for itself',)),
    "file: and no slash": (lambda d: d.read(d.dataset("file:x.tar")), M, ("file:x.tar", "write x.tar, or file://")),
    "a bucket": (lambda d: d.read(d.dataset("s3://bucket")), C, ("s3://bucket is a bucket", '"/" at the end')),
    "an endpoint without http": (
        lambda d: d.read(d.dataset("s3://b/x.tar", storage_options={"endpoint_url": "localhost:9000"})),
        C,
        ("endpoint_url='localhost:9000'", "http://host:port"),
    ),
    "a misspelt storage option": (
        lambda d: d.read(d.dataset("s3://b/x.tar", storage_options={"endpont": "http://h"})),
        C,
        ("'endpont'", "endpoint_url"),
    ),
    # Arguments of a data set
    "a cache in second place": (lambda d: fastload.StreamingDataset("a.tar", d.cache), T, ("by its name", "cache=")),
    "another library's argument": (lambda d: d.dataset(shuffle_buffer=9), T, ("'shuffle_buffer'", "shuffle_window")),
    "a transform": (lambda d: d.dataset(transform=print), T, ("'transform'", "dataset.map(function)")),
    "a buffer for shuffle": (lambda d: d.dataset(shuffle=1000), C, ("shuffle=1000", '"window"')),
    "a seed as text": (lambda d: d.dataset(seed="0"), C, ("seed='0'", "an integer")),
    "a decoder's name": (lambda d: d.dataset(decode={"jpg": "pil"}), C, ("['jpg']='pil'", "decode.image(size=224)")),
    "a decoder for all": (lambda d: d.dataset(decode="pil"), C, ("decode='pil'", '{"jpg": fastload.decode.image')),
    "a decoder that was not called": (
        lambda d: d.dataset(decode={"jpg": decode.image}),
        C,
        ("decode['jpg']=<function image", "call it: fastload.decode.image(...)"),
    ),
    "a number as a decoder": (lambda d: d.dataset(decode={"jpg": 224}), C, ("decode['jpg']=224", "image(size=224)")),
    "one column": (lambda d: d.dataset(columns="jpg"), C, ("columns='jpg'", "a list")),
    "a column with its dot": (lambda d: d.dataset(columns=[".jpg"]), C, ("'.jpg'", "without a dot")),
    "a column that is not there": (
        lambda d: d.read(d.dataset(columns=["jpg"])),
        fastload.MissingColumnError,
        ("shard-0000.tar", "'jpg'", "['bin', 'cls']", "'jpg?'"),
    ),
    "a misspelt column": (
        lambda d: d.read(d.dataset(columns=["clss"])),
        fastload.MissingColumnError,
        ("'clss'", "['bin', 'cls']", "Did you mean 'cls'?"),
    ),
    "a no for tuples": (lambda d: d.dataset(columns=["cls"], as_tuple="no"), C, ("as_tuple='no'", "True", "False")),
    "the key as a column": (lambda d: d.dataset(columns=["__key__", "cls"]), C, ("'__key__' is no column", "leave it")),
    "text for a rank": (lambda d: d.dataset(rank="0", world_size="2"), C, ("rank='0'", "an integer")),
    "a rank alone": (lambda d: d.dataset(rank=0), C, ("rank is set but world_size is not", "set both")),
    "a wrong tail": (lambda d: d.dataset(tail="dorp"), C, ("tail='dorp'", "'drop'")),
    "a manifest that is no path": (lambda d: d.dataset(manifest=3), C, ("manifest=3", "path")),
    "no function": (lambda d: d.dataset().map(None), C, ("map(None)", "a function of one argument")),
    # Arguments of a loader
    "text for num_workers": (lambda d: d.read(num_workers="4"), C, ("num_workers='4'", "a whole number")),
    "half a worker": (lambda d: d.read(num_workers=1.5), C, ("num_workers=1.5", "a whole number")),
    "half a worker for torch's": (lambda d: d.read([1], num_workers=1.5), C, ("num_workers=1.5", "a whole number")),
    "a yes for num_workers": (lambda d: d.read(num_workers=True), C, ("num_workers=True", "such as 1")),
    "workers below none": (lambda d: d.read(num_workers=-1), ValueError, ("num_workers", "non-negative")),
    "a batch of none": (lambda d: d.read(batch_size=0), C, ("batch_size=0", "at least 1")),
    "a batch as text": (lambda d: d.read(batch_size="4"), C, ("batch_size='4'", "an integer")),
    "nothing ahead": (lambda d: d.read(num_workers=1, prefetch_factor=0), C, ("prefetch_factor=0", "at least 1")),
    "a collate_fn by name": (lambda d: d.read(collate_fn="pad"), C, ("collate_fn='pad'", "a function")),
    "a collate_fn for torch's": (lambda d: d.read([1], collate_fn="pad"), C, ("collate_fn='pad'", "a function")),
    "a no for a last batch": (lambda d: d.read(drop_last="no"), C, ("drop_last='no'", "True or False")),
    "a no for torch's": (lambda d: d.read([1], pin_memory="no"), C, ("pin_memory='no'", "True or False")),
    "a misspelt way": (lambda d: d.read(workers="threads"), C, ("workers='threads'", '"thread"')),
    "a misspelt argument": (lambda d: d.read(batchsize=4), T, ("'batchsize'", "did you mean batch_size?")),
    "a timeout as text": (lambda d: d.read(timeout="5"), C, ("timeout='5'", "seconds")),
    "a URL for a data set": (lambda d: d.read("s3://b/x.tar"), C, ("'s3://b/x.tar'", "fastload.StreamingDataset(")),
    "the class": (lambda d: d.read(fastload.StreamingDataset), C, ("StreamingDataset'>", "give an object")),
    "an epoch below 0": (lambda d: d.dataset().set_epoch(-1), C, ("epoch=-1", "from 0 on")),
    "a state of something else": (
        lambda d: fastload.DataLoader(d.dataset()).load_state_dict({"model": 1}),
        fastload.StateError,
        ("state_dict() returned",),
    ),
    "a look at torch's": (lambda d: fastload.DataLoader([1]).peek(), T, ("peek()", "StreamingDataset")),
    "a length nobody knows": (lambda d: len(d.dataset()), T, ("iterate one epoch", "fastload index")),
    # Functions, and processes
    "a lambda for a spawned worker": (
        lambda d: d.read(d.dataset().map(lambda s: s), num_workers=1, multiprocessing_context="spawn"),
        C,
        ("<lambda>", "top level of a module", 'workers="thread"'),
    ),
    "a function that returns nothing": (
        lambda d: d.read(d.dataset().map(same).map(forgets), num_workers=1),
        C,
        ("map(forgets): it returned None for sample '", "/shards/shard-0000.tar", "return the sample"),
    ),
    "a function of a source that returns nothing": (
        lambda d: d.read(fastload.Mixture([(d.dataset(), 1), (d.dataset().map(forgets), 1)]).map(same)),
        C,
        ("map(same): it returned None for sample '", "/shards/shard-0000.tar", "return the sample"),
    ),
    "a function that fails": (lambda d: d.read(d.dataset().map(divides)), ZeroDivisionError, ()),
    "a loader that was closed": (
        closed_in_mid_epoch,
        fastload.ServiceError,
        ("closed in mid-epoch", "iterate it again"),
    ),
    "a cache that was closed": (cache_closed_in_mid_epoch, fastload.ServiceError, ("was closed", "iterate anew")),
    "an iterator of the parent's": (used_in_a_forked_child, fastload.ServiceError, ("forked", "iterate anew")),
    # Caches, files, mixtures
    "a misspelt limit": (lambda d: fastload.Cache(d.folder / "c", ram="8GiB"), T, ("'ram'", "ram_bytes?")),  # type: ignore[call-arg]
    "a size in words": (lambda d: fastload.Cache(d.folder / "c", ram_bytes="8 gigs"), C, ("'8 gigs'", '"8GiB"')),
    "a chunk of everything": (
        lambda d: fastload.Cache(d.folder / "c", chunk_bytes="8 TiB"),
        C,
        ("chunk_bytes='8TiB'", "8 MiB is the default"),
    ),
    "more RAM than there is": (
        lambda d: fastload.Cache(d.folder / "c", ram_bytes="4096TB"),
        C,
        ("ram_bytes='4096TB' is more memory", "a quarter"),
    ),
    "a disk for no chunk": (
        lambda d: fastload.Cache(d.folder / "c", disk_bytes=4097),
        C,
        ("disk_bytes=4097 is below one chunk", "raise disk_bytes"),
    ),
    "a cache in a store": (lambda d: fastload.Cache("s3://b/c"), C, ("'s3://b/c'", "/nvme/fastload")),
    "a path of a URL": (lambda d: d.dataset(cache=Path("s3://b/c")), C, ("s3:/b/c", "/nvme/fastload")),
    "a number for a cache": (lambda d: d.dataset(cache=3), C, ("cache=3", "fastload.Cache")),
    "a file that is a folder": (
        lambda d: fastload.open(f"{d.folder}/shards", d.cache),
        M,
        ("folder", "one object in it"),
    ),
    "a file with a slash": (lambda d: fastload.open(f"{d.folder}/shards/", d.cache), C, ("folder", "one object in it")),
    "a file by a pattern": (lambda d: fastload.open("/x/{0..3}.tar", d.cache), M, ("{0..3}", "without")),
    "a mode for a cache": (lambda d: fastload.open("a.tar", "rb"), C, ("cache='rb'", "leave it out")),
    "data sets without weights": (lambda d: fastload.Mixture([d.dataset()]), C, ("sources=[Stream", "weight")),  # type: ignore[list-item]
    "a number in a mixture": (
        lambda d: fastload.Mixture([(d.dataset(), 1)])[7],
        T,
        ("mixture[7]", "no numbers", "mixture.sources[0][7]"),
    ),
    "an URL in a mixture": (lambda d: fastload.Mixture([("a.tar", 1)]), C, ("source 0", "fastload.StreamingDataset")),  # type: ignore[list-item]
    "a size below 0": (
        lambda d: fastload.Cache(d.folder / "c", history_bytes=-1),
        C,
        ("history_bytes=-1", "at least 0"),
    ),
    "a crop without a size": (lambda d: decode.image(random_resized_crop=True), C, ("need a size", "image(224, ")),
    "text in a Ragged": (lambda d: fastload.Ragged.from_items(["é"]), C, ("'é' is text", ".encode()")),  # type: ignore[list-item]
    "text among bytes": (lambda d: fastload.Ragged.from_items([b"a", "b"]), C, ("'b' is text",)),  # type: ignore[list-item]
    "a Ragged of numbers": (
        lambda d: fastload.Ragged(np.arange(3), np.array([0, 3])),
        C,
        ("uint8, not int64", 'kind="array"'),
    ),
    "several items": (lambda d: fastload.Ragged.from_items([b"a"])[[0]], T, ("ragged[[0]]", "one number or a slice")),  # type: ignore[call-overload]
    "a size as text": (lambda d: decode.image("224"), C, ("size='224'", "pixels")),  # type: ignore[arg-type]
    "a name that is not there": (lambda d: fastload.Dataset, AttributeError, ("'Dataset'",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_says_value_place_and_cure(name: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk.folder)
    mistake, kind, contains = MISTAKES[name]
    with pytest.raises(kind) as caught:
        mistake(desk)
    for part in contains:
        assert part in str(caught.value)
    assert "pw" not in str(caught.value)


def test_a_prefix_of_a_bucket_without_its_slash(s3, desk: Desk) -> None:
    """The store has no such object, and there are some below."""
    url = corpus(2, 3).put(s3).rstrip("/")
    with pytest.raises(M, match=f"{url} is a folder; for the shards in it write {url}/"):
        desk.read(desk.dataset(url))
    with pytest.raises(M, match=f"{url}x: there is no such object"):
        desk.read(desk.dataset(f"{url}x"))


def test_a_store_that_refuses_a_pattern_names_the_pattern(s3, desk: Desk) -> None:
    """And nothing of what is made of it."""
    with pytest.raises(M, match=r"^s3://no-such-bucket/train-\{000\.\.003\}\.tar: there is no such bucket"):
        desk.read(desk.dataset("s3://no-such-bucket/train-{000..003}.tar"))


def test_a_lambda_in_a_data_set_that_is_not_ours() -> None:
    """torch's error and its type, with a note of what to do."""
    loader = fastload.DataLoader(Local(), num_workers=1, multiprocessing_context="spawn")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's
        with pytest.raises(AttributeError, match="pickle") as caught:
            iter(loader)
    assert "top level of a module" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("urls", "options", "message"),
    [
        ("empty.tar", {}, "the epoch had no samples: all of its shards are empty"),
        ("shards/", {"batch_size": 99, "drop_last": True}, r"no batch: its \d+ samples are fewer than batch_size=99"),
    ],
)
def test_an_epoch_of_nothing_is_one_warning(desk: Desk, urls: str, options: dict[str, Any], message: str) -> None:
    dataset = desk.dataset(f"{desk.folder}/{urls}")
    with fastload.DataLoader(dataset, **{"batch_size": 4, **options}) as loader:
        with pytest.warns(UserWarning, match=message) as caught:
            assert list(loader) == []
        assert [each.filename for each in caught] == [__file__]
        assert list(loader) == []  # said once: a warning would be an error here
        with pytest.raises(fastload.ConfigError, match="nothing to peek at"):
            loader.peek()


def test_samples_of_nothing_are_one_warning(desk: Desk) -> None:
    dataset = desk.dataset(f"{desk.folder}/empty.tar")
    with pytest.warns(UserWarning, match="all of its shards are empty"):
        assert list(dataset) == []
    assert list(dataset) == []
    dataset.close()


def test_the_end_of_an_epoch_is_no_epoch_of_nothing(desk: Desk) -> None:
    """A state from after the last batch: what is left is nothing, as it should be."""
    with fastload.DataLoader(desk.dataset(), batch_size=3) as loader:
        count = sum(1 for _ in loader)
        iterator = iter(loader)
        for _ in range(count):
            next(iterator)
        loader.load_state_dict(loader.state_dict())
        assert list(loader) == []


SPAWNING = """
import sys, fastload
def same(sample): return sample
dataset = fastload.StreamingDataset(sys.argv[1], cache=sys.argv[2]).map(same)
loader = fastload.DataLoader(dataset, num_workers=1, multiprocessing_context="spawn")
for batch in loader: pass
"""


def test_a_script_without_a_main_guard(desk: Desk, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SPAWNING)
    done = run(SPAWNING, f"{desk.folder}/shards/", desk.cache.directory, path=script, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "WorkerError: worker process " in last
    assert 'if __name__ == "__main__":' in last


def test_a_script_that_is_in_no_file(desk: Desk) -> None:
    command = [sys.executable, "-", f"{desk.folder}/shards/", str(desk.cache.directory)]
    done = subprocess.run(command, input=SPAWNING, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    for part in ("WorkerError: worker process ", "from stdin", "put it into a file", 'workers="thread"'):
        assert part in last


@pytest.mark.parametrize("way", ["option", "variable", "another folder"])
def test_the_history_of_a_cache_that_is_not_there(tmp_path: Path, way: str) -> None:
    typo = tmp_path / "cahce"
    if way == "another folder":
        typo.mkdir()
    options = ["--cache", str(typo)] if way != "variable" else []
    environ = {**os.environ, "FASTLOAD_CACHE": str(typo)} if way == "variable" else None
    done = run_cli("history", "ls", *options, check=False, env=environ)
    assert done.returncode == 1
    assert f"ConfigError: {'--cache=' if options else 'FASTLOAD_CACHE='}{typo}: there is no cache at" in done.stderr
