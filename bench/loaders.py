"""Two loaders that take turns, what fastload's could do at best, and the CPU time of a process and of its workers."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader as TorchLoader

from fastload import DataLoader
from fastload.transport.worker_process import freeze_existing_objects, keep_freed_memory

T = TypeVar("T")


def in_turn(rounds: int, measure: Callable[[Callable[..., Any]], T]) -> tuple[list[T], list[T]]:
    """What was measured with ours and with torch's; who is first in a round changes."""
    ours: list[T] = []
    theirs: list[T] = []
    for number in range(rounds):
        turns = [(DataLoader, ours), (TorchLoader, theirs)]
        for kind, values in turns if number % 2 == 0 else turns[::-1]:
            values.append(measure(kind))
    return ours, theirs


def as_a_worker(measure: Callable[[], float]) -> float:
    """What is measured in a forked process whose heap is a worker's."""
    context = multiprocessing.get_context("fork")
    there, here = context.Pipe()
    process = context.Process(target=_as_a_worker, args=(measure, here))
    process.start()
    here.close()
    found: float = there.recv()
    process.join()
    return found


def _as_a_worker(measure: Callable[[], float], answer: Connection) -> None:
    torch.set_num_threads(1)
    freeze_existing_objects()
    keep_freed_memory(1 << 30)
    answer.send(measure())


def cpu_s() -> float:
    """Of this process and of children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)
