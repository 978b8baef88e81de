"""The permutation kernel against its plain twin, its evenness, and its fixed bytes."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest

from fastload.kernels.shuffling import permute
from tests.plan import reference


def permuted(key: str, count: int) -> np.ndarray:
    state = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=32).digest(), "<u8").astype(np.uint64)
    before, out = state.copy(), np.full(count, -1, np.int64)
    permute(state, out)
    assert (state == before).all()
    return out


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 257, 5000])
def test_the_kernel_is_its_plain_twin(count):
    for key in ("", "a", "b"):
        assert permuted(key, count).tolist() == reference.shuffled(range(count), key)


def test_the_twins_generator_is_xoshiro256plusplus():
    """The words that its authors' C code gives from the state 1, 2, 3, 4."""
    published = [41943041, 58720359, 3588806011781223, 3591011842654386, 9228616714210784205]
    assert list(itertools.islice(reference.xoshiro([1, 2, 3, 4]), 5)) == published


def test_a_draw_that_would_be_uneven_is_made_again():
    """A word whose upper half is zero is refused for every bound that is not a power of two."""
    state = np.array([0, 0, 7, 0], np.uint64)  # the first word is rotl(0 + 0, 23) + 0 = 0
    out = np.empty(3, np.int64)
    permute(state, out)
    state = np.array(advanced([0, 0, 7, 0]), np.uint64)
    again = np.empty(3, np.int64)
    permute(state, again)
    assert out.tolist() == again.tolist()


def advanced(s: list[int]) -> list[int]:
    """xoshiro256++'s state after one word."""
    t = (s[1] << 17) & reference.WORD
    a, b, c, d = s[0], s[1], s[2] ^ s[0], s[3] ^ s[1]
    b, a, c = b ^ c, a ^ d, c ^ t
    return [a, b, c, ((d << 45) | (d >> 19)) & reference.WORD]


def test_all_permutations_of_four_are_equally_likely():
    seen = Counter(tuple(permuted(f"key {i}", 4).tolist()) for i in range(24 * 400))
    assert len(seen) == 24
    chi_square = sum((count - 400) ** 2 / 400 for count in seen.values())
    assert chi_square < 50  # 23 degrees of freedom: above 50 once in a thousand keys' sets, and these are fixed


def test_the_bytes_are_fixed():
    assert permuted("fastload", 12).tolist() == GOLDEN_TWELVE
    digest = hashlib.blake2b(permuted("fastload", 100_000).astype("<i8").tobytes(), digest_size=16)
    assert digest.hexdigest() == GOLDEN_DIGEST


GOLDEN_TWELVE = [3, 11, 8, 0, 6, 2, 7, 10, 9, 4, 1, 5]
GOLDEN_DIGEST = "c04ed8da54399ae9a5407f71f93e9ccf"
