"""Images: decoded, made RGB, cropped, resized, mirrored, normalised, and written into their place in the batch.

Every value of the batch is written once. With the C unit, one call without the GIL does all of it for all JPEGs of a
group, and decodes of each only the rows and columns that are wanted. Without it, and for what is no JPEG, a picture is
decoded whole into the thread's workspace and one kernel (the C unit's, or numba's) does the rest. All ways give the
same values, to the bit, where the decoders do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from fastload.decode import native
from fastload.decode.base import Bytes, Decoder, Fixed, Keys, Offsets, Where, each, located
from fastload.decode.pixels import check_size, damaged_jpeg, is_jpeg, read_jpeg, read_other
from fastload.decode.view import Cropping, PictureView, choose_view, is_flipped
from fastload.decode.workspace import workspace
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.resize import resize_rgbx

__all__ = ["PIXELS_MAX", "SIZE_MAX", "Image", "WholeImage", "image"]

PIXELS_MAX = 89_478_485
"""What Pillow, too, takes for the largest picture that is not an attack: 256 MiB of RGB."""
SIZE_MAX = 16_384
"""Of the output; the shorter side before a centre crop may be four times that."""

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
"""A random resized crop's area, as a part of the picture's, and its width to its height: as everybody has them."""
_RATIO_MAX = 1000

Colors: TypeAlias = Literal["RGB", "grey", "RGBA"]
Dtype: TypeAlias = Literal["float32", "uint8", "float16"]
Layout: TypeAlias = Literal["NCHW", "NHWC"]
Range: TypeAlias = tuple[float, float]
Channels: TypeAlias = tuple[float, ...]

_COUNTS: dict[Colors, int] = {"RGB": 3, "grey": 1, "RGBA": 4}
# How much of red, green and blue is grey, of 65,536: ITU-R BT.601, rounded as Pillow has it.
_GREY = np.array([19595, 38470, 7471], np.uint32)


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
    colors: Colors = "RGB"

    def missing(self) -> npt.NDArray[Any] | None:
        if self.default is None:
            return None
        shape, dtype = self.fixed()
        filled = np.empty(shape, dtype)
        filled[...] = np.reshape(self.default, (-1, 1, 1) if self.layout == "NCHW" else (1, 1, -1))
        return filled

    def fixed(self) -> Fixed:
        (height, width), count = self.cropping.output, _COUNTS[self.colors]
        return (count, height, width) if self.layout == "NCHW" else (height, width, count), np.dtype(self.dtype)

    def wants_keys(self) -> bool:
        return self.cropping.is_random

    def kernel_modules(self) -> tuple[str, ...]:
        return () if self._suits_unit and native.c_unit() is not None else ("resize",)

    @property
    def _suits_unit(self) -> bool:
        """The C unit makes squares of three colors."""
        return self.colors == "RGB" and isinstance(self.cropping.size, int)

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
        context = workspace.context() if self._suits_unit else None
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
        source, view = _read(self, value, partial(choose_view, self.cropping, key))
        self.fill(source, view, out)

    def fill(self, source: npt.NDArray[np.uint8], view: PictureView, out: npt.NDArray[Any]) -> None:
        """What is seen of pixels as `_read` gives them, into `out` of the decoder's shape. Changes them."""
        factor, offset = _factor_and_offset(self)
        if self.layout == "NHWC":
            out = out.transpose(2, 0, 1)
        self._resize(source, view, factor[:3], offset[:3], out[:3])
        if self.colors == "RGBA":
            pixels = source.reshape(len(source), -1, 4)
            pixels[:, :, 0] = pixels[:, :, 3]
            self._resize(source, view, np.repeat(factor[3], 3), np.repeat(offset[3], 3), out[3:])

    def _resize(
        self,
        source: npt.NDArray[np.uint8],
        view: PictureView,
        factor: npt.NDArray[np.float32],
        offset: npt.NDArray[np.float32],
        out: npt.NDArray[Any],
    ) -> None:
        """Into `out` (1 or 3, height, width), of whatever strides; into one plane only red."""
        rows, columns = workspace.rows, workspace.columns
        height, width = self.cropping.output
        size = (width, height) if view.is_transposed else (height, width)
        rows.make(view.rows, size[0])
        columns.make(view.columns, size[1])
        column_sums, planes = workspace.planes(*size)
        is_in_place = out.dtype == np.float32 and len(out) == 3 and out.flags.c_contiguous and not view.is_transposed
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
            factor,
            offset,
            *workspace.row(source.shape[1]),
            column_sums,
            planes,
        )
        if not is_in_place:
            turned = planes.transpose(0, 2, 1) if view.is_transposed else planes
            np.copyto(out, turned[: len(out)], casting="unsafe")


@dataclass(frozen=True, slots=True)
class WholeImage(Decoder):
    """Pictures in sizes of their own; see `image`. `like` says the rest; `shorter`: the side that all have, or None."""

    like: Image
    shorter: int | None = None

    def _decode(self, value: memoryview) -> npt.NDArray[Any]:
        return self._picture(value, 0)

    def wants_keys(self) -> bool:
        return self.like.wants_keys()

    def kernel_modules(self) -> tuple[str, ...]:
        return ("resize",)

    def decode_one(self, value: Bytes, where: str, key: int | None = None) -> npt.NDArray[Any]:
        try:
            return self._picture(memoryview(value), key or 0)
        except (DecodeError, ConfigError) as error:
            raise located(error, where) from error.__cause__

    def decode(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> list[npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = []
        each(values, offsets, where, lambda i, value: found.append(self._picture(value, _key(keys, i))))
        return found

    def _picture(self, value: memoryview, key: int) -> npt.NDArray[Any]:
        if self.shorter is not None:
            return self._resized(value, key, self.shorter)
        like, orientation = self.like, 1

        def choose(width: int, height: int, found: int = 1, *, whole: bool = False) -> PictureView:
            nonlocal orientation
            orientation = found
            return choose_view(Cropping((height, width)), 0, width, height)

        source, _ = _read(like, value, choose)
        pixels = source.reshape(len(source), -1, 4)[:, :, : _COUNTS[like.colors]]
        if orientation >= 5:
            pixels = pixels.transpose(1, 0, 2)
        if (orientation in (2, 3, 7, 6)) != is_flipped(like.cropping, key):
            pixels = pixels[:, ::-1]
        if orientation in (3, 4, 7, 8):
            pixels = pixels[::-1]
        if like.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        if like.dtype == "uint8":
            return np.array(pixels, order="C")
        factor, offset = (
            of_colors[: _COUNTS[like.colors]].reshape((-1, 1, 1) if like.layout == "NCHW" else (1, 1, -1))
            for of_colors in _factor_and_offset(like)
        )
        out = np.empty(pixels.shape, like.dtype)
        np.add(pixels * factor, offset, out=out, casting="unsafe")
        return out

    def _resized(self, value: memoryview, key: int, shorter: int) -> npt.NDArray[Any]:
        wanted: list[Image] = []

        def choose(width: int, height: int, orientation: int = 1, *, whole: bool = False) -> PictureView:
            across, down = (height, width) if orientation >= 5 else (width, height)
            least = min(across, down)
            size = (max(1, shorter * down // least), max(1, shorter * across // least))
            if max(size) > SIZE_MAX:
                raise DecodeError(
                    f"an image of {width} x {height} pixels, whose longer side would have {max(size)}; {SIZE_MAX} is "
                    "the most"
                )
            wanted.append(replace(self.like, cropping=replace(self.like.cropping, size=size)))
            return choose_view(wanted[0].cropping, key, width, height, orientation, whole=whole)

        source, view = _read(self.like, value, choose)
        out = np.empty(*wanted[0].fixed())
        wanted[0].fill(source, view, out)
        return out


def _read(
    of: Image, value: memoryview, choose: Callable[..., PictureView]
) -> tuple[npt.NDArray[np.uint8], PictureView]:
    """The picture's pixels in the thread's workspace, (height, 4 * width), and what `choose` says of it. Where the
    output is grey, red is; where it is transparent, the fourth byte says how opaque a pixel is.
    """
    turn, has_alpha = of.exif_orientation, of.colors == "RGBA"
    if is_jpeg(value):
        source, view = read_jpeg(value, of.pixels_max, choose, turn=turn)
        if has_alpha:
            source.reshape(len(source), -1, 4)[:, :, 3] = 255
    else:
        source, orientation = read_other(value, of.pixels_max, turn=turn, alpha=has_alpha)
        view = choose(source.shape[1] // 4, source.shape[0], orientation, whole=True)
    if of.colors == "grey":
        pixels = source.reshape(len(source), -1, 4)
        pixels[:, :, 0] = ((pixels[:, :, :3] * _GREY).sum(2) + (1 << 15)) >> 16
    return source, view


def _key(keys: Keys | None, number: int) -> int:
    return 0 if keys is None else int(keys[number])


@lru_cache(maxsize=64)
def _factor_and_offset(of: Image) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """What a level is multiplied with, and what is then added, of each color, three at least. Bytes are cut off, so
    that adding a half rounds them.
    """
    count = max(3, _COUNTS[of.colors])
    if of.dtype == "uint8":
        return np.ones(count, np.float32), np.full(count, 0.5, np.float32)
    mean, std = np.resize(of.mean, count), np.resize(of.std, count)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


@lru_cache(maxsize=64)
def _settings(of: Image) -> native.Settings:
    wanted = of.cropping
    assert isinstance(wanted.size, int), "the C unit makes squares"
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
    size: int | tuple[int, int] | None = None,
    *,
    random_resized_crop: bool | tuple[Range, Range] = False,
    resize: int | None = None,
    center_crop: int | None = None,
    resize_short: int | None = None,
    colors: Colors = "RGB",
    hflip: float = 0.0,
    mean: float | Channels | None = None,
    std: float | Channels | None = None,
    dtype: Dtype = "float32",
    layout: Layout = "NCHW",
    dct_scaling: bool = False,
    exif_orientation: bool = False,
    pixels_max: int = PIXELS_MAX,
    default: float | Channels | None = None,
) -> Decoder:
    """An image as RGB of `size` x `size` pixels, or of `size=(height, width)`, resized with antialias: float32 in
    [0, 1], (3, height, width). Squares are made fastest, in C where it was built.

    Without a size, pictures keep theirs, and `resize_short=800` makes the shorter side of each 800 pixels and keeps its
    aspect: for detection, and for models that see and read. A batch is then a list of arrays.

    With a size the whole picture is used by default, and its aspect is not kept. For training,
    `random_resized_crop=True` takes of each picture a crop of 0.08 to 1 of its area and a shape of 3/4 to 4/3
    (`((0.2, 1), (3/4, 4/3))` are others), and `hflip=0.5` mirrors every other one. For evaluation,
    `image(resize=256, center_crop=224)` takes the middle of the picture whose shorter side was made 256. Random choices
    follow from the data set's seed, the epoch and the sample.

    `colors`: "RGB"; "grey", one plane (ITU-R BT.601, as Pillow's "L"); or "RGBA", whose fourth plane says how opaque
    the picture is, 255 where the file does not say. `mean` and `std` normalise, with a number for each color or one
    for all: `(level / 255 - mean) / std`. `dtype`: "float32", "float16", or "uint8" (levels, without `mean` and
    `std`). `layout`: "NCHW" or "NHWC". `dct_scaling` lets libjpeg shrink a JPEG by 2, 4 or 8 while it decodes it,
    where it has to shrink by more than that anyway: twice as fast for large pictures, and not the same pixels as
    decoding and then resizing gives. `exif_orientation` turns pictures as their EXIF says.

    `default` stands for the picture of samples that lack an optional column: a number, or one for each color, as they
    are in the output; with `mean` and `std`, 0 is the mean.

    Grey becomes RGB, and transparency is dropped, unless `colors` says otherwise. JPEG is decoded by libjpeg-turbo;
    PNG, WebP, GIF, BMP, TIFF, PPM and JPEG 2000 by Pillow, where it is installed (`ConfigError` where not). Damage,
    even where libjpeg would paint over it, and pictures of more than `pixels_max` pixels are a `DecodeError`; damage
    below or after what is wanted of a JPEG is not always looked for.
    """
    sized, resize = _sizes(size, resize, center_crop)
    crop = _random_crop(random_resized_crop)
    if sized is None and (crop is not None or default is not None or dct_scaling):
        raise ConfigError(
            "random_resized_crop, default and dct_scaling need a size, as in image(224, random_resized_crop=True); "
            "without one, pictures keep theirs"
        )
    if resize_short is not None and sized is not None:
        raise ConfigError(
            f"resize_short={resize_short!r} keeps the aspect of pictures, and a size does not; give one of them, or "
            "image(resize=256, center_crop=224) for the middle"
        )
    if crop is not None and resize is not None:
        raise ConfigError("random_resized_crop and resize exclude each other: train with one, evaluate with the other")
    if not _is_number(hflip) or not 0 <= hflip <= 1:
        raise ConfigError(f"hflip={hflip!r} is not a probability between 0 and 1")
    _check_choice("dtype", dtype, get_args(Dtype))
    _check_choice("layout", layout, get_args(Layout))
    _check_choice("colors", colors, get_args(Colors))
    if dtype == "uint8" and (mean is not None or std is not None):
        raise ConfigError('mean and std give numbers that dtype="uint8" cannot hold; use "float32" or "float16"')
    if not _is_count(pixels_max):
        raise ConfigError(f"pixels_max={pixels_max!r} is not a number of pixels")
    made = Image(
        Cropping(1 if sized is None else sized, crop, resize, float(hflip), bool(dct_scaling)),
        _channels("mean", mean, 0.0, colors),
        _channels("std", std, 1.0, colors),
        dtype,
        layout,
        bool(exif_orientation),
        pixels_max,
        None if default is None else _default(default, dtype, colors),
        colors,
    )
    if sized is not None:
        return made
    return WholeImage(made, None if resize_short is None else _checked("resize_short", resize_short, SIZE_MAX))


def _default(default: float | Channels, dtype: Dtype, colors: Colors) -> Channels:
    found = _channels("default", default, 0.0, colors)
    if dtype == "uint8" and not all(level in range(256) for level in found):
        raise ConfigError(f'default={default!r} is none of the levels of dtype="uint8", 0 to 255')
    return found


def _sizes(
    size: int | tuple[int, int] | None, resize: int | None, center_crop: int | None
) -> tuple[int | tuple[int, int] | None, int | None]:
    """The output's size, None for the picture's own, and the shorter side before a centre crop; checked."""
    if center_crop is None and resize is None:
        if size is None:
            return None, None
        if isinstance(size, tuple | list) and len(size) == 2:
            height, width = (_checked("size", side, SIZE_MAX) for side in size)
            return (height if height == width else (height, width)), None
        return _checked("size", size, SIZE_MAX), None
    if center_crop is None or resize is None:
        raise ConfigError(
            f"resize={resize!r}, center_crop={center_crop!r}: give both, as in image(resize=256, center_crop=224), "
            "or size alone, for the whole picture; resize_short=256 keeps its aspect"
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


def _channels(name: str, given: float | Channels | None, default: float, colors: Colors) -> Channels:
    count = _COUNTS[colors]
    if given is None:
        return (default,) * count
    what = {"grey": "one number", "RGB": "three numbers, for red, green and blue", "RGBA": "four numbers"}[colors]
    try:
        found = (float(given),) * count if isinstance(given, int | float) else tuple(map(float, given))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}={given!r} is not {what}") from error
    if len(found) != count:
        raise ConfigError(f"{name}={given!r} is not {what}")
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"{name}={given!r} is not {what.partition(',')[0]} that is finite")
    if name == "std" and min(found) <= 0:
        raise ConfigError(f"std={given!r}: a standard deviation is above 0")
    if name in ("mean", "std") and max(found) > 1:
        raise ConfigError(
            f"{name}={given!r}: that is of levels from 0 to 255, and here they are from 0 to 1; divide it by 255"
        )
    return found


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is none of {', '.join(choices)}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
