"""The kernels of mixtures against their plain twin, whatever the weights: forwards, at any number, and back."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels.mixing import NEVER
from fastload.plan import check_weights
from fastload.plan.blend import Blend
from tests.plan import reference_mixture

NUMBERS = 120


@st.composite
def weights(draw: st.DrawFn):
    """Of up to five sources, with steps; some are 0 for a while, and never all."""
    found = []
    for _ in range(draw(st.integers(1, 5))):
        firsts = sorted({0, *draw(st.lists(st.integers(1, 300), max_size=4))})
        found.append([(first, draw(st.sampled_from([0, 1e-3, 0.1, 0.5, 1, 3, 7]))) for first in firsts])
    found[0] = [(first, weight or 1) for first, weight in found[0]]
    return found


@settings(max_examples=100, deadline=None)
@given(weights(), st.integers(1, 4), st.integers(0, 9), st.data())
def test_the_kernels_are_their_plain_twin(weights, lanes, seed, data):
    blend, lane = Blend.of(check_weights(weights), seed, 3, lanes), data.draw(st.integers(0, lanes - 1))
    twin = list(itertools.islice(reference_mixture.mixed_lane(weights, seed, 3, lane, lanes), NUMBERS))
    for numbers in (range(NUMBERS), sorted(data.draw(st.sets(st.integers(0, NUMBERS - 1))))):
        sources, samples = blend.sources(lane, np.array(numbers, np.int64))
        assert sources.tolist() == [twin[number] for number in numbers]
        assert samples.tolist() == [twin[:number].count(twin[number]) for number in numbers]
        shares = blend.shares(np.full(len(numbers), lane), np.array(numbers, np.int64))
        assert shares.tolist() == [[twin[:number].count(s) for s in range(len(weights))] for number in numbers]
    samples = np.tile(np.arange(8)[:, None], (1, len(weights)))
    found = blend.numbers(np.full(8, lane), samples)
    for source in range(len(weights)):
        known = [number for number, each in enumerate(twin) if each == source][:8]
        assert found[: len(known), source].tolist() == known
        assert (found[len(known) :, source] >= NUMBERS).all()


def test_a_source_without_weight_left_never_comes_again():
    blend = Blend.of(check_weights([1, [(0, 1), (10, 0)]]), 0, 0, 1)
    seen = blend.shares(np.array([0]), np.array([10**12]))[0]
    assert seen.sum() == 10**12
    assert 4 <= seen[1] <= 6
    assert blend.numbers(np.array([0]), seen[None])[0, 1] == NEVER


def test_far_out_it_is_the_same_forwards_and_back():
    blend = Blend.of(check_weights([0.5, 0.3, 0.15, 0.05]), 0, 0, 2)
    numbers = 10**12 + np.arange(1000)
    sources, samples = blend.sources(1, numbers)
    assert (blend.numbers_of(np.ones(1000, np.int64), sources.astype(np.int64), samples) == numbers).all()
    shares = blend.shares(np.array([1]), numbers[:1])[0]
    assert np.abs(shares - numbers[0] * np.array([0.5, 0.3, 0.15, 0.05])).max() < 2


def test_the_order_is_fixed_for_ever():
    """If this fails, every mixture that was saved before would go on with other samples: do not update the digest."""
    blend = Blend.of(check_weights([3, [(0, 1), (999, 0.5)], 0.01]), 7, 1, 3)
    found = np.stack([np.stack(blend.sources(lane, np.arange(5000))).astype("<i8") for lane in range(3)])
    assert hashlib.blake2b(found.tobytes(), digest_size=16).hexdigest() == "93b93de6d77a9a31e881952d063b1a43"
