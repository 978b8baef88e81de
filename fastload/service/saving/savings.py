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
import logging
from collections import Counter
from functools import partial

from fastload import protocol
from fastload.cache import syscalls
from fastload.checkpoint.records import Record
from fastload.config import exact_bytes, format_bytes
from fastload.errors import (
    AccessDeniedError,
    CacheError,
    CheckpointError,
    CheckpointExistsError,
    ServiceError,
    StoreUnavailableError,
    from_wire,
    to_wire,
)
from fastload.service.operators import Operator
from fastload.service.resources import Resources
from fastload.service.saving.area import COMMITTED, KEPT, STORED, Kept, name_of
from fastload.service.saving.image import Image
from fastload.service.saving.state import RETRY_S, Saving
from fastload.service.saving.to_disk import ToDisk
from fastload.service.saving.to_store import ToStore
from fastload.service.saving.upload_limit import WAITED_S
from fastload.service.state import ConsumerState

log = logging.getLogger("fastload.service")

# The delay before a retry, at most.
_RETRY_S_MAX = 30.0
# At most where the store refuses: a retry alone will seldom help.
_REFUSED_S_MAX = 300.0
# So often is looked whether other ranks have finished.
_LOOK_S, _LOOK_S_MAX = 0.5, 10.0
# A save that no trainer waits for holds up the end of the service for no longer: a store may be gone for good.
_PATIENCE_S = 24 * 3600.0


class Savings:
    """See the module's text. Used by the loop's thread only."""

    def __init__(self, resources: Resources) -> None:
        self._resources, self._loop = resources, resources.pools.loop
        self._savings: dict[str, Saving] = {}  # by name, in the order in which they began
        self._closed = False
        self._after_loaders: asyncio.TimerHandle | None = None
        self.counters: Counter[str] = Counter(
            checkpoints_saved=0, checkpoints_failed=0, checkpoint_written_bytes=0, checkpoint_stored_bytes=0
        )
        self._disk = ToDisk(resources, self.counters, self._tell, self._is_hashed, self._fail, self._give_back)
        self._store = ToStore(resources, self._disk, self._give_back)
        self._disk_max, self._ram_max = resources.limits.checkpoint_disk_bytes, resources.limits.checkpoint_ram()
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
            self._store.endpoint(consumer),
            tuple(size for _, size in message.segments),
            0,
            self._resources.wall(),
            message.begin,
        )
        saving = self._savings[kept.name] = Saving(kept, self._resources.now(), image)
        saving.left.extend(range(len(kept.sizes)))
        saving.watchers[consumer] = None
        self._store.adopt(saving, consumer.options_key)
        self._write(saving)
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
            if not saving.is_over and self._store.may_adopt(saving, consumer):
                if saving.retry is not None:
                    self._try_again(saving)
                if consumer in saving.watchers or saving.options_key is None:
                    self._store.adopt(saving, consumer.options_key)
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

    def loader_waits(self) -> None:
        """A thread of a loader waits for bytes of a store, which go before those of a save that nobody waits for."""
        self._store.loader_waits()
        if self._after_loaders is not None:
            self._after_loaders.cancel()
        self._after_loaders = self._loop.call_later(WAITED_S, self._pump)

    @property
    def is_sending(self) -> bool:
        """Whether uploads are in flight."""
        return self._store.is_sending

    @property
    def is_busy(self) -> bool:
        """Whether the service has to go on for a save."""
        now = self._resources.now()
        return any(
            not saving.is_over and saving.options_key is not None and now - saving.began < _PATIENCE_S
            for saving in self._savings.values()
        )

    @property
    def is_only_copy(self) -> bool:
        """Whether something may be lost if the service ended now: neither disk nor store has it, and no trainer; or one
        has it, and the disk will have it soon.
        """
        return any(
            not (saving.is_on_disk or saving.is_over) and not (saving.watchers and saving.no_disk)
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
            "checkpoint_disk_bytes": self._disk.reserved_bytes,
            "checkpoints_under_way": sum(not saving.is_over for saving in self._savings.values()),
        }

    def close(self) -> None:
        self._closed = True
        if self._after_loaders is not None:
            self._after_loaders.cancel()
        for saving in self._savings.values():
            if saving.image is not None:
                saving.image.close()

    # To the disk

    def _find(self) -> None:
        """Go on with what earlier services have kept."""
        for each in self._disk.find():
            numbers = range(len(each.kept.sizes))
            saving = Saving(each.kept, self._resources.now(), is_on_disk=True, disk_bytes=each.kept.byte_count)
            saving.is_done, saving.is_stored = each.kind == COMMITTED, each.kind != KEPT
            if saving.is_stored:
                saving.uploaded.update(numbers)
            else:
                saving.left.extend(numbers)
            self._savings[each.kept.name] = saving
            if not saving.is_done:
                self._read_part(saving)

    def _read_part(self, saving: Saving) -> None:
        self._disk.read_part(saving, partial(self._found_part, saving))

    def _found_part(self, saving: Saving, part: Record | None, error: BaseException | None) -> None:
        if error is not None:
            self._put_off(saving, saving.options_key, error)
            return
        saving.part = part
        self._pump()

    def _write(self, saving: Saving) -> None:
        """Have it on the disk, where the limit leaves room for it once what is over has gone."""
        need, used = saving.kept.byte_count, self._disk.reserved_bytes
        over = [each for each in self._savings.values() if each.is_over and self._disk.reserved(each)]
        over.sort(key=lambda each: not each.is_done)  # of what has failed it may be the only copy
        victims = []
        while over and used + need > self._disk_max:
            victims.append(over.pop(0))
            used -= self._disk.reserved(victims[-1])
        if self._disk.path is not None and used + need > self._disk_max:
            victims.clear()  # nothing goes for what has no room in any case
            saving.no_disk = (
                f"checkpoint_disk_bytes={exact_bytes(self._disk_max)} leaves no room for {format_bytes(need)} beside "
                f"{format_bytes(used)} that are not stored yet; raise it"
            )
        self._disk.write(saving, victims)

    def _is_hashed(self, saving: Saving) -> None:
        """Its part record is whole, and it is on the disk unless `no_disk` says why not."""
        self._tell(saving)
        self._give_back(saving)
        self._pump()

    # To the store

    def _pump(self) -> None:
        """Begin what can be, of the oldest first."""
        if self._closed:
            return
        for saving in self._savings.values():
            if saving.kept.begin is not None and not saving.is_begun:
                if self._store.is_free and self._can_go_on(saving):
                    self._begin(saving, saving.kept.begin)
                continue
            while self._can_go_on(saving) and saving.left and self._store.has_room(saving):
                self._upload(saving, saving.left.popleft())
            is_sent = not saving.left and len(saving.uploaded) == len(saving.kept.sizes)
            if self._store.is_free and self._can_go_on(saving) and is_sent and saving.part is not None:
                self._finish(saving, saving.part)
        self._store.settle()

    def _can_go_on(self, saving: Saving) -> bool:
        return not (
            saving.is_over
            or saving.options_key is None
            or saving.retry is not None
            or saving.in_step
            or (saving.image is None and saving.part is None)  # by which the files are verified
        )

    def _begin(self, saving: Saving, begin: protocol.Begin) -> None:
        key, saving.in_step = saving.options_key, True
        self._store.begin(saving, begin, partial(self._has_begun, saving, key))

    def _has_begun(self, saving: Saving, key: str | None, _: None, error: BaseException | None) -> None:
        saving.in_step = False
        if error is not None:
            self._put_off(saving, key, error)
            return
        self._went_on(saving)
        saving.is_begun = True
        self._tell(saving)
        self._pump()

    def _upload(self, saving: Saving, number: int) -> None:
        self._store.upload(saving, number, partial(self._uploaded, saving, number, saving.options_key))

    def _uploaded(self, saving: Saving, number: int, key: str | None, _: None, error: BaseException | None) -> None:
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
        key, saving.in_step = saving.options_key, True
        self._store.finish(saving, part, partial(self._finished, saving, key))

    def _finished(
        self, saving: Saving, key: str | None, is_committed: bool | None, error: BaseException | None
    ) -> None:
        saving.in_step = False
        if error is not None:
            self._put_off(saving, key, error)
            return
        if not is_committed:
            if not saving.is_stored:
                self._went_on(saving)
                saving.is_stored, saving.delay_s = True, _LOOK_S
                saving.reason = "not all other ranks have stored their parts"
                self._disk.note(saving, STORED)
                self._tell(saving)
            self._wait(saving, _LOOK_S_MAX)
            return
        self._went_on(saving)
        saving.is_stored = saving.is_done = True
        self.counters["checkpoints_saved"] += 1
        self._disk.note(saving, COMMITTED)
        self._store.let_go_of_options(saving)
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
            self._store.let_go_of_options(saving)
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
        saving.delay_s, saving.reason, saving.refusal = RETRY_S, "", None

    # The end of one

    def _fail(self, saving: Saving, error: BaseException | None) -> None:
        if saving.error is not None:
            return
        saving.error = from_wire(*to_wire(error or ServiceError("a thread of the service ended")))
        self.counters["checkpoints_failed"] += 1
        path = self._disk.path
        kept = f"; its files {path / saving.kept.name}* are kept" if path is not None and saving.is_on_disk else ""
        log.error("%s, rank %d, cannot be saved: %s%s", saving.kept.folder, saving.kept.rank, saving.error, kept)
        saving.left.clear()
        self._store.let_go_of_options(saving)
        if isinstance(error, CheckpointExistsError) or not saving.is_on_disk:
            self._disk.forget(saving)
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
            if other.run == saving.run and other.is_over and not other.borrowers:
                self._disk.forget(other)
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

    def _give_back(self, saving: Saving) -> None:
        """The image, where the trainer wants it and that costs nothing."""
        consumer = saving.wanted_back
        is_safe = saving.is_on_disk or saving.is_over
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


def _lost(message: protocol.Save) -> protocol.SaveState:
    error = ServiceError(
        f"{message.folder}: the cache service that had this save has ended, and nothing of it is on disk; if the "
        "checkpoint is not there, save again"
    )
    return protocol.SaveState(message.attempt, message.rank, "", 0, 0, "", *to_wire(error))
