"""Operators watch a real service: they start none, keep none alive, and see what consumers do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import fastload
from fastload.client.cache import Handle
from fastload.client.operator import NotServedError, Operator


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
