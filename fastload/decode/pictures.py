"""Images: decoded, made RGB, cropped, resized, mirrored, normalised, and written into their place in the batch.

Every value of the batch is written once. With the C unit, one call without the GIL does all of it for all JPEGs of a
group, and decodes of each only the rows and columns that are wanted. Without it, and for what is no JPEG, a picture is
decoded whole into the thread's workspace and one kernel (the C unit's, or numba's) does the rest. All ways give the
same values, to the bit, where the decoders do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fastload.decode import native
from fastload.decode.base import Bytes, Decoder, Fixed, Keys, Offsets, Where, each, located
from fastload.decode.pixels import check_size, damaged_jpeg, is_jpeg, read_jpeg, read_other
from fastload.decode.view import Cropping, PictureView, choose_view
from fastload.decode.workspace import workspace
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.resize import resize_rgbx

__all__ = ["PIXELS_MAX", "SIZE_MAX", "Image", "image"]

PIXELS_MAX = 89_478_485
"""What Pillow, too, takes for the largest picture that is not an attack: 256 MiB of RGB."""
SIZE_MAX = 16_384
"""Of the output; the shorter side before a centre crop may be four times that."""

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""A random resized crop's area, as a part of the picture's, and its width to its height: as everybody has them."""
_RATIO_MAX = 1000

Dtype: TypeAlias = Literal["float32", "uint8", "float16"]
Layout: TypeAlias = Literal["NCHW", "NHWC"]
Range: TypeAlias = tuple[float, float]
Channels: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Image(Decoder):
    """See `image`, which checks what is given here. `mean` and `std` are of levels between 0 and 1."""

    cropping: Cropping
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)
    dtype: Dtype = "float32"
    layout: Layout = "NCHW"
    exif_orientation: bool = False
    pixels_max: int = PIXELS_MAX
    default: Channels | None = None

    def missing(self) -> npt.NDArray[Any] | None:
        if self.default is None:
            return None
        shape, dtype = self.fixed()
        filled = np.empty(shape, dtype)
        filled[...] = np.reshape(self.default, (3, 1, 1) if self.layout == "NCHW" else (1, 1, 3))
        return filled

    def fixed(self) -> Fixed:
        size = self.cropping.size
        return (3, size, size) if self.layout == "NCHW" else (size, size, 3), np.dtype(self.dtype)

    def wants_keys(self) -> bool:
        return self.cropping.is_random

    def kernel_modules(self) -> tuple[str, ...]:
        return () if native.c_unit() is not None else ("resize",)

    def _decode(self, value: memoryview) -> npt.NDArray[Any]:
        return self.decode_one(value, "")

    def decode_one(self, value: Bytes, where: str, key: int | None = None) -> npt.NDArray[Any]:
        out = np.empty((1, *self.fixed()[0]), self.dtype)
        keys = None if key is None else np.array([key], np.uint64)
        offsets = np.array([0, len(value)])
        self.decode_into(np.frombuffer(value, np.uint8), offsets, out, lambda _: where, keys)
        one: npt.NDArray[Any] = out[0]
        return one

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        assert (out.shape[1:], out.dtype) == self.fixed(), (out.shape, out.dtype)
        if keys is None and self.wants_keys():
            raise ConfigError(
                "an image decoder with random crops or flips needs a key for each sample; "
                "fastload.decode.base.sample_keys makes them"
            )
        context = workspace.context()
        if context is not None:
            self._decode_by_unit(context, values, offsets, out, where, keys)
        else:
            each(values, offsets, where, lambda i, value: self._decode_by_kernel(value, _key(keys, i), out[i]))

    def _decode_by_unit(
        self,
        context: native.Context,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None,
    ) -> None:
        settings, report = _settings(self), native.DecodeReport()
        i = -1
        while (i := context.decode(settings, values, offsets, keys, i + 1, out, report)) < len(out):
            value = values.data[offsets[i] : offsets[i + 1]]
            try:
                if report.code != native.NOT_JPEG:
                    raise self._failure(value, report)
                pixels, orientation = read_other(value, self.pixels_max, turn=self.exif_orientation)
            except (DecodeError, ConfigError) as error:
                raise located(error, where(i)) from error.__cause__
            context.resize(settings, _key(keys, i), pixels, orientation, out[i])

    def _failure(self, value: memoryview, report: native.DecodeReport) -> Exception:
        if report.code == native.REFUSED:
            check_size(report.width, report.height, self.pixels_max)
        if report.code == native.NO_MEMORY:
            return MemoryError(f"no memory to decode a JPEG of {report.width} x {report.height} pixels")
        assert report.code == native.DAMAGED, f"code {report.code} for {report.width} x {report.height} pixels"
        return damaged_jpeg(value, report.message.decode("ascii", "replace"))

    def _decode_by_kernel(self, value: memoryview, key: int, out: npt.NDArray[Any]) -> None:
        wanted, turn = self.cropping, self.exif_orientation
        if is_jpeg(value):
            source, view = read_jpeg(value, self.pixels_max, lambda *about: choose_view(wanted, key, *about), turn=turn)
        else:
            source, orientation = read_other(value, self.pixels_max, turn=turn)
            view = choose_view(wanted, key, source.shape[1] // 4, source.shape[0], orientation, whole=True)
        self._resize(source, view, out)

    def _resize(self, source: npt.NDArray[np.uint8], view: PictureView, out: npt.NDArray[Any]) -> None:
        rows, columns = workspace.rows, workspace.columns
        rows.make(view.rows, self.cropping.size)
        columns.make(view.columns, self.cropping.size)
        column_sums, planes = workspace.planes(self.cropping.size)
        is_in_place = self.dtype == "float32" and self.layout == "NCHW" and not view.is_transposed
        if is_in_place:
            planes = out
        resize_rgbx(
            source,
            rows.first,
            rows.count,
            rows.weights,
            rows.bits,
            columns.first,
            columns.count,
            columns.weights,
            columns.bits,
            *_factor_and_offset(self),
            *workspace.row(source.shape[1]),
            column_sums,
            planes,
        )
        if not is_in_place:
            turned = planes.transpose(0, 2, 1) if view.is_transposed else planes
            np.copyto(out, turned if self.layout == "NCHW" else turned.transpose(1, 2, 0), casting="unsafe")


def _key(keys: Keys | None, number: int) -> int:
    return 0 if keys is None else int(keys[number])


@lru_cache(maxsize=64)
def _factor_and_offset(of: Image) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What a level is multiplied with, and what is then added. Bytes are cut off, so that adding a half rounds them."""
    if of.dtype == "uint8":
        return np.ones(3, np.float32), np.full(3, 0.5, np.float32)
    std = np.array(of.std)
    return (1 / (255 * std)).astype(np.float32), (-np.array(of.mean) / std).astype(np.float32)


@lru_cache(maxsize=64)
def _settings(of: Image) -> native.Settings:
    wanted = of.cropping
    factor, offset = _factor_and_offset(of)
    area = wanted.random_crop[0] if wanted.random_crop is not None else AREA
    return native.Settings(
        *area,
        *wanted.log_ratio,
        wanted.flip,
        of.pixels_max,
        tuple(factor.tolist()),
        tuple(offset.tolist()),
        1 if wanted.random_crop is not None else 2 if wanted.resize is not None else 0,
        wanted.size,
        wanted.resize or 0,
        get_args(Dtype).index(of.dtype),
        get_args(Layout).index(of.layout),
        of.exif_orientation,
        wanted.dct_scaling,
    )


def image(
    size: int | None = None,
    *,
    random_resized_crop: bool | tuple[Range, Range] = False,
    resize: int | None = None,
    center_crop: int | None = None,
    hflip: float = 0.0,
    mean: Channels | None = None,
    std: Channels | None = None,
    dtype: Dtype = "float32",
    layout: Layout = "NCHW",
    dct_scaling: bool = False,
    exif_orientation: bool = False,
    pixels_max: int = PIXELS_MAX,
    default: float | Channels | None = None,
) -> Decoder:
    """An image as RGB of `size` x `size` pixels, resized with antialias: float32 in [0, 1], (3, size, size).

    By default the whole picture is used and its aspect is not kept. For training, `random_resized_crop=True` takes of
    each picture a crop of 0.08 to 1 of its area and a shape of 3/4 to 4/3 (`((0.2, 1), (3/4, 4/3))` are others), and
    `hflip=0.5` mirrors every other one. For evaluation, `image(resize=256, center_crop=224)` takes the middle of the
    picture whose shorter side was made 256. Random choices follow from the data set's seed, the epoch and the sample.

    `mean` and `std` normalise: `(level / 255 - mean) / std`, for red, green and blue. `dtype`: "float32", "float16", or
    "uint8" (levels, without `mean` and `std`). `layout`: "NCHW" or "NHWC". `dct_scaling` lets libjpeg shrink a JPEG by
    2, 4 or 8 while it decodes it, where it has to shrink by more than that anyway: twice as fast for large pictures,
    and not the same pixels as decoding and then resizing gives. `exif_orientation` turns pictures as their EXIF says.

    `default` stands for the picture of samples that lack an optional column: a number, or three for red, green and
    blue, as they are in the output; with `mean` and `std`, 0 is the mean.

    Grey becomes RGB, transparency is dropped. JPEG is decoded by libjpeg-turbo; PNG, WebP, GIF, BMP, TIFF, PPM and
    JPEG 2000 by Pillow, where it is installed (`ConfigError` where not). Damage, even where libjpeg would paint over
    it, and pictures of more than `pixels_max` pixels are a `DecodeError`; damage below or after what is wanted of a
    JPEG is not always looked for.
    """
    size, resize = _sizes(size, resize, center_crop)
    crop = _random_crop(random_resized_crop)
    if crop is not None and resize is not None:
        raise ConfigError("random_resized_crop and resize exclude each other: train with one, evaluate with the other")
    if not _is_number(hflip) or not 0 <= hflip <= 1:
        raise ConfigError(f"hflip={hflip!r} is not a probability between 0 and 1")
    _check_choice("dtype", dtype, get_args(Dtype))
    _check_choice("layout", layout, get_args(Layout))
    if dtype == "uint8" and (mean is not None or std is not None):
        raise ConfigError('mean and std give numbers that dtype="uint8" cannot hold; use "float32" or "float16"')
    if not _is_count(pixels_max):
        raise ConfigError(f"pixels_max={pixels_max!r} is not a number of pixels")
    return Image(
        Cropping(size, crop, resize, float(hflip), bool(dct_scaling)),
        _channels("mean", mean, 0.0),
        _channels("std", std, 1.0),
        dtype,
        layout,
        bool(exif_orientation),
        pixels_max,
        None if default is None else _default(default, dtype),
    )


def _default(default: float | Channels, dtype: Dtype) -> Channels:
    found = _channels("default", (default,) * 3 if _is_number(default) else default, 0.0)  # type: ignore[arg-type]
    if dtype == "uint8" and not all(level in range(256) for level in found):
        raise ConfigError(f'default={default!r} is none of the levels of dtype="uint8", 0 to 255')
    return found


def _sizes(size: int | None, resize: int | None, center_crop: int | None) -> tuple[int, int | None]:
    """The output's size, and the shorter side before a centre crop; checked."""
    if size is None and center_crop is None and resize is None:
        raise ConfigError(
            "size=None: give the number of pixels, as in image(224) or image(resize=256, center_crop=224)"
        )
    if center_crop is None and resize is None:
        return _checked("size", size, SIZE_MAX), None
    if center_crop is None or resize is None:
        raise ConfigError(
            f"resize={resize!r}, center_crop={center_crop!r}: give both, as in image(resize=256, center_crop=224), "
            "or size alone, for the whole picture"
        )
    crop, shorter = _checked("center_crop", center_crop, SIZE_MAX), _checked("resize", resize, 4 * SIZE_MAX)
    if size not in (None, crop):
        raise ConfigError(f"size={size!r} and center_crop={crop} are the same thing; leave size out")
    if crop > shorter:
        raise ConfigError(f"center_crop={crop} is larger than resize={shorter}, the shorter side of the picture")
    return crop, shorter


def _checked(name: str, value: object, limit: int) -> int:
    if not _is_count(value) or value > limit:  # type: ignore[operator]
        raise ConfigError(f"{name}={value!r} is not a number of pixels between 1 and {limit}")
    return value  # type: ignore[return-value]


def _random_crop(given: bool | tuple[Range, Range]) -> tuple[Range, Range] | None:
    if given is False:
        return None
    if given is True:
        return AREA, RATIO
    try:
        (area_min, area_max), (ratio_min, ratio_max) = given
        area, ratio = (float(area_min), float(area_max)), (float(ratio_min), float(ratio_max))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"random_resized_crop={given!r} is neither True nor a pair of ranges, as in ((0.08, 1), (3/4, 4/3))"
        ) from error
    if not 0 < area[0] <= area[1] <= 1:
        raise ConfigError(f"random_resized_crop: areas {area} are not parts of a picture's, above 0 and up to 1")
    if not 1 / _RATIO_MAX <= ratio[0] <= ratio[1] <= _RATIO_MAX:
        raise ConfigError(f"random_resized_crop: shapes {ratio}, width to height, are not within {_RATIO_MAX} to 1")
    return area, ratio


def _channels(name: str, given: Channels | None, default: float) -> Channels:
    if given is None:
        return default, default, default
    try:
        red, green, blue = (float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={given!r} is not three numbers, for red, green and blue") from error
    if not all(math.isfinite(value) for value in (red, green, blue)):
        raise ConfigError(f"{name}={given!r} is not three finite numbers")
    if name == "std" and min(red, green, blue) <= 0:
        raise ConfigError(f"std={given!r}: a standard deviation is above 0")
    if name in ("mean", "std") and max(red, green, blue) > 1:
        raise ConfigError(
            f"{name}={given!r}: that is of levels from 0 to 255, and here they are from 0 to 1; divide it by 255"
        )
    return red, green, blue


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is none of {', '.join(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
