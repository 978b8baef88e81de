"""Kernels compiled the plain way, by numba itself: when that is done, and that kernels do the same."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite
import numba
import numpy as np
import pytest
from typer.testing import CliRunner

from fastload.cli import app
from fastload.kernels import compile_into, jit, numba_jit, objects
from tests.kernels.example import SOURCE, run

BESIDE = Path(__file__).parent
# Tests that call kernels, and know nothing of how they were compiled. Each file takes numba some ten seconds.
OF_KERNELS = ["copying", "interleave", "rows", "yielding"]
if "FASTLOAD_THOROUGH" in os.environ:
    OF_KERNELS += ["gather", "grouping", "mixing", "permute", "tarindex"]


def test_the_versions_that_the_compiler_was_tried_with() -> None:
    """Both ends of each range: the oldest that pip may install, and the newest. A later one is added here, and there,
    once these tests pass with it.
    """
    assert jit.TRIED == {"numba": ((0, 60), (0, 68)), "llvmlite": ((0, 43), (0, 50)), "numpy": ((1, 26), (2, 4))}
    assert jit.why_plain() is None, "these tests run with versions that were tried"


@pytest.mark.parametrize(
    ("package", "version", "is_plain"),
    [
        (numba, "0.59.1", True),
        (numba, "0.60.0", False),
        (numba, "0.68.9", False),
        (numba, "0.69.0dev0+1", True),
        (numba, "1.0", True),
        (llvmlite, "0.42.0", True),
        (llvmlite, "0.51.0rc1", True),
        (np, "1.25.2", True),
        (np, "1.26.0", False),
        (np, "2.5.0", True),
        (np, "3.0", True),
        (np, "of my own", True),
    ],
)
def test_other_versions_have_kernels_compiled_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, package: object, version: str, is_plain: bool
) -> None:
    monkeypatch.setattr(package, "__version__", version)
    assert (jit.why_plain() is not None) == is_plain
    # What was compiled before needs no numba.
    assert (jit.why_plain("llvmlite", "numpy") is not None) == (is_plain and package is not numba)


UNTRIED = SOURCE.replace("import numpy as np\n", "import numba, numpy as np\nnumba.__version__ = '9.0'\n")


def test_a_version_that_was_not_tried_is_used_the_plain_way_and_says_so(tmp_path: Path) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    output, log = run(source, cache, UNTRIED)
    assert output == "7 8 compiled"
    assert "since numba 9.0 is not among the versions that fastload's compiler was tried with" in log
    (kept,) = cache.iterdir()
    assert list(kept.rglob("example.first-*.nbi"))
    assert not list(cache.glob("*.o"))
    assert run(source, cache, UNTRIED) == ("7 8 compiled", "")


def test_nothing_is_kept_where_others_can_write(tmp_path: Path) -> None:
    """What numba keeps is code, as object files are."""
    source, cache = tmp_path / "source", tmp_path / "cache"
    run(source, cache, FASTLOAD_PLAIN_NUMBA="1")
    (kept,) = cache.iterdir()
    kept.chmod(0o777)
    written = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    output, log = run(source, cache, FASTLOAD_PLAIN_NUMBA="1")
    assert output == "7 8 compiled"
    assert f"others can write {kept}" in log
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == written


# The first write of numba's fails, as on a full disk: no file may grow. Or the first read of its index does.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
UNREADABLE = """
import errno, numba.core.caching
def fails(self):
    raise OSError(errno.EIO, "Input/output error", "the index")
numba.core.caching.IndexDataCacheFile._load_index = fails
"""


@pytest.mark.parametrize(
    ("fault", "why"), [(FULL, "numba-.*: File too large"), (UNREADABLE, "the index: Input/output error")]
)
def test_a_folder_that_fails_only_costs_the_keeping(tmp_path: Path, fault: str, why: str) -> None:
    source, cache = tmp_path / "source", tmp_path / "cache"
    output, log = run(source, cache, fault + SOURCE, FASTLOAD_PLAIN_NUMBA="1")
    assert output == "7 8 compiled"
    (said,) = [line for line in log.splitlines() if "cannot be kept" in line]
    assert re.search(f"compiled in every process anew, since they cannot be kept: .*{why}; set FASTLOAD_KERNELS", said)
    assert "Traceback" not in log
    assert not list(cache.rglob("*.nbi"))
    assert run(source, cache, FASTLOAD_PLAIN_NUMBA="1")[0] == "7 8 compiled"
    assert list(cache.rglob("*.nbi")), "a later process, in which nothing fails, keeps them"


def test_a_folder_that_cannot_be_listed_keeps_nothing_and_ends_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, pattern: str) -> list[Path]:
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setenv(objects.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "rglob", fails)
    assert not numba_jit.is_kept("fastload.kernels.crc")
    assert list((tmp_path / "cache").iterdir()), "it asked for the folder"


def test_nothing_is_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jit.PLAIN, "1")
    monkeypatch.setenv(objects.VARIABLE, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="cannot be compiled ahead: FASTLOAD_PLAIN_NUMBA is set"):
        compile_into(tmp_path / "kernels", ["parse"])
    command = [sys.executable, "-m", "fastload.kernels", tmp_path / "kernels", "here"]  # as pip does
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "FASTLOAD_PLAIN_NUMBA is set" in done.stderr
    assert list((tmp_path / "kernels").iterdir()) == []
    code = "import sys; from fastload.kernels import is_compiled; print(is_compiled('crc'), 'numba' in sys.modules)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout == "False False\n"


def test_the_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jit.PLAIN, "1")
    status = CliRunner().invoke(app, ["compile", "--status"])
    assert status.exit_code == 3
    assert (
        "numba compiles them in each user's first job, and keeps them, since FASTLOAD_PLAIN_NUMBA is" in status.output
    )
    assert "C unit: " in status.output


def test_kernels_compiled_the_plain_way_do_the_same() -> None:
    """The tests of kernels once more, in a process that compiles them so. They are kept in the user's folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    files = [str(BESIDE / f"test_{name}.py") for name in OF_KERNELS]
    environ = {**os.environ, jit.PLAIN: "1"}
    done = subprocess.run([*command, *files], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
