"""Keys: pinned, since they say what every sample of a resumed run looks like, and well spread."""

from __future__ import annotations

import numpy as np

from fastload.decode.base import sample_keys


def test_pinned() -> None:
    objects, samples = np.array([0, 0, 1, 2**31 - 1], np.int32), np.array([0, 1, 0, 2**40])
    assert sample_keys(0, 0, objects, samples).tolist() == PINNED
    assert sample_keys(2**64, 0, objects, samples).tolist() == PINNED


PINNED = [2391539541053276776, 920862675595841680, 10910317525803880485, 1090862404431161371]


def test_each_sample_has_its_own_key_in_each_epoch_and_with_each_seed() -> None:
    objects, samples = (part.ravel() for part in np.meshgrid(np.arange(40), np.arange(50)))
    keys = [sample_keys(seed, epoch, objects, samples) for seed in (0, 1, -1, 2**40) for epoch in range(4)]
    together = np.concatenate(keys)
    assert len(np.unique(together)) == len(together) == 16 * 2000
    bits = np.unpackbits(together.view(np.uint8)).reshape(-1, 64)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.02


def test_a_key_does_not_depend_on_its_neighbours() -> None:
    objects, samples = np.arange(10), np.arange(10) * 7
    whole = sample_keys(3, 5, objects, samples)
    for i in range(10):
        assert sample_keys(3, 5, objects[i : i + 1], samples[i : i + 1])[0] == whole[i]
