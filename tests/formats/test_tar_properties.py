"""The tar index against Python's tarfile and webdataset's grouping, over archives that hypothesis makes up, and over
damaged ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastload.errors import ShardError
from fastload.formats import ShardIndex
from tests.formats.archives import URL, Member, as_samples, from_tarfile, from_webdataset, header, index, pax, write

LETTERS = st.text(st.sampled_from("abAB01._-äßÖ漢 "), max_size=12)
# Names around the lengths where a format changes its mind: 100 for the name, 155 for the prefix, 256 in all.
LONG = st.builds(
    lambda letter, length: letter * length, st.sampled_from("nö"), st.sampled_from([40, 97, 101, 160, 700])
)
PARTS = st.one_of(LETTERS, st.sampled_from(["a", "b", "c"]), LONG, st.sampled_from(["__m__", "__a", ".", "..", "x__"]))
NAMES = st.builds(
    lambda folders, stem, ending: "/".join([*folders, stem]) + ending,
    st.lists(PARTS, max_size=3),
    PARTS,
    st.sampled_from(["", ".x", ".X", ".y", ".tar.gz", ".é", ".É", "."]),
).filter(lambda name: name.strip("/"))
SIZES = st.one_of(st.sampled_from([0, 1, 511, 512, 513, 4096, 9000]), st.integers(0, 3000))
KINDS = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
MEMBERS = st.builds(lambda name, size, kind: Member(name, os.urandom(size), kind, "target" * 30), NAMES, SIZES, KINDS)
FORMS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
CHUNKS = st.sampled_from([4096, 8192, 12288, 65536, 1 << 23])


def archive(members: list[Member], form: int) -> bytes:
    """With pax where ustar has no room for a name."""
    try:
        return write(members, form)
    except ValueError:
        return write(members, tarfile.PAX_FORMAT)


def webdataset_or_error(data: bytes) -> list[dict[str, object]] | None:
    try:
        return from_webdataset(data)
    except ValueError:
        return None


def index_or_error(data: bytes, chunk_bytes: int, skip: bool = True) -> ShardIndex | None:
    try:
        return index(data, chunk_bytes, skip)
    except ShardError as error:
        message = str(error)
    assert "twice" in message
    return None


@settings(max_examples=80, deadline=None)
@given(st.lists(MEMBERS, max_size=12), FORMS, CHUNKS, st.booleans(), st.integers(0, 500))
def test_samples_are_those_of_webdataset(
    members: list[Member], form: int, chunk_bytes: int, skip: bool, zeros: int
) -> None:
    data = archive(members, form) + bytes(zeros)
    found, expected = index_or_error(data, chunk_bytes, skip), webdataset_or_error(data)
    assert (found is None) == (expected is None)
    if found is not None:
        assert as_samples(found, data) == expected
        assert ShardIndex.from_bytes(found.to_bytes(), "u", len(data)) == found


@settings(max_examples=50, deadline=None)
@given(st.lists(MEMBERS, max_size=5), FORMS, CHUNKS, st.booleans(), st.binary(min_size=1, max_size=500).filter(any))
def test_data_after_the_end_is_no_end(
    members: list[Member], form: int, chunk_bytes: int, skip: bool, more: bytes
) -> None:
    data = archive(members, form)
    with pytest.raises(ShardError, match="data after the archive's end mark"):
        index(data + more, chunk_bytes, skip)


@settings(max_examples=100, deadline=None)
@given(st.lists(MEMBERS, min_size=1, max_size=12), FORMS, CHUNKS)
def test_members_are_those_of_tarfile(members: list[Member], form: int, chunk_bytes: int) -> None:
    numbered = [Member(f"k{n}/{m.name[:600]}.c{n}", m.data, m.kind, m.target) for n, m in enumerate(members)]
    data = archive(numbered, form)
    found = index(data, chunk_bytes)
    expected = [(offset, size) for name, offset, size in from_tarfile(data) if not hidden(name)]
    assert list(zip(found.member_offset.tolist(), found.member_size.tolist(), strict=True)) == expected


def hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.sampled_from([101, 3000, 4096, 9000, 65000]), FORMS)
def test_names_that_cross_chunks(before: int, length: int, form: int) -> None:
    members = [Member(f"{n}.x") for n in range(before)]
    data = archive([*members, Member("d" * (length - 4) + "/n.x", b"v"), Member("z.x", b"w")], form)
    assert as_samples(index(data, 4096), data) == from_webdataset(data)


@settings(max_examples=80, deadline=None)
@given(st.lists(MEMBERS, min_size=1, max_size=5), FORMS, st.data())
def test_a_cut_archive_gives_an_error_or_all_that_is_whole(
    members: list[Member], form: int, draw: st.DataObject
) -> None:
    data = archive(members, form)
    cut = data[: draw.draw(st.integers(1, len(data)))]
    whole = index_or_error(data, 4096)
    try:
        found = index(cut)
    except ShardError:
        return
    # What is left ends with a member: tarfile then says the same of both.
    assert len(cut) % 512 == 0 or not any(cut[len(cut) // 512 * 512 :])
    expected = from_tarfile(cut)
    known = from_tarfile(data)[: len(expected)]
    assert expected == known
    if whole is not None:
        assert found.member_offset.tolist() == whole.member_offset.tolist()[: found.member_count]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(MEMBERS, max_size=4),
    FORMS,
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
)
@example([Member("a.x", b"1")], tarfile.GNU_FORMAT, [(124, 0x80)])
def test_a_damaged_archive_gives_an_error_or_an_index_within_it(
    members: list[Member], form: int, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(archive(members, form))
    for at, byte in changes:
        data[at % len(data)] = byte
    check_within(bytes(data))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=512, max_size=512),
            st.builds(
                header,
                st.binary(max_size=100),
                st.one_of(st.integers(0, 3000), st.binary(min_size=12, max_size=12)),
                st.sampled_from([bytes([c]) for c in b"0\x001256LKxXgSV7"]),
                prefix=st.binary(max_size=155),
            ),
            st.builds(
                lambda path, size: pax({"path": path, "size": size}),
                st.binary(max_size=700),
                st.binary(max_size=25),
            ),
        ),
        max_size=8,
    ),
    st.binary(max_size=1100),
)
def test_any_blocks_give_an_error_or_an_index_within_them(blocks: list[bytes], rest: bytes) -> None:
    check_within(b"".join(blocks) + rest + b"\0")


def check_within(data: bytes) -> None:
    """Whatever the bytes: no crash, and nothing outside of them is named."""
    try:
        found = index(data)
    except ShardError as error:
        message = str(error)
    else:
        message = URL
        assert ShardIndex.from_bytes(found.to_bytes(), "u", len(data)) == found
    assert message.startswith(URL)


def test_no_index_leaves_its_array(tmp_path: Path) -> None:
    """The same damaged archives with numba's own bounds checks compiled in."""
    code = (
        "from tests.formats import test_tar_properties as t\n"
        "t.test_any_blocks_give_an_error_or_an_index_within_them()\n"
        "t.test_a_damaged_archive_gives_an_error_or_an_index_within_it()\n"
        "t.test_names_that_cross_chunks()\n"
    )
    environ = {**os.environ, "NUMBA_BOUNDSCHECK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
