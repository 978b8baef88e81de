"""Image files into RGBX pixels (four bytes each, rows without gaps), in the thread's workspace.

JPEG is decoded by simplejpeg (libjpeg-turbo), straight into the workspace and without the GIL. Everything
else goes through Pillow, which is optional, and only through the named formats: Pillow also opens some that
run other programs.

Sizes are checked from the header, before any pixel is decoded: a picture of a few kilobytes can claim
gigabytes.

This is how JPEGs are decoded where there is no C unit (`fastload.decode.native`), and how all others always are.

libjpeg calls some damage "recoverable" and paints the rest grey. Here that is an error, since a model should
not learn from half a picture, except where no pixel can be wrong (`_HARMLESS`): cameras and web tools write
such files, and other loaders take them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from fastload.decode.view import PictureView
from fastload.decode.workspace import workspace
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.resize import cmyk_to_rgbx

__all__ = ["PILLOW_FORMATS", "SIDE_MAX", "check_size", "damaged_jpeg", "is_jpeg", "read_jpeg", "read_other"]

PILLOW_FORMATS = ("PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")

SIDE_MAX = 65_535
"""As in JPEG. Tables and sums grow with a side, so that a picture one pixel high could ask for gigabytes."""

_JPEG_START = b"\xff\xd8\xff"
_JPEG_END = b"\xff\xd9"
_START_OF_SCAN = b"\xff\xda"
_SCANS_MAX = 500
"""Progressive files repeat the whole picture scan by scan; more than this many is an attack on the processor."""
_ORIENTATION_TAG = 0x112
_HARMLESS = ("extraneous bytes before marker", "Invalid SOS parameters", "Unknown Adobe color transform code")


def is_jpeg(value: memoryview) -> bool:
    """Whether it begins as one."""
    return bytes(value[:3]) == _JPEG_START


def read_jpeg(
    value: memoryview, pixels_max: int, choose: Callable[[int, int, int], PictureView], *, turn: bool
) -> tuple[npt.NDArray[np.uint8], PictureView]:
    """The picture as (height, 4 * width), valid until the thread's next call, and what `choose` said of it. Raises
    `DecodeError`.

    `pixels_max`: the most pixels (width times height) that are decoded. `choose` gets width, height and, where
    `turn`, the EXIF orientation.
    """
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(value, strict=False)
    except KeyError as error:  # simplejpeg looks up the name of a chroma sampling that is not there
        raise damaged_jpeg(value, "its header is incomplete or names no known chroma sampling") from error
    except ValueError as error:
        raise damaged_jpeg(value, error) from error
    check_size(width, height, pixels_max)
    if _scan_count(value) > _SCANS_MAX:
        raise damaged_jpeg(value, f"more than {_SCANS_MAX} scans")
    view = choose(width, height, jpeg_orientation(value) if turn else 1)
    height, width = -(-height // view.denominator), -(-width // view.denominator)
    pixels = workspace.pixels(height * width * 4)
    cmyk = colorspace in ("CMYK", "YCCK")
    # The smallest size that is not below this, which is this one; whole where none is asked for.
    size = {"min_height": height, "min_width": width} if view.denominator > 1 else {}
    shape = _decode_jpeg(value, "CMYK" if cmyk else "RGBX", pixels, size)
    assert shape == (height, width, 4), f"simplejpeg made {shape} where {height, width, 4} was asked for"
    if cmyk:
        cmyk_to_rgbx(pixels)
    return pixels.reshape(height, width * 4), view


def _decode_jpeg(
    value: memoryview, colorspace: str, pixels: npt.NDArray[np.uint8], size: dict[str, int]
) -> tuple[int, ...]:
    """Fill `pixels`; returns the shape."""
    try:
        found = simplejpeg.decode_jpeg(value, colorspace, buffer=pixels, **size)
    except ValueError as error:
        if not _is_harmless(str(error), value):
            raise damaged_jpeg(value, error) from error
        try:
            found = simplejpeg.decode_jpeg(value, colorspace, buffer=pixels, strict=False, **size)
        except ValueError as fatal:
            raise damaged_jpeg(value, fatal) from fatal
    shape: tuple[int, ...] = found.shape
    return shape


def _scan_count(value: memoryview) -> int:
    data = np.frombuffer(value, np.uint8)
    return int(np.count_nonzero((data[1:] == _START_OF_SCAN[1]) & (data[:-1] == _START_OF_SCAN[0])))


def damaged_jpeg(value: memoryview, reason: object) -> DecodeError:
    """What to raise for a JPEG that cannot be decoded."""
    return DecodeError(f"damaged JPEG of {len(value)} bytes: {reason}")


def _is_harmless(message: str, value: memoryview) -> bool:
    """Whether `message` is about a file that still has all its pixels.

    libjpeg reports only its first complaint, so that the end must be looked for here: after the last scan.
    """
    data = bytes(value)
    return any(text in message for text in _HARMLESS) and data.rfind(_JPEG_END) > data.rfind(_START_OF_SCAN)


def jpeg_orientation(value: memoryview) -> int:
    """EXIF orientation, 1 to 8; 1 (as it lies in the file) where the file says nothing that can be understood.

    The twin of `orientation_of` in `native/jpeg.c`.
    """
    at = 2
    while at + 4 <= len(value) and value[at] == 0xFF and value[at + 1] not in (0xD9, 0xDA):
        length = int.from_bytes(value[at + 2 : at + 4], "big")
        if length < 2 or length > len(value) - at - 2:
            return 1
        body = bytes(value[at + 4 : at + 2 + length])
        if value[at + 1] == 0xE1 and len(body) >= 14 and body[:6] == b"Exif\0\0":
            return _tiff_orientation(body[6:])
        at += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order: Literal["big", "little"] = "big" if tiff[:1] == b"M" else "little"

    def number(at: int, size: int) -> int:  # 0 where there is none
        return int.from_bytes(tiff[at : at + size], order) if at + size <= len(tiff) else 0

    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == _ORIENTATION_TAG:
            value = number(entry + 8, 2)
            return value if number(entry + 2, 2) == 3 and 1 <= value <= 8 else 1
    return 1


def read_other(
    value: memoryview, pixels_max: int, *, turn: bool, alpha: bool = False
) -> tuple[npt.NDArray[np.uint8], int]:
    """The picture as `read_jpeg` gives it, and its EXIF orientation (1 unless `turn`); with `alpha` the fourth byte of
    a pixel says how opaque it is. Raises `DecodeError`, and `ConfigError` where Pillow is missing.
    """
    if len(value) == 0:
        raise DecodeError("no bytes: not an image")
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ConfigError(
            f"an image that is not a JPEG (it starts with {bytes(value[:8])!r}) is decoded by Pillow, which "
            "is not installed: pip install pillow"
        ) from error
    try:
        with Image.open(io.BytesIO(value), formats=PILLOW_FORMATS) as picture:
            check_size(*picture.size, pixels_max)
            picture.load()
            found = picture.getexif().get(_ORIENTATION_TAG) if turn else None
            orientation = found if isinstance(found, int) and 1 <= found <= 8 else 1
    except DecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"{error} (PIL.Image.MAX_IMAGE_PIXELS is Pillow's own limit)") from error
    except UnidentifiedImageError as error:
        raise DecodeError(f"not an image of a known format: it starts with {bytes(value[:16])!r}") from error
    except Exception as error:  # Pillow's parsers raise all kinds of errors, and only they run here
        raise DecodeError(f"damaged image of {len(value)} bytes: {type(error).__name__}: {error}") from error
    return _to_rgbx(picture, alpha), orientation


def _to_rgbx(picture: Any, alpha: bool) -> npt.NDArray[np.uint8]:
    """A Pillow image's pixels; transparency is dropped unless `alpha`, 16 bits become 8."""
    from PIL import Image

    width, height = picture.size
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    elif picture.mode == "P":  # Pillow warns where a palette has transparency and is not asked for it
        picture = picture.convert("RGBA")
    found = np.asarray(picture.convert("RGBA" if alpha else "RGB"))
    pixels = workspace.pixels(height * width * 4).reshape(height, width, 4)
    pixels[:, :, : found.shape[2]] = found
    return pixels.reshape(height, width * 4)


def check_size(width: int, height: int, pixels_max: int) -> None:
    """Raise `DecodeError` for a picture that is too large."""
    if width < 1 or height < 1:
        raise DecodeError(f"an image of {width} x {height} pixels")
    if width * height > pixels_max:
        raise DecodeError(
            f"an image of {width} x {height} pixels, over the limit of {pixels_max}; "
            "image(..., pixels_max=...) raises it"
        )
    if max(width, height) > SIDE_MAX:
        raise DecodeError(f"an image of {width} x {height} pixels; a side may have {SIDE_MAX} at most")
