"""States of one process: saved and loaded with the store alone, by exactly the bytes that are needed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

import fastload
from fastload import checkpoint
from fastload.checkpoint import attempts, single, values, writing
from fastload.checkpoint import values as tensors
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.reading import Range, Wanted, ranges
from fastload.checkpoint.records import Object, Part, object_name
from fastload.checkpoint.segments import BLOCK_BYTES, Piece, checksums, lay_out
from fastload.checkpoint.writing import store_segments
from fastload.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointExistsError,
    ConfigError,
    ObjectMissingError,
)
from fastload.store import Counters, RequestOptions, StoreOptions, open_store
from tests.conftest import Bucket
from tests.store.test_writes import Careless


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach()).reshape(-1).view(torch.uint8)


def same(one: Any, other: Any) -> None:
    """The same types, and bit-equal."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert bits(one).equal(bits(other))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert type(one) is type(other)
        assert len(one) == len(other)
        for each, another in zip(one, other, strict=True):
            same(each, another)
    else:
        assert type(one) is type(other)
        assert one == other


def model_state() -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 30)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "loader": {"epoch": 1, "seen": [1, 2]},
    }


ODD: dict[str, Any] = {
    "none": None, "big": 1 << 80, "text": "ü", "bytes": b"\x00\xff", "float": float("inf"), "tuple": (1, [2]),
    "empty": {}, "nothing": [], "lists": [[torch.ones(2)], [], [3, {"a": torch.zeros(())}]], "flag": True,
    "keys": {1: torch.arange(3), "1x": 2}, "odd keys": {(1, 2): 3}, "a": {"b": 1, "c.d": 2}, "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "complex": torch.ones(2, dtype=torch.complex128), "sparse": torch.eye(2).to_sparse(), "shape": torch.Size([1, 2]),
}  # fmt: skip


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/run/1" if request.param == "local" else f"{request.getfixturevalue('s3').url}/run/1"


def test_a_trainers_state_comes_back(url: str) -> None:
    state = model_state()
    checkpoint.save(state, url)
    same({**state, "model": dict(state["model"])}, checkpoint.load(url))
    with pytest.raises(CheckpointExistsError, match="pass overwrite=True"):
        checkpoint.save(state, url)
    state["step"] = 8
    checkpoint.save(state, url, overwrite=True)
    assert checkpoint.load(url, names=["step"]) == {"step": 8}


def test_anything_comes_back_as_it_was(tmp_path: Path) -> None:
    checkpoint.save(ODD, tmp_path / "1", overwrite=True)
    found = checkpoint.load(tmp_path / "1")
    same(ODD.pop("sparse").to_dense(), found.pop("sparse").to_dense())
    same(ODD, found)


@pytest.mark.parametrize("dtype", tensors.DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    size = torch.empty(0, dtype=dtype).element_size()
    flat = (torch.arange(24 * size) % (2 if dtype == torch.bool else 256)).to(torch.uint8).view(dtype)
    state = {
        "flat": flat,
        "scalar": flat[3],
        "none": flat[:0].reshape(0, 4),
        "matrix": flat.reshape(4, 6),
        "strided": flat[::2],
    }
    state |= {"transposed": flat.reshape(4, 6).T, "spread": flat[:1].expand(5)}
    checkpoint.save(state, tmp_path / "1")
    same({name: tensor.contiguous() for name, tensor in state.items()}, checkpoint.load(tmp_path / "1"))


def tied_state() -> dict[str, Any]:
    """Of 100,000 bytes, though its tensors have many more."""
    weight, stack = torch.randn(100, 100), torch.randn(10, 500)
    by_rows = {str(number): row for number, row in enumerate(stack)}
    turned, scalar = torch.randn(50, 100).T, torch.tensor(2.0)
    return {
        "rows": by_rows,  # before what they are parts of
        "embedding": weight,
        "head": torch.nn.Parameter(weight),
        "flat": weight.view(-1)[300:700],
        "columns": weight[:, 3:5],  # which do not lie side by side, and are stored apart
        "stack": stack,
        "turned": [turned, turned, turned.T, scalar, scalar],  # of which the one is the other in another order
        "empty": [weight[:0], weight[:0]],
        "other": torch.randn(100).to(torch.bfloat16).view(torch.uint8),
        "conjugate": (found := torch.randn(4, dtype=torch.complex64), found.conj())[1],
        "imaginary": found,
    }


@pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")
@pytest.mark.parametrize("by", ["save", "dcp.save", "dcp.async_save", "dedup"])
def test_tied_weights_are_stored_once_and_filled_where_they_lie(
    tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are apart when they are loaded: what is done to one is not done to others."""
    monkeypatch.setattr("fastload.checkpoint.writing.SMALL_BYTES", 0)  # also what goes by the service
    state, url = tied_state(), tmp_path / "run" / "1"
    with fastload.Cache(tmp_path / "cache", ram_bytes="1MiB", disk_bytes="1MiB", chunk_bytes="64KiB") as cache:
        if by == "save":
            checkpoint.save(state, url, cache=cache)
        elif by == "dedup":
            checkpoint.Run(tmp_path / "run", dedup=True, cache=cache).save(1, state)
        else:
            saving = getattr(dcp, by.removeprefix("dcp."))(state, storage_writer=checkpoint.Writer(url, cache=cache))
            state["embedding"].add_(0) if by == "dcp.save" else saving.result()
    stored = sum(path.stat().st_size for path in url.glob("*/*.safetensors"))
    assert 100_000 < stored < 106_000
    same(found := checkpoint.load(url), state)
    before = found["flat"].clone(), found["rows"]["3"].clone()
    for name in ("embedding", "head", "stack"):
        found[name].zero_()
    same([found["flat"], found["rows"]["3"]], list(before))
    into = torch.zeros(100, 100)
    checkpoint.load(url, into={"embedding": into, "head": into})
    assert into.equal(state["embedding"])
    assert next(checkpoint.stream(url, names=["head"]))[1].equal(state["head"])
    with attempts.opened(url, None) as place:
        there = attempts.contents(place)
    assert sum(each.size for each in there.objects) == stored


def test_lazily_conjugated_tensors(tmp_path: Path) -> None:
    tensor = torch.tensor([1 + 2j], dtype=torch.complex64)
    checkpoint.save({"conj": tensor.conj(), "imag": tensor.conj().imag}, tmp_path / "1")
    found = checkpoint.load(tmp_path / "1")
    assert found["conj"].tolist() == [1 - 2j]
    assert found["imag"].tolist() == [-2.0]
    tensor.zero_()
    checkpoint.load(
        tmp_path / "1", into={"conj": tensor.conj(), "imag": torch.zeros(1, dtype=torch.complex64).conj().imag}
    )
    assert tensor.tolist() == [1 + 2j]


def test_a_state_is_filled_in_place(url: str) -> None:
    saved, into = model_state(), model_state()
    checkpoint.save(saved, url)
    parameter = torch.nn.Parameter(torch.zeros(20, 30))
    into["model"] = {**into["model"], "0.weight": parameter, "0.bias": torch.zeros(20, 2).T[0]}
    strided = into["model"]["0.bias"]
    into["step"], into["loader"] = 0, {"seen": [0, 0]}
    found = checkpoint.load(url, into=into)
    assert found is into
    assert found["model"]["0.weight"] is parameter
    assert found["model"]["0.bias"] is strided
    del saved["loader"]["epoch"]
    same(
        {**saved, "model": dict(saved["model"])}, {**found, "model": {**found["model"], "0.weight": parameter.detach()}}
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"w": torch.zeros(3)}, r"w is torch.float32 of shape \(4,\), and into= has torch.float32 of shape \(3,\)"),
        (
            {"w": torch.zeros(4, dtype=torch.float64)},
            r"w is torch.float32 of shape \(4,\), and into= has torch.float64",
        ),
        ({"w": torch.zeros(4).to_sparse()}, r"into= has torch.float32 of shape .* \(torch.sparse_coo\)"),
        ({"w": 1}, "w is a tensor, and into= has a int there"),
        ({"step": torch.zeros(())}, "step is a int, and into= has a tensor there"),
        ({"z": torch.zeros(4)}, "z is torch.complex128 of shape .*, and into= has torch.float32 of"),
        ({"z": 1}, "z is a tensor, and into= has a int there"),
        ({"v": torch.zeros(4)}, r"has no v \(1 of 2 are missing\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_filled(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    saved = {"w": torch.ones(4), "x": torch.ones(4), "step": 1, "z": torch.ones(4, dtype=torch.complex128)}
    checkpoint.save(saved, tmp_path / "1")
    into = {"x": torch.zeros(4), **changes}
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(tmp_path / "1", into=into)
    assert into["x"].sum() == 0


@pytest.mark.parametrize(
    ("leaf", "said"),
    [
        (torch.zeros(1).expand(4), "w is expanded"),
        (torch.zeros(4, device="meta"), "w is on the meta device"),
        (torch.nn.UninitializedParameter(), "w is a parameter without a shape yet"),
        (torch.zeros(4).as_subclass(type("Masked", (torch.Tensor,), {})), "w is a Masked"),
    ],
)
def test_tensors_that_cannot_be_filled(tmp_path: Path, leaf: torch.Tensor, said: str) -> None:
    checkpoint.save({"x": torch.ones(4), "w": torch.ones(4)}, tmp_path / "1")
    into = {"x": torch.zeros(4), "w": leaf}
    with pytest.raises(ConfigError, match=f"into: {said}"):
        checkpoint.load(tmp_path / "1", into=into)
    assert into["x"].sum() == 0


def test_tensors_of_other_dtypes_and_layouts_are_loaded_into_a_state(tmp_path: Path) -> None:
    saved = {"z": torch.randn(3, 2, dtype=torch.complex128), "sparse": torch.eye(3).to_sparse(), "other": 1}
    checkpoint.save(saved, tmp_path / "1")
    z = torch.zeros(2, 3, dtype=torch.complex128).T
    into = {"z": z, "sparse": torch.zeros(3, 3).to_sparse()}
    checkpoint.load(tmp_path / "1", into=into)
    assert into["z"] is z
    assert z.equal(saved["z"])
    assert into["sparse"].to_dense().equal(torch.eye(3))


def test_names(tmp_path: Path) -> None:
    checkpoint.save({"a": {"b": torch.ones(2), "c": 1}, "ab": 2, "list": [3, 4, 5]}, tmp_path / "1")
    same({"a": {"b": torch.ones(2), "c": 1}}, checkpoint.load(tmp_path / "1", names=["a"]))
    same({"a": {"c": 1}, "list": [4]}, checkpoint.load(tmp_path / "1", names={"a.c", "list.1"}))
    with pytest.raises(CheckpointError, match=r"has no a\.d; it has a\.b, a\.c, ab and so on"):
        checkpoint.load(tmp_path / "1", names=["a.d"])
    with pytest.raises(ConfigError, match="names= is of no use with into="):
        checkpoint.load(tmp_path / "1", into={}, names=["a"])


class Counted(str):
    """A name that counts how often such are looked at."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        Counted.looks += 1
        return str.__hash__(self)


@pytest.mark.parametrize("some", [None, 100])
def test_names_are_looked_at_once_and_not_once_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, some: int | None
) -> None:
    state = {f"{number}": number if number % 2 else torch.ones(1) for number in range(500)}
    checkpoint.save(state, tmp_path / "1")
    counted = [Counted(name) for name in state]
    monkeypatch.setattr(single, "paths_of", lambda *_: {name: (name,) for name in counted})
    names = None if some is None else counted[:some]
    Counted.looks = 0
    assert len(checkpoint.load(tmp_path / "1", names=names)) == (some or 500)
    assert Counted.looks < 20 * len(state)


def nested(depth: int) -> Any:
    state: Any = 1
    for _ in range(depth):
        state = {"a": state}
    return state


CYCLE: dict[str, Any] = {"w": torch.ones(1)}
CYCLE["self"] = CYCLE


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"a": {"b": 1}, "a.b": 2}, r"would be called 'a\.b'"),
        ({"w": torch.ones(2).as_subclass(type("Masked", (torch.Tensor,), {}))}, "w is a Masked"),
        ({"w": torch.nn.UninitializedParameter()}, "w is a parameter without a shape yet"),
        ({"w": torch.ones(2, device="meta")}, "w is on the meta device"),
        ({"w": torch.nn.Parameter(torch.ones(2, device="meta"))}, "w is on the meta device"),
        ({"a": {"f": lambda: 1}}, r"a\.f is a function that cannot be pickled \(PicklingError: "),
        ({"a": (1, Path.cwd, lambda: 1)}, "a is a tuple that cannot be pickled"),
        ({"a": {"\ud800": 1}}, r"the name 'a\.\\ud800' is no Unicode \(surrogates not allowed\)"),
        (CYCLE, r"self\.self\.self and so on nests more than 200 levels deep, or in itself"),
        (nested(201), r"a\.a\.a and so on nests more than 200 levels"),
        (nested(100_000), r"a\.a\.a and so on nests more than 200 levels"),
        ({"a": {1.5: nested(100_000)}}, r"a is a dict that cannot be pickled \(RecursionError"),
        ({"a": 1, 1.5: 2}, r"the key 1\.5 is a float"),
        ({1 << 64: 2}, "the key 18446744073709551616 is a int"),
        (torch.ones(2), "a Tensor has no names; put it into a dict"),
    ],
)
def test_states_that_cannot_be_saved(tmp_path: Path, state: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^state: .*{said}"):
        checkpoint.save(state, tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_states_at_the_limits(tmp_path: Path) -> None:
    state = {
        "deep": nested(199),
        "text": "\ud800",
        "large": {(1 << 64) - 1: 1, -(1 << 63): 2},
        "odd": {1 << 64: {"a": 1}},
    }
    checkpoint.save(MappingProxyType(state), tmp_path / "1")
    same(state, checkpoint.load(tmp_path / "1"))


def test_an_unknown_level_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^until='disc' must be"):
        checkpoint.save({"f": lambda: 1}, tmp_path / "1", until="disc")  # type: ignore[arg-type]
    assert not (tmp_path / "1").exists()


def test_no_checkpoint_is_there(tmp_path: Path) -> None:
    with pytest.raises(ObjectMissingError, match="no checkpoint is here"):
        checkpoint.load(tmp_path / "1")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_no_tensor_may_not_be_larger_than_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "VALUES_BYTES_MAX", 1 << 20)
    state = {"w": torch.ones(2), "small": b"x", "cache": {"large": bytes(1 << 20)}}
    said = r"what is no tensor comes to 1\.0 MiB, most of it cache\.large with 1\.0 MiB"
    with pytest.raises(ConfigError, match=said):
        checkpoint.save(state, tmp_path / "1")
    assert not (tmp_path / "1").exists()
    with pytest.raises(CheckpointException, match=said):
        dcp.save(state, storage_writer=checkpoint.Writer(tmp_path / "2"), no_dist=True)
    assert not list((tmp_path / "2").rglob("*.safetensors"))


def test_stores_that_do_not_keep_to_conditions_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec = pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match="fsspec, which has no conditional writes"):
        checkpoint.save({"w": torch.ones(2)}, "memory://refused/1")
    assert fsspec.filesystem("memory").find("memory://refused") == []
    monkeypatch.setattr(attempts, "open_store", lambda *_: Careless("If-Match"))
    with pytest.raises(ConfigError, match="this store ignores If-Match, so that two writers"):
        checkpoint.save({"w": torch.ones(2)}, tmp_path / "run" / "1")
    assert list(tmp_path.rglob("*.*")) == []


class Mine:
    """Of a class that torch reads only where pickles are allowed."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mine)

    __hash__ = None  # type: ignore[assignment]


class Pair(NamedTuple):
    one: int
    two: int


def test_pickles_are_read_where_they_are_allowed(tmp_path: Path) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"mine is a pickle \(of \S+\.Mine\): to load .*allow_pickle=True"
    ) as warned:
        checkpoint.save({"mine": Mine(), "plain": OrderedDict(a=1)}, tmp_path / "1")
    assert [each.filename for each in warned] == [__file__]
    assert checkpoint.load(tmp_path / "1", names=["plain"]) == {"plain": {"a": 1}}
    with pytest.raises(
        CheckpointError, match=r"^pass allow_pickle=True to load \S+/mine, .* it is a pickle \(of \S+\.Mine\)"
    ):
        checkpoint.load(tmp_path / "1")
    assert checkpoint.load(tmp_path / "1", allow_pickle=True)["mine"] == Mine()


@pytest.mark.parametrize(
    "leaf",
    [Pair(1, 2), (1, Pair(1, 2)), np.datetime64("2026-01-01"), np.array([None]), np.zeros(2, "U3"), {1.5: Mine()}],
)
def test_a_warning_says_that_a_leaf_is_a_pickle(tmp_path: Path, leaf: Any) -> None:
    with pytest.warns(RuntimeWarning, match=r"state: a\.b is a pickle"):
        checkpoint.save({"a": {"b": leaf}}, tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"pass allow_pickle=True to load \S+/a\.b"):
        checkpoint.load(tmp_path / "1")
    checkpoint.load(tmp_path / "1", allow_pickle=True)


def test_numpys_arrays_and_scalars(tmp_path: Path) -> None:
    np.random.seed(3)
    kinds = "?", "i1", "u1", "<i2", ">u4", "i8", "u8", "f2", "f4", ">f8", "c8", "c16"
    arrays = {kind: np.arange(6).reshape(3, 2).astype(kind) for kind in kinds}
    scalars = {f"{kind} scalar": array.ravel()[1] for kind, array in arrays.items()}
    shapes = {"none": np.zeros((0, 3)), "point": np.array(2.5), "strided": np.arange(12.0).reshape(3, 4).T[::2]}
    state = {
        **arrays,
        **scalars,
        **shapes,
        "rng": np.random.get_state(),
        "deep": ([np.float64(2.5)], {"a": (np.ones(2),)}),
    }
    checkpoint.save(state, tmp_path / "1")
    found = checkpoint.load(tmp_path / "1")
    for name in (*arrays, *scalars, *shapes):
        assert type(found[name]) is type(state[name])
        assert (found[name].dtype, found[name].shape) == (state[name].dtype, state[name].shape)
        np.testing.assert_array_equal(found[name], state[name])
    assert found["none"].flags.writeable
    expected = np.random.random(5)
    np.random.set_state(found["rng"])
    np.testing.assert_array_equal(np.random.random(5), expected)
    assert type(found["deep"][0][0]) is np.float64
    np.testing.assert_equal(found["deep"], state["deep"])


def extension(code: int, *fields: Any) -> bytes:
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(code, msgspec.msgpack.encode(fields)))


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("msgpack", b"\xc1"),
        ("msgpack", b"\x91" * 100_000),
        ("msgpack", extension(4, "<f8", bytes(8))),
        ("msgpack", extension(3, "|O", bytes(8))),
        ("msgpack", extension(3, "<f8", bytes(7))),
        ("msgpack", extension(3, "<f8", bytes(16))),
        ("msgpack", extension(2, "<f8", (3,), bytes(16))),
        ("msgpack", extension(2, "<f8", (1 << 62, 1 << 62), bytes(16))),
        ("msgpack", extension(2, "<f8", (1,) * 100, bytes(8))),
        ("msgpack", extension(2, "V8", (1,), bytes(8))),
        ("msgpack", msgspec.msgpack.encode(msgspec.msgpack.Ext(1, b"\x01"))),
        ("torch", b"PK\x03\x04none"),
        ("torch", b""),
    ],
)
def test_values_that_are_damaged_are_so_whether_pickles_are_allowed_or_not(encoding: str, data: bytes) -> None:
    with pytest.raises(CheckpointDamagedError, match="here is damaged") as caught:
        values.decoded(encoding, data, "here", allow_pickle=False)
    assert "allow_pickle" not in str(caught.value)
    with pytest.raises(CheckpointError, match="here"):
        values.decoded(encoding, data, "here", allow_pickle=True)


# Bytes


def test_only_what_is_needed_is_read(s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.full((1 << 18,), number) for number in range(20)}  # 2 MiB each
    with fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0) as cache:
        checkpoint.save(state, f"{s3.url}/1", cache=cache)
    counters = Counters()
    monkeypatch.setattr(
        attempts, "open_store", lambda url, options: open_store(url, options, RequestOptions(counters=counters))
    )
    found = checkpoint.load(f"{s3.url}/1", names=["3", "17"], cache=tmp_path / "none")
    assert [int(found[name][-1]) for name in ("3", "17")] == [3, 17]
    assert 4 << 20 <= counters.values()["bytes"] <= (4 << 20) + 4 * BLOCK_BYTES + 10_000
    assert counters.values()["requests"] <= 8


def test_large_tensors_are_in_several_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SEGMENT_BYTES", 1 << 20)
    state = {"w": torch.randn(1000, 1000), "b": torch.randn(5)}
    checkpoint.save(state, tmp_path / "1")
    assert len(list((tmp_path / "1").rglob("*.safetensors"))) == 4
    same(state, checkpoint.load(tmp_path / "1"))


def test_what_ranks_have_saved_by_columns(tmp_path: Path) -> None:
    """A piece that is not contiguous in its tensor."""
    whole = torch.arange(24.0).reshape(4, 6)
    with contextlib.closing(open_store(str(tmp_path), StoreOptions())) as store:
        place = Place.of(store, f"{tmp_path}/1")
        plan = attempts.begin(place, 2, overwrite=False, now_s=0)
        for rank in range(2):
            (segment,) = lay_out([Piece("w", "F32", (4, 6), Box((0, 3 * rank), (4, 3)))])
            data = segment.header + whole[:, 3 * rank : 3 * rank + 3].contiguous().numpy().tobytes()
            store.put(place.folder + object_name(plan.attempt, rank, 0), data)
            attempts.finish_rank(place, Part.of(plan.attempt, rank, [(segment, checksums([memoryview(data)]))]))
        attempts.commit(place, plan.attempt)
    same({"w": whole}, checkpoint.load(tmp_path / "1"))
    into = {"w": torch.zeros(6, 4).T}
    same({"w": whole}, checkpoint.load(tmp_path / "1", into=into))


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    state = {"w": torch.randn(100_000), "step": 1}
    checkpoint.save(state, tmp_path / "1")
    for path in (tmp_path / "1").rglob("*"):
        if path.is_dir() or path.name == "plan.json":  # of which a reader needs nothing
            continue
        good = path.read_bytes()
        for at in np.random.default_rng(3).integers(0, len(good), 12).tolist():
            bad = bytearray(good)
            bad[at] ^= 4
            path.write_bytes(bad)
            with pytest.raises(CheckpointError, match="is damaged"):
                checkpoint.load(tmp_path / "1")
        path.write_bytes(good)
    same(state, checkpoint.load(tmp_path / "1"))


def test_a_block_that_was_damaged_on_its_way_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": torch.randn(100_000)}
    checkpoint.save(state, tmp_path / "1")
    damaged = []

    def flawed(url: str, options: StoreOptions) -> Any:
        store = open_store(url, options)
        read: Callable[..., None] = store.read_into

        def read_into(info: Any, start: int, out: memoryview) -> None:
            read(info, start, out)
            if info.url.endswith(".safetensors") and not damaged:
                damaged.append(start)
                out[100] ^= 1

        monkeypatch.setattr(store, "read_into", read_into)
        return store

    monkeypatch.setattr(attempts, "open_store", flawed)
    same(state, checkpoint.load(tmp_path / "1"))
    assert damaged == [0]


# Which ranges


def objects() -> list[Object]:
    return [Object(name, size, b"sums") for name, size in (("a", 5 * BLOCK_BYTES), ("b", 40 * BLOCK_BYTES + 7))]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10**9), st.integers(0, 10**6)), max_size=12),
    st.sampled_from([0, BLOCK_BYTES, 1 << 30]),
    st.sampled_from([BLOCK_BYTES, 4 * BLOCK_BYTES, 1 << 30]),
)
def test_ranges_cover_what_is_wanted_and_little_more(asked: list[tuple[int, int, int]], gap: int, most: int) -> None:
    wanted = []
    for number, start, length in asked:
        held_in = objects()[number]
        start %= held_in.size
        length = min(length, held_in.size - start)
        wanted.append(Wanted(held_in, start, memoryview(bytearray(length)), lambda: None))
    found: list[Range] = list(ranges(wanted, gap, most))
    for each in found:
        assert each.start % BLOCK_BYTES == 0
        assert each.end % BLOCK_BYTES == 0 or each.end == each.object.size
        assert 0 < each.end - each.start <= most
        for part in each.wanted:
            assert part.object == each.object
            assert part.start < each.end
            assert part.end > each.start
    for before, after in pairwise(found):
        assert before.object.name < after.object.name or before.end <= after.start  # none is read twice
    for each in wanted:
        got = sum(
            max(0, min(each.end, part.end) - max(each.start, part.start))
            for part in found
            if any(each is one for one in part.wanted)
        )
        assert got == len(each.out)
    if gap == 0:
        needed = {
            (each.object.name, block)
            for each in wanted
            if len(each.out)
            for block in range(each.start // BLOCK_BYTES, (each.end - 1) // BLOCK_BYTES + 1)
        }
        read = sum(-(-(each.end - each.start) // BLOCK_BYTES) for each in found)
        assert read == len(needed)


def test_neither_format_nor_commit_imports_torch() -> None:
    code = (
        "import sys, fastload.checkpoint.attempts, fastload.checkpoint.reading, fastload.checkpoint.flattening\n"
        "assert 'torch' not in sys.modules\n"
        "from fastload.checkpoint import save\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranks_store_parts_of_a_tensor(tmp_path: Path) -> None:
    """Each is handed what it holds of it, of which a piece may be a part."""
    whole = torch.arange(24.0).reshape(6, 4)
    place = Place.of(open_store(str(tmp_path), StoreOptions()), str(tmp_path / "1"))
    plan = attempts.begin(place, 2, overwrite=False, now_s=0)
    for rank, held in enumerate([Box((0, 0), (3, 4)), Box((2, 0), (4, 4))]):
        piece = Piece("w", "F32", (6, 4), Box((3 * rank, 0), (3, 4)))
        tensor = whole[held.within(Box.whole((6, 4)))].clone()
        stored = store_segments(place, plan.attempt, rank, list(lay_out([piece], 32)), {"w": [(tensor, held)]})
        attempts.finish_rank(place, Part.of(plan.attempt, rank, stored))
    attempts.commit(place, plan.attempt)
    same({"w": whole}, checkpoint.load(tmp_path / "1"))
