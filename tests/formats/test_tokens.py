"""Files of tokens: windows, documents and packs are those of plain Python, however the files are cut into pieces."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastload
from fastload import prepare
from fastload.bench.plan import Options
from fastload.bench.session import Session
from fastload.cli.warm_tasks import Asked, tables_of, task_of_table
from fastload.errors import ConfigError, FastloadError, MissingColumnError, ShardError, StateError
from fastload.formats import StridedIndex, checked_format, pieces, tokens
from fastload.formats.pieces import in_pieces, own_bytes
from fastload.formats.token_files import pack_documents
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from tests.formats import token_writer
from tests.programs import run_cli
from tests.shards import tar_of

CHUNK_BYTES = 64 << 10


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    limits = {"ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": CHUNK_BYTES}
    with fastload.Cache(tmp_path / "cache", **limits, service="inprocess") as opened:  # type: ignore[arg-type]
        yield opened


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def read(url: Any, cache: fastload.Cache, how: Any, batch_size: int = 7, **options: Any) -> list[dict[str, Any]]:
    """All samples, as batches have them, as lists."""
    dataset = fastload.StreamingDataset(str(url), cache=cache, format=how, **options)
    found: list[dict[str, Any]] = []
    for batch in fastload.DataLoader(dataset, batch_size=batch_size, num_workers=2):
        columns = {name: [plain(value) for value in column] for name, column in batch.items()}
        found += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return found


def plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.tolist()


def documents_of(seed: int, count: int, length_max: int, sequences_max: int = 1) -> list[list[list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        [
            rng.integers(0, 60000, rng.integers(0, length_max)).tolist()
            for _ in range(rng.integers(1, sequences_max + 1))
        ]
        for _ in range(count)
    ]


# Indexes, against plain Python


@contextlib.contextmanager
def cut(piece_bytes: int, tail_bytes: int = 5) -> Iterator[None]:
    """Pieces of so many bytes, each with a tail."""
    with mock.patch.multiple(pieces, PIECE_BYTES=piece_bytes, TAIL_BYTES=tail_bytes):
        yield


def pieces_of(size: int) -> list[ObjectInfo]:
    return list(in_pieces(ObjectTable.of([ObjectInfo("s3://b/x.bin", size)])))


def reader_of(data: bytes) -> Any:
    def read_at(start: int, length: int) -> bytes:
        assert 0 <= start <= start + length <= len(data)
        return data[start : start + length]

    return read_at


@st.composite
def documents(draw: st.DrawFn, sequences_max: int = 3) -> list[list[list[int]]]:
    token = st.integers(0, 255)
    sequence = st.lists(token, max_size=9)
    return draw(st.lists(st.lists(sequence, min_size=1, max_size=sequences_max), max_size=12))


@given(documents(), st.integers(1, 12), st.data(), st.sampled_from([None, "cut", "fit"]), st.booleans())
def test_samples_of_documents_are_those_of_plain_python(
    docs: list[list[list[int]]], length: int, draw: st.DataObject, pack: Any, has_modes: bool
) -> None:
    dtype = draw.draw(st.sampled_from(["u1", "<u2", "<i4", "<f8"]))
    item_bytes = np.dtype(dtype).itemsize
    overlap = draw.draw(st.integers(0, length - 1))
    piece_bytes = draw.draw(st.integers(1, 60)) * item_bytes
    modes = [[draw.draw(st.integers(0, 5)) for _ in each] for each in docs] if has_modes and docs else None
    text = np.array([t for doc in docs for sequence in doc for t in sequence], dtype).tobytes()
    beside = token_writer.index_bytes(docs, dtype, modes)
    how = tokens(length, overlap=overlap, pack=pack, pad=9)
    found = []
    with cut(piece_bytes):
        for info in pieces_of(len(text)):
            index = how.index(info, reader_of(text), (reader_of(beside), len(beside)))
            found += token_writer.samples_of_index(index, text, info.start)
    expected = token_writer.samples(docs, item_bytes, piece_bytes, length, overlap, pack, 9, modes)
    columns = ["tokens"] if pack is None and modes is None else ["tokens", "position", "segment"]
    columns += ["mode"] if modes is not None else []
    assert [list(sample) for sample in found] == [columns] * len(expected)
    assert found == [{name: sample[name] for name in columns} for sample in expected]


@given(st.integers(0, 300), st.integers(1, 20), st.data(), st.sampled_from(["u1", "<u2", ">u2", "<u4"]))
def test_windows_of_bare_files_are_those_of_plain_python(
    count: int, length: int, draw: st.DataObject, dtype: str
) -> None:
    overlap, header = draw.draw(st.integers(0, length - 1)), draw.draw(st.integers(0, 70))
    piece_bytes = draw.draw(st.integers(1, 200))
    text = b"h" * header + np.arange(count).astype(dtype).tobytes()
    how = tokens(length, dtype, overlap, header)
    found, numbers = [], []
    with cut(piece_bytes):
        for info in pieces_of(len(text)):
            index = how.index(info, reader_of(text), None)
            assert isinstance(index, StridedIndex)
            numbers += range(index.first_number, index.first_number + index.sample_count)
            found += [sample["tokens"] for sample in token_writer.samples_of_index(index, text, info.start)]
            assert how.count(info, has_beside=False) == index.sample_count
    values = np.arange(count).astype(dtype).tolist()
    assert found == [values[a:b] for a, b in token_writer.windows(count, length, overlap)]
    assert numbers == list(range(len(found)))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 24))
def test_packing_is_best_fit(sizes: list[int], more: int) -> None:
    length = max([1, *sizes]) + more
    order, starts = pack_documents(np.array(sizes, np.int64), length)
    ends = np.cumsum([0, *sizes]).tolist()
    ranges = list(itertools.pairwise(ends))
    found = [[ranges[number] for number in order[a:b].tolist()] for a, b in itertools.pairwise(starts)]
    assert found == token_writer.best_fit(ranges, length)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 12))
def test_a_token_ends_documents_in_bare_files(text: list[int], length: int) -> None:
    how = tokens(length, "<u2", 0, end=2)
    stored = np.array(text, "<u2").tobytes()
    index = how.index(ObjectInfo("x.bin", len(stored)), reader_of(stored), None)
    for sample in token_writer.samples_of_index(index, stored, 0):
        position, segment, at, number = [], [], 0, 1
        for token in sample["tokens"]:
            position.append(at)
            segment.append(number)
            at, number = (0, number + 1) if token == 2 else (at + 1, number)
        assert (sample["position"], sample["segment"]) == (position, segment)


def test_a_long_index_is_searched_and_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = [[[n % 256] * (n % 7)] for n in range(20_000)]
    text = bytes(t for (sequence,) in docs for t in sequence)
    beside = token_writer.index_bytes(docs, "u1")
    asked = []

    def read_beside(start: int, length: int) -> bytes:
        asked.append(length)
        return beside[start : start + length]

    monkeypatch.setattr("fastload.formats.token_files._READ_AT_ONCE", 16)
    found = []
    with cut(5000):
        for info in pieces_of(len(text)):
            index = tokens(64).index(info, reader_of(text), (read_beside, len(beside)))
            found += [sample["tokens"] for sample in token_writer.samples_of_index(index, text, info.start)]
            assert sum(asked) < len(beside) / 4
            asked.clear()
    assert found == [sequence for (sequence,) in docs]


# Data sets


def test_windows_come_as_tensors_of_their_dtype(cache: fastload.Cache, data: Path) -> None:
    for dtype in ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"):
        text = np.arange(1000).astype(dtype)
        text.tofile(data / f"{dtype}.bin")
        dataset = fastload.StreamingDataset(str(data / f"{dtype}.bin"), cache=cache, format=tokens(64, dtype))
        batch = next(iter(fastload.DataLoader(dataset, batch_size=4)))
        assert batch["tokens"].dtype == getattr(torch, dtype)
        assert batch["tokens"].shape == (4, 64)
        assert np.array_equal(batch["tokens"].numpy()[1], text[63:127])
        assert len(dataset) == (1000 - 64) // 63 + 1
        assert batch["__key__"][3] == f"{dtype}.bin/3"
        assert np.array_equal(dataset[-1]["tokens"], text[63 * 14 : 63 * 14 + 64])


def test_npy_files_say_what_they_hold(cache: fastload.Cache, data: Path) -> None:
    for number in range(3):
        np.save(data / f"{number}.npy", np.arange(500, dtype=np.int32) + 1000 * number)
    found = read(f"{data}/", cache, tokens(50, overlap=0))
    assert [sample["tokens"] for sample in found] == [
        list(range(1000 * n + 50 * m, 1000 * n + 50 * m + 50)) for n in range(3) for m in range(10)
    ]
    assert len(fastload.StreamingDataset(f"{data}/", cache=cache, format=tokens(50, overlap=0))) == 30


@pytest.fixture(params=[100, CHUNK_BYTES], ids=["short tails", "long tails"])
def small_pieces(request: pytest.FixtureRequest) -> Iterator[int]:
    """Pieces of about two chunks."""
    piece_bytes = 2 * CHUNK_BYTES + 4096
    with cut(piece_bytes, request.param):
        yield piece_bytes


@pytest.mark.parametrize("pack", [None, "cut", "fit"])
@pytest.mark.parametrize("has_modes", [False, True])
def test_documents_are_read_from_pieces(
    cache: fastload.Cache, data: Path, small_pieces: int, pack: Any, has_modes: bool
) -> None:
    docs = documents_of(1, 600, 900, 3)
    rng = np.random.default_rng(0)
    modes = [rng.integers(0, 3, len(each)).tolist() for each in docs] if has_modes else None
    token_writer.write(data / "x.bin", docs, "<u2", modes)
    assert (data / "x.bin").stat().st_size > 4 * small_pieces
    expected = token_writer.samples(docs, 2, small_pieces, 512, 1, pack, 0, modes)
    how = tokens(512, pack=pack)
    found = read(data / "x.bin", cache, how)
    assert [sample["tokens"] for sample in found] == [sample["tokens"] for sample in expected]
    for name in ("position", "segment", "mode"):
        if name in found[0]:
            assert [sample[name] for sample in found] == [sample[name] for sample in expected]
    assert len({sample["__key__"] for sample in found}) == len(found)
    dataset = fastload.StreamingDataset(str(data / "x.bin"), cache=cache, format=how)
    assert len(dataset) == len(found)
    assert dataset[len(found) - 1]["tokens"].tolist() == found[-1]["tokens"]
    shuffled = read(data / "x.bin", cache, how, shuffle=True, seed=3)
    assert sorted(map(str, (sample["tokens"] for sample in shuffled))) == sorted(
        map(str, (sample["tokens"] for sample in found))
    )
    assert [sample["__key__"] for sample in shuffled] != [sample["__key__"] for sample in found]
    of_one_column = read(data / "x.bin", cache, how, columns=["tokens"])
    assert [sample["tokens"] for sample in of_one_column] == [sample["tokens"] for sample in found]


@pytest.mark.parametrize("shuffle", [False, True, "global"])
def test_a_file_in_pieces_is_read_whole(cache: fastload.Cache, data: Path, small_pieces: int, shuffle: Any) -> None:
    text = np.arange(5 * small_pieces // 4 + 777, dtype=np.uint32)
    text.tofile(data / "x.bin")
    found = read(data / "x.bin", cache, tokens(100, "uint32", 3, 12), shuffle=shuffle)
    assert sorted(sample["tokens"][0] for sample in found) == list(range(3, len(text) - 99, 97))
    assert all(sample["tokens"] == list(range(sample["tokens"][0], sample["tokens"][0] + 100)) for sample in found)
    assert {sample["__key__"] for sample in found} == {f"x.bin/{number}" for number in range(len(found))}


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["tokens", "lines"])
def test_ranks_share_a_file_in_pieces(
    cache: fastload.Cache, data: Path, small_pieces: int, world_size: int, kind: str
) -> None:
    url, how, id_of = make_pieces(data, small_pieces, kind)
    whole = epoch_of(url, cache, how, id_of, batch_size=24)
    at_once = [
        epoch_of(url, cache, how, id_of, batch_size=24 // world_size, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    count = min(len(batches) for batches in at_once)
    joined = [sorted(each for batches in at_once for each in batches[number]) for number in range(count)]
    assert joined[:-1] == [sorted(batch) for batch in whole[: count - 1]]
    assert {each for batches in at_once for batch in batches for each in batch} == {
        each for batch in whole for each in batch
    }


def make_pieces(data: Path, piece_bytes: int, kind: str) -> tuple[str, Any, Any]:
    """Some file of several pieces, and how to tell its samples."""
    if kind == "tokens":
        np.arange(5 * piece_bytes // 4 + 99, dtype=np.uint32).tofile(data / "x.bin")
        return str(data / "x.bin"), tokens(512, "uint32"), lambda batch: batch["tokens"][:, 0].tolist()
    lines = [json.dumps({"id": n, "text": "x" * (n * 37 % 900)}) for n in range(1500)]
    (data / "x.jsonl").write_text("\n".join(lines))
    return str(data / "x.jsonl"), "auto", lambda batch: [each["id"] for each in batch["json"]]


def epoch_of(url: str, cache: fastload.Cache, how: Any, id_of: Any, batch_size: int, **options: Any) -> list[Any]:
    dataset = fastload.StreamingDataset(url, cache=cache, format=how, shuffle=True, partitions=1, **options)
    return [id_of(batch) for batch in fastload.DataLoader(dataset, batch_size=batch_size)]


@pytest.mark.parametrize("kind", ["tokens", "lines"])
def test_a_run_goes_on_in_the_middle_of_a_piece(
    cache: fastload.Cache, data: Path, small_pieces: int, kind: str
) -> None:
    url, how, id_of = make_pieces(data, small_pieces, kind)

    def loader() -> Any:
        dataset = fastload.StreamingDataset(url, cache=cache, format=how, shuffle=True, shuffle_window=small_pieces)
        return fastload.DataLoader(dataset, batch_size=16)

    whole = [id_of(batch) for batch in loader()]
    for stop in (1, len(whole) // 2, len(whole) - 2):
        first = loader()
        batches = iter(first)
        head = [id_of(next(batches)) for _ in range(stop)]
        rest = loader()
        rest.load_state_dict(first.state_dict())
        assert head + [id_of(batch) for batch in rest] == whole


def test_a_state_of_other_windows_is_refused(cache: fastload.Cache, data: Path) -> None:
    np.arange(5000, dtype=np.uint16).tofile(data / "x.bin")

    def loader(length: int) -> Any:
        how = tokens(length, "uint16")
        return fastload.DataLoader(
            fastload.StreamingDataset(str(data / "x.bin"), cache=cache, format=how), batch_size=4
        )

    first = loader(64)
    next(iter(first))
    other = loader(32)
    other.load_state_dict(first.state_dict())
    with pytest.raises(StateError):
        list(other)


def test_tokens_are_mixed_with_tars(cache: fastload.Cache, data: Path, small_pieces: int) -> None:
    np.arange(2 * small_pieces, dtype=np.uint16).tofile(data / "x.bin")
    window = np.arange(128, dtype=np.uint16)
    (data / "x.tar").write_bytes(tar_of({f"{n:04}": {"tokens": (window + n).tobytes()} for n in range(300)}))
    ours = fastload.StreamingDataset(str(data / "x.bin"), cache=cache, format=tokens(128, "uint16"), shuffle=True)
    decode = {"tokens": fastload.decode.flat("uint16", 128)}
    theirs = fastload.StreamingDataset(str(data / "x.tar"), cache=cache, decode=decode, shuffle=True)
    mixture = fastload.Mixture([(ours, 1), (theirs, 1)], stop="first")
    sources = []
    for batch in fastload.DataLoader(mixture, batch_size=20):
        assert batch["tokens"].dtype == torch.uint16
        first = batch["tokens"][:, :1].int()
        assert torch.equal(batch["tokens"].int(), (first + torch.arange(128)) % (1 << 16))
        sources += batch["__source__"].tolist()
    assert {0, 1} == set(sources)


def test_counts_and_indexes_of_other_windows_are_not_taken(cache: fastload.Cache, data: Path) -> None:
    np.arange(5000, dtype=np.uint16).tofile(data / "x.bin")
    docs = documents_of(5, 40, 300)
    token_writer.write(data / "y.bin", docs)
    for length in (100, 50, 100):
        assert len(read(data / "x.bin", cache, tokens(length, "uint16", 0))) == 5000 // length
        expected = token_writer.samples(docs, 2, 1 << 30, length, 1, "fit")
        assert len(read(data / "y.bin", cache, tokens(length, pack="fit"))) == len(expected)


def test_a_manifest_file_of_other_windows_is_refused(cache: fastload.Cache, data: Path, tmp_path: Path) -> None:
    np.arange(5000, dtype=np.uint16).tofile(data / "x.bin")
    options = {"manifest": str(tmp_path / "list.json")}
    assert len(read(data / "x.bin", cache, tokens(100, "uint16", 0), **options)) == 50
    assert len(read(data / "x.bin", cache, tokens(100, "uint16", 0), **options)) == 50
    with pytest.raises(ConfigError, match=r"length=100.*length=50"):
        read(data / "x.bin", cache, tokens(50, "uint16", 0), **options)


@pytest.mark.parametrize("kind", ["tokens", "lines", "documents"])
def test_what_is_warmed_is_what_is_read(cache: fastload.Cache, data: Path, small_pieces: int, kind: str) -> None:
    if kind == "documents":
        token_writer.write(data / "x.bin", documents_of(1, 400, 900))
        url, how = str(data / "x.bin"), tokens(512, pack="fit")
    else:
        url, how, _ = make_pieces(data, small_pieces, kind)
    warmed = fastload.warm(url, cache=cache, format=how)
    dataset = fastload.StreamingDataset(url, cache=cache, format=how, shuffle=True)
    assert warmed.is_complete
    assert warmed.total_bytes >= Path(url).stat().st_size
    assert warmed.sample_count == len(dataset)
    loader = fastload.DataLoader(dataset, batch_size=16)
    assert sum(len(batch["__key__"]) for batch in loader) == len(dataset)
    beside = (data / "x.idx").stat().st_size if kind == "documents" else 0
    assert loader.stats()["remote_bytes"] <= beside


def test_lines_in_pieces_have_the_same_order_with_an_index_file(
    cache: fastload.Cache, data: Path, small_pieces: int, tmp_path: Path
) -> None:
    url, _, id_of = make_pieces(data, small_pieces, "lines")
    without = epoch_of(url, cache, "auto", id_of, batch_size=16)
    prepare.index([url], cache, output=tmp_path / "index.arrow")
    with fastload.Cache(tmp_path / "other", chunk_bytes=CHUNK_BYTES, service="inprocess") as other:
        options = {"shuffle": True, "partitions": 1, "index": str(tmp_path / "index.arrow")}
        dataset = fastload.StreamingDataset(url, cache=other, **options)
        assert len(dataset) == sum(map(len, without))
        assert [id_of(batch) for batch in fastload.DataLoader(dataset, batch_size=16)] == without


@pytest.mark.parametrize("kind", ["tokens", "lines"])
def test_nodes_share_one_file(
    cache: fastload.Cache, data: Path, small_pieces: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, how, id_of = make_pieces(data, small_pieces, kind)
    whole = {each for batch in epoch_of(url, cache, how, id_of, batch_size=16) for each in batch}
    parts = []
    for rank in range(2):
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
            monkeypatch.setenv(name, str(value))
        dataset = fastload.StreamingDataset(url, cache=cache, format=how, shuffle=True, tail="drop")
        loader = fastload.DataLoader(dataset, batch_size=8)
        assert len(dataset) == len(whole) // 2
        parts.append([each for batch in loader for each in id_of(batch)])
        loader.close()
        dataset.close()
    assert set(parts[0]).isdisjoint(parts[1])
    assert whole.issuperset(parts[0] + parts[1])
    assert len(parts[0]) == len(parts[1]) == len(whole) // 2


def test_what_is_pinned_is_what_is_read(cache: fastload.Cache, data: Path, small_pieces: int) -> None:
    url, how, id_of = make_pieces(data, small_pieces, "lines")
    cache.pin(url)
    first = epoch_of(url, cache, how, id_of, batch_size=16)
    cache.clear()
    dataset = fastload.StreamingDataset(url, cache=cache, shuffle=True, partitions=1)
    loader = fastload.DataLoader(dataset, batch_size=16)
    assert [id_of(batch) for batch in loader] == first
    assert loader.stats()["remote_bytes"] == 0


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"length": 0}, "length=0"),
        ({"length": 2.5}, "length=2.5"),
        ({"length": 8, "overlap": 8}, "overlap=8"),
        ({"length": 8, "overlap": -1}, "overlap=-1"),
        ({"length": 8, "header_bytes": -1}, "header_bytes=-1"),
        ({"length": 8, "pack": "best"}, "pack='best'"),
        ({"length": 8, "dtype": "U3"}, "U3"),
        ({"length": 8, "dtype": "bool"}, "bool"),
        ({"length": 8, "dtype": "uint8", "pad": 300}, "pad=300"),
        ({"length": 8, "dtype": "uint8", "end": -1}, "end=-1"),
        ({"length": 1 << 30}, "length="),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tokens(**arguments)


def test_a_format_that_is_none_is_refused(cache: fastload.Cache) -> None:
    with pytest.raises(ConfigError, match="tokens"):
        fastload.StreamingDataset("x.bin", cache=cache, format=tokens)  # type: ignore[arg-type]


def test_bare_files_need_a_dtype(cache: fastload.Cache, data: Path) -> None:
    np.arange(500, dtype=np.uint16).tofile(data / "x.bin")
    with pytest.raises(ConfigError, match=r"x\.bin.*dtype="):
        read(data / "x.bin", cache, tokens(10))
    with pytest.raises(ConfigError, match=r"x\.bin.*\.idx"):
        read(data / "x.bin", cache, tokens(10, "uint16", pack="fit"))
    with pytest.raises(ShardError, match=r"x\.bin has 1000 bytes.*cut short"):
        read(data / "x.bin", cache, tokens(10, "uint64", header_bytes=4))
    with pytest.raises(MissingColumnError, match="position"):
        read(data / "x.bin", cache, tokens(10, "uint16"), columns=["tokens", "position"])


def test_what_a_file_says_is_not_overruled(cache: fastload.Cache, data: Path) -> None:
    np.save(data / "x.npy", np.arange(500, dtype=np.uint16))
    token_writer.write(data / "y.bin", [[[1, 2, 3]]])
    for name in ("x.npy", "y.bin"):
        with pytest.raises(ConfigError, match=rf"{name} holds uint16.*int32"):
            read(data / name, cache, tokens(10, "int32"))
        with pytest.raises(ConfigError, match=rf"{name}.*header_bytes"):
            read(data / name, cache, tokens(10, header_bytes=8))
    with pytest.raises(ConfigError, match=r"y\.bin.*end=2"):
        read(data / "y.bin", cache, tokens(10, end=2))
    np.save(data / "z.npy", np.array(["a", "b"]))
    np.save(data / "f.npy", np.asfortranarray(np.zeros((3, 4), np.int32)))
    for name in ("z.npy", "f.npy"):
        with pytest.raises(ShardError, match=name):
            read(data / name, cache, tokens(10))
    (data / "x.npy").write_bytes((data / "x.npy").read_bytes()[:-2])
    with pytest.raises(ShardError, match=r"x\.npy.*cut short"):
        read(data / "x.npy", cache, tokens(10))


def test_files_of_other_formats_and_dtypes_are_named(cache: fastload.Cache, data: Path) -> None:
    np.save(data / "x.npy", np.arange(500, dtype=np.uint16))
    np.save(data / "y.npy", np.arange(500, dtype=np.int32))
    with pytest.raises(ShardError, match=r"y\.npy and .*x\.npy.*int32\[10\] in the one and uint16\[10\] in the other"):
        read(f"{data}/", cache, tokens(10), shuffle=True)
    (data / "chunk-0-0.bin").write_bytes(bytes(100))
    with pytest.raises(ConfigError, match=r"chunk-0-0\.bin is litdata"):
        read(f"{data}/", cache, tokens(10))
    (data / "x.tar").write_bytes(bytes(1024))
    with pytest.raises(ConfigError, match=r"x\.tar is tar"):
        read(data / "x.tar", cache, tokens(10, "uint8"))


DOCS = [[[1, 2, 3], [4]], [[5, 6]], [[7] * 9]]


@pytest.mark.parametrize("pack", [None, "cut"])
def test_files_with_and_without_an_index_are_not_mixed(cache: fastload.Cache, data: Path, pack: Any) -> None:
    token_writer.write(data / "x.bin", DOCS)
    token_writer.write(data / "y.bin", DOCS)
    (data / "x.idx").unlink()
    with pytest.raises(ConfigError, match=r"x\.bin has no index beside it \(\.idx\), and .*y\.bin has one"):
        read(f"{data}/", cache, tokens(4, "uint16", pack=pack))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda idx: idx[:20], "less than its header"),
        (lambda idx: idx[:-1], "it has"),
        (lambda idx: b"X" + idx[1:], "no index of Megatron"),
        (lambda idx: idx[:9] + b"\x02" + idx[10:], "version 2"),
        (lambda idx: idx[:17] + b"\x0b" + idx[18:], "dtype 11"),
        (lambda idx: idx[:34] + b"\x09" + idx[35:], "sequence 0 has 9 tokens"),
        (lambda idx: idx[:50] + b"\x02" + idx[51:], "sequence"),
        (lambda idx: idx[:82] + b"\x01" + idx[83:], "documents are of sequences 1"),
        (lambda idx: idx[:90] + b"\x09" + idx[91:], "do not begin with sequences that rise"),
    ],
)
def test_a_damaged_index_is_an_error_that_names_the_data(change: Any, says: str) -> None:
    beside = change(token_writer.index_bytes(DOCS, "<u2"))
    text = np.array([t for doc in DOCS for sequence in doc for t in sequence], "<u2").tobytes()
    for pack in (None, "fit", "cut"):
        if pack == "cut" and "rise" in says:
            continue  # it has nothing to do with windows
        how = tokens(4, pack=pack)  # type: ignore[arg-type]
        with pytest.raises(ShardError, match=rf"x\.bin.*{says}"):
            how.index(ObjectInfo("s3://b/x.bin", len(text)), reader_of(text), (reader_of(beside), len(beside)))


def test_data_that_its_index_does_not_fit_is_an_error(cache: fastload.Cache, data: Path) -> None:
    token_writer.write(data / "x.bin", DOCS)
    (data / "x.bin").write_bytes((data / "x.bin").read_bytes()[:-4])
    with pytest.raises(ShardError, match=r"x\.bin has 26 bytes, and the index beside it says 30"):
        read(data / "x.bin", cache, tokens(4, pack="cut"))


@settings(max_examples=300)
@given(st.binary(max_size=12), st.integers(0, 120), st.sampled_from([None, "cut", "fit"]), st.booleans())
def test_a_mutated_index_gives_samples_or_an_error(noise: bytes, at: int, pack: Any, has_modes: bool) -> None:
    modes = [[0] * len(doc) for doc in DOCS] if has_modes else None
    beside = bytearray(token_writer.index_bytes(DOCS, "<u2", modes))
    beside[at : at + len(noise)] = noise
    text = np.array([t for doc in DOCS for sequence in doc for t in sequence], "<u2").tobytes()
    try:
        index = tokens(4, pack=pack).index(
            ObjectInfo("s3://b/x.bin", len(text)), reader_of(text), (reader_of(bytes(beside)), len(beside))
        )
        token_writer.samples_of_index(index, text, 0)
    except FastloadError:
        pass


def test_pieces_cover_their_object() -> None:
    piece_bytes, tail_bytes = 64 << 20, 512 << 10  # part of the order: never changed
    large = ObjectInfo("s3://b/x.jsonl", 3 * piece_bytes + 5, "e", 7)
    small = ObjectInfo("s3://b/y.jsonl", piece_bytes, "e", 7)
    found = list(in_pieces(ObjectTable.of([small, large, small, large])))
    sizes = [piece_bytes + tail_bytes, piece_bytes + tail_bytes, piece_bytes + 5, 5]
    parts = [
        dataclasses.replace(large, size=size, start=number * piece_bytes, object_size=large.size)
        for number, size in enumerate(sizes)
    ]
    assert found == [small, *parts, small, *parts]
    assert [part.whole for part in parts] == [large] * 4
    assert [own_bytes(part) for part in parts] == [piece_bytes] * 3 + [5]
    assert own_bytes(small) == small.size


# As a text


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("tokens(16)", tokens(16)),
        ("tokens(16, uint16)", tokens(16, "uint16")),
        (" fastload.formats.tokens( 16, dtype='<u2' ,overlap = 0, ) ", tokens(16, "uint16", overlap=0)),
        ('tokens(16, None, 0, 8, "fit", -1)', tokens(16, None, 0, 8, "fit", -1)),
        ("tokens(pack=cut,length=16,end=50256)", tokens(16, pack="cut", end=50256)),
    ],
)
def test_a_text_says_the_same(text: str, how: Any) -> None:
    assert checked_format(text) == how
    assert checked_format(how) is how
    assert checked_format(how.reading) == dataclasses.replace(how, pad=0, end=None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "tokens",
            r"'tokens': it is not of this form; write tokens\(LENGTH\), .* such as tokens\(2048, uint16, overlap=0",
        ),
        ("tokens(2048", r"format='tokens\(2048': it is not of this form"),
        ("bytes(2048)", r"format='bytes\(2048\)': it is not of this form"),
        ("tokens()", "does not say the length of a sample"),
        ("tokens(dtype=uint16)", "does not say the length of a sample"),
        ("tokens(2048, __import__('os').system('true'))", r"cannot be read from \"__import__\('os'\)"),
        ("tokens(2048 uint16)", "cannot be read from '2048 uint16' on"),
        ("tokens(2048, len=3)", "it takes length, dtype, overlap, header_bytes, pack, pad, end, each once"),
        ("tokens(2048, uint16, dtype=uint16)", "each once"),
        ("tokens(1, 2, 3, 4, 5, 6, 7, 8)", "each once"),
        ("tokens(dtype=uint16, 2048)", "2048 comes behind arguments with names"),
        ("tokens(2048, uint17)", r"format='tokens\(2048, uint17\)': dtype='uint17' is not a numpy dtype"),
        ("tokens(many)", "length='many' must be a whole number"),
        ("tokens(8, uint16, pad=nan)", "pad=nan is no uint16"),
        ("token(8)", r"format='token\(8\)': it is not of this form"),
        ("tokenz", r"format='tokenz' is not known; there are .*'tokens\(LENGTH, DTYPE\)'"),
    ],
)
def test_a_text_that_says_nothing_is_named_with_the_cure(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        checked_format(text)
    assert repr(text) in str(error.value)


def test_where_there_is_no_python(data: Path, tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(data / "a.bin")
    (data / "b.bin").write_bytes(b"odd")
    cache = ["--cache", tmp_path / "cache", "--ram-bytes=16MiB", "--disk-bytes=64MiB", "--chunk-bytes=64KiB"]
    how = "--format=tokens(10, uint16, overlap=0)"
    bad = run_cli("index", f"{data}/", how, "--skip-bad", *cache, check=False)
    assert (bad.returncode, "b.bin has 3 bytes" in bad.stderr, "2 shards, 10 samples" in bad.stderr) == (3, True, True)
    (data / "b.bin").unlink()
    assert "1 shards, 10 samples" in run_cli("warm", f"{data}/", how, *cache).stderr
    looked = json.loads(run_cli("warm", f"{data}/", how, "--check", "--json", *cache).stdout)
    assert (looked["is_complete"], looked["data"][0]["total_bytes"]) == (True, 200)
    columns = json.loads(run_cli("schema", f"{data}/", how, "--json", *cache[:2]).stdout)
    assert columns["tokens"] == {"dtype": "uint16", "shape": [10], "encoding": columns["tokens"]["encoding"]}
    failed = run_cli("index", f"{data}/", how, "--output", tmp_path / "x.arrow", *cache, check=False)
    assert "are computed; leave it out" in failed.stderr


def test_large_files_are_pinned_in_the_pieces_that_are_read(data: Path, cache: fastload.Cache) -> None:
    docs = [[list(range(200))] for _ in range(9)]
    (data / "a.idx").write_bytes(token_writer.index_bytes(docs, "<u2"))
    np.array([docs], "<u2").tofile(data / "a.bin")
    whole = (data / "a.bin").stat().st_size + (data / "a.idx").stat().st_size
    with cut(200):  # the index is larger than that
        assert cache.pin(f"{data}/") == whole
        assert cache.pin(f"{data}/", format="tokens(8)") == whole + 17 * 5


def test_what_an_earlier_run_read_is_looked_for_in_its_pieces(data: Path, cache: fastload.Cache) -> None:
    np.arange(1000, dtype="<u2").tofile(data / "a.bin")
    with cut(500):
        assert read(data / "a.bin", cache, tokens(8, "uint16"))
        for how, is_held in ((tokens(8, "uint16"), True), (None, False)):
            run = prepare.EarlierRun([str(data / "a.bin")], how)
            assert prepare.look(run, cache.directory).is_complete == is_held
        warmed = prepare.warm_run(prepare.EarlierRun([str(data / "a.bin"), str(data / "b.bin")], how), cache)
        assert (warmed.is_complete, warmed.missing_count, warmed.total_bytes) == (True, 1, 2000)


def test_jobs_and_benchmarks_take_a_text(data: Path, tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(data / "a.bin")
    file = tmp_path / "job.toml"
    file.write_text(f'[[data]]\nname = "a"\nurls = ["{data}/"]\njob = {{ format = "tokens(10, uint16)" }}\n')
    (table,) = tables_of(file, {})
    job = task_of_table(table, Asked(None, None, None, False, None)).job
    assert job is not None
    assert job.format == tokens(10, "uint16")
    with pytest.raises(ConfigError, match=r"job: format='tokens\(0\)': length=0 must be"):
        tables_of(file, {"format": "tokens(0)"})
    options = Options([f"{data}/"], format="tokens(10, uint16)", cache=tmp_path / "bench")
    with Session(options, [], lambda words: None) as session:
        assert [each.url.rpartition("/")[2] for each in session.plan().objects] == ["a.bin"]
