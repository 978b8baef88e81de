"""Pictures that are not square, keep their size, are grey or have transparency; the reference is Pillow and torch."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fastload import decode as fd
from fastload.decode.base import sample_keys
from fastload.errors import ConfigError, DecodeError
from tests.decode.helpers import decode, group, where
from tests.decode.pictures import jpeg, photographs

PHOTO = np.ascontiguousarray(photographs()[0][:120, :90])
ORIENTATION_TAG = 0x112


def stored(pixels: np.ndarray, kind: str = "PNG", orientation: int = 1, mode: str | None = None) -> bytes:
    file, picture = io.BytesIO(), Image.fromarray(pixels)
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    (picture if mode is None else picture.convert(mode)).save(file, kind, exif=exif)
    return file.getvalue()


def with_alpha(pixels: np.ndarray = PHOTO) -> np.ndarray:
    alpha = np.arange(pixels.shape[0] * pixels.shape[1], dtype=np.uint32).reshape(pixels.shape[:2]) * 7 % 256
    return np.dstack([pixels, alpha.astype(np.uint8)])


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """(rows, columns, channels) of uint8 to (channels, height, width) of float32 in [0, 1], by torch."""
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double() / 255
    size = (height, width)
    return torch.nn.functional.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].float().numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() * 255 <= 0.06


@pytest.mark.parametrize("size", [(30, 70), (224, 100), (1, 9), (120, 90)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_height_and_width(size: tuple[int, int], kind: str) -> None:
    data = stored(PHOTO, kind)
    whole = np.array(Image.open(io.BytesIO(data)))
    assert_close(fd.image(size).decode_one(data, "here"), resized(whole, *size))
    rows_last = fd.image(size, layout="NHWC", dtype="uint8").decode_one(data, "here")
    assert rows_last.shape == (*size, 3)
    assert np.abs(rows_last.transpose(2, 0, 1) - 255 * resized(whole, *size)).max() <= 0.57


def test_a_square_by_two_numbers_is_that_by_one() -> None:
    assert fd.image((32, 32)) == fd.image(32)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_turned_as_exif_says(orientation: int, kind: str) -> None:
    data = stored(PHOTO, kind, orientation)
    upright = np.array(_upright(data))
    whole = fd.image(exif_orientation=True, dtype="uint8", layout="NHWC")
    assert np.array_equal(whole.decode_one(data, "here"), upright)
    assert_close(fd.image((40, 50), exif_orientation=True).decode_one(data, "here"), resized(upright, 40, 50))
    short = fd.image(resize_short=45, exif_orientation=True).decode_one(data, "here")
    assert_close(short, resized(upright, *((60, 45) if orientation < 5 else (45, 60))))


def _upright(data: bytes) -> Image.Image:
    from PIL import ImageOps

    picture = Image.open(io.BytesIO(data))
    turned = ImageOps.exif_transpose(picture)
    assert turned is not None
    return turned


def test_pictures_keep_their_sizes() -> None:
    shapes = [(1, 1), (5, 9), (9, 5), (40, 40)]
    pictures = [np.ascontiguousarray(PHOTO[:height, :width]) for height, width in shapes]
    found = decode(fd.image(dtype="uint8", layout="NHWC"), [stored(each) for each in pictures])
    assert all(map(np.array_equal, found, pictures))
    assert all(each.flags.writeable and each.flags.c_contiguous for each in found)
    normal = decode(fd.image(mean=0.5, std=(0.5, 0.25, 1.0)), [stored(each) for each in pictures])
    for each, pixels in zip(normal, pictures, strict=True):
        assert each.dtype == np.float32
        expected = (pixels.transpose(2, 0, 1) / 255 - 0.5) / np.array([0.5, 0.25, 1.0]).reshape(3, 1, 1)
        assert np.allclose(each, expected, atol=1e-6)


def test_the_shorter_side_is_as_it_is_asked_for() -> None:
    for height, width in [(120, 90), (90, 120), (90, 90), (3, 90)]:
        pixels = np.ascontiguousarray(photographs()[0][:height, :width])
        found = fd.image(resize_short=30).decode_one(stored(pixels), "here")
        least = min(height, width)
        assert_close(found, resized(pixels, 30 * height // least, 30 * width // least))


@pytest.mark.parametrize("size", [None, 24, (20, 30)])
def test_grey_is_as_pillow_has_it(size: int | tuple[int, int] | None) -> None:
    for data in (stored(PHOTO), jpeg(PHOTO), stored(PHOTO, mode="L"), jpeg(PHOTO, "grey"), stored(PHOTO, mode="1")):
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGB").convert("L"))[:, :, None]
        found = fd.image(size, colors="grey").decode_one(data, "here")
        if size is None:
            assert np.allclose(found, expected.transpose(2, 0, 1) / 255, atol=1e-6)
        else:
            assert_close(found, resized(expected, *((24, 24) if size == 24 else (20, 30))))
    levels = fd.image(size, colors="grey", dtype="uint8", layout="NHWC").decode_one(stored(PHOTO), "here")
    assert levels.shape[2] == 1
    assert levels.dtype == np.uint8


@pytest.mark.parametrize("size", [None, 24, (20, 30)])
def test_transparency(size: int | tuple[int, int] | None) -> None:
    for data in (stored(with_alpha()), stored(with_alpha(), "WEBP"), stored(PHOTO), jpeg(PHOTO)):
        expected = np.array(Image.open(io.BytesIO(data)).convert("RGBA"))
        found = fd.image(size, colors="RGBA", mean=0.25, std=0.5).decode_one(data, "here") * 0.5 + 0.25
        if size is None:
            assert np.allclose(found, expected.transpose(2, 0, 1) / 255, atol=1e-6)
        else:
            assert_close(found, resized(expected, *((24, 24) if size == 24 else (20, 30))))


@pytest.mark.parametrize("size", [None, (20, 30)])
def test_flips_follow_from_the_key_alone(size: tuple[int, int] | None) -> None:
    count, data = 64, stored(PHOTO)
    keys = sample_keys(1, 2, np.zeros(count, np.int64), np.arange(count))
    values, offsets = group([data] * count)
    plain = fd.image(size).decode_one(data, "here")
    found = fd.image(size, hflip=0.5).decode(values, offsets, where, keys)
    flipped = [not np.allclose(each, plain, atol=1e-6) for each in found]
    assert 10 < sum(flipped) < count - 10
    for each, is_flipped, key in zip(found, flipped, keys.tolist(), strict=True):
        assert np.allclose(each[:, :, ::-1] if is_flipped else each, plain, atol=1e-4)
        assert np.array_equal(each, fd.image(size, hflip=0.5).decode_one(data, "here", key))


def test_a_random_crop_of_another_shape() -> None:
    keys = sample_keys(1, 2, np.zeros(4, np.int64), np.arange(4))
    values, offsets = group([stored(PHOTO)] * 4)
    found = fd.image((20, 30), random_resized_crop=True).decode(values, offsets, where, keys)
    assert found.shape == (4, 3, 20, 30)
    assert len({each.tobytes() for each in found}) == 4


def test_what_is_damaged_or_too_large_is_an_error_with_its_place() -> None:
    for decoder in (fd.image(), fd.image(resize_short=10), fd.image((5, 6)), fd.image(9, colors="grey")):
        for data in (b"", b"nothing", stored(PHOTO)[:200], jpeg(PHOTO)[:300]):
            with pytest.raises(DecodeError, match=r"^s3://b/t.tar: sample 1: column x: "):
                decode(decoder, [stored(PHOTO), data])
    with pytest.raises(DecodeError, match="over the limit of 100"):
        decode(fd.image(pixels_max=100), [stored(PHOTO)])
    with pytest.raises(DecodeError, match="whose longer side would have 60000; 16384 is the most"):
        decode(fd.image(resize_short=100), [stored(np.zeros((1, 600, 3), np.uint8))])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"random_resized_crop": True}, "need a size"),
        ({"default": 0}, "need a size"),
        ({"size": 5, "resize_short": 7}, "resize_short=7 keeps the aspect"),
        ({"resize_short": 0}, "resize_short=0 is not a number of pixels"),
        ({"size": (5, 0)}, "size=0 is not a number of pixels"),
        ({"size": (5, 6, 7)}, r"size=\(5, 6, 7\) is not"),
        ({"colors": "L"}, "colors='L' is none of RGB, grey, RGBA"),
        ({"colors": "grey", "mean": (0.1, 0.2, 0.3)}, r"mean=.* is not one number"),
        ({"colors": "RGBA", "std": (0.1, 0.2, 0.3)}, r"std=.* is not four numbers"),
    ],
)
def test_mistakes(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        fd.image(**options)  # type: ignore[arg-type]


def test_batches_of_a_loader_and_what_stands_for_a_missing_picture(tmp_path) -> None:
    import fastload
    from tests.shards import tar_of

    pictures = [np.ascontiguousarray(PHOTO[: 10 + n, :20]) for n in range(5)]
    samples = {f"{n}": {"png": stored(each)} if n != 3 else {"cls": b"1"} for n, each in enumerate(pictures)}
    (tmp_path / "a.tar").write_bytes(tar_of(samples))
    with fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0, service="inprocess") as cache:
        for workers, size in itertools.product((0, 2), (None, (8, 4))):
            colors = {"size": size, "default": 9} if size else {}
            decoder = fd.image(dtype="uint8", layout="NHWC", **colors)  # type: ignore[arg-type]
            dataset = fastload.StreamingDataset(tmp_path / "a.tar", cache=cache, decode={"png?": decoder})
            with fastload.DataLoader(dataset, batch_size=5, num_workers=workers) as loader:
                (batch,) = loader
            if size:
                assert batch["png"].shape == (5, 8, 4, 3)
                assert (batch["png"][3] == 9).all()
            else:
                assert batch["png"][3] is None
                assert all(np.array_equal(batch["png"][n], pictures[n]) for n in (0, 1, 2, 4))
