"""Images: decoded, made RGB, resized, and written as floats into their place in the batch.

An image is decoded whole into the thread's workspace and resized from there by one kernel, which also scales
to [0, 1] and changes the layout, so that every value of the batch is written once. What else can be asked of
a picture (crops, flips, normalisation) are further fields of `Image`, and arguments of that one kernel call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Offsets, Where, each
from fastload.decode.pixels import read_rgbx
from fastload.decode.workspace import workspace
from fastload.errors import ConfigError
from fastload.kernels.resize import resize_rgbx

__all__ = ["PIXELS_MAX", "SIZE_MAX", "Image", "image"]

PIXELS_MAX = 89_478_485
"""What Pillow, too, takes for the largest picture that is not an attack: 256 MiB of RGB."""
SIZE_MAX = 16_384


@dataclass(frozen=True, slots=True)
class Image(Decoder):
    """See `image`."""

    size: int
    pixels_max: int = PIXELS_MAX

    def __post_init__(self) -> None:
        if not _is_count(self.size) or self.size > SIZE_MAX:
            raise ConfigError(f"size={self.size!r} is not a number of pixels between 1 and {SIZE_MAX}")
        if not _is_count(self.pixels_max):
            raise ConfigError(f"pixels_max={self.pixels_max!r} is not a number of pixels")

    def fixed(self) -> Fixed:
        return (3, self.size, self.size), np.dtype(np.float32)

    def _decode(self, value: memoryview) -> npt.NDArray[np.float32]:
        out = np.empty((3, self.size, self.size), np.float32)
        self._write(value, out)
        return out

    def decode_into(self, values: npt.NDArray[np.uint8], offsets: Offsets, out: npt.NDArray[Any], where: Where) -> None:
        assert (out.shape[1:], out.dtype) == self.fixed(), (out.shape, out.dtype)
        each(values, offsets, where, lambda number, value: self._write(value, out[number]))

    def _write(self, value: memoryview, out: npt.NDArray[np.float32]) -> None:
        source = read_rgbx(value, self.pixels_max)
        rows, columns = workspace.rows, workspace.columns
        rows.make(source.shape[0], self.size, 1 / 255)
        columns.make(source.shape[1] // 4, self.size, 1.0)
        resize_rgbx(
            source,
            rows.first,
            rows.count,
            rows.weights,
            columns.first,
            columns.count,
            columns.weights,
            workspace.sums(source.shape[1]),
            out,
        )

    def kernel_modules(self) -> tuple[str, ...]:
        return ("resize",)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def image(size: int, *, pixels_max: int = PIXELS_MAX) -> Decoder:
    """An image as RGB, resized to `size` x `size` with antialias: float32 in [0, 1], (3, size, size).

    The whole picture is used and its aspect is not kept. Grey becomes RGB, transparency is dropped, a turned
    camera (EXIF) is not turned back. JPEG is decoded by libjpeg-turbo; PNG, WebP, GIF, BMP, TIFF, PPM and
    JPEG 2000 by Pillow, where it is installed (`ConfigError` where not). Damage, even where libjpeg would
    paint over it, and pictures of more than `pixels_max` pixels are a `DecodeError`.
    """
    return Image(size, pixels_max)
