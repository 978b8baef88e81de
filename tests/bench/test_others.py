"""What other loaders are measured with, as far as it needs none of them: samples of archives, processes that spin."""

from __future__ import annotations

import io
import os

from bench import others
from fastload.bench import measure
from tests.processes import is_running
from tests.shards import tar_of

SAMPLES = {f"k/{number:04d}": {"jpg": b"%d" % number, "cls": b"1"} for number in range(3 * others.SHUFFLE_BUFFER)}


def test_samples_of_an_archive_come_once_and_shuffled() -> None:
    members = others._members(io.BytesIO(tar_of(SAMPLES)))
    samples = list(others._shuffled(others.samples_of_members(members)))
    assert {key: {"jpg": jpg, "cls": label} for key, jpg, label in samples} == SAMPLES
    assert len(samples) == len(SAMPLES)
    assert [key for key, _, _ in samples] != list(SAMPLES)


def test_processes_that_spin_end_with_the_block() -> None:
    before = set(measure.descendants([os.getpid()]))
    with measure.spinning(2):
        pids = set(measure.descendants([os.getpid()])) - before
        assert len(pids) == 2
    assert not any(map(is_running, pids))
