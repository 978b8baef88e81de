"""Operators watch a real service: they start none, keep none alive, and see what consumers do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastload
from fastload import protocol
from fastload.client.cache import Handle
from fastload.client.operator import NotServedError, Operator
from fastload.service.description import judged
from fastload.service.fetching.request_limit import Endpoints
from fastload.timing.activity import CAUSES
from fastload.timing.verdict import Figures


def test_watching_starts_no_service_and_makes_no_directory(tmp_path: Path) -> None:
    with pytest.raises(NotServedError, match=r"no cache service runs for .*nowhere"):
        Operator.connect(tmp_path / "nowhere", "test")
    assert not (tmp_path / "nowhere").exists()


def test_a_snapshot_shows_who_is_connected(tmp_path: Path) -> None:
    with (
        fastload.Cache(tmp_path, ram_bytes="32MiB", disk_bytes="64MiB", service="inprocess") as cache,
        cache._handle.consumer(name="train"),
        Operator.connect(tmp_path, "test") as operator,
    ):
        shown = operator.snapshot()
        assert [each.name for each in shown.consumers] == ["train"]
        assert {tier.name: tier.limit_bytes for tier in shown.tiers} == {"ram": 32 << 20, "disk": 64 << 20}
        assert shown.node.directory == str(tmp_path)
        assert shown.node.counters["fetched_bytes"] == 0


def test_a_watcher_does_not_keep_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_IDLE_S", "0.5")
    with Handle(tmp_path, ram_bytes="32MiB", disk_bytes=0) as handle:
        consumer = handle.consumer(name="train")
        with Operator.connect(tmp_path, "test") as operator:
            shown = operator.watch(0.5)
            assert len(next(shown).consumers) == 1
            consumer.close()
            assert sum(1 for _ in shown) >= 1  # it ends with the service
            until = time.monotonic() + 10
            while time.monotonic() < until:
                try:
                    Operator.connect(tmp_path, "test").close()
                except NotServedError:
                    return
                time.sleep(0.05)
            pytest.fail("the service lives on")


SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5))
VALUES = st.one_of(SCALARS, st.dictionaries(st.text(max_size=5), st.one_of(SCALARS, st.lists(st.floats(), max_size=3))))


@given(
    report=st.dictionaries(st.sampled_from([*Figures.__struct_fields__, "rank", "batch_wait"]), VALUES),
    stalls=st.dictionaries(st.sampled_from(CAUSES), st.floats(allow_nan=False)),
)
def test_a_report_is_judged_whatever_it_says(report: dict[str, Any], stalls: dict[str, float]) -> None:
    for each in (report, {"elapsed_s": 5.0, **report, "stalls": stalls}):
        payload = bytes(protocol.frame(protocol.Report(each)))[4:]
        message = protocol.from_consumer(payload)
        assert isinstance(message, protocol.Report)
        found = judged(message.values, Endpoints(), 1 << 20)
        assert {**found, **message.values}.keys() == found.keys()
        msgspec.json.encode(found)  # as views write it


@pytest.mark.parametrize("values", [{"a": [1]}, {"a": {"b": {}}}, {"a": {1: 2}}, {"a": b""}, {1: 2}])
def test_a_report_that_no_view_could_show_is_none(values: Any) -> None:
    payload = msgspec.msgpack.encode(["report", values])
    with pytest.raises(protocol.ConversationError):
        protocol.from_consumer(payload)
