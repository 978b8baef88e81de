"""What holds of every format: one order, however it is read, and exact states."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload import prepare
from fastload.client import Handle as Cache
from tests.formats import protobuf, test_arrow_table, test_litdata, test_mds
from tests.formats.packing import PACK, framed, pack_folder
from tests.formats.side_indexes import dalis, energons
from tests.shards import tar_of

LIMITS: dict[str, Any] = {
    "ram_bytes": "16MiB", "disk_bytes": "64MiB", "chunk_bytes": "64KiB", "service": "inprocess",
}  # fmt: skip
SIZES = [7, 31, 1, 18, 0, 40]
COUNT = sum(SIZES)
PARTS = [range(sum(SIZES[:number]), sum(SIZES[: number + 1])) for number in range(len(SIZES))]
Write = Callable[[Path, Sequence[Sequence[int]]], None]


def text(i: int) -> str:
    return f"sample {i} " + "x" * (i * 37 % 900)


def tar(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    for number, part in enumerate(parts):
        samples = {f"{i:05}": {"id": str(i).encode(), "text": text(i).encode()} for i in part}
        (folder / f"{number}.tar").write_bytes(tar_of(samples))


def jsonl(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    for number, part in enumerate(parts):
        lines = [json.dumps({"id": i, "text": text(i)}) for i in part]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))


def mds(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    listed = []
    for number, part in enumerate(parts):
        samples = [[struct.pack("<q", i), text(i).encode()] for i in part]
        data = test_mds.shard([("id", "int", 8), ("text", "str", None)], samples)
        (folder / f"{number}.mds").write_bytes(data)
        listed.append({"raw_data": {"basename": f"{number}.mds", "bytes": len(data)}, "samples": len(part)})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": listed}))


def mds_lines(form: str) -> Write:
    """MDS's shards of text: JSON or CSV, with digests."""
    columns = {"id": "int", "text": "str"}
    separator = "\t" if form == "tsv" else ","
    more = {"columns": columns} if form == "json" else {"column_names": [*columns], "column_encodings": ["int", "str"]}

    def written(folder: Path, parts: Sequence[Sequence[int]]) -> None:
        listed = []
        for number, part in enumerate(parts):
            lines = [
                json.dumps({"id": i, "text": text(i)}) if form == "json" else f"{i}{separator}{text(i)}" for i in part
            ]
            head = [] if form == "json" else [f"id{separator}text"]
            data = "".join(f"{line}\n" for line in head + lines).encode()
            name = f"shard.{number:05}.{form}"
            (folder / name).write_bytes(data)
            raw = {"basename": name, "bytes": len(data), "hashes": {"sha1": hashlib.sha1(data).hexdigest()}}
            listed.append({"format": form, "newline": "\n", "samples": len(part), "raw_data": raw, **more})
        (folder / "index.json").write_text(json.dumps({"version": 2, "shards": listed}))

    return written


def tfrecord(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    for number, part in enumerate(parts):
        records = [protobuf.example(id=[i], text=[text(i).encode()]) for i in part]
        (folder / f"x.tfrecord-{number:05}-of-{len(parts):05}").write_bytes(protobuf.tfrecord(records))


def litdata(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    node, leaf = test_litdata.node, test_litdata.LEAF
    chunks = {}
    for number, part in enumerate(parts):
        items = [test_litdata.item(struct.pack("<q", i), text(i).encode()) for i in part]
        data = test_litdata.chunk(items)
        (folder / f"chunk-0-{number}.bin").write_bytes(data)
        chunks[f"chunk-0-{number}.bin"] = len(data), len(part)
    spec = test_litdata.spec(node("builtins.dict", '["id", "text"]', leaf, leaf))
    about = test_litdata.index_json(chunks, data_format=["int", "str"], data_spec=spec)
    (folder / "index.json").write_bytes(about)


def litdata_table(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    chunks = {}
    for number, part in enumerate(parts):
        rows = [{"id": i, "text": text(i)} for i in part]
        data = test_arrow_table.chunk(len(part), test_arrow_table.table(rows)) if rows else test_litdata.chunk([])
        (folder / f"chunk-0-{number}.bin").write_bytes(data)
        chunks[f"chunk-0-{number}.bin"] = len(data), len(part)
    (folder / "index.json").write_bytes(test_litdata.index_json(chunks))


def litdata_table_zstd(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    chunks = {}
    for number, part in enumerate(part for part in parts if part):
        ipc = test_arrow_table.table([{"id": i, "text": text(i)} for i in part], compression="zstd")
        data = test_arrow_table.chunk(len(part), ipc)
        (folder / f"chunk-0-{number}.bin").write_bytes(data)
        chunks[f"chunk-0-{number}.bin"] = len(data), len(part)
    (folder / "index.json").write_bytes(test_litdata.index_json(chunks, ipc_compression="zstd"))


def litdata_packed(how: str) -> Write:
    """Chunks that are packed as a whole, or in frames."""

    def written(folder: Path, parts: Sequence[Sequence[int]]) -> None:
        litdata(folder, [part for part in parts if part])
        about = json.loads((folder / "index.json").read_bytes())
        for listed in about["chunks"]:
            path = folder / listed["filename"]
            data = path.read_bytes()
            path.unlink()
            if how == "chunk":
                listed["filename"] = path.name.replace(".bin", ".zstd.bin")
                (folder / listed["filename"]).write_bytes(PACK[".zstd"](data))
            else:
                path.write_bytes(framed(data, 4))
                listed["chunk_bytes"] = path.stat().st_size
        about["config"] |= {"compression": "zstd", "compression_level": how, "types": {}}
        (folder / "index.json").write_text(json.dumps(about))

    return written


def tar_with_indexes(folder: Path, parts: Sequence[Sequence[int]]) -> None:
    tar(folder, parts)
    for path in [folder / f"{number}.tar" for number, part in enumerate(parts) if part]:  # empty ones have none
        ending, write = (".tar.idx", energons) if path.stem == "2" else (".idx", dalis)
        path.with_suffix(ending).write_bytes(write(path.read_bytes()))


def packed(write: Write, ending: str) -> Write:
    def packed_too(folder: Path, parts: Sequence[Sequence[int]]) -> None:
        write(folder, parts)
        pack_folder(folder, ending)

    return packed_too


FORMATS: dict[str, Write] = {
    "tar": tar, "tar, indexes": tar_with_indexes, "jsonl": jsonl, "mds": mds, "tfrecord": tfrecord, "litdata": litdata,
    "litdata table": litdata_table, "jsonl.gz": packed(jsonl, ".gz"), "mds.zstd": packed(mds, ".zstd"),
    "mds json": mds_lines("json"), "mds csv": mds_lines("csv"), "mds tsv.gz": packed(mds_lines("tsv"), ".gz"),
    "litdata.zstd": litdata_packed("chunk"), "litdata frames": litdata_packed("batch"),
    "litdata table.zstd": litdata_table_zstd,
}  # fmt: skip
DECODERS: dict[str, dict[str, fastload.decode.Decoder]] = {
    "tar": {"id": fastload.decode.integer(), "text": fastload.decode.text()},
    "tar, indexes": {"id": fastload.decode.integer(), "text": fastload.decode.text()},
    "jsonl": {"id": fastload.decode.integer(), "text": fastload.decode.json()},
    "tfrecord": {"id": fastload.decode.flat("int64", ()), "text": fastload.decode.text()},
}


@pytest.fixture(params=FORMATS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def url(tmp_path: Path, name: str) -> str:
    (tmp_path / "data").mkdir()
    FORMATS[name](tmp_path / "data", PARTS)
    return f"{tmp_path}/data/"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "cache", **LIMITS) as opened:
        yield opened


def data_set(name: str, url: str, cache: Cache, **options: Any) -> fastload.StreamingDataset:
    common = {"shuffle": True, "seed": 5, "shuffle_window": "8KiB", "columns": ["id", "text"], **options}
    return fastload.StreamingDataset(url, cache=cache, decode=DECODERS.get(name.removesuffix(".gz")), **common)


def ids(batch: dict[str, Any]) -> list[int]:
    """The numbers of a batch's samples, which are whole."""
    found: list[int] = batch["id"].tolist()
    assert list(batch["text"]) == [text(i) for i in found]
    return found


def order(dataset: fastload.StreamingDataset, **options: Any) -> list[int]:
    return [i for batch in fastload.DataLoader(dataset, batch_size=5, **options) for i in ids(batch)]


def test_each_sample_comes_once_in_one_order(name: str, url: str, cache: Cache) -> None:
    found = order(data_set(name, url, cache))
    assert sorted(found) == list(range(COUNT))
    assert found != sorted(found)
    assert order(data_set(name, url, cache, shuffle=False)) == list(range(COUNT))
    assert order(data_set(name, url, cache), num_workers=3) == found


def test_samples_are_found_by_their_number(name: str, url: str, cache: Cache) -> None:
    prepare.index([url], cache)
    dataset = data_set(name, url, cache, shuffle=False)
    assert len(dataset) == COUNT
    for i in (0, 7, 37, 38, COUNT - 1):
        assert (int(dataset[i]["id"]), dataset[i]["text"]) == (i, text(i))


def test_the_order_is_the_same_with_an_index_and_without(name: str, url: str, cache: Cache, tmp_path: Path) -> None:
    found = order(data_set(name, url, cache))
    file = tmp_path / "file.arrow"
    with Cache(tmp_path / "elsewhere", **LIMITS) as elsewhere:
        prepare.index([url], elsewhere, output=file)
        assert order(data_set(name, url, elsewhere, index=str(file))) == found
    (Path(url) / "fastload-index.arrow").write_bytes(file.read_bytes())
    with Cache(tmp_path / "another", **LIMITS) as another:
        assert order(data_set(name, url, another)) == found


def test_batches_are_the_same_at_every_number_of_ranks(name: str, url: str, cache: Cache) -> None:
    alone = list(fastload.DataLoader(data_set(name, url, cache, rank=0, world_size=1), batch_size=24))
    for world_size in (2, 3, 8):
        loaders = [
            fastload.DataLoader(
                data_set(name, url, cache, rank=rank, world_size=world_size), batch_size=24 // world_size
            )
            for rank in range(world_size)
        ]
        steps = zip(*loaders, strict=True)
        for whole, parts in zip(alone, steps, strict=False):
            if len(whole["id"]) == 24:
                assert sorted(i for part in parts for i in ids(part)) == sorted(ids(whole))


def test_a_state_in_the_middle_goes_on_at_the_next_sample(name: str, url: str, cache: Cache, tmp_path: Path) -> None:
    whole = order(data_set(name, url, cache))
    loader = fastload.DataLoader(data_set(name, url, cache), batch_size=5, num_workers=2)
    batches = iter(loader)
    begun = [i for _ in range(7) for i in ids(next(batches))]
    state = json.loads(json.dumps(loader.state_dict()))
    loader.close()
    with Cache(tmp_path / "another", **LIMITS) as another:
        loader = fastload.DataLoader(data_set(name, url, another), batch_size=5)
        loader.load_state_dict(state)
        assert begun + [i for batch in loader for i in ids(batch)] == whole


def test_it_is_mixed_with_a_tar(name: str, url: str, cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    tar(tmp_path / "other", [range(1000, 1020), range(1020, 1090)])
    parts = [(data_set(name, url, cache), 0.5), (data_set("tar", f"{tmp_path}/other/", cache), 0.5)]
    loader = fastload.DataLoader(fastload.Mixture(parts), batch_size=10)
    batches = iter(loader)
    found, state, rest = [], {}, []
    for number, batch in enumerate(batches):
        assert [i >= 1000 for i in ids(batch)] == batch["__source__"].bool().tolist()
        found += ids(batch)
        if number == 4:
            state = loader.state_dict()
        elif number > 4:
            rest += ids(batch)
    assert len(set(found)) == len(found)
    assert min(sum(i < 1000 for i in found), sum(i >= 1000 for i in found)) >= 80
    again = fastload.DataLoader(fastload.Mixture([(data, weight) for data, weight in parts]), batch_size=10)
    again.load_state_dict(state)
    assert [i for batch in again for i in ids(batch)] == rest
