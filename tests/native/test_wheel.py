"""What `make wheel` has made, installed into a bare venv on a PATH without a compiler: it decodes with a libjpeg of its
own, and has its kernels compiled.
"""

from __future__ import annotations

import os
import subprocess
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fastload.decode import image
from fastload.kernels import loading, module_names
from tests.decode import pictures

WHEEL = Path(os.environ.get("FASTLOAD_WHEEL", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHEEL.suffix != ".whl", reason="`make wheel` makes the wheel, names it, and runs this"),
]

PROGRAM = """
import sys
import numpy as np
import fastload
sys.modules["numba"] = None  # importing it fails
from fastload.kernels import FIRST_BATCH, OF_DECODERS, warm_up
assert warm_up(*FIRST_BATCH, "mixing", *(name for names in OF_DECODERS.values() for name in names)) > 10
from fastload.decode import image, native
assert fastload.__file__.startswith(sys.prefix), fastload.__file__
assert native.c_unit() is not None
data = open(sys.argv[1], "rb").read()
made = image(64, random_resized_crop=True, hflip=0.5).decode_one(data, "here", 5)
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libjpeg" in line}
assert len([path for path in libraries if path.startswith(sys.prefix)]) == 1, libraries
np.save(sys.argv[2], made)
"""


def test_it_is_for_every_python_on_any_linux_of_some_age() -> None:
    python, abi, platforms = WHEEL.stem.split("-")[2:]
    assert (python, abi) == ("py3", "none")
    assert all(platform.startswith("manylinux") for platform in platforms.split("."))
    with zipfile.ZipFile(WHEEL) as archive:
        names = archive.namelist()
    assert [name for name in names if name.startswith("fastload.libs/libjpeg")]
    assert "fastload/decode/_native.so" in names
    for module in module_names():
        kernels = [name for name in names if name.startswith(f"fastload/kernels/compiled/{module}-")]
        levels = sorted(name.split(".", 1)[1] for name in kernels)
        assert levels == (sorted(f"{level}.o" for level in loading.LEVELS) if kernels else []), kernels


def test_an_image_runs_through_it_where_there_is_no_compiler(tmp_path: Path) -> None:
    place = tmp_path / "bare"
    venv.create(place, with_pip=True, symlinks=True)
    nowhere = {"PATH": "/nowhere", "HOME": str(tmp_path)}
    python = place / "bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", WHEEL.resolve()], env=nowhere, check=True
    )
    # Its dependencies are those of this environment, behind its own packages; editable installs there do not count.
    (here,) = place.glob("lib/python*/site-packages")
    (here / "dependencies.pth").write_text(str(Path(np.__file__).parents[1]))
    picture, made = tmp_path / "picture.jpg", tmp_path / "made.npy"
    picture.write_bytes(pictures.jpeg(pictures.photographs()[4][:120, :160], "420"))
    subprocess.run([python, "-c", PROGRAM, picture, made], env=nowhere, cwd=tmp_path, check=True)

    expected = image(64, random_resized_crop=True, hflip=0.5).decode_one(picture.read_bytes(), "here", 5)
    np.testing.assert_array_equal(np.load(made), expected)
