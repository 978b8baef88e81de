"""`fastload compile`, and that nothing is compiled where it has been run."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastload import decode
from fastload.cli import app
from fastload.decode import native
from fastload.kernels import (
    FIRST_BATCH,
    OF_DECODERS,
    compile_into,
    declare,
    loading,
    module_names,
    object_names,
    objects,
    warm_up,
)
from tests.decode import pictures
from tests.shards import tar_of

FASTLOAD = Path(sys.executable).parent / "fastload"

FIRST = """
import sys
sys.modules["numba"] = None  # importing it fails
import fastload
from fastload import decode
dataset = fastload.StreamingDataset(
    sys.argv[1],
    cache=fastload.Cache(sys.argv[2], ram_bytes="16MiB", disk_bytes=0, chunk_bytes="64KiB"),
    decode={"jpg": decode.image(32, random_resized_crop=True), "cls": decode.integer(), "x": decode.number()},
)
(batch,) = fastload.DataLoader(dataset, batch_size=8, num_workers=2)
print(batch["jpg"].shape, sorted(batch["cls"].tolist()), batch["x"].sum().item())
"""


def compile_kernels(*options: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "COLUMNS": "200"}
    return subprocess.run([FASTLOAD, "compile", *options], capture_output=True, text=True, check=False, env=environ)


def test_a_first_batch_out_of_a_folder_that_was_filled_before(tmp_path: Path) -> None:
    """As in an image: nothing is compiled, and there is nowhere to keep it."""
    folder = tmp_path / "kernels"
    chosen = ["--decode=image", "--decode=integer", "--decode=number", "--level=here", f"--to={folder}"]
    done = compile_kernels(*chosen)
    assert done.returncode == 0, done.stderr
    modules = {*FIRST_BATCH, *OF_DECODERS["image"], *OF_DECODERS["integer"], *OF_DECODERS["number"]}
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == modules
    assert f"{folder}: {len(modules)} object files compiled, for {loading.level_here()}" in done.stderr
    assert f"Set FASTLOAD_KERNELS={folder} where they are to be used" in done.stderr
    # Others can read it, and only read.
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755

    assert ": 0 object files compiled" in compile_kernels(*chosen).stderr

    jpeg = pictures.jpeg(pictures.photographs()[4][:48, :64], "420")
    shard = {f"{number}": {"jpg": jpeg, "cls": b"%d" % number, "x": b"0.5"} for number in range(8)}
    (tmp_path / "shard.tar").write_bytes(tar_of(shard))
    environ = {
        "FASTLOAD_KERNELS": str(folder),
        "FASTLOAD_NATIVE": "0",
        "HOME": "/nowhere",
        "XDG_CACHE_HOME": "/nowhere",
    }
    done = subprocess.run(
        [sys.executable, "-c", FIRST, tmp_path / "shard.tar", tmp_path / "cache"],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "torch.Size([8, 3, 32, 32]) [0, 1, 2, 3, 4, 5, 6, 7] 4.0"
    assert done.stderr == ""


def test_what_is_compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_KERNELS", str(tmp_path / "kernels"))
    monkeypatch.setattr(objects, "INSTALLED", tmp_path / "compiled")
    level = loading.level_here()
    count = len(object_names(module_names(), level))
    before = CliRunner().invoke(app, ["compile", "--status"])
    assert before.exit_code == 3
    assert f"of {count} modules for {level}, 0 are compiled in {tmp_path / 'compiled'}\n" in before.output
    assert f"the first job compiles {count}, since pip has not installed it" in before.output
    assert "C unit: " in before.output

    compile_into(tmp_path / "compiled", ["parse"], [level])
    compile_into(tmp_path / "kernels", ["copying"], [level])
    after = CliRunner().invoke(app, ["compile", "--status"])
    assert after.exit_code == 3
    assert f"1 are compiled in {tmp_path / 'compiled'}, 1 in {tmp_path / 'kernels'}\n" in after.output
    assert f"the first job compiles {count - 2}, since its source has changed" in after.output
    as_json = CliRunner().invoke(app, ["compile", "--status", "--json"])
    assert as_json.exit_code == 3
    found = json.loads(as_json.output)
    assert (found["level"], found["module_count"], found["missing_count"]) == (level, count, count - 2)
    assert (found["installed_count"], found["kept_count"]) == (1, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--all", "--decode=image"], "--all and --decode=image exclude each other"),
        (["--decode=jpeg"], "--decode=jpeg is none of the decoders with kernels: image, integer, number"),
        (["--level=z80"], f"--level=z80 is none of this machine's: {', '.join(loading.LEVELS)}"),
        (["--json"], "--json is for --status"),
        (["--status", "--level=here"], "--status compiles nothing, and takes no other option"),
        (["--to=/dev/null"], "no kernels can be kept there: "),
    ],
)
def test_what_cannot_be_done_is_said_at_once(options: list[str], says: str) -> None:
    done = compile_kernels(*options)
    assert done.returncode == 1
    assert done.stderr.startswith("fastload: ConfigError: ")
    assert says in done.stderr


def test_a_build_that_lacks_what_compiles_says_so(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['numpy'] = None; sys.argv[1:] = [sys.argv[1], 'here']; "
        "runpy.run_module('fastload.kernels', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("fastload's kernels cannot be compiled: import of numpy halted")
    assert "pip install 'numba>=0.60'" in done.stderr


def test_which_kernels_decoders_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "c_unit", lambda: None)
    decoders = {
        "image": decode.image(8, random_resized_crop=True),
        "integer": decode.integer(),
        "number": decode.number(),
        "array": decode.array(4, "f4"),
        "flat": decode.flat("f4", 4),
        "json": decode.json(),
        "raw": decode.raw(),
        "text": decode.text(),
    }
    assert sorted(decoders) == sorted(set(decode.__all__) - {"Decoder"})
    for name, decoder in decoders.items():
        assert set(decoder.kernel_modules()) <= set(OF_DECODERS.get(name, ()))
    named = {*FIRST_BATCH, *(module for modules in OF_DECODERS.values() for module in modules)}
    assert warm_up(*named) == sum(
        len(unit.kernels) for unit in declare.units(*(f"fastload.kernels.{one}" for one in named))
    )
