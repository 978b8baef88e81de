"""JPEGs of every kind, cut from real photographs, and what torch makes of a part of one."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import simplejpeg
import torch
from PIL import Image

from fastload.decode.view import PictureView
from fastload.demo import photos

CHROMA = ("444", "422", "420", "440", "411", "grey", "cmyk")


@lru_cache
def photographs() -> list[np.ndarray]:
    """Those of the demo: uint8 (height, width, 3)."""
    return photos.photographs()


def random_photo(rng: np.random.Generator, longest: int = 400) -> np.ndarray:
    """A piece of one, of any size and at any place."""
    photo = photographs()[rng.integers(len(photographs()))]
    height, width = (int(rng.integers(1, min(side, longest) + 1)) for side in photo.shape[:2])
    top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
    return np.ascontiguousarray(photo[top : top + height, left : left + width])


def jpeg(pixels: np.ndarray, chroma: str = "420", quality: int = 90, **options: object) -> bytes:
    """`pixels` as a JPEG; `options` are Pillow's."""
    if chroma in ("440", "411") or (chroma in ("444", "422", "420") and not options):
        made: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=chroma)
        return made
    file, picture = io.BytesIO(), Image.fromarray(pixels)
    if chroma in ("grey", "cmyk"):
        picture = picture.convert({"grey": "L", "cmyk": "CMYK"}[chroma])
    else:
        options["subsampling"] = {"444": 0, "422": 1, "420": 2}[chroma]
    picture.save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


def random_jpeg(rng: np.random.Generator, longest: int = 400) -> bytes:
    """A JPEG of any kind."""
    options: dict[str, object] = {}
    if rng.integers(4) == 0:
        options["progressive"] = True
    if rng.integers(4) == 0:
        options["restart_marker_blocks"] = int(rng.integers(1, 20))
    chroma = CHROMA[rng.integers(len(CHROMA))]
    return jpeg(random_photo(rng, longest), chroma, int(rng.integers(30, 98)), **options)


def full_decode(data: bytes) -> np.ndarray:
    """All pixels, RGB."""
    _, _, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    if colorspace in ("CMYK", "YCCK"):
        inks: np.ndarray = simplejpeg.decode_jpeg(data, "CMYK").astype(np.int64)
        rgb: np.ndarray = ((inks[:, :, :3] * inks[:, :, 3:] + 127) // 255).astype(np.uint8)
        return rgb
    found: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    return found


def box_of(view: PictureView) -> tuple[slice, slice]:
    """Rows and columns of the crop that a view stretches over the whole output."""
    return slice(view.rows.low, view.rows.high), slice(view.columns.low, view.columns.high)


def torch_resized(pixels: np.ndarray, height: int, width: int, dtype: torch.dtype) -> np.ndarray:
    """What torchvision's antialiased resize calls: (height, width, 3) of uint8 to (3, height, width) of levels."""
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(dtype)
    found = torch.nn.functional.interpolate(planes, size=(height, width), mode="bilinear", antialias=True)
    return found[0].double().numpy()
