"""Checkpoints of other tools: safetensors files and folders of them; what is torn or hostile is refused."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastload import checkpoint
from fastload.checkpoint.segments import DTYPES
from fastload.checkpoint.values import NAMES
from fastload.errors import CheckpointError, ObjectMissingError
from fastload.store import StoreOptions, open_store
from tests.checkpoint.test_single import same
from tests.conftest import Bucket
from tests.programs import run_cli_here


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """As the format's own writer has it: no padding but of the header to 8 bytes, wide elements first."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        header[name] = entry(NAMES[tensor.dtype], list(tensor.shape), len(data), len(data) + len(raw))
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


STATE = {
    "model.embed.weight": torch.randn(40, 8).to(torch.bfloat16),
    "model.norm": torch.randn(8),
    "step": torch.tensor(7),
    "none": torch.empty(0, 3),
}
FILES = {
    "model-00001-of-00002.safetensors": ["model.embed.weight", "step"],
    "model-00002-of-00002.safetensors": ["model.norm", "none"],
}


def write(root: Any, *, index: bool) -> None:
    for name, tensors in FILES.items():
        root(name, safetensors({each: STATE[each] for each in tensors}, {"format": "pt"}))
    if index:
        weights = {tensor: name for name, tensors in FILES.items() for tensor in tensors}
        root(
            "model.safetensors.index.json", json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}).encode()
        )
    root("config.json", b"{}")


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("where", ["local", "s3", "fsspec"])
def test_a_folder_of_the_hub(where: str, index: bool, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if where == "fsspec":
        pytest.importorskip("fsspec")
    options = StoreOptions()
    url = {"local": f"{tmp_path}/hub", "fsspec": f"memory://hub-{index}/org/model"}.get(where, "")
    if where == "s3":
        bucket: Bucket = request.getfixturevalue("s3")
        url, options = f"{bucket.url}/hub", bucket.options
    store = open_store(url, options)
    write(lambda name, data: store.put(f"{url}/{name}", data), index=index)
    store.close()
    same(dict(sorted(STATE.items())), dict(sorted(checkpoint.load(url).items())))
    assert list(checkpoint.load(url, names=["model"])) == ["model.embed.weight", "model.norm"]
    into = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    same(STATE, checkpoint.load(url, into=into))
    one = f"{url}/model-00002-of-00002.safetensors"
    same(STATE["model.norm"], checkpoint.load(one)["model.norm"])
    same(sorted(name for name, _ in checkpoint.stream(url)), sorted(STATE))


def test_what_the_format_itself_writes_and_reads(tmp_path: Path) -> None:
    safetensors_ = pytest.importorskip("safetensors.torch")
    safetensors_.save_file(STATE, tmp_path / "a.safetensors", {"format": "pt"})
    same(dict(sorted(STATE.items())), dict(sorted(checkpoint.load(tmp_path / "a.safetensors").items())))
    assert run_cli_here("checkpoint", "export", tmp_path / "a.safetensors", tmp_path / "b.safetensors").returncode == 0
    same(dict(sorted(STATE.items())), dict(sorted(safetensors_.load_file(tmp_path / "b.safetensors").items())))


def test_which_files_of_a_folder_count(tmp_path: Path) -> None:
    """As transformers has it: the index says, and else a file of the usual name is the model."""
    (tmp_path / "model.safetensors").write_bytes(safetensors({"w": torch.ones(2)}))
    (tmp_path / "consolidated.safetensors").write_bytes(safetensors({"w": torch.zeros(2), "v": torch.ones(1)}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.safetensors").write_bytes(b"no")
    same({"w": torch.ones(2)}, checkpoint.load(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"w is in consolidated\.safetensors and in other\.safetensors; name one"):
        checkpoint.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "other.safetensors", "v": "consolidated.safetensors"}}))
    same({"v": torch.ones(1), "w": torch.ones(2)}, checkpoint.load(tmp_path))
    index.write_text(json.dumps({"weight_map": {"u": "other.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"other\.safetensors is damaged: it has no u, which"):
        checkpoint.load(tmp_path)
    for bad in ("../other.safetensors", "/etc/passwd", ".safetensors", "a/b.safetensors"):
        index.write_text(json.dumps({"weight_map": {"w": bad}}))
        with pytest.raises(CheckpointError, match="is damaged: it names a file"):
            checkpoint.load(tmp_path)
    for text in ("", "[]", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load(tmp_path)
    with pytest.raises(ObjectMissingError, match="no checkpoint is here"):
        checkpoint.load(tmp_path / "nothing")


def header(**entries: Any) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "empty": b"",
    "short": b"1234",
    "long header": struct.pack("<Q", 1 << 60) + b"{}",
    "header beyond": struct.pack("<Q", 100) + b"{}",
    "no JSON": struct.pack("<Q", 2) + b"{]",
    "no object": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "no entry": header(a=[1]),
    "negative": header(a=entry("F32", [-1], 0, 4)) + bytes(4),
    "other length": header(a=entry("F32", [2], 0, 4)) + bytes(4),
    "beyond": header(a=entry("F32", [4], 0, 16)) + bytes(8),
    "backwards": header(a=entry("F32", [0], 8, 0)) + bytes(8),
    "overlap": header(a=entry("F32", [1], 0, 4), b=entry("F32", [1], 0, 4)) + bytes(4),
    "gap": header(a=entry("F32", [1], 4, 8)) + bytes(8),
    "endless": header(a=entry("F32", [1 << 62, 1 << 62], 0, 4)) + bytes(4),
    "overflow": header(a=entry("F32", [1 << 80], 0, 4)) + bytes(4),
    "endless and empty": header(a=entry("F32", [0, 1 << 61], 0, 0)),
    "many dimensions": header(a=entry("F32", [1] * 40, 0, 4)) + bytes(4),
    "trailing": header(a=entry("F32", [1], 0, 4)) + bytes(5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        checkpoint.load(path)


def test_dtypes_that_torch_lacks(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(header(a=entry("F4", [2], 0, 1)) + b"1")
    with pytest.raises(CheckpointError, match="a is of dtype F4, which is none of BOOL"):
        checkpoint.load(path)


GOOD = safetensors({"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)})


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.booleans())
def test_damaged_files_are_refused_or_hold_together(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, cut: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(GOOD[:at] if cut else GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])
    try:
        state = checkpoint.load(path)
    except CheckpointError:
        return
    assert not cut
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    assert held <= len(GOOD)
    assert all(math.prod(tensor.shape) * DTYPES["U8"] <= len(GOOD) for tensor in state.values())
