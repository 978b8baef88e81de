"""What a state holds, as bytes: tensors, of which torch's dtypes are named here as the format names them; what is no
tensor; and where each leaf stands in the state.

What is no tensor is kept as MessagePack where that gives back the very same, with extension types for tuples and for
numpy's arrays and scalars of plain dtypes; and else as torch has it, which is read without running any code unless the
user allows pickles. What would need that is saved with a warning, since it keeps a whole state from being loaded.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import torch

from fastload import callers
from fastload.checkpoint.flattening import DEPTH_MAX, Path
from fastload.checkpoint.gathering import Bytes
from fastload.checkpoint.records import Contents
from fastload.config import format_bytes
from fastload.errors import CheckpointDamagedError, CheckpointError, ConfigError

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def array_of(tensor: torch.Tensor) -> Bytes:
    """The bytes of a contiguous tensor, in its shape and behind that those of an element."""
    return np.asarray(bytes_of(tensor)).reshape(*tensor.shape, tensor.element_size())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    # Of one element any stride is contiguous, and only one of 1 can be viewed.
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def dtype_of(dtype: str, where: str, name: str) -> torch.dtype:
    if dtype not in DTYPES:
        raise CheckpointError(f"{where}: {name} is {dtype}, which torch {torch.__version__} does not have")
    return DTYPES[dtype]


# A part record, of which they are a part, is read as a whole, and has 1 GiB at most.
VALUES_BYTES_MAX = 768 << 20
# Extension types of MessagePack.
_TUPLE, _ARRAY, _SCALAR = 1, 2, 3
# Booleans, integers, floats and complex numbers, as numpy writes them.
_DTYPE = re.compile(r"\|[biu]1|[<>](?:[iu][248]|f[248]|c(?:8|16))")
_Place = Annotated[list[int], msgspec.Meta(min_length=1, max_length=1)]
_Path = Annotated[tuple[str | int | _Place, ...], msgspec.Meta(max_length=DEPTH_MAX)]


def encoded(name: str, leaf: Any) -> tuple[str, bytes]:
    """Encoding and bytes of a state's leaf. Raises `ConfigError` where it cannot be pickled either."""
    # Of another class, an integer of more than 64 bits, a text that is no Unicode, what nests too deep.
    with contextlib.suppress(TypeError, OverflowError, UnicodeEncodeError, RecursionError):
        return "msgpack", msgspec.msgpack.encode(_packed(leaf))
    file = io.BytesIO()
    try:
        torch.save(leaf, file)
    except Exception as error:  # of any kind: classes say how they are pickled
        raise ConfigError(
            f"state: {name} is a {type(leaf).__name__} that cannot be pickled ({type(error).__name__}: {error}); leave "
            "it out, or save what it is made of"
        ) from error
    if not isinstance(leaf, torch.Tensor):
        try:
            file.seek(0)
            torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            callers.warn(
                f"state: {name} is a pickle ({_reason(error)}): to load it, allow_pickle=True will have to be passed; "
                "save what it is made of, such as numbers, texts, tensors, arrays, tuples, lists and dicts",
                RuntimeWarning,
            )
    return "torch", file.getvalue()


def _packed(leaf: Any) -> Any:
    """What MessagePack gives back as the very same, by `_unpacked`; TypeError where it does not."""
    kind = type(leaf)
    if leaf is None or kind in (bool, int, float, str, bytes):
        return leaf
    if kind is dict and all(type(key) is str for key in leaf):
        return {key: _packed(each) for key, each in leaf.items()}
    if kind is list:
        return list(map(_packed, leaf))
    if kind is tuple:
        return _extension(_TUPLE, list(map(_packed, leaf)))
    if kind is np.ndarray and _DTYPE.fullmatch(leaf.dtype.str):
        return _extension(_ARRAY, (leaf.dtype.str, leaf.shape, leaf.tobytes()))
    if isinstance(leaf, np.generic) and kind is leaf.dtype.type and _DTYPE.fullmatch(leaf.dtype.str):
        return _extension(_SCALAR, (leaf.dtype.str, leaf.tobytes()))
    raise TypeError


def _extension(code: int, fields: Sequence[Any]) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(fields))


def _unpacked(code: int, data: memoryview) -> Any:
    if code == _TUPLE:
        return tuple(msgspec.msgpack.decode(data, type=list[Any], ext_hook=_unpacked))
    dtype, content = "", b""
    shape: tuple[int, ...] = ()
    if code == _ARRAY:
        dtype, shape, content = msgspec.msgpack.decode(data, type=tuple[str, tuple[int, ...], bytes])
    elif code == _SCALAR:
        dtype, content = msgspec.msgpack.decode(data, type=tuple[str, bytes])
    if _DTYPE.fullmatch(dtype) is None:
        raise ValueError(f"extension {code} with dtype {dtype!r}")
    array = np.frombuffer(content, dtype).reshape(shape).copy()
    return array if code == _ARRAY else array[()]


def check_sizes(values: Iterable[tuple[str, str, bytes]]) -> None:
    """Raises `ConfigError` where they are more together than a part record holds."""
    sizes = {name: len(data) for name, _, data in values}
    if (total := sum(sizes.values())) > VALUES_BYTES_MAX:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            f"state: what is no tensor comes to {format_bytes(total)}, most of it {largest or 'names'} with "
            f"{format_bytes(sizes[largest])}, and a checkpoint takes {format_bytes(VALUES_BYTES_MAX)} of that from a "
            "process; save it as a tensor, or as a file by checkpoint.create"
        )


def decoded(encoding: str, data: bytes, where: str, allow_pickle: bool) -> Any:
    """A leaf. Raises `CheckpointDamagedError`, and `CheckpointError` for a pickle that is not allowed, or fails."""
    try:
        if encoding == "msgpack":
            return msgspec.msgpack.decode(data, ext_hook=_unpacked)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # of any kind: torch's reader and what a pickle runs
        if encoding == "torch" and allow_pickle:
            raise CheckpointError(f"{where} cannot be read: {type(error).__name__}: {error}") from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"pass allow_pickle=True to load {where}, if you trust who has saved it, or leave it out: it is a "
                f"pickle ({_reason(error)}), which may run code"
            ) from error
        raise CheckpointDamagedError(f"{where} is damaged: {_reason(error)}; take another step") from error


def _reason(error: Exception) -> str:
    """In one line; torch says at length what else could be done."""
    if (named := re.search(r"GLOBAL (\S+)", str(error))) is not None:
        return f"of {named[1]}"
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if "Unsupported" in line), lines[0])


def paths_of(there: Contents, where: str) -> dict[str, Path]:
    """Of every leaf; what other ranks' writers have called is in no dict."""
    said: dict[str, Path] = {}
    for data in there.paths:
        try:
            said |= msgspec.msgpack.decode(data, type=dict[str, _Path])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointDamagedError(f"{where} is damaged: its paths are {error}; take another step") from error
    names = [*there.tensors, *there.values]
    paths = {name: said.get(name) or (name,) for name in names}
    return {name: paths[name] for name in [*said, *names] if name in paths}  # in the state's order
