"""Tensors one after the other, in stored order: no more in memory than was asked for, no byte read twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastload import checkpoint
from fastload.checkpoint import attempts, gathering
from fastload.checkpoint.reading import Wanted
from fastload.checkpoint.records import Place
from fastload.errors import CheckpointError, ConfigError, ObjectMissingError
from fastload.store import Counters, RequestOptions, open_store
from tests.checkpoint.test_single import same
from tests.conftest import Bucket


def test_a_checkpoint_in_little_memory(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 MiB there are 4 in flight or waiting, and the one that was taken."""
    state = {f"{number:02}": torch.full((1 << 18,), number) for number in range(20)}  # 2 MiB each
    state |= {f"small.{number}": torch.tensor([number]) for number in range(50)}
    checkpoint.save({**state, "step": 3}, f"{s3.url}/1")
    counters, asked, taken, most = Counters(), 0, 0, 0
    monkeypatch.setattr(
        attempts, "open_store", lambda url, options: open_store(url, options, RequestOptions(counters=counters))
    )
    bare = gathering.wanted

    def wanted(piece: Place, array: gathering.Bytes) -> Wanted:
        nonlocal asked, most
        asked += piece.length
        most = max(most, asked - taken)
        return bare(piece, array)

    monkeypatch.setattr(gathering, "wanted", wanted)
    found = {}
    for name, tensor in checkpoint.stream(f"{s3.url}/1", ahead="4MiB"):
        found[name] = tensor
        taken += tensor.nbytes
    same(dict(sorted(state.items())), dict(sorted(found.items())))
    assert list(found)[:20] == sorted(state)[:20]  # as they lie
    assert 4 << 20 <= most <= 6 << 20
    assert counters.values()["bytes"] <= (40 << 20) * 1.05
    assert counters.values()["requests"] <= 60


def test_a_stream_that_is_left_ends(tmp_path: Path) -> None:
    checkpoint.save({str(number): torch.ones(1000) for number in range(100)}, tmp_path / "1")
    stream = checkpoint.stream(tmp_path / "1", ahead=10_000)
    assert next(stream)[0] == "0"
    stream.close()  # type: ignore[attr-defined]


def test_names_and_mistakes(tmp_path: Path) -> None:
    checkpoint.save({"a": {"b": torch.ones(2), "c": 1}, "d": torch.zeros(3)}, tmp_path / "1")
    assert [name for name, _ in checkpoint.stream(tmp_path / "1", ["a"])] == ["a.b"]
    with pytest.raises(CheckpointError, match="has no e"):
        next(checkpoint.stream(tmp_path / "1", ["e"]))
    with pytest.raises(ConfigError, match="ahead='much'"):
        checkpoint.stream(tmp_path / "1", ahead="much")
    with pytest.raises(ObjectMissingError):
        next(checkpoint.stream(tmp_path / "2"))


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    checkpoint.save({"w": torch.randn(100_000)}, tmp_path / "1")
    (path,) = (tmp_path / "1").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        list(checkpoint.stream(tmp_path / "1"))
