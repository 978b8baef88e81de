"""The parts of a simulation: its clock, its pools, its store, its disk, and what it draws."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest

from fastload.cache import ChunkKey
from fastload.simulate import StoreProfile
from fastload.simulate.clock import VirtualLoop
from fastload.simulate.network import Connections, Network
from fastload.simulate.pools import VirtualPools
from fastload.simulate.report import sweep_svg
from fastload.simulate.tiers import VirtualDisk
from fastload.store.watch import Attempt, Outcome, Watch
from fastload.svgplot import Curve

MB = 1_000_000


# The clock


def test_calls_come_in_the_order_of_their_times_and_then_of_their_making() -> None:
    loop, heard = VirtualLoop(), list[object]()
    loop.call_later(2.0, heard.append, "late")
    loop.call_later(1.0, lambda: (heard.append(loop.time()), loop.call_soon(heard.append, "then")))
    loop.call_later(1.0, heard.append, "too")
    loop.call_later(1.5, heard.append, "never").cancel()
    assert not loop.run_until(lambda: False)
    assert heard == [1.0, "too", "then", "late"]
    assert loop.time() == 2.0


def test_an_error_in_a_callback_ends_the_run() -> None:
    loop = VirtualLoop()
    loop.call_soon(int, "no number")
    with pytest.raises(ValueError, match="no number"):
        loop.run_until(lambda: False)


# Pools


def test_jobs_beyond_the_threads_wait_and_idle_counts_what_was_submitted() -> None:
    loop = VirtualLoop()
    jobs = VirtualPools(loop)
    pool, ended = jobs.make("test", 2), list[tuple[str, float]]()

    def lasts(name: str, seconds: float) -> str:
        loop.call_later(seconds, jobs.suspend(), None)
        return name

    for name, seconds in (("a", 1.0), ("b", 3.0), ("c", 1.0)):
        pool.submit(lasts, name, seconds, done=lambda found, error: ended.append((found, loop.time())))
    pool.submit(str, "at once", done=lambda found, error: ended.append((found, loop.time())))
    assert pool.idle == 0
    loop.run_until(lambda: False)
    assert ended == [("a", 1.0), ("c", 2.0), ("at once", 2.0), ("b", 3.0)]
    assert pool.idle == 2


# The store


class World:
    """Connections of some nodes, and when what they asked for came."""

    def __init__(self, profile: StoreProfile, *links: float) -> None:
        self.loop = VirtualLoop()
        self.link = Network(profile, self.loop)
        self.nodes = [self.link.join(rate, f"node {number}") for number, rate in enumerate(links)]
        self.attempts: list[Attempt] = []
        self.came: dict[str, float] = {}

    def ask(self, name: str, byte_count: int, node: int = 0) -> Watch:
        """Send a request now."""
        watch = Watch(self.attempts.append, self.loop.time)
        self.link.request(self.nodes[node], watch, byte_count, self._at(name))
        return watch

    def _at(self, name: str) -> Callable[[BaseException | None], None]:
        def ended(error: BaseException | None) -> None:
            self.came[name] = -1.0 if error is not None else self.loop.time()

        return ended

    def run(self) -> dict[str, float]:
        """To the end."""
        self.loop.run_until(lambda: False)
        assert not any(node.requests for node in self.nodes)
        return {name: round(at, 3) for name, at in self.came.items()}


def profile(**options: float) -> StoreProfile:
    values = {"first_byte_s": 1.0, "connection_bytes_per_s": 10.0 * MB, "noise": 0.0, **options}
    return StoreProfile(**values)


def test_a_request_takes_its_first_byte_and_its_body() -> None:
    world = World(profile(), 1000 * MB)
    world.ask("a", 20 * MB)
    assert world.run() == {"a": 3.0}
    (attempt,) = world.attempts
    assert (attempt.began_s, attempt.ended_s, attempt.byte_count) == (0.0, pytest.approx(3.0), 20 * MB)
    assert attempt.first_byte_s == pytest.approx(1.0)


def test_bodies_share_the_link_of_their_node_and_go_on_faster_when_one_has_ended() -> None:
    world = World(profile(), 10 * MB, 1000 * MB)
    world.ask("short", 10 * MB)
    world.ask("long", 20 * MB)
    world.ask("elsewhere", 20 * MB, node=1)
    # At 5 MB/s each until the short one has its 10 MB, then the long one's other 10 MB at 10 MB/s.
    assert world.run() == {"short": 3.0, "elsewhere": 3.0, "long": 4.0}


def test_what_the_store_gives_is_shared_and_what_a_node_cannot_take_goes_to_others() -> None:
    world = World(profile(total_bytes_per_s=12 * MB), 2 * MB, 1000 * MB)
    world.ask("slow", 4 * MB)
    world.ask("fast", 20 * MB, node=1)
    assert world.run() == {"slow": 3.0, "fast": 3.0}


def test_what_is_refused_is_tried_again_until_there_is_room() -> None:
    world = World(profile(throttles_above=2.0), 1000 * MB)
    for name in "abc":
        world.ask(name, 20 * MB)
    found = world.run()
    assert (found["a"], found["b"]) == (3.0, 3.0)
    assert found["c"] > 4.0
    outcomes = [attempt.outcome for attempt in world.attempts]
    assert outcomes.count(Outcome.GOOD) == 3
    assert outcomes.count(Outcome.THROTTLED) == world.link.throttled_count >= 1


def test_who_is_cancelled_leaves_its_share_to_the_others() -> None:
    world = World(profile(), 10 * MB)
    world.ask("short", 5 * MB)
    watch = world.ask("cancelled", 1000 * MB)
    world.ask("long", 15 * MB)
    world.loop.call_later(1.5, watch.cancel)
    # A third each until the short one has come, when it is seen that one waits for nothing; then all for the long one.
    assert world.run() == {"short": 2.5, "cancelled": -1.0, "long": 3.5}


def test_some_answers_are_slow() -> None:
    world = World(profile(slow_share=0.1, slow_times=20.0, noise=0.5), 1000 * MB)
    for number in range(400):
        world.ask(str(number), MB)
    world.run()
    first_bytes = [attempt.first_byte_s or 0.0 for attempt in world.attempts]
    assert 20 <= sum(each > 5.0 for each in first_bytes) <= 65
    assert all(0.5 <= each <= 1.5 or 10.0 <= each <= 30.0 for each in first_bytes)


def test_requests_in_flight_are_counted_over_time() -> None:
    world = World(profile(), 1000 * MB)
    world.ask("a", 10 * MB)
    world.ask("b", 30 * MB)
    world.run()
    node: Connections = world.nodes[0]
    assert node.request_seconds == pytest.approx(2.0 + 4.0)


# The disk


def test_a_disk_has_its_rates_and_its_quota() -> None:
    loop = VirtualLoop()
    jobs = VirtualPools(loop)
    chunk, reads, ended = 1 << 20, list[int](), list[object]()
    need = VirtualDisk.file_bytes(chunk)
    disk = VirtualDisk(
        2 * need, chunk, jobs, loop, (4.0 * chunk, 1.0 * chunk), lambda key, length: reads.append(length)
    )
    pool, keys = jobs.make("test", 8), [ChunkKey(bytes(16), index) for index in range(3)]
    for key in keys:
        pool.submit(
            disk.write, key, memoryview(b""), chunk, done=lambda found, error: ended.append((found, loop.time()))
        )
    assert not disk.contains(keys[0])
    loop.run_until(lambda: False)
    assert ended == [(False, 0.0), (True, 1.0), (True, 2.0)]
    assert disk.keys() == keys[:2]
    assert disk.free_bytes == 0
    ended.clear()
    for key in keys:
        pool.submit(disk.read_into, key, memoryview(b""), done=lambda found, error: ended.append((found, loop.time())))
    loop.run_until(lambda: False)
    assert ended == [(None, 2.0), (chunk, 2.25), (chunk, 2.5)]
    assert reads == [chunk, chunk]
    assert disk.remove(keys[0])
    assert not disk.remove(keys[0])
    assert disk.free_bytes == need


# The plot


def test_a_plot_is_well_formed_and_says_what_it_shows() -> None:
    lines = [Curve("hit share", "#1b6ca8", [0.1, 0.5, 1.0]), Curve("stall share", "#c4511b", [0.9, 0.2, 0.0])]
    root = ElementTree.fromstring(sweep_svg("Caches & more", "two < three", [2**37, 2**39, 2**40], lines))
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text for text in root.iter(f"{name}text")]
    assert {"Caches & more", "two < three", "disk cache of a node, TiB", "share, %", "hit share", "stall share"} <= {
        *texts
    }
    assert {"0", "20", "40", "60", "80", "100", "0.2", "1"} <= {*texts}
    assert len(list(root.iter(f"{name}circle"))) == 6
    heights = [float(circle.get("cy", "")) for circle in root.iter(f"{name}circle")]
    assert heights[0] > heights[1] > heights[2]


@pytest.mark.parametrize("sizes", [[0], [1], [10**13], [0, 0]])
def test_a_plot_of_few_or_no_sizes_is_well_formed(sizes: list[int]) -> None:
    svg = sweep_svg("one", "", sizes, [Curve("hit share", "#1b6ca8", [0.5] * len(sizes))])
    assert "nan" not in svg
    ElementTree.fromstring(svg)
