"""Images: real photographs, odd ones, hostile ones; the reference is torch's antialiased resize of a full
decode.
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import pytest
import simplejpeg
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_image

from fastload import decode as fd
from fastload.decode.pixels import SIDE_MAX
from fastload.decode.workspace import KEPT_BYTES_MAX, Workspace
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.resize import cmyk_to_rgbx, resize_rgbx, taps_max, triangle
from tests.decode.helpers import decode, group, where

_PHOTOS = ["astronaut", "coffee", "chelsea", "rocket", "china.jpg", "flower.jpg"]


@lru_cache
def photo(name: str) -> np.ndarray:
    """A real photograph as uint8 (height, width, 3)."""
    found = load_sample_image(name) if name.endswith(".jpg") else getattr(skimage.data, name)()
    return np.ascontiguousarray(found[:, :, :3])


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """The reference: (height, width, 3) of uint8 to (3, size, size) of float32 in [0, 1]."""
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].double() / 255
    shape = (size, size)
    return torch.nn.functional.interpolate(planes, size=shape, mode="bilinear", antialias=True)[0].float().numpy()


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def assert_close(found: np.ndarray, expected: np.ndarray, levels: float = 0.01) -> None:
    """Within `levels` of 255: the promise is one level, what float32 makes of it far less."""
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert np.abs(found - expected).max() * 255 <= levels


@pytest.mark.parametrize("name", _PHOTOS)
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
def test_photographs(name: str, subsampling: str) -> None:
    data = simplejpeg.encode_jpeg(photo(name), quality=90, colorsubsampling=subsampling)
    assert_close(fd.image(224).decode_one(data, "here"), resized(simplejpeg.decode_jpeg(data), 224))


@pytest.mark.parametrize("size", [1, 2, 31, 224, 600])
@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 7), (7, 1), (2, 3), (1, 3000), (3000, 1), (3, 999), (500, 375), (17, 16)]
)
def test_odd_sizes(shape: tuple[int, int], size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert_close(fd.image(size).decode_one(encoded(pixels, "PNG"), "here"), resized(pixels, size))
    data = encoded(pixels, quality=95)
    assert_close(fd.image(size).decode_one(data, "here"), resized(simplejpeg.decode_jpeg(data), size))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.integers(0, 2**32 - 1))
def test_any_size(height: int, width: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_close(fd.image(size).decode_one(encoded(pixels, "PNG"), "here"), resized(pixels, size))


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_stay(value: int) -> None:
    found = fd.image(50).decode_one(encoded(np.full((77, 33, 3), value, np.uint8), "PNG"), "here")
    assert np.abs(found - value / 255).max() < 1e-6
    assert float(found.max()) <= 1


def test_grey_becomes_rgb() -> None:
    grey = np.ascontiguousarray(photo("chelsea")[:, :, 1])
    for data in (encoded(grey), encoded(grey, "PNG")):
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert_close(fd.image(96).decode_one(data, "here"), resized(pixels, 96))


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}], ids=str)
def test_kinds_of_jpeg(options: dict[str, object]) -> None:
    data = encoded(photo("coffee"), quality=85, **options)
    assert_close(fd.image(128).decode_one(data, "here"), resized(simplejpeg.decode_jpeg(data), 128))


def test_cmyk() -> None:
    file = io.BytesIO()
    Image.fromarray(photo("chelsea")).convert("CMYK").save(file, "JPEG", quality=95)
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert_close(fd.image(96).decode_one(file.getvalue(), "here"), resized(pixels, 96), levels=1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_other_formats(kind: str) -> None:
    data = encoded(photo("rocket"), kind)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_close(fd.image(64).decode_one(data, "here"), resized(pixels, 64))


def test_transparency_and_palettes() -> None:
    rgb = photo("astronaut")[:100, :80]
    alpha = np.full((100, 80, 1), 100, np.uint8)
    assert_close(fd.image(40).decode_one(encoded(np.dstack([rgb, alpha]), "PNG"), "here"), resized(rgb, 40))
    palette = Image.fromarray(rgb).quantize(16)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes(range(16)))
    expected = resized(np.asarray(palette.convert("RGB")), 40)
    assert_close(fd.image(40).decode_one(file.getvalue(), "here"), expected)
    file = io.BytesIO()
    Image.fromarray(rgb[:, :, 0] > 128).save(file, "PNG")
    expected = resized(np.repeat((rgb[:, :, :1] > 128) * np.uint8(255), 3, axis=2), 40)
    assert_close(fd.image(40).decode_one(file.getvalue(), "here"), expected)


def test_sixteen_bits_become_eight() -> None:
    levels = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    expected = resized(np.repeat((levels >> 8).astype(np.uint8)[:, :, None], 3, axis=2), 32)
    assert_close(fd.image(32).decode_one(encoded(levels, "PNG"), "here"), expected)


def test_into_its_place_in_a_batch() -> None:
    items = [encoded(photo(name)[:60, :50]) for name in _PHOTOS]
    batch = decode(fd.image(20), items, before=b"xyz")
    assert batch.shape == (len(items), 3, 20, 20)
    assert batch.flags.writeable
    out = np.full((len(items) + 2, 3, 20, 20), -1, np.float32)
    fd.image(20).decode_into(*group(items), out[1:-1], where)
    np.testing.assert_array_equal(out[1:-1], batch)
    assert (out[[0, -1]] == -1).all()


def test_what_is_returned_is_the_users_own() -> None:
    decoder, data = fd.image(16), encoded(photo("coffee"))
    first = decoder.decode_one(data, "here")
    kept = first.copy()
    second = decoder.decode_one(encoded(photo("rocket")), "here")
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)


def test_threads_do_not_disturb_each_other() -> None:
    items = [encoded(photo(name)[: 90 + 37 * n, : 80 + 23 * n]) for n, name in enumerate(_PHOTOS)]
    values, offsets = group(items * 5)
    expected = fd.image(48).decode(values, offsets, where)
    barrier = threading.Barrier(4)

    def work(size: int) -> np.ndarray:
        barrier.wait()
        fd.image(size).decode(values, offsets, where)
        return fd.image(48).decode(values, offsets, where)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, [48, 20, 61, 33]):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}], ids=str)
def test_a_jpeg_cut_off_anywhere_is_an_error(options: dict[str, object]) -> None:
    data = encoded(photo("chelsea")[:48, :40], quality=80, **options)
    decoder = fd.image(8)
    for length in range(len(data)):
        with pytest.raises(DecodeError, match=r"^s3://b/t.tar: sample 1: column x: "):
            decode(decoder, [data, data[:length]])


def test_bytes_around_the_end_are_no_damage() -> None:
    data = encoded(photo("chelsea")[:48, :40])
    expected = fd.image(8).decode_one(data, "here")
    stuffed = data[:-2] + b"\x00\x00\x00" + data[-2:]
    for harmless in (data + b"\x00" * 100, data + b"junk", stuffed):
        np.testing.assert_array_equal(fd.image(8).decode_one(harmless, "here"), expected)
    with pytest.raises(DecodeError, match="damaged JPEG"):
        fd.image(8).decode_one(stuffed[:-2], "here")


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_damage_is_an_error_or_a_picture(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
    file = bytearray(encoded(photo("rocket")[:40, :50], kind))
    for _ in range(data.draw(st.integers(1, 4))):
        file[data.draw(st.integers(0, min(len(file) - 1, 700)))] = data.draw(st.integers(0, 255))
    cut = bytes(file[: data.draw(st.integers(0, len(file)))]) if data.draw(st.booleans()) else bytes(file)
    try:
        found = fd.image(8).decode_one(cut, "here")
    except DecodeError:
        return
    assert np.isfinite(found).all()


def png_that_claims(width: int, height: int) -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encoded(photo("rocket")[:40, :50]))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("claims", [png_that_claims, jpeg_that_claims])
def test_sizes_are_refused_before_decoding(claims: object) -> None:
    with pytest.raises(DecodeError, match=r"sample 0.*60000 x 60000 pixels, over the limit|bomb"):
        decode(fd.image(8), [claims(60_000, 60_000)])  # type: ignore[operator]
    with pytest.raises(DecodeError, match=r"40 x 30 pixels, over the limit of 1000; image\(\.\.\., pixels_max"):
        fd.image(8, pixels_max=1000).decode_one(claims(40, 30), "here")  # type: ignore[operator]


def test_a_side_has_a_limit() -> None:
    with pytest.raises(DecodeError, match=f"{SIDE_MAX + 1} x 1 pixels; a side"):
        fd.image(8).decode_one(png_that_claims(SIDE_MAX + 1, 1), "here")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "no bytes"),
        (b"GIF", "not an image of a known format: it starts with b'GIF'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image of a known format"),
        (b"\xff\xd8\xff", "damaged JPEG of 3 bytes"),
        (png_that_claims(5, 5), "damaged image"),
    ],
)
def test_what_is_no_image(bad: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=f"sample 0: column x: {message}"):
        decode(fd.image(8), [bad])


def test_without_pillow_the_error_names_the_cure() -> None:
    code = """
import sys
sys.modules["PIL"] = None
from fastload import decode
from fastload.errors import ConfigError
try:
    decode.image(8).decode_one(b"\\x89PNG\\r\\n\\x1a\\n", "s3://b/a.tar: k: png")
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("s3://b/a.tar: k: png: ")
    assert "pip install pillow" in done.stdout


@pytest.mark.parametrize("size", [0, -1, 2.5, "224", True, 20_000, (224, 224)])
def test_arguments(size: object) -> None:
    with pytest.raises(ConfigError, match="size="):
        fd.image(size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pixels_max=0"):
        fd.image(8, pixels_max=0)


def test_workspaces_are_used_again_and_huge_ones_given_back() -> None:
    space = Workspace()
    first = space.pixels(1000)
    assert np.shares_memory(first, space.pixels(700))
    assert np.shares_memory(space.pixels(1001), space.pixels(900))
    huge = space.pixels(KEPT_BYTES_MAX + 1)
    assert not np.shares_memory(huge, space.pixels(KEPT_BYTES_MAX))
    space.rows.make(375, 224, 1.0)
    weights = space.rows.weights
    space.rows.make(300, 224, 1.0)
    assert np.shares_memory(weights, space.rows.weights)


def triangle_twin(source_length: int, length: int) -> np.ndarray:
    """The same weights as a matrix (length, source_length) of float64."""
    scale = source_length / length
    support = max(scale, 1.0)
    centers = scale * (np.arange(length) + 0.5)[:, None]
    weights = np.clip(1 - np.abs(np.arange(source_length) + 0.5 - centers) / support, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_kernel_and_twin(height: int, width: int, rows: int, columns: int, seed: int) -> None:
    tables = []
    for source_length, length, level in ((height, rows, 1 / 255), (width, columns, 1.0)):
        table = (
            np.empty(length, np.int64),
            np.empty(length, np.int64),
            np.full((length, taps_max(source_length, length)), np.nan, np.float32),
        )
        triangle(source_length, level, *table)
        assert (table[0] >= 0).all()
        assert (table[0] + table[1] <= source_length).all()
        assert (table[1] <= table[2].shape[1]).all()
        tables.append(table)
    source = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    out = np.empty((3, rows, columns), np.float32)
    resize_rgbx(source.reshape(height, -1), *tables[0], *tables[1], np.empty(4 * width, np.float32), out)
    across = np.einsum("xj,ijc->cix", triangle_twin(width, columns), source[:, :, :3] / 255)
    np.testing.assert_allclose(out, triangle_twin(height, rows) @ across, atol=1e-5)


def test_cmyk_kernel_and_twin() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (1000, 4), dtype=np.uint8)
    expected = (pixels[:, :3].astype(int) * pixels[:, 3:] + 127) // 255
    flat = pixels.reshape(-1).copy()
    cmyk_to_rgbx(flat)
    np.testing.assert_array_equal(flat.reshape(-1, 4)[:, :3], expected)
