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
import xxhash

from tests.decode import pictures

NATIVE = Path(__file__).parents[2] / "native"
FLAGS = [
    "-std=gnu11",
    "-g",
    "-O1",
    "-ffp-contract=off",
    "-DEXACT_ROOMS",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]


def main() -> None:
    """Run, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastload-fuzz-") as name:
        status = run(Path(name), options.seconds, options.seed)
        found = Path(name) / "found.jpg"
        if found.exists():
            kept = Path(__file__).parent / "found" / f"{xxhash.xxh3_64_hexdigest(found.read_bytes())}.jpg"
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(found.read_bytes())
            print(f"kept as {kept}")
    raise SystemExit(status)


def run(place: Path, seconds: int, seed: int) -> int:
    """Build it in `place`, make files to damage, run it; its exit status."""
    program = place / "fuzz"
    sources = [NATIVE / source for source in ("fuzz.c", "jpeg.c", "resize.c", "view.c")]
    subprocess.run([compiler(), *FLAGS, *sources, "-o", program, "-ljpeg", "-lm"], check=True)
    files = [place / f"{number}.jpg" for number in range(len(seeds()))]
    for path, data in zip(files, seeds(), strict=True):
        path.write_bytes(data)
    return subprocess.run([program, str(seconds), str(seed), *files], cwd=place, check=False).returncode


def compiler() -> str:
    """Its name."""
    return os.environ.get("CC", "cc")


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
