"""What fuzzing found, again; and a little of it every time, so that it goes on working. See `fuzzing`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats import fuzz_readers, fuzz_records, fuzz_tar, fuzzing
from tests.formats.archives import Member, as_samples, write

TARGETS = {target.name: target for target in (fuzz_tar.TARGET, *fuzz_readers.TARGETS, *fuzz_records.TARGETS)}
FOUND = sorted(path for path in fuzzing.FOUND.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_was_found(path: Path) -> None:
    for seed in range(3):
        TARGETS[path.parent.name].check(path.read_bytes(), random.Random(seed))


def test_columns_that_only_unicode_makes_one_whatever_lay_in_memory_before() -> None:
    """Found as two outcomes of the same bytes: a search went on into what an array held before it was filled."""
    pairs = [(f"{number}.x", f"{number}.y") for number in range(20)]
    data = write(Member(name, name.encode()) for name in [*sum(pairs, ()), "a.é", "b.É", "c.x", "c.y"])
    for seed in range(20):
        found = fuzz_tar.outcome(data, random.Random(seed), {})
        assert not isinstance(found, str), found
        assert as_samples(found, data)[-3:] == [
            {"__key__": "a", "é": "a.é".encode()},
            {"__key__": "b", "é": "b.É".encode()},
            {"__key__": "c", "x": b"c.x", "y": b"c.y"},
        ]


@pytest.mark.parametrize(
    ("module", "mode", "cases"),
    [
        ("fuzz_tar", "bounds", 50),
        ("fuzz_tar", "pages", 100),
        ("fuzz_readers", "pages", 25),
        ("fuzz_records", "bounds", 50),
        ("fuzz_records", "pages", 100),
        pytest.param("fuzz_records", "pages", 100_000, marks=[pytest.mark.thorough, pytest.mark.timeout(3000)]),
    ],
)
def test_a_little_fuzzing(module: str, mode: str, cases: int) -> None:
    """In a process of its own, which may die."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.formats.{module}", "--cases", str(cases)],
        env={**os.environ, **fuzzing.MODES[mode]},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_guards_guard() -> None:
    """A read of the byte behind an array, or before it, ends the process."""
    code = (
        "import ctypes, numpy as np; from tests.formats.fuzzing import guarded; "
        "array = guarded(100, np.uint8, {at_end}); print(array.sum(), flush=True); "
        "ctypes.string_at(array.ctypes.data + {offset}, 1)"
    )
    for at_end, offset in ((True, 100), (False, -1)):
        done = subprocess.run(
            [sys.executable, "-c", code.format(at_end=at_end, offset=offset)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=False,
        )
        assert done.stdout == b"16500\n"
        assert done.returncode == -11, done


def test_checked_indexes_are_checked() -> None:
    """The kernel is given an array of one number where it writes two."""
    code = (
        "import numpy as np; from fastload.kernels import tarindex as t; "
        "from tests.formats.archives import header; data = np.frombuffer(header(b'a.x') + header(b'b.x'), np.uint8); "
        "state = np.zeros(t.STATE_SIZE, np.int64); state[[t.PENDING_NAME, t.PENDING_SIZE, t.GLOBAL_NAME]] = -1; "
        "texts = [np.zeros(size, np.uint8) for size in (512, 256, 256, 2000)]; "
        "numbers = [np.zeros(size, np.int64) for size in (10, 1, 10)]; "
        "t.scan(data, 0, len(data), state, *texts, *numbers)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **fuzzing.MODES["bounds"]},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "bounds" in done.stderr.splitlines()[-1]
