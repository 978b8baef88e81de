"""A state of one process, saved to a store and loaded from it: as a whole, or tensor by tensor in little memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
import torch
from torch.nn.parameter import is_lazy

from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place, opened, try_conditions
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.copies import Copies
from fastload.checkpoint.dedup import Base, digests, divide
from fastload.checkpoint.finding import found
from fastload.checkpoint.flattening import Path, flatten, put, unflatten
from fastload.checkpoint.gathering import Bytes, gather, size_of, stored_order, wanted
from fastload.checkpoint.reading import read
from fastload.checkpoint.records import PATHS, Contents, Reference, new_attempt, url_of
from fastload.checkpoint.saving import WAIT_S, Saving, checked_level
from fastload.checkpoint.segments import DTYPES, Piece
from fastload.checkpoint.values import NAMES, array_of, check_sizes, decoded, dtype_of, encoded, paths_of
from fastload.checkpoint.writing import data_of, start
from fastload.client.cache import AnyCache
from fastload.config import parse_bytes
from fastload.errors import CheckpointError, ConfigError, StoreUnavailableError
from fastload.protocol import Begin, Level

# How long the store is waited for by a save that does not need it yet.
_PATIENCE_S = 2.0
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_LAZY = "is a parameter without a shape yet; call its module once first"


def save(
    state: Mapping[str, Any],
    url: str | os.PathLike[str],
    *,
    until: Level = "store",
    overwrite: bool = False,
    timeout_s: float = WAIT_S,
    cache: AnyCache = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Saving:
    """Save a state, which nests dicts and lists of tensors and anything else, as the checkpoint at `url`.

    It is copied into memory that the node's cache service shares, which writes it to the disk of `cache` and to the
    store; the state may change once this returns. That is when it is as safe as `until` says: `memory`, so that this
    process may die; `disk`, so that the machine may; `store`, where it is committed. The `Saving` says how far it is,
    and waits. Tensors that share memory are stored once.

    Raises `CheckpointExistsError` where one is there, unless it is to be overwritten, which leaves it whole until the
    new one is; and where another process saves there at the same time, and is first. `ConfigError`: the store does not
    keep to conditional writes, which that takes, or the state holds what cannot be saved. With `memory` or `disk` the
    store is not waited for: where it does not answer within two seconds, the `Saving` raises these. `WaitTimeoutError`:
    no byte has moved for `timeout_s`; the save goes on, and is the error's `saving`.
    """
    with opened(url, storage_options) as place:
        saving = save_at(
            place,
            state,
            overwrite=overwrite,
            until=until,
            timeout_s=timeout_s,
            cache=cache,
            storage_options=storage_options,
        )
    saving.wait_while_moving(until, timeout_s)
    return saving


def save_at(
    place: Place,
    state: Mapping[str, Any],
    *,
    overwrite: bool,
    metric: float | None = None,
    dedup: bool = False,
    base: Base | None = None,
    until: Level = "store",
    timeout_s: float = WAIT_S,
    cache: AnyCache = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Saving:
    """What `save` does, but for the wait. With `dedup` pieces get hashes, and those that `base` has are not stored
    again.
    """
    checked_level(until, "until")
    leaves = flatten(state)
    tensors = {name: leaf for name, (_, leaf) in leaves.items() if _is_stored_as_tensor(name, leaf)}
    values = [(name, *encoded(name, leaf)) for name, (_, leaf) in leaves.items() if name not in tensors]
    paths = {name: path for name, (path, _) in leaves.items()}
    values.append((PATHS, "msgpack", msgspec.msgpack.encode(paths)))
    check_sizes(values)
    pieces = [
        Piece(name, NAMES[tensor.dtype], tuple(tensor.shape), Box.whole(tuple(tensor.shape)))
        for name, tensor in tensors.items()
    ]
    attempt = new_attempt()
    begun = _beginning(
        place.folder,
        storage_options,
        attempt,
        Begin(overwrite, time.time(), metric),
        base.refers if base is not None else (),
        # Pieces are compared with the base once a plan is there that names it.
        _PATIENCE_S if until != "store" and not dedup else None,
    )
    references: list[Reference] = []
    hashes = digests(pieces, lambda piece: data_of(piece, tensors)) if dedup else None
    if hashes is not None:
        begun()
        known = base.known() if base is not None and base.is_there_still() else {}
        pieces, references = divide(hashes, known)
    return start(
        place.folder,
        storage_options,
        attempt,
        0,
        pieces,
        tensors,
        values,
        references,
        hashes,
        cache=cache,
        until=until,
        commits=True,
        begun=begun,
        timeout_s=timeout_s,
    )


def _beginning(
    url: str,
    storage_options: Mapping[str, Any] | None,
    attempt: str,
    how: Begin,
    refers: Sequence[str],
    patience_s: float | None,
) -> Callable[[], Begin | None]:
    """Begin an attempt in a thread, beside the copy. The function waits for that, and raises what it raises; where the
    store does not answer in `patience_s`, it gives what is to be done later.
    """
    done = Future[None]()

    def begin() -> None:
        try:
            with opened(url, storage_options, patience_s) as place:
                try_conditions(place)
                attempts.begin(
                    place,
                    1,
                    overwrite=how.overwrite,
                    now_s=how.began_s,
                    refers=refers,
                    metric=how.metric,
                    attempt=attempt,
                )
        except BaseException as error:  # of any kind: the one who waits gets it
            done.set_exception(error)
        else:
            done.set_result(None)

    def begun() -> Begin | None:
        try:
            done.result(patience_s)
        except (StoreUnavailableError, TimeoutError):
            if patience_s is None:
                raise
            return how
        return None

    # Nobody waits for it at the end of the process, where the store does not answer.
    threading.Thread(target=begin, name="fastload-checkpoint-begin", daemon=True).start()
    return begun


def load(
    url: str | os.PathLike[str],
    into: dict[str, Any] | None = None,
    names: Collection[str] | None = None,
    *,
    device: str | torch.device = "cpu",
    allow_pickle: bool = False,
    cache: AnyCache = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The state at `url`, as it was saved; of `names` (`model.layers.0.weight`, or `model` for all below) only those.
    A safetensors file and a folder of these, as the Hugging Face Hub has them, are loaded as well.

    `into` is filled in place and returned: each tensor that it holds must be there as one of the same shape and dtype,
    and each other value is replaced. What the checkpoint holds beside these is not loaded. `into` stays as it is where
    that is refused.

    Every byte is verified. Raises `ObjectMissingError` where no checkpoint is, and `CheckpointError` for one that is
    damaged, or lacks what was asked for. What the node's cache still has of it, in memory or on disk, is not read from
    the store again.
    """
    if into is not None and names is not None:
        raise ConfigError("names= is of no use with into=, which says by what it holds what is to be loaded")
    with found(url, storage_options) as (place, there), Copies(cache, storage_options) as copies:
        paths = paths_of(there, place.folder)
        if into is not None:
            _fill(place, there, into, copies, allow_pickle)
            return into
        chosen = chosen_names(names, paths, place.folder)
        in_order = [name for name in chosen if name in there.tensors]
        views = _views(place, there, in_order, copies)
        tensors = {
            name: views[name] if name in views else torch.empty(shape, dtype=dtype_of(dtype, place.folder, name))
            for name, (dtype, shape) in ((name, there.tensors[name]) for name in in_order)
        }
        _read(place, there, tensors, copies, views)
        leaves = {name: tensor.to(device) for name, tensor in tensors.items()}
        for name in chosen:
            if name not in leaves:
                leaves[name] = decoded(*there.values[name], place.folder + name, allow_pickle)
        return unflatten((paths[name], leaves[name]) for name in chosen)


def _views(place: Place, there: Contents, names: Sequence[str], copies: Copies) -> dict[str, torch.Tensor]:
    """Tensors, yet to be read, of memory that the node's processes share, where the service reads them: what is written
    to one is this process's own. Those that lie in one piece there, at an address that suits their dtype.
    """
    shared = copies.shared(place.folder, sum(size_of(there, name) for name in names), in_place=True)
    if shared is None:
        return {}
    whole = {}
    for name in names:
        dtype, shape = there.tensors[name]
        pieces = list(there.places(name))
        is_whole = len(pieces) == 1 and pieces[0].box == Box.whole(shape) and pieces[0].length
        if is_whole and pieces[0].offset % DTYPES[dtype] == 0 and not copies.has(pieces[0].object):
            whole[name] = pieces[0]
            shared.ask(url_of(place.folder, pieces[0].object.name), pieces[0].object)
    views: dict[str, torch.Tensor] = {}
    ends: dict[str, int] = {}  # of what is taken of each object
    for name, piece in sorted(whole.items(), key=lambda each: (each[1].object.name, each[1].offset)):
        if piece.offset < ends.get(piece.object.name, 0):  # it was tied to another one, and is to be apart from it
            continue
        ends[piece.object.name] = piece.offset + piece.length
        memory = shared.memory(url_of(place.folder, piece.object.name), piece.object)
        if memory is not None:
            dtype, shape = there.tensors[name]
            flat = torch.frombuffer(
                memory, dtype=dtype_of(dtype, place.folder, name), count=piece.box.elements, offset=piece.offset
            )
            views[name] = flat.view(shape)
    return views


def _fill(place: Place, there: Contents, into: dict[str, Any], copies: Copies, allow_pickle: bool) -> None:
    leaves = flatten(into)
    missing = [name for name in leaves if name not in there.tensors and name not in there.values]
    if missing:
        raise CheckpointError(f"{place.folder} has no {missing[0]} ({len(missing)} of {len(leaves)} are missing)")
    tensors = {}
    for name, (_, leaf) in leaves.items():
        if isinstance(leaf, torch.Tensor):
            _check_fillable(name, leaf)
        if name in there.tensors:
            dtype, shape = there.tensors[name]
            _check_fits(place.folder + name, dtype_of(dtype, place.folder, name), shape, torch.strided, leaf)
            tensors[name] = leaf.detach()
    straight = {name: tensor for name, tensor in tensors.items() if _has_bytes_as_stored(tensor)}
    beside = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items() if name not in straight
    }
    # What is stored as a value first: it may be refused, before anything of `into` has changed.
    others = {
        name: decoded(*there.values[name], place.folder + name, allow_pickle) for name in leaves if name not in tensors
    }
    for name, value in others.items():
        leaf = leaves[name][1]
        if isinstance(value, torch.Tensor):  # of a dtype or layout that pieces do not have
            _check_fits(place.folder + name, value.dtype, tuple(value.shape), value.layout, leaf)
        elif isinstance(leaf, torch.Tensor):
            raise CheckpointError(f"{place.folder}{name} is a {type(value).__name__}, and into= has a tensor there")
    _read(place, there, {**straight, **beside}, copies)
    for name, tensor in beside.items():
        tensors[name].copy_(tensor)
    for name, value in others.items():
        path, leaf = leaves[name]
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_quantized:
            leaf.detach().copy_(value)
        else:
            put(into, path, value)


def _has_bytes_as_stored(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _check_fillable(name: str, leaf: torch.Tensor) -> None:
    why = ""
    if is_lazy(leaf):
        why = _LAZY
    elif type(leaf) not in _PLAIN:
        why = f"is a {type(leaf).__name__}, of which checkpoint.load fills none; dcp.load does, by checkpoint.Reader"
    elif leaf.is_meta:
        why = "is on the meta device, where it has no memory; make it on another"
    elif leaf.layout is torch.strided and any(
        size > 1 and stride == 0 for size, stride in zip(leaf.shape, leaf.stride(), strict=True)
    ):
        why = "is expanded, so that several of its elements are one; pass its contiguous()"
    if why:
        raise ConfigError(f"into: {name} {why}")


def _check_fits(where: str, dtype: torch.dtype, shape: tuple[int, ...], layout: torch.layout, leaf: Any) -> None:
    if not isinstance(leaf, torch.Tensor):
        raise CheckpointError(f"{where} is a tensor, and into= has a {type(leaf).__name__} there")
    if (dtype, shape, layout) != (leaf.dtype, tuple(leaf.shape), leaf.layout):
        said = _described(dtype, shape, layout)
        raise CheckpointError(
            f"{where} is {said}, and into= has {_described(leaf.dtype, leaf.shape, leaf.layout)} there"
        )


def _described(dtype: torch.dtype, shape: tuple[int, ...], layout: torch.layout) -> str:
    return f"{dtype} of shape {tuple(shape)}" + (f" ({layout})" if layout is not torch.strided else "")


def _read(
    place: Place,
    there: Contents,
    tensors: Mapping[str, torch.Tensor],
    copies: Copies,
    views: Collection[str] = (),
) -> None:
    """Fill tensors, which are contiguous and in this process's memory; those of `views` lie in shared memory."""
    pieces = [
        wanted(piece, array_of(tensor), is_shared=name in views)
        for name, tensor in tensors.items()
        for piece in there.places(name)
    ]
    read(place.store, place.folder, pieces, copies)


def _is_stored_as_tensor(name: str, leaf: Any) -> bool:
    if not isinstance(leaf, torch.Tensor):
        return False
    if is_lazy(leaf):
        raise ConfigError(f"state: {name} {_LAZY}")
    if leaf.is_meta:
        raise ConfigError(f"state: {name} is on the meta device, where it has no data; load or make it first")
    if type(leaf) not in _PLAIN:
        raise ConfigError(
            f"state: {name} is a {type(leaf).__name__}, of which other processes hold parts; gather it first"
        )
    return leaf.dtype in NAMES and leaf.layout is torch.strided and not leaf.is_quantized


def chosen_names(names: Collection[str] | None, paths: Mapping[str, Path], where: str) -> list[str]:
    if names is None:
        return list(paths)
    asked = set(names)
    found: set[str] = set()
    chosen = []
    for each in paths:
        if above := asked.intersection(_prefixes(each)):
            found |= above
            chosen.append(each)
    if found != asked:
        missing = next(name for name in names if name not in found)
        raise CheckpointError(f"{where} has no {missing}; it has {', '.join(sorted(paths)[:3])} and so on")
    return chosen


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


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
    with found(url, storage_options) as (place, there), Copies(cache, storage_options) as copies:

        def into(name: str) -> Bytes:
            dtype, shape = there.tensors[name]
            tensors[name] = torch.empty(shape, dtype=dtype_of(dtype, place.folder, name))
            return array_of(tensors[name])

        chosen = chosen_names(names, paths_of(there, place.folder), place.folder)
        in_order = stored_order(there, [name for name in chosen if name in there.tensors])
        for name in gather(place, there, in_order, into, ahead_bytes, copies):
            yield name, tensors.pop(name).to(device)
