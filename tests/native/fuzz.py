"""`make fuzz`: damaged JPEGs through the C unit in a build with the sanitizers of gcc or clang.

What it finds goes to tests/native/found, and is from then on part of `make test`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tests.decode import pictures

NATIVE = Path(__file__).parents[2] / "native"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def main() -> None:
    """Build, make files to damage, run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastload-fuzz-") as name:
        place = Path(name)
        program = place / "fuzz"
        sources = [NATIVE / source for source in ("fuzz.c", "jpeg.c", "resize.c", "view.c")]
        compiler = os.environ.get("CC", "cc")
        subprocess.run(
            [
                compiler,
                "-std=gnu11",
                "-g",
                "-O1",
                *SANITIZERS,
                "-ffp-contract=off",
                *sources,
                "-o",
                program,
                "-ljpeg",
                "-lm",
            ],
            check=True,
        )
        files = [place / f"{number}.jpg" for number in range(len(seeds()))]
        for path, data in zip(files, seeds(), strict=True):
            path.write_bytes(data)
        done = subprocess.run([program, str(options.seconds), str(options.seed), *files], cwd=place, check=False)
        found = place / "found.jpg"
        if found.exists():
            kept = Path(__file__).parent / "found" / f"{abs(hash(found.read_bytes())) % 10**8}.jpg"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(found.read_bytes())
            print(f"kept as {kept}")
        raise SystemExit(done.returncode)


def seeds() -> list[bytes]:
    """Small files of every kind."""
    rng = np.random.default_rng(0)
    options: list[dict[str, object]] = [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}]
    made = [
        pictures.jpeg(pictures.random_photo(rng, 120), chroma, 70, **each)
        for chroma in pictures.CHROMA
        for each in options
    ]
    from tests.decode.test_training_images import with_orientation

    return made + [with_orientation(pictures.random_photo(rng, 60), turn) for turn in range(1, 9)]


if __name__ == "__main__":
    main()
