"""Checkpoints that other tools have written: single safetensors files, and folders of them as the Hugging Face Hub has
them, with an index or without.

Their headers are read and become a part record without checksums, so that all that loads ours loads these. A header may
be torn or hostile: lengths are checked before anything of that size is read or made, and names of files lead nowhere.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from fastload.checkpoint.attempts import Place
from fastload.checkpoint.records import Contents, Object, Part
from fastload.checkpoint.segments import DTYPES
from fastload.errors import CheckpointDamagedError, CheckpointError, ConfigError, ObjectMissingError
from fastload.store.types import ObjectInfo

ENDING = ".safetensors"
INDEX = "model.safetensors.index.json"
_ALONE = "model.safetensors"
_AT_ONCE = 16
# As the format's own readers have it.
_HEADER_BYTES_MAX = 100_000_000
# Most headers are shorter, so that one request reads it.
_FIRST_BYTES = 256 << 10
_FILE = re.compile(r"[^/\\\x00]+\.safetensors")


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def contents_of_file(place: Place, name: str) -> Contents:
    """What a safetensors file holds."""
    return _contents(place, [name], None)


def contents_of_folder(place: Place) -> Contents | None:
    """What a folder's safetensors files hold together; None where there are none. An index says which file has which
    tensor; without one a file of the usual name is all, and else all files are.
    """
    try:
        data, info = place.read(INDEX)
    except ObjectMissingError:
        names = _files(place)
        return _contents(place, names, None) if names else None
    try:
        weights = msgspec.json.decode(data, type=_Index).weight_map
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{info.url} is damaged: {error}; fetch it again") from error
    for name in set(weights.values()):
        if _FILE.fullmatch(name) is None or name.startswith("."):
            raise CheckpointDamagedError(f"{info.url} is damaged: it names a file {name!r}; fetch it again")
    return _contents(place, sorted(set(weights.values())), weights)


def _files(place: Place) -> list[str]:
    try:
        found = [name for name in place.names() if _FILE.fullmatch(name)]
    except ConfigError:  # a web server, which lists nothing
        try:
            place.store.head(place.folder + _ALONE)
        except ObjectMissingError:
            return []
        return [_ALONE]
    return [_ALONE] if _ALONE in found else found


def _contents(place: Place, names: Sequence[str], weights: Mapping[str, str] | None) -> Contents:
    with ThreadPoolExecutor(min(_AT_ONCE, len(names)), "fastload-headers") as pool:
        headers = list(pool.map(lambda name: _header(place, name), names))
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}  # dtype, shape, number of the object, offset
    for number, (name, (_, entries)) in enumerate(zip(names, headers, strict=True)):
        for tensor, (dtype, shape, offset) in entries.items():
            if weights is not None and weights.get(tensor) != name:
                continue
            if tensor in tensors:
                other = names[tensors[tensor][2]]
                raise CheckpointError(
                    f"{place.folder}: {tensor} is in {other} and in {name}; name one of these files, or write {INDEX}"
                )
            tensors[tensor] = dtype, shape, number, offset
    if weights is not None and (missing := weights.keys() - tensors.keys()):
        first = min(missing)
        raise CheckpointDamagedError(
            f"{place.folder}{weights[first]} is damaged: it has no {first}, which {INDEX} says is there; fetch it again"
        )
    rows = list(tensors.values())
    boxes = [number for _, shape, _, _ in rows for number in (*(0 for _ in shape), *shape)]
    part = Part(
        "",
        0,
        tuple((name, dtype, shape) for name, (dtype, shape, _, _) in tensors.items()),
        tuple(Object(name, info.size, b"", info) for name, (info, _) in zip(names, headers, strict=True)),
        np.arange(len(rows)),
        np.array([number for _, _, number, _ in rows], np.int64),
        np.array([offset for *_, offset in rows], np.int64),
        np.array(boxes, np.int64),
    )
    return Contents([part], place.folder)


def _header(place: Place, name: str) -> tuple[ObjectInfo, dict[str, tuple[str, tuple[int, ...], int]]]:
    """The file, and of each tensor in it dtype, shape and where it begins."""
    info = place.store.head(place.folder + name)
    first = bytearray(min(info.size, _FIRST_BYTES))
    if len(first) < 8:
        raise _damaged(info, f"it has {info.size} bytes")
    place.store.read_into(info, 0, memoryview(first))
    (length,) = struct.unpack_from("<Q", first)
    if length > min(_HEADER_BYTES_MAX, info.size - 8):
        raise _damaged(info, f"it has a header of {length} bytes and {info.size} in all")
    text = bytearray(length)
    held = min(length, len(first) - 8)
    text[:held] = first[8 : 8 + held]
    if held < length:
        place.store.read_into(info, 8 + held, memoryview(text)[held:])
    try:
        raw: dict[str, Any] = msgspec.json.decode(text, type=dict)
        raw.pop("__metadata__", None)
        entries = msgspec.convert(raw, dict[str, _Entry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(info, f"its header is {error}") from error
    return info, _checked(info, entries, 8 + length)


def _checked(
    info: ObjectInfo, entries: Mapping[str, _Entry], data_start: int
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    end = 0
    for name, each in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, last = each.data_offsets
        if each.dtype not in DTYPES:
            raise CheckpointError(f"{info.url}: {name} is of dtype {each.dtype}, which is none of {', '.join(DTYPES)}")
        if len(each.shape) > 32 or any(not 0 <= size < 1 << 60 for size in each.shape):
            raise _damaged(info, f"{name} is of shape {each.shape}")
        # Each byte belongs to one tensor, so that a small file cannot stand for more memory than it has bytes.
        if begin != end or last - begin != math.prod(each.shape) * DTYPES[each.dtype]:
            raise _damaged(info, f"{name} of shape {each.shape} lies from {begin} to {last}")
        end = last
    if data_start + end != info.size:
        raise _damaged(info, f"its tensors end at {data_start + end}, and it has {info.size} bytes")
    return {name: (each.dtype, each.shape, data_start + each.data_offsets[0]) for name, each in entries.items()}


def _damaged(info: ObjectInfo, what: str) -> CheckpointDamagedError:
    return CheckpointDamagedError(f"{info.url} is damaged, or no safetensors file: {what}; fetch it again")
