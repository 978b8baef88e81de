"""The tar index: one case at a time. Properties over many archives are in test_tar_properties.py."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from fastload.errors import ConfigError, ShardError
from fastload.formats import SHARD_ENDINGS, indexer_for
from fastload.formats.tar import NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, TarIndexer
from tests.formats.archives import (
    BLOCK,
    URL,
    Member,
    as_samples,
    from_tarfile,
    from_webdataset,
    header,
    index,
    members_of,
    padded,
    pax,
    write,
)

END = b"\0" * 1024


def names(found: object) -> list[tuple[str, list[str]]]:
    """Keys and columns."""
    samples = as_samples(found, b"")  # type: ignore[arg-type]
    return [(str(s["__key__"]), [name for name in s if name != "__key__"]) for s in samples]


def test_samples_columns_and_bytes() -> None:
    data = write([Member("a.jpg", b"J" * 700), Member("a.cls", b"1"), Member("b.cls", b"2"), Member("b.jpg", b"")])
    found = index(data)
    assert found.columns == ("jpg", "cls")
    assert as_samples(found, data) == [
        {"__key__": "a", "jpg": b"J" * 700, "cls": b"1"},
        {"__key__": "b", "cls": b"2", "jpg": b""},
    ]
    assert members_of(found, "jpg").tolist() == [0, 3]
    assert found.object_size == len(data)


def test_a_column_that_a_sample_lacks_is_minus_one() -> None:
    found = index(write([Member("a.x"), Member("b.y"), Member("c.x"), Member("c.y")]))
    assert members_of(found, "y").tolist() == [-1, 1, 3]
    assert members_of(found, "z").tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("name", "key", "column"),
    [
        ("a.b.c", "a", "b.c"),
        ("dir.with.dots/a.JPG", "dir.with.dots/a", "jpg"),
        ("./a.Seg.PNG", "./a", "seg.png"),
        ("x//y.z", "x//y", "z"),
        ("a.", "a", ""),
        ("ä/ö.ÜÄ", "ä/ö", "üä"),
        ("_a_/b.c", "_a_/b", "c"),
        ("__a/b.c", "__a/b", "c"),
        ("___/b.c", "___/b", "c"),
        ("d/__a__/b.c", "d/__a__/b", "c"),
    ],
)
def test_names_become_key_and_column(name: str, key: str, column: str) -> None:
    data = write([Member(name, b"v")])
    assert as_samples(index(data), data) == [{"__key__": key, column: b"v"}] == from_webdataset(data)


@pytest.mark.parametrize("name", ["noext", "dir.d/noext", ".hidden", "d/.hidden.txt", "__meta__/a.b", "____/a.b"])
def test_names_that_are_in_no_sample(name: str) -> None:
    data = write([Member("a.x", b"1"), Member(name, b"v"), Member("a.y", b"2")])
    assert as_samples(index(data), data) == [{"__key__": "a", "x": b"1", "y": b"2"}] == from_webdataset(data)


def test_members_that_are_no_files_are_passed_over() -> None:
    kinds = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)
    members = [Member(f"d{i}.x", kind=kind, target="t" * 150) for i, kind in enumerate(kinds)]
    data = write([*members, Member("a.x", b"1")])
    assert names(index(data)) == [("a", ["x"])]


def test_a_link_with_a_size_has_no_data() -> None:
    data = header(b"l.x", 5000, b"1") + header(b"a.x", 1) + padded(b"v") + END
    assert names(index(data)) == [("a", ["x"])]
    assert from_tarfile(data) == [("a.x", 1024, 1)]


def test_unknown_types_are_passed_over_with_their_data() -> None:
    data = header(b"l.x", 600, b"V") + padded(b"v" * 600) + header(b"a.x", 1) + padded(b"v") + END
    assert names(index(data)) == [("a", ["x"])]
    assert from_tarfile(data) == [("a.x", 2048, 1)]


def test_old_archives_mark_directories_with_a_slash() -> None:
    data = header(b"d.x/", 0, b"\0", magic=b"\0" * 8) + header(b"a.x", 1, b"\0", magic=b"\0" * 8) + padded(b"v") + END
    assert names(index(data)) == [("a", ["x"])]


def test_contiguous_files_are_files() -> None:
    assert names(index(header(b"a.x", 0, b"7") + END)) == [("a", ["x"])]


def test_prefix_of_ustar_and_times_of_gnu() -> None:
    data = header(b"a.x", prefix=b"some/dir") + header(b"b.x", magic=b"ustar  \0", prefix=b"01234567012") + END
    assert names(index(data)) == [("some/dir/a", ["x"]), ("b", ["x"])]


@pytest.mark.parametrize(
    "field", [b"\x80" + b"\0" * 9 + b"\x02\x58", b"00000001130\0", b"       1130 ", b"000000001130"]
)
def test_sizes_in_octal_and_base_256(field: bytes) -> None:
    data = header(b"a.x", field) + padded(b"v" * 600) + END
    assert index(data).member_size.tolist() == [600]


def test_signed_checksums_of_old_systems() -> None:
    data = header("é.x".encode(), 0, signed=True) + END
    assert names(index(data)) == [("é", ["x"])]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_longest_name(form: int) -> None:
    name = "n" * (NAME_BYTES_MAX - 100) + ".x"
    data = write([Member(name, b"1"), Member("b.x", b"2")], form)
    assert [key for key, _ in names(index(data))] == [name[:-2], "b"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_that_is_too_long(form: int) -> None:
    with pytest.raises(ShardError, match=r"train-000000.tar, offset 0: a name is longer than 65536 bytes"):
        index(write([Member("n" * NAME_BYTES_MAX + ".x", b"1")], form))


def test_a_pax_header_that_is_too_long() -> None:
    with pytest.raises(ShardError, match="pax header than 1048576"):
        index(pax({"comment": "c" * PAYLOAD_BYTES_MAX}) + header(b"a.x") + END)


def test_pax_path_and_size_for_one_member_and_path_for_all() -> None:
    data = pax({"path": "g.x"}, b"g") + pax({"path": "p.x/", "size": "3"}) + header(b"h.x", 9) + padded(b"123")
    data += header(b"h.x", 1) + padded(b"v") + END
    found = index(data)
    assert [(key, size) for (key, _), size in zip(names(found), found.member_size, strict=True)] == [("p", 3), ("g", 1)]
    assert from_tarfile(data)[0] == ("p.x", 5 * 512, 3)


def test_the_first_of_several_names_counts() -> None:
    long_name = header(b"././@LongLink", 4, b"L") + padded(b"l.x\0")
    data = long_name + pax({"path": "p.x"}) + header(b"h.x") + pax({"path": "q.x"}) + long_name + header(b"h.x") + END
    assert [key for key, _ in names(index(data))] == ["l", "q"]
    assert [name for name, _, _ in from_tarfile(data)] == ["l.x", "q.x"]


def test_names_that_are_not_utf8_can_be_printed() -> None:
    found = index(header(b"\xff\xfe.\xe9") + END)
    assert found.key(0) == "\\xff\\xfe"
    assert found.columns == ("\\xe9",)


def test_an_archive_without_members() -> None:
    found = index(END)
    assert (found.sample_count, found.member_count, found.columns) == (0, 0, ())


def test_a_missing_end_mark_is_accepted_where_nothing_is_cut_off() -> None:
    data = header(b"a.x", 600) + padded(b"v" * 600)
    assert names(index(data)) == [("a", ["x"])]
    assert len(from_tarfile(data)) == 1


@pytest.mark.parametrize("piece_bytes", [512, 4096, 1 << 20])
def test_what_follows_the_end_is_not_lost_without_a_word(piece_bytes: int) -> None:
    one = write([Member("a.x", b"1")])
    assert len(one) == 10_240
    with pytest.raises(ShardError, match="offset 10240: data after the archive's end mark"):
        index(one + one, piece_bytes)
    with pytest.raises(
        ShardError, match=r"offset 1024: an end mark with 70656 bytes after it.*archives that were joined"
    ):
        index(one * 7, piece_bytes)
    with pytest.raises(ShardError, match="offset 2048: data after the archive's end mark"):
        index(header(b"a.x", 1) + padded(b"1") + END + header(b"b.x", 1) + padded(b"2") + END, piece_bytes)
    with pytest.raises(ShardError, match="offset 10247: data after"):
        index(one + b"\0" * 7 + b"garbage", piece_bytes)
    with pytest.raises(ShardError, match="offset 1024: data after"):
        index(header(b"a.x") + b"\0" * 512 + header(b"b.x"), piece_bytes)


def test_an_archive_that_ends_in_many_zeros_was_cut_off() -> None:
    data = write([Member(f"{number:03}.x", b"1" * 1000) for number in range(100)])
    assert names(index(data))[-1] == ("099", ["x"])
    whole = 1536 * 50
    with pytest.raises(ShardError, match=f"offset {whole}: an end mark with {len(data) - whole} bytes after it"):
        index(data[:whole] + bytes(len(data) - whole))
    with pytest.raises(ShardError, match=f"offset 0: an end mark with {len(data)} bytes after it"):
        index(bytes(len(data)))


@pytest.mark.parametrize("record_bytes", [512, 10_240, 1 << 14, 40_960, 1 << 16, 1 << 20])
def test_archives_are_padded_to_whole_records(record_bytes: int) -> None:
    data = header(b"a.x", 600) + padded(b"v" * 600) + END
    data += bytes(-len(data) % record_bytes)
    assert names(index(data)) == [("a", ["x"])]
    assert len(from_tarfile(data)) == 1
    assert index(END + bytes(10_240 - len(END))).sample_count == 0


def test_only_chunks_with_headers_are_needed() -> None:
    data = write([Member("a.x", b"1" * 50_000), Member("b.x", b"2")])
    indexer = indexer_for(URL, len(data))
    indexer.feed(np.frombuffer(data, np.uint8)[:4096], 0)
    assert indexer.next_offset == 512 + 50_176
    assert not indexer.done
    start = indexer.next_offset // 4096 * 4096
    indexer.feed(np.frombuffer(data, np.uint8)[start : start + 8192], start)
    assert not indexer.done  # what follows the end mark is looked at
    start = indexer.next_offset
    indexer.feed(np.frombuffer(data, np.uint8)[start:], start)
    assert indexer.done
    assert indexer.next_offset == len(data)
    assert indexer.finish().sample_count == 2


def test_pieces_are_checked() -> None:
    indexer = TarIndexer(URL, 4096)
    block = np.zeros(1024, np.uint8)
    for start, length in ((512, 512), (0, 100), (100, 512), (3584, 1024), (-512, 512)):
        with pytest.raises(ValueError, match=r"needed next|not a piece"):
            indexer.feed(block[:length], start)
    with pytest.raises(ValueError, match="byte 0 of 4096"):
        indexer.finish()


FAULTS = {
    "bad checksum": (header(b"a.x", 1).replace(b"a.x", b"b.x") + padded(b"v") + END, "offset 0: .*checksum"),
    "bad checksum later": (header(b"a.x") + b"x" * 512 + END, "offset 512: .*checksum"),
    "size is text": (header(b"a.x", b"12z4567\0") + END, "offset 0: .*size field is not a number"),
    "size is negative": (header(b"a.x", b"\xff" * 12) + END, "offset 0: .*size field is not a number"),
    "size is huge": (header(b"a.x", b"\x80" + b"\xff" * 11) + END, "'a.x' of 18014398509481984 bytes passes the end"),
    "length lies": (
        header(b"a.x") + header(b"b.x", 4000) + padded(b"v") + END,
        "offset 512: member 'b.x' of 4000 bytes",
    ),
    "pax length lies": (
        pax({"size": "99999999999999999999"}) + header(b"a.x") + END,
        "'a.x' of .* bytes passes the end",
    ),
    "long name's length lies": (
        header(b"l", 5000, b"L") + padded(b"n") + END,
        "a long name or pax header of 5000 bytes",
    ),
    "pax size is text": (pax({"size": "12a"}) + header(b"a.x") + END, "offset 0: a pax header's records"),
    "pax size is empty": (pax({"size": ""}) + header(b"a.x") + END, "offset 0: a pax header's records"),
    "pax record's length": (header(b"p", 9, b"x") + padded(b"99 path=a") + END, "offset 0: a pax header's records"),
    "pax record's huge length": (
        header(b"p", 30, b"x") + padded(b"9" * 25 + b" p=a\n") + END,
        "a pax header's records",
    ),
    "pax record without =": (header(b"p", 9, b"x") + padded(b"9 patha.\n") + END, "offset 0: a pax header's records"),
    "pax record without end": (header(b"p", 9, b"x") + padded(b"9 path=ab") + END, "offset 0: a pax header's records"),
    "one long name for all": (
        pax({"path": "n" * 60_000 + ".x"}, b"g") + header(b"a.x") * 5000 + END,
        "global pax header names all members",
    ),
    "pax size for all": (pax({"size": "3"}, b"g") + header(b"a.x") + END, "global pax header sets one size"),
    "sparse, GNU": (header(b"a.x", 0, b"S") + END, "sparse .*'a.x'"),
    "sparse, pax": (pax({"GNU.sparse.major": "1"}) + header(b"a.x") + END, "offset 1024: sparse"),
    "long name then end": (header(b"l", 3, b"L") + padded(b"n.x") + END, "truncated"),
    "long name then nothing": (header(b"l", 3, b"L") + padded(b"n.x"), "truncated"),
    "half a header": (
        header(b"a.x") + header(b"b.x")[:300],
        "offset 512: the archive ends in the middle of a header: .*write it again$",
    ),
    "data cut off": (header(b"a.x", 600) + b"v" * 600, "'a.x' of 600 bytes passes the end of the object .1112 bytes"),
    "doubled column": (
        header(b"a.x") + header(b"a.y") + header(b"a.X") + END,
        "offset 1536: sample 'a' has column 'x' twice .member 'a.X'.",
    ),
    "doubled column, Unicode": (
        header("a.Ä".encode()) + header("a.ä".encode()) + END,
        "offset 1024: sample 'a' has column 'ä' twice",
    ),
    "reserved column": (header(b"a.__key__") + END, "'__key__', which is reserved"),
    "gzip": (b"\x1f\x8b" + b"x" * 600, "it is compressed, and its name does not say so; .* unpack it with gunzip"),
    "not tar": (b"PK" + b"x" * 600, "offset 0: this is no tar header"),
    "shorter than a header": (b"x" * 100, "offset 0: the archive ends in the middle of a header"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_url_and_offset(name: str) -> None:
    data, message = FAULTS[name]
    with pytest.raises(ShardError, match=message) as caught:
        index(data)
    assert str(caught.value).startswith(URL)


def test_an_empty_object() -> None:
    with pytest.raises(ShardError, match="is empty"):
        indexer_for(URL, 0)


def test_webdataset_refuses_doubled_columns_too() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        from_webdataset(write([Member("a.x"), Member("a.X")]))
    data = write([Member("a.x"), Member("b.x"), Member("a.x")])
    assert names(index(data)) == [("a", ["x"]), ("b", ["x"]), ("a", ["x"])]


@pytest.mark.parametrize("cut", [1, 511, 512, 513, 700, 1023, 1024, 1025, 2047, 2048, 2100, 2560])
def test_truncation(cut: int) -> None:
    data = write([Member("a.x", b"1" * 600), Member("b.x", b"2")])[: 2560 + 512]
    assert [name for name, _, _ in from_tarfile(data)] == ["a.x", "b.x"]
    whole_members = {1536: 1, 2560: 2}
    if cut in whole_members:
        assert index(data[:cut]).sample_count == whole_members[cut]
    else:
        with pytest.raises(ShardError, match=URL):
            index(data[:cut])


@pytest.mark.parametrize(
    ("url", "tool"),
    [
        ("s3://b/a.tar.lz4", "unlz4 a.tar.lz4"),
        ("https://h/a.TLZ4?version=1", "unlz4 a.TLZ4"),
        ("/data/#1.tar.Z", "uncompress #1.tar.Z"),
    ],
)
def test_what_is_packed_in_other_ways_says_what_to_do(url: str, tool: str) -> None:
    with pytest.raises(ConfigError) as caught:
        indexer_for(url, 1000)
    assert str(caught.value) == f"{url}: shards that are packed in this way are not read; unpack it with: {tool}"


def test_endings() -> None:
    records = ".tfrecord", ".tfrecords", ".tfrec", ".tfrecord-#-of-#", ".tfrecords-#-of-#"
    chunks = "chunk-#-#.bin", "chunk-#-#.zstd.bin", "chunk-#-#.zstd:#.bin"
    texts = (f"shard.#.{each}" for each in ("json", "csv", "tsv", "xsv"))
    plain = ".tar", ".mds", *texts, ".jsonl", ".ndjson", *records, *chunks
    assert SHARD_ENDINGS[: len(plain)] == plain
    packed = set(SHARD_ENDINGS[len(plain) :])
    named = {
        ".tar.gz",
        ".tgz",
        ".tar.zst",
        ".jsonl.gz",
        ".json.gz",
        ".json.zst",
        ".tfrecord.gz",
        ".mds.zstd",
        ".mds.br",
    }
    assert named <= packed
    assert not {".json", ".gz"} & packed
    assert len(packed) == len(SHARD_ENDINGS) - len(plain)


def test_many_members_in_many_calls_of_the_kernel() -> None:
    out = io.BytesIO()
    for number in range(9000):
        out.write(header(b"%06d.%d" % (number // 3, number % 3)))
    data = out.getvalue() + END
    found = index(data, 1 << 20)
    assert (found.sample_count, found.member_count, found.columns) == (3000, 9000, ("0", "1", "2"))
    assert found.key(2999) == "002999"
    assert found.member_offset.tolist() == list(range(BLOCK, 9000 * BLOCK + 1, BLOCK))


def test_many_columns() -> None:
    data = b"".join(header(b"a.%d" % number) for number in range(5000)) + END
    found = index(data, 1 << 20)
    assert found.sample_count == 1
    assert found.columns == tuple(map(str, range(5000)))
    assert found.member_column.tolist() == list(range(5000))
