"""Crops, flips, normalisation, layouts and orientation of images, with the C unit and without it."""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fastload import decode as fd
from fastload.decode.base import sample_keys
from fastload.decode.pictures import Image as ImageDecoder
from fastload.decode.view import choose_view
from fastload.errors import ConfigError, DecodeError
from tests.decode import pictures
from tests.decode.helpers import decode, group, where

pytestmark = pytest.mark.usefixtures("backend")

KEYS = sample_keys(7, 3, np.zeros(1000, np.int64), np.arange(1000))


def decoded(decoder: fd.Decoder, data: bytes, key: int | np.uint64 = 0) -> np.ndarray:
    found: np.ndarray = decoder.decode_one(data, "here", int(key))
    return found


def geometry(decoder: fd.Decoder) -> ImageDecoder:
    assert isinstance(decoder, ImageDecoder)
    return decoder


def test_random_crops_are_those_of_a_full_decode_within_a_level() -> None:
    rng = np.random.default_rng(20)
    decoder = fd.image(64, random_resized_crop=True)
    bytes_too = fd.image(64, random_resized_crop=True, dtype="uint8")
    for key in KEYS[:150]:
        data = pictures.random_jpeg(rng)
        pixels = pictures.full_decode(data)
        view = choose_view(geometry(decoder).cropping, int(key), pixels.shape[1], pixels.shape[0])
        crop = pixels[pictures.box_of(view)]
        found = decoded(decoder, data, key) * 255.0
        assert np.abs(found - pictures.torch_resized(crop, 64, 64, torch.float64)).max() < 0.06
        of_bytes = pictures.torch_resized(crop, 64, 64, torch.uint8)  # torchvision's, which rounds twice
        assert np.abs(found - of_bytes).max() < 1.5
        assert np.abs(decoded(bytes_too, data, key) - of_bytes).max() <= 1


def test_crops_are_distributed_as_asked_for() -> None:
    width, height = 640, 427
    wanted = geometry(fd.image(8, random_resized_crop=((0.2, 0.7), (0.5, 3)))).cropping
    boxes = [pictures.box_of(choose_view(wanted, int(key), width, height)) for key in KEYS]
    sizes = np.array([(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in boxes])
    assert all(rows.start >= 0 and rows.stop <= height for rows, _ in boxes)
    assert all(columns.start >= 0 and columns.stop <= width for _, columns in boxes)
    areas, shapes = sizes.prod(axis=1) / (width * height), sizes[:, 1] / sizes[:, 0]
    assert 0.19 < areas.min() < 0.22
    assert 0.6 < areas.max() < 0.71
    assert 0.49 < shapes.min() < 0.55
    assert 2.5 < shapes.max() < 3.05
    assert (
        abs(np.median([rows.start / max(1, height - n) for (rows, _), n in zip(boxes, sizes[:, 0], strict=True)]) - 0.5)
        < 0.06
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (400, 20), (20, 400), (3, 2)])
def test_pictures_that_no_crop_fits(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = pictures.jpeg(pixels, "444", 95)
    full = pictures.full_decode(data)
    decoder = fd.image(16, random_resized_crop=((0.9, 1.0), (3 / 4, 4 / 3)))
    for key in KEYS[:20]:
        view = choose_view(geometry(decoder).cropping, int(key), shape[1], shape[0])
        crop = full[pictures.box_of(view)]
        expected = pictures.torch_resized(crop, 16, 16, torch.float64)
        assert np.abs(decoded(decoder, data, key) * 255.0 - expected).max() < 0.06


@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (64, 64), (65, 32), (40, 39), (500, 100), (33, 20)])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (427, 640), (64, 64), (31, 200)])
def test_center_crop_is_the_middle_of_the_resized_picture(resize: int, crop: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    photo = max((pictures.random_photo(rng, 700) for _ in range(20)), key=lambda pixels: pixels.size)
    data = pictures.jpeg(np.asarray(Image.fromarray(photo).resize(shape[::-1])), "420")
    height, width = shape
    tall = resize if height <= width else resize * height // width
    wide = resize if width <= height else resize * width // height
    top, left = round((tall - crop) / 2), round((wide - crop) / 2)
    whole = pictures.torch_resized(pictures.full_decode(data), tall, wide, torch.float64)
    expected = whole[:, top : top + crop, left : left + crop]
    found = decoded(fd.image(resize=resize, center_crop=crop), data) * 255.0
    assert found.shape == (3, crop, crop)
    assert np.abs(found - expected).max() < 0.06


def test_every_other_picture_is_mirrored() -> None:
    data = pictures.jpeg(pictures.photographs()[4][:100, :120], "420")
    straight = decoded(fd.image(32), data)
    mirrored = straight[:, :, ::-1]
    np.testing.assert_array_equal(decoded(fd.image(32, hflip=1), data), mirrored)
    decoder = fd.image(32, hflip=0.5)
    found = [decoded(decoder, data, key) for key in KEYS[:200]]
    flips = [np.array_equal(one, mirrored) for one in found]
    assert all(is_flipped or np.array_equal(one, straight) for is_flipped, one in zip(flips, found, strict=True))
    assert 70 < sum(flips) < 130


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    ("dtype", "normalised"),
    [("float32", False), ("float32", True), ("float16", False), ("float16", True), ("uint8", False)],
)
def test_types_layouts_and_normalisation(dtype: str, layout: str, normalised: bool) -> None:
    data = pictures.jpeg(pictures.photographs()[0][:90, :130], "420")
    options = {"mean": MEAN, "std": STD} if normalised else {}
    plain = decoded(fd.image(37), data).astype(np.float64)
    expected = plain * 255 if dtype == "uint8" else plain
    if normalised:
        expected = (plain - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    if layout == "NHWC":
        expected = expected.transpose(1, 2, 0)
    decoder = fd.image(37, dtype=dtype, layout=layout, **options)  # type: ignore[arg-type]
    batch = decode(decoder, [data, data])
    assert (batch.shape[1:], batch.dtype) == decoder.fixed() == (expected.shape, np.dtype(dtype))
    tolerance = {"float32": 1e-6, "float16": 2e-3, "uint8": 0.501}[dtype]
    np.testing.assert_allclose(batch[1].astype(np.float64), expected, atol=tolerance)


def with_orientation(pixels: np.ndarray, orientation: int, kind: str = "JPEG", **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    pixels = pictures.photographs()[6][:73, :121]
    for data in (
        with_orientation(pixels, orientation, quality=95, subsampling=0),
        with_orientation(pixels, orientation, "PNG"),
    ):
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        for layout, axes in (("NCHW", (0, 1, 2)), ("NHWC", (1, 2, 0))):
            decoder = fd.image(40, exif_orientation=True, layout=layout)  # type: ignore[arg-type]
            expected = pictures.torch_resized(upright, 40, 40, torch.float64).transpose(axes)
            assert np.abs(decoded(decoder, data) * 255.0 - expected).max() < 0.06
        as_it_lies = pictures.torch_resized(np.asarray(Image.open(io.BytesIO(data))), 40, 40, torch.float64)
        assert np.abs(decoded(fd.image(40), data) * 255.0 - as_it_lies).max() < 0.06


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_and_flips_are_of_the_upright_picture(orientation: int) -> None:
    pixels = pictures.photographs()[6][:173, :221]
    data = with_orientation(pixels, orientation, quality=95, subsampling=0)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    as_file = io.BytesIO()
    Image.fromarray(upright).save(as_file, "PNG")
    decoder = fd.image(24, exif_orientation=True, random_resized_crop=True, hflip=0.5)
    for key in KEYS[:12]:
        found, expected = decoded(decoder, data, key), decoded(decoder, as_file.getvalue(), key)
        assert np.abs(found - expected).max() * 255 < 0.02  # weights are rounded from the other end


def test_broken_exif_is_no_orientation() -> None:
    pixels = pictures.photographs()[6][:40, :60]
    data = with_orientation(pixels, 6)
    start = data.index(b"Exif\0\0") + 6
    expected = decoded(fd.image(8), data)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(start, start + 26, 3):
            broken[at] = rng.integers(256)
        found = decoded(fd.image(8, exif_orientation=True), bytes(broken))
        assert found.shape == expected.shape


def test_dct_scaling_is_near_the_same_picture_and_off_by_default() -> None:
    photo = max(pictures.photographs(), key=lambda pixels: pixels.size)
    data = pictures.jpeg(photo, "420")
    for size in (300, 120, 60, 30):
        exact = decoded(fd.image(size), data)
        scaled = decoded(fd.image(size, dct_scaling=True), data)
        assert not np.array_equal(exact, scaled)
        assert np.abs(exact - scaled).mean() * 255 < 2
    np.testing.assert_array_equal(decoded(fd.image(1000, dct_scaling=True), data), decoded(fd.image(1000), data))


def test_a_sample_looks_the_same_in_whatever_group_it_lies() -> None:
    rng = np.random.default_rng(5)
    items = [pictures.random_jpeg(rng, 150) for _ in range(12)]
    items[4] = with_orientation(pictures.photographs()[2][:50, :60], 1, "PNG")  # leaves the one call, and returns
    decoder = fd.image(24, random_resized_crop=True, hflip=0.5)
    keys = sample_keys(1, 2, np.arange(12) // 5, np.arange(12) % 5)
    whole = decoder.decode(*group(items), where, keys)
    assert isinstance(whole, np.ndarray)
    for number, item in enumerate(items):
        np.testing.assert_array_equal(whole[number], decoded(decoder, item, keys[number]))
    order = rng.permutation(12)
    again = decoder.decode(*group([items[i] for i in order]), where, keys[order])
    np.testing.assert_array_equal(again, whole[order])


def test_random_images_need_keys_and_others_do_not() -> None:
    data = pictures.jpeg(pictures.photographs()[0][:20, :20], "444")
    for options in ({"random_resized_crop": True}, {"hflip": 0.5}):
        assert fd.image(8, **options).wants_keys()  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="needs a key for each sample"):
            fd.image(8, **options).decode_one(data, "here")  # type: ignore[arg-type]
    for calm in (fd.image(8), fd.image(8, hflip=1), fd.image(resize=10, center_crop=8)):
        assert not calm.wants_keys()
        calm.decode_one(data, "here")
    assert not fd.integer().wants_keys()


def test_a_jpeg_cut_off_below_the_crop_is_an_error_too() -> None:
    data = pictures.jpeg(pictures.photographs()[4][:200, :200], "420")
    decoder = fd.image(16, random_resized_crop=((0.1, 0.2), (1, 1)))
    for key in KEYS[:10]:
        with pytest.raises(DecodeError, match=r"^here: damaged JPEG of .*Premature end"):
            decoder.decode_one(data[:-2], "here", int(key))


def test_the_scans_of_a_progressive_jpeg_have_a_limit() -> None:
    data = bytearray(pictures.jpeg(pictures.photographs()[0][:16, :16], "grey", progressive=True))
    start = data.index(b"\xff\xda")
    data[start + 9] = 0  # all bits of the first coefficient at once, which may come again
    end = data.index(b"\xff", start + 10)
    head, scan = bytes(data[:start]), bytes(data[start:end])
    fd.image(8).decode_one(head + scan * 500 + b"\xff\xd9", "here")
    with pytest.raises(DecodeError, match="more than 500 scans"):
        fd.image(8).decode_one(head + scan * 501 + b"\xff\xd9", "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_resized_crop": True}, "need a size"),
        ({"size": 8, "resize": 10}, "give both"),
        ({"center_crop": 10}, "give both"),
        ({"resize": 10, "center_crop": 11}, "center_crop=11 is larger than resize=10"),
        ({"size": 9, "resize": 10, "center_crop": 8}, "leave size out"),
        ({"resize": 10, "center_crop": 8, "random_resized_crop": True}, "exclude each other"),
        ({"size": 8, "random_resized_crop": 3}, "neither True nor"),
        ({"size": 8, "random_resized_crop": ((0, 1), (1, 1))}, "areas"),
        ({"size": 8, "random_resized_crop": ((0.1, 1.1), (1, 1))}, "areas"),
        ({"size": 8, "random_resized_crop": ((0.1, math.nan), (1, 1))}, "areas"),
        ({"size": 8, "random_resized_crop": ((0.1, 1), (2, 1))}, "shapes"),
        ({"size": 8, "hflip": 1.5}, "hflip=1.5"),
        ({"size": 8, "hflip": True}, "hflip=True"),
        ({"size": 8, "dtype": "int8"}, "dtype='int8' is none of float32, uint8, float16"),
        ({"size": 8, "layout": "CHWN"}, "layout='CHWN'"),
        ({"size": 8, "dtype": "uint8", "mean": (0, 0, 0)}, "uint8"),
        ({"size": 8, "mean": (1, 2)}, "mean=.* is not three numbers"),
        ({"size": 8, "mean": (1, 2, math.inf)}, "finite"),
        ({"size": 8, "std": (1, 0, 1)}, "std=.*above 0"),
    ],
)
def test_arguments(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fd.image(**options)  # type: ignore[arg-type]


def test_it_is_a_value() -> None:
    decoder = fd.image(8, random_resized_crop=True, hflip=0.5, mean=MEAN, std=STD)
    assert pickle.loads(pickle.dumps(decoder)) == decoder
    assert len({decoder, fd.image(8, random_resized_crop=True, hflip=0.5, mean=MEAN, std=STD)}) == 1
    assert fd.image(8) != fd.image(8, layout="NHWC")
    assert replace(geometry(decoder), dtype="float16").fixed()[1] == np.float16
