"""A data set of real photographs, made from what scikit-image and scikit-learn ship: nothing is downloaded.

Sixteen of their pictures are photographs that hold a crop of 500 x 375. A sample is a crop at a random place, mirrored
every other time, as JPEG; its label is the number of the photograph. Crops of one photograph overlap, so a small
network learns them within an epoch or two. Everything follows from the seed: the same versions of the libraries give
the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.config import cpu_count
from fastload.errors import ConfigError

WIDTH, HEIGHT = 500, 375
_BLOCK = 256  # samples that are encoded ahead of the writer, so that memory does not grow with the data set

_SKIMAGE = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "coffee.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
_SKLEARN = ("china.jpg", "flower.jpg")
LABEL_COUNT = len(_SKIMAGE) + len(_SKLEARN)

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Crop:
    """One sample before it is encoded: photograph `label` from (`top`, `left`), mirrored or not."""

    label: int
    top: int
    left: int
    mirrored: bool


def photographs() -> list[Pixels]:
    """The photographs, each uint8 (height, width, 3), in the order of their labels.

    ConfigError where the packages that hold them are not installed.
    """
    paths = [_folder("skimage", "data") / name for name in _SKIMAGE]
    paths += [_folder("sklearn", "datasets", "images") / name for name in _SKLEARN]
    return [_read_rgb(path) for path in paths]


def random_crops(photos: list[Pixels], count: int, rng: np.random.Generator) -> list[Crop]:
    """`count` crops, of each photograph about as many."""
    crops = []
    for label in rng.integers(len(photos), size=count):
        height, width = photos[label].shape[:2]
        top, left = rng.integers(height - HEIGHT + 1), rng.integers(width - WIDTH + 1)
        crops.append(Crop(int(label), int(top), int(left), bool(rng.integers(2))))
    return crops


def encode(photos: list[Pixels], crop: Crop, quality: int) -> bytes:
    """The JPEG of `crop`. Lets go of the GIL while it encodes."""
    import simplejpeg

    pixels = photos[crop.label][crop.top : crop.top + HEIGHT, crop.left : crop.left + WIDTH]
    if crop.mirrored:
        pixels = pixels[:, ::-1]
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return jpeg


def samples(photos: list[Pixels], crops: list[Crop], quality: int, first_key: int = 0) -> Iterator[dict[str, Any]]:
    """The samples of `crops` as webdataset writes them, keys counting from `first_key`; encoded in threads."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        for begin in range(0, len(crops), _BLOCK):
            block = crops[begin : begin + _BLOCK]
            jpegs = pool.map(lambda crop: encode(photos, crop, quality), block)
            for number, (crop, jpeg) in enumerate(zip(block, jpegs, strict=True), start=first_key + begin):
                yield {"__key__": f"{number:06d}", "jpg": jpeg, "cls": str(crop.label).encode()}


def write_shards(
    directory: Path, *, count: int = 5000, shards: int = 16, seed: int = 0, quality: int = 83
) -> list[Path]:
    """Write `count` samples as WebDataset shards `photos-000000.tar` ... into `directory`; the shards' paths in order.

    5000 samples of this quality are about 200 MB; a few seconds.
    """
    import webdataset

    directory.mkdir(parents=True, exist_ok=True)
    photos = photographs()
    crops = random_crops(photos, count, np.random.default_rng(seed))
    pattern = str(directory / "photos-%06d.tar")
    per_shard = -(-count // shards)
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0, mtime=0) as writer:
        for sample in samples(photos, crops, quality):
            writer.write(sample)
    return sorted(directory.glob("photos-*.tar"))


def _folder(package: str, *inside: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the photographs are those that {package} ships; pip install 'fastload[demo]'")
    return Path(spec.origin).parent.joinpath(*inside)


def _read_rgb(path: Path) -> Pixels:
    from skimage.io import imread

    pixels = np.asarray(imread(path), dtype=np.uint8)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return np.ascontiguousarray(pixels[:, :, :3])
