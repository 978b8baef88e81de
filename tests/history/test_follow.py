"""Finding a reader's place among what was read before, and losing it again."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastload.history.archive import Archive
from fastload.history.follow import Follower
from fastload.history.keys import chunk_key, chunk_keys
from fastload.history.library import Library
from fastload.history.record import Recorder
from tests.history.runs import CHUNK_BYTES, info, key, run

NAMES = [f"2026112{number}-120000-00000000" for number in range(6, 0, -1)]  # the newest first


def library(*runs: list[tuple[int, int]], chunk_bytes: int = CHUNK_BYTES) -> Library:
    """Of runs of (trace, object number), the newest first."""
    with tempfile.TemporaryDirectory() as folder:
        return Library([run(Path(folder), reads, name) for reads, name in zip(runs, NAMES, strict=False)], chunk_bytes)


def library_of_chunks(reads: list[tuple[int, int, int]], chunks: int) -> Library:
    """Of one run of (trace, object number, chunk), of objects of so many chunks."""
    recorder = Recorder("train.py", 1.8e9, CHUNK_BYTES)
    for _ in range(1 + max(trace for trace, _, _ in reads)):
        recorder.begin_trace("reader")
    for trace, number, index in reads:
        recorder.read(trace, key(number), info(number, chunks), index, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        archive = Archive(Path(folder))
        archive.append(NAMES[0], recorder.take(1.0, {}).pieces())
        return Library([archive.read(archive.find("latest"))], CHUNK_BYTES)


def shuffled(count: int, seed: int) -> list[int]:
    numbers = list(range(count))
    random.Random(seed).shuffle(numbers)
    return numbers


def one(numbers: list[int]) -> list[tuple[int, int]]:
    return [(0, number) for number in numbers]


def expected(follower: Follower, count: int) -> list[int]:
    """The object numbers that are predicted."""
    assert follower.place is not None
    found = [follower.library.chunk(int(place))[0] for place in follower.library.after(follower.place, count)]
    return [int(info.url[-6:]) for info in found]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), min_size=1, max_size=120), st.integers(0, 40))
def test_what_follows_is_the_rest_of_the_lane_and_then_of_the_run(reads: list[tuple[int, int]], count: int) -> None:
    lib = library(reads)
    # Reads that follow on each other too closely are one: what the library holds is what it is compared with.
    kept = [lib.chunk(place)[0].url for place in range(len(lib))]
    traces = [lib.trace(place) for place in range(len(lib))]
    assert [trace.number for trace in traces] == sorted(trace.number for trace in traces)
    for place, trace in enumerate(traces):
        after = [kept[int(each)] for each in lib.after(place, count)]
        rest = kept[place + 1 : trace.end][:count]
        assert after[: len(rest)] == rest
        assert len(after) <= count


def test_after_the_end_of_a_lane_comes_what_the_run_read_then() -> None:
    epoch = [(0, 1), (1, 2), (0, 3), (1, 4), (0, 5), (1, 6), (2, 10), (3, 11), (2, 12)]
    lib = library(epoch)
    follower = Follower(lib)
    for number in (1, 3):
        follower.saw(key(number))
    assert expected(follower, 10) == [5, 6, 10, 11, 12]


def test_places_are_those_of_the_newest_runs() -> None:
    lib = library(one([1, 2, 3]), one([3, 4]), one([5, 3]))
    assert [lib.trace(place).number for place in lib.places(key(3), 2)] == [0, 1]
    assert lib.places(key(9), 8) == []
    assert library().places(key(3), 8) == []
    assert len(library(one([1, 2]), chunk_bytes=2 * CHUNK_BYTES)) == 0


def test_a_run_that_begins_alike_is_known_by_its_first_read_and_believed_more_and_more() -> None:
    order = shuffled(500, 1)
    follower = Follower(library(one(shuffled(500, 2)), one(order)))
    assert follower.saw(key(order[0]))
    assert (expected(follower, 5), follower.ahead_max) == (order[1:6], 2)
    depths = []
    for number in order[1:]:
        assert follower.saw(key(number))
        depths.append(follower.ahead_max)
    assert depths[:4] == [4, 8, 16, 32]
    assert max(depths) == 4096


def test_what_is_about_to_be_read_is_known_before_it_is() -> None:
    order = shuffled(100, 1)
    follower = Follower(library(one(order)))
    assert follower.expect(key(order[0]))
    assert expected(follower, 3) == order[1:4]
    assert follower.saw(key(order[0]))
    assert follower.saw(key(order[1]))
    assert not follower.expect(key(12345))
    assert follower.place is not None


def test_in_the_middle_it_takes_three_reads() -> None:
    order = shuffled(500, 1)
    follower = Follower(library(one(order)))
    came = [follower.saw(key(number)) for number in order[200:210]]
    assert came == [False, False, *[True] * 8]
    assert expected(follower, 3) == order[210:213]


@given(st.integers(0, 1000), st.floats(0.0, 0.25))
def test_insertions_and_omissions_are_borne(seed: int, share: float) -> None:
    chance, order = random.Random(seed), shuffled(400, 7)
    follower = Follower(library(one(order)))
    came = read = 0
    for number in order:
        if chance.random() < share:
            continue
        if chance.random() < share:
            follower.saw(key(10_000 + number))
        came += follower.saw(key(number))
        read += 1
    assert came >= 0.9 * read - 5


def test_another_order_is_not_taken_for_one() -> None:
    follower = Follower(library(*(one(shuffled(2000, seed)) for seed in range(4))))
    wrong = 0
    for number in shuffled(2000, 99):
        follower.saw(key(number))
        wrong += follower.place is not None
    assert wrong < 40


@pytest.mark.parametrize(("count", "chunks", "epochs"), [(200, 1, 8), (500, 4, 3), (200, 12, 5), (60, 50, 2)])
def test_another_order_each_epoch_is_hardly_ever_taken_for_an_earlier_one(count: int, chunks: int, epochs: int) -> None:
    """Also not where objects have many chunks, whose order within the object is the same each time."""
    orders = [[(number, index) for number in shuffled(count, seed) for index in range(chunks)] for seed in range(9)]
    follower = Follower(
        library_of_chunks([(trace, *each) for trace in range(epochs) for each in orders[trace]], chunks)
    )
    in_vain: set[int] = set()
    for at, (number, index) in enumerate(orders[8]):
        follower.saw(key(number), index)
        soon = {chunk_key(key(*each[:1]), each[1]) for each in orders[8][at : at + 2 * follower.ahead_max + chunks]}
        if follower.place is not None:
            ahead = follower.library.keys[follower.library.after(follower.place, follower.ahead_max)]
            in_vain |= {int(each) for each in ahead} - soon
    assert len(in_vain) <= 0.04 * len(orders[8])


def test_the_order_of_objects_is_believed_by_objects() -> None:
    order = [(number, index) for number in shuffled(100, 1) for index in range(8)]
    follower = Follower(library_of_chunks([(0, *each) for each in order], 8))
    beyond = []
    for number, index in order:
        assert follower.saw(key(number), index)
        if index == 3:
            beyond.append(follower.ahead_max - 4)
    assert beyond[:6] == [-2, 0, 4, 12, 28, 60]


def test_a_file_that_is_read_here_and_there_is_followed_too() -> None:
    order = [(0, index) for index in shuffled(600, 1)]
    follower = Follower(library_of_chunks([(0, *each) for each in order], 600))
    assert [follower.saw(key(0), index) for _, index in order[100:110]] == [False, False, *[True] * 8]
    assert follower.ahead_max == 492  # what is left of the file, and two


def test_who_reads_objects_farther_than_before_is_followed() -> None:
    order = shuffled(600, 1)
    follower = Follower(library_of_chunks([(0, number, index) for number in order for index in range(2)], 20))
    for number in order[:50]:
        assert follower.saw(key(number), 0)
        for index in range(1, 20):
            assert follower.saw(key(number), index) == (index < 2)


def test_batches_of_another_size_are_followed_from_lane_to_lane() -> None:
    """Two workers read batches in turn, each a trace of its own."""
    order = shuffled(640, 1)
    before = [(at // 16 % 2, number) for at, number in enumerate(order)]
    follower = Follower(library(before))
    came = [follower.saw(key(number)) for at, number in enumerate(order) if at // 8 % 2 == 0]
    assert sum(came) >= 0.98 * len(came)


def test_it_departs_and_is_found_on_another_way() -> None:
    common = shuffled(300, 1)
    one_way, other_way = [*common, *range(1000, 1200)], [*common, *range(2000, 2200)]
    follower = Follower(library(one(one_way), one(other_way)))
    for number in common:
        assert follower.saw(key(number))
    assert expected(follower, 2) == [1000, 1001]
    lost = next(at for at, number in enumerate(range(2000, 2200)) if follower.saw(key(number)))
    assert lost < 10
    assert expected(follower, 2) == [2001 + lost, 2002 + lost]


def test_reading_again_is_no_departure() -> None:
    order = shuffled(100, 1)
    follower = Follower(library(one(order)))
    for number in order[:50]:
        assert follower.saw(key(number))
        for _ in range(3):
            follower.saw(key(number))
        if number != order[0]:
            follower.saw(key(order[max(0, order.index(number) - 2)]))
    assert expected(follower, 2) == order[50:52]


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1))
def test_keys_are_the_same_one_by_one_and_many_at_once(of_object: int, index: int) -> None:
    import numpy as np

    many = chunk_keys(np.array([of_object], np.uint64), np.array([index], np.uint32))
    assert int(many[0]) == chunk_key(of_object, index)
    assert chunk_key(of_object, 0) == of_object
