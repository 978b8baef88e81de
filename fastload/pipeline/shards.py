"""Shard indexes: from this process's memory, the service, a sidecar file, or by parsing the shard's bytes once.

Consumers parse and the service stores: the first pass over a shard costs a walk over its headers, in the same chunks
that are fetched for its samples anyway, and no later pass, epoch or process pays it again. The ranks of a node come to
the same shards at the same time: the service has one of them do it, and the others wait for what that finds.

Sidecar files are attached behind the manifest's objects. Their summaries are read when the first count or index is
needed, and say which shards they cover; an index is read when its shard is opened. They are optional, so a fault in one
is a warning, and the shard is read instead: a row for another version of its shard, a damaged index, a file that
changed after it was listed. Only a file that is no sidecar at all is an error.

The indexes of a `ComputedFormat` are no facts of the shards: each process computes those that it needs, with what lies
beside the shards, and the service knows neither them nor the counts, which depend on arguments.

Samples that the manifest excludes are taken out of an index here, each time that it comes from somewhere: what is
stored, and what the service knows, is of whole shards.

Indexes that other tools left beside single shards come last (`side_indexes`). They are not believed before the shard
itself confirms them, and so the service gets neither them nor their counts.

Counts may be known beforehand, from a sidecar or because a list of shards promises them. Plans that were made with them
cannot be corrected if they turn out wrong, so that is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import cachetools
import numpy as np
import numpy.typing as npt

from fastload import callers, protocol
from fastload.client.consumer import Consumer
from fastload.errors import ConfigError, ShardError, StoreError
from fastload.formats import (
    ComputedFormat,
    Described,
    Format,
    Index,
    ShardIndex,
    StoredIndex,
    described,
    indexer_for,
    is_described,
    is_made_so,
    side_index,
    stored_index,
)
from fastload.formats.digests import fastest
from fastload.formats.side_index import UnprovenIndex
from fastload.pipeline.pieces import PiecePlaces
from fastload.pipeline.shard_listing import (
    all_of,
    attach,
    beside_name,
    is_description,
    list_one_by_one,
    object_reader,
)
from fastload.pipeline.side_files import SideFiles
from fastload.pipeline.side_indexes import SideIndexes
from fastload.pipeline.windows import window_chunks
from fastload.plan import Manifest
from fastload.store.table import ObjectTable

if TYPE_CHECKING:
    from fastload.formats.sidecar import SidecarSummary

# Indexes take about 80 bytes a sample. Windows hold the ones in use; this is for those that come again next epoch.
_MEMORY_BYTES = 256 << 20


class ShardTable:
    """The indexes of a data set's shards, by object number. Safe to use from several threads."""

    def __init__(
        self,
        manifest: Manifest,
        first_chunk: npt.NDArray[np.int64],
        chunk_bytes: int,
        sidecars: ObjectTable | None = None,
        how: Format = "auto",
    ) -> None:
        """`sidecars` are attached behind the manifest's objects; of a format `how` that is computed they are what lies
        beside the shards.
        """
        computed = self._computed = None if isinstance(how, str) else how
        self._how = how if isinstance(how, str) else "auto"
        has_pieces = manifest.objects.pieces is not None
        self.pieces = PiecePlaces(manifest, first_chunk, chunk_bytes) if has_pieces else None
        self._manifest = manifest
        self._first_chunk = first_chunk
        self._chunk_bytes = chunk_bytes
        self._lock = threading.Lock()
        self._known: cachetools.LRUCache[int, Index] = cachetools.LRUCache(
            _MEMORY_BYTES, getsizeof=lambda index: index.byte_count + 1024
        )
        files = SideFiles.behind(
            int(first_chunk[-1]), chunk_bytes, ObjectTable.of([]) if sidecars is None else sidecars
        )
        self._beside = {info.url: number for number, info in enumerate(files.infos)} if computed is not None else {}
        self._files = files
        of_shards, others = files.divided(lambda info: computed is None and info.url.endswith(side_index.ENDING))
        of_indexes, descriptions = others.divided(lambda info: computed is None and not is_description(info.url))
        self._side_indexes = SideIndexes(manifest, of_shards, self._how)
        self.unproven: set[int] = set()  # shards of which what is known here may be wrong
        self._sidecars = Sidecars(manifest, of_indexes) if len(of_indexes.infos) else None
        self._descriptions = Descriptions(descriptions)
        self._promised = np.full(len(manifest), -1, np.int64) if manifest.promised is None else manifest.promised.copy()

    def get(self, consumer: Consumer, object_nos: Sequence[int]) -> list[Index]:
        """The indexes of these shards, in this order; parses those that have not been parsed before."""
        found = self._in_memory(object_nos)
        missing = [number for number in object_nos if number not in found]
        if missing:
            if self._computed is None:
                found |= self._loaded(consumer, missing)
            else:
                found |= {number: self._compute(self._computed, consumer, number) for number in missing}
            found |= {number: self._without_excluded(number, found[number]) for number in missing}
            self._check_promises(missing, np.array([found[number].sample_count for number in missing], np.int64))
        with self._lock:
            for number, index in found.items():
                if index.byte_count + 1024 <= self._known.maxsize:
                    self._known[number] = index
        return [found[number] for number in object_nos]

    def index(self, consumer: Consumer, object_nos: Sequence[int]) -> list[Index]:
        """The same, for those who want the indexes alone: no chunk stays leased."""
        try:
            return self.get(consumer, object_nos)
        finally:
            consumer.release(window_chunks(self._first_chunk, object_nos))

    def chunks_beyond(self, object_nos: npt.NDArray[np.int64], indexes: Sequence[Index]) -> npt.NDArray[np.int64]:
        """The chunks behind these shards that their samples reach into; none where nothing is read in pieces."""
        found: list[int] = []
        if self.pieces is not None:
            sizes = self._manifest.sizes[object_nos].tolist()
            for index, number, size in zip(indexes, object_nos.tolist(), sizes, strict=True):
                if not isinstance(index, ShardIndex) and index.reach > size:
                    found += self.pieces.chunks_beyond(number, index.reach)
        return np.unique(np.array(found, np.int64))

    def known_counts(self, consumer: Consumer, *, is_needed: bool = False) -> npt.NDArray[np.int64]:
        """int64[objects]: how many samples each shard has, -1 where that is not known yet; 0 for those that are gone.

        Parses nothing; but what can be computed is, where it `is_needed`, and shards are indexed of which single
        samples are excluded.
        """
        if self._computed is not None:
            return self._computed_counts(consumer, is_needed)
        counts = consumer.get_counts(range(len(self._manifest)))
        excluded = list(self._manifest.excluded)
        counts[excluded] = -1  # it is that of the whole shard
        with self._lock:  # the service keeps no index above 64 MiB
            for number, index in self._known.items():
                counts[number] = index.sample_count
        if self._sidecars is not None and (counts < 0).any():
            of_sidecars = self._sidecars.counts(consumer)
            self._promised = np.where(of_sidecars >= 0, of_sidecars, self._promised)
            self._promised[excluded] = -1
        if is_needed:
            unknown = np.flatnonzero((counts < 0) & (self._promised < 0) & self._manifest.is_there)
            unknown = np.setdiff1d(unknown, np.array(excluded, np.int64))
            self._promised[unknown] = self._side_indexes.counts(consumer, unknown)
        known = np.flatnonzero(counts >= 0)
        self._check_promises(known, counts[known])
        counts = np.where(counts >= 0, counts, self._promised)
        counts[self._manifest.gone] = 0
        if is_needed:
            self._count_by_index(consumer, counts, excluded)
        return counts

    def _computed_counts(self, consumer: Consumer, is_needed: bool) -> npt.NDArray[np.int64]:
        counts = self._promised.copy()
        counts[self._manifest.gone] = 0
        with self._lock:
            for number, index in self._known.items():
                counts[number] = index.sample_count
        if is_needed:
            self._count_by_index(consumer, counts, np.flatnonzero(counts < 0).tolist())
        return counts

    def _count_by_index(self, consumer: Consumer, counts: npt.NDArray[np.int64], object_nos: Sequence[int]) -> None:
        """Put those of these shards into `counts` that are not known there."""
        for number in object_nos:
            if counts[number] < 0:
                (index,) = self.index(consumer, [number])
                counts[number] = index.sample_count

    def _without_excluded(self, object_no: int, index: Index) -> Index:
        excluded = self._manifest.excluded.get(object_no)
        if excluded is None:
            return index
        if not isinstance(index, ShardIndex):
            url = self._manifest.objects[object_no].url
            raise ConfigError(f"{url} is no tar, and single samples are left out of tars only; leave out whole shards")
        keys = {key.encode("utf-8", "surrogateescape") for key in excluded}
        there = index.sample_keys()
        found = np.array([key in keys for key in there], np.bool_)
        lacking = len(keys.difference(there))
        if lacking:
            url = self._manifest.objects[object_no].url
            callers.warn(
                f"{url}: of {len(keys)} samples that are to be left out it does not hold {lacking}; correct the list "
                "of what is excluded",
                RuntimeWarning,
            )
        return index.without(found)

    def _compute(self, computed: ComputedFormat, consumer: Consumer, object_no: int) -> Index:
        info = self._manifest.objects[object_no]
        number = self._beside.get(beside_name(info.url, computed))
        reader = None if number is None else (self._files.read_at(consumer, number), self._files.infos[number].size)

        def read_at(start: int, length: int) -> bytes:
            pieces = self._manifest.objects.pieces
            first = object_no if pieces is None else int(np.flatnonzero(pieces[0, : object_no + 1] == 0)[-1])
            size = int(self._manifest.sizes[first])
            return object_reader(consumer, int(self._first_chunk[first]), size)(start, length)

        return computed.index(info, read_at, reader)

    def _check_promises(self, object_nos: Sequence[int] | npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        promised = self._promised[object_nos]
        wrong = np.flatnonzero((promised >= 0) & (promised != counts))
        if len(wrong):
            number = int(object_nos[wrong[0]])
            beside = self._side_indexes.url_of(number)
            where = "the list of shards or the index file that names it" if beside is None else f"its index {beside}"
            raise ShardError(
                f"{self._manifest.objects[number].url} holds {counts[wrong[0]]} samples, but {where} says "
                f"{promised[wrong[0]]}; correct it, or pass the shards without it"
            )

    def _loaded(self, consumer: Consumer, object_nos: Sequence[int]) -> dict[int, Index]:
        """The indexes of these shards, which are stored, or being made by another consumer, or are made here."""
        found: dict[int, Index] = {}
        some = object_nos
        while some:
            stored, make = consumer.get_indexes(some)
            try:
                for number in (*stored, *make):
                    found[number] = self._load(consumer, number, stored.get(number))
            except BaseException:
                consumer.give_up_indexes([number for number in make if number not in found])
                raise
            if unproven := [number for number in make if isinstance(found[number], UnprovenIndex)]:
                consumer.give_up_indexes(unproven)
            left = (number for number in object_nos if number not in found)
            some = list(islice(left, protocol.INDEXES_TO_MAKE))
        return found

    def _stored_index(self, consumer: Consumer, object_no: int, stored: bytes | None) -> StoredIndex | None:
        """The index that the service has, or None where it has none that can be used."""
        if stored is None:
            return None
        info = self._manifest.objects[object_no]
        try:
            found = stored_index(stored, info.url, info.size, info.start, info.whole.size - info.start)
        except ShardError:
            # Damaged, or of another version: worth no more than none. It is parsed again and the new one takes its
            # place.
            return None
        return found if self._is_made_so(consumer, found, info.url) else None

    def _is_made_so(self, consumer: Consumer, index: StoredIndex, url: str) -> bool:
        about = self._descriptions.of(consumer, url) if is_described(url, self._how) else None
        return is_made_so(index, url, self._how, about)

    def _in_memory(self, object_nos: Sequence[int]) -> dict[int, Index]:
        with self._lock:
            return {number: self._known[number] for number in object_nos if number in self._known}

    def _load(self, consumer: Consumer, object_no: int, stored: bytes | None) -> StoredIndex:
        found = self._stored_index(consumer, object_no, stored)
        if found is not None:
            return found
        index = self._sidecars.index(consumer, object_no) if self._sidecars is not None else None
        if index is not None and not self._is_made_so(consumer, index, self._manifest.objects[object_no].url):
            index = None
        if index is None:
            unproven = self._side_indexes.index(consumer, object_no)
            if unproven is not None:
                with self._lock:
                    self.unproven.add(object_no)
                return unproven
            index = self._parse(consumer, object_no)
        consumer.put_index(object_no, index.to_bytes())
        return index

    def _parse(self, consumer: Consumer, object_no: int) -> StoredIndex:
        """Read what the indexer asks for, chunk by chunk: of a tar, the chunks that hold headers. Of a piece, the end
        of the last sample may lie in the next ones.
        """
        info = self._manifest.objects[object_no]
        first, end = int(self._first_chunk[object_no]), int(self._first_chunk[object_no + 1])
        piece = info if info.is_piece else None
        indexer = indexer_for(info.url, info.size, self._descriptions.of(consumer, info.url), piece, self._how)
        chunk = first + indexer.next_offset // self._chunk_bytes
        while chunk < end and not indexer.done:
            start = (chunk - first) * self._chunk_bytes
            length = min(self._chunk_bytes, info.size - start)
            with consumer.acquire([chunk], reason="index") as held:
                view, _, offsets = held.groups[0]
                indexer.feed(view[int(offsets[0]) : int(offsets[0]) + length], start)
            asked = first + indexer.next_offset // self._chunk_bytes
            chunk = asked if asked < chunk else max(chunk + 1, asked)
        start = max(info.size, indexer.next_offset)
        while not indexer.done:
            data = self._behind(
                consumer, object_no, start, min(self._chunk_bytes, info.whole.size - info.start - start)
            )
            indexer.feed(data, start)
            start = max(start + len(data), indexer.next_offset)
        return indexer.finish()

    def _behind(self, consumer: Consumer, object_no: int, start: int, length: int) -> npt.NDArray[np.uint8]:
        """Bytes of the pieces that follow one, by their offset in that."""
        assert self.pieces is not None, "an indexer is done at the end of its object"
        parts = []
        for first_chunk, offset, size in self.pieces.runs(object_no, start, length):
            parts.append(object_reader(consumer, first_chunk, offset + size)(offset, size))
        return np.frombuffer(b"".join(parts), np.uint8)


def first_index(consumer: Consumer, urls: Sequence[str], how: Format, split: str | None = None) -> Index:
    """The index of the first shard that can be read, made where it is not known; a warning names those before it.
    ShardError, which names all, where none can.
    """
    errors: list[ShardError] = []
    for manifest in list_one_by_one(consumer, urls, how, split):
        if isinstance(manifest, ShardError):
            errors.append(manifest)
            continue
        attach(consumer, manifest, manifest.sidecars)
        places = manifest.first_chunk(consumer.chunk_bytes), consumer.chunk_bytes
        table = ShardTable(manifest, *places, manifest.sidecars, how)
        # Of a format that is computed one manifest has all files, some of them in pieces.
        firsts = [0] if isinstance(how, str) else np.flatnonzero(manifest.objects.all_pieces()[0] == 0).tolist()
        for number in firsts:
            try:
                (found,) = table.index(consumer, [number])
            except ShardError as error:
                errors.append(error)
                continue
            if errors:
                callers.warn(f"{all_of(errors, 'shards')}; what is said is of the one behind", RuntimeWarning)
            return found
    raise all_of(errors, "shards")


Ints = npt.NDArray[np.int64]


class Descriptions:
    """What files beside the shards say that reading them needs. Safe to use from several threads."""

    def __init__(self, files: SideFiles) -> None:
        self._files = files
        self._number_of = {info.url.rpartition("/")[0]: number for number, info in enumerate(files.infos)}
        self._lock = threading.Lock()
        self._known: dict[int, dict[str, Described]] = {}

    def of(self, consumer: Consumer, url: str) -> Described | None:
        """Of the shard at `url`; None where nothing says anything."""
        folder, _, name = url.rpartition("/")
        number = self._number_of.get(folder)
        if number is None:
            return None
        with self._lock:
            found = self._known.get(number)
        if found is None:
            info = self._files.infos[number]
            found = described(self._files.read_at(consumer, number)(0, info.size), info.url)
            _warn_of_digests(info.url, found.values())
            with self._lock:
                self._known[number] = found
        return found.get(name)


def _warn_of_digests(url: str, described: Iterable[Described]) -> None:
    unknown = next((about.digests for about in described if about.digests and not fastest(about.digests)), None)
    if unknown is not None:
        callers.warn(
            f"{url} has digests of shards that nothing here computes ({', '.join(sorted(unknown))}): they are not "
            "checked. Write the shards with hashes=['sha1'] or ['xxh64'].",
            RuntimeWarning,
        )


class Sidecars:
    """The sidecars of a manifest. Safe to use from several threads."""

    def __init__(self, manifest: Manifest, files: SideFiles) -> None:
        self._manifest, self._files = manifest, files
        self._lock = threading.Lock()
        self._summaries: list[SidecarSummary] = []
        self._file_of = np.full(len(manifest), -1, np.int32)
        self._row_of = np.full(len(manifest), -1, np.int64)
        self._is_open = False
        self._lost: set[int] = set()

    def counts(self, consumer: Consumer) -> Ints:
        """int64[objects]: the sample count of each shard, -1 where no sidecar has it."""
        self._open(consumer)
        counts = np.full(len(self._manifest), -1, np.int64)
        for number, summary in enumerate(self._summaries):
            of_file = np.flatnonzero(self._file_of == number)
            counts[of_file] = summary.sample_counts[self._row_of[of_file]]
        return counts

    def index(self, consumer: Consumer, object_no: int) -> StoredIndex | None:
        """The index of a shard, None where no sidecar has it."""
        self._open(consumer)
        number = int(self._file_of[object_no])
        if number < 0 or number in self._lost:
            return None
        info = self._files.infos[number]
        try:
            row = int(self._row_of[object_no])
            read_at = self._files.read_at(consumer, number)
            return self._summaries[number].index(row, read_at, self._manifest.objects[object_no])
        except StoreError as error:
            self._lost.add(number)
            _warn(f"{info.url} cannot be read any more ({error})", "its shards are indexed by reading them")
        except ShardError as error:
            self._file_of[object_no] = -1
            _warn(f"{info.url} has a damaged index ({error})", "the shard is indexed by reading it")
        return None

    def _open(self, consumer: Consumer) -> None:
        with self._lock:
            if not self._is_open:
                self._read_summaries(consumer)
                self._is_open = True

    def _read_summaries(self, consumer: Consumer) -> None:
        from fastload.formats.sidecar import read_summary

        ends = self._ends()
        consumer.want(ends)
        for number, info in enumerate(self._files.infos):
            summary = read_summary(self._files.read_at(consumer, number), info.size, info.url)
            rows, others = summary.rows_of(self._manifest.objects)
            self._warn_of_versions(info.url, others)
            found = rows >= 0
            self._file_of[found], self._row_of[found] = len(self._summaries), rows[found]
            self._summaries.append(summary)
        consumer.release(ends)

    def _ends(self) -> list[int]:
        """The first and last chunk of each file: its list of contents, and where it is small all that is read here."""
        stops = (self._files.first_chunk - 1 + self._files.chunk_counts).tolist()
        pairs = zip(self._files.first_chunk.tolist(), stops, strict=True)
        return [chunk for first, last in pairs for chunk in range(first, last + 1, max(1, last - first))]

    def _warn_of_versions(self, url: str, object_nos: Ints) -> None:
        there = object_nos[self._manifest.is_there[object_nos]]
        if len(there):
            shard = self._manifest.objects[int(there[0])].url
            more = f" and {len(there) - 1} more" if len(there) > 1 else ""
            _warn(f"{url} was made of other versions of {shard}{more}", "what it says of them is not used")


def _warn(what: str, consequence: str) -> None:
    message = f"{what}: {consequence}. Write it again with: fastload index URL --output FILE"
    callers.warn(message, RuntimeWarning)
