"""The store's half of saves: which credentials a save has, and the requests that begin it, send it and finish it.

How many segments are in flight is limited for each bucket (`upload_limit`), the requests before and after them are not.
When each request is made, and what becomes of a save whose request fails, is for `Savings`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastload import protocol
from fastload.checkpoint import attempts
from fastload.checkpoint.attempts import Place
from fastload.checkpoint.commit import Step
from fastload.checkpoint.records import Record, object_name
from fastload.service.host.threads import Done
from fastload.service.resources import Resources
from fastload.service.saving.image import Image
from fastload.service.saving.state import Saving
from fastload.service.saving.to_disk import ToDisk
from fastload.service.saving.upload_limit import UPLOADS_MAX, UploadLimit
from fastload.service.state import ConsumerState
from fastload.store.urls import scheme, store_root
from fastload.store.watch import Attempt, Watch

# Of all saves: segments that are sent, and a few other requests.
_REQUESTS_MAX = UPLOADS_MAX + 4
# Of those that are sent from files: each is in memory meanwhile, and was verified there.
_FROM_FILES_MAX = 4
# A store's own patience: an image that is wanted back is not held up for longer by one that does not answer.
_REQUEST_S = 2.0


class ToStore:
    """See the module's text. Used by the loop's thread only."""

    def __init__(self, resources: Resources, disk: ToDisk, released: Callable[[Saving], None]) -> None:
        """`released(saving)`: as of `Saving.read_image`."""
        self._stores, self._disk, self._released = resources.stores, disk, released
        self._pool = resources.pools.make("checkpoint-store", _REQUESTS_MAX)
        self._now, self._waited_for_core = resources.now, resources.waited_for_core
        self._limits: dict[str, UploadLimit] = {}  # by bucket
        self._from_files = 0

    @property
    def is_free(self) -> bool:
        """Whether one more request would be sent at once."""
        return self._pool.idle > 0

    @property
    def is_sending(self) -> bool:
        """Whether any segment is in flight."""
        return any(limit.in_flight for limit in self._limits.values())

    def has_room(self, saving: Saving) -> bool:
        """Whether one more segment of this save is to be sent now."""
        if not self.is_free or (not _is_from_image(saving) and self._from_files >= _FROM_FILES_MAX):
            return False
        return self._limit_of(saving).has_room(self._now(), is_waited_for=saving.wanted_back is not None)

    def loader_waits(self) -> None:
        """A thread of a loader waits for bytes of a store."""
        for limit in self._limits.values():
            limit.loader_waits(self._now())

    def settle(self) -> None:
        """All that is to be sent now, and may be, is in flight."""
        for limit in self._limits.values():
            limit.settle(self._now())

    def _limit_of(self, saving: Saving) -> UploadLimit:
        return self._limits.setdefault(store_root(saving.kept.folder), UploadLimit())

    # Credentials

    def endpoint(self, consumer: ConsumerState) -> str:
        return self._stores.endpoint(consumer.options_key)

    def may_adopt(self, saving: Saving, consumer: ConsumerState) -> bool:
        """Whether the consumer's options are for the store that the save goes to."""
        is_file = scheme(saving.kept.folder) == "file"  # for which no options matter
        return is_file or self.endpoint(consumer) == saving.kept.endpoint

    def adopt(self, saving: Saving, options_key: str) -> None:
        """Have it stored with these options, unless they were denied."""
        if options_key in saving.denied or options_key == saving.options_key:
            return
        self._stores.share(options_key)
        self.let_go_of_options(saving)
        saving.options_key, saving.refusal = options_key, None

    def let_go_of_options(self, saving: Saving) -> None:
        key, saving.options_key = saving.options_key, None
        if key is not None:
            self._stores.remove(key)

    # Requests. `done` gets what came of one. The save may have other options by then.

    def begin(self, saving: Saving, begin: protocol.Begin, done: Done) -> None:
        """What the trainer could not do, since the store did not answer it."""
        key, kept = saving.options_key, saving.kept
        assert key is not None

        def begun() -> None:
            with self._stores.opened(key, kept.folder, _REQUEST_S) as store:
                attempts.begin_once(
                    Place(store, kept.folder),
                    kept.attempt,
                    overwrite=begin.overwrite,
                    now_s=begin.began_s,
                    metric=begin.metric,
                )

        self._pool.submit(begun, done=done)

    def upload(self, saving: Saving, number: int, done: Done) -> None:
        """Send a segment: from the image, or from its file where the trainer wants the image back."""
        key, kept, part = saving.options_key, saving.kept, saving.part
        assert key is not None
        limit, attempts_made, is_from_image = self._limit_of(saving), list[Attempt](), _is_from_image(saving)
        watch = Watch(attempts_made.append, self._now, self._waited_for_core)

        def put(data: memoryview) -> None:
            with watch.over(), self._stores.opened(key, kept.folder, _REQUEST_S) as store:
                store.put(kept.folder + object_name(kept.attempt, kept.rank, number), data)

        def put_from(image: Image) -> None:
            put(image.segment(number))

        def put_file() -> None:
            assert part is not None
            with self._disk.segment(kept, number, part.own[number].sums) as data:
                put(data)

        def ended(result: Any, error: BaseException | None) -> None:
            limit.ended(attempts_made, self._now())
            self._from_files -= not is_from_image
            done(result, error)

        limit.began()
        self._from_files += not is_from_image
        if is_from_image:
            saving.read_image(self._pool, put_from, ended, self._released)
        else:
            self._pool.submit(put_file, done=ended)

    def finish(self, saving: Saving, part: Record, done: Done) -> None:
        """The part record, and where that is this rank's task the commit: `done` gets whether all is done."""
        key, kept, was_stored = saving.options_key, saving.kept, saving.is_stored
        assert key is not None

        def finish() -> bool:
            with self._stores.opened(key, kept.folder, _REQUEST_S) as store:
                place = Place(store, kept.folder)
                if not was_stored:
                    attempts.finish_rank(place, part)
                return not kept.commits or attempts.commit_with(place, kept.attempt, kept.rank) is Step.COMMITTED

        self._pool.submit(finish, done=done)


def _is_from_image(saving: Saving) -> bool:
    """Whether its segments are sent from there: the trainer may want it back as soon as they need not be."""
    return saving.image is not None and not (saving.wanted_back is not None and saving.is_on_disk)
