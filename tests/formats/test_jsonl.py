"""JSON lines: found whatever the pieces, and their members as `json.loads` has them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload.errors import ConfigError, DecodeError, MissingColumnError, ShardError
from fastload.formats import RecordIndex, indexer_for, pieces, record_reader, stored_index
from fastload.formats.pieces import in_pieces
from fastload.formats.records import split
from fastload.store.table import ObjectTable
from fastload.store.types import ObjectInfo
from tests.conftest import Bucket

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b", "ä", 'quo"te', "back\\slash", ""]), VALUES, max_size=5)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


def index_of(data: bytes, step: int = 1000) -> RecordIndex:
    indexer = indexer_for("s3://b/x.jsonl", len(data))
    for start in range(0, len(data), step):
        indexer.feed(np.frombuffer(data[start : start + step], np.uint8), start)
    assert indexer.done
    index = indexer.finish()
    assert isinstance(index, RecordIndex)
    return index


def lines_of(data: bytes, step: int = 1000) -> list[bytes]:
    index = index_of(data, step)
    return [data[start : start + size] for start, size in zip(index.offset.tolist(), index.size.tolist(), strict=True)]


@given(
    st.lists(OBJECTS, max_size=20),
    st.integers(1, 70),
    st.sampled_from(["\n", "\r\n", "\n\n", "\r\n\r\n", "\n \t \n"]),
    st.sampled_from(["", " ", "\r", "\n", "\r\n", "\n \n "]),
    st.booleans(),
    st.booleans(),
)
def test_lines_are_found_whatever_the_pieces(
    objects: list[dict[str, Any]], step: int, end: str, last: str, is_marked: bool, is_ascii: bool
) -> None:
    text = end.join(json.dumps(each, ensure_ascii=is_ascii) for each in objects) + last
    data = (b"\xef\xbb\xbf" if is_marked and step > 2 else b"") + text.encode("utf-8", "surrogatepass")
    found = lines_of(data, step)
    assert [json.loads(line.decode("utf-8", "surrogatepass")) for line in found] == objects
    index = index_of(data, step)
    assert stored_index(index.to_bytes(), "s3://b/x.jsonl", len(data)) == index


def lines_of_piece(data: bytes, info: ObjectInfo, step: int) -> list[tuple[int, bytes]]:
    """The lines of a piece, and where each begins in the file."""
    indexer = indexer_for(info.url, info.size, piece=info if info.is_piece else None)
    at = 0
    while not indexer.done:
        indexer.feed(np.frombuffer(data[info.start + at : info.start + at + step], np.uint8), at)
        at += step
    index = indexer.finish()
    stored = stored_index(index.to_bytes(), info.url, info.size, info.start, len(data) - info.start)
    assert stored == index
    assert isinstance(stored, RecordIndex)
    places = zip((info.start + stored.offset).tolist(), stored.size.tolist(), strict=True)
    return [(at, data[at : at + length]) for at, length in places]


@given(
    st.lists(st.text("ab \r", max_size=12), max_size=30),
    st.booleans(),
    st.integers(1, 50),
    st.integers(1, 40),
    st.booleans(),
)
def test_a_line_belongs_to_the_piece_in_which_the_line_before_it_ends(
    lines: list[str], is_ended: bool, piece_bytes: int, step: int, is_marked: bool
) -> None:
    mark = b"\xef\xbb\xbf" if is_marked and step > 2 and piece_bytes > 2 else b""
    data = mark + "\n".join(lines).encode() + b"\n" * is_ended
    expected: dict[int, list[tuple[int, bytes]]] = {}
    at = len(mark)
    for line in data[len(mark) :].split(b"\n"):
        if line.strip(b" \r"):
            expected.setdefault(max(0, at - 1) // piece_bytes if at > len(mark) else 0, []).append((at, line))
        at += len(line) + 1
    with mock.patch.multiple(pieces, PIECE_BYTES=piece_bytes, TAIL_BYTES=3):
        for number, info in enumerate(in_pieces(ObjectTable.of([ObjectInfo("s3://b/x.jsonl", len(data))]))):
            assert lines_of_piece(data, info, step) == expected.get(number, [])


@given(st.lists(OBJECTS, min_size=1, max_size=12), st.sampled_from([None, 1]), st.booleans())
def test_members_are_those_that_json_has(objects: list[dict[str, Any]], indent: int | None, is_ascii: bool) -> None:
    texts = [
        json.dumps(each, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass") for each in objects
    ]
    records = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    names = ["a", "ä", 'quo"te', "back\\slash"]
    read = record_reader(index_of(b"{}").layout)
    found, there = split(read, records, offsets, names, lambda name, count: np.empty(count, np.uint8), str)
    for row, name in enumerate(names):
        values, ends = found[name]
        for number, each in enumerate(objects):
            assert bool(there[row, number]) == (name in each)
            if name in each:
                value = values[ends[number] : ends[number + 1]].tobytes().decode("utf-8", "surrogatepass")
                assert json.loads(value) == each[name]


def is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except ValueError:
        return False


@given(st.binary(max_size=60))
def test_what_is_no_object_is_refused_or_read_as_json_does(line: bytes) -> None:
    records, offsets = np.frombuffer(line, np.uint8), np.array([0, len(line)], np.int64)
    read = record_reader(index_of(b"{}").layout)
    try:
        split(read, records, offsets, ["a"], lambda name, count: np.empty(count, np.uint8), lambda number: "here")
    except DecodeError as error:
        assert "here" in str(error)  # noqa: PT017
        assert not is_object(line)


def test_columns_are_members_and_without_any_a_sample_is_the_object(cache: fastload.Cache, s3: Bucket) -> None:
    objects = [{"id": n, "text": f"näme {n}", "tags": ["x"] * (n % 3)} for n in range(500)]
    for part in range(5):
        lines = [json.dumps(each) for each in objects[part::5]]
        s3.put(f"lines/{part}.jsonl", "\n".join(lines).encode())
    url = f"s3://{s3.name}/lines/"
    seen = {}
    dataset = fastload.StreamingDataset(
        url, cache=cache, columns=["text", "id", "tags"], decode={"id": fastload.decode.integer()}, shuffle=True
    )
    for batch in fastload.DataLoader(dataset, batch_size=32, num_workers=2):
        for at, number in enumerate(batch["id"].tolist()):
            seen[number] = batch["text"][at], batch["tags"][at]
    assert seen == {each["id"]: (each["text"], each["tags"]) for each in objects}
    whole = list(fastload.StreamingDataset(url, cache=cache, shuffle=False))
    assert [each["json"] for each in whole[:100]] == objects[0::5]
    assert whole[3]["__key__"] == "0.jsonl/3"
    assert len(fastload.StreamingDataset(url, cache=cache)) == 500


def test_members_called_json_or_alike_but_for_their_case_or_twice(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"json": 1, "id": 2, "Text": 3, "text": 4, "text": 5}\n')

    def read(*columns: str) -> dict[str, Any]:
        (sample,) = fastload.StreamingDataset(path, cache=cache, columns=list(columns))
        return {name: sample[name] for name in columns}

    assert read("json") == {"json": {"json": 1, "id": 2, "Text": 3, "text": 5}}
    assert read("json", "id") == {"json": 1, "id": 2}
    assert (read("Text"), read("text")) == ({"Text": 3}, {"text": 5})
    with pytest.raises(ConfigError, match="'Text' and 'text' are the same"):
        read("Text", "text")


def test_shards_of_one_name_give_keys_that_are_told_apart_by_url(cache: fastload.Cache, tmp_path: Path) -> None:
    paths = [tmp_path / folder / "a.jsonl" for folder in ("x", "y")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"id": 1}\n')
    samples = list(fastload.StreamingDataset(list(map(str, paths)), cache=cache, shuffle=False))
    assert [sample["__key__"] for sample in samples] == ["a.jsonl/0", "a.jsonl/0"]
    assert [sample["__url__"] for sample in samples] == list(map(str, paths))


def test_members_that_some_lines_lack_are_optional_or_an_error(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 2, "A": 3}\n')
    dataset = fastload.StreamingDataset(str(path), cache=cache, columns=["a?"], shuffle=False)
    assert [each["a"] for each in dataset] == [1, None]
    dataset = fastload.StreamingDataset(str(path), cache=cache, columns=["a"], shuffle=False)
    with pytest.raises(
        MissingColumnError, match=r"a\.jsonl: sample 'a\.jsonl/1', column 'a': .* has \['b', 'A'\]. Did you mean 'A'\?"
    ):
        list(dataset)


def test_text_in_utf_16_is_refused_by_name(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n', "utf-16")
    with pytest.raises(ShardError, match=r"a\.jsonl is text in UTF-16, .*write it so: iconv -f UTF-16"):
        list(fastload.StreamingDataset(str(path), cache=cache))


@pytest.mark.parametrize(
    ("text", "cure"), [('{\n "a": 1\n}\n', "jq -c . a.json"), ('[\n {"a": 1}]', "jq -c '.[]' a.json")]
)
def test_json_of_several_lines_is_refused_with_the_cure(
    cache: fastload.Cache, tmp_path: Path, text: str, cure: str
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ShardError, match=rf"begins with the line '.': it is JSON of several .*: {re.escape(cure)}"):
        list(fastload.StreamingDataset(tmp_path / "a.json", cache=cache, format="jsonl"))


def test_a_line_that_is_no_json_is_named_or_skipped(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2\n{"a": 3}\n')
    with pytest.raises(DecodeError, match=r"a\.jsonl: sample 'a\.jsonl/1'.*is no JSON object"):
        list(fastload.StreamingDataset(str(path), cache=cache, columns=["a"], shuffle=False))
    dataset = fastload.StreamingDataset(str(path), cache=cache, columns=["a"], shuffle=False, on_error="skip")
    with pytest.warns(UserWarning, match="skipped a sample"):
        assert [each["a"] for each in dataset] == [1, 3]


def test_names_are_found_however_they_are_escaped(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    names = ["a", "ä", "image/url", "漢", "😀", 'q"\\\n\x01']
    odd = {"/": "\\/", '"': '\\"', "\\": "\\\\", "\n": "\\n"}
    lines = [json.dumps(dict.fromkeys(names, 1)), json.dumps(dict.fromkeys(names, 2), ensure_ascii=False)]
    for digits in ("04x", "04X"):
        units = [name.encode("utf-16-be") for name in names]
        texts = [
            "".join(f"\\u{int.from_bytes(unit[at : at + 2]):{digits}}" for at in range(0, len(unit), 2))
            for unit in units
        ]
        lines.append("{" + ", ".join(f'"{text}": 3' for text in texts) + "}")
    texts = ["".join(odd.get(each, "\\u0001" if each == "\x01" else each) for each in name) for name in names]
    lines.append("{" + ", ".join(f'"{text}": 4' for text in texts) + "}")
    others = ["\\u0061\\u0061", "\\ud83d", "\\ud83dx", "\\u00e", "\\x", "a\\u0000", "\\ud83d\\u0041"]
    lines.append("{" + ", ".join(f'"{text}": 5' for text in others) + "}")
    path.write_text("\n".join(lines))
    dataset = fastload.StreamingDataset(path, cache=cache, columns=[f"{name}?" for name in names], shuffle=False)
    found = [{sample[name] for name in names} for sample in dataset]
    assert found == [{1}, {2}, {3}, {3}, {4}, {None}]


def test_lines_of_zeros_are_damage_and_not_blank(cache: fastload.Cache, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n{"a": 2}\n \x0b\t\n\0')
    assert lines_of(path.read_bytes()) == [b'{"a": 1}', b"\0\0\0", b'{"a": 2}', b"\0"]
    with pytest.raises(DecodeError, match=r"a\.jsonl/1'.*\\x00\\x00\\x00' is no JSON object"):
        list(fastload.StreamingDataset(path, cache=cache, columns=["a"], shuffle=False))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x05\0\0\0\n", "has a zero at byte 1, and JSON lines are text in UTF-8: it is of another format"),
        (gzip.compress(b"{}", mtime=0), "is compressed with gzip, and its name does not say so"),
    ],
)
def test_what_is_no_text_is_refused_as_a_whole(data: bytes, says: str) -> None:
    with pytest.raises(ShardError, match=rf"s3://b/x\.jsonl {says}"):
        index_of(data)
