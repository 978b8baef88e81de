"""Later epochs with disk caches of other sizes than were run: `fastload.simulate`, fed with what was measured.

That is the store's time to the first byte, rate of a connection and goodput, the disk's rates, and as the consumer's
rate what the loader gave out of RAM, decoding included: so what does not depend on the cache is as it was. Data, arena
and order are those of the runs, and a later epoch is the second, as theirs is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastload.bench.schema import Figure, Phase, Series
from fastload.config import format_bytes
from fastload.errors import ConfigError
from fastload.plan import Shuffle
from fastload.simulate import Job, Node, StoreProfile, sweep

# Shares that are predicted whether they were run or not.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Of the best rate: what a larger cache adds beyond it is no help.
_NEARLY_ALL = 0.97
_CHUNKS_MAX = 500


@dataclass(frozen=True, slots=True)
class Measured:
    """The data, how it is read, and the rates of store, disk and consumer."""

    byte_count: int
    samples: int
    shards: int
    chunk_bytes: int
    ram_bytes: int
    batch_size: int
    workers: int
    ranks: int
    shuffle: Shuffle
    window_bytes: int | None
    first_byte_s: float
    connection_bytes_per_s: float
    store_bytes_per_s: float
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    samples_per_s: float  # of all ranks, where data is in RAM

    @property
    def is_telling(self) -> bool:
        """Whether a disk cache matters: an arena that holds most of the data does its work."""
        return self.byte_count > 2 * self.ram_bytes


@dataclass(frozen=True, slots=True)
class Predicted:
    """Samples a second: of a first epoch, and of later ones by the share of the data that the disk cache holds."""

    first_per_s: float
    later_per_s: Mapping[float, float]

    @property
    def enough(self) -> float:
        """The share from which more does not help."""
        best = max(self.later_per_s.values())
        return min(share for share, rate in self.later_per_s.items() if rate >= _NEARLY_ALL * best)


def disk_bytes(share: float, byte_count: int) -> int:
    """The quota for a share of the data, with room for what the cache's files have beside it."""
    return int(share * byte_count * 1.02)


def predict(measured: Measured, shares: Iterable[float]) -> Predicted:
    """Simulate these shares and the usual ones; those below one chunk are left out. Raises `ConfigError`."""
    job = Job(
        data_bytes=measured.byte_count,
        sample_bytes=max(1, measured.byte_count // measured.samples),
        shard_bytes=-(-measured.byte_count // measured.shards),
        ranks_per_node=measured.ranks,
        batch_size=min(measured.batch_size, max(1, measured.samples // measured.ranks)),
        samples_per_s=measured.samples_per_s / measured.ranks,
        epochs=2,
        shuffle=measured.shuffle,
        window_bytes=measured.window_bytes,
        in_step=False,
        threads=max(1, measured.workers),
    )
    wanted = sorted({*shares, *SHARES})
    nodes = [
        Node(
            ram_bytes=measured.ram_bytes,
            disk_bytes=disk_bytes(share, measured.byte_count),
            chunk_bytes=measured.chunk_bytes,
            link_bytes_per_s=1e12,  # the store's figures are those of both
            disk_read_bytes_per_s=measured.disk_read_bytes_per_s,
            disk_write_bytes_per_s=measured.disk_write_bytes_per_s,
        )
        for share in wanted
    ]
    store = StoreProfile(measured.first_byte_s, measured.connection_bytes_per_s, measured.store_bytes_per_s, noise=0.1)
    runs = sweep(job, nodes, store, chunks_max=_CHUNKS_MAX)
    done = {share: run for share, run in zip(wanted, runs, strict=True) if not run.refused}
    if not done:
        raise ConfigError(f"not predicted: {runs[-1].refused}")
    first = next(iter(done.values())).epochs[0].samples_per_s
    return Predicted(first, {share: run.epochs[1].samples_per_s for share, run in done.items()})


def phase_of(
    measured: Measured, predicted: Predicted, cold_per_s: float | None, ran_per_s: Mapping[float, float]
) -> Phase:
    """What is predicted, beside what was run: a first epoch, and later ones by the share that was cached."""
    phase = Phase(name="prediction", seconds=0.0)
    if not measured.is_telling:
        phase.notes.append(
            f"the arena of {format_bytes(measured.ram_bytes)} holds most of what was read, so that this says little of "
            "a disk cache for more data; raise --max-bytes, or lower --ram-bytes"
        )
    both = [("first epoch", predicted.first_per_s, cold_per_s)]
    both += [(f"{share:.0%} cached", rate, ran_per_s.get(share)) for share, rate in predicted.later_per_s.items()]
    for what, rate, other in both:
        phase.figures.append(Figure(name=f"predicted {what}", unit="samples/s", values=[rate], better="more"))
        if other:
            phase.figures.append(Figure(name=f"measured {what}", unit="samples/s", values=[other], better="more"))
            phase.notes.append(f"{what}: predicted {rate:,.0f} samples/s, measured {other:,.0f}")
    phase.series.append(
        Series(
            name="predicted later epochs",
            x_unit="share that is cached",
            y_unit="samples/s",
            xs=list(predicted.later_per_s),
            ys=list(predicted.later_per_s.values()),
        )
    )
    return phase
