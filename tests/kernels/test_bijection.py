"""The keyed bijection against its plain twin: each number once, evenly, and fixed for ever."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.errors import ConfigError
from fastload.kernels.shuffling import BIJECTION_ITEMS_MAX, BIJECTION_ROUNDS, biject
from fastload.plan.permutation import Bijection

WORD = (1 << 64) - 1


def plain(key: str, count: int, place: int) -> int:
    """The bijection in plain Python, from a text to one place's number."""
    digests = [hashlib.blake2b(f"{key} rounds={i}".encode(), digest_size=64).digest() for i in (0, 1)]
    keys = struct.unpack("<16Q", b"".join(digests))
    bits = ((count - 1).bit_length() + 1) // 2
    lows, highs = 1 << bits, -(-count >> bits)

    def word(key, x):
        z = (key + x * 0x9E3779B97F4A7C15) & WORD
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        return z ^ (z >> 31)

    while True:
        high, low = divmod(place, lows)
        for for_low, for_high in zip(keys[::2], keys[1::2], strict=True):
            low = (low + word(for_low, high)) % lows
            high = (high + ((word(for_high, low) >> 20) * highs >> 44)) % highs
        place = high * lows + low
        if place < count:
            return place


def all_of(key: str, count: int) -> list[int]:
    return Bijection(key, count)[np.arange(count)].tolist()


SMALL = [1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 31, 33, 97, 255, 256, 257, 1009]
LARGE = [10_007, 65_535, 65_537, (1 << 20) - 1, (1 << 20) + 1]
HUGE = [10**9, (1 << 31) - 1, (1 << 39) + 1, (1 << 40) - 1, 1 << 40]


@pytest.mark.parametrize("count", SMALL)
def test_the_kernel_is_its_plain_twin(count):
    for key in ("", "a", "b"):
        assert all_of(key, count) == [plain(key, count, place) for place in range(count)]


@pytest.mark.parametrize("count", [*SMALL, *LARGE])
def test_each_number_comes_once(count):
    for key in ("a", "b"):
        assert (np.bincount(all_of(key, count), minlength=count) == 1).all()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(HUGE) | st.integers(1, BIJECTION_ITEMS_MAX), st.text(max_size=3), st.data())
def test_any_places_of_any_count(count, key, data):
    places = data.draw(st.lists(st.integers(0, count - 1), max_size=20))
    numbers = Bijection(key, count)[np.array(places, np.int64)].tolist()
    assert numbers == [plain(key, count, place) for place in places]
    assert len(set(numbers)) == len(set(places))


def test_more_places_than_a_block_and_in_any_order():
    line = Bijection("key", 10**9)
    places = np.random.default_rng(0).integers(0, 10**9, 1000)
    numbers = line[places]
    assert (line[places[::-1]] == numbers[::-1]).all()
    assert [line[places[i : i + 1]][0] for i in range(0, 1000, 97)] == numbers[::97].tolist()


def test_many_walk_where_few_numbers_fill_the_square():
    """At 5 of the 8 numbers every fourth goes in again, at 2**20 + 1 of 2**20 + 2048 hardly any."""
    for count in (5, (1 << 20) + 1):
        numbers = Bijection("key", count)[np.arange(min(count, 3000)).repeat(2)]
        assert (numbers[::2] == numbers[1::2]).all()
        assert numbers.max() < count


def test_a_place_that_is_not_there_is_an_error():
    for count, place in ((10, 10), (10, -1), (5, 7), (0, 0)):
        with pytest.raises(IndexError, match=f"place {place} is not from 0 to {count - 1}"):
            Bijection("key", count)[np.array([0, place] if count else [place])]
    assert Bijection("key", 0)[np.empty(0, np.int64)].tolist() == []
    with pytest.raises(ConfigError, match="1099511627777 samples together: 1099511627776 are the most"):
        Bijection("key", BIJECTION_ITEMS_MAX + 1)


@pytest.mark.parametrize("count", [3, 4, 5])
def test_all_permutations_of_a_few_are_equally_likely(count):
    permutations = math.factorial(count)
    seen = Counter(tuple(all_of(f"key {i}", count)) for i in range(permutations * 100))
    assert len(seen) == permutations  # odd ones too
    check_chi_square(np.array(list(seen.values())), 100)


@pytest.mark.parametrize("count", [16, 30, 97, 1000])
def test_pairs_go_anywhere_together(count):
    """Places that share their low or their high part, and places that follow one another, over many keys."""
    bits = ((count - 1).bit_length() + 1) // 2
    keys = np.random.default_rng(count).integers(0, 1 << 63, (40_000, BIJECTION_ROUNDS), np.int64).astype(np.uint64)
    for other in (1, 1 << bits, count - 1):
        out, places = np.empty((len(keys), 2), np.int64), np.array([0, other])
        for key, pair in zip(keys, out, strict=True):
            biject(key, count, places, pair)
        assert (out[:, 0] != out[:, 1]).all()
        cells = min(count, 20)
        boxes = out * cells // count  # of the plane that the pairs fill, but for its diagonal
        size = np.bincount(np.arange(count) * cells // count)
        expected = (np.outer(size, size) - np.diag(size)) * (len(keys) / count / (count - 1))
        seen = np.bincount(boxes[:, 0] * cells + boxes[:, 1], minlength=cells * cells)
        check_chi_square(seen[expected.ravel() > 0], expected.ravel()[expected.ravel() > 0])


def check_chi_square(seen: np.ndarray, expected: np.ndarray | float) -> None:
    """Less than one in ten thousand of perfect shuffles fails; and keys are fixed."""
    freedom = seen.size - 1
    assert abs(((seen - expected) ** 2 / expected).sum() - freedom) < 4 * (2 * freedom) ** 0.5 + 4


def test_the_order_is_as_perfect_as_a_random_one():
    """Of a million: how far numbers move, how many stay or keep their neighbours, rises, correlation with others."""
    count = 1_000_000
    for key in ("a", "b", "c", "d"):
        numbers = Bijection(key, count)[np.arange(count)]
        assert abs(np.abs(numbers - np.arange(count)).mean() / count - 1 / 3) < 0.001
        assert (numbers == np.arange(count)).sum() <= 6  # 1 expected
        assert (np.abs(np.diff(numbers)) == 1).sum() <= 9  # 2 expected
        rises = (np.diff(numbers) > 0).sum()
        assert abs(rises - count / 2) < 4 * (count / 12) ** 0.5
        for step in (1, 2, 1024, 1000):
            assert abs(np.corrcoef(numbers[step:], numbers[:-step])[0, 1]) < 0.005


def test_keys_that_are_alike_give_orders_that_are_not():
    places = np.arange(100_000)
    orders = [Bijection(f"epoch={epoch}", 10**6)[places] for epoch in range(4)]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.015
        assert (one == other).sum() <= 4  # 0.1 expected


def test_the_bytes_are_fixed():
    """If this fails, every run that was saved before would go on with other samples: do not update the figures."""
    assert all_of("fastload", 12) == GOLDEN_TWELVE
    numbers = Bijection("fastload", 10**9)[np.arange(0, 10**9, 10_007)]
    assert hashlib.blake2b(numbers.astype("<i8").tobytes(), digest_size=16).hexdigest() == GOLDEN_DIGEST


GOLDEN_TWELVE = [3, 9, 4, 8, 5, 0, 2, 7, 1, 11, 10, 6]
GOLDEN_DIGEST = "80324f84deef7e0bffc7685ab7869e53"
