"""A file object as a checkpoint: committed when it is closed, verified when it is read."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
import torch

from fastload import checkpoint
from fastload.checkpoint import file
from fastload.errors import CheckpointError, CheckpointExistsError, ObjectMissingError
from tests.checkpoint.test_single import model_state, same


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/run/1" if request.param == "local" else f"{request.getfixturevalue('s3').url}/run/1"


def test_what_torch_saves_comes_back(url: str) -> None:
    state = model_state()
    with checkpoint.create(url) as written:
        torch.save(state, written)
        with pytest.raises(ObjectMissingError):
            checkpoint.open_file(url)
    with checkpoint.open_file(url) as found:
        same(state, torch.load(found))
    with pytest.raises(CheckpointExistsError, match="pass overwrite=True"), checkpoint.create(url):
        pass
    with checkpoint.create(url, overwrite=True) as written:
        written.write(b"2")
    with checkpoint.open_file(url) as found:
        assert found.read() == b"2"


@pytest.mark.parametrize("length", [0, 1, 999, 1000, 1001, 10_500])
def test_files_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(file, "_SEGMENT_BYTES", 1000)
    random_ = random.Random(length)
    data = random_.randbytes(length)
    with checkpoint.create(tmp_path / "1") as written:
        rest = memoryview(data)
        while rest:
            count = written.write(rest[: random_.randint(1, 1500)])
            rest = rest[count:]
        assert written.tell() == length
    with pytest.raises(ValueError, match="closed"):
        written.write(b"more")
    assert len(list((tmp_path / "1").rglob("*.safetensors"))) == max(1, -(-length // 1000))
    with checkpoint.open_file(tmp_path / "1") as found:
        for _ in range(20):
            at, size = random_.randint(0, length + 5), random_.randint(0, 3000)
            assert found.seek(at) == at
            assert found.read(size) == data[at : at + size]
        assert found.seek(0, io.SEEK_END) == length
        assert found.seek(0) == 0
        assert found.read() == data
    assert bytes(checkpoint.load(tmp_path / "1")["file"].numpy()) == data


def test_a_block_that_fails_commits_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), checkpoint.create(tmp_path / "1") as written:  # noqa: PT012
        written.write(b"half")
        raise KeyError
    with pytest.raises(ObjectMissingError):
        checkpoint.open_file(tmp_path / "1")


def test_what_is_no_file(tmp_path: Path) -> None:
    checkpoint.save({"w": torch.ones(2)}, tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"holds no file that create\(\) wrote; load\(\) reads it"):
        checkpoint.open_file(tmp_path / "1")


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    with checkpoint.create(tmp_path / "1") as written:
        written.write(bytes(200_000))
    (path,) = (tmp_path / "1").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[150_000] ^= 1
    path.write_bytes(data)
    with checkpoint.open_file(tmp_path / "1") as found, pytest.raises(CheckpointError, match="is damaged"):
        found.read()
