"""TFRecord files, as their own writer makes them, and damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload.decode import Decoder
from fastload.errors import ConfigError, DecodeError, MissingColumnError, ShardError
from fastload.formats import MixedLayoutsError, RecordIndex, format_of, indexer_for, joined, record_reader, stored_index
from fastload.formats.records import split
from fastload.kernels import examples
from tests.conftest import Bucket
from tests.formats.protobuf import EXAMPLES, crc32c, example, field, framed, tfrecord

# Written by tfrecord 1.14, whose messages Google's protobuf encodes: `expected`.
WRITTEN = Path(__file__).parent / "written" / "tfrecord"
COUNT = 30


def expected(i: int) -> dict[str, Any]:
    return {
        "image": bytes(range(i)),
        "label": i - 5,
        "score": np.float32(i / 7),
        "box": np.arange(4, dtype=np.float32) * i,
        "tokens": np.arange(i % 6, dtype=np.int64) * -(3**i),
        "words": [f"w{n}é".encode() for n in range(i % 4)],
    }


def check(sample: Mapping[str, Any], i: int) -> None:
    for name, value in expected(i).items():
        found = sample[name]
        if isinstance(value, np.ndarray):
            assert np.array_equal(found, value), (name, i)
            assert np.asarray(found).dtype == value.dtype, name
        else:
            assert (bytes(found) if name == "image" else found) == value, (name, i)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="64MiB", disk_bytes="64MiB", service="inprocess") as opened:
        yield opened


def test_samples_are_what_was_written(cache: fastload.Cache) -> None:
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, shuffle=False)
    samples = list(dataset)
    assert len(samples) == len(dataset) == COUNT
    for i, sample in enumerate(samples):
        check(sample, i)
    assert samples[0]["__key__"] == "train.tfrecord-00000-of-00002/0"
    assert samples[-1]["__key__"] == "train.tfrecord-00001-of-00002/14"


def test_batches_hold_tensors_where_samples_are_alike(cache: fastload.Cache, s3: Bucket) -> None:
    for path in WRITTEN.iterdir():
        s3.put(f"tf/{path.name}", path.read_bytes())
    dataset = fastload.StreamingDataset(f"s3://{s3.name}/tf/", cache=cache, shuffle=True, seed=3)
    seen = []
    for batch in fastload.DataLoader(dataset, batch_size=7, num_workers=2):
        assert (batch["label"].dtype, batch["label"].shape[1:]) == (torch.int64, ())
        assert (batch["box"].dtype, batch["box"].shape[1:]) == (torch.float32, (4,))
        assert isinstance(batch["tokens"], fastload.Ragged)
        assert isinstance(batch["image"], fastload.Ragged)
        assert isinstance(batch["words"], list)
        for at, label in enumerate(batch["label"].tolist()):
            check({name: values[at] for name, values in batch.items()}, label + 5)
            seen.append(label + 5)
    assert sorted(seen) == list(range(COUNT))
    assert seen != sorted(seen)


def test_columns_are_chosen_and_decoded_as_the_user_says(cache: fastload.Cache) -> None:
    decode = {"LABEL": fastload.decode.flat("int64"), "words": fastload.decode.raw(), "none?": fastload.decode.text()}
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, shuffle=False, decode=decode)
    sample = list(dataset)[6]
    assert sample["LABEL"].tolist() == [1]
    assert sample["words"] == struct.pack("<III", 2, 4, 4) + "w0éw1é".encode()
    assert sample["none"] is None
    dataset = fastload.StreamingDataset(f"{WRITTEN}/", cache=cache, columns=["labels"], shuffle=False)
    with pytest.raises(MissingColumnError, match=r"has no such column; it has \['box'.*Did you mean 'label'"):
        list(dataset)


def write(path: Path, *records: bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tfrecord(records))
    return str(path)


def test_features_that_some_records_lack_are_optional_or_an_error(cache: fastload.Cache, tmp_path: Path) -> None:
    url = write(tmp_path / "a.tfrecord", example(a=[1], t=[b"x"]), example(a=[2]), example(t=[b"z"], a=[]))

    def batch(columns: Sequence[str], decode: dict[str, Decoder] | None = None) -> Any:
        dataset = fastload.StreamingDataset(url, cache=cache, columns=columns, decode=decode, shuffle=False)
        (found,) = fastload.DataLoader(dataset, batch_size=3)
        return found

    with pytest.raises(MissingColumnError, match=r"'a\.tfrecord/1', column 't'.*write 't\?'"):
        batch(["t"])
    assert list(batch(["t?"])["t"]) == [b"x", b"", b"z"]
    assert batch(["t?"])["t"].present.tolist() == [True, False, True]
    assert [list(each) for each in batch(["a"])["a"]] == [[1], [2], []]
    url = write(tmp_path / "b.tfrecord", example(a=[1]), example(b=[2]))
    with pytest.raises(ConfigError, match=r"b\.tfrecord/1.*flat\('int64', \(\), default=-1\)"):
        batch(["a?"])
    decode: dict[str, Decoder] = {"a?": fastload.decode.flat("int64", (), default=-1)}
    assert batch(["a?"], decode)["a"].tolist() == [1, -1]


def test_records_that_are_no_examples_are_bytes(cache: fastload.Cache, tmp_path: Path) -> None:
    # A SequenceExample has its context where an Example has its features.
    sequence = field(1, example(a=[1])[2:]) + field(2, b"")
    for records in ([b"", b"plain text", bytes(40)], [sequence], [field(1, b"ab")]):
        url = write(tmp_path / "raw.tfrecord", *records)
        found = list(fastload.StreamingDataset(url, cache=cache, shuffle=False))
        assert [each["bytes"] for each in found] == records
    url = write(tmp_path / "none.tfrecord")
    with pytest.warns(UserWarning, match="all of its shards are empty"):
        assert list(fastload.StreamingDataset(url, cache=cache, shuffle=False)) == []


def test_shards_that_differ_are_read_as_one_or_refused_naming_both(cache: fastload.Cache, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write(folder / "a.tfrecord", example(n=[1, 2]), example(n=[3, 4]))
    write(folder / "b.tfrecords", example(n=[5], extra=[b"x"]))
    write(folder / "c.tfrecord", b"")
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, columns=["n?", "extra?"], shuffle=False)
    (batch,) = fastload.DataLoader(dataset, batch_size=4)
    assert [list(each) for each in batch["n"]] == [[1, 2], [3, 4], [5], []]
    write(folder / "d.tfrecord", example(n=[1.5]))
    dataset = fastload.StreamingDataset(f"{folder}/", cache=cache, columns=["n?"], shuffle=False)
    says = r"\w\.tfrecords? and .*d\.tfrecord have other columns: column 'n' is int64 in the one and float32 in"
    with pytest.raises(ShardError, match=says):
        list(fastload.DataLoader(dataset, batch_size=5))
    write(folder / "d.tfrecord", b"something else")
    with pytest.raises(ShardError, match=r"d\.tfrecord have other columns: column '\w+' is "):
        list(fastload.DataLoader(fastload.StreamingDataset(f"{folder}/", cache=cache, columns=["n?"]), batch_size=5))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a.tfrecord", True), ("A.TFRecords", True), ("a.tfrec", True), ("x.tfrecord-00000-of-00010", True),
        ("x.tfrecords-1-of-2", True), ("x.tfrecord-00000-of-", False), ("x.tfrecord-a-of-1", False),
        ("tfrecord-00000-of-00001", False), ("x.tfrecord-0-of-1.idx", False),
    ],
)  # fmt: skip
def test_names(name: str, is_one: bool) -> None:
    assert (format_of(f"s3://b/{name}") == "tfrecord") is is_one


def test_a_feature_whose_own_name_ends_in_a_mark(cache: fastload.Cache, tmp_path: Path) -> None:
    write(tmp_path / "a.tfrecord", example(**{"n?": [5]}))

    def read(*columns: str) -> list[int]:
        (sample,) = fastload.StreamingDataset(tmp_path / "a.tfrecord", cache=cache, columns=columns)
        return [int(sample[name]) for name in ("n?",)]

    with pytest.raises(ConfigError, match=r"a\.tfrecord: .*'n\?'.*write 'n\?\?'"):
        read("n?")
    assert read("n??") == [5]
    assert read("n?", "n??") == [5]


# By itself


def index_of(data: bytes, step: int = 1000, url: str = "s3://b/x.tfrecord") -> RecordIndex:
    indexer = indexer_for(url, len(data))
    for start in range(0, len(data), step):
        indexer.feed(np.frombuffer(data[start : start + step], np.uint8), start)
    assert indexer.done
    index = indexer.finish()
    assert isinstance(index, RecordIndex)
    return index


def records_of(data: bytes, index: RecordIndex) -> list[bytes]:
    return [data[o : o + s] for o, s in zip(index.offset.tolist(), index.size.tolist(), strict=True)]


def read(messages: Sequence[bytes], layout: bytes, columns: Sequence[str]) -> dict[str, list[Any]]:
    """What the reader makes of these messages; None where a column is lacking."""
    records = np.frombuffer(b"".join(messages), np.uint8)
    offsets = np.cumsum([0, *map(len, messages)], dtype=np.int64)
    reader = record_reader(layout)
    found, there = split(reader, records, offsets, columns, lambda name, n: np.empty(n, np.uint8), lambda n: f"at {n}")
    made = {}
    for row, name in enumerate(columns):
        values, ends = found[name]
        decoder = reader.decoder(name)
        made[name] = [
            decoder.decode_one(values[s:e].data, "here") if is_there else None
            for (s, e), is_there in zip(pairwise(ends.tolist()), there[row], strict=True)
        ]
    return made


def as_lists(value: Any) -> Any:
    if isinstance(value, bytes):
        return [value]
    return value if value is None or isinstance(value, list) else np.atleast_1d(value).tolist()


def test_the_check_is_crc_32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # of the catalogue of CRCs


@given(st.lists(EXAMPLES, min_size=1, max_size=12), st.integers(1, 70), st.randoms(use_true_random=False))
def test_what_was_written_is_found_whatever_the_pieces_and_the_writer(
    rows: list[dict[str, Any]], step: int, rng: Any
) -> None:
    messages = [example(rng, **row) for row in rows]
    data = tfrecord(messages)
    index = index_of(data, step)
    assert records_of(data, index) == messages
    assert stored_index(index.to_bytes(), "s3://b/x.tfrecord", len(data)) == index
    if not next((row for row, message in zip(rows, messages, strict=True) if message), None):
        return  # the first that is not empty has no feature, so that all are taken for bytes
    reader = record_reader(index.layout)
    assert list(reader.columns) == sorted({name for row in rows for name in row})
    found = read(messages, index.layout, reader.columns)
    for name in reader.columns:
        assert [as_lists(each) for each in found[name]] == [row.get(name) for row in rows]


@given(st.lists(st.binary(max_size=40), max_size=12), st.integers(1, 70))
def test_records_are_found_whatever_is_in_them(records: list[bytes], step: int) -> None:
    data = tfrecord(records)
    assert records_of(data, index_of(data, step)) == records


def test_many_records_and_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastload.formats.tfrecord._AT_ONCE", 10)
    records = [bytes([n % 251]) * (n % 7 if n != 33 else 5000) for n in range(95)]
    data = tfrecord(records)
    for step in (100, 999, 1 << 20):
        assert records_of(data, index_of(data, step)) == records


GOOD = tfrecord([example(a=[1, 2], b=[b"x"]), example(a=[3], b=[b"y"])])
_FIRST = len(framed(example(a=[1, 2], b=[b"x"])))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (GOOD[:-1], r"record 1, at byte \d+, has \d+ bytes, and the file ends at \d+: it was cut short"),
        (GOOD + b"x", r"its last 1 bytes, from \d+ on, are no record: it was cut short"),
        (GOOD + GOOD[:11], "its last 11 bytes"),
        (GOOD[:_FIRST] + b"\xff" + GOOD[_FIRST + 1 :], "record 1, at byte .* has a length .* that its check says is"),
        (GOOD[:20] + b"\xff" + GOOD[21:], "record 0, at byte 0, has data that its check says is wrong"),
        (GOOD[: _FIRST - 1] + b"\0" + GOOD[_FIRST:], "record 0, at byte 0, has data that its check says is wrong"),
        (framed(b"", length=1 << 40), "record 0, at byte 0, has 1099511627776 bytes, above"),
        (framed(b"", length=1 << 63), "bytes, above"),
        (framed(b"", length=5), "record 0, at byte 0, has 5 bytes, and the file ends at 16: it was cut short"),
        (b"\x1f\x8b\x08" + bytes(60), "is compressed with gzip, and its name does not say so"),
        (b"\x78\x9c" + bytes(60), "is compressed with zlib"),
        (b"\x89PNG" + bytes(60), "the file is damaged, or no TFRecord; write it again, or name another format"),
        (tfrecord([example(a=[1]), b"plain text"]), "record 1, at byte .* is no Example, as those before are"),
        (tfrecord([example(a=[1]), example(a=[b"x"])]), "has values of another kind in 'a', which is int64 in those"),
        (tfrecord([example(**{f"f{n}": [1] for n in range(5000)})]), "has yet other features: more than 4096"),
        (tfrecord([example(**{"n" * 300_000: [1]})]), "of names longer than 262144 bytes together"),
        (tfrecord([field(1, field(1, field(1, b"\xff") + field(2, field(3, field(1, b"\1")))))]), "which is no UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_an_error_that_names_it(data: bytes, says: str) -> None:
    for step in (1 << 20, 7):
        with pytest.raises(ShardError, match=says) as raised:
            index_of(data, step)
        assert "s3://b/x.tfrecord" in str(raised.value)


def test_files_whose_reading_ends_with_them() -> None:
    """A byte that is not there is none that a check could be of."""
    for end in range(1, len(GOOD)):
        if end != _FIRST:
            with pytest.raises(ShardError, match=r"x\.tfrecord.*cut short"):
                index_of(GOOD[:end], 9)


@pytest.mark.parametrize(
    "message",
    [
        b"\x0a", b"\x0a\x05a", field(1, b"\x0a\x7f"), field(1, field(1, b"\x0a\x7fa")), b"\x08\x01",
        field(1, field(1, field(1, b"a") + field(2, b"\x18\x01"))),  # an int64_list that is a number
        field(1, field(1, field(1, b"a") + field(2, field(3, field(1, b"\xff"))))),  # a packed number without end
        field(1, field(1, field(1, b"a") + field(2, field(3, field(1, b"\xff" * 10 + b"\1"))))),
        field(1, field(1, field(1, b"a") + field(2, field(2, field(1, b"abc"))))),  # floats of three bytes
        field(1, field(1, field(1, b"a") + field(2, field(1, b"\x08\x01")))),  # bytes that are a number
        field(1, field(1, field(1, b"a") + field(2, field(1, b"") + field(3, b"")))),  # two kinds
        b"\xff" * 12, b"\x0b\x0c", b"\x00\x00",  # a tag without end, a group, field 0
    ],
)  # fmt: skip
def test_messages_that_are_damaged_are_refused(message: bytes) -> None:
    layout = index_of(GOOD).layout
    with pytest.raises(DecodeError, match=r"at 1: its \d+ bytes are no Example with these features"):
        read([example(a=[1], b=[b"x"]), message], layout, ["a", "b"])
    with pytest.raises(ShardError, match=r"record 1, at byte .* is no Example, as those before are"):
        index_of(tfrecord([example(b=[b"x"]), message]))


def test_values_that_are_not_as_the_index_says_are_refused() -> None:
    layout = index_of(tfrecord([example(a=[1], b=[b"x"])])).layout
    for other in (example(a=[1.5]), example(b=[1]), example(b=[b"x", b"y"]), example(b=[])):
        with pytest.raises(DecodeError, match=r"no Example with these features, of these kinds: .*'a': 'int64'"):
            read([other], layout, ["a", "b"])
    with pytest.raises(DecodeError, match="16 bytes, and int64"):
        read([example(a=[1, 2])], layout, ["a"])


def test_lists_are_copied_only_where_they_fit() -> None:
    message = np.frombuffer(field(3, field(1, b"\1\2\3")), np.uint8)
    place, size = np.zeros(1, np.int64), np.array([len(message)])
    for start, end, room, kind, fits in (
        (0, 24, 24, 3, True), (0, 16, 24, 3, False), (0, 32, 32, 3, False), (0, 24, 23, 3, False),
        (0, 24, 24, 2, False), (-1, 23, 24, 3, False),
    ):  # fmt: skip
        out = np.zeros(room, np.uint8)
        odd = examples.copy_lists(message, place, size, kind, np.array([start, end]), out)
        assert (odd == -1) is fits
    assert examples.copy_lists(message, place, size + 1, 3, np.array([0, 24]), np.zeros(24, np.uint8)) == 0


def test_layouts_are_joined_where_kinds_are_the_same() -> None:
    a, b, c, raw, none = (
        index_of(tfrecord(records)).layout
        for records in (
            [example(x=[1], y=[b""])], [example(x=[1, 2])], [example(x=[1.0])], [b"text"], [b""],
        )
    )  # fmt: skip
    assert record_reader(joined((a, b))) == record_reader(joined((b, a, b)))
    assert record_reader(joined((a, b))).decoder("x").fixed() is None
    assert record_reader(a).decoder("x").fixed() == ((), np.dtype(np.int64))
    assert joined((none, a)) == a == joined((a, none))
    assert joined((none, raw)) == raw
    for pair in ((a, c), (a, raw), (raw, b)):
        with pytest.raises(MixedLayoutsError):
            joined(pair)
