"""Checkpoints as safetensors files, one or a folder of them as the Hub has them (`to_dcp`: as torch's own).

They are mapped into memory and filled there, straight from the store, so that it takes no more memory than what is in
flight. They get their names when all is there, and on the disk. What is for a store is made here first, and then
stored.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastload.checkpoint.attempts import Place, opened
from fastload.checkpoint.foreign import INDEX
from fastload.checkpoint.gathering import Bytes, gather, size_of, stored_order
from fastload.checkpoint.records import Contents
from fastload.checkpoint.segments import DTYPES, PAGE_BYTES
from fastload.errors import ConfigError, FastloadError, StoreError

_LAST = (INDEX, ".metadata")
SHARD_BYTES = 5 << 30  # as the Hub's own tools have it
_AHEAD_BYTES = 512 << 20

# Bytes that are there, of so many.
OnProgress = Callable[[int, int], None]


def to_file(
    place: Place, there: Contents, called: Mapping[str, str], path: Path, on_progress: OnProgress, *, overwrite: bool
) -> None:
    """The tensors of `called`, under the names that it gives them, as one safetensors file."""
    check_free(path, overwrite)
    total = sum(size_of(there, name) for name in called)
    _write(place, there, called, path, lambda done: on_progress(done, total))


def to_folder(
    place: Place,
    there: Contents,
    called: Mapping[str, str],
    path: Path,
    on_progress: OnProgress,
    *,
    overwrite: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """The same in files of up to `shard_bytes`, and where these are several an index. The index comes last."""
    shards = _shards(there, stored_order(there, called), shard_bytes)
    count = len(shards)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    )
    for name in (*names, INDEX):
        check_free(path / name, overwrite)
    path.mkdir(parents=True, exist_ok=True)
    total, before = sum(size_of(there, name) for name in called), 0
    for name, tensors in zip(names, shards, strict=True):
        chosen = {tensor: called[tensor] for tensor in tensors}
        _write(place, there, chosen, path / name, lambda done, before=before: on_progress(before + done, total))  # type: ignore[misc]
        before += sum(size_of(there, tensor) for tensor in tensors)
    if count == 1:
        (path / INDEX).unlink(missing_ok=True)
        return
    weights = {called[tensor]: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    with _appearing(path / INDEX) as file:
        file.write(json.dumps(index, indent=2).encode())


def _shards(there: Contents, names: list[str], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name in names:
        size = size_of(there, name)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write(
    place: Place, there: Contents, called: Mapping[str, str], path: Path, on_progress: Callable[[int], None]
) -> None:
    # Wide elements first, which keeps each aligned to its size, and so in the order in which they are stored here.
    order = sorted(stored_order(there, called), key=lambda name: -DTYPES[there.tensors[name][0]])
    header, starts = _header(there, {name: called[name] for name in order})
    size = len(header) + sum(size_of(there, name) for name in order)
    with _appearing(path) as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and would be a signal later
        data = np.memmap(file, np.uint8, shape=(size,))
        data[: len(header)] = np.frombuffer(header, np.uint8)

        def into(name: str) -> Bytes:
            dtype, shape = there.tensors[name]
            start = len(header) + starts[name]
            return data[start : start + size_of(there, name)].reshape(*shape, DTYPES[dtype])

        done = 0
        for name in gather(place, there, order, into, _AHEAD_BYTES):
            done += size_of(there, name)
            on_progress(done)
        data.flush()


def _header(there: Contents, called: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, at = {}, 0
    for name, other in called.items():
        dtype, shape = there.tensors[name]
        starts[name] = at
        at += size_of(there, name)
        entries[other] = {"dtype": dtype, "shape": shape, "data_offsets": [starts[name], at]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return struct.pack("<Q", length) + text.ljust(length), starts


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Any]:
    """A file that gets its name when it is whole, and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def written_to(target: str) -> Iterator[None]:
    """What the disk answers within the block is a `StoreError` that names the target."""
    try:
        yield
    except FastloadError:
        raise
    except OSError as error:
        which = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"{target} cannot be written: {error.strerror or error}{which}; make room there, or name another"
        ) from error


@contextlib.contextmanager
def sent(url: str, kind: str, *, overwrite: bool) -> Iterator[Path]:
    """A path of this machine to export to, in the folder for temporary files; what is there when the block ends is
    stored at a URL. What says which files there are (the index, torch's metadata) is stored last, so that who
    reads the folder finds nothing before all is there. Raises `ConfigError` where something is there already.
    """
    above, _, name = url.rstrip("/").rpartition("/")
    is_file = kind == "safetensors"
    with opened(above if is_file else url, None) as place, tempfile.TemporaryDirectory(prefix="fastload-") as folder:
        there = place.names(name if is_file else "")
        if not overwrite and (name in there if is_file else there):
            raise ConfigError(f"{url} is there already; name another URL, or pass --overwrite")
        path = Path(folder) / name
        with written_to(f"{url}: {path}, in TMPDIR,"):
            yield path
        files = [path] if is_file else sorted(path.iterdir(), key=lambda each: (each.name in _LAST, each.name))
        new: list[str] = []
        try:
            for each in files:
                new += [] if each.name in there else [each.name]
                with (
                    open(each, "rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
                    memoryview(data) as view,
                ):
                    place.store.put(place.folder + each.name, view)
        except BaseException:
            for name in new:
                with contextlib.suppress(FastloadError):  # then it stays, without what would say that it is whole
                    place.store.delete(place.folder + name)
            raise
        if kind == "hf" and INDEX in there and not (path / INDEX).exists():
            place.store.delete(place.folder + INDEX)


def check_free(path: Path, overwrite: bool) -> None:
    if not overwrite and path.exists():
        raise ConfigError(f"{path} is there already; name another path, or pass --overwrite")


def called(there: Contents, part: str, where: str) -> dict[str, str]:
    """Tensors, and what they are called without `part`, below which they are."""
    found = {name: name.removeprefix(f"{part}.") if part else name for name in _below(there.tensors, part)}
    if not found:
        raise ConfigError(f"{where} has no tensor below {part!r}; `fastload checkpoint show` lists what it has")
    return found


def value_count(there: Contents, part: str) -> int:
    """How many there are that are no tensors."""
    return sum(1 for name in _below(there.values, part) if name)


def _below(names: Collection[str], part: str) -> list[str]:
    return [name for name in names if not part or name == part or name.startswith(f"{part}.")]
