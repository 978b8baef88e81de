"""A checkpoint's tensors one after the other: to convert a model, or to move it to a device, in little memory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from fastload.checkpoint.copies import Copies
from fastload.checkpoint.finding import found
from fastload.checkpoint.gathering import Bytes, gather, stored_order
from fastload.checkpoint.single import chosen_names
from fastload.checkpoint.tensors import array_of, dtype_of
from fastload.checkpoint.values import paths_of
from fastload.client.cache import AnyCache, directory_of
from fastload.config import parse_bytes


def stream(
    url: str | os.PathLike[str],
    names: Collection[str] | None = None,
    *,
    ahead: int | str = "2GiB",
    device: str | torch.device = "cpu",
    cache: AnyCache = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, in the order in which they are stored; of `names` only those, as in `load`. What is no tensor is
    left out.

    What comes next is requested ahead: tensors of so many bytes are in flight, or wait to be taken; or one, where it is
    larger than that. Every byte is verified, and what the node's cache still has is not read from the store. Raises
    what `load` does.
    """
    return _stream(url, names, parse_bytes(ahead, "ahead"), device, cache, storage_options)


def _stream(
    url: str | os.PathLike[str],
    names: Collection[str] | None,
    ahead_bytes: int,
    device: str | torch.device,
    cache: AnyCache,
    storage_options: Mapping[str, Any] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    with found(url, storage_options) as (place, there), Copies(directory_of(cache)) as copies:

        def into(name: str) -> Bytes:
            dtype, shape = there.tensors[name]
            tensors[name] = torch.empty(shape, dtype=dtype_of(dtype, place.folder, name))
            return array_of(tensors[name])

        chosen = chosen_names(names, paths_of(there, place.folder), place.folder)
        in_order = stored_order(there, [name for name in chosen if name in there.tensors])
        for name in gather(place, there, in_order, into, ahead_bytes, copies):
            yield name, tensors.pop(name).to(device)
