"""Whole images: real photographs, odd ones, hostile ones; the reference is torch's antialiased resize of a full
decode. Every test runs with the C unit and without it.
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
from fastload.decode.view import Span
from fastload.decode.workspace import KEPT_BYTES_MAX, Workspace
from fastload.errors import ConfigError, DecodeError
from fastload.kernels.resize import FRACTION_BITS, cmyk_to_rgbx, fill_table, resize_rgbx, taps_max
from tests.decode.helpers import decode, group, where

pytestmark = pytest.mark.usefixtures("backend")

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


def assert_close(found: np.ndarray, expected: np.ndarray, levels: float = 0.06) -> None:
    """Within `levels` of 255: the promise is one level, what 16-bit weights make of it far less."""
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


@settings(deadline=None, max_examples=80)
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


@pytest.mark.parametrize("size", [0, -1, 2.5, "224", True, 20_000, (224,), (224, 0)])
def test_arguments(size: object) -> None:
    with pytest.raises(ConfigError, match="size="):
        fd.image(size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pixels_max=0"):
        fd.image(8, pixels_max=0)


def test_workspaces_are_used_again_and_huge_ones_given_back() -> None:
    space = Workspace()
    first = space.pixels(1000)
    assert np.shares_memory(first, space.pixels(700))
    assert np.shares_memory(space.pixels(1200), space.pixels(900))
    assert all(space.pixels(count).ctypes.data % 16 == 8 for count in (1, 5000, KEPT_BYTES_MAX + 1))
    huge = space.pixels(KEPT_BYTES_MAX + 1)
    assert not np.shares_memory(huge, space.pixels(KEPT_BYTES_MAX))
    space.rows.make(Span(0, 375 / 224, 0, 375), 224)
    weights = space.rows.weights
    space.rows.make(Span(3, 300 / 224, 3, 303), 224)
    assert np.shares_memory(weights, space.rows.weights)


def table_twin(span: Span, length: int, source_length: int) -> np.ndarray:
    """The weights of an axis as a matrix (length, source_length) of float64, not rounded."""
    support = max(span.step, 1.0)
    centers = span.origin + span.step * (np.arange(length) + 0.5)[:, None]
    places = np.arange(source_length) + 0.5
    weights = np.clip(1 - np.abs(places - centers) / support, 0, None)
    weights[:, (places < span.low) | (places > span.high)] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return weights[::-1] if span.is_mirrored else weights


@st.composite
def spans(draw: st.DrawFn) -> tuple[Span, int, int]:
    """A part of an axis, the number of its outputs, and the axis' length."""
    source_length, length = draw(st.integers(1, 90)), draw(st.integers(1, 24))
    low = draw(st.integers(0, source_length - 1))
    high = draw(st.integers(low + 1, source_length))
    origin = low + draw(st.floats(0, 0.9)) * (high - low)
    step = (high - origin) * draw(st.floats(0.2, 1)) / length
    return Span(origin, step, low, high, draw(st.booleans())), length, source_length


def table(span: Span, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    first, count = np.empty(length, np.int64), np.empty(length, np.int64)
    weights = np.full((length, taps_max(span.step)), np.nan)
    bits = fill_table(span.origin, span.step, span.low, span.high, span.is_mirrored, first, count, weights)
    return first, count, weights, bits


@settings(deadline=None)
@given(spans())
def test_table_and_twin(case: tuple[Span, int, int]) -> None:
    span, length, source_length = case
    first, count, weights, bits = table(span, length)
    assert (first >= span.low).all()
    assert (count >= 1).all()
    assert (first + count <= span.high).all()
    assert (weights == np.round(weights)).all()
    assert ((weights >= 0) & (weights < 2**15)).all()
    assert (weights.sum(axis=1) == 2**bits).all()
    dense = np.zeros((length, source_length))
    for i in range(length):
        dense[i, first[i] : first[i] + count[i]] = weights[i, : count[i]] / 2**bits
        assert not weights[i, count[i] :].any()
    np.testing.assert_allclose(dense, table_twin(span, length, source_length), atol=1.01 / 2**bits)


@settings(deadline=None)
@given(spans(), spans(), st.integers(0, 2**32 - 1))
def test_kernel_and_twin(down: tuple[Span, int, int], across: tuple[Span, int, int], seed: int) -> None:
    (row_span, rows, height), (column_span, columns, width) = down, across
    source = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    row_table, column_table = table(row_span, rows), table(column_span, columns)
    factor, offset = np.array([1 / 255, 0.5, 1], np.float32), np.array([0, -1, 0.25], np.float32)
    out = np.empty((3, rows, columns), np.float32)
    scratch = np.empty(4 * width, np.float32), np.empty(4 * width), np.empty((3, columns))
    resize_rgbx(source.reshape(height, -1), *row_table, *column_table, factor, offset, *scratch, out)

    def weigh(values: np.ndarray, of: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> np.ndarray:
        first, count, weights, _ = of
        each = [weights[i, :n].astype(np.int64) for i, n in enumerate(count)]
        return np.stack([values[first[i] : first[i] + count[i]].T @ each[i] for i in range(len(first))])

    shift = row_table[3] - FRACTION_BITS
    summed = (
        np.stack([weigh(source[:, :, c].astype(np.int64), row_table) for c in range(3)]) + (1 << (shift - 1))
    ) >> shift
    sums = np.stack([weigh(plane.T, column_table).T for plane in summed])
    level = factor * np.float32(2.0 ** -(column_table[3] + FRACTION_BITS))
    expected = sums.astype(np.float32) * level[:, None, None] + offset[:, None, None]
    np.testing.assert_array_equal(out, expected)


def test_cmyk_kernel_and_twin() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (1000, 4), dtype=np.uint8)
    expected = (pixels[:, :3].astype(int) * pixels[:, 3:] + 127) // 255
    flat = pixels.reshape(-1).copy()
    cmyk_to_rgbx(flat)
    np.testing.assert_array_equal(flat.reshape(-1, 4)[:, :3], expected)
