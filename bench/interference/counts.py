"""How often each kind of thread takes the GIL for a batch, counted in a process of its own (see `bench.gil`)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from bench import gil
from bench.interference.cases import loader
from bench.interference.options import Options

WARM_UP = 4  # batches, of each epoch
ROLES = ("decode", "feed", "reader", "others", "trainer")
SERVED, WARM = "from the service", "warm"


@dataclass(frozen=True, slots=True)
class Counts:
    """Of an epoch: by role, how often each batch took the GIL; the most work that a thread of fastload did with it; and
    where it is let go.
    """

    batches: list[dict[str, int]]
    work_ms: float
    places: list[str]


def run(options: Options, name: str, threads: int) -> dict[str, Counts]:
    """Two epochs, counted batch by batch."""
    counter = gil.Counter()
    with loader(options.folder, name, threads) as made:
        return {source: _epoch(made, counter, options.where) for source in (SERVED, WARM)}


def _epoch(made: Any, counter: gil.Counter, where: bool) -> Counts:
    names: dict[int, str] = {}

    def taken() -> Counter[str]:
        names.update({thread.native_id: thread.name for thread in threading.enumerate() if thread.native_id})
        sums: Counter[str] = Counter()
        for number, figures in counter.threads().items():
            sums[role(names.get(number, ""))] += figures.taken
        return sums

    batches: list[dict[str, int]] = []
    epoch = iter(made)
    for _ in range(WARM_UP):
        next(epoch)
    counter.forget_longest()
    watching: AbstractContextManager[list[gil.Place]] = counter.watched() if where else nullcontext([])
    with watching as places:
        before = taken()
        for _ in epoch:
            now = taken()
            batches.append(dict(now - before))
            before = now
    work_ms = [each.work_ms_max for number, each in counter.threads().items() if _is_ours(names.get(number, ""))]
    return Counts(batches, max(work_ms), _described(places, names, len(batches)))


def role(name: str) -> str:
    """What a thread of this name does."""
    if name == "MainThread":
        return "trainer"
    ours, _, rest = name.partition("-")
    known = {"feed": "feed", "decode": "decode", "consumer": "reader"}
    return known.get(rest.partition("-")[0], "others") if ours == "fastload" else "others"


def _is_ours(name: str) -> bool:
    return role(name) != "trainer"


def _described(places: Sequence[gil.Place], names: Mapping[int, str], batches: int) -> list[str]:
    """What is worth a line: places where a thread of fastload lets go often, or after much work."""
    counts: Counter[tuple[str, str]] = Counter()
    works: dict[tuple[str, str], float] = {}
    for place in places:
        name = names.get(place.thread_id, "")
        if _is_ours(name):
            key = role(name), str(place)
            counts[key] += place.count
            works[key] = max(works.get(key, 0.0), place.work_ns_max / 1e6)
    return [
        f"{who:7} {count / batches:6.2f} a batch, after {works[who, where]:5.2f} ms of work at most: {where}"
        for (who, where), count in counts.most_common()
        if count / batches >= 0.1 or works[who, where] >= 0.3
    ]
