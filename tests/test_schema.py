"""`fastload.schema`: what columns hold, for each format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fastload
from fastload.data_schema import Column
from fastload.errors import ConfigError, ObjectMissingError
from tests.shards import tar_of

WRITTEN = Path(__file__).parent / "formats" / "written"


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, service="inprocess") as opened:
        yield opened


def test_of_tars_and_lines(cache: fastload.Cache, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"1": {"jpg": b"x", "cls": b"3"}}))
    assert fastload.schema(tmp_path / "a.tar", cache=cache) == {
        "jpg": Column(bytes, None, "a member of a tar"),
        "cls": Column(bytes, None, "a member of a tar"),
    }
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 3}))
    assert fastload.schema(tmp_path / "a.jsonl", cache=cache) == {"json": Column(object, None, "JSON")}


def test_of_typed_columns(cache: fastload.Cache) -> None:
    mds = fastload.schema(f"{WRITTEN}/mds/", cache=cache)
    assert mds["id"][:2] == (np.dtype("int64"), ())
    assert mds["Name"][:2] == (str, None)
    assert all(isinstance(column.encoding, str) and column.encoding for column in mds.values())
    records = fastload.schema(f"{WRITTEN}/tfrecord/", cache=cache)
    assert records["label"] == Column(np.dtype("int64"), (), "int64")
    assert records["box"][:2] == (np.dtype("float32"), (4,))
    assert records["tokens"][:2] == (np.dtype("int64"), None)
    lit = fastload.schema(f"{WRITTEN}/litdata/", cache=cache)
    assert list(lit)[:3] == ["id", "meta/näme", "meta/ok"]
    assert lit["meta/ok"][:2] == (np.dtype("bool"), ())
    table = fastload.schema(f"{WRITTEN}/litdata_table/", cache=cache)
    assert table["meta/a"] == Column(np.dtype("int64"), (), "int64")
    assert table["ids"] == Column(np.dtype("int64"), None, "list of int64")
    assert table["words"] == Column(object, None, "list of text")


def test_of_tokens(cache: fastload.Cache, tmp_path: Path) -> None:
    np.arange(64, dtype=np.uint16).tofile(tmp_path / "a.bin")
    found = fastload.schema(tmp_path / "a.bin", cache=cache, format=fastload.formats.tokens(8, "uint16"))
    assert found["tokens"][:2] == (np.dtype("uint16"), (8,))
    (tmp_path / "a.bin").write_bytes(b"odd")
    np.save(tmp_path / "b.npy", np.arange(64))
    (tmp_path / "b.npy").rename(tmp_path / "c.npy")
    (tmp_path / "b.npy").write_bytes(b"junk")
    names = [tmp_path / name for name in ("a.bin", "b.npy", "c.npy")]
    with pytest.warns(RuntimeWarning, match=r"2 shards cannot be read:\n.*a\.bin has 3 bytes.*\n.*b\.npy: not an npy"):
        found = fastload.schema(names, cache=cache, format="tokens(8, int64)")
    assert found["tokens"][:2] == (np.dtype("int64"), (8,))


def test_columns_are_what_batches_hold(cache: fastload.Cache) -> None:
    for name in ("mds", "tfrecord"):
        columns = fastload.schema(f"{WRITTEN}/{name}/", cache=cache)
        dataset = fastload.StreamingDataset(f"{WRITTEN}/{name}/", cache=cache)
        batch = next(iter(fastload.DataLoader(dataset, batch_size=3)))
        dataset.close()
        assert set(columns) <= set(batch)
        for column, (dtype, shape, _) in columns.items():
            if isinstance(dtype, np.dtype) and shape is not None:
                assert tuple(batch[column].shape[1:]) == shape
                assert np.asarray(batch[column]).dtype == dtype


def test_what_is_not_there(cache: fastload.Cache, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError, match=r"nothing\.tar"):
        fastload.schema(tmp_path / "nothing.tar", cache=cache)
    with pytest.raises(ConfigError, match="format='zip' is not known"):
        fastload.schema(tmp_path / "a.tar", cache=cache, format="zip")
