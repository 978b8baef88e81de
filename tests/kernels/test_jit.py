"""How kernels are compiled and kept."""

from __future__ import annotations

import logging
import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from fastload.kernels import compile_in_background, warm_up
from fastload.kernels.copying import copy_bytes
from fastload.kernels.gather import gather_pieces

# A kernel that calls another, in a folder of its own.
SOURCE = """
import sys, logging
logging.basicConfig(level=logging.WARNING, format="%(message)s")
import numpy as np
from numba import int64, uint8
from fastload.kernels.jit import array_in, kernel

@kernel()
def add(a, b):
    return a + b

@kernel(int64(array_in(uint8), int64))
def first(data, more):
    return add(data[0], more) + SOMETHING

data = np.ones(4, np.uint8)
frozen = data.view()
frozen.flags.writeable = False
assert not first.overloads
print(first(data, 1), first(frozen, np.int32(2)), len(first.signatures), sum(first.stats.cache_hits.values()))
"""


def run(folder: Path, cache: Path, something: int = 0, **environ: str) -> tuple[str, str]:
    """Output and log of a fresh process that compiles or loads the kernel."""
    folder.mkdir(exist_ok=True)
    (folder / "example.py").write_text(SOURCE.replace("SOMETHING", str(something)))
    done = subprocess.run(
        [sys.executable, str(folder / "example.py")],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr.strip()


def test_one_signature_kept_on_disk_for_this_user(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    assert run(source, cache) == ("2 3 1 0", "")
    assert run(source, cache) == ("2 3 1 1", "")
    for folder in (cache / "fastload-kernels").rglob("*"):
        if folder.is_dir() and any(folder.glob("*.nbi")):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    # Any change beside the kernel makes what was kept stale, and only there.
    (source / "other.py").write_text("# called by the kernel, for all that is known")
    assert run(source, cache) == ("2 3 1 0", "")
    assert run(source, cache, something=5) == ("7 8 1 0", "")
    assert run(source, cache, something=5) == ("7 8 1 1", "")


def test_what_cannot_be_kept_is_compiled_and_said_once(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    output, log = run(tmp_path / "source", tmp_path / "cache")
    assert output == "2 3 1 0"
    assert log.count("compiled kernels are not kept") == 1
    assert "NUMBA_CACHE_DIR" in log


def test_a_folder_open_to_others_is_not_unpickled(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    run(source, cache)
    (folder,) = {path.parent for path in cache.rglob("*.nbi")}
    folder.chmod(0o770)
    output, log = run(source, cache)
    assert output == "2 3 1 0"
    assert "can be written by, another user" in log


def test_a_damaged_entry_is_compiled_again(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    run(source, cache)
    for path in cache.rglob("*.nbc"):
        path.write_bytes(path.read_bytes()[:100])
    output, log = run(source, cache)
    assert output == "2 3 1 0"
    assert "compiled afresh" in log
    assert run(source, cache) == ("2 3 1 1", "")


def test_kernels_stay_plain_functions_where_numba_is_off(tmp_path: Path) -> None:
    code = "from fastload.kernels.gather import gather_pieces as g; print(type(g).__name__)"
    environ = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "function"


def test_arguments_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="No matching definition"):
        copy_bytes(np.zeros(8, np.uint8)[::2], np.zeros(8, np.uint8))
    frozen = np.zeros(8, np.uint8)
    frozen.flags.writeable = False
    with pytest.raises(TypeError, match="No matching definition"):
        copy_bytes(frozen, frozen)


def test_threads_may_call_first(tmp_path: Path) -> None:
    """Several threads meet an uncompiled kernel, which is compiled once."""
    from numba import int64

    from fastload.kernels.jit import kernel

    @kernel(int64(int64))
    def double(value: int) -> int:
        return 2 * value

    found: list[int] = []
    threads = [threading.Thread(target=lambda n=n: found.append(double(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 2, 4, 6]
    assert len(double.signatures) == 1  # type: ignore[attr-defined]


def test_compiling_in_the_background() -> None:
    compilation = compile_in_background("gather", "tarindex", "grouping")
    compilation.join()
    compilation.join()
    assert compilation.done
    assert gather_pieces.overloads  # type: ignore[attr-defined]
    assert warm_up("gather") >= 2


def test_what_goes_wrong_in_the_background_is_raised() -> None:
    compilation = compile_in_background("nothing_of_that_name")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        compilation.join()


def test_a_fork_waits_for_the_compiler(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    compilation = compile_in_background("gather", "tarindex", "grouping")
    child = multiprocessing.get_context("fork").Process(target=_compiles)
    child.start()
    assert compilation.done
    child.join(60)
    assert child.exitcode == 0
    child.close()
    compilation.join()


def _compiles() -> None:
    warm_up("gather", "tarindex", "grouping")
