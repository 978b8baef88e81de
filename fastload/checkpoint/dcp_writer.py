"""What torch.distributed.checkpoint saves, as one of our checkpoints: `checkpoint.Writer`.

torch's planner says which rank writes which part of which tensor. The coordinator begins the attempt and gives it to
all ranks with their plans; each rank stores its segments and its part record; when all have, the coordinator commits.
A rank that fails is an error on all of them, and nothing is committed.

Without collectives (`use_collectives=False`) torch lets each rank plan for itself. Then the ranks agree by torch's
key-value store: rank 0 begins the attempt, and says who writes what several of them have.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fastload import callers
from fastload.checkpoint import attempts, retention
from fastload.checkpoint.attempts import Place, opened, try_conditions
from fastload.checkpoint.boxes import Box
from fastload.checkpoint.dedup import PIECE_BYTES, Base, digests, divide
from fastload.checkpoint.images import Images
from fastload.checkpoint.records import PATHS, Object, Reference, plan_name
from fastload.checkpoint.saving import Saving, checked_level
from fastload.checkpoint.segments import SEGMENT_BYTES, Piece
from fastload.checkpoint.staging import Layout, stage, take_back
from fastload.checkpoint.values import NAMES, check_sizes, encoded
from fastload.checkpoint.writing import SMALL_BYTES, data_of, images_of, room_bytes, start
from fastload.client.cache import AnyCache, handle_of
from fastload.errors import CheckpointError, ConfigError, FastloadError
from fastload.lifecycle import on_drop
from fastload.protocol import Level

_log = logging.getLogger("fastload.checkpoint")
# How long a rank waits for its part to be stored, and without collectives for the others to come to the same save; as
# long as torch's ranks wait for each other.
_DEADLINE_S = 1800.0


class Writer(StorageWriter, AsyncStager):
    """Saves what torch.distributed.checkpoint saves as the checkpoint at `url`:

        dcp.save(state, storage_writer=checkpoint.Writer("s3://bucket/run/1200"))
        future = dcp.async_save(state, storage_writer=checkpoint.Writer(url))

    `until`, `cache` and what it raises are as with `checkpoint.save`; in torch's calls that is in a
    `CheckpointException`, which names the rank. `saving` says how far this rank's part is.

    `async_save` copies the state into memory that is used again by the next save, and a third save waits for the first
    of two; with `overlap=True` it returns before that copy is made, and `staging_completion` of what it returns is to
    be waited for before the state changes.

    With `dedup=True` the URL is that of a step of a `Run`, and what the newest other step has already is not stored
    again.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        until: Level = "store",
        overwrite: bool = False,
        overlap: bool = False,
        dedup: bool = False,
        cache: AnyCache = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        checked_level(until, "until")
        if overlap and not hasattr(state_dict_saver, "AsyncSaveResponse"):
            raise ConfigError(f"overlap=True takes a newer torch than {torch.__version__}; leave it out")
        self._url = os.fspath(url)
        self._until, self._overwrite, self._overlap, self._dedup = until, overwrite, overlap, dedup
        self._cache, self._storage_options = cache, storage_options
        #: This rank's save, once its part is handed over; None before, and in another process.
        self.saving: Saving | None = None
        self._rank: int | None = None
        self._use_collectives = True
        self._attempt = ""  # that this process has begun, or agreed on
        self._base: tuple[str, str] | None = None  # a step to which it may refer, and its attempt
        self._images: Images | None = None  # in which it has staged
        self._is_staged = False
        self._finalizer: Any = None  # of one that it has begun and not finished

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "saving": None, "_finalizer": None, "_images": None}

    @property
    def checkpoint_id(self) -> str:
        return self._url

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self._url = os.fspath(checkpoint_id)
        self._attempt, self.saving = "", None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._finalizer is not None:
            self._finalizer()  # which does nothing where it has finished
        self._rank, self._use_collectives = kwargs.get("rank"), kwargs.get("use_collectives", True)
        _saves[self._url] += 1

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type is not WriteItemType.BYTE_IO:
                _is_stored_as_value(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if not self._use_collectives and torch.distributed.is_initialized():
            return [self._agreed(plan) for plan in plans]
        if len(plans) == 1:
            _check_whole(plans[0])
        self._attempt = self._begin(len(plans))
        return [self._with_share(plan, rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        share = _shares.pop(self._url, plan.storage_data)
        held = _Held(plan, planner)
        pieces, hashes = held.pieces, None
        references: list[Reference] = []
        if self._dedup:
            hashes = digests(pieces, lambda piece: data_of(piece, held))
            pieces, references = divide(hashes, self._known(share.base))
        self.saving = start(
            self._url,
            self._storage_options,
            share.attempt,
            share.rank,
            pieces,
            held,
            held.others,
            references,
            hashes,
            cache=self._cache,
            until=self._until,
            commits=self._until != "store" and share.rank == 0,
            timeout_s=_DEADLINE_S,
            is_staged=self._is_staged,
        )
        self._is_staged = False
        self.saving.wait_while_moving(self._until, _DEADLINE_S)
        take_back(self.saving, _DEADLINE_S)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(item.index, _size(item), None) for item in plan.items])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        own = metadata.planner_data or {}
        if not isinstance(own, Mapping) or own.keys() - metadata.state_dict_metadata.keys():
            callers.warn(
                f"{self._url}: what this planner keeps in planner_data, beside the paths of tensors and values, is not "
                "saved; keep it in the state",
                RuntimeWarning,
            )
        if self._until == "store":  # else the service of rank 0 commits, when all parts are in the store
            with opened(self._url, self._storage_options) as place:
                if self._use_collectives:
                    attempts.commit_all(place, self._attempt)
                else:  # of the ranks the last one commits
                    attempts.commit(place, self._attempt)
        if self._finalizer is not None:
            self._finalizer.detach()

    def stage(self, state_dict: dict[str, Any]) -> Any:
        if not self._overlap:
            return self._staged(state_dict)
        executor = ThreadPoolExecutor(1, "fastload-staging")
        try:
            return executor.submit(self._staged, state_dict)
        finally:
            executor.shutdown(wait=False)

    def _staged(self, state: dict[str, Any]) -> dict[str, Any]:
        layout = Layout.of(state, PIECE_BYTES if self._dedup else SEGMENT_BYTES)
        if self._until == "store" and layout.data_bytes < SMALL_BYTES:
            return stage(state, layout, None, 0, _DEADLINE_S)
        handle = handle_of(self._cache)
        self._images, self._is_staged = images_of(handle), True
        return stage(state, layout, self._images, room_bytes(handle), _DEADLINE_S)

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for, when `stage` has returned a state."""

    def close(self) -> None:
        """Give back the memory into which states were copied, once they are saved."""
        if self._images is not None:
            self._images.give_back()

    def _begin(self, rank_count: int) -> str:
        _give_up_failed()
        with opened(self._url, self._storage_options) as place:
            try_conditions(place)
            refers = self._refer(place) if self._dedup else ()
            attempt = attempts.begin(
                place, rank_count, overwrite=self._overwrite, now_s=time.time(), refers=refers
            ).attempt
        self._finalizer = on_drop(self, _failed.append, (self._url, self._storage_options, attempt))
        return attempt

    def _refer(self, place: Place) -> Sequence[str]:
        """Choose the step to which all ranks may refer; the folders in which lies what it holds."""
        run, own = retention.run_of(place)
        if own is None:
            raise ConfigError(
                f"{self._url}: with dedup=True the last part of the URL is a step's number, as in run/1200"
            )
        newest = max((step for step in retention.steps(run) if step != own), default=None)
        there = attempts.current(retention.folder_of(run, newest)) if newest is not None else None
        if there is None or there.manifest is None:
            self._base = None
            return ()
        self._base = str(newest), there.manifest.attempt
        return [str(newest), *there.manifest.refers]

    def _known(self, said: tuple[str, str] | None) -> Mapping[tuple[int, bytes], tuple[Object, int]]:
        """What the step has to which this rank may refer; nothing, where it has been replaced or deleted."""
        if said is None:
            return {}
        step, attempt = said
        with opened(self._url, self._storage_options) as place:
            run, _ = retention.run_of(place)
            base = Base.at(retention.folder_of(run, int(step)))
            if base is None or base.manifest.attempt != attempt or not base.is_there_still():
                return {}
            return base.known()

    def _with_share(self, plan: SavePlan, rank: int) -> SavePlan:
        share = Share(self._url, self._attempt, rank, self._base)
        if rank == 0:
            _shares[self._url] = share
        return dataclasses.replace(plan, storage_data=share)

    def _agreed(self, plan: SavePlan) -> SavePlan:
        """The part of this rank's plan that it is to write, once all ranks have come to this save."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self._rank != rank:
            raise ConfigError(
                f"use_collectives=False: this is rank {self._rank} of the process group, and rank {rank} of all; it "
                "takes the default process group"
            )

        def decide(said: Sequence[bytes]) -> list[bytes]:
            items = [msgspec.msgpack.decode(each, type=list[tuple[bytes, int]]) for each in said]
            attempt = self._begin(ranks)
            return [msgspec.msgpack.encode((attempt, self._base, numbers)) for numbers in deal(items)]

        own = [(_key(item), _size(item)) for item in plan.items]
        name = hashlib.blake2b(f"{_saves[self._url]} {self._url}".encode(), digest_size=8).hexdigest()
        answer = _agree(name, rank, ranks, msgspec.msgpack.encode(own), decide, self._url)
        agreed = tuple[str, tuple[str, str] | None, list[int]]
        self._attempt, base, numbers = msgspec.msgpack.decode(answer, type=agreed)
        share = _came(self._url, self._attempt, rank, base)
        return dataclasses.replace(plan, items=[plan.items[number] for number in numbers], storage_data=share)


class Share:
    """What the coordinator gives a rank: the attempt, and the rank's number in it; and a step to which all may refer,
    with its attempt.

    A planner that keeps plans from one save to the next (`enable_plan_caching`) hands over the plan of an earlier save,
    in place of the one that has just come. So one that comes is noted where the writer looks first.
    """

    def __init__(self, url: str, attempt: str, rank: int, base: tuple[str, str] | None = None) -> None:
        self.url, self.attempt, self.rank, self.base = url, attempt, rank, base

    def __reduce__(self) -> tuple[Any, ...]:
        return _came, (self.url, self.attempt, self.rank, self.base)


# Attempts whose writers were dropped before torch has finished them: some rank has failed.
_failed: deque[tuple[str, Mapping[str, Any] | None, str]] = deque()


def _give_up_failed() -> None:
    """Delete the plans of attempts that have failed, so that no service waits for their other ranks."""
    while True:
        try:
            url, storage_options, attempt = _failed.popleft()
        except IndexError:
            return
        try:
            with opened(url, storage_options) as place:
                place.store.delete(place.folder + plan_name(attempt))
        except FastloadError as error:
            _log.warning("the save %s of %s has failed, and is not given up: %s", attempt, url, error)


# By URL: the shares that came last, and how often it was saved there.
_shares: dict[str, Share] = {}
_saves: Counter[str] = Counter()


def _came(url: str, attempt: str, rank: int, base: tuple[str, str] | None) -> Share:
    share = _shares[url] = Share(url, attempt, rank, base)
    return share


class _Held(Mapping[str, Sequence[tuple[torch.Tensor, Box]]]):
    """What a rank writes: `pieces` of tensors, for which the planner is asked when they are stored, and `others`."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        self._planner = planner
        self._items: dict[str, list[WriteItem]] = {}
        self.pieces: list[Piece] = []
        self.others: list[tuple[str, str, bytes]] = []
        said = plan.planner_data if isinstance(plan.planner_data, Mapping) else {}
        paths = {}
        for item in plan.items:
            name = item.index.fqn
            if isinstance(said.get(name), tuple):
                # torch's paths have a number for a place in a list, and strings for keys.
                paths[name] = [[step] if isinstance(step, int) else step for step in said[name]]
            if item.type is WriteItemType.BYTE_IO:
                self.others.append((name, "torch", planner.resolve_data(item).getvalue()))  # type: ignore[union-attr]
            elif _is_stored_as_value(item):
                self.others.append((name, *encoded(name, self._tensor(item).cpu().clone())))
            else:
                data = _data(item)
                self.pieces.append(Piece(name, NAMES[data.properties.dtype], tuple(data.size), _box(item)))
                self._items.setdefault(name, []).append(item)
        if paths:
            self.others.append((PATHS, "msgpack", msgspec.msgpack.encode(paths)))
        check_sizes(self.others)

    def __getitem__(self, name: str) -> Sequence[tuple[torch.Tensor, Box]]:
        return [(self._tensor(item), _box(item)) for item in self._items[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def _tensor(self, item: WriteItem) -> torch.Tensor:
        tensor = self._planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != _box(item).sizes:
            shape = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(
                f"state: {item.index.fqn} is {shape}, and the planner has planned a part of shape {_box(item).sizes}"
            )
        return tensor.detach().to(_data(item).properties.dtype)


def _data(item: WriteItem) -> TensorWriteData:
    assert item.tensor_data is not None
    return item.tensor_data


def _box(item: WriteItem) -> Box:
    chunk = _data(item).chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _is_stored_as_value(item: WriteItem) -> bool:
    """Whether it is of a dtype that the format has no name for. ConfigError where ranks hold parts of such a tensor."""
    data = _data(item)
    if data.properties.dtype in NAMES:
        return False
    if tuple(data.chunk.sizes) != tuple(data.size):
        raise ConfigError(
            f"state: {item.index.fqn} is {data.properties.dtype}, of which parts cannot be saved; gather it first, or "
            "save it as another dtype"
        )
    return True


def _size(item: WriteItem) -> int:
    """In bytes; of what is no tensor, 1."""
    if item.tensor_data is None:
        return 1
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _key(item: WriteItem) -> bytes:
    """The same for the same part of the same tensor on each rank."""
    box = _box(item) if item.tensor_data is not None else None
    return hashlib.blake2b(repr((item.index.fqn, box)).encode(), digest_size=8).digest()


def _check_whole(plan: SavePlan) -> None:
    """Where one rank saves alone. ConfigError where it holds a tensor only in part, and the rest is not saved."""
    held: Counter[str] = Counter()
    whole: dict[str, int] = {}
    for item in plan.items:
        if item.tensor_data is not None:
            held[item.index.fqn] += math.prod(item.tensor_data.chunk.sizes)
            whole[item.index.fqn] = math.prod(item.tensor_data.size)
    for name, elements in whole.items():
        if held[name] != elements:
            raise ConfigError(
                f"state: {name} has {elements} elements, of which this process holds {held[name]}; save in all ranks "
                "that hold the others (without no_dist=True), or gather it first"
            )


def deal(items: Sequence[Sequence[tuple[bytes, int]]]) -> list[list[int]]:
    """Which of its items each rank writes, where all have said what they have (key and size): each key once, by the
    rank that has least to write until then.
    """
    having: dict[bytes, list[tuple[int, int]]] = {}
    sizes: dict[bytes, int] = {}
    for rank, own in enumerate(items):
        for number, (key, size) in enumerate(own):
            having.setdefault(key, []).append((rank, number))
            sizes[key] = size
    load = [0] * len(items)
    dealt: list[list[int]] = [[] for _ in items]
    for key, places in having.items():
        rank, number = min(places, key=lambda place: load[place[0]])
        load[rank] += sizes[key]
        dealt[rank].append(number)
    return dealt


def _agree(
    name: str, rank: int, ranks: int, says: bytes, decide: Callable[[Sequence[bytes]], list[bytes]], url: str
) -> bytes:
    """What rank 0 decides for this rank, from what all say; or what it raises there. All ranks call this."""
    # There is no public way to it; launchers and torch's own packages take it from here too.
    default = torch.distributed.distributed_c10d._get_default_store()
    store: Any = torch.distributed.distributed_c10d.PrefixStore(f"fastload/checkpoint/{name}", default)

    def heard(key: str, other: int) -> bytes:
        try:
            store.wait([key], timedelta(seconds=_DEADLINE_S))
        except RuntimeError as error:
            raise CheckpointError(
                f"{url}: rank {other} has not come to this save in {_DEADLINE_S:g} s; see what rank {other} does"
            ) from error
        message: bytes = store.get(key)
        store.delete_key(key)
        return message

    if rank:
        store.set(f"{rank}", says)
        error, answer = msgspec.msgpack.decode(heard(f"answer/{rank}", 0), type=tuple[str, bytes])
        if error:
            raise CheckpointError(f"rank 0: {error}")
        return answer
    try:
        answers = decide([says, *(heard(f"{other}", other) for other in range(1, ranks))])
    except Exception as error:
        for other in range(1, ranks):
            store.set(f"answer/{other}", msgspec.msgpack.encode((str(error) or repr(error), b"")))
        raise
    for other in range(1, ranks):
        store.set(f"answer/{other}", msgspec.msgpack.encode(("", answers[other])))
    return answers[0]
