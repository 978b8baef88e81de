"""What a benchmark decides: whether two results differ, and what its figures mean."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.bench import schema
from fastload.bench.compare import Change, compare, lost, too_bad
from fastload.bench.plan import Options, Plan, shards_within
from fastload.bench.prediction import Measured, predict
from fastload.bench.report import html, lines
from fastload.bench.schema import Figure, Machine, Phase, Result, Series, Work
from fastload.bench.session import Session
from fastload.bench.verdict import Demand, Findings, Rate, sentences
from fastload.errors import ConfigError
from fastload.store import ObjectInfo

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e" + "k" * 10_000


def result(
    values: list[float], *, digest: str = "a", cpu: str = "one", steady: bool = False, name: str = "x"
) -> Result:
    return Result(
        version=schema.VERSION,
        taken_at="2026-01-01T00:00:00+00:00",
        command=["fastload", "bench", name],
        versions={"fastload": "0"},
        machine=Machine(cpu=cpu, cores=2, memory_bytes=1, kernel="k", file_system="ext4", load_before=0.0),
        work=Work(urls=[name], shards=1, samples=1, byte_count=1, options={"workers": "2"}, digest=digest),
        phases=[
            Phase(
                name="cold",
                seconds=1.0,
                figures=[Figure(name="samples", unit="samples/s", values=values, better="more", steady=steady)],
                series=[Series(name=name, x_unit="n", y_unit="B/s", xs=[1.0, 2.0], ys=[1e6, 2e6])],
                notes=[name],
            )
        ],
        verdict=[name],
    )


def word(before: list[float], after: list[float], *, steady: bool = False) -> str:
    (change,) = compare(result(before, steady=steady), result(after, steady=steady))
    return change.word


@pytest.mark.parametrize(
    ("before", "after", "steady", "expected"),
    [
        ([100, 101, 99, 100, 102], [100, 100, 99, 101, 102], False, "no change"),
        ([100, 101, 99, 100, 102], [120, 121, 119, 120, 122], False, "better"),
        ([100, 101, 99, 100, 102], [80, 81, 79, 80, 82], False, "worse"),
        ([100], [80], False, "too few runs"),
        ([100], [80], True, "worse"),
        ([100], [97], True, "no change"),
        ([0.0], [0.0], True, "no change"),
    ],
)
def test_a_change_has_a_word(before: list[float], after: list[float], steady: bool, expected: str) -> None:
    assert word(before, after, steady=steady) == expected


def test_the_same_work_twice_is_no_change_in_most_tries_and_a_tenth_less_is_seen() -> None:
    source = random.Random(5)
    same = slower = 0
    for _ in range(40):
        before = [source.gauss(100, 2) for _ in range(5)]
        same += word(before, [source.gauss(100, 2) for _ in range(5)]) == "no change"
        slower += word(before, [source.gauss(90, 2) for _ in range(5)]) == "worse"
    assert same >= 36
    assert slower >= 38


@given(st.lists(st.floats(1, 1e6), min_size=2, max_size=6), st.floats(1.3, 5))
def test_what_is_faster_throughout_is_never_called_worse(values: list[float], factor: float) -> None:
    (change,) = compare(result(values), result([value * factor for value in values]))
    assert change.word in ("better", "no change")
    assert change.low <= change.ratio * (1 + 1e-9)
    assert change.high >= change.ratio * (1 - 1e-9)


def test_what_the_second_result_lacks_is_said() -> None:
    before, after = result([1.0]), result([1.0])
    assert lost(before, after) == []
    after.phases[0].figures, after.phases[0].error = [], "the store is gone"
    assert lost(before, after) == ["cold: not compared, it failed in the second result: the store is gone"]
    after.phases, after.interrupted = [], True
    assert lost(before, after) == ["cold: not compared, the second result was interrupted"]
    after.interrupted = False  # left out with --skip
    assert lost(before, after) == []


def test_other_work_and_other_machines_are_refused_by_name() -> None:
    other = result([1.0], digest="b")
    other.work.options = {"workers": "4"}
    with pytest.raises(ConfigError, match=r"other work \(workers: 2 and 4\)"):
        compare(result([1.0]), other)
    with pytest.raises(ConfigError, match=r"other machines \(cpu: one and two\)"):
        compare(result([1.0]), result([1.0], cpu="two"))
    assert compare(result([1.0]), other, anyway=True)
    assert compare(result([1.0]), result([1.0], cpu="two"), other_machine=True)
    with pytest.raises(ConfigError, match="other work"):
        compare(result([1.0]), other, other_machine=True)


def change(name: str, ratio: float, *, steady: bool) -> Change:
    return Change("cold", name, "", 1.0, ratio, ratio, ratio, ratio, "worse" if ratio > 1 else "better", steady)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, []),
        ({"": 0.05}, ["requests", "memory at the peak"]),
        ({"": 0.05, "memory": 0.5}, ["requests"]),
        ({"": 0.05, "memory": 0.5, "memory at": 0.1}, ["requests", "memory at the peak"]),
        ({"wake-ups": 0.1}, ["wake-ups a batch"]),
        ({"": 0.05, "requests": math.inf, "memory": math.inf}, []),
    ],
)
def test_a_bound_is_for_steady_figures_or_for_those_that_it_names(
    bounds: dict[str, float], expected: list[str]
) -> None:
    changes = [
        change("requests", 1.1, steady=True),
        change("memory at the peak", 1.2, steady=True),
        change("bytes from the store", 0.5, steady=True),
        change("CPU", 1.01, steady=True),
        change("wake-ups a batch", 3.0, steady=False),
    ]
    assert [each.name for each in too_bad(changes, bounds)] == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no result"),
        (b"{", "is no result"),
        (b"\xff\xfe", "is no result"),
        (b'{"version": 99}', "version 99"),
        (b'{"version": 1}', "missing required field"),
    ],
)
def test_a_file_that_is_no_result_is_an_error(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        schema.read(tmp_path / "a.json")


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = result([1.0, 2.0])
    schema.write(written, tmp_path / "a.json")
    assert schema.read(tmp_path / "a.json") == written
    with pytest.raises(ConfigError, match="no-such-folder"):
        schema.write(written, tmp_path / "no-such-folder" / "a.json")


def test_a_page_runs_no_script_asks_for_nothing_and_shows_names_as_text() -> None:
    page = html(result([1.0, 2.0], name=HOSTILE))
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;img" in page
    assert "\x1b" not in page.replace("\n", "")
    assert "default-src 'none'" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


FOUND = Findings(
    samples=100_000,
    byte_count=10_000_000_000,
    stored_bytes=10_000_000_000,
    whole_bytes=10_000_000_000,
    batch_size=256,
    workers=2,
    shards=100,
    cores=2.0,
)
MEASURED = Measured(
    byte_count=500_000_000, samples=2_000, shards=20, chunk_bytes=8 << 20, ram_bytes=128 << 20, batch_size=100,
    workers=2, ranks=1, shuffle="window", window_bytes=None, first_byte_s=0.02, connection_bytes_per_s=50e6,
    store_bytes_per_s=100e6, disk_read_bytes_per_s=1e9, disk_write_bytes_per_s=1e9, samples_per_s=2000.0,
)  # fmt: skip


def test_pieces_of_one_file_are_one_url_and_packed_shards_are_fetched_as_they_are_stored() -> None:
    files = [f"/{number}.jsonl" for number in range(4)]
    pieces = [ObjectInfo(url, 60, "e", start=start, object_size=100) for url in files for start in (0, 50)]
    chosen = shards_within(pieces, 200)
    assert [(each.url, each.start) for each in chosen] == [(files[0], 0), (files[0], 50), (files[2], 0), (files[2], 50)]
    plan = Plan(chosen, 8, 480, 10, passes=2)
    assert plan.stored == [ObjectInfo(files[0], 100, "e"), ObjectInfo(files[2], 100, "e")]
    assert (plan.store_bytes, plan.requests) == (400, 40)
    packed = Plan([ObjectInfo("/a.gz", 900, "e", object_size=100, packing="gzip")], 1, 900, 10, passes=1)
    assert (packed.byte_count, packed.store_bytes, packed.requests) == (900, 100, 10)
    assert packed.stored == [ObjectInfo("/a.gz", 100, "e")]


def test_later_epochs_are_predicted_up_to_the_size_from_which_more_does_not_help() -> None:
    predicted = predict(MEASURED, [0.3])
    assert list(predicted.later_per_s) == [0.0, 0.25, 0.3, 0.5, 0.75, 1.0]
    assert 0.8 * 400 < predicted.first_per_s < 1.05 * 400  # the link's
    assert predicted.later_per_s[0.0] < predicted.later_per_s[0.5] < predicted.later_per_s[1.0]
    assert predicted.later_per_s[1.0] > 0.8 * 2000  # the consumer's
    assert predicted.enough > 0.5


def test_a_slow_consumer_needs_no_cache() -> None:
    assert predict(replace(MEASURED, samples_per_s=200.0), []).enough == 0.0


def test_a_cache_that_holds_no_chunk_is_not_predicted() -> None:
    assert list(predict(replace(MEASURED, byte_count=12_000_000), []).later_per_s) == [0.0, 0.75, 1.0]


RATES = st.builds(
    Rate,
    samples_per_s=st.floats(0, 1e7),
    bytes_per_s=st.floats(0, 1e11),
    seconds=st.floats(0, 1e5),
    cpu_s=st.floats(0, 1e5),
    cores=st.floats(0.1, 256),
)


def rate(samples_per_s: float, cpu_s: float = 1.0) -> Rate:
    return Rate(samples_per_s, samples_per_s * 1e5, seconds=60.0, cpu_s=cpu_s, cores=2.0)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (replace(FOUND, store_bytes_per_s=200e6, cold=rate(1960)), "the link limits it (196 MB/s of 200 MB/s)"),
        (
            replace(FOUND, store_bytes_per_s=50e6, stored_bytes=2_500_000_000, cold=rate(1960)),  # packed
            "the link limits it (49 MB/s of 50 MB/s)",
        ),
        (
            replace(FOUND, store_bytes_per_s=200e6, stored_bytes=2_500_000_000, cold=rate(1960)),
            "no single part limits it",
        ),
        (replace(FOUND, store_bytes_per_s=900e6, decode_per_s=2000.0, cold=rate(1900)), "decoding limits it"),
        (replace(FOUND, decode_per_s=1500.0, cold=rate(1900)), "(1,900 of the 1,900 samples/s that 2 threads"),
        (replace(FOUND, store_bytes_per_s=170e6, cold=rate(1900)), "(190 MB/s of 190 MB/s)"),
        (replace(FOUND, store_bytes_per_s=900e6, cold=rate(1900, cpu_s=115.0)), "the cores limit it"),
        (
            replace(
                FOUND, store_bytes_per_s=900e6, cold=replace(rate(1900), bound_by="map", said="map-bound: 90% of ...")
            ),
            "It is map-bound",
        ),
        (replace(FOUND, cold=replace(rate(1900), seconds=0.5)), "too short to say"),
        (replace(FOUND, cold=rate(1900), shards=1), "There is only 1 shard for 2 workers"),
        (replace(FOUND, cold=rate(1900), load_before=4.0), "The machine was busy"),
        (replace(FOUND, cold=rate(1900), retries=12), "12 requests failed or were refused, and were tried again"),
        (
            replace(FOUND, store_bytes_per_s=190e6, cold=rate(1900), refused=30, requests=900),
            "throttling limits it (the store refused 30 of 900 requests)",
        ),
        (
            replace(
                FOUND, store_bytes_per_s=64e6, requests_at_bend=64, request_bytes=2e5, first_byte_s=0.19, cold=rate(640)
            ),
            "latency limits it (a request waits 190 ms for its first byte, and moves 200000 bytes)",
        ),
        (
            replace(FOUND, store_bytes_per_s=900e6, cold=replace(rate(1900), bound_by="fetch", said="fetch-bound")),
            "(190 MB/s). It is fetch-bound",
        ),
        (
            replace(FOUND, store_bytes_per_s=270e6, cold=replace(rate(1900), bound_by="fetch", said="fetch-bound")),
            "the link limits it (190 MB/s of 270 MB/s)",
        ),
        (
            replace(FOUND, disk_bytes_per_s=9e9, from_disk=replace(rate(9), bound_by="disk", said="disk-bound: x")),
            "and the disk limits it (0.9 MB/s of 9,000 MB/s)",
        ),
        (replace(FOUND, disk_bytes_per_s=1e9, from_disk=rate(9500)), "and the disk limits it (950 MB/s of 1,000 MB/s)"),
        (replace(FOUND, demands=(Demand("Cached", 0.18, 0.83, is_given=True),)), "would be used to 83%"),
        (replace(FOUND, demands=(Demand("Cached", 0.18, 0.98, is_given=True),)), "98%; the consumer limits it"),
        (
            replace(FOUND, against="m:f", yours=(("first", rate(100), rate(250)), ("later", rate(9), None))),
            "The first epoch of m:f runs at 100 samples/s, fastload's at 250: 2.5 times as fast. Its later",
        ),
        (replace(FOUND, demands=(Demand("Cached", 0.1, 0.92),)), "every 100 ms (2,560 samples/s)"),
        (
            replace(FOUND, from_disk=replace(rate(3885), bound_by="unknown", said="too short to say: 0.7 s")),
            "From the cache's disk it runs at 3,885 samples/s (388 MB/s).",
        ),
        (
            replace(FOUND, from_disk=replace(rate(5), bytes_per_s=2.5 * 5 * FOUND.byte_count / FOUND.samples)),
            "It reads the data 2.5 times there",
        ),
        (replace(FOUND, demands=(Demand("Cached", 2.5, 0.92),)), "every 2.5 s (102 samples/s)"),
        (replace(FOUND, cold=rate(1900), price_per_gb=0.09, epochs=10), "costs 0.90, 10 without a cache 9.00"),
        (
            replace(FOUND, predicted=(0.5, 4100.0)),
            "By simulation a disk cache of 5 GB here (50% of the data) lifts later epochs to 4,100 samples/s, and a",
        ),
        (replace(FOUND, predicted=(0.0, 4100.0)), "no disk cache lifts later epochs: without one they run at 4,100"),
        (FOUND, "Nothing was measured"),
    ],
)
def test_the_verdict_names_the_limit_with_its_figure(found: Findings, says: str) -> None:
    assert says in " ".join(sentences(found))


@given(RATES, RATES, st.floats(0, 1e11), st.floats(0, 1e7), st.floats(0, 10))
def test_the_verdict_says_something_of_any_figures(
    cold: Rate, cached: Rate, link: float, decode: float, step_s: float
) -> None:
    found = replace(
        FOUND,
        store_bytes_per_s=link,
        decode_per_s=decode,
        cold=cold,
        from_ram=cached,
        from_disk=cached,
        demands=(Demand("Cached", step_s, 0.5),),
    )
    assert all(sentences(found))


def test_lines_begin_with_the_verdict_and_leave_out_what_is_none() -> None:
    shown = result([1.0])
    shown.phases[0].figures.append(Figure(name="waited for map", unit="s", values=[0.0]))
    assert lines(shown)[0] == "x"
    assert not any("waited for map" in line for line in lines(shown))


def test_results_are_plain_data() -> None:
    assert msgspec.json.decode(msgspec.json.encode(result([1.0])))["phases"][0]["figures"][0]["values"] == [1.0]


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--cache .*/file: .*name a place where a folder can be made"):
        Session(Options(["s3://a/b/"], cache=tmp_path / "file" / "cache"), [], lambda words: None).__enter__()
