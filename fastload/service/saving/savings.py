"""Saves of checkpoints that a service carries: from the memory of a trainer to the disk, and to the store.

A trainer hands over an *image*: one piece of shared memory with the segments of a rank, each from a page on, and its
part record, in which the checksums are missing yet. From then on its death costs nothing (the level `memory`). Segments
are hashed and written to the disk (`area`), and go to the store side by side, straight from the image. With all of
them on the disk, and a log that says so, the save outlives the service and the machine (`disk`). With all of them in
the store the part record follows, and where this rank commits, the manifest, as soon as other ranks have finished
(`store`). Each step may be taken again, by this service or by the next one.

A store that does not answer is tried again for as long as it takes, ever more rarely. So is one that refuses, since a
bucket may be made again, and a setting mended: but then the trainer gets the error at once. Where access is denied,
other credentials are needed: they come with the trainer, and after its death with the next consumer of the same
endpoint. Only what can never succeed ends the save: another checkpoint was committed meanwhile, the attempt was given
up, or what is on the disk is damaged.

An image stays here after that, and so do the files, for a trainer that starts again: until one of the same rank and run
is stored that is younger, its room is needed, or the trainer takes it back to fill it anew. The files of a save that
has failed stay as long, since they may be the only copy, unless another checkpoint is there in its place.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import posixpath
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from xxhash import xxh3_64_intdigest

from fastload import protocol
from fastload.cache import syscalls
from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.commit import Step
from fastload.checkpoint.records import Record, object_name
from fastload.checkpoint.segments import checksums
from fastload.config import exact_bytes, format_bytes
from fastload.errors import (
    AccessDeniedError,
    CacheError,
    CheckpointError,
    CheckpointExistsError,
    FastloadError,
    ServiceError,
    StoreUnavailableError,
    from_wire,
    to_wire,
)
from fastload.service.host.threads import Done, Pool
from fastload.service.operators import Operator
from fastload.service.resources import Resources
from fastload.service.saving.area import COMMITTED, KEPT, STORED, Area, Kept, name_of
from fastload.service.saving.image import Image
from fastload.service.state import ConsumerState
from fastload.store.urls import scheme

log = logging.getLogger("fastload.service")

# Segments of all saves that are sent at a time. Each is about 256 MB, so that more of them gain nothing.
_UPLOADS_MAX = 4
# Some hash and wait for the disk to say that it has all while others write.
_DISK_THREADS = 4
# The delay before a retry, at first and at most.
_RETRY_S, _RETRY_S_MAX = 1.0, 30.0
# At most where the store refuses: a retry alone will seldom help.
_REFUSED_S_MAX = 300.0
# A store's own patience: an image that is wanted back is not held up for longer by one that does not answer.
_REQUEST_S = 2.0
# So often is looked whether other ranks have finished.
_LOOK_S, _LOOK_S_MAX = 0.5, 10.0
# A save that no trainer waits for holds up the end of the service for no longer: a store may be gone for good.
_PATIENCE_S = 24 * 3600.0


@dataclass(eq=False)
class Saving:
    """One rank's part of a checkpoint on its way. Changed by the loop's thread only."""

    kept: Kept
    began: float
    image: Image | None = None
    part: Record | None = None  # once all checksums are known
    record: bytes = b""
    sums: dict[int, bytes] = field(default_factory=dict)
    left: deque[int] = field(default_factory=deque)  # segments that are to be sent
    uploaded: set[int] = field(default_factory=set)
    disk_bytes: int = 0
    is_on_disk: bool = False
    no_disk: str = ""  # why it is not
    is_stored: bool = False  # the part record as well
    is_done: bool = False
    error: FastloadError | None = None  # that has ended it
    options_key: str | None = None
    refusal: FastloadError | None = None  # of the store, where waiting alone does not help
    reason: str = ""  # why it was to be tried again
    denied: set[str] = field(default_factory=set)  # options with which it cannot be stored
    watchers: dict[ConsumerState, None] = field(default_factory=dict)
    borrowers: set[Operator] = field(default_factory=set)
    readers: int = 0  # of the image, in threads
    wanted_back: ConsumerState | None = None
    delay_s: float = _RETRY_S
    is_begun: bool = False
    in_step: bool = False  # it begins, or finishes: nothing else goes on meanwhile
    retry: asyncio.TimerHandle | None = None  # what is to try it again

    @property
    def store_bytes(self) -> int:
        return sum(self.kept.sizes[number] for number in self.uploaded)

    @property
    def run(self) -> tuple[str, int]:
        """What is saved again and again: the folder above, and the rank."""
        return posixpath.dirname(self.kept.folder.rstrip("/")), self.kept.rank

    @property
    def level(self) -> protocol.Level:
        return "store" if self.is_done else "disk" if self.is_on_disk else "memory"


class Savings:
    """See the module's text. Used by the loop's thread only."""

    def __init__(self, resources: Resources) -> None:
        self._resources, self._stores, self._loop = resources, resources.stores, resources.pools.loop
        self._area = resources.checkpoints
        self._disk_max, self._ram_max = resources.limits.checkpoint_disk_bytes, resources.limits.checkpoint_ram()
        self._disk_pool = resources.pools.make("checkpoint-disk", _DISK_THREADS)
        self._store_pool = resources.pools.make("checkpoint-store", _UPLOADS_MAX)
        self._savings: dict[str, Saving] = {}  # by name, in the order in which they began
        self._reserved: dict[str, int] = {}  # bytes on disk, or on their way there
        self._closed = False
        self.counters: Counter[str] = Counter(
            checkpoints_saved=0, checkpoints_failed=0, checkpoint_written_bytes=0, checkpoint_stored_bytes=0
        )
        self._find()

    # What trainers ask for

    def save(self, consumer: ConsumerState, message: protocol.Save, fd: int) -> None:
        """Take over an image, whose descriptor (-1: it was given back before) is ours to close. ServiceError
        where it is none.
        """
        saving = self._savings.get(name_of(message.attempt, message.rank))
        if fd < 0 or saving is not None:  # it was handed over before, to this service or to the one before
            if fd >= 0:
                syscalls.close(fd)
            if saving is None:
                consumer.send(_lost(message))
                return
            saving.watchers[consumer] = None
            self.options_came(consumer)
            self._tell(saving)
            return
        image = Image(fd, message.image_bytes, message.segments, message.record)
        kept = Kept(
            message.folder,
            message.attempt,
            message.rank,
            message.commits,
            self._stores.endpoint(consumer.options_key),
            tuple(size for _, size in message.segments),
            0,
            self._resources.wall(),
            message.begin,
        )
        saving = self._savings[kept.name] = Saving(kept, self._resources.now(), image)
        saving.left.extend(range(len(kept.sizes)))
        saving.watchers[consumer] = None
        self._adopt(saving, consumer.options_key)
        self._prepare(saving)
        self._tell(saving)
        self._pump()

    def take_back(self, consumer: ConsumerState, message: protocol.TakeBack) -> None:
        """The trainer wants to fill an image anew, once it is not the only copy any more."""
        saving = self._savings.get(name_of(message.attempt, message.rank))
        if saving is None:
            consumer.send(protocol.Returned(message.attempt, message.rank))
            return
        saving.wanted_back = consumer
        self._give_back(saving)

    def left(self, consumer: ConsumerState) -> None:
        """It has gone; what it saves goes on."""
        for saving in list(self._savings.values()):
            saving.watchers.pop(consumer, None)
            if saving.wanted_back is consumer:
                saving.wanted_back = None
            is_over = saving.error is not None or (saving.is_done and not saving.is_on_disk and saving.image is None)
            if is_over:
                self._let_go(saving)
        self._drop_images()

    def options_came(self, consumer: ConsumerState) -> None:
        """It has come, or has got other credentials: perhaps those that a save waits for."""
        for saving in self._savings.values():
            if saving.is_done or saving.error is not None:
                continue
            is_file = scheme(saving.kept.folder) == "file"  # for which no options matter
            if is_file or self._stores.endpoint(consumer.options_key) == saving.kept.endpoint:
                if saving.retry is not None:
                    self._try_again(saving)
                if consumer in saving.watchers or saving.options_key is None:
                    self._adopt(saving, consumer.options_key)
        self._pump()

    def lend(self, operator: Operator, message: protocol.Borrow) -> None:
        """Give out the images of an attempt, to be read until the operator has gone."""
        operator.leaves.append(partial(self._returned, operator))
        found = [each for each in self._savings.values() if each.kept.attempt == message.attempt and each.image]
        found = [each for each in found if each.error is None and each.wanted_back is None][: protocol.FDS_MAX]
        for saving in found:
            saving.borrowers.add(operator)
        images = [(saving.kept.rank, list(saving.image.segments)) for saving in found if saving.image]
        fds = [saving.image.fd for saving in found if saving.image]
        operator.send_with(protocol.Lent(message.request, images), fds)

    def _returned(self, operator: Operator) -> None:
        """It reads nothing any more."""
        for saving in list(self._savings.values()):
            if operator in saving.borrowers:
                saving.borrowers.discard(operator)
                self._give_back(saving)

    # For who runs the service

    @property
    def is_busy(self) -> bool:
        """Whether the service has to go on for a save."""
        now = self._resources.now()
        return any(
            not saving.is_done
            and saving.error is None
            and saving.options_key is not None
            and now - saving.began < _PATIENCE_S
            for saving in self._savings.values()
        )

    @property
    def is_only_copy(self) -> bool:
        """Whether something may be lost if the service ended now: neither disk nor store has it, and no trainer; or one
        has it, and the disk will have it soon.
        """
        return any(
            not (saving.is_on_disk or saving.is_done or saving.error is not None)
            and not (saving.watchers and saving.no_disk)
            for saving in self._savings.values()
            if saving.image is not None
        )

    @property
    def has_images(self) -> bool:
        return any(saving.image is not None for saving in self._savings.values())

    def stats(self) -> dict[str, int]:
        """Figures, for `stats_reply`."""
        images = [saving.image.byte_count for saving in self._savings.values() if saving.image is not None]
        return {
            **self.counters,
            "checkpoint_ram_bytes": sum(images),
            "checkpoint_disk_bytes": sum(self._reserved.values()),
            "checkpoints_under_way": sum(
                not (saving.is_done or saving.error is not None) for saving in self._savings.values()
            ),
        }

    def close(self) -> None:
        self._closed = True
        for saving in self._savings.values():
            if saving.image is not None:
                saving.image.close()

    # To the disk

    def _find(self) -> None:
        """Go on with what earlier services have kept."""
        try:
            found = self._area.scan() if self._area is not None else []
        except OSError as error:
            log.warning("what is kept of checkpoints cannot be looked at, and nothing more is: %s", error)
            self._area, found = None, []
        for each in found:
            numbers = range(len(each.kept.sizes))
            saving = Saving(each.kept, self._resources.now(), is_on_disk=True, disk_bytes=each.kept.byte_count)
            saving.is_done, saving.is_stored = each.kind == COMMITTED, each.kind != KEPT
            if saving.is_stored:
                saving.uploaded.update(numbers)
            else:
                saving.left.extend(numbers)
            self._savings[each.kept.name] = saving
            self._reserved[each.kept.name] = each.kept.byte_count
            if not saving.is_done:
                self._read_part(saving)

    def _read_part(self, saving: Saving) -> None:
        assert self._area is not None
        self._disk_pool.submit(_part_of, self._area, saving.kept, done=partial(self._found_part, saving))

    def _found_part(self, saving: Saving, part: Record | None, error: BaseException | None) -> None:
        if error is not None:
            self._put_off(saving, saving.options_key, error)
            return
        saving.part = part
        self._pump()

    def _prepare(self, saving: Saving) -> None:
        """Look at the part record, and make room on the disk."""
        need, used = saving.kept.byte_count, sum(self._reserved.values())
        victims = []
        over = [each for each in self._savings.values() if each.is_done or each.error is not None]
        for other in sorted(over, key=lambda each: not each.is_done):  # of what has failed it may be the only copy
            if used + need > self._disk_max and other.kept.name in self._reserved:
                used -= self._reserved.pop(other.kept.name)
                other.is_on_disk = False
                victims.append(other.kept.name)
        if self._area is not None and used + need > self._disk_max:
            saving.no_disk = (
                f"checkpoint_disk_bytes={exact_bytes(self._disk_max)} leaves no room for {format_bytes(need)} beside "
                f"{format_bytes(used)} that are not stored yet; raise it"
            )
        area = None if saving.no_disk or self._resources.is_lost() else self._area
        if area is not None:
            self._reserved[saving.kept.name] = need
        elif not saving.no_disk:
            saving.no_disk = "this cache has no disk for checkpoints"
        image = saving.image
        assert image is not None
        saving.readers += 1

        def prepare() -> tuple[Record, str]:
            part = Record.decode(
                image.record(), saving.kept.attempt, saving.kept.rank, f"{saving.kept.folder}: its part"
            )
            own = [each.size for each in part.own]
            if own != list(saving.kept.sizes):
                raise ServiceError(f"an image has segments of {saving.kept.sizes} bytes, and its record says {own}")
            return part, "" if area is None else _make_room(area, victims, need)

        self._disk_pool.submit(prepare, done=partial(self._prepared, saving, area))

    def _prepared(
        self, saving: Saving, area: Area | None, found: tuple[Record, str] | None, error: BaseException | None
    ) -> None:
        saving.readers -= 1
        if error is not None or found is None:
            self._fail(saving, error)
            return
        draft, no_room = found
        if no_room:
            saving.no_disk, area = no_room, None
        if not saving.kept.sizes:
            self._hashed(saving, draft, area)
        for number in range(len(saving.kept.sizes)):
            self._read_image(
                saving,
                number,
                partial(_hashed_and_kept, area, saving.kept.name, number),
                self._disk_pool,
                partial(self._segment_hashed, saving, draft, area, number),
            )

    def _segment_hashed(
        self,
        saving: Saving,
        draft: Record,
        area: Area | None,
        number: int,
        found: tuple[bytes, str] | None,
        error: BaseException | None,
    ) -> None:
        if saving.error is not None:
            return
        if error is not None or found is None:
            self._fail(saving, error)
            return
        saving.sums[number], no_disk = found
        saving.no_disk = saving.no_disk or no_disk
        if area is not None and not no_disk:
            saving.disk_bytes += saving.kept.sizes[number]
            self.counters["checkpoint_written_bytes"] += saving.kept.sizes[number]
        if len(saving.sums) == len(saving.kept.sizes):
            self._hashed(saving, draft, None if saving.no_disk else area)
        else:
            self._tell(saving)

    def _hashed(self, saving: Saving, draft: Record, area: Area | None) -> None:
        """All checksums are known, and segments are on the disk where `area` is given."""
        kept, sums = saving.kept, saving.sums

        def complete() -> tuple[Kept, Record, str]:
            part = draft.with_sums([sums[number] for number in range(len(kept.sizes))])
            record = part.encode()
            whole = msgspec.structs.replace(kept, part_sum=xxh3_64_intdigest(record))
            if area is None:
                return whole, part, ""
            try:
                area.keep(whole, record)
            except OSError as error:
                return whole, part, _no_disk(area, error)
            return whole, part, ""

        self._disk_pool.submit(complete, done=partial(self._completed, saving, area))

    def _completed(
        self, saving: Saving, area: Area | None, found: tuple[Kept, Record, str] | None, error: BaseException | None
    ) -> None:
        if saving.error is not None:
            return
        if error is not None or found is None:
            self._fail(saving, error)
            return
        saving.kept, saving.part, no_disk = found
        saving.no_disk = saving.no_disk or no_disk
        saving.is_on_disk = area is not None and not saving.no_disk
        if not saving.is_on_disk:
            self._forget_files(saving)
            if saving.no_disk:
                log.warning("%s is not kept on disk: %s", saving.kept.folder, saving.no_disk)
        self._tell(saving)
        self._give_back(saving)
        self._pump()

    # To the store

    def _adopt(self, saving: Saving, options_key: str) -> None:
        """Have it stored with these options, unless they were denied."""
        if options_key in saving.denied or options_key == saving.options_key:
            return
        self._stores.share(options_key)
        self._let_go_of_options(saving)
        saving.options_key, saving.refusal = options_key, None

    def _let_go_of_options(self, saving: Saving) -> None:
        key, saving.options_key = saving.options_key, None
        if key is not None:
            self._stores.remove(key)

    def _pump(self) -> None:
        """Begin what can be, of the oldest first."""
        if self._closed:
            return
        for saving in self._savings.values():
            if saving.kept.begin is not None and not saving.is_begun:
                if self._store_pool.idle and self._can_go_on(saving):
                    self._begin(saving, saving.kept.begin)
                continue
            while self._store_pool.idle and self._can_go_on(saving) and saving.left:
                self._upload(saving, saving.left.popleft())
            is_sent = not saving.left and len(saving.uploaded) == len(saving.kept.sizes)
            if self._store_pool.idle and self._can_go_on(saving) and is_sent and saving.part is not None:
                self._finish(saving, saving.part)

    def _can_go_on(self, saving: Saving) -> bool:
        return not (
            saving.is_done
            or saving.error is not None
            or saving.options_key is None
            or saving.retry is not None
            or saving.in_step
            or (saving.image is None and saving.part is None)  # by which the files are verified
        )

    def _begin(self, saving: Saving, begin: protocol.Begin) -> None:
        """What the trainer could not do, since the store did not answer it."""
        key, kept = saving.options_key, saving.kept
        assert key is not None
        saving.in_step = True

        def begun() -> None:
            with self._stores.opened(key, kept.folder, _REQUEST_S) as store:
                attempts.begin_once(
                    Place(store, kept.folder),
                    kept.attempt,
                    overwrite=begin.overwrite,
                    now_s=begin.began_s,
                    metric=begin.metric,
                )

        self._store_pool.submit(begun, done=partial(self._has_begun, saving, key))

    def _has_begun(self, saving: Saving, key: str, _: None, error: BaseException | None) -> None:
        saving.in_step = False
        if error is not None:
            self._put_off(saving, key, error)
            return
        self._went_on(saving)
        saving.is_begun = True
        self._tell(saving)
        self._pump()

    def _upload(self, saving: Saving, number: int) -> None:
        key, kept = saving.options_key, saving.kept
        assert key is not None

        def put(data: memoryview) -> None:
            with self._stores.opened(key, kept.folder, _REQUEST_S) as store:
                store.put(kept.folder + object_name(kept.attempt, kept.rank, number), data)

        part = saving.part

        def put_file() -> None:
            assert self._area is not None
            assert part is not None
            with self._area.segment(kept, number, part.own[number].sums) as data:
                put(data)

        done = partial(self._uploaded, saving, number, key)
        if saving.image is not None and not (saving.wanted_back is not None and saving.is_on_disk):
            self._read_image(saving, number, put, self._store_pool, done)
        else:
            self._store_pool.submit(put_file, done=done)

    def _uploaded(self, saving: Saving, number: int, key: str, _: None, error: BaseException | None) -> None:
        if saving.error is not None:
            return
        if error is not None:
            saving.left.appendleft(number)
            self._put_off(saving, key, error)
            return
        self._went_on(saving)
        saving.uploaded.add(number)
        self.counters["checkpoint_stored_bytes"] += saving.kept.sizes[number]
        self._tell(saving)
        self._pump()

    def _finish(self, saving: Saving, part: Record) -> None:
        """The part record, and where that is this rank's task the commit."""
        key, kept, was_stored = saving.options_key, saving.kept, saving.is_stored
        assert key is not None
        saving.in_step = True

        def finish() -> bool:
            with self._stores.opened(key, kept.folder, _REQUEST_S) as store:
                place = Place(store, kept.folder)
                if not was_stored:
                    attempts.finish_rank(place, part)
                return not kept.commits or attempts.commit_with(place, kept.attempt, kept.rank) is Step.COMMITTED

        self._store_pool.submit(finish, done=partial(self._finished, saving, key))

    def _finished(self, saving: Saving, key: str, is_committed: bool | None, error: BaseException | None) -> None:
        saving.in_step = False
        if error is not None:
            self._put_off(saving, key, error)
            return
        if not is_committed:
            if not saving.is_stored:
                self._went_on(saving)
                saving.is_stored, saving.delay_s = True, _LOOK_S
                saving.reason = "not all other ranks have stored their parts"
                self._note(saving, STORED)
                self._tell(saving)
            self._wait(saving, _LOOK_S_MAX)
            return
        self._went_on(saving)
        saving.is_stored = saving.is_done = True
        self.counters["checkpoints_saved"] += 1
        self._note(saving, COMMITTED)
        self._let_go_of_options(saving)
        log.info("%s: rank %d is stored", saving.kept.folder, saving.kept.rank)
        self._tell(saving)
        self._drop_older(saving)
        self._give_back(saving)
        self._drop_images()
        self._pump()

    def _put_off(self, saving: Saving, key: str | None, error: BaseException) -> None:
        """It cannot be stored now: try again where that may ever help."""
        if isinstance(error, CheckpointExistsError | CheckpointError | CacheError):
            self._fail(saving, error)
            return
        shown = from_wire(*to_wire(error))
        is_known, saving.reason = saving.reason == str(shown), str(shown)
        if isinstance(error, StoreUnavailableError):
            if saving.retry is None:
                log.warning("%s is tried again in %.0f s: %s", saving.kept.folder, saving.delay_s, error)
            self._wait(saving, _RETRY_S_MAX)
        elif not isinstance(error, AccessDeniedError):
            if not is_known:
                log.error("%s is kept, and tried again from time to time: %s", saving.kept.folder, shown)
            saving.refusal = shown
            self._wait(saving, _REFUSED_S_MAX)
        elif saving.options_key == key is not None:
            log.warning("%s waits for other credentials: %s", saving.kept.folder, error)
            saving.denied.add(key)
            self._let_go_of_options(saving)
            saving.refusal = shown
        else:  # others have come meanwhile
            self._pump()
        self._tell(saving)
        self._give_back(saving)

    def _wait(self, saving: Saving, delay_s_max: float) -> None:
        if saving.retry is None:
            saving.retry = self._loop.call_later(saving.delay_s, self._go_on, saving)
            saving.delay_s = min(2 * saving.delay_s, delay_s_max)

    def _go_on(self, saving: Saving) -> None:
        if not self._closed:
            self._try_again(saving)
            self._pump()

    def _try_again(self, saving: Saving) -> None:
        """At once, in place of when it was to be."""
        if saving.retry is not None:
            saving.retry.cancel()
            saving.retry = None
        if saving.image is None and saving.part is None:
            self._read_part(saving)

    def _went_on(self, saving: Saving) -> None:
        """The store has taken something: nothing is in the way any more."""
        saving.delay_s, saving.reason, saving.refusal = _RETRY_S, "", None

    # The end of one

    def _fail(self, saving: Saving, error: BaseException | None) -> None:
        if saving.error is not None:
            return
        saving.error = from_wire(*to_wire(error or ServiceError("a thread of the service ended")))
        self.counters["checkpoints_failed"] += 1
        kept = f"; its files {self._area.path / saving.kept.name}* are kept" if self._area and saving.is_on_disk else ""
        log.error("%s, rank %d, cannot be saved: %s%s", saving.kept.folder, saving.kept.rank, saving.error, kept)
        saving.left.clear()
        self._let_go_of_options(saving)
        if isinstance(error, CheckpointExistsError) or not saving.is_on_disk:
            self._forget_files(saving)
        self._tell(saving)
        self._give_back(saving)
        self._let_go(saving)
        for other in list(self._savings.values()):  # one that is younger may be stored already
            if other.is_done and other.run == saving.run:
                self._drop_older(other)

    def _let_go(self, saving: Saving) -> None:
        """Of one that is over, where no trainer has it any more: only files may stay."""
        if not saving.watchers:
            self._close_image(saving)
            if not saving.is_on_disk:
                self._forget(saving)

    def _drop_older(self, saving: Saving) -> None:
        """What this one replaces for a trainer that starts again."""
        for other in list(self._savings.values()):
            if other is saving:
                return
            is_over = other.is_done or other.error is not None
            if other.run == saving.run and is_over and not other.borrowers:
                self._forget_files(other)
                if not other.watchers:
                    self._forget(other)

    def _drop_images(self) -> None:
        """Those that no trainer has any more, beyond what may be kept."""
        held = [saving for saving in self._savings.values() if saving.image is not None]
        excess = sum(saving.image.byte_count for saving in held if saving.image is not None) - self._ram_max
        for saving in held:
            if excess <= 0:
                return
            if saving.is_done and not (saving.watchers or saving.borrowers or saving.readers):
                assert saving.image is not None
                excess -= saving.image.byte_count
                self._close_image(saving)
                if not saving.is_on_disk:
                    self._forget(saving)

    def _forget(self, saving: Saving) -> None:
        self._close_image(saving)
        self._savings.pop(saving.kept.name, None)

    def _close_image(self, saving: Saving) -> None:
        image, saving.image = saving.image, None
        if image is not None:
            image.close()

    def _forget_files(self, saving: Saving) -> None:
        saving.is_on_disk = False
        if self._reserved.pop(saving.kept.name, None) is not None and self._area is not None:
            self._disk_pool.submit(self._area.remove, saving.kept.name, done=_logged)

    def _note(self, saving: Saving, kind: int) -> None:
        if saving.is_on_disk and self._area is not None:
            self._disk_pool.submit(self._area.note, saving.kept.name, kind, done=_logged)

    # Images

    def _read_image(
        self, saving: Saving, number: int, read: Callable[[memoryview], Any], pool: Pool, done: Done
    ) -> None:
        image = saving.image
        assert image is not None
        saving.readers += 1

        def has_read(result: Any, error: BaseException | None) -> None:
            saving.readers -= 1
            done(result, error)
            self._give_back(saving)

        pool.submit(lambda: read(image.segment(number)), done=has_read)

    def _give_back(self, saving: Saving) -> None:
        """The image, where the trainer wants it and that costs nothing."""
        consumer = saving.wanted_back
        is_safe = saving.is_on_disk or saving.is_done or saving.error is not None
        if consumer is None or saving.readers or saving.borrowers:
            return
        if not is_safe:
            if saving.no_disk and saving.refusal is not None and saving.options_key is not None:
                self._fail(saving, saving.refusal)  # the trainer would wait for what is refused
            return
        saving.wanted_back = None
        self._close_image(saving)
        consumer.send(protocol.Returned(saving.kept.attempt, saving.kept.rank))

    # Telling

    def _tell(self, saving: Saving) -> None:
        for consumer in saving.watchers:
            consumer.send(self._state_of(saving))

    def _state_of(self, saving: Saving) -> protocol.SaveState:
        error = saving.error or saving.refusal
        name, message = ("", "") if error is None else to_wire(error)
        return protocol.SaveState(
            saving.kept.attempt,
            saving.kept.rank,
            saving.level,
            saving.disk_bytes,
            saving.store_bytes,
            saving.no_disk,
            name,
            message,
            saving.error is None and error is not None,
            saving.reason,
        )


def _hashed_and_kept(area: Area | None, name: str, number: int, data: memoryview) -> tuple[bytes, str]:
    """A segment's checksums, and why it is not on the disk."""
    sums = checksums([data])
    if area is not None:
        try:
            area.write_segment(name, number, data)
        except OSError as error:
            return sums, _no_disk(area, error)
    return sums, ""


def _make_room(area: Area, victims: list[str], need: int) -> str:
    """What is in the way of `need` bytes, once the victims have gone."""
    try:
        area.make()
        for name in victims:
            area.remove(name)
        free = area.free_bytes()
    except OSError as error:
        return _no_disk(area, error)
    if free < need:
        return f"the disk of {area.path} has {format_bytes(free)} left for {format_bytes(need)}"
    return ""


def _no_disk(area: Area, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"the disk of {area.path} is full"
    return f"{area.path} cannot be written: {error.strerror or error}"


def _part_of(area: Area, kept: Kept) -> Record:
    where = f"{area.path / kept.name}.part"
    return Record.decode(area.read_part(kept), kept.attempt, kept.rank, where)


def _lost(message: protocol.Save) -> protocol.SaveState:
    error = ServiceError(
        f"{message.folder}: the cache service that had this save has ended, and nothing of it is on disk; if the "
        "checkpoint is not there, save again"
    )
    return protocol.SaveState(message.attempt, message.rank, "", 0, 0, "", *to_wire(error))


def _logged(_: Any, error: BaseException | None) -> None:
    if error is not None:
        log.warning("the files of a checkpoint: %s", error)
