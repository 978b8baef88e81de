"""Readers without a plan, that read as an earlier run did: what they read next is fetched ahead.

Each consumer without a plan of its own has a follower (`history.follow`). While it is found in the history, it has a
`ReplayPlan`, the next reads from its place on, which the scheduler treats as it treats a plan of a consumer's own: by
distance, among all others, and no further ahead than the follower is to be believed. The plan is made anew when it has
been used up by half.

A prediction names the version of the object that was read then. A fetch of it is answered only if it is still the one,
so opening the object afterwards takes no other question to the store. Where it has changed, the fetch
fails once and silently, and the reader finds the new version as it would have.

The history is read in a thread, when such a consumer begins and there is more of it; and again when it has read so many
chunks that were not predicted, twice as many, and so on: one that stays over epochs finds its own earlier ones there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastload.errors import AccessDeniedError, StoreUnavailableError
from fastload.history.follow import Follower
from fastload.history.keys import object_key
from fastload.history.library import Library
from fastload.service.fetching.openings import Versions
from fastload.service.recording import Recording
from fastload.service.resources import Resources
from fastload.service.shared_state import SharedState
from fastload.service.state import Chunk, ConsumerState, ObjectEntry, Plan, Step
from fastload.store.urls import scheme, store_root

# Reads of a plan; making one costs ten microseconds a read.
_READS_MAX = 512
_READS_MIN = 8
# Versions of objects that are not tried again.
_STALE_MAX = 1 << 16
# Reads that came before the history was there, or a newer one.
_EARLY_MAX = 16
# After so many reads that were not predicted the history is looked into again.
_LOOK_AGAIN_AFTER = 32


class ReplayPlan(Plan):
    """The next reads of one consumer, by prediction. Position i is the i-th; an object's chunks need not follow on each
    other. Its entries count as used while it lives.
    """

    covers = False

    def __init__(self, steps: list[tuple[ObjectEntry, int]], options_key: str, trace: range, asked: int) -> None:
        """`trace`: the places of the first of these reads, as far as they are one trace's. `asked`: how many reads were
        asked for; fewer steps mean that the history ends there.
        """
        super().__init__([], options_key, 0)
        self.is_blind = True
        self.first_place, self._trace, self._is_last = trace.start, trace, len(steps) < asked
        self._list = steps
        self.places: dict[tuple[ObjectEntry, int], list[int]] = {}
        for position, step in enumerate(steps):
            self.places.setdefault(step, []).append(position)

    @property
    def chunk_count(self) -> int:
        return len(self._list)

    def position(self, entry: ObjectEntry, index: int) -> int:
        """The next position of a chunk: the first at or after the cursor, else its last; -1 if it has none."""
        positions = self.places.get((entry, index))
        if positions is None:
            return -1
        return positions[min(bisect_left(positions, self.cursor), len(positions) - 1)]

    def delivered(self, entry: ObjectEntry, index: int) -> None:
        """Says nothing: `advance` follows the reader, and a chunk may be read again much later in the plan."""

    def at(self, position: int) -> tuple[ObjectEntry, int]:
        """The chunk at a position."""
        return self._list[position]

    def leads_from(self, place: int) -> bool:
        """Whether what follows the place is in the plan."""
        return place + 1 == self.first_place or place in self._trace

    def lasts(self, done: int, ahead: int) -> bool:
        """Whether, when so many of its reads are done, it need not be made anew for looking so far ahead."""
        return done >= self.cursor and (self._is_last or self.chunk_count - done >= min(_READS_MAX // 2, ahead))

    def entries_used(self) -> list[ObjectEntry]:
        """The entry of each read."""
        return [entry for entry, _ in self._list]

    def objects(self) -> Iterator[ObjectEntry]:
        return iter(dict.fromkeys(self.entries_used()))

    def _steps(self, position: int) -> Iterator[Step]:
        for at in range(position, len(self._list)):
            yield at, *self._list[at]


@dataclass(slots=True)
class _Prediction:
    follower: Follower | None = None
    plan: ReplayPlan | None = None
    unconfirmed: set[ObjectEntry] = field(default_factory=set)  # of the plan, versions that no consumer asked for
    denied: set[bytes] = field(default_factory=set)  # versions that its credentials do not show
    lost_count: int = 0  # reads that came while it had no plan
    look_again_at: int = _LOOK_AGAIN_AFTER  # of these
    early: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_EARLY_MAX))


class Replay:
    """Used by the loop's thread only."""

    def __init__(self, resources: Resources, shared: SharedState, versions: Versions, recording: Recording) -> None:
        self._plans, self._objects, self._stores = shared.plans, shared.objects, resources.stores
        self._versions, self._recording, self._changed = versions, recording, resources.events.changed
        self._library: Library | None = None
        self._readers: dict[ConsumerState, _Prediction] = {}
        self._stale: set[bytes] = set()  # versions that were fetched in vain
        self.counters: Counter[str] = Counter(replayed_reads=0)
        resources.events.fetched.connect(self.fetched)
        resources.events.load_failed.connect(self.failed)
        resources.events.history_cleared.connect(self.forget)

    # What happens

    def opening(self, consumer: ConsumerState, url: str) -> None:
        """A consumer opens an object, which is mostly read from its start."""
        if _has_own_plan(consumer):
            return
        reader = self._reader(consumer)
        if reader.follower is not None and reader.follower.expect(object_key(url)):
            self._update(consumer, reader)

    def read(self, consumer: ConsumerState, key: int, index: int) -> None:
        """A consumer reads a chunk of the object with this key."""
        if _has_own_plan(consumer):
            return
        reader = self._reader(consumer)
        reader.early.append((key, index))
        if reader.follower is not None:
            self.counters["replayed_reads"] += reader.follower.saw(key, index) and reader.plan is not None
            self._update(consumer, reader)
        if reader.plan is None:
            self._lost(reader)

    def fetched(self, chunk: Chunk) -> None:
        """A chunk has come from its store, so that the version it was expected to be of is the present one."""
        info = chunk.entry.info
        for consumer, reader in self._readers.items():
            if chunk.entry not in reader.unconfirmed:
                continue
            reader.unconfirmed.discard(chunk.entry)
            if info.etag is not None and scheme(info.url) != "file" and consumer.options_key == chunk.fetched_as:
                self._versions.learn(consumer.options_key, info)

    def failed(self, chunk: Chunk, error: BaseException) -> None:
        """A chunk could not be had: what is there now is not what was read then. Or these credentials do not do, or the
        store is away, which passes: a service may live for weeks.
        """
        if chunk.wanters or isinstance(error, StoreUnavailableError):
            return
        if isinstance(error, AccessDeniedError):
            for consumer, reader in self._readers.items():
                if consumer.options_key == chunk.fetched_as:
                    _add(reader.denied, chunk.entry.id)
        else:
            _add(self._stale, chunk.entry.id)

    def left(self, consumer: ConsumerState) -> None:
        """A consumer has gone, or begins anew."""
        reader = self._readers.pop(consumer, None)
        if reader is not None:
            self._set_plan(consumer, reader, None)

    def credentials_changed(self, consumer: ConsumerState) -> None:
        """What is predicted for a consumer is to be had with others now, and may be elsewhere."""
        reader = self._readers.get(consumer)
        if reader is not None:
            reader.denied.clear()
            self._set_plan(consumer, reader, None)
            self._update(consumer, reader)

    def forget(self) -> None:
        """Forget what was predicted: the history was cleared."""
        self._library = None
        for consumer, reader in self._readers.items():
            reader.follower = None
            self._set_plan(consumer, reader, None)

    def _reader(self, consumer: ConsumerState) -> _Prediction:
        reader = self._readers.get(consumer)
        if reader is None:
            reader = self._readers[consumer] = self._begin(_Prediction())
            self._recording.load(self._loaded)
        return reader

    # The history

    def _loaded(self, library: Library) -> None:
        self._library = library
        for consumer, reader in self._readers.items():
            if reader.plan is None:
                self._begin(reader)
                self._update(consumer, reader)
        self._changed()

    def _lost(self, reader: _Prediction) -> None:
        """A read was not predicted."""
        reader.lost_count += 1
        if reader.lost_count >= reader.look_again_at:
            reader.look_again_at *= 2
            self._recording.load(self._loaded)

    def _begin(self, reader: _Prediction) -> _Prediction:
        """Have the reader followed by what is known now."""
        if self._library is not None and len(self._library):
            reader.follower = Follower(self._library)
            for key, index in reader.early:
                reader.follower.saw(key, index)
            if reader.follower.is_at_end:  # these are its own reads so far: what others read then says nothing of it
                reader.follower = Follower(self._library)
        return reader

    # Plans

    def _update(self, consumer: ConsumerState, reader: _Prediction) -> None:
        follower, plan = reader.follower, reader.plan
        if follower is None or follower.place is None:
            self._set_plan(consumer, reader, None)
            return
        ahead = follower.ahead_max
        if plan is not None:
            done = follower.place + 1 - plan.first_place
            if plan.leads_from(follower.place) and plan.lasts(done, ahead):
                plan.depth = ahead
                plan.advance(done)
                return
        self._set_plan(consumer, reader, self._predict(consumer, reader, follower, follower.place))

    def _predict(self, consumer: ConsumerState, reader: _Prediction, follower: Follower, place: int) -> ReplayPlan:
        library, endpoint = follower.library, self._stores.endpoint(consumer.options_key)
        count = max(_READS_MIN, min(_READS_MAX, 4 * follower.ahead_max))
        steps: list[tuple[ObjectEntry, int]] = []
        gone = set()  # positions of what is gone, since the object is shorter by now
        reader.unconfirmed = set()
        for at in library.after(place, count).tolist():
            info, index = library.chunk(at)
            known = self._versions.get(consumer.options_key, info.url)
            try:
                store_root(info.url)
                entry = self._objects.use_info(known or info, endpoint)
            except ValueError:  # no URL at all: it cannot have been read, so nothing of this run is to be believed
                break
            if index >= entry.chunk_count:
                gone.add(len(steps))
            steps.append((entry, index))
            if known is None:
                reader.unconfirmed.add(entry)
        plan = ReplayPlan(steps, consumer.options_key, range(place + 1, library.trace(place).end), count)
        plan.depth = follower.ahead_max
        in_vain = (self._stale, reader.denied)
        plan.failed = gone.union(at for at, (entry, _) in enumerate(steps) if any(entry.id in each for each in in_vain))
        return plan

    def _set_plan(self, consumer: ConsumerState, reader: _Prediction, plan: ReplayPlan | None) -> None:
        before, reader.plan = reader.plan, plan
        if before is None and plan is None:
            return
        self._plans.replay(consumer, plan)
        if plan is None:
            reader.unconfirmed = set()
        if before is not None:  # last, so that what both name stays
            self._objects.unuse(before.entries_used())


def _add(versions: set[bytes], version: bytes) -> None:
    if len(versions) >= _STALE_MAX:
        versions.clear()
    versions.add(version)


def _has_own_plan(consumer: ConsumerState) -> bool:
    return consumer.plan is not None and not isinstance(consumer.plan, ReplayPlan)
