"""The user's loader beside fastload's: `python -m fastload.bench.own`, in the user's working directory.

`module:function` is imported and called without arguments. What it returns is iterated: an iterable of batches, as a
torch `DataLoader` is one, or a function that gives an iterator. An iterator is used up after one pass, so the function
is called again for the next. Its CPU-seconds are those of its process and of all that this one starts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import msgspec

from fastload.bench import measure
from fastload.bench.digests import Column, add_batch
from fastload.bench.passes import Pass, Step, replay, step, timed
from fastload.bench.process import Words, answers, asked, imported, serve
from fastload.errors import ConfigError

OPTION = "--against"


class Settings(msgspec.Struct, kw_only=True):
    """Which loader, and what is to be done with it."""

    target: str
    passes: int = 0
    samples_max: int = 0  # of a pass; 0: all that it gives
    seconds_max: float = 0.0
    steps_s: list[float] = []
    step_for_s: float = 4.0
    digests: bool = False  # whether the columns of a pass are wanted, after all else
    replays: bool = False  # whether its batches are to be replayed from memory


class Outcome(msgspec.Struct, kw_only=True):
    """What came of it."""

    passes: list[Pass] = []
    steps: list[Step] = []
    columns: dict[str, Column] = {}
    replayed: Pass | None = None


def run(settings: Settings, timeout_s: float) -> Outcome:
    """Run it in a process of its own. Raises what failed there in one line."""
    words = Words(
        f"{OPTION} {settings.target}",
        "it hangs, or needs a longer --for",
        f"it must not exit by itself; try it with python -c 'import {settings.target.partition(':')[0]}'",
    )
    with (
        asked("fastload.bench.own", settings, words) as process,
        measure.PeakMemory(lambda: [process.pid]) as memory,  # from outside, since a loader may fork
    ):
        (outcome,) = answers([process], Outcome, timeout_s)
    for each in outcome.passes:
        each.peak_memory_bytes = memory.peak_bytes
    return outcome


def _work(settings: Settings) -> Outcome:
    source = _Source(settings.target)
    outcome = Outcome()
    for _ in range(settings.passes):
        began = time.monotonic()
        found = timed(
            source.batches(),
            began,
            _cpu_s,
            samples_max=settings.samples_max,
            seconds_max=settings.seconds_max,
            each=source.check_process,
        )
        if not found.batches:
            raise ConfigError(
                f"{OPTION} {settings.target}: it gives no batch{' after the first pass' if outcome.passes else ''}; "
                "return an iterable that has some, anew at each call"
            )
        outcome.passes.append(found)
    for step_s in settings.steps_s:
        with closing(source.endless()) as batches:
            outcome.steps.append(step(batches, step_s, settings.step_for_s))
    if settings.digests:
        _digest(source, settings.samples_max, outcome.columns)
    if settings.replays:
        outcome.replayed = replay(source.batches(), _cpu_s)
    return outcome


def _cpu_s() -> float:
    return measure.cpu_s([os.getpid()])


def _digest(source: _Source, samples_max: int, columns: dict[str, Column]) -> None:
    """All of a pass, or a batch more than the other side has, which then differs in its number of samples."""
    for batch in source.batches():
        source.check_process(batch)
        add_batch(columns, batch)
        if samples_max and max(each.count for each in columns.values()) > samples_max:
            return


class _Source:
    """The batches of one pass after the other."""

    def __init__(self, target: str) -> None:
        self._target, self._pid = target, os.getpid()
        self._make = imported(OPTION, target)
        self._made: Any = None

    def check_process(self, batch: object) -> None:
        """A loader that forks may give batches to both processes: only the first goes on."""
        if os.getpid() != self._pid:
            os._exit(0)

    def batches(self) -> Iterator[Any]:
        """Those of the next pass."""
        if self._made is None:
            self._made = self._make() if callable(self._make) and not _is_iterable(self._make) else self._make
        made = self._made
        if not _is_iterable(made):
            if not callable(made):
                raise ConfigError(
                    f"{OPTION} {self._target}: gives a {type(made).__name__}, and an iterable of batches is wanted"
                )
            made = made()
            if not _is_iterable(made):
                raise ConfigError(
                    f"{OPTION} {self._target}: gives a function that gives a {type(made).__name__}, and an iterable of "
                    "batches is wanted"
                )
        iterator: Iterator[Any] = iter(made)
        if iterator is self._made:
            self._made = None  # used up by this pass
        return iterator

    def endless(self) -> Generator[Any, None, None]:
        """One pass after the other."""
        while True:
            yield from self.batches()


def _is_iterable(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, type)


if __name__ == "__main__":
    sys.exit(serve(Settings, _work))
