"""Indexes that Energon and DALI left beside shards: what they say, and errors of those that are wrong."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload import prepare
from fastload.client import Consumer
from fastload.client import Handle as Cache
from fastload.errors import ShardError
from fastload.formats import side_index
from fastload.formats.side_index import UnprovenIndex
from fastload.store.types import ObjectInfo
from tests.formats import protobuf
from tests.formats.archives import Member, index, write
from tests.formats.side_indexes import dalis, dalis_of_records, energons
from tests.formats.test_contract import LIMITS
from tests.shards import tar_of

COUNTS = [7, 1, 12, 5]


def samples(first: int, count: int, size: int = 700) -> dict[str, dict[str, bytes]]:
    return {
        f"in/{i:05}": {"id": str(i).encode(), "Bin": bytes([i]) * (size + i % 3)} for i in range(first, first + count)
    }


def webdatasets(found: dict[str, dict[str, bytes]]) -> bytes:
    """With a pax header before each member, as webdataset writes them, and folders between."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for key, sample in found.items():
            folder = tarfile.TarInfo(key.rpartition("/")[0])
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for column, data in sample.items():
                info = tarfile.TarInfo(f"{key}.{column}")
                info.size, info.mtime = len(data), 1700000000.25
                archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


Put = Callable[[Path, bytes], None]
HOW: dict[str, Put] = {
    "energon": lambda shard, data: shard.with_name(shard.name + ".idx").write_bytes(energons(data)) and None,
    "dali": lambda shard, data: shard.with_suffix(".idx").write_bytes(dalis(data)) and None,
    "dali's as energon's": lambda shard, data: shard.with_name(shard.name + ".idx").write_bytes(dalis(data)) and None,
}  # fmt: skip


def make(folder: Path, how: str | None, pack: Callable[[Any], bytes] = tar_of) -> str:
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(COUNTS):
        data = pack(samples(first, count))
        (folder / f"{number}.tar").write_bytes(data)
        if how is not None:
            HOW[how](folder / f"{number}.tar", data)
        first += count
    return f"{folder}/"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache", **LIMITS) as opened:
        yield opened


def data_set(url: str, cache: Cache, **options: Any) -> fastload.StreamingDataset:
    decode = {"id": fastload.decode.integer(), "bin": fastload.decode.raw()}
    return fastload.StreamingDataset(url, cache=cache, **{"decode": decode, **options})


def order(dataset: fastload.StreamingDataset, **options: Any) -> list[int]:
    found = []
    for batch in fastload.DataLoader(dataset, batch_size=4, **options):
        for i, value, key in zip(batch["id"].tolist(), batch["bin"], batch["__key__"], strict=True):
            assert bytes(value) == bytes([i]) * (700 + i % 3)
            assert key == f"in/{i:05}"
            found.append(i)
    return found


@pytest.mark.parametrize("pack", [tar_of, webdatasets])
@pytest.mark.parametrize("how", HOW)
def test_the_order_is_the_same_with_them_and_without(how: str, pack: Any, tmp_path: Path, cache: Cache) -> None:
    options: dict[str, Any] = {"shuffle": True, "seed": 4, "shuffle_window": "8KiB"}
    bare = order(data_set(make(tmp_path / "bare", None, pack), cache, **options))
    url = make(tmp_path / "with", how, pack)
    dataset = data_set(url, cache, **options)
    assert order(dataset) == bare
    assert order(data_set(url, cache, **options), num_workers=2) == bare
    with Cache(tmp_path / "another", **LIMITS) as another:
        loader = fastload.DataLoader(data_set(url, another, **options), batch_size=4)
        batches = iter(loader)
        begun = [i for _ in range(3) for i in next(batches)["id"].tolist()]
        state = json.loads(json.dumps(loader.state_dict()))
        loader.close()
    again = fastload.DataLoader(data_set(url, cache, **options), batch_size=4)
    again.load_state_dict(state)
    assert begun + [i for batch in again for i in batch["id"].tolist()] == bare


@pytest.mark.parametrize("how", HOW)
def test_counts_are_known_without_reading_a_shard(how: str, tmp_path: Path, cache: Cache, read: list[int]) -> None:
    dataset = data_set(make(tmp_path / "data", how), cache)
    assert dataset.known_counts().tolist() == COUNTS
    assert min(read) >= len(COUNTS)  # of chunks, of which each shard here has one, and then come the indexes
    with Cache(tmp_path / "another", **LIMITS) as another:
        bare = data_set(make(tmp_path / "bare", None), another)
        with pytest.raises(TypeError):
            len(bare)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The chunks that are waited for."""
    chunks: list[int] = []
    acquire = Consumer.acquire

    def noting(self: Consumer, chunk_nos: Any, *arguments: Any, **options: Any) -> Any:
        chunks.extend(np.asarray(chunk_nos).tolist())
        return acquire(self, chunk_nos, *arguments, **options)

    monkeypatch.setattr(Consumer, "acquire", noting)
    return chunks


def test_a_sample_is_read_without_walking_over_its_shard(tmp_path: Path, cache: Cache, read: list[int]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = tar_of(samples(0, 250, 3000))  # a dozen chunks
    (folder / "a.tar").write_bytes(data)
    (folder / "a.idx").write_bytes(dalis(data))
    dataset = data_set(f"{folder}/", cache)
    assert dataset[120]["__key__"] == "in/00120"
    chunk_count = -(-len(data) // (64 << 10))
    shard = {chunk for chunk in read if chunk < chunk_count}
    assert chunk_count >= 12
    assert len(shard) <= 2
    del read[:]
    assert dataset[120]["id"] == 120


def test_headers_lie_in_other_chunks_than_values(tmp_path: Path) -> None:
    """Read in no order, with a cache that holds less, each sample has its chunks leased by itself."""
    folder = tmp_path / "data"
    folder.mkdir()
    found = {f"in/{i:05}": {"id": str(i).encode(), "bin": bytes([i]) * ((128 << 10) - 2048)} for i in range(12)}
    data = tar_of(found)
    (folder / "a.tar").write_bytes(data)
    (folder / "a.idx").write_bytes(dalis(data))
    with Cache(tmp_path / "small", **{**LIMITS, "ram_bytes": "1MiB"}) as small:
        for columns in (["bin"], ["id"], ["id", "bin"]):
            dataset = data_set(f"{folder}/", small, shuffle="global", seed=2, decode=None, columns=columns)
            with fastload.DataLoader(dataset, batch_size=4) as loader:
                for _ in range(2):
                    assert sorted(key for batch in loader for key in batch["__key__"]) == sorted(found)


def test_energons_of_a_tar_counts_and_is_checked(tmp_path: Path, cache: Cache) -> None:
    url = make(tmp_path / "data", "energon")
    (tmp_path / "data/1.tar.idx").write_bytes(
        (tmp_path / "data/1.tar.idx").read_bytes()[:8] * 0 + struct.pack("<3Q", 0, 1024, 2560)
    )
    dataset = data_set(url, cache)
    assert len(dataset) == sum(COUNTS) + 1
    with pytest.raises(ShardError, match=r"1\.tar holds 1 samples, but its index .*1\.tar\.idx says 2; correct it"):
        order(dataset)


def test_those_of_tfrecord_count(tmp_path: Path, cache: Cache) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("a.tfrecord", 3), ("b.tfrecord", 5)):
        data = protobuf.tfrecord([protobuf.example(id=[i]) for i in range(count)])
        (folder / name).write_bytes(data)
        (folder / (name.removesuffix(".tfrecord") if count == 3 else name)).with_name(
            "a.idx" if count == 3 else "b.tfrecord.idx"
        ).write_bytes(dalis_of_records(data))
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache)
    assert dataset.known_counts().tolist() == [3, 5]
    assert [int(sample["id"]) for sample in dataset] == [0, 1, 2, 0, 1, 2, 3, 4]


def shifted(data: bytes, by: int) -> bytes:
    words = data.split(b"\n", 1)
    return words[0] + b"\n" + re.sub(rb"(?<= )(\d+)(?= \d+ )", lambda match: str(int(match[1]) + by).encode(), words[1])


STALE: dict[str, Callable[[bytes], tuple[str, bytes]]] = {
    "of more samples": lambda data: (".idx", dalis(tar_of(samples(0, 40)))),
    "of far fewer": lambda data: (".idx", dalis(tar_of(samples(0, 1)))),
    "energon's of more": lambda data: (".tar.idx", energons(tar_of(samples(0, 40)))),
    "energon's of far fewer": lambda data: (".tar.idx", energons(tar_of(samples(0, 1)))),
    "empty": lambda data: (".tar.idx", b""),
    "cut": lambda data: (".tar.idx", energons(data)[:-3]),
    "cut text": lambda data: (".idx", dalis(data)[:-20]),
    "another version": lambda data: (".idx", dalis(data).replace(b"v1.2", b"v1.1")),
    "no numbers": lambda data: (".idx", dalis(data).replace(b" 7", b" x")),
    "none": lambda data: (".idx", b"v1.2 0\n"),
    "blanks": lambda data: (".idx", dalis(data).replace(b"in/", b"i n/")),
    "out of order": lambda data: (".tar.idx", energons(data)[8:16] + energons(data)[:8] + energons(data)[16:]),
    "negative": lambda data: (".idx", dalis(data).replace(b" 7", b" -7")),
    "not aligned": lambda data: (".idx", shifted(dalis(data), 8)),
    "huge": lambda data: (".idx", re.sub(rb"id \d+", b"id 9223372036854775807", dalis(data))),
    "beyond numbers": lambda data: (".idx", re.sub(rb"id \d+", b"id 92233720368547758070", dalis(data))),
    "doubled": lambda data: (".idx", dalis(data).replace(b".Bin", b".id")),
}  # fmt: skip


@pytest.mark.parametrize("case", STALE)
def test_one_that_does_not_fit_costs_a_warning(case: str, tmp_path: Path, cache: Cache) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = tar_of(samples(0, 30))
    ending, written = STALE[case](data)
    (folder / "a.tar").write_bytes(data)
    (folder / f"a{ending}").write_bytes(written)
    dataset = data_set(f"{folder}/", cache)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(TypeError):
            len(dataset)
        assert order(dataset) == [*range(30)]
    (said,) = [str(warning.message) for warning in caught]
    assert re.match(r"the index beside .*a\.tar cannot be used \(.*\.idx: .*\): the shard is indexed by reading", said)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(dataset) == 30


def test_samples_of_one_size_in_another_order_are_noticed(tmp_path: Path, cache: Cache) -> None:
    """Sizes and offsets fit then, and only the headers know better."""
    folder = tmp_path / "data"
    folder.mkdir()
    found = {key: {"id": sample["id"].rjust(2), "bin": bytes(600)} for key, sample in samples(0, 20).items()}
    (folder / "a.tar").write_bytes(tar_of(found))
    (folder / "a.idx").write_bytes(dalis(tar_of(dict(reversed(found.items())))))
    with pytest.raises(
        ShardError, match=r"a\.idx is no index of .*a\.tar as that is now: there is no member 'in/00019\.id'"
    ):
        order(data_set(f"{folder}/", cache))
    (folder / "a.idx").unlink()
    with Cache(tmp_path / "cache") as again:  # what it said is kept nowhere
        dataset = fastload.StreamingDataset(f"{folder}/", cache=again, columns=["id"])
        assert [int(sample["id"]) for sample in dataset] == [*range(20)]


LIES: dict[str, Callable[[bytes], bytes]] = {
    "a member is left out": lambda text: re.sub(rb" Bin \d+ \d+ in/00002\.Bin", b"", text),
    "a sample is left out": lambda text: re.sub(rb"\n[^\n]*in/00002\.Bin\n", b"\n", text.replace(b" 9\n", b" 8\n", 1)),
    "the last sample is left out": lambda text: re.sub(
        rb"[^\n]*in/00008\.Bin\n", b"", text.replace(b" 9\n", b" 8\n", 1)
    ),
    "the last member is left out": lambda text: re.sub(rb" Bin \d+ \d+ in/00008\.Bin", b"", text),
    "another key": lambda text: text.replace(b"in/00004.", b"in/00044."),
    "another column": lambda text: text.replace(b"00004.Bin", b"00004.bun"),
    "a smaller member": lambda text: re.sub(rb"Bin (\d+) \d+ in/00003", rb"Bin \1 699 in/00003", text),
    "two are exchanged": lambda text: re.sub(
        rb"id (\d+) 1 in/00003.id Bin (\d+) (\d+)", rb"Bin \1 1 in/00003.Bin id \2 \3", text
    ).replace(b"in/00003.Bin\n", b"in/00003.id\n"),
}  # fmt: skip


@pytest.mark.parametrize("columns", [["id"], ["bin", "id"]])
@pytest.mark.parametrize("shuffle", [False, True, "global"])
@pytest.mark.parametrize("lie", LIES)
def test_lies_are_errors_that_name_the_file(
    lie: str, shuffle: bool | str, columns: list[str], tmp_path: Path, cache: Cache
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    data = tar_of(samples(0, 9))
    lying = LIES[lie](dalis(data))
    assert lying != dalis(data)
    (folder / "a.tar").write_bytes(data)
    (folder / "a.idx").write_bytes(lying)
    dataset = data_set(f"{folder}/", cache, shuffle=shuffle, decode=None, columns=columns)
    with pytest.raises(
        ShardError, match=r"a\.idx is no index of .*/a\.tar as that is now: .*; write it again, or remove it"
    ):
        list(dataset)


def test_what_is_indexed_ahead_is_as_the_shards_say(tmp_path: Path, cache: Cache) -> None:
    url = make(tmp_path / "data", "dali")
    for number in range(len(COUNTS)):
        path = tmp_path / f"data/{number}.idx"
        path.write_bytes(path.read_bytes().replace(b"in/", b"xx/"))
    file = tmp_path / "index.arrow"
    assert prepare.index([url], cache, output=file).sample_count == sum(COUNTS)
    assert order(data_set(url, cache)) == [*range(sum(COUNTS))]
    with Cache(tmp_path / "another", **LIMITS) as another:
        assert order(data_set(url, another, index=str(file))) == [*range(sum(COUNTS))]


def test_what_is_warmed_is_indexed_by_the_shards(tmp_path: Path, cache: Cache) -> None:
    url = make(tmp_path / "data", "dali")
    assert fastload.warm(url, cache=cache).sample_count == sum(COUNTS)
    for path in (tmp_path / "data").glob("*.idx"):
        path.unlink()
    assert len(data_set(url, cache)) == sum(COUNTS)


def test_ranks_of_a_node_share_none_that_is_not_proven(tmp_path: Path) -> None:
    url = make(tmp_path / "data", "dali")
    limits = {name: value for name, value in LIMITS.items() if name != "service"}
    with fastload.Cache(tmp_path / "cache", **limits) as cache:
        loaders = [
            fastload.DataLoader(data_set(url, cache, rank=rank, world_size=2, tail="uneven"), batch_size=3)  # type: ignore[arg-type]
            for rank in range(2)
        ]
        found = [int(i) for loader in loaders for batch in loader for i in batch["id"]]
        assert sorted(found) == [*range(sum(COUNTS))]
        for loader in loaders:
            loader.close()


def test_names_that_are_taken_from_long_headers_are_proven(tmp_path: Path, cache: Cache) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    found = {f"{'deep/' * 40}{i:03}": {"id": str(i).encode(), "bin": b"x" * i} for i in range(9)}
    for name, form in (("gnu", tarfile.GNU_FORMAT), ("pax", tarfile.PAX_FORMAT)):
        members = [Member(f"{key}.{column}", value) for key, each in found.items() for column, value in each.items()]
        data = write(members, form)
        (folder / f"{name}.tar").write_bytes(data)
        (folder / f"{name}.idx").write_bytes(dalis(data))
    dataset = data_set(f"{folder}/", cache, decode=None, columns=["id"])
    assert [int(bytes(sample["id"])) for sample in dataset] == [*range(9)] * 2


def parsed(data: bytes, text: bytes) -> Any:
    return side_index.read(text, "a.idx", ObjectInfo("a.tar", len(data)), "tar")


def test_dalis_is_the_index_that_the_walk_makes() -> None:
    for pack in (tar_of, webdatasets):
        data = pack(samples(0, 20))
        found = parsed(data, dalis(data))
        assert isinstance(found, UnprovenIndex)
        assert found == index(data)
        assert parsed(data, energons(data)) == 20


def test_samples_are_proven_as_they_are_left_out() -> None:
    data = webdatasets(samples(0, 20))
    whole = parsed(data, dalis(data))
    left = whole.without(np.arange(20) % 3 == 0)
    numbers = np.array([1, 4, 5])
    headers = [data[start : start + size] for start, size in zip(*left.places_of_headers(numbers), strict=True)]
    offsets = np.cumsum([0, *map(len, headers)])
    left.prove(numbers, np.frombuffer(b"".join(headers), np.uint8), offsets)
    assert np.flatnonzero(left.is_proven).tolist() == [1, 4, 5]
    wrong = headers[0].replace(b"in/", b"im/")
    with pytest.raises(ShardError, match=r"a\.idx is no index of a\.tar"):
        left.prove(numbers, np.frombuffer(b"".join([wrong, *headers[1:]]), np.uint8), offsets)


DATA = tar_of(samples(0, 6))


@given(st.data())
def test_what_is_taken_lies_within_the_shard(draw: st.DataObject) -> None:
    """Whatever is done to a file: it is refused, or all that it says lies in the shard, in order."""
    made = draw.draw(st.sampled_from([dalis(DATA), energons(DATA)]))
    changed = bytearray(made)
    for at, value in draw.draw(st.lists(st.tuples(st.integers(0, len(made) - 1), st.integers(0, 255)), max_size=4)):
        changed[at] = value
    try:
        found = parsed(DATA, bytes(changed[draw.draw(st.integers(0, 3)) :]))
    except ShardError:
        return
    if isinstance(found, UnprovenIndex):
        assert (found.header_start + 512 <= found.member_offset).all()
        assert (found.member_offset + found.member_size <= len(DATA)).all()
        assert (found.header_start >= 0).all()
        assert (found.member_size >= 0).all()
    else:
        assert 0 <= found <= len(DATA) // 512
