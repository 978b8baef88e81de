"""Gathering values from chunks, against plain numpy.

Which shard a sample lies in, against numpy's search, and the samples of a window.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload.kernels.copying import PAST_CACHES_BYTES
from fastload.kernels.gather import gather, gather_columns, lay_out
from fastload.plan import WindowKey
from fastload.plan.permutation import Bijection
from fastload.plan.samples import OpenWindow

CHUNK = 64
Int64s = np.ndarray


class World:
    """Objects cut into chunks that lie scattered in an arena, and values in them."""

    def __init__(self, seed: int, sizes: list[int], values: int, present: float) -> None:
        random = np.random.default_rng(seed)
        self.objects = [random.integers(0, 256, size, np.uint8) for size in sizes]
        counts = [-(-size // CHUNK) for size in sizes]
        firsts = np.cumsum([0, *counts])
        buffers = random.permutation(firsts[-1] + 3)
        self.arena = random.integers(0, 256, len(buffers) * CHUNK, np.uint8)
        self.chunk_offset = np.full(firsts[-1], -1, np.int64)
        for number, data in enumerate(self.objects):
            for piece in range(counts[number]):
                chunk = firsts[number] + piece
                part = data[piece * CHUNK : (piece + 1) * CHUNK]
                at = int(buffers[chunk]) * CHUNK
                self.arena[at : at + len(part)] = part
                if random.random() < present:
                    self.chunk_offset[chunk] = at
        self.arena.flags.writeable = False
        self.of = random.integers(0, len(sizes), values)
        self.first = firsts[self.of]
        limits = np.array(sizes)[self.of]
        self.offset = random.integers(0, limits + 1)
        self.size = random.integers(0, limits - self.offset + 1)
        self.to = np.cumsum(self.size) - self.size

    def twin(self, out: np.ndarray) -> int:
        """`gather`, byte by byte."""
        copied = 0
        for value, number in enumerate(self.of):
            for at in range(self.size[value]):
                where = self.offset[value] + at
                if self.chunk_offset[self.first[value] + where // CHUNK] >= 0:
                    out[self.to[value] + at] = self.objects[number][where]
                    copied += 1
        return copied

    def touched(self) -> list[int]:
        """The chunks of `lay_out`, byte by byte."""
        return sorted(
            {
                int(first + at // CHUNK)
                for first, offset, size in zip(self.first, self.offset, self.size, strict=True)
                for at in range(offset, offset + size)
            }
        )

    def gather(self, out: np.ndarray) -> int:
        return gather(self.arena, self.chunk_offset, CHUNK, self.first, self.offset, self.size, self.to, out)


WORLDS = st.builds(
    World,
    st.integers(0, 2**32),
    st.lists(st.integers(1, 5 * CHUNK), min_size=1, max_size=5),
    st.integers(0, 8),
    st.sampled_from([0.0, 0.5, 1.0]),
)


@settings(max_examples=80, deadline=None)
@given(WORLDS)
def test_gather_is_its_twin(world: World) -> None:
    total = int(world.size.sum())
    # A margin, to see that nothing beside the values is written.
    found, expected = np.full(total + 16, 7, np.uint8), np.full(total + 16, 7, np.uint8)
    assert world.gather(found) == world.twin(expected)
    assert np.array_equal(found, expected)


@settings(max_examples=80, deadline=None)
@given(WORLDS)
def test_columns_are_laid_out_and_gathered_together(world: World) -> None:
    """The values as one column, and in another order as a second."""
    columns = [(array, array[::-1]) for array in (world.first, world.offset, world.size)]
    first, offset, size = (np.concatenate(pair).reshape(2, -1) for pair in columns)
    seen, chunks = np.zeros(len(world.chunk_offset), np.uint8), np.empty(len(world.chunk_offset), np.int64)
    ends = np.full((2, size.shape[1] + 1), -1)
    for _ in range(2):
        found = lay_out(2, first.ravel(), offset.ravel(), size.ravel(), CHUNK, seen, chunks, ends.reshape(-1))
        assert sorted(chunks[:found].tolist()) == world.touched()
        assert not seen.any()
    assert ends.tolist() == [[0, *np.cumsum(row)] for row in size.tolist()]

    together = [np.full(ends[0, -1], 7, np.uint8) for _ in range(2)]
    alone = [out.copy() for out in together]
    place = world.arena, world.chunk_offset, CHUNK
    copied = gather_columns(*place, first, offset, size, ends, together)
    assert copied == sum(gather(*place, first[c], offset[c], size[c], ends[c, :-1], out) for c, out in enumerate(alone))
    assert all(map(np.array_equal, together, alone))


@pytest.mark.parametrize("at", range(0, 80, 13))
def test_large_values_of_a_large_batch(at: int) -> None:
    """They are written past the caches, line by line, wherever they and the batch begin."""
    random = np.random.default_rng(at)
    arena = random.integers(0, 256, 1 << 20, np.uint8)
    chunk_bytes, count = 100_003, 600
    size = random.integers(0, 60_000, count)
    size[:9] = [0, 1, 4095, 4096, 4097, 63, 64, 65, 300_000]
    offset = random.integers(0, 10 * chunk_bytes - size)
    to = np.cumsum(size) - size
    memory = np.zeros(at + int(size.sum()) + 100, np.uint8)
    out = memory[at : memory.size - 100]
    assert out.size >= PAST_CACHES_BYTES
    chunk_offset = np.arange(10, dtype=np.int64) * chunk_bytes
    copied = gather(arena, chunk_offset, chunk_bytes, np.zeros(count, np.int64), offset, size, to, out)
    assert copied == out.size
    expected = [arena[begin : begin + length] for begin, length in zip(offset, size, strict=True)]
    assert np.array_equal(out, np.concatenate(expected))
    assert not memory[:at].any()
    assert not memory[memory.size - 100 :].any()


def test_two_passes_make_a_whole() -> None:
    world = World(3, [1000, 300], 6, 1.0)
    out = np.zeros(int(world.size.sum()), np.uint8)
    everything = world.chunk_offset.copy()
    copied = 0
    for turn in (0, 1):
        world.chunk_offset = np.where(np.arange(len(everything)) % 2 == turn, everything, -1)
        copied += world.gather(out)
    assert copied == len(out)
    world.chunk_offset = everything
    expected = np.zeros_like(out)
    world.twin(expected)
    assert np.array_equal(out, expected)


BIG = 2**63 - 1
BAD = {
    "offset below": {"value_offset": -1},
    "offset past the chunks": {"value_offset": 4 * CHUNK},
    "offset far above": {"value_offset": BIG},
    "size below": {"value_size": -1},
    "size past the chunks": {"value_size": 3 * CHUNK + 1},
    "size far above": {"value_size": BIG},
    "both far above": {"value_size": BIG, "value_offset": BIG},
    "chunk below": {"value_first_chunk": -1},
    "chunk above": {"value_first_chunk": 4},
    "chunk far above": {"value_first_chunk": BIG},
    "chunk and offset far above": {"value_offset": BIG, "value_first_chunk": BIG},
    "all far above": {"value_size": BIG, "value_offset": BIG, "value_first_chunk": BIG},
}
BAD_OUT = {
    "output below": {"out_offset": -1},
    "output past the end": {"out_offset": 7},
    "output far above": {"out_offset": BIG},
    "arena past the end": {"chunk_offset": 4 * CHUNK - 9},
    "arena far above": {"chunk_offset": BIG},
}


def arguments(changes: dict[str, int]) -> dict[str, np.ndarray]:
    """Two values of ten bytes in an arena of four chunks; the second with `changes`."""
    values = {
        "value_first_chunk": np.array([0, 1]),
        "value_offset": np.array([0, 10]),
        "value_size": np.array([10, 10]),
        "out_offset": np.array([0, 6]),
        "chunk_offset": np.arange(4) * CHUNK,
    }
    for name, value in changes.items():
        values[name][1] = value
    return values


@pytest.mark.parametrize("name", BAD | BAD_OUT)
def test_what_lies_outside_is_refused(name: str) -> None:
    changed = arguments((BAD | BAD_OUT)[name])
    out = np.zeros(16, np.uint8)
    with pytest.raises(IndexError, match="value 1 "):
        gather(arena=np.zeros(4 * CHUNK, np.uint8), chunk_bytes=CHUNK, out=out, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BAD)
def test_chunks_outside_are_refused(name: str) -> None:
    changed = arguments(BAD[name])
    seen, chunks, ends = np.zeros(4, np.uint8), np.zeros(4, np.int64), np.zeros(3, np.int64)
    values = changed["value_first_chunk"], changed["value_offset"], changed["value_size"]
    assert lay_out(1, *values, CHUNK, seen, chunks, ends) == -2
    assert not seen.any()


@pytest.mark.parametrize("name", BAD | BAD_OUT)
def test_a_column_of_what_lies_outside_is_refused(name: str) -> None:
    """Beside one that is as it should be."""
    good, bad = arguments({}), arguments((BAD | BAD_OUT)[name])
    tables = [np.array([good[n], bad[n]]) for n in ("value_first_chunk", "value_offset", "value_size")]
    ends = np.array([[*each["out_offset"], 16] for each in (good, bad)])
    outs = [np.zeros(16, np.uint8), np.zeros(16, np.uint8)]
    with pytest.raises(IndexError, match="value 1 "):
        gather_columns(np.zeros(4 * CHUNK, np.uint8), bad["chunk_offset"], CHUNK, *tables, ends, outs)


def test_lengths_must_agree() -> None:
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(IndexError, match="differ in length"):
        gather(np.zeros(1, np.uint8), one, CHUNK, one, two, one, one, np.zeros(1, np.uint8))
    with pytest.raises(IndexError, match="differ in shape"):
        gather_columns(np.zeros(1, np.uint8), one, CHUNK, *(a.reshape(1, -1) for a in (one, two, one, two)), [])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 7, 64, 1000]), min_size=1, max_size=40), st.integers(0, 99))
def test_every_sample_of_any_shards(counts, seed):
    """Empty shards, one shard much larger than the others, and samples in no order."""
    random = np.random.default_rng(seed)
    objects = random.permutation(100)[: len(counts)].astype(np.int32)
    shard_of, number_of = np.repeat(objects, counts), np.concatenate([np.arange(count) for count in counts])
    line = random.permutation(sum(counts))
    window = OpenWindow(line, objects, np.array(counts))
    for offsets in (np.arange(len(line)), np.arange(len(line))[::-3], np.arange(0)):
        found = window.located(offsets, WindowKey(1, 5, 2, 3))
        assert (found.object_no == shard_of[line[offsets]]).all()
        assert (found.sample_no == number_of[line[offsets]]).all()
        assert found.windows() == ((WindowKey(1, 5, 2, 3),) if len(offsets) else ())


def test_very_many_shards_and_samples():
    counts = np.random.default_rng(0).integers(0, 2_000_000, 100_000)
    ends = np.cumsum(counts)
    line, offsets = Bijection("key", int(ends[-1])), np.arange(10_000)
    found = OpenWindow(line, np.arange(100_000, dtype=np.int32), counts).located(offsets, WindowKey(0, 0, 0, 0))
    numbers = line[offsets]
    shards = np.searchsorted(ends, numbers, side="right")
    assert (found.object_no == shards).all()
    assert (found.sample_no == numbers - (ends - counts)[shards]).all()
