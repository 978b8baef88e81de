"""How kernels are called, compiled and loaded."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastload.kernels import compile_in_background, declare, jit, loading, warm_up
from fastload.kernels.copying import copy_bytes
from fastload.kernels.gather import fill_buckets, gather_pieces
from fastload.kernels.resize import fill_table
from fastload.kernels.shuffling import BIJECTION_ROUNDS, biject
from tests.kernels.example import SOURCE, run
from tests.patience import PATIENCE_S

READ_ONLY = np.arange(4)
READ_ONLY.flags.writeable = False


class Subclass(np.ndarray):
    """An array that may mean something else by its elements."""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((READ_ONLY, 1), "takes 3 arguments"),
        ((READ_ONLY, 1, np.zeros(2, np.int32), 2), "takes 3 arguments"),
        ((None, 1, np.zeros(2, np.int32)), r"argument 0 has to be a C-contiguous array\(int64, 1d\); it is a NoneType"),
        (([1, 2], 1, np.zeros(2, np.int32)), "argument 0 .* it is a list"),
        ((READ_ONLY.view(Subclass), 1, np.zeros(2, np.int32)), "argument 0 .* int64 Subclass"),
        ((np.arange(4.0), 1, np.zeros(2, np.int32)), "argument 0 .* float64 ndarray"),
        ((READ_ONLY.astype(">i8"), 1, np.zeros(2, np.int32)), "argument 0 .* >i8"),
        ((np.zeros((2, 2), np.int64), 1, np.zeros(2, np.int32)), r"argument 0 .* shape \(2, 2\)"),
        ((np.zeros(33, np.uint8)[1:].view(np.int64), 1, np.zeros(2, np.int32)), "argument 0"),
        ((READ_ONLY, 1, np.zeros(4, np.int32)[::2]), r"argument 2 has to be .* strides \(8,\)"),
        ((READ_ONLY, 1, READ_ONLY.view(np.int32)), "argument 2 has to be a C-contiguous writable .* read-only"),
        ((READ_ONLY, 1.0, np.zeros(2, np.int32)), "'float' object cannot be interpreted as an integer"),
        ((READ_ONLY, "1", np.zeros(2, np.int32)), "'str' object cannot be interpreted as an integer"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments: tuple[Any, ...], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        fill_buckets(*arguments)


def test_numbers_are_taken_whole_or_not_at_all() -> None:
    buckets = np.zeros(3, np.int32)
    fill_buckets(READ_ONLY, np.int32(1), buckets)
    assert buckets.tolist() == [1, 3, 4]
    for number in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(OverflowError, match="too big"):
            fill_buckets(READ_ONLY, number, buckets)
    table = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 4))
    assert fill_table(-1.0, 1, 0, 1, False, *table) > 0  # -1, which is also what Python says where it fails
    with pytest.raises(TypeError, match="must be real number"):
        fill_table("0", 1.0, 0, 1, False, *table)


def test_calls_keep_no_argument() -> None:
    array = np.arange(4)
    counts = sys.getrefcount(array), sys.getrefcount(None)
    for _ in range(1000):
        fill_buckets(array, 1, np.zeros(3, np.int32))
        with pytest.raises(TypeError):
            fill_buckets(array, 1, array)
    assert sys.getrefcount(array) == counts[0]
    assert abs(sys.getrefcount(None) - counts[1]) < 500


def test_helpers_are_for_kernels() -> None:
    with pytest.raises(TypeError, match="copy_bytes is a helper"):
        copy_bytes(np.zeros(8, np.uint8), np.zeros(8, np.uint8))


def test_compiled_once_and_loaded_without_numba(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    output, log = run(source, cache)
    assert output == "7 8 compiled"
    assert log.startswith("fastload compiles its kernels now")
    assert run(source, cache) == ("7 8 loaded", "")
    # What does not belong to the kernel does not matter; its source, and constants of other modules, do.
    (source / "other.py").write_text("# nothing to do with it")
    assert run(source, cache) == ("7 8 loaded", "")
    (source / "constants.py").write_text("MORE = 6")
    assert run(source, cache)[0] == "8 9 compiled"
    assert run(source, cache, SOURCE.replace("+ MORE", "+ MORE + 1"))[0] == "9 10 compiled"


def test_what_runs_out_of_an_array_is_found_where_that_is_asked_for(tmp_path: Path) -> None:
    out_of_bounds = SOURCE.replace("data[0]", "data[4]")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(tmp_path / "source", tmp_path / "cache", out_of_bounds, NUMBA_BOUNDSCHECK="1")
    assert "RuntimeError: first failed: an index out of bounds" in caught.value.stderr


def test_code_for_every_level_gives_the_same() -> None:
    """Also that this process runs what is meant for older processors."""
    from fastload.kernels import compiler

    keys = np.arange(BIJECTION_ROUNDS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    wanted = np.empty(1000, np.int64)
    biject(keys, 10**9, np.arange(1000), wanted)
    levels = loading.LEVELS[loading.LEVELS.index(loading.level_here()) :]
    (unit,) = declare.units("fastload.kernels.shuffling")
    number = [each.function.__name__ for each in unit.kernels].index("biject")
    assert len({jit.object_name(unit, level) for level in levels}) == len(levels)
    for code in compiler.compile_unit(unit, levels).values():
        (address,) = loading.load(code, [unit.kernels[number].symbol])
        of_level = loading.builtin("biject", address, (np.ndarray, unit.kernels[number].refuse))
        found = np.empty(1000, np.int64)
        assert of_level(keys, 10**9, np.arange(1000), found) == -1
        np.testing.assert_array_equal(found, wanted)


FAR_APART = """
import mmap
from fastload.kernels import module_names, warm_up
# Memory as it is beside a large arena: above it there is room for a page here and there, and for more only below.
pages = [mmap.mmap(-1, mmap.PAGESIZE) for _ in range(1000)]
arena = mmap.mmap(-1, 5 << 30, mmap.MAP_PRIVATE, mmap.PROT_READ)  # which takes no memory, nor the promise of any
for page in pages[::2]:
    page.close()
print(warm_up(*module_names()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given out from the top down")
def test_code_and_constants_are_near_each_other_wherever_there_is_room() -> None:
    done = subprocess.run([sys.executable, "-c", FAR_APART], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 20


def test_kernels_may_not_need_numba() -> None:
    from fastload.kernels import compiler

    @declare.kernel(declare.int64(declare.int64))
    def allocates(count: int) -> int:
        return int(np.zeros(count, np.int64).sum())

    (unit,) = declare.units(__name__)
    with pytest.raises(Exception, match="zeros"):
        compiler.compile_unit(unit, [loading.level_here()])
    declare._entries.pop(__name__)


def test_kernels_stay_plain_functions_where_numba_is_off(tmp_path: Path) -> None:
    assert run(tmp_path / "source", tmp_path / "cache", NUMBA_DISABLE_JIT="1") == ("7 8 loaded", "")
    code = "from fastload.kernels.gather import gather_pieces as g; print(type(g).__name__)"
    environ = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "function"


def test_threads_may_call_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads meet a kernel that nobody has loaded, which is loaded once."""
    loads: list[str] = []
    bind = jit._bind
    monkeypatch.setattr(jit, "_bind", lambda unit, code: (loads.append(unit.module), bind(unit, code))[1])
    monkeypatch.setattr(fill_buckets, "_run", fill_buckets._run_first)  # type: ignore[attr-defined]
    found = [np.zeros(3, np.int32) for _ in range(4)]
    threads = [threading.Thread(target=fill_buckets, args=(READ_ONLY, 1, each)) for each in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each.tolist() for each in found] == [[1, 3, 4]] * 4
    assert loads == ["fastload.kernels.gather"]


def test_compiling_in_the_background() -> None:
    compilation = compile_in_background("gather", "tarindex", "grouping")
    compilation.join()
    assert gather_pieces.is_ready  # type: ignore[attr-defined]
    assert warm_up("gather") >= 2


PROGRESS = """
import sys
from pathlib import Path
from fastload.kernels import jit, objects, warm_up
jit._PROGRESS_S, objects.INSTALLED = 0, Path(sys.argv[1])
warm_up("copying", "parse")
warm_up("yielding", "interleave")
"""


def test_a_process_that_compiles_says_so_and_how_far_it_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRESS, tmp_path / "compiled"]
    environ = {**os.environ, "FASTLOAD_KERNELS": "/dev/null"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    first, *others = [line for line in done.stderr.splitlines() if "cannot be kept" not in line]
    assert first == (
        "fastload compiles its kernels now, some ten seconds in all, since pip has not installed it "
        f"({tmp_path / 'compiled'} has none). `fastload compile` does that before a job starts; pip does it for all "
        "users where it installs fastload"
    )
    said = [line.partition(", after")[0] for line in others]
    assert said == [
        "1 of 2 modules of kernels are ready",
        "2 of 2 modules of kernels are ready",
        "1 of 1 modules of kernels are ready",
    ]


def test_a_failure_in_the_background_is_logged_and_a_call_still_raises_what_it_meets(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(unit: declare.Unit) -> bool:
        raise MemoryError("no room for machine code")

    monkeypatch.setattr(jit, "_load", load)
    monkeypatch.setattr(fill_buckets, "_run", fill_buckets._run_first)  # type: ignore[attr-defined]
    compile_in_background("gather", "parse").join()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        record.getMessage() == "kernels of gather, parse could not be loaded ahead; the first call of one tries again"
    )
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "no room for machine code"
    with pytest.raises(MemoryError, match="no room for machine code"):
        fill_buckets(READ_ONLY, 1, np.zeros(3, np.int32))
    monkeypatch.undo()
    fill_buckets(READ_ONLY, 1, found := np.zeros(3, np.int32))
    assert found.tolist() == [1, 3, 4]


def test_a_fork_waits_until_nothing_is_half_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    is_inside, may_end = threading.Event(), threading.Event()

    def load(unit: declare.Unit) -> bool:
        is_inside.set()
        may_end.wait(PATIENCE_S)
        return False

    monkeypatch.setattr(jit, "_load", load)
    monkeypatch.setattr(fill_buckets, "_run", fill_buckets._run_first)  # type: ignore[attr-defined]
    compilation = compile_in_background("gather")
    is_inside.wait(PATIENCE_S)
    child = multiprocessing.get_context("fork").Process(target=_compiles)
    forking = threading.Thread(target=child.start)
    forking.start()
    forking.join(0.2)
    assert forking.is_alive()
    may_end.set()
    forking.join()
    child.join(PATIENCE_S)
    assert child.exitcode == 0
    child.close()
    compilation.join()


def _compiles() -> None:
    with jit._lock:
        assert warm_up("gather", "tarindex", "grouping") >= 4
