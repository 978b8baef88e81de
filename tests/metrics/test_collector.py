"""A snapshot as metrics: names, units, labels, and bounds that hold whatever is in it."""

from __future__ import annotations

import re
import shutil
import string
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("prometheus_client", reason="needs fastload[metrics]")

from prometheus_client.core import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

import fastload
from fastload.client.operator import Operator
from fastload.metrics.collector import (
    COUNTERS,
    LEFT_OUT,
    NO_RANK,
    OTHER,
    SERIES_MAX,
    UNNAMED,
    Collector,
    data_set_label,
    endpoint_label,
    families,
)
from fastload.snapshot import Consumer, DataSet, Endpoint, Histogram, Job, Snapshot
from fastload.timing.activity import CAUSES
from fastload.timing.histogram import BOUNDS_S
from tests.snapshots import HOSTILE, example, make

UNITS = ("bytes", "seconds", "chunks", "total", "second", "objects", "shards")
# Gauges that count nothing which has a unit.
BARE = {"up", "consumers", "troubles", "tier_writable", "requests_in_flight", "requests_allowed"}
BARE |= {"jobs_undone", "jobs_failed"}


def exposed(snapshot: Snapshot) -> str:
    """What is scraped; it can be read back in both formats."""
    registry = CollectorRegistry()
    registry.register(Collector(lambda: snapshot))  # type: ignore[arg-type]
    assert list(parse_openmetrics(openmetrics.generate_latest(registry).decode()))  # type: ignore[no-untyped-call]
    return generate_latest(registry).decode()


def values(snapshot: Snapshot) -> dict[str, dict[tuple[str, ...], float]]:
    """By name of the sample, and values of its labels in the order of their names, `le` last."""
    found: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for family in parse(exposed(snapshot)):
        for sample in family.samples:
            names = sorted(sample.labels, key=lambda name: (name == "le", name))
            key = tuple(sample.labels[name] for name in names)
            assert key not in found[sample.name], (sample.name, key)
            found[sample.name][key] = sample.value
    return found


def report(rank: Any = 0, **changed: Any) -> dict[str, Any]:
    times = {"bounds_s": list(BOUNDS_S), "counts": list(range(len(BOUNDS_S))), "count": 20, "sum_s": 3.5}
    given = {"rank": rank, "epoch": 1, "batches": 10, "samples": 2560, "elapsed_s": 20.0, "work_s": 15.0}
    return {**given, "stalls": {"fetch": 4.0, "decode": 1.0}, "batch_wait": times, **changed}


def consumers(count: int, first: int = 0) -> list[Consumer]:
    return [
        make(Consumer, number=rank, ram_bytes=10, disk_bytes=5, remote_bytes=1, report=report(rank))
        for rank in range(first, first + count)
    ]


def test_what_is_shown_of_a_snapshot() -> None:
    times = Histogram(bounds_s=list(BOUNDS_S), counts=[2] * len(BOUNDS_S), count=3, sum_s=200.5)
    snapshot = example(
        consumers=[*consumers(2), make(Consumer, number=9, remote_bytes=7)],
        endpoints=[make(Endpoint, name="s3://bucket", requests=10, request_times=times, first_byte_times=times)],
        jobs=[make(Job, name="train", state="failed", held_bytes=7), make(Job, name="train", state="done")],
    )
    found = values(snapshot)
    assert found["fastload_up"] == {(): 1}
    assert found["fastload_fetched_bytes_total"] == {(): 4096}
    assert found["fastload_tier_used_bytes"] == {("ram",): 1 << 29, ("disk",): 1 << 38}
    assert found["fastload_served_bytes_total"] == {("ram",): 5000, ("disk",): 700, ("store",): 1000}
    assert found["fastload_requests_total"] == {("bucket",): 10}
    assert found["fastload_request_seconds_bucket"]["bucket", "100"] == 2
    assert found["fastload_request_seconds_bucket"]["bucket", "+Inf"] == 3
    assert found["fastload_request_seconds_sum"] == {("bucket",): 200.5}
    assert found["fastload_data_set_disk_bytes"] == {("train",): 200}
    assert found["fastload_jobs_undone"] == found["fastload_jobs_failed"] == {("train",): 1}
    assert found["fastload_job_held_bytes"] == {("train",): 7}
    read = found["fastload_rank_read_bytes_total"]
    assert (read["0", "ram"], read["1", "store"], read[NO_RANK, "store"]) == (10, 1, 7)
    assert found["fastload_samples_total"] == {("0",): 2560, ("1",): 2560}
    assert found["fastload_stall_seconds_total"]["fetch", "1"] == 4
    assert {cause for cause, _ in found["fastload_stall_seconds_total"]} == set(CAUSES)
    assert found["fastload_batch_wait_seconds_count"] == {("0",): 20, ("1",): 20}
    assert found["fastload_batch_wait_seconds_bucket"]["0", "0.001"] == 0
    assert found["fastload_batch_wait_seconds_bucket"]["0", "0.002"] == 1


def test_the_time_of_a_rank_adds_up() -> None:
    found = values(example(consumers=consumers(1)))
    parts = found["fastload_work_seconds_total"]["0",] + sum(found["fastload_stall_seconds_total"].values())
    assert parts == found["fastload_epoch_seconds_total"]["0",]


def test_without_a_service_it_is_down() -> None:
    def none() -> Snapshot:
        raise fastload.ServiceError("none")

    assert [(each.name, each.samples[0].value) for each in Collector(none).collect()] == [("fastload_up", 0)]


def test_names_have_units_and_labels_are_few() -> None:
    for family in families(example(consumers=consumers(1))):
        name = family.name.removeprefix("fastload_") + ("_total" if family.type == "counter" else "")
        assert name in BARE or name.rpartition("_")[2] in UNITS, name
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert sample.labels.keys() <= {"data_set", "tier", "cause", "rank", "endpoint", "le"}


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    section = text.partition("\n## Metrics\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(fastload_\w+)`", section, re.MULTILINE))
    shown = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in families(_with_all_counters(example(consumers=consumers(1))))
    }
    assert documented == shown


def _with_all_counters(snapshot: Snapshot) -> Snapshot:
    from msgspec.structs import replace

    return replace(snapshot, node=replace(snapshot.node, counters=dict.fromkeys(COUNTERS, 1.0)))


def test_every_counter_of_a_service_is_shown_or_left_out_on_purpose(tmp_path: Path) -> None:
    with (
        fastload.Cache(tmp_path, ram_bytes="32MiB", disk_bytes=0, service="inprocess") as cache,
        cache._handle.consumer(),
        Operator.connect(tmp_path, "test") as operator,
    ):
        counters = set(operator.snapshot().node.counters)
    assert counters == COUNTERS.keys() | LEFT_OUT
    assert not COUNTERS.keys() & LEFT_OUT


def worst() -> Snapshot:
    """As many of each kind as nobody has."""
    number = range(3000)
    return example(
        consumers=[*consumers(300), make(Consumer, number=1000, ram_bytes=10, report=report("x"))],
        endpoints=[make(Endpoint, name=f"https://host{each}:443", requests=1) for each in range(100)],
        data_sets=[make(DataSet, name=f"set {each}", ram_bytes=each, object_count=1) for each in number],
        jobs=[make(Job, name=f"job {each}", held_bytes=1) for each in number],
    )


def test_series_are_bounded_and_the_rest_is_summed() -> None:
    snapshot = _with_all_counters(worst())
    found = values(snapshot)
    assert 500 < sum(map(len, found.values())) <= SERIES_MAX
    sets = found["fastload_data_set_ram_bytes"]
    assert sum(sets.values()) == sum(range(3000))
    assert ("set 2999",) in sets  # the largest have labels of their own
    assert ("set 0",) not in sets
    assert sum(found["fastload_requests_total"].values()) == 100
    assert ("host99:443",) in found["fastload_requests_total"]
    assert sum(found["fastload_job_held_bytes"].values()) == 3000
    read = found["fastload_rank_read_bytes_total"]
    assert sum(read[key] for key in read if key[1] == "ram") == 3010
    assert {"0", OTHER} <= {rank for rank, _ in read}
    assert sum(found["fastload_samples_total"].values()) == 301 * 2560
    assert sum(found["fastload_batch_wait_seconds_count"].values()) == 301 * 20


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_say() -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=exposed(worst()), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_sixteen_ranks_of_a_common_node_have_series_of_their_own() -> None:
    found = values(_with_all_counters(example(consumers=consumers(16))))
    assert {rank for _, rank in found["fastload_stall_seconds_total"]} == {str(rank) for rank in range(16)}


def test_hostile_names_and_reports_are_harmless() -> None:
    reports: list[dict[str, Any]] = [
        report(HOSTILE, stalls=HOSTILE, batch_wait=HOSTILE, samples=HOSTILE),
        report(-1, stalls={HOSTILE: 1.0, "fetch": float("nan"), "disk": HOSTILE}, batch_wait={"bounds_s": [1]}),
        report(10**30, batch_wait={"bounds_s": [0.5], "counts": [1], "count": 1, "sum_s": 1.0}),
        report(True, elapsed_s=float("inf"), work_s=-1),
    ]
    found = exposed(
        example(1.0, HOSTILE, consumers=[make(Consumer, number=at, report=each) for at, each in enumerate(reports)])
    )
    assert "\x1b" not in found
    assert "\u202e" not in found
    assert max(map(len, found.splitlines())) < 300


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("imagenet", "imagenet"),
        ("s3://bucket/imagenet/train/", UNNAMED),
        ("/data/imagenet", UNNAMED),
        ("file:///data", UNNAMED),
        ("", UNNAMED),
        ("a\nb", "a?b"),
        ("x" * 1000, "x" * 100),
    ],
)
def test_a_data_set_is_never_called_by_its_url(name: str, label: str) -> None:
    assert data_set_label(name) == label


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("http://127.0.0.1:9000", "127.0.0.1:9000"),
        ("https://user:secret@host/path/key?token=x", "host"),
        ("s3://bucket", "bucket"),
        ("file://", "file"),
        ("", "default"),
    ],
)
def test_an_endpoint_is_called_by_its_host(name: str, label: str) -> None:
    assert endpoint_label(name) == label


# JSON-like values of any kind, as a consumer may report them.
_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
_KEYS = st.sampled_from(["rank", "samples", "batches", "elapsed_s", "work_s", "stalls", "batch_wait", "x"])


@given(st.lists(st.dictionaries(_KEYS, _ANYTHING), max_size=4))
def test_any_report_can_be_shown(reports: list[dict[str, Any]]) -> None:
    snapshot = example(consumers=[make(Consumer, number=at, report=each) for at, each in enumerate(reports)])
    assert sum(len(family.samples) for family in families(snapshot)) <= SERIES_MAX
    assert "fastload_up 1.0" in exposed(snapshot)
