"""From the orders of several data sets to a rank's batches of their mixture, as sample counts become known.

All is as with one data set (see `plan.cursor` and `plan.walk`), with windows and counts of each source. Sample counts
need not be known for a run to begin: while a source's are not, it goes on as far as all that it needs is certain to lie
in the source's first epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastload.errors import ConfigError
from fastload.plan.deal import Deal
from fastload.plan.lanes import lane_length, lane_lengths
from fastload.plan.mixture.blend import Blend
from fastload.plan.mixture.epochs import SourceEpochs, SourcePlan
from fastload.plan.mixture.line import MixtureLine
from fastload.plan.mixture.options import MixtureOptions
from fastload.plan.mixture.position import MixturePosition, SourcePosition
from fastload.plan.mixture.rounds import Rounds
from fastload.plan.mixture.samples import MixtureEntry, MixtureKey
from fastload.plan.position import check_boundary
from fastload.plan.ranks import Ranks
from fastload.plan.tail import Tail
from fastload.plan.walk import Reader, Split, Walk


class MixtureCursor(Walk[MixtureKey, MixtureEntry]):
    """The batches of one rank in one epoch of a mixture. One user at a time; made anew for each epoch.

    It is driven as an `EpochCursor` is: windows are named with their source and its epoch, counts are wanted and told
    by source, and a batch has a part for each source. With `stop="never"` there is always another window to open, and
    `finish` is never called. What is said of a node's windows and of workers there holds here too.

    Raises `ConfigError` for arguments that do not fit, also once a source turns out to have fewer samples than it must,
    and `StateError` where `start` belongs to another run.
    """

    def __init__(
        self,
        sources: Sequence[SourcePlan],
        options: MixtureOptions,
        epoch: int,
        ranks: Ranks,
        batch_size: int,
        *,
        drop_last: bool = False,
        tail: Tail = "pad",
        start: MixturePosition | None = None,
        worker: tuple[int, int] = (0, 1),
        split: Split = "batches",
    ) -> None:
        reader = Reader(ranks, batch_size, drop_last, tail, worker, split)
        partitions = _partitions(sources, options)
        self.sources, self.options, self.epoch = tuple(sources), options, epoch
        self._beginning = MixturePosition(
            epoch,
            0,
            0,
            (SourcePosition.start(partitions),) * len(sources),
            options,
            tuple(source.options for source in sources),
            tuple(source.manifest.fingerprint for source in sources),
            ranks.world_size,
            batch_size,
            tail,
        )
        self.start = start if start is not None else self._beginning
        self.start.check(self._beginning)
        deal = Deal(ranks, partitions, reader.global_batch)
        self._mixture = self._line_from(self.start, deal, Blend.of(options.weights, options.seed, epoch, partitions))
        if self.start.samples != self._mixture.total:
            check_boundary(
                self.start.samples, (self.start.batch_size, self.start.world_size), (batch_size, ranks.world_size)
            )
        super().__init__(self._mixture, deal, reader, self.start.samples)

    def _line_from(self, start: MixturePosition, deal: Deal, blend: Blend) -> MixtureLine:
        shares = blend.shares(blend.lanes, lane_lengths(start.samples, deal.partitions))
        first_epoch, is_endless = self.options.source_epoch(self.epoch), self.options.stop != "first"
        rounds = []
        for number, source in enumerate(self.sources):
            samples = shares[:, number].tolist()
            epochs = SourceEpochs(
                number, source, first_epoch, deal.lanes, samples, start.sources[number], is_endless=is_endless
            )
            rounds.append(Rounds(epochs, samples))
        return MixtureLine(blend, rounds, deal.lanes, self.options.stop, first_epoch)

    @property
    def is_counted(self) -> bool:
        """Whether the length of the line is known, or that it has no end."""
        return self._mixture.is_measured

    def objects_of(self, key: MixtureKey) -> NDArray[np.int32]:
        """The object numbers of a window in its source, int32; `add` wants one count for each."""
        return self._mixture.objects_of(key)

    @property
    def counts_wanted(self) -> list[NDArray[np.int32]]:
        """For each source, objects whose counts must be told before anything can go on, int32; all empty where
        `next_window` is not None, where batches are settled that were not given out yet, and at the end.

        As with one data set, they are the next windows of other nodes, or all of a source's where a lane has come to
        the end of its partition.
        """
        nothing = [np.empty(0, np.int32) for _ in self.sources]
        if self.next_window is not None:
            return nothing
        wanted = self._mixture.wanted(self._needs())
        end, total = self._given + self._group, self._mixture.total
        if not any(map(len, wanted)) and total is None and end > self._mixture.known:
            others = [p for p in range(self._partitions) if self._deal.is_cut or p not in self.home]
            wanted = self._mixture.wanted_to_settle(end, others, self.home)
        if (tail := self._tail_position) is not None and self._tail_source is None:
            number, lane = divmod(tail[0], self._partitions)
            wanted = self._mixture.wanted_to_find(lane, number)
        return wanted

    def windows_ahead(self) -> Iterator[MixtureKey]:
        """The windows that this node still needs, in the order in which batches come to them, each once; without end
        where the line has none. Not to be used further once counts were told or a window was added.

        Windows that are open are among them. While a source's counts are not known, its partitions are taken to hold as
        many samples a byte, as many as in what is counted of it, or of the others; and where the line then ends is not
        known either.
        """
        return self._mixture.windows_ahead(
            [(lane, lane_length(lane, self._given, self._partitions)) for lane in self.home]
        )

    def tell(self, source: int, object_nos: NDArray[np.int32], counts: NDArray[np.int64]) -> list[MixtureEntry]:
        """The batches that are settled by the sample counts, int64, of some objects of a source."""
        self._mixture.tell(source, object_nos, np.asarray(counts, np.int64))
        return self._settle()

    def add(self, key: MixtureKey, counts: NDArray[np.int64]) -> list[MixtureEntry]:
        """A window is open: the batches that are settled by that, and by the counts of its objects, int64."""
        self._mixture.add(key, np.asarray(counts, np.int64))
        return self._settle()

    def position(self, entry: MixtureEntry | None) -> MixturePosition:
        """The position after `entry` was delivered; for None, where the cursor started."""
        return self.start if entry is None else self.position_at(entry.samples_after)

    def position_at(self, samples: int) -> MixturePosition:
        """The position after so many samples of the line: as many as where the cursor started, or a multiple of the
        global batch above that, or all.
        """
        if samples == self.start.samples:
            return self.start
        self._assert_is_boundary(samples)
        return replace(
            self._beginning,
            batches=-(-samples // self._global_batch),
            samples=samples,
            sources=self._mixture.position(lane_lengths(samples, self._partitions)),
        )


def _partitions(sources: Sequence[SourcePlan], options: MixtureOptions) -> int:
    if len(sources) != len(options.weights):
        raise ConfigError(f"{len(options.weights)} weights for {len(sources)} sources; give one for each")
    partitions = [source.options.partitions for source in sources]
    if len(set(partitions)) != 1:
        raise ConfigError(f"the sources of a mixture have partitions={partitions}; they must all have the same number")
    return partitions[0]
