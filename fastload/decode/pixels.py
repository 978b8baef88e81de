"""Image files into RGBX pixels (four bytes each, rows without gaps), in the thread's workspace.

JPEG is decoded by simplejpeg (libjpeg-turbo), straight into the workspace and without the GIL. Everything
else goes through Pillow, which is optional, and only through the named formats: Pillow also opens some that
run other programs.

Sizes are checked from the header, before any pixel is decoded: a picture of a few kilobytes can claim
gigabytes.

libjpeg calls some damage "recoverable" and paints the rest grey. Here that is an error, since a model should
not learn from half a picture, except where no pixel can be wrong (`_HARMLESS`): cameras and web tools write
such files, and other loaders take them.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg

from fastload.decode.workspace import workspace
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.resize import cmyk_to_rgbx

__all__ = ["PILLOW_FORMATS", "SIDE_MAX", "read_rgbx"]

PILLOW_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

SIDE_MAX = 65_535
"""As in JPEG. Tables and sums grow with a side, so that a picture one pixel high could ask for gigabytes."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = b"\xff\xda"
_HARMLESS = ("extraneous bytes before marker", "Invalid SOS parameters", "Unknown Adobe color transform code")


def read_rgbx(value: memoryview, pixels_max: int) -> npt.NDArray[np.uint8]:
    """The picture as (height, 4 * width), valid until the thread's next call. Raises `DecodeError`.

    `pixels_max`: the most pixels (width times height) that are decoded.
    """
    if len(value) == 0:
        raise DecodeError("no bytes: not an image")
    if bytes(value[:3]) == _JPEG_START:
        return _read_jpeg(value, pixels_max)
    return _read_other(value, pixels_max)


def _read_jpeg(value: memoryview, pixels_max: int) -> npt.NDArray[np.uint8]:
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(value, strict=False)
    except KeyError as error:  # simplejpeg looks up the name of a chroma sampling that is not there
        raise _damaged_jpeg(value, "its header is incomplete or names no known chroma sampling") from error
    except ValueError as error:
        raise _damaged_jpeg(value, error) from error
    _check_size(width, height, pixels_max)
    pixels = workspace.pixels(height * width * 4)
    cmyk = colorspace in ("CMYK", "YCCK")
    _decode_jpeg(value, "CMYK" if cmyk else "RGBX", pixels)
    if cmyk:
        cmyk_to_rgbx(pixels)
    return pixels.reshape(height, width * 4)


def _decode_jpeg(value: memoryview, colorspace: str, pixels: npt.NDArray[np.uint8]) -> None:
    try:
        simplejpeg.decode_jpeg(value, colorspace, buffer=pixels)
    except ValueError as error:
        if not _is_harmless(str(error), value):
            raise _damaged_jpeg(value, error) from error
    else:
        return
    try:
        simplejpeg.decode_jpeg(value, colorspace, buffer=pixels, strict=False)
    except ValueError as error:
        raise _damaged_jpeg(value, error) from error


def _damaged_jpeg(value: memoryview, reason: object) -> DecodeError:
    return DecodeError(f"damaged JPEG of {len(value)} bytes: {reason}")


def _is_harmless(message: str, value: memoryview) -> bool:
    """Whether `message` is about a file that still has all its pixels.

    libjpeg reports only its first complaint, so that the end must be looked for here: after the last scan.
    """
    data = bytes(value)
    return any(text in message for text in _HARMLESS) and data.rfind(_JPEG_END) > data.rfind(_START_OF_SCAN)


def _read_other(value: memoryview, pixels_max: int) -> npt.NDArray[np.uint8]:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError(
            f"an image that is not a JPEG (it starts with {bytes(value[:8])!r}) is decoded by Pillow, which "
            "is not installed: pip install pillow"
        ) from error
    try:
        with Image.open(io.BytesIO(value), formats=PILLOW_FORMATS) as picture:
            _check_size(*picture.size, pixels_max)
            picture.load()
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"{error} (PIL.Image.MAX_IMAGE_PIXELS is Pillow's own limit)") from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"not an image of a known format: it starts with {bytes(value[:16])!r}") from error
    except Exception as error:  # Pillow's parsers raise whatever they stumble over, and only they run here
        raise DecodeError(f"damaged image of {len(value)} bytes: {type(error).__name__}: {error}") from error
    return _to_rgbx(picture)


def _to_rgbx(picture: Any) -> npt.NDArray[np.uint8]:
    """A Pillow image's pixels; transparency is dropped, 16 bits become 8."""
    from PIL import Image

    width, height = picture.size
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    elif picture.mode == "P":  # Pillow warns where a palette has transparency and is not asked for it
        picture = picture.convert("RGBA")
    rgb = np.asarray(picture.convert("RGB"))
    pixels = workspace.pixels(height * width * 4).reshape(height, width, 4)
    pixels[:, :, :3] = rgb
    return pixels.reshape(height, width * 4)


def _check_size(width: int, height: int, pixels_max: int) -> None:
    if width < 1 or height < 1:
        raise DecodeError(f"an image of {width} x {height} pixels")
    if width * height > pixels_max:
        raise DecodeError(
            f"an image of {width} x {height} pixels, over the limit of {pixels_max}; "
            "image(..., pixels_max=...) raises it"
        )
    if max(width, height) > SIDE_MAX:
        raise DecodeError(f"an image of {width} x {height} pixels; a side may have {SIDE_MAX} at most")
