"""One pass over a loader, fastload's or another, and the same figures of it: rate, waits, CPU-seconds, memory.

A loader is an iterable of batches. The samples of a batch are those of its first column: a dict has named columns, a
tuple or list of arrays of one length (or of lists) has unnamed ones, any other list is one of samples, and what has no
length is one sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

_REPLAY_S, _REPLAY_BATCHES, _KEPT_BYTES, _KEPT = 1.0, 200_000, 256 << 20, 64


class Pass(msgspec.Struct, kw_only=True):
    """What one pass took."""

    seconds: float
    first_batch_s: float
    batches: int
    samples: int
    wait_p50_s: float
    wait_p99_s: float
    wait_max_s: float
    cpu_s: float
    peak_memory_bytes: int = 0
    note: str = ""


class Step(msgspec.Struct, kw_only=True):
    """A consumer that takes a batch every `step_s`: how much of its time it worked."""

    step_s: float
    batches: int
    utilisation: float


def timed(
    batches: Iterable[Any],
    began: float,
    cpu_s: Callable[[], float],
    *,
    samples_max: int = 0,
    seconds_max: float = 0.0,
    each: Callable[[Any], object] | None = None,
) -> Pass:
    """A pass that began then, up to so many samples or seconds (0: to its end). `each` is given every batch."""
    before = cpu_s()
    waits: list[float] = []
    samples, note = 0, ""
    iterator = iter(batches)
    while True:
        asked_at = time.monotonic() if waits else began
        try:
            batch = next(iterator)
        except StopIteration:
            break
        now = time.monotonic()
        waits.append(now - asked_at)
        samples += sample_count(batch)
        if each is not None:
            each(batch)
        if samples_max and samples > samples_max:
            note = f"stopped after {samples:,} samples: an epoch of what fastload read has {samples_max:,}"
            break
        if seconds_max and now - began > seconds_max:
            note = f"stopped after {seconds_max:.0f} s, as --for says"
            break
    seconds = time.monotonic() - began
    if hasattr(iterator, "close"):
        iterator.close()
    del iterator  # with its workers
    ordered = np.sort(waits) if waits else np.zeros(1)
    return Pass(
        seconds=seconds,
        first_batch_s=waits[0] if waits else seconds,
        batches=len(waits),
        samples=samples,
        wait_p50_s=float(ordered[len(ordered) // 2]),
        wait_p99_s=float(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]),
        wait_max_s=float(ordered[-1]),
        cpu_s=cpu_s() - before,
        note=note,
    )


def step(batches: Iterator[Any], step_s: float, for_s: float) -> Step:
    """A consumer that works `step_s` on each batch: what share of its time that is, once nothing is in reserve."""
    _use_up(batches, for_s / 2)
    began, count = time.monotonic(), 0
    while time.monotonic() - began < for_s:
        next(batches)
        time.sleep(step_s)
        count += 1
    elapsed = time.monotonic() - began
    return Step(step_s=step_s, batches=count, utilisation=min(1.0, count * step_s / elapsed))


def _use_up(batches: Iterator[Any], at_most_s: float) -> None:
    """Take batches without work until one is waited for, since what is ready would flatter the first steps."""
    until = time.monotonic() + at_most_s
    fastest = float("inf")
    while time.monotonic() < until:
        began = time.monotonic()
        next(batches)
        took = time.monotonic() - began
        if took > 10 * max(fastest, 1e-3):
            return
        fastest = min(fastest, took)


def replay(batches: Iterable[Any], cpu_s: Callable[[], float]) -> Pass:
    """The first batches of a loader over and over from memory: what no loader of these batches can beat."""
    kept: list[tuple[Any, int]] = []
    byte_count = 0
    for batch in batches:
        kept.append((own_copy(batch), sample_count(batch)))
        byte_count += _byte_count(batch)
        if len(kept) >= _KEPT or byte_count >= _KEPT_BYTES:
            break

    def again() -> Iterator[Any]:
        until = time.monotonic() + _REPLAY_S
        for number in range(_REPLAY_BATCHES if kept else 0):
            if number % 16 == 0 and time.monotonic() > until:
                return
            yield kept[number % len(kept)][0]

    found = timed(again(), time.monotonic(), cpu_s)
    found.note = f"{len(kept)} batches from memory, over and over"
    return found


# Batches


def columns_of(batch: Any) -> dict[str, Any] | None:
    """The columns of a batch by name, or by number where they have no names; None where it has no columns."""
    if isinstance(batch, Mapping):
        return {str(name): values for name, values in batch.items()}
    if _is_array(batch):
        return {"0": batch}
    if not isinstance(batch, tuple | list) or not batch:
        return None
    if all(_is_column(each) for each in batch) and len({len(each) for each in batch}) == 1:
        return {str(number): values for number, values in enumerate(batch)}
    if all(isinstance(each, Mapping) for each in batch):
        return {str(name): [sample.get(name) for sample in batch] for name in batch[0]}
    return None if isinstance(batch[0], tuple | list) else {"0": batch}


def sample_count(batch: Any) -> int:
    """See the module's text."""
    columns = columns_of(batch)
    if columns is not None:
        return next((len(each) for each in columns.values() if _is_column(each) or hasattr(each, "__len__")), 1)
    return len(batch) if isinstance(batch, tuple | list) else 1


def own_copy(batch: Any) -> Any:
    """The batch with memory of its own, so that its loader may use its own again."""
    if isinstance(batch, Mapping):
        return {name: own_copy(value) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [own_copy(each) for each in batch]
    if hasattr(batch, "clone"):
        return batch.clone()
    if isinstance(batch, np.ndarray):
        return batch.copy()
    if isinstance(batch, memoryview):
        return bytes(batch)
    if hasattr(batch, "tolist") and not _is_array(batch):  # fastload's ragged columns
        return own_copy(batch.tolist())
    return batch


def _byte_count(batch: Any) -> int:
    if isinstance(batch, Mapping):
        return sum(map(_byte_count, batch.values()))
    if isinstance(batch, bytes | bytearray | str):
        return len(batch)
    if hasattr(batch, "nbytes"):
        return int(batch.nbytes)
    if isinstance(batch, list | tuple) or hasattr(batch, "offsets"):
        return sum(map(_byte_count, batch))
    return 8


def _is_array(value: Any) -> bool:
    return len(getattr(value, "shape", ())) > 0 and hasattr(value, "dtype")


def _is_column(value: Any) -> bool:
    return _is_array(value) or isinstance(value, list | tuple) or hasattr(value, "offsets")
