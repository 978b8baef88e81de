"""The catalog's file: what is written is read again, and whatever lies there does no harm."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastload.cache import catalog
from fastload.cache.catalog import (
    Catalog,
    CatalogDamagedError,
    CatalogError,
    CatalogObject,
    CatalogPin,
    Changes,
    folder_of,
)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def an_object(number: int, url: str = "", data_set: str | None = None) -> CatalogObject:
    return CatalogObject(key(number), url or f"s3://b/train/{number}.tar", 100 + number, '"e"', data_set, 5.0)


@contextmanager
def opened(directory: Path, *, read_only: bool = False) -> Iterator[Catalog]:
    found = Catalog(directory, read_only=read_only)
    try:
        found.open()
        yield found
    finally:
        found.close()


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    objects = [an_object(1), an_object(2, "/data/\udcff.tar", "given"), CatalogObject(key(3), "u", 0, None, None, 0.0)]
    pin = CatalogPin("imagenet", {key(1): 101, key(9): 5}, 60.0, 1 << 62, 7.5)
    with opened(tmp_path) as first:
        first.write(Changes(objects=objects, pins=[pin, CatalogPin("other", {}, 0.0, 0, 1.0)]))
    assert oct((tmp_path / catalog.NAME).stat().st_mode & 0o777) == "0o600"
    for read_only in (False, True):
        with opened(tmp_path, read_only=read_only) as again:
            assert again.pins()[0] == pin
            assert [each.object_id for each in again.objects()] == [key(1), key(2), key(3)]
            assert again.objects()[0] == objects[0]
            assert again.objects()[1].url == r"/data/\xff.tar"
            assert [each.object_id for each in again.objects(after=key(1), limit=1)] == [key(2)]
    with opened(tmp_path) as last:
        last.write(Changes(forgotten=[key(1)], unpinned=["other"], pin_uses={"imagenet": 9.0}))
        assert [each.name for each in last.pins()] == ["imagenet"]
        assert last.pins()[0].used_at == 9.0
        last.write(Changes(pins=[CatalogPin("imagenet", {key(2): 102}, 0.0, 0, 9.0)]))
        assert last.pins()[0].sizes == {key(2): 102}


def test_a_write_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    with opened(tmp_path) as found:
        found.write(Changes(objects=[an_object(1)]))
        broken = CatalogObject(key(2), "u", 1 << 70, None, None, 0.0)
        with pytest.raises(CatalogDamagedError):
            found.write(Changes(forgotten=[key(1)], objects=[broken]))
        assert [each.object_id for each in found.objects()] == [key(1)]
        found.write(Changes(objects=[an_object(3)]))
        assert len(found.objects()) == 2


def test_objects_are_found_by_url_prefix_and_data_set(tmp_path: Path) -> None:
    with opened(tmp_path) as found:
        objects = [
            an_object(1, "s3://b/a/1.tar"),
            an_object(2, "s3://b/a/2.tar", "set"),
            an_object(3, "s3://b/ab/3.tar"),
            an_object(4, "s3://b/a_%/4.tar"),
        ]
        found.write(Changes(objects=objects))
        for what, numbers in {
            "s3://b/a/": {1, 2},
            "s3://b/a/1.tar": {1},
            "s3://b/a": set(),
            "set": {2},
            "s3://b/": {1, 2, 3, 4},
            "s3://b/a_%/": {4},
        }.items():
            assert found.find([what]) == set(map(key, numbers)), what


def test_folders() -> None:
    assert folder_of("s3://b/train/1.tar") == "s3://b/train/"
    assert folder_of("https://h/a/b.tar?x=/y/z") == "https://h/a/"
    assert folder_of("/data/a.tar") == "/data/"


def _garbage(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def _truncated(path: Path) -> None:
    with opened(path.parent) as found:
        found.write(Changes(objects=[an_object(number) for number in range(2000)]))
    os.truncate(path, path.stat().st_size // 2)


def _newer(path: Path) -> None:
    with opened(path.parent):
        pass
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()


def _another_programs(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE mail (text)")
    db.close()


def _without_a_table(path: Path) -> None:
    with opened(path.parent):
        pass
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE pin_objects")
    db.close()


def _with_rows_that_are_none(path: Path) -> None:
    with opened(path.parent):
        pass
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO objects VALUES (x'00', 5, 'much', 1, 1, 'now')")
        db.execute("INSERT INTO pins VALUES (1, 'p', 'long', -1, 0)")
    db.close()


def _read_all(found: Catalog) -> None:
    found.open()
    found.pins()
    found.objects()


@pytest.mark.parametrize(
    "damage", [_garbage, _truncated, _newer, _another_programs, _without_a_table, _with_rows_that_are_none]
)
def test_what_is_no_catalog_is_said_to_be_none_and_set_aside(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    damage(tmp_path / catalog.NAME)
    found = Catalog(tmp_path)
    with pytest.raises(CatalogDamagedError):
        _read_all(found)
    found.set_aside()
    assert (tmp_path / catalog.ASIDE).exists()
    found.open()
    assert found.objects() == []
    found.close()


@given(st.binary(max_size=300), st.integers(0, 40_000))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_bytes_lie_there_do_no_harm(tmp_path: Path, data: bytes, at: int) -> None:
    path = tmp_path / catalog.NAME
    path.unlink(missing_ok=True)
    with opened(tmp_path) as found:
        found.write(Changes(objects=[an_object(number) for number in range(100)]))
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    found = Catalog(tmp_path)
    try:
        found.open()
        found.pins()
        assert all(each.size >= 0 for each in found.objects())
        found.write(Changes(objects=[an_object(7)]))
    except CatalogError:
        found.set_aside()
    finally:
        found.close()


def test_a_file_that_others_hold_is_not_to_be_had_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "_BUSY_S", 0.05)
    with opened(tmp_path) as found:
        other = sqlite3.connect(tmp_path / catalog.NAME, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(CatalogError, match="locked") as caught:
            found.write(Changes(objects=[an_object(1)]))
        assert not isinstance(caught.value, CatalogDamagedError)
        other.execute("ROLLBACK")
        other.close()
        found.write(Changes(objects=[an_object(1)]))


def test_looking_changes_no_file(tmp_path: Path) -> None:
    with opened(tmp_path) as found:
        found.write(Changes(objects=[an_object(1)]))
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    with opened(tmp_path, read_only=True) as looked:
        assert len(looked.objects()) == 1
        with pytest.raises(CatalogError):
            looked.write(Changes(objects=[an_object(2)]))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    with pytest.raises(CatalogError), opened(tmp_path / "nowhere", read_only=True):
        pass
    assert not (tmp_path / "nowhere").exists()
