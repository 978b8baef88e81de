"""The files of runs: everything comes back, and nothing that is damaged does harm."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.errors import CacheError, ConfigError
from fastload.history import runfile
from fastload.history.archive import Archive, read_all
from fastload.history.record import Numbering, Recorder, may_keep
from fastload.history.runfile import EndpointSummary, Reads, RunSummary
from fastload.store.table import ObjectRows
from fastload.store.types import ObjectInfo
from tests.history.runs import CHUNK_BYTES, info, key, record, run

NAME = "20261126-120000-00000000"
LEARNT = EndpointSummary(24, 4e8, 0.02, 8e7, 0, 100)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300)), max_size=200), st.sets(st.integers(0, 200)))
def test_what_is_recorded_comes_back(reads: list[tuple[int, int]], cuts: set[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive, recorder, traces = Archive(Path(folder)), Recorder("train.py", 1.8e9, CHUNK_BYTES), {}
        expected = []
        end = 0
        for at, (trace, number) in enumerate(reads):
            if trace not in traces:
                traces[trace] = recorder.begin_trace("reader")
            if recorder.read(traces[trace], key(number), info(number, 3), number % 3, at * 0.1):
                expected.append((traces[trace], info(number, 3), number % 3))
            if at in cuts:
                end = archive.append(NAME, recorder.take(at * 0.1, {}).pieces(), end) or 0
        assert archive.append(NAME, recorder.take(99.0, {"https://store": LEARNT}).pieces(), end)
        found = archive.read(archive.find(NAME))
        assert [
            (int(trace), found.objects[int(number)], int(chunk))
            for trace, number, chunk in zip(found.reads.traces, found.reads.objects, found.reads.chunks, strict=True)
        ] == expected
        assert [int(each) for each in found.keys] == [key(int(each.url[-6:])) for each in found.objects]
        assert found.summary == archive.summary(archive.find(NAME))
        assert (found.summary.read_count, found.summary.seconds) == (len(expected), 99.0)
        assert found.summary.endpoints == {"https://store": LEARNT}


def test_a_file_of_other_times_reads_the_same(tmp_path: Path) -> None:
    """Byte by byte, as the module documents it."""
    run(tmp_path, [(0, 1), (0, 2)])
    data = (tmp_path / "history" / f"{NAME}.run").read_bytes()
    assert data[:8] == b"FLHIST\0\1"
    at, kinds = 8, []
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        kinds.append(kind)
        at += 24 + length
    assert at == len(data)
    assert kinds == [runfile.OBJECTS, runfile.READS, runfile.SUMMARY]


def test_a_torn_end_costs_what_was_torn(tmp_path: Path) -> None:
    recorder, archive = record([(0, number) for number in range(50)]), Archive(tmp_path)
    whole = archive.append(NAME, recorder.take(1.0, {}).pieces())
    assert whole is not None
    archive.append(NAME, record([(0, number) for number in range(50, 90)], recorder).take(2.0, {}).pieces(), whole)
    path = archive.find(NAME).path
    data = path.read_bytes()
    for end in range(whole, len(data), 7):
        path.write_bytes(data[:end])
        assert len(archive.read(archive.find(NAME)).reads) in (50, 90)
        assert archive.summary(archive.find(NAME)) is not None


@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans())
def test_damage_is_found_or_harmless(at: int, value: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), [(number % 2, number) for number in range(60)])
        archive = Archive(Path(folder))
        path = archive.find(NAME).path
        data = bytearray(path.read_bytes())
        data[at % len(data)] = value
        path.write_bytes(data[: at % len(data)] if cut else data)
        try:
            found = archive.read(archive.find(NAME))
        except CacheError:
            return
        assert len(found.reads) in (0, 60)
        assert not len(found.reads) or int(found.reads.objects.max()) < len(found.objects)


def _piece(objects: list[int], keys: int) -> list[bytes]:
    columns = Reads(
        *(np.array(values, dtype) for values, dtype in ((objects, "u4"), ([0], "u4"), ([0], "u2"), ([0], "u4")))
    )
    rows = ObjectRows.of([info(1), info(2)])
    return [runfile.objects_piece(np.zeros(keys, np.uint64), rows), runfile.reads_piece(columns)]


@pytest.mark.parametrize(
    ("pieces", "what"),
    [
        (_piece([2], 2), "object 2 of 2"),
        (_piece([0, 1], 2), "different lengths"),
        (_piece([0], 3), "3 keys of 2"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_names_the_file(pieces: list[bytes], what: str, tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    archive.append(NAME, pieces)
    with pytest.raises(CacheError, match=f"{NAME}.*{what}"):
        archive.read(archive.find(NAME))
    assert read_all(archive, 100) == []


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    rows = ObjectRows.of([ObjectInfo("s3://b/" + "a" * (80 << 20), 1, None, 0)])
    archive.append(NAME, [runfile.objects_piece(np.zeros(1, np.uint64), rows)])
    assert archive.find(NAME).size < 1 << 20
    with pytest.raises(CacheError, match="more than"):
        archive.read(archive.find(NAME))


@pytest.mark.parametrize(("bound", "says"), [("RUN_OBJECTS_MAX", "objects"), ("RUN_READS_MAX", "reads")])
def test_a_run_is_bounded_over_all_its_pieces(
    bound: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = Archive(tmp_path)
    archive.append(NAME, 5 * _piece([0], 2))
    assert len(archive.read(archive.find(NAME)).objects) == 10
    monkeypatch.setattr(runfile, bound, 4)
    with pytest.raises(CacheError, match=f"more than 4 {says}"):
        archive.read(archive.find(NAME))


def test_all_that_is_unpacked_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Archive(tmp_path)
    rows = ObjectRows.of([ObjectInfo("s3://b/" + "a" * 1000, 1, None, 0)])
    archive.append(NAME, 5 * [runfile.objects_piece(np.zeros(1, np.uint64), rows)])
    monkeypatch.setattr(runfile, "_RUN_BYTES_MAX", 4000)
    with pytest.raises(CacheError, match="more than 4000 bytes"):
        archive.read(archive.find(NAME))


@pytest.mark.parametrize(
    "figures",
    [{"seconds": float("inf")}, {"began": float("nan")}, {"began": 1e300}, {"read_count": -1}, {"program": 5}],
)
def test_figures_that_make_no_sense_are_none(figures: dict[str, float], tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    archive.append(NAME, [runfile.summary_piece(RunSummary(**figures))])  # type: ignore[arg-type]
    assert archive.summary(archive.find(NAME)) is None


def test_a_run_that_was_forgotten_is_not_gone_on_with(tmp_path: Path) -> None:
    archive, recorder = Archive(tmp_path), record([(0, 1)])
    end = archive.append(NAME, recorder.take(1.0, {}).pieces())
    assert end == archive.find(NAME).size
    archive.remove(archive.find(NAME))
    assert archive.append(NAME, [], end) is None
    assert archive.runs() == []
    archive.append(NAME, record([(0, 2)]).take(1.0, {}).pieces())
    assert archive.append(NAME, [], end + 1) is None  # another one of the name


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("s3://bucket/a?b@c", True),
        ("s3://key:secret@bucket/a", False),
        ("abfs://container@account.dfs.core.windows.net/a", True),
        ("https://host/a", True),
        ("https://host/a?X-Amz-Signature=abc", False),
        ("https://user@host/a", False),
        ("https://user:password@host/a", False),
        ("/data/a?b", True),
    ],
)
def test_no_credentials_are_kept(url: str, kept: bool, tmp_path: Path) -> None:
    assert may_keep(url) == kept
    recorder = Recorder("train.py", 0.0, CHUNK_BYTES)
    assert recorder.read(recorder.begin_trace("reader"), 1, ObjectInfo(url, 10, "e", 0), 0, 0.0)
    batch = recorder.take(1.0, {url: LEARNT})
    archive = Archive(tmp_path)
    archive.append(NAME, batch.pieces())
    found = archive.read(archive.find(NAME))
    assert (len(found.objects), found.summary.left_out) == ((1, 0) if kept else (0, 1))
    if not kept:
        assert not found.summary.endpoints


def test_a_chunk_that_was_just_asked_for_is_the_same_read() -> None:
    recorder = Recorder("train.py", 0.0, CHUNK_BYTES)
    trace, other = recorder.begin_trace("reader"), recorder.begin_trace("reader")
    assert recorder.read(trace, key(1), info(1), 0, 0.0)
    assert not recorder.read(trace, key(1), info(1), 0, 0.1)
    assert recorder.read(trace, key(1), info(1, 2), 1, 0.1)
    assert recorder.read(other, key(1), info(1), 0, 0.2)
    for number in range(2, 20):
        recorder.read(trace, key(number), info(number), 0, 0.3)
    assert recorder.read(trace, key(1), info(1), 0, 0.4)
    assert recorder.summary(1.0, {}).traces == {"reader": 2}


def test_a_full_one_counts_on() -> None:
    recorder = record([(0, number) for number in range(10)])
    recorder.is_full = True
    assert recorder.read(0, key(11), info(11), 0, 20.0)
    found = recorder.take(20.0, {}).summary
    assert isinstance(found, RunSummary)
    assert (found.read_count, found.left_out, found.read_bytes) == (10, 1, 11 * CHUNK_BYTES)


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=300), st.integers(1, 40))
def test_numbers_are_those_of_a_dict(keys: list[int], recent_max: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastload.history.record._RECENT_MAX", recent_max)
        patch.setattr("fastload.history.record._PARTS", 3)
        numbering = Numbering()
        expected: dict[int, int] = {}
        for each in [*keys, *keys]:
            is_new = each not in expected
            assert numbering.number(each) == (expected.setdefault(each, len(expected)), is_new)
        assert numbering.count == len(expected)
        assert all(numbering.get(each) == number for each, number in expected.items())


def test_the_oldest_go_first_and_live_ones_stay(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    names = [f"2026112{number}-120000-00000000" for number in range(6)]
    for name in names:
        run(tmp_path, [(0, number) for number in range(100)], name)
    (tmp_path / "history" / "notes.txt").write_text("not ours")
    os.symlink("/etc/passwd", tmp_path / "history" / "20261129-120000-00000000.run")
    assert [each.name for each in archive.runs()] == names[::-1]
    size = archive.runs()[0].size
    archive.prune(3 * size, frozenset({names[0]}))
    assert [each.name for each in archive.runs()] == [*names[:2:-1], names[0]]
    assert [(each.name, len(each.reads)) for each in read_all(archive, 250)] == [
        (names[5], 100),
        (names[4], 100),
        (names[3], 50),
    ]
    assert len(read_all(archive, 70)[0].reads) == 70  # of a run that is longer, what it began with
    assert archive.clear() == 4 * size
    assert archive.runs() == []
    assert (tmp_path / "history" / "notes.txt").exists()


def test_runs_are_found_by_how_they_begin(tmp_path: Path) -> None:
    archive = Archive(tmp_path)
    for name in ("20261126-120000-aaaaaaaa", "20261126-130000-bbbbbbbb"):
        run(tmp_path, [(0, 1)], name)
    assert archive.find("latest").name == "20261126-130000-bbbbbbbb"
    assert archive.find("20261126-12").name == "20261126-120000-aaaaaaaa"
    for name in ("20261126", "", "x", "../20261126-120000-aaaaaaaa"):
        with pytest.raises(ConfigError, match="fastload history ls"):
            archive.find(name)
