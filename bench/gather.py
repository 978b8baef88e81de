"""Records of 600 bytes on average, out of the arena into batches: CPU time a sample, beside a plain copy.

    python -m bench.gather                      # half a minute

A million records of 200 to 1000 bytes lie in shared memory, as the cache service's arena does: 600 MB, much more than
any processor's cache. They are copied into batches in order and shuffled, from where they lie end to end, and from
where they lie as members of tar archives, with headers between them. The limit is copying the same memory block by
block. Beside that: a list of memoryviews, which copies nothing, and torch's default_collate, which stacks tensors of
one size.

Systems take turns within a round; the figures are medians over rounds, and ratios are taken within a round. The targets
were set where a plain copy takes 43 ns a sample, and follow what it takes here.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import default_collate

from bench.targets import Figure, show
from fastload.cache import Arena, ArenaView
from fastload.kernels.gather import gather

COUNT = 1_000_000
SIZES = (200, 1000)
EQUAL_BYTES = 600
CHUNK_BYTES = 8 << 20
SEED = 5
# What was asked for, in times of the copy that took 43 ns.
IN_ORDER, SHUFFLED = 55 / 43, 240 / 43
# Of the slow systems, a part of the batches is enough.
SLOW_SHARE = 20

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Work = Callable[[], int]  # returns how many samples it was


@dataclass(frozen=True, slots=True)
class Batch:
    """Where the values of one batch lie, and where each goes when they are put end to end."""

    offset: Ints
    size: Ints
    out_offset: Ints

    @property
    def byte_count(self) -> int:
        """Of all its values."""
        return int(self.size.sum())


def main() -> int:
    """Time and print."""
    parser = argparse.ArgumentParser(
        prog="bench.gather", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1024, help="samples a batch")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    sizes = rng.integers(SIZES[0], SIZES[1] + 1, COUNT)
    starts = layouts(sizes)
    byte_count = int(max(start[-1] for start in starts.values())) + SIZES[1]
    owner = Arena(-(-byte_count // CHUNK_BYTES) * CHUNK_BYTES, CHUNK_BYTES)
    view = ArenaView(owner.fd, owner.byte_count)
    try:
        fill(owner, rng)
        return int(show_all(measure(view.array, starts, sizes, options.batch, options.rounds, rng), options.batch))
    finally:
        view.close()
        owner.close()


def layouts(sizes: Ints) -> dict[str, Ints]:
    """Where records of these sizes lie, in two ways."""
    members = 512 + -(-sizes // 512) * 512  # a header, and data up to a whole block
    return {"end to end": np.cumsum(sizes) - sizes, "tar members": np.cumsum(members) - members + 512}


def fill(arena: Arena, rng: np.random.Generator) -> None:
    """Random bytes everywhere."""
    noise = rng.bytes(CHUNK_BYTES)
    for number in range(arena.buffer_count):
        arena.buffer(number)[:] = noise


def measure(
    arena: Bytes, starts: dict[str, Ints], sizes: Ints, batch_size: int, rounds: int, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Nanoseconds of CPU time a sample, for all systems in turn, `rounds` times after one that does not count."""
    orders = {"in order": np.arange(COUNT), "shuffled": rng.permutation(COUNT)}
    works: dict[str, Work] = {}
    for layout, offsets in starts.items():
        for name, order in orders.items():
            batches = cut(offsets[order], sizes[order], batch_size)
            works[f"{layout}, {name}"] = gather_work(arena, batches)
            if layout == "end to end":
                works[f"memoryviews, {name}"] = memoryview_work(arena, batches[::SLOW_SHARE])
                works[f"default_collate, {name}"] = collate_work(arena, batches[::SLOW_SHARE])
    works["copy"] = copy_work(arena, cut(starts["end to end"], sizes, batch_size))
    took: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            count = work()
            if number > 0:
                took[name].append((time.process_time() - began) / count * 1e9)
    return took


def cut(offset: Ints, size: Ints, batch_size: int) -> list[Batch]:
    """Whole batches of values in this order."""
    batches = []
    for start in range(0, len(offset) - batch_size + 1, batch_size):
        sizes = size[start : start + batch_size].copy()
        batches.append(Batch(offset[start : start + batch_size].copy(), sizes, np.cumsum(sizes) - sizes))
    return batches


def gather_work(arena: Bytes, batches: list[Batch]) -> Work:
    """fastload's kernel, into memory that is used again."""
    out = np.zeros(max(batch.byte_count for batch in batches), np.uint8)
    chunk_offset = np.arange(0, len(arena), CHUNK_BYTES)
    first_chunk = np.zeros(len(batches[0].size), np.int64)

    def work() -> int:
        for batch in batches:
            gather(arena, chunk_offset, CHUNK_BYTES, first_chunk, batch.offset, batch.size, batch.out_offset, out)
        return sum(len(batch.size) for batch in batches)

    return work


def copy_work(arena: Bytes, batches: list[Batch]) -> Work:
    """The limit: the memory of each batch, which lies end to end, as one block."""
    out = np.zeros(max(batch.byte_count for batch in batches), np.uint8)
    blocks = [arena[batch.offset[0] : batch.offset[0] + batch.byte_count] for batch in batches]

    def work() -> int:
        for block in blocks:
            out[: len(block)] = block
        return sum(len(batch.size) for batch in batches)

    return work


def memoryview_work(arena: Bytes, batches: list[Batch]) -> Work:
    """A list of memoryviews a batch: nothing is copied, and no tensor can be made of it without a copy."""
    memory = memoryview(arena.data)

    def work() -> int:
        count = 0
        for batch in batches:
            ends = (batch.offset + batch.size).tolist()
            count += len([memory[at:end] for at, end in zip(batch.offset.tolist(), ends, strict=True)])
        return count

    return work


def collate_work(arena: Bytes, batches: list[Batch]) -> Work:
    """torch's default_collate over tensors of one size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it must not be written to, which it is not
        whole = torch.from_numpy(arena)

    def work() -> int:
        count = 0
        for batch in batches:
            tensors = [whole[at : at + EQUAL_BYTES] for at in batch.offset.tolist()]
            count += len(default_collate(tensors))
        return count

    return work


def show_all(took: dict[str, list[float]], batch_size: int) -> bool:
    """A table; whether a target is missed."""

    def of_copy(name: str) -> list[float]:
        return [one / copy for one, copy in zip(took[name], took["copy"], strict=True)]

    unit = "CPU ns"
    figures = [Figure("block copy, the limit", unit, took["copy"])]
    for name, limit in (("in order", IN_ORDER), ("shuffled", SHUFFLED)):
        figures.append(Figure(f"gather, {name}", unit, took[f"end to end, {name}"]))
        figures.append(Figure("  of the copy", "", of_copy(f"end to end, {name}"), at_most=limit))
    for name in ("in order", "shuffled"):
        figures.append(Figure(f"gather of tar members, {name}", unit, took[f"tar members, {name}"]))
        figures.append(Figure("  of the copy", "", of_copy(f"tar members, {name}")))
    for system in ("memoryviews", "default_collate"):
        figures += [Figure(f"{system}, {name}", unit, took[f"{system}, {name}"]) for name in ("in order", "shuffled")]
    title = f"a sample of {sum(SIZES) // 2} bytes on average, batches of {batch_size}"
    return show(title, figures)


if __name__ == "__main__":
    sys.exit(main())
