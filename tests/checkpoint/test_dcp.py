"""torch.distributed.checkpoint with our writer and reader, in one process."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import fastload
from fastload import checkpoint
from fastload.checkpoint import Reader, Writer, attempts, distcp, strided, writing
from fastload.checkpoint.dcp_writer import deal
from fastload.checkpoint.images import Image, Images
from fastload.checkpoint.records import Object
from fastload.checkpoint.staging import Layout, stage
from fastload.checkpoint.strided import Strided, dense, runs
from fastload.checkpoint.writing import images_of
from fastload.errors import CheckpointError, WaitTimeoutError
from fastload.store import Counters, RequestOptions, open_store
from tests.checkpoint.test_carried import SMALL
from tests.checkpoint.test_single import same
from tests.conftest import Bucket
from tests.patience import PATIENCE_S
from tests.processes import until

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:torch.distributed is unavailable"),
]


def state_of(seed: int) -> dict[str, Any]:
    """Of a trainer; with seed 0 what it is before it is loaded."""
    torch.manual_seed(seed)
    return {
        "model": {"w": torch.randn(30, 20), "b": torch.randn(5), "scalar": torch.randn(()), "none": torch.zeros(0, 4)},
        "optimizer": {
            "state": [{"m": torch.randn(3)}, {"m": torch.randn(4)}],
            "rates": [0.1 * seed, [seed]],
            "n": seed,
        },
        "half": torch.randn(7, 3).to(torch.bfloat16),
        "strided": torch.randn(4, 6).T,
        "complex": torch.randn(2, dtype=torch.complex128),
        "tuple": (seed, "a"),
    }


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{tmp_path}/run/1" if request.param == "local" else f"{request.getfixturevalue('s3').url}/run/1"


def loaded(url: object, **options: Any) -> dict[str, Any]:
    state = state_of(0)
    dcp.load(state, storage_reader=Reader(url, **options))
    return state


def test_a_state_comes_back(url: str) -> None:
    dcp.save(state_of(1), storage_writer=Writer(url))
    same(state_of(1), loaded(url))
    with pytest.raises(CheckpointException, match="pass overwrite=True"):
        dcp.save(state_of(2), storage_writer=Writer(url))
    same(state_of(1), loaded(url))
    dcp.save(state_of(2), storage_writer=Writer(url, overwrite=True))
    same(state_of(2), loaded(url))


def test_each_of_the_three_ways_reads_the_others(tmp_path: Path) -> None:
    dcp.save(state_of(1), storage_writer=Writer(tmp_path / "ours"))
    same(state_of(1), checkpoint.load(tmp_path / "ours"))
    checkpoint.save(state_of(2), tmp_path / "single")
    same(state_of(2), loaded(tmp_path / "single"))
    dcp.save(state_of(3), storage_writer=dcp.FileSystemWriter(tmp_path / "torchs"))
    same(state_of(3), loaded(tmp_path / "torchs"))
    found = checkpoint.load(tmp_path / "torchs")
    same(state_of(3), {name: found[name] for name in state_of(3)})
    names = [name for name, _ in checkpoint.stream(tmp_path / "torchs")]
    assert len(names) == len(set(names)) == 7


def test_files_of_other_tools(tmp_path: Path) -> None:
    """A folder of safetensors files, and one of them; and a step of which most lies with the step before."""
    state = {"model": {"w": torch.randn(30, 20), "b": torch.arange(5.0)}}
    run = checkpoint.Run(tmp_path / "run", dedup=True)
    run.save(1, state)
    state["model"]["b"] += 1
    run.save(2, state)
    (segment,) = (tmp_path / "run" / "1").glob("*/*.safetensors")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "model.safetensors").write_bytes(segment.read_bytes())
    for url, change in (("run/2", 0), ("hub", -1), ("hub/model.safetensors", -1)):
        flat = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in state["model"].items()}
        dcp.load(flat, storage_reader=Reader(tmp_path / url))
        same({"model.w": state["model"]["w"], "model.b": state["model"]["b"] + change}, flat)


def test_names_that_are_loaded_alone(tmp_path: Path) -> None:
    """By torch's planner that makes the state from what it finds."""
    checkpoint.save(state_of(1), tmp_path / "1")
    same(state_of(1), _load_state_dict_from_keys(storage_reader=Reader(tmp_path / "1")))
    found = _load_state_dict_from_keys({"model.w"}, storage_reader=Reader(tmp_path / "1"))
    same({"model": {"w": state_of(1)["model"]["w"]}}, found)


class Unsafe:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


class Plain:
    """A class of the user's."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain)


def test_pickles_run_only_where_they_are_trusted(tmp_path: Path) -> None:
    for number, writer in enumerate([Writer(tmp_path / "0"), dcp.FileSystemWriter(tmp_path / "1")]):
        dcp.save({"x": Unsafe(), "y": 1}, storage_writer=writer)
        with pytest.raises(CheckpointException, match="pass allow_pickle=True"):
            dcp.load({"x": None, "y": 0}, storage_reader=Reader(tmp_path / str(number)))
        rest: dict[str, Any] = {"y": 0}
        dcp.load(rest, storage_reader=Reader(tmp_path / str(number)))
        assert rest == {"y": 1}
    dcp.save({"x": Plain()}, storage_writer=Writer(tmp_path / "2"))
    trusted: dict[str, Any] = {"x": None}
    dcp.load(trusted, storage_reader=Reader(tmp_path / "2", allow_pickle=True))
    assert trusted == {"x": Plain()}


def test_what_a_planner_keeps_of_its_own_is_not_saved_in_silence(tmp_path: Path) -> None:
    class Keeping(DefaultSavePlanner):
        def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
            plans, metadata = super().create_global_plan(all_plans)
            metadata.planner_data["mine"] = 3
            return plans, metadata

    with pytest.warns(RuntimeWarning, match=r"planner_data.* is not saved; keep it in the state"):
        dcp.save(
            {"a": torch.ones(3)}, storage_writer=checkpoint.Writer(tmp_path / "a"), planner=Keeping(), no_dist=True
        )


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointException, match=r"no checkpoint is here \(manifest.json, torch's .metadata, or files"
    ):
        dcp.load({"x": 1}, storage_reader=Reader(tmp_path / "none"))
    dcp.save({"w": torch.ones(2, 3)}, storage_writer=Writer(tmp_path / "1"))
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict: v"):
        dcp.load({"v": torch.ones(2)}, storage_reader=Reader(tmp_path / "1"))
    with pytest.raises(CheckpointException, match="Size mismatch"):
        dcp.load({"w": torch.ones(2)}, storage_reader=Reader(tmp_path / "1"))


def test_other_dtypes_devices_and_strides_are_filled_in_place(tmp_path: Path) -> None:
    dcp.save({"w": torch.arange(12.0).reshape(3, 4)}, storage_writer=Writer(tmp_path / "1"))
    for target in (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 3).T, torch.nn.Parameter(torch.zeros(3, 4))):
        state = {"w": target}
        dcp.load(state, storage_reader=Reader(tmp_path / "1"))
        assert state["w"] is target
        assert target.tolist() == torch.arange(12.0).reshape(3, 4).tolist()


# Staging


@pytest.mark.parametrize("overlap", [False, True])
def test_training_goes_on_while_a_copy_is_saved(tmp_path: Path, overlap: bool) -> None:
    for number in range(1, 5):
        state = state_of(number)
        saving = dcp.async_save(state, storage_writer=Writer(tmp_path / str(number), overlap=overlap))
        if overlap:
            saving.staging_completion.result()
            saving = saving.upload_completion
        state["model"]["w"].zero_()
        saving.result()
        same(state_of(number), loaded(tmp_path / str(number)))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[fastload.Cache]:
    with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
        yield cache


def copied(images: Images, state: dict[str, Any], timeout_s: float = PATIENCE_S) -> dict[str, Any]:
    return stage(state, Layout.of(state), images, 1 << 30, timeout_s)


def test_memory_is_used_again_and_does_not_grow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fastload.checkpoint.images._SAID_AFTER_S", 0.0)
    images = Images()
    address = copied(images, {"w": torch.ones(2000)})["w"].data_ptr()
    smaller = copied(images, {"w": torch.ones(100), "b": torch.zeros(3)})
    assert smaller["w"].data_ptr() == address
    other = copied(images, {"w": torch.ones(3000)})
    assert not address <= other["w"].data_ptr() < address + (1 << 20)
    with pytest.raises(WaitTimeoutError, match=r"gave up after 0\.1 s .*states .* staged are still in use \(2\)"):
        copied(images, {"w": torch.ones(1)}, 0.1)
    assert caplog.text.count("this save waits for memory: ") == 1
    kept = smaller["b"]  # one tensor keeps all of it
    del smaller
    with pytest.raises(WaitTimeoutError, match="wait for the futures"):
        copied(images, {"w": torch.ones(1)}, 0.1)
    assert kept.tolist() == [0, 0, 0]
    del kept
    assert copied(images, {"w": torch.ones(1)})["w"].tolist() == [1]


def test_memory_that_only_garbage_refers_to_is_used_again() -> None:
    images, state = Images(), {"w": torch.ones(1000)}
    gc.disable()
    try:
        for _ in range(2):
            cycle: list[Any] = [copied(images, state)]
            cycle.append(cycle)
        del cycle
        same({"w": torch.ones(1000)}, dict(copied(images, state)))
    finally:
        gc.enable()


def test_what_is_staged_is_read_only_and_given_back() -> None:
    """A stray write ends the process, in place of spoiling a checkpoint."""

    def permissions() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line.split()[1] for line in lines if "memfd:fastload-image" in line]

    images = Images()
    state = copied(images, {"w": torch.ones(1000)})
    assert permissions() == ["r--s"]
    images.give_back()
    assert permissions() == ["r--s"]
    del state
    images.give_back()
    assert permissions() == []


def test_what_is_staged_is_saved_from_where_it_lies(
    tmp_path: Path, cache: fastload.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is copied again, but for parts of a tensor that is larger than a segment, which get headers."""
    moved: list[int] = []

    def move(image: Image, moves: list[tuple[int, int, int]]) -> None:
        moved.append(sum(length for _, _, length in moves))
        move_really(image, moves)

    move_really = Image.move
    monkeypatch.setattr(Image, "move", move)
    monkeypatch.setattr(writing, "_fill", None)
    images = images_of(cache._handle)
    for number, large in ((1, 0), (2, 0), (3, 3)):
        if large:
            monkeypatch.setattr("fastload.checkpoint.staging.SEGMENT_BYTES", 4 << 20)
            monkeypatch.setattr(writing, "SEGMENT_BYTES", 4 << 20)
        state = {**state_of(number), "large": torch.randn(1000 * number, 3001), "i": torch.arange(5)}
        writer = Writer(tmp_path / str(number), cache=cache, until="memory")
        dcp.async_save(state, storage_writer=writer).result()
        assert writer.saving is not None
        writer.saving.wait("store", PATIENCE_S)
        same(state, checkpoint.load(tmp_path / str(number)))
        assert len(images._images) == 1
        del state
        writer.close()
    assert moved[:2] == [0, 0]
    assert 0 < moved[2] < 4 * 9003000
    names = sorted((tmp_path / "3").glob("*/*.safetensors"))
    assert len(names) > 8
    assert all(checkpoint.load(name) for name in names)  # each is a file of its own


class Changing(DefaultSavePlanner):
    """Saves something else."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        return found * 2 if index.fqn == "large" else found


def test_what_a_planner_makes_of_it_is_saved(tmp_path: Path, cache: fastload.Cache) -> None:
    """It does not lie in memory that was staged; and several such saves do not wait for each other's."""
    state = {"large": torch.ones(1000, 3000), "other": torch.arange(7.0)}
    futures = [
        dcp.async_save(
            state, storage_writer=Writer(tmp_path / str(number), cache=cache, until="memory"), planner=Changing()
        )
        for number in range(2)
    ]
    for future in futures:
        future.result()
    until(lambda: all((tmp_path / str(number) / "manifest.json").exists() for number in range(2)))
    for number in range(2):
        same({**state, "large": state["large"] * 2}, checkpoint.load(tmp_path / str(number)))


@pytest.mark.parametrize("save", [dcp.save, dcp.async_save])
def test_dedup(tmp_path: Path, cache: fastload.Cache, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SMALL_BYTES", 0)
    state = {"w": torch.randn(1000, 3000), "b": torch.randn(7), "n": 3, "tied": torch.zeros(0)}
    state["tied"] = state["w"]
    sizes, run = [], tmp_path / "run"
    for step in (0, 1, 2):
        state["w"][500, 7] = step
        writer = Writer(run / str(step), cache=cache, dedup=True)
        saving = save(state, storage_writer=writer)
        if save is dcp.async_save:
            saving.result()
        del saving
        same(state, checkpoint.load(run / str(step)))
        sizes.append(sum(path.stat().st_size for path in (run / str(step)).glob("*/*.safetensors")))
    assert 12_000_000 < sizes[0] < 12_100_000
    assert all(500_000 < size < 600_000 for size in sizes[1:])
    with pytest.raises(CheckpointException, match=r"the last part of the URL is a step's number, as in run/1200"):
        dcp.save(state, storage_writer=Writer(run / "last", cache=cache, dedup=True))


def test_a_state_that_was_staged_is_saved_once(tmp_path: Path, cache: fastload.Cache) -> None:
    """What is left of it afterwards is no state any more, where parts of it were moved."""
    half = {"b": torch.ones(1000, 3000)}
    state = {"a": torch.arange(1000.0), **half}
    writer = Writer(tmp_path / "1", cache=cache, until="memory")
    staged = writer.stage(state)
    dcp.save({"b": staged["b"]}, storage_writer=writer)
    with pytest.raises(CheckpointException, match="was staged for another save, which has its memory; stage it anew"):
        dcp.save(staged, storage_writer=Writer(tmp_path / "2", cache=cache))
    assert writer.saving is not None
    writer.saving.wait("store", PATIENCE_S)
    same(half, checkpoint.load(tmp_path / "1"))
    del staged


def test_a_writer_is_sent_to_another_process(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(Writer(tmp_path / "1")))
    dcp.save({"w": torch.ones(2)}, storage_writer=writer)
    found = {"w": torch.zeros(2)}
    dcp.load(found, storage_reader=pickle.loads(pickle.dumps(Reader(tmp_path / "1"))))
    assert found["w"].tolist() == [1, 1]


# Exactly what is needed


def boxes() -> st.SearchStrategy[tuple[list[int], list[int], list[int]]]:
    """Sizes of a piece, and the offsets and sizes of a box in it."""
    axis = st.integers(1, 5).flatmap(
        lambda size: st.integers(0, size - 1).flatmap(
            lambda start: st.integers(1, size - start).map(lambda length: (size, start, length))
        )
    )
    return st.lists(axis, max_size=4).map(
        lambda axes: tuple(map(list, zip(*axes, strict=True))) if axes else ([], [], [])
    )


@given(boxes(), st.integers(0, 30), st.booleans())
def test_a_box_comes_from_its_runs(box: tuple[list[int], list[int], list[int]], gap: int, straight: bool) -> None:
    sizes, offsets, lengths = box
    stored = torch.arange(1.0, 1 + math.prod(sizes)).reshape(sizes)
    data = bytearray(12) + bytearray(stored.numpy().tobytes())
    target = torch.zeros(lengths) if straight else torch.zeros([*lengths, 2])[..., 0]
    with mock.patch.object(strided, "GAP_BYTES", 4 * gap):
        wanted = list(
            Strided(Object("x", len(data), b""), 12, torch.float32, dense(tuple(sizes))).wanted(offsets, target)
        )
    for each in wanted:
        each.out[:] = data[each.start : each.start + len(each.out)]
        each.arrived()
    expected = stored[tuple(slice(a, a + b) for a, b in zip(offsets, lengths, strict=True))]
    assert torch.equal(target, expected)
    needless = sum(len(each.out) for each in wanted) // 4 - expected.numel()
    assert needless <= gap * expected.numel()


def test_rows_and_columns_that_are_requested() -> None:
    assert runs((1000, 1), (8, 1000), 100) == [()]
    assert runs((1000, 1), (8, 10), 1000) == [()]
    assert runs((1000, 1), (8, 10), 100) == [(row,) for row in range(8)]
    assert runs((1, 1000), (8, 10), 100) == [()]  # columns first: only as a whole
    assert runs((), (), 0) == [()]


@given(st.lists(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d"]), st.just(5)), unique=True), min_size=1))
def test_what_several_ranks_have_is_written_by_one(items: list[list[tuple[bytes, int]]]) -> None:
    dealt = deal(items)
    written = [items[rank][number][0] for rank, numbers in enumerate(dealt) for number in numbers]
    assert sorted(written) == sorted({key for own in items for key, _ in own})


@pytest.mark.parametrize("by_torch", [False, True], ids=["ours", "torchs"])
def test_an_eighth_of_the_rows_is_an_eighth_of_the_bytes(
    s3: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_torch: bool
) -> None:
    """Of a tensor of 64 MiB; of torch's also what tells where it lies."""
    tensor = torch.arange(float(1 << 24)).reshape(4096, 4096)
    if by_torch:
        dcp.save({"w": tensor}, storage_writer=dcp.FileSystemWriter(tmp_path / "1"))
        for path in (tmp_path / "1").iterdir():
            s3.put(f"1/{path.name}", path.read_bytes())
    else:
        with fastload.Cache(tmp_path / "cache", **SMALL) as cache:
            dcp.save({"w": tensor}, storage_writer=Writer(f"{s3.url}/1", cache=cache))
    reader = Reader(f"{s3.url}/1", cache=tmp_path / "another cache")
    reader.read_metadata()
    counters = Counters()
    monkeypatch.setattr(
        attempts, "open_store", lambda url, options: open_store(url, options, RequestOptions(counters=counters))
    )
    target = torch.zeros(512, 4096)
    item = ReadItem(
        LoadItemType.TENSOR,
        MetadataIndex("w", (1000, 0)),
        torch.Size((0, 0)),
        MetadataIndex("w", (0, 0)),
        torch.Size((1000, 0)),
        torch.Size((512, 4096)),
    )
    reader.read_data(LoadPlan([item]), Into(target))
    assert torch.equal(target, tensor[1000:1512])
    assert target.nbytes <= counters.values()["bytes"] <= 1.02 * target.nbytes


class Into(dcp.DefaultLoadPlanner):
    """Takes all into one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return self.target


# What torch has written


def test_metadata_of_other_classes_are_refused(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(tmp_path / "1"))
    name = tmp_path / "1" / ".metadata"
    found = pickle.loads(name.read_bytes())
    hostile: list[Any] = [Unsafe(), [1, 2], 3]
    for change in (
        lambda item: setattr(item, "relative_path", "../../etc/passwd"),
        lambda item: setattr(item, "offset", -1),
        lambda item: setattr(item, "length", "long"),
        lambda item: setattr(item, "transform_descriptors", ["stream.zstd/1"]),
    ):
        metadata = copy.deepcopy(found)
        change(next(iter(metadata.storage_data.values())))
        hostile.append(metadata)
    hostile[3:3] = [copy.deepcopy(found)]
    hostile[3].planner_data = Unsafe()
    for metadata in hostile:
        name.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match=r"\.metadata is damaged, or no metadata of a torch checkpoint"):
            Reader(tmp_path / "1").read_metadata()
    name.write_bytes(pickle.dumps(found)[:-10])
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        Reader(tmp_path / "1").read_metadata()


ODD_TENSORS = {
    "transposed": torch.arange(20_000.0).reshape(100, 200).T,
    "a part of a larger one": torch.arange(50_000.0)[30_000:],
    "conjugated": torch.arange(5_000).to(torch.complex64).conj(),
    "eight bits": torch.arange(5_000).to(torch.float8_e4m3fn),
    "unsigned": torch.arange(5_000).to(torch.uint16),
    "parameter": torch.nn.Parameter(torch.arange(5_000.0)),
    "scalar": torch.tensor(3.0),
    "none": torch.zeros(0, 3),
}


def test_conjugated_views_are_filled(tmp_path: Path) -> None:
    saved = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64)
    checkpoint.save({"conj": saved, "imag": saved.imag}, tmp_path / "1")
    below = torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64)
    dcp.load({"conj": below[0].conj(), "imag": below[1].conj().imag}, storage_reader=Reader(tmp_path / "1"))
    assert below[0].tolist() == [1 - 2j, 3 + 1j]
    assert below[1].imag.tolist() == [-2.0, 1.0]


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_where_torch_has_put_a_tensor(name: str) -> None:
    """Found without reading it, or left to torch."""
    tensor = ODD_TENSORS[name]
    file = io.BytesIO()
    torch.save(tensor, file)
    data = file.getvalue()
    layout = distcp.layout_of(len(data), lambda start, length: data[start : start + length])
    if name in ("conjugated", "parameter"):
        assert layout is None
        return
    assert layout is not None
    assert (layout.dtype, layout.sizes, layout.strides) == (tensor.dtype, tuple(tensor.shape), tensor.stride())
    target = torch.zeros(tensor.shape, dtype=tensor.dtype)
    for each in Strided(Object("x", len(data), b""), layout.start, layout.dtype, layout.strides).wanted(
        [0] * tensor.dim(), target
    ):
        each.out[:] = data[each.start : each.start + len(each.out)]
        each.arrived()
    same(tensor.contiguous(), target)


@given(st.integers(0, 2000), st.integers(0, 255))
def test_damaged_items_are_no_tensors(at: int, byte: int) -> None:
    """Whatever byte is wrong: it is read as it was, or left to torch, and nothing else happens."""
    file = io.BytesIO()
    torch.save(torch.arange(10.0), file)
    data = bytearray(file.getvalue())
    data[at % len(data)] = byte
    layout = distcp.layout_of(len(data), lambda start, length: bytes(data[start : start + length]))
    if layout is not None:
        end = layout.start + 4 * (1 + sum(s * (n - 1) for s, n in zip(layout.strides, layout.sizes, strict=True)))
        assert 0 <= layout.start <= end <= len(data)
