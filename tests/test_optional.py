"""Columns that samples may lack, and names of columns in any case: the same through every door."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.utils.data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

import fastload
from fastload import decode as fd
from fastload.errors import ConfigError, MissingColumnError
from tests.decode.helpers import npy
from tests.shards import Corpus, tar_of

DECODE = {
    "bin?": fd.raw(),
    "TXT?": fd.text(),
    "cls?": fd.integer(default=-1),
    "json?": fd.json(default={}),
    "npy?": fd.array((2,), "float32", default=0.5),
    "id": fd.integer(),
}
KEYS = ["bin", "TXT", "cls", "json", "npy", "id"]
LACKING = {"bin": None, "TXT": None, "cls": -1, "json": {}, "npy": [0.5, 0.5]}
VALUES = {
    "bin": st.binary(max_size=5),
    "txt": st.text("abc", max_size=3).map(str.encode),
    "cls": st.integers(-5, 5).map(lambda number: str(number).encode()),
    "json": st.sampled_from([b"[1]", b"{}", b'"x"']),
    "npy": st.integers(0, 9).map(lambda number: npy(np.full(2, number, np.float32))),
}

Sample = dict[str, Any]


def expected(sample: dict[str, bytes]) -> Sample:
    """What a sample of these columns is, in plain Python."""
    read = {
        "bin": bytes,
        "TXT": bytes.decode,
        "cls": int,
        "json": lambda value: {b"[1]": [1], b"{}": {}, b'"x"': "x"}[value],
        "npy": lambda value: np.frombuffer(value[-8:], np.float32).tolist(),
        "id": int,
    }
    lowered = {name.lower(): value for name, value in sample.items()}
    return {
        name: read[name](lowered[name.lower()]) if name.lower() in lowered else LACKING[name]  # type: ignore[operator]
        for name in KEYS
    }


def plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def apart(batch: Any) -> list[Sample]:
    """A batch as samples."""
    columns = [list(plain(values)) for values in batch.values()]
    return [dict(zip(batch, values, strict=True)) for values in zip(*columns, strict=True)]


def by_key(samples: Any) -> dict[str, Sample]:
    return {
        sample["__key__"]: {name: plain(value) for name, value in sample.items() if name in KEYS} for sample in samples
    }


def loaded(dataset: Any, **options: Any) -> list[Any]:
    loader = fastload.DataLoader(dataset, **options)
    try:
        return list(loader)
    finally:
        loader.close()


def batches(dataset: Any, **options: Any) -> list[Sample]:
    return [sample for batch in loaded(dataset, **{"batch_size": 4, **options}) for sample in apart(batch)]


def same(sample: Any) -> Any:
    return sample


def in_torch(dataset: Any) -> list[Sample]:
    return list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2))


DOORS: dict[str, Callable[[Any], list[Sample]]] = {
    "samples": list,
    "by number": lambda dataset: [dataset[number] for number in range(dataset.sample_count)],
    "take": lambda dataset: apart(dataset.take(range(dataset.sample_count))),
    "indexed": lambda dataset: loaded(dataset.indexed(), batch_size=None),
    "caller": lambda dataset: batches(dataset, num_workers=0),
    "threads": lambda dataset: batches(dataset, workers="thread", num_workers=2),
    "one by one": lambda dataset: loaded(dataset, batch_size=None, num_workers=2),
    "functions": lambda dataset: batches(dataset.map(same), workers="thread", num_workers=2, collate_fn=_columns_of),
    "batch functions": lambda dataset: batches(dataset.map_batch(same), workers="thread", num_workers=2),
    "mixture": lambda dataset: batches(fastload.Mixture([(dataset, 1.0)], stop="first")),
}
# Each starts processes.
FAR_DOORS: dict[str, Callable[[Any], list[Sample]]] = {
    "torch's workers": in_torch,
    "processes": lambda dataset: batches(dataset, workers="process", num_workers=2),
    "side": lambda dataset: batches(dataset, workers="side", num_workers=1),
    "functions in processes": lambda dataset: batches(dataset.map(same), num_workers=2, collate_fn=_columns_of),
    "batch functions in processes": lambda dataset: batches(dataset.map_batch(same), num_workers=2),
}


def _columns_of(samples: list[Sample]) -> dict[str, list[Any]]:
    return {name: [sample[name] for sample in samples] for name in samples[0]}


@pytest.fixture
def cache(tmp_path: Path):
    with fastload.Cache(
        tmp_path / "cache", ram_bytes="8MiB", disk_bytes=0, chunk_bytes="64KiB", service="inprocess"
    ) as cache:
        yield cache


@st.composite
def samples_of_shards(draw: st.DrawFn) -> list[list[dict[str, bytes]]]:
    """Samples that have a number and any of the other columns, in any case and order."""
    names = st.lists(st.sampled_from(sorted(VALUES)), unique=True)
    cased = st.sampled_from([str, str.upper, str.title])
    columns = names.flatmap(lambda names: st.tuples(*(st.tuples(st.just(name), cased, VALUES[name]) for name in names)))
    sample = columns.map(lambda columns: {case(name): value for name, case, value in columns})
    shards = draw(st.lists(st.lists(sample, min_size=1, max_size=6), min_size=1, max_size=3))
    return [[sample | {"id": b"%d" % number} for number, sample in enumerate(shard)] for shard in shards]


numbers = iter(range(1 << 30))


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples_of_shards(), st.lists(st.sampled_from(sorted(DOORS)), min_size=1, max_size=3, unique=True))
def test_every_door_gives_what_is_there_and_what_stands_for_the_rest(cache, tmp_path, shards, doors) -> None:
    named = [{f"{i}/{n}": sample for n, sample in enumerate(shard)} for i, shard in enumerate(shards)]
    samples = {key: sample for shard in named for key, sample in shard.items()}
    url = Corpus({f"{i}.tar": tar_of(shard) for i, shard in enumerate(named)}, samples).write(
        tmp_path / str(next(numbers))
    )
    dataset = fastload.StreamingDataset(url, cache=cache, decode=DECODE)
    list(dataset)  # so that counts are known
    for name in doors:
        assert by_key(DOORS[name](dataset)) == {key: expected(sample) for key, sample in samples.items()}
    dataset.close()


@pytest.mark.parametrize("door", DOORS)
def test_every_door_is_tried(cache, url: str, door: str) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache, decode=DECODE)
    list(dataset)
    assert by_key(DOORS[door](dataset)) == {key: expected(sample) for key, sample in _SAMPLES.items()}
    dataset.close()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return _CORPUS.write(tmp_path / "data")


_SAMPLES = {
    f"{n // 10}/{n:03d}": {"id": b"%d" % n}
    | ({"bin": b"x" * (n % 4)} if n % 3 else {})
    | ({"txt": b"%d" % n} if n % 4 == 1 else {})
    | ({"cls": b"%d" % n} if n % 5 else {})
    for n in range(30)
}
_CORPUS = Corpus(
    {f"{i}.tar": tar_of({key: sample for key, sample in _SAMPLES.items() if key[0] == str(i)}) for i in range(3)},
    _SAMPLES,
)


@pytest.mark.parametrize("door", FAR_DOORS)
def test_other_processes_do_so_too(cache, url: str, door: str) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache, decode=DECODE, shuffle=True)
    assert by_key(FAR_DOORS[door](dataset)) == {key: expected(sample) for key, sample in _SAMPLES.items()}
    dataset.close()


def test_webdataset_reads_the_same_archives(cache, url: str) -> None:
    theirs = {}
    for number in range(3):
        with open(f"{url}{number}.tar", "rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": "", "stream": stream}])):
                theirs[sample["__key__"]] = {name: sample.get(name) for name in ("bin", "txt", "cls", "id")}
    dataset = fastload.StreamingDataset(url, cache=cache, columns=["bin?", "txt?", "cls?", "id"])
    assert {s["__key__"]: {name: s[name] for name in ("bin", "txt", "cls", "id")} for s in dataset} == theirs
    assert any(None in sample.values() for sample in theirs.values())
    dataset.close()


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_a_raw_batch_has_empty_items_and_a_mask(cache, url: str, workers: str) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache, columns=["bin?", "id"])
    for batch in loaded(dataset, batch_size=7, num_workers=1, workers=workers):
        keys = batch["__key__"]
        assert batch["bin"].present.tolist() == ["bin" in _SAMPLES[key] for key in keys]
        assert list(batch["bin"]) == [_SAMPLES[key].get("bin", b"") for key in keys]
        assert batch["bin"].tolist() == [_SAMPLES[key].get("bin") for key in keys]
        assert batch["id"].present is None
    dataset.close()


def test_a_batch_of_which_all_samples_have_it_has_a_mask_and_one_in_which_none_has_it_too(cache, tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({f"{n}": {"a": b"1"} if n < 4 else {"b": b"2"} for n in range(8)}))
    decode = {"A?": fd.raw(), "b?": fd.integer(default=0), "c?": fd.text()}
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode=decode)
    first, second = loaded(dataset, batch_size=4)
    assert (first["A"].present.all(), second["A"].present.any()) == (True, False)
    assert (first["b"].tolist(), second["b"].tolist()) == ([0] * 4, [2] * 4)
    assert first["c"] == second["c"] == [None] * 4
    dataset.close()


def test_tuples_are_in_the_order_of_the_names(cache, url: str) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache, columns=["TXT?", "id", "bin?"], as_tuple=True)
    wanted = [(s.get("txt"), s["id"], s.get("bin")) for s in _SAMPLES.values()]
    assert list(dataset) == wanted
    (batch,) = loaded(dataset, batch_size=30)
    assert list(zip(*map(plain, batch), strict=True)) == wanted
    dataset.close()


def test_functions_and_torchs_collate(cache, url: str) -> None:
    """Bytes and text are collated to lists, whether the first of them is there or not."""
    dataset = fastload.StreamingDataset(
        url, cache=cache, columns=["txt?", "cls?", "id"], decode={"cls": DECODE["cls?"]}
    )
    mapped = dataset.map(lambda sample: {"text": sample["txt"], "both": (sample["cls"], sample["txt"])})
    texts = [sample.get("txt") for sample in _SAMPLES.values()]
    numbers = [int(sample.get("cls", b"-1")) for sample in _SAMPLES.values()]
    for batch, start in zip(loaded(mapped, batch_size=3, workers="thread"), range(0, 30, 3), strict=True):
        assert list(batch["text"]) == list(batch["both"][1]) == texts[start : start + 3]
        assert batch["both"][0].tolist() == numbers[start : start + 3]
    with pytest.raises(fastload.ConfigError, match="it returned None for sample"):
        loaded(dataset.map(lambda sample: None), batch_size=3, workers="thread")
    dataset.close()


def test_sources_of_a_mixture_with_other_columns(cache, tmp_path: Path) -> None:
    for name, sample in {"a": {"id": b"1", "txt": b"a", "bin": b"a"}, "b": {"id": b"2"}}.items():
        (tmp_path / f"{name}.tar").write_bytes(tar_of({f"{name}{n}": sample for n in range(8)}))

    def source(name: str, *columns: str, **decode: Any) -> fastload.StreamingDataset:
        return fastload.StreamingDataset(tmp_path / f"{name}.tar", cache=cache, columns=columns, decode=decode)

    # Only the second may lack its bytes, and decodes its text; the batch has the columns of both.
    one, other = (
        source("a", "id", "txt", "bin", txt=fd.text()),
        source("b", "id", "txt?", "bin?", txt=fd.text(default="")),
    )
    for workers in ("thread", "process"):
        for batch in loaded(fastload.Mixture([(one, 1), (other, 1)]), batch_size=4, num_workers=1, workers=workers):
            is_first = [source == 0 for source in batch["__source__"].tolist()]
            assert sum(is_first) == 2
            assert batch["bin"].present.tolist() == is_first
            assert list(batch["bin"]) == [b"a" if first else b"" for first in is_first]
            assert batch["txt"] == ["a" if first else "" for first in is_first]
    for dataset in (one, other):
        dataset.close()
    with pytest.raises(ConfigError, match=r"\['ID'\].*\['id'\]"):
        fastload.Mixture([(source("a", "ID"), 1), (source("b", "id"), 1)])


def test_a_column_that_must_be_there_is_an_error_that_says_what_to_write(cache, url: str) -> None:
    for columns, told in (
        (["txt?", "BIN"], r"0\.tar: sample '0/000', column 'BIN'.*write 'BIN\?'"),
        (None, r"columns=\["),
    ):
        dataset = fastload.StreamingDataset(url, cache=cache, columns=columns)
        with pytest.raises(MissingColumnError, match=told):
            loaded(dataset, batch_size=4)
        with pytest.raises(MissingColumnError, match=told):
            list(dataset)
        dataset.close()


@pytest.mark.filterwarnings("ignore:skipped a sample")
def test_samples_that_lack_what_they_must_have_are_skipped_and_others_are_not(cache, url: str) -> None:
    dataset = fastload.StreamingDataset(url, cache=cache, columns=["id", "bin", "txt?"], on_error="skip")
    wanted = {s["id"]: s.get("txt") for s in _SAMPLES.values() if "bin" in s}
    assert {s["id"]: s["txt"] for s in batches(dataset)} == wanted
    dataset.close()


def test_a_state_goes_on_with_more_columns(cache, url: str) -> None:
    """Columns are no part of the order."""
    one = fastload.StreamingDataset(url, cache=cache, columns=["id"], shuffle=True)
    loader = fastload.DataLoader(one, batch_size=4)
    batches = iter(loader)
    next(batches), next(batches)
    state = pickle.loads(pickle.dumps(loader.state_dict()))
    rest = [batch["__key__"] for batch in batches]
    loader.close()
    other = fastload.StreamingDataset(url, cache=cache, columns=["txt?", "ID"], shuffle=True)
    loader = fastload.DataLoader(other, batch_size=4)
    loader.load_state_dict(state)
    resumed = list(loader)
    assert [batch["__key__"] for batch in resumed] == rest
    assert [batch["txt"].tolist() for batch in resumed] == [[_SAMPLES[key].get("txt") for key in keys] for keys in rest]
    loader.close()
    one.close()
    other.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"columns": ["jpg", "JPG"]}, r"'jpg' and 'JPG' are the same"),
        ({"columns": ["jpg?", "jpg"]}, r"'jpg\?' and 'jpg' are the same"),
        ({"decode": {"jpg": fd.raw(), "Jpg?": fd.raw()}}, r"decode=.*'jpg' and 'Jpg\?' are the same"),
        ({"columns": ["jpg"], "decode": {"jpg": fd.raw(), "JPG": fd.raw()}}, "'jpg' and 'JPG' are the same"),
        ({"columns": ["?"]}, r"'\?' is not a name"),
        ({"decode": {".jpg?": fd.raw()}}, r"'\.jpg\?' is not a name"),
        ({"decode": {7: fd.raw()}}, "7 is not a name"),
        ({"columns": ["txt"], "decode": {"cls?": fd.text()}}, r"'cls\?'.*leaves out"),
        ({"columns": ["Cls"], "decode": {"cls?": fd.text()}}, r"write 'Cls\?' there, too"),
        ({"columns": ["Cls?"], "decode": {"cls": fd.integer()}}, r"decode\['cls'\].*may lack 'Cls\?'.*default="),
        ({"decode": {"cls?": fd.integer()}}, r"tensors, which have no room.*default="),
        ({"decode": {"cls": fd.integer(default=1)}}, r"decode\['cls'\] has a default.*write 'cls\?'"),
    ],
)
def test_names_that_do_not_fit_together(cache, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        fastload.StreamingDataset("/nowhere/x.tar", cache=cache, **options)


def test_names_are_in_any_case_and_a_batch_has_the_users(cache, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"0": {"Seg.PNG": b"1", "cls": b"2", "É": b"3"}}))
    options = {"columns": ["SEG.png", "CLS", "É"], "decode": {"Cls": fd.integer()}}
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, **options)
    (sample,) = dataset
    assert {name: sample[name] for name in ("SEG.png", "CLS", "É")} == {"SEG.png": b"1", "CLS": 2, "É": b"3"}
    dataset.close()
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache)
    (sample,) = dataset
    assert set(sample) == {"__key__", "__url__", "seg.png", "cls", "é"}
    dataset.close()


def test_a_column_whose_own_name_ends_in_a_mark(cache, tmp_path: Path) -> None:
    samples = {"0": {"txt": b"0", "Why?": b"why"}, "1": {"why": b"1"}}
    (tmp_path / "a.tar").write_bytes(tar_of(samples))

    def read(*columns: str) -> list[Sample]:
        dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, columns=columns)
        try:
            return [{name: sample[name] for name in sample if name[:2] != "__"} for sample in dataset]
        finally:
            dataset.close()

    with pytest.raises(ConfigError, match=r"a\.tar: .*'why\?'.*write 'WHY\?\?'"):
        read("WHY?")
    assert read("why??") == [{"why?": b"why"}, {"why?": None}]
    assert read("why?", "why??") == [{"why": None, "why?": b"why"}, {"why": b"1", "why?": None}]
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache)
    with pytest.raises(MissingColumnError, match=r"column 'why\?'.*write 'why\?\?'|column 'txt'.*write 'txt\?'|'why'"):
        list(dataset)
    dataset.close()


def test_images(cache, tmp_path: Path) -> None:
    from tests.decode.pictures import jpeg

    picture = jpeg(np.full((20, 20, 3), 255, np.uint8))
    (tmp_path / "a.tar").write_bytes(tar_of({f"{n}": {"jpg": picture} if n % 2 else {"cls": b"1"} for n in range(6)}))
    decode = {"jpg?": fd.image(8, random_resized_crop=True, default=0.25)}
    dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode=decode)
    (batch,) = loaded(dataset, batch_size=6)
    assert batch["jpg"].amin(dim=(1, 2, 3)).tolist() == batch["jpg"].amax(dim=(1, 2, 3)).tolist() == [0.25, 1.0] * 3
    assert [sample["jpg"].shape for sample in dataset] == [(3, 8, 8)] * 6
    dataset.close()


def test_one_column_of_several_names(tmp_path: Path) -> None:
    samples = {f"k{n}": {"id": b"%d" % n} | {name: b"%s%d" % (name.encode(), n) for name in names} for n, names in
               enumerate([["jpg"], ["png"], ["png", "jpg"], ["jpg", "webp"], ["webp"]])}  # fmt: skip
    samples["odd"] = {"id": b"9"}
    (tmp_path / "a.tar").write_bytes(tar_of(samples))
    (tmp_path / "b.tar").write_bytes(tar_of({"only": {"id": b"5", "png": b"png5"}}))
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="32MiB", disk_bytes=0, service="inprocess")
    with cache:
        urls = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
        dataset = fastload.StreamingDataset(urls, cache=cache, shuffle=False, columns=["JPG;png;webp?", "id"])
        found = {int(bytes(sample["id"])): sample["JPG;png;webp"] for sample in dataset}
        expected = {0: b"jpg0", 1: b"png1", 2: b"jpg2", 3: b"jpg3", 4: b"webp4", 9: None, 5: b"png5"}
        assert {number: value if value is None else bytes(value) for number, value in found.items()} == expected
        with pytest.raises(MissingColumnError, match=r"sample 'odd', column 'jpg;png;webp': the sample has no such"):
            list(fastload.StreamingDataset(urls, cache=cache, shuffle=False, columns=["jpg;png;webp"]))
        with pytest.raises(ConfigError, match="'jpg;' is not a name"):
            fastload.StreamingDataset(urls, cache=cache, columns=["jpg;"])


@pytest.mark.parametrize("shuffle", [False, True, "global"])
def test_one_column_of_several_names_is_decoded(shuffle: bool | str, tmp_path: Path) -> None:
    """The first that a sample has, as webdataset takes it, whichever names are in its shard."""
    shards = [[["png"], ["png"]], [["jpg"], ["jpg", "png"], ["png", "jpg"]], [["txt"], ["webp"], ["jpg", "txt"]]]
    urls, levels, stored, number = [], {}, [], 0
    for shard in shards:
        samples = {}
        for names in shard:
            found = {name: _picture(name, 10 * number + len(name + names[0])) for name in names}
            samples[str(number)] = {"id": b"%d" % number, **{name: data for name, (data, _) in found.items()}}
            levels[number] = next((found[name][1] / 255 for name in ("jpg", "png") if name in found), -1.0)
            stored += [found[name][0] for name in ("jpg", "png") if name in found][:1] if len(urls) < 2 else []
            number += 1
        urls.append(str(tmp_path / f"{len(urls)}.tar"))
        Path(urls[-1]).write_bytes(tar_of(samples))
    with fastload.Cache(tmp_path / "cache", ram_bytes="32MiB", disk_bytes="64MiB", service="inprocess") as cache:
        options: dict[str, Any] = {"cache": cache, "shuffle": shuffle}
        decode = {"jpg;png?": fd.image(4, default=-1.0), "id": fd.integer()}
        dataset = fastload.StreamingDataset(urls, **options, decode=decode)
        batches = loaded(dataset, batch_size=3)
        means = {
            int(i): float(each.mean())
            for batch in batches
            for i, each in zip(batch["id"], batch["jpg;png"], strict=True)
        }
        assert means == pytest.approx(levels, abs=0.006)
        assert float(dataset.take([3])["jpg;png"].mean()) == pytest.approx(levels[3], abs=0.006)
        both = fastload.StreamingDataset(urls[:2], **options, columns=["jpg;png"], as_tuple=True)
        assert sorted(bytes(value) for (value,) in both) == sorted(stored)
        needed = {"jpg;png": fd.image(4)}
        with pytest.raises(MissingColumnError, match=r"column 'jpg;png': the sample has no such"):
            list(fastload.StreamingDataset(urls, **options, decode=needed))
        with pytest.warns(UserWarning, match="skipped a sample"):
            assert len(list(fastload.StreamingDataset(urls, **options, decode=needed, on_error="skip"))) == 6


def _picture(name: str, level: int) -> tuple[bytes, int]:
    """A grey one in that format, and its level; of what is no picture anything."""
    pixels, out = np.full((8, 8, 3), level, np.uint8), io.BytesIO()
    if name != "txt":
        PIL.Image.fromarray(pixels).save(out, {"jpg": "JPEG"}.get(name, name))
    return out.getvalue() or b"text", level
