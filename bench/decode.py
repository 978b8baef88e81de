"""Images: fastload's decoders beside torchvision's, on one core and two, and whether they agree.

    python -m bench.decode                      # three minutes
    python -m bench.decode --photos FOLDER      # with JPEGs of yours, as they are, in place of the bundled ones
    python -m bench.decode --check 10000        # compare that many random crops with torchvision's, time nothing

Each system makes the same training input of the same files: a random resized crop, antialiased, to 224 x 224, mirrored
every other time, normalised to float32, in its place in a batch. Systems take turns within a round, so that what else
the machine does falls on all; the figures are medians over rounds. CPU-seconds are those of the process.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastload import decode
from fastload.decode import native
from fastload.decode.base import Decoder, sample_keys
from fastload.demo import photos

SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SEED = 4
SMALL, LARGE = (375, 500), (1500, 2000)
SMALL_BYTES = (65_000, 90_000)
QUALITIES = (90, 92, 93, 94, 95, 96, 97)

Pixels = npt.NDArray[np.uint8]
Work = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Took:
    """Milliseconds an image."""

    wall_ms: float
    cpu_ms: float


def main() -> None:
    """Time, or check, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEGs, taken as they are")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=200, help="of the smaller size, a run; an eighth of the larger")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="compare N random crops instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        check(options.check)
        return
    print(f"C unit: {'there' if native.c_unit() is not None else 'not built'}; load before: {os.getloadavg()[0]:.1f}")
    for title, files in file_sets(options.photos, options.images):
        mean_bytes = statistics.mean(map(len, files))
        print(f"\n{title}: {len(files)} files, {mean_bytes / 1000:.0f} kB on average\n")
        report(measure(files, options.rounds))


def file_sets(folder: Path | None, count: int) -> Iterator[tuple[str, list[bytes]]]:
    """What is decoded, with a title."""
    if folder is not None:
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
        assert paths, f"{folder} holds no .jpg or .jpeg"
        yield str(folder), [path.read_bytes() for path in paths[:count]]
        return
    for quality in QUALITIES:
        files = crops(SMALL, quality, count)
        if SMALL_BYTES[0] <= statistics.mean(map(len, files)) <= SMALL_BYTES[1]:
            yield f"500 x 375, quality {quality}", files
            break
    yield "2000 x 1500, quality 90", crops(LARGE, 90, max(1, count // 8))


def crops(shape: tuple[int, int], quality: int, count: int) -> list[bytes]:
    """Pieces of the bundled photographs as JPEGs (4:2:0) of this shape; enlarged where the photograph is smaller."""
    from PIL import Image

    rng, made = np.random.default_rng(SEED), []
    pictures = photos.photographs()
    for number in range(count):
        picture = pictures[number % len(pictures)]
        scale = max(1.0, shape[0] / picture.shape[0], shape[1] / picture.shape[1])
        height, width = int(shape[0] / scale), int(shape[1] / scale)
        top, left = rng.integers(picture.shape[0] - height + 1), rng.integers(picture.shape[1] - width + 1)
        piece = Image.fromarray(picture[top : top + height, left : left + width])
        file = io.BytesIO()
        piece.resize(shape[::-1], Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality, subsampling=2)
        made.append(file.getvalue())
    return made


@contextmanager
def without_unit() -> Iterator[None]:
    """As an installation without a compiler works."""
    os.environ["FASTLOAD_NATIVE"] = "0"
    native.c_unit.cache_clear()
    try:
        yield
    finally:
        del os.environ["FASTLOAD_NATIVE"]
        native.c_unit.cache_clear()


def fastload_work(files: list[bytes], decoder: Decoder, threads: int = 1) -> Work:
    """Decodes all files into one batch, in as many parts as there are threads."""
    values = np.frombuffer(b"".join(files), np.uint8)
    offsets = np.cumsum([0, *map(len, files)]).astype(np.int64)
    keys = sample_keys(SEED, 0, np.zeros(len(files), np.int64), np.arange(len(files)))
    fixed = decoder.fixed()
    assert fixed is not None
    out = np.zeros((len(files), *fixed[0]), fixed[1])

    def part(begin: int, end: int) -> None:
        decoder.decode_into(values, offsets[begin : end + 1].copy(), out[begin:end], str, keys[begin:end].copy())

    return in_parts(part, len(files), threads)


def torchvision_work(files: list[bytes], threads: int = 1) -> Work:
    """The same by torchvision: its decoder, and its transforms (version 2) on uint8, as its documentation advises."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    out = torch.zeros((len(files), 3, SIZE, SIZE))

    def part(begin: int, end: int) -> None:
        for number in range(begin, end):
            out[number] = transform(decode_jpeg(tensors[number], mode=ImageReadMode.RGB))

    return in_parts(part, len(files), threads)


def sha256_work(count: int, threads: int) -> Work:
    """What needs nothing but a core, to see how many of them this machine had to spare; half a millisecond an image."""
    block = bytes(1 << 20)

    def part(begin: int, end: int) -> None:
        for _ in range(begin, end):
            hashlib.sha256(block).digest()

    return in_parts(part, count, threads)


def in_parts(part: Callable[[int, int], None], count: int, threads: int) -> Work:
    """`part(begin, end)` over all, by threads that live as long as the result, since a loader's do."""
    if threads == 1:
        return lambda: part(0, count)
    bounds = [count * number // threads for number in range(threads + 1)]
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)

    def work(number: int) -> None:
        while True:
            begin.wait()
            part(bounds[number], bounds[number + 1])
            end.wait()

    for number in range(threads):
        threading.Thread(target=work, args=(number,), daemon=True).start()

    def run() -> None:
        begin.wait()
        end.wait()

    return run


def measure(files: list[bytes], rounds: int) -> dict[str, list[Took]]:
    """All systems in turn, `rounds` times, after one that does not count."""
    training = {"random_resized_crop": True, "hflip": 0.5, "mean": MEAN, "std": STD}
    plain, scaled = decode.image(SIZE, **training), decode.image(SIZE, dct_scaling=True, **training)  # type: ignore[arg-type]
    works: dict[str, tuple[Work, bool]] = {
        "torchvision": (torchvision_work(files), True),
        "fastload without the C unit": (fastload_work(files, plain), False),
        "fastload without the C unit, dct_scaling": (fastload_work(files, scaled), False),
    }
    if native.c_unit() is not None:
        works |= {
            "fastload": (fastload_work(files, plain), True),
            "fastload, dct_scaling": (fastload_work(files, scaled), True),
            "fastload, two threads": (fastload_work(files, plain, 2), True),
            "torchvision, two threads": (torchvision_work(files, 2), True),
            "sha256": (sha256_work(len(files), 1), True),
            "sha256, two threads": (sha256_work(len(files), 2), True),
        }
    took: dict[str, list[Took]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, (work, with_unit) in works.items():
            if with_unit:
                one = timed(work, len(files))
            else:
                with without_unit():
                    one = timed(work, len(files))
            if number > 0:
                took[name].append(one)
    return took


def timed(work: Work, count: int) -> Took:
    """One run."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Took((time.perf_counter() - wall) / count * 1e3, (time.process_time() - cpu) / count * 1e3)


def report(took: dict[str, list[Took]]) -> None:
    """A table; ratios are medians over rounds of the ratio within a round."""
    print(f"{'':42} {'img/s':>8} {'CPU ms':>8} {'torchvision / it, CPU':>22} {'wall':>6}")
    for name, runs in took.items():
        if name.startswith("sha256"):
            continue
        peer = took["torchvision, two threads" if "two threads" in name else "torchvision"]
        print(
            f"{name:42} {1000 / middle([run.wall_ms for run in runs]):8.0f} {middle([run.cpu_ms for run in runs]):8.3f}"
            f" {ratio(peer, runs, 'cpu_ms'):22.2f} {ratio(peer, runs, 'wall_ms'):6.2f}"
        )
    if "fastload, two threads" in took:
        gains = [ratio(took[name], took[f"{name}, two threads"], "wall_ms") for name in ("fastload", "sha256")]
        print(f"two threads, of one: {gains[0]:.2f}; of sha256, which needs a core and nothing else: {gains[1]:.2f}")


def ratio(above: Sequence[Took], below: Sequence[Took], what: str) -> float:
    """How many times `below` goes into `above`."""
    return middle([getattr(one, what) / getattr(other, what) for one, other in zip(above, below, strict=True)])


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def check(count: int) -> None:
    """Compare `count` random crops of JPEGs of every kind with torchvision's of the same crop of a full decode."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import v2

    from fastload.decode.pictures import Image
    from fastload.decode.view import choose_view
    from tests.decode.pictures import box_of, random_jpeg

    rng = np.random.default_rng(SEED)
    keys = sample_keys(SEED, 1, np.zeros(count, np.int64), np.arange(count))
    worst = {"float32, of its uint8": 0.0, "float32, of its float32": 0.0, "uint8, of its uint8": 0.0}
    kinds: dict[str, int] = {}
    for key in keys.tolist():
        data, size = random_jpeg(rng), int(rng.integers(1, 225))
        floats, levels = (decode.image(size, random_resized_crop=True, dtype=dtype) for dtype in ("float32", "uint8"))
        full = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        assert isinstance(floats, Image)
        rows, columns = box_of(choose_view(floats.cropping, key, full.shape[2], full.shape[1]))
        box = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start

        def resized(picture: torch.Tensor, box: Any = box, size: int = size) -> npt.NDArray[np.float64]:
            found = v2.functional.resized_crop(picture, *box, size=[size, size], antialias=True)
            return np.asarray(found.double().numpy())

        of_bytes, of_floats = resized(full), resized(full.float())
        found = floats.decode_one(data, "a crop", key) * 255.0
        for name, one, other in (
            ("float32, of its uint8", found, of_bytes),
            ("float32, of its float32", found, of_floats),
            ("uint8, of its uint8", levels.decode_one(data, "a crop", key).astype(float), of_bytes),
        ):
            worst[name] = max(worst[name], float(np.abs(one - other).max()))
        kinds["crops"] = kinds.get("crops", 0) + 1
    print(f"{kinds['crops']} crops; the largest difference, in levels of 255:")
    for name, value in worst.items():
        print(f"  {name:28} {value:.4f}")


if __name__ == "__main__":
    main()
