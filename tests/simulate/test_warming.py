"""Warm-ups beside jobs, in virtual time and by the service's own core: who gets the link, at 10 and at 200 MB/s."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fastload.config import MIB
from fastload.protocol import Progress, WarmTerms
from fastload.simulate import Job, Node, StoreProfile, World
from fastload.simulate.consumer import SimulatedConsumer
from fastload.store.types import ObjectInfo

MB = 1_000_000
CHUNK_BYTES = 8 * MIB


def world(link: float, *, chunks: int, samples_per_s: float = 1e6) -> World:
    """A job over so many chunks, whose trainer takes more than any link gives unless something else is said."""
    job = Job(
        data_bytes=chunks * CHUNK_BYTES,
        sample_bytes=MIB // 8,
        shard_bytes=4 * CHUNK_BYTES,
        batch_size=64,
        samples_per_s=samples_per_s,
        window_bytes=8 * CHUNK_BYTES,
        epochs=1,
        is_indexed=True,
    )
    node = Node(ram_bytes=64 * CHUNK_BYTES, disk_bytes=10**12, chunk_bytes=CHUNK_BYTES, link_bytes_per_s=link)
    return World(job, node, StoreProfile(connection_bytes_per_s=80e6))


class WarmUp:
    """One warm-up on the node of a world."""

    def __init__(self, world: World, objects: list[ObjectInfo], terms: WarmTerms) -> None:
        self._consumer = SimulatedConsumer(world.nodes[0].core, world.loop, "warm")
        self._consumer.consumer.attach(objects)
        self._consumer.consumer.set_plan(range(len(objects)), warm=True, terms=terms)

    @property
    def progress(self) -> Progress:
        """As it was last reported."""
        return self._consumer.consumer.progress() or Progress(0, 0, 0, 1, 0, 0, 0, False, "", "")

    @property
    def share(self) -> float:
        """How much of it is done."""
        return self.progress.done_bytes / self.progress.total_bytes


def other_data(chunks: int, name: str = "other") -> list[ObjectInfo]:
    return [ObjectInfo(f"s3://{name}/{number}.tar", 4 * CHUNK_BYTES, "etag") for number in range(chunks // 4)]


@dataclass(frozen=True)
class Seen:
    """How long a job's epoch took, and what a warm-up had fetched when it ended."""

    seconds: float
    warmed_bytes: int


def epoch(world: World, warm_up: WarmUp | None = None, *, begins_at: float = 0.0) -> Seen:
    """Run the job, once so much of the warm-up is done."""
    if warm_up is not None:
        world.loop.run_until(lambda: warm_up.share >= begins_at and world.loop.time() > 2.0)
    before = warm_up.progress.fetched_bytes if warm_up else 0
    world.run()
    (rank,) = world.ranks
    (ran,) = rank.epochs
    return Seen(ran.ended_s - ran.began_s, warm_up.progress.fetched_bytes - before if warm_up else 0)


def terms(**values: float) -> WarmTerms:
    return WarmTerms(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("link", "chunks"), [(10 * MB, 24), (10 * MB, 96), (200 * MB, 128)])
@pytest.mark.parametrize("bucket", ["simulated/other", "other"])
def test_a_job_that_the_link_binds_keeps_nine_tenths_of_its_throughput(link: int, chunks: int, bucket: str) -> None:
    """Whether the warm-up is of the same bucket, or of another at the other end of the same link."""
    alone = epoch(world(link, chunks=chunks))
    beside = world(link, chunks=chunks)
    found = epoch(beside, WarmUp(beside, other_data(8 * chunks, bucket), terms()))
    assert found.seconds <= alone.seconds / 0.9
    assert found.warmed_bytes > 0, "it starves"


@pytest.mark.parametrize(("link", "chunks"), [(10 * MB, 24), (200 * MB, 128)])
def test_a_job_that_starts_at_a_third_of_its_own_warm_up_loses_nothing(link: int, chunks: int) -> None:
    alone = epoch(world(link, chunks=chunks))
    beside = world(link, chunks=chunks)
    order = beside.nodes[0].own
    own = WarmUp(beside, [beside.data.manifest.objects[number] for number in order.tolist()], terms())
    assert epoch(beside, own, begins_at=0.3).seconds <= 1.05 * alone.seconds


def test_a_job_that_leaves_most_of_the_link_leaves_it_to_warming() -> None:
    """It takes a quarter of it."""
    link, chunks = 200 * MB, 128
    slow = {"chunks": chunks, "samples_per_s": link / 4 / (MIB // 8)}
    alone = epoch(world(link, **slow))
    beside = world(link, **slow)
    found = epoch(beside, WarmUp(beside, other_data(16 * chunks), terms()))
    assert found.seconds <= 1.05 * alone.seconds
    assert found.warmed_bytes >= 0.5 * link * found.seconds


def alone(
    link: float, terms_of: dict[str, WarmTerms], seconds: float, limit: tuple[int, int] = (0, 0)
) -> dict[str, int]:
    """What warm-ups fetch in so long on a node without a job."""
    place = world(link, chunks=16)
    core, loop = place.nodes[0].core, place.loop
    core.warming.limit(*limit)
    all_of_them = {name: WarmUp(place, other_data(4096, name), each) for name, each in terms_of.items()}
    end = loop.time() + seconds
    loop.call_at(end, lambda: None)
    loop.run_until(lambda: loop.time() >= end)
    return {name: each.progress.fetched_bytes for name, each in all_of_them.items()}


def test_alone_it_uses_the_link() -> None:
    assert alone(200 * MB, {"a": terms()}, 15.0)["a"] >= 0.95 * 200 * MB * 15


@pytest.mark.parametrize(("bytes_per_s", "seconds"), [(5 * MB, 100.0), (60 * MB, 20.0)])
def test_a_limit_is_held_for_all_and_for_each(bytes_per_s: int, seconds: float) -> None:
    for_all = alone(200 * MB, {"a": terms(), "b": terms()}, seconds, (bytes_per_s, 0))
    assert sum(for_all.values()) == pytest.approx(seconds * bytes_per_s, rel=0.05)
    each = alone(200 * MB, {"a": terms(bytes_per_s=bytes_per_s), "b": terms(bytes_per_s=2 * bytes_per_s)}, seconds)
    assert each["a"] == pytest.approx(seconds * bytes_per_s, rel=0.05)
    assert each["b"] == pytest.approx(2 * seconds * bytes_per_s, rel=0.05)


def test_a_limit_of_requests_is_held() -> None:
    """One connection gives 80 MB/s, less what the first byte takes."""
    assert alone(1000 * MB, {"a": terms()}, 20.0, (0, 2))["a"] < 2 * 80 * MB * 20


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"deadline": 200.0}, {"deadline": 100.0}),
        ({"deadline": 0.0, "priority": 9}, {"deadline": 100.0}),
        ({"priority": 1}, {"priority": 2}),
        ({"deadline": 100.0, "priority": 1}, {"deadline": 100.0, "priority": 2}),
    ],
)
def test_deadlines_come_first_and_then_priorities(first: dict[str, float], second: dict[str, float]) -> None:
    found = alone(200 * MB, {"a": terms(**first), "b": terms(**second)}, 10.0)
    assert found["b"] >= 0.9 * 200 * MB * 10
    assert found["a"] <= 0.05 * 200 * MB * 10


def test_of_alike_ones_the_older_comes_first() -> None:
    found = alone(200 * MB, {"a": terms(), "b": terms()}, 10.0)
    assert found["a"] >= 0.9 * 200 * MB * 10
