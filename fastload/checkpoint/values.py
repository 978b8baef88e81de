"""What is no tensor, as bytes; and where the leaves of a state stand in it.

It is kept as MessagePack where that gives back the very same, and else as torch has it, which is read without running
any code unless the user allows pickles.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
import torch

from fastload.checkpoint.errors import CheckpointDamagedError, CheckpointError
from fastload.checkpoint.flattening import DEPTH_MAX, Path
from fastload.checkpoint.records import Contents
from fastload.config import format_bytes
from fastload.errors import ConfigError

# A part record, of which they are a part, is read as a whole, and has 1 GiB at most.
VALUES_BYTES_MAX = 768 << 20

_Place = Annotated[list[int], msgspec.Meta(min_length=1, max_length=1)]
_Path = Annotated[tuple[str | int | _Place, ...], msgspec.Meta(max_length=DEPTH_MAX)]


def encoded(name: str, leaf: Any) -> tuple[str, bytes]:
    """Encoding and bytes of a state's leaf. Raises `ConfigError` where it cannot be pickled either."""
    # An integer of more than 64 bits, a text that is no Unicode, what nests too deep.
    with contextlib.suppress(OverflowError, UnicodeEncodeError, RecursionError):
        if _is_plain(leaf):
            return "msgpack", msgspec.msgpack.encode(leaf)
    file = io.BytesIO()
    try:
        torch.save(leaf, file)
    except Exception as error:  # of any kind: classes say how they are pickled
        raise ConfigError(
            f"state: {name} is a {type(leaf).__name__} that cannot be pickled ({type(error).__name__}: {error}); leave "
            "it out, or save what it is made of"
        ) from error
    return "torch", file.getvalue()


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


def _is_plain(leaf: Any) -> bool:
    """Whether MessagePack gives back the very same."""
    if type(leaf) is dict:
        return all(type(key) is str and _is_plain(each) for key, each in leaf.items())
    if type(leaf) is list:
        return all(map(_is_plain, leaf))
    return leaf is None or type(leaf) in (bool, int, float, str, bytes)


def decoded(encoding: str, data: bytes, where: str, allow_pickle: bool) -> Any:
    try:
        if encoding == "msgpack":
            return msgspec.msgpack.decode(data)
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # of any kind: torch's reader and what a pickle runs
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "Unsupported" in line), lines[0])
        raise CheckpointError(
            f"{where} cannot be read: {reason}; where it is of classes of yours, and trusted, pass allow_pickle=True"
        ) from error


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
