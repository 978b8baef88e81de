"""What pip installs, into an environment that has nothing, with the build isolation that pip has by default: compiled
kernels for every level of processor, the C unit, and a first batch without anything being compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fastload.decode import native
from fastload.kernels import loading, module_names, object_names, objects
from tests.decode import pictures
from tests.jobs.launch import ROOT
from tests.kernels.test_compile import FIRST
from tests.shards import tar_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What an editable install leaves in the source, of another version: nothing of it may come into what is built now.
LEFT_OVER = ("fastload/decode/_native.so", "fastload/decode/_native.txt", "fastload/kernels/compiled/gather-0.x86-64.o")
# Kernels that are there are not compiled again; of these two modules there are none.
COMPILED_AGAIN = ("copying", "parse")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What git has of this checkout, and no more."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("only a git checkout says which files belong to it")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "source"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def leave_over(source: Path) -> None:
    """As if another version had been installed from there in editable mode."""
    for name in LEFT_OVER:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"of another version")


def has_been_used(source: Path) -> None:
    """As if this version had been installed in editable mode: of its kernels most have been compiled."""
    (source / "fastload/kernels/compiled").mkdir()
    modules = set(module_names()) - set(COMPILED_AGAIN)
    for name in object_names(modules, loading.level_here()):
        if (objects.INSTALLED / name).exists():
            shutil.copy(objects.INSTALLED / name, source / "fastload/kernels/compiled" / name)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class Environment:
    """An empty virtual environment, where nothing is known of this one."""

    def __init__(self, place: Path) -> None:
        self._home = place.parent
        self._place = place
        venv.create(place, symlinks=True)
        self.python = place / "bin/python"
        self.packages = next(place.glob("lib/python*/site-packages"))
        hidden = ("PYTHON", "FASTLOAD_", "NUMBA_", "VIRTUAL_ENV", "SKBUILD_", "CMAKE_")
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.variables["PIP_NO_COMPILE"] = "1"  # few of the files that builds bring are used

    def pip(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """pip as its user sees it: what a build that succeeds says is not shown."""
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", self.python, *arguments],
            env={**self.variables, **variables},
            cwd=self._home,
            capture_output=True,
            text=True,
            check=False,
        )
        if "scikit-build-core" in done.stderr and "(from versions: none)" in done.stderr:
            pytest.skip("pip reaches no package index, from which it takes what builds need")
        return done

    def install(self, *arguments: str | Path, **variables: str) -> Path:
        """Install fastload by these; returns where it is. Its dependencies are those of the tests' environment."""
        done = self.pip("install", "--no-deps", *arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        (self.packages / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))
        printed = self.run("-c", "import fastload; print(fastload.__file__)")
        return Path(printed.stdout.strip()).parent

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Python in this environment, which compiles into a home of its own if it has to."""
        return subprocess.run(
            [self.python, *arguments],
            env={**self.variables, "HOME": str(self._home), "XDG_CACHE_HOME": "", **variables},
            cwd=self._home,
            capture_output=True,
            text=True,
            check=True,
        )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def has_everything(environment: Environment, fastload: Path, levels: Sequence[str]) -> None:
    """Kernels for these levels, the C unit (where this checkout has it), and a first batch at once."""
    wanted = {name for level in levels for name in object_names(module_names(), level)}
    assert len(wanted) > 10
    assert {path.name for path in (fastload / "kernels/compiled").iterdir()} == wanted
    expected = "_native.txt" if native.c_unit() is None else "_native.so"
    assert [path.name for path in (fastload / "decode").glob("_native*")] == [expected]

    home = environment.packages.parents[3]
    jpeg = pictures.jpeg(pictures.photographs()[4][:48, :64], "420")
    shard = {f"{number}": {"jpg": jpeg, "cls": b"%d" % number, "x": b"0.5"} for number in range(8)}
    (home / "shard.tar").write_bytes(tar_of(shard))
    done = environment.run("-c", FIRST, home / "shard.tar", home / "cache", FASTLOAD_IDLE_S="0")
    assert done.stdout.strip() == "torch.Size([8, 3, 32, 32]) [0, 1, 2, 3, 4, 5, 6, 7] 4.0"
    assert done.stderr == ""
    assert not (home / ".cache/fastload-kernels").exists()
    status = environment.run("-m", "fastload", "compile", "--status")  # which fails where anything is missing
    assert f"{len(wanted) // len(levels)} are compiled in {fastload / 'kernels/compiled'}" in status.stdout


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with what pip builds by, and nothing that compiles kernels."""
    environment = Environment(tmp_path_factory.mktemp("builder") / "environment")
    assert environment.pip("install", "scikit-build-core").returncode == 0
    return environment


def test_pip_install_of_what_is_released_as_source(
    source: Path, builder: Environment, environment: Environment, tmp_path: Path
) -> None:
    """Made in a checkout that was used before, and installed from a folder that was."""
    leave_over(source)
    build = "import sys; from scikit_build_core.build import build_sdist; print(build_sdist(sys.argv[1]))"
    made = subprocess.run([builder.python, "-c", build, tmp_path], cwd=source, capture_output=True, check=True)
    with tarfile.open(tmp_path / made.stdout.decode().splitlines()[-1]) as sdist:
        sdist.extractall(tmp_path / "sdist", filter="data")
    (released,) = (tmp_path / "sdist").iterdir()
    # It is the checkout, so that one is installed as the other is.
    assert files_in(released) == files_in(source) - {*LEFT_OVER} | {"PKG-INFO"}
    leave_over(released)
    before = files_in(released)
    fastload = environment.install(released)
    assert fastload.is_relative_to(environment.packages)
    has_everything(environment, fastload, loading.LEVELS)
    assert files_in(released) == before


def test_an_editable_install(source: Path, builder: Environment, environment: Environment) -> None:
    """For this processor, since that is where it is used. It is built with what the tests have; `make test` makes one
    in pip's isolation.
    """
    has_been_used(source)
    (environment.packages / "builder.pth").write_text(f"{builder.packages}\n{Path(np.__file__).parents[1]}")
    fastload = environment.install("--no-build-isolation", "--editable", source)
    assert fastload == source / "fastload"
    has_everything(environment, fastload, [loading.level_here()])


def test_without_a_c_compiler_the_kernels_are_compiled_all_the_same(source: Path, tmp_path: Path) -> None:
    """An installation says afterwards what it lacks, since pip shows nothing of a build that succeeds."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake beside pip's own")
    has_been_used(source)
    leave_over(source)
    configure = [cmake, "-S", source / "native", "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, env={**os.environ, "CC": "/nonexistent"}, capture_output=True, check=True)
    subprocess.run([cmake, "--build", tmp_path / "build"], capture_output=True, check=True)
    assert [path.name for path in (source / "fastload/decode").glob("_native*")] == ["_native.txt"]
    assert (source / "fastload/decode/_native.txt").read_text() == "there was no working C compiler"
    compiled = {path.name for path in (source / "fastload/kernels/compiled").iterdir()}
    assert compiled >= set(object_names(module_names(), loading.level_here()))


def test_without_what_compiles_kernels_nothing_is_installed(source: Path, builder: Environment) -> None:
    done = builder.pip("install", "--no-deps", "--no-build-isolation", source)
    assert done.returncode != 0
    assert "fastload's kernels cannot be compiled: No module named 'numpy'" in done.stderr + done.stdout
    assert "pip install 'numba>=0.60'" in done.stderr + done.stdout
