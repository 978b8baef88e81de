"""The C unit beside its fallback: the same values, to the bit, for every kind of JPEG and every choice."""

from __future__ import annotations

import ctypes
import gc
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastload import decode as fd
from fastload.decode import native
from fastload.decode.base import Decoder, sample_keys
from fastload.decode.workspace import workspace
from fastload.errors import ConfigError, DecodeError
from tests.decode import pictures
from tests.decode.helpers import decode, group, where
from tests.native import fuzz

pytestmark = pytest.mark.skipif(
    native.c_unit() is None,
    reason="the C unit was not built: no compiler or no libjpeg-turbo header when fastload was installed",
)

KEYS = sample_keys(1, 0, np.zeros(1000, np.int64), np.arange(1000))


def random_decoder(rng: np.random.Generator) -> Decoder:
    """Any that `image` can make, small."""
    size = int(rng.choice([1, 7, 32, 64, 100]))
    options: dict[str, object] = {
        "hflip": float(rng.choice([0, 0.5, 1])),
        "dtype": str(rng.choice(["float32", "uint8", "float16"])),
        "layout": str(rng.choice(["NCHW", "NHWC"])),
        "dct_scaling": bool(rng.integers(2)),
        "exif_orientation": bool(rng.integers(2)),
    }
    if options["dtype"] != "uint8" and rng.integers(2):
        options |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    match rng.integers(3):
        case 0:
            options["size"] = size
        case 1:
            options |= {"size": size, "random_resized_crop": True}
        case _:
            options |= {"resize": size + int(rng.integers(40)), "center_crop": size}
    return fd.image(**options)  # type: ignore[arg-type]


def without_unit(monkeypatch: pytest.MonkeyPatch, decoder: Decoder, data: bytes, key: int) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(native, "c_unit", lambda: None)
        found: np.ndarray = decoder.decode_one(data, "here", key)
    return found


def test_the_same_as_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    for key in KEYS[:400]:
        data, decoder = pictures.random_jpeg(rng), random_decoder(rng)
        found = decoder.decode_one(data, "here", int(key))
        np.testing.assert_array_equal(found, without_unit(monkeypatch, decoder, data, int(key)), str(decoder))


def test_the_same_with_other_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(12)
    from tests.decode.test_image import encoded

    for key in KEYS[:60]:
        data = encoded(pictures.random_photo(rng, 200), str(rng.choice(["PNG", "WEBP", "BMP"])))
        decoder = random_decoder(rng)
        found = decoder.decode_one(data, "here", int(key))
        np.testing.assert_array_equal(found, without_unit(monkeypatch, decoder, data, int(key)), str(decoder))


@pytest.mark.parametrize("chroma", pictures.CHROMA)
@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_the_edges_of_a_region_are_those_of_a_full_decode(
    monkeypatch: pytest.MonkeyPatch, chroma: str, options: dict[str, object]
) -> None:
    """Crops at every offset within a block, upscaled so that each pixel shows."""
    data = pictures.jpeg(pictures.photographs()[0][150:250, 170:290], chroma, 85, **options)
    decoder = fd.image(40, random_resized_crop=((0.002, 0.1), (0.2, 5)))
    for key in KEYS[:300]:
        found = decoder.decode_one(data, "here", int(key))
        np.testing.assert_array_equal(found, without_unit(monkeypatch, decoder, data, int(key)))


def test_the_same_without_avx2() -> None:
    context = workspace.context()
    assert context is not None
    rng = np.random.default_rng(13)
    cases = [(pictures.random_jpeg(rng), random_decoder(rng), int(key)) for key in KEYS[:150]]
    found = [decoder.decode_one(data, "here", key) for data, decoder, key in cases]
    if not context.set_avx2(False):
        pytest.skip("this processor has no AVX2")
    try:
        for (data, decoder, key), expected in zip(cases, found, strict=True):
            np.testing.assert_array_equal(decoder.decode_one(data, "here", key), expected, str(decoder))
    finally:
        context.set_avx2(True)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_any_damage_is_an_error_or_a_picture(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(pictures.CHROMA))
    options = data.draw(st.sampled_from([{}, {"progressive": True}, {"restart_marker_blocks": 2}]))
    file = bytearray(pictures.jpeg(pictures.photographs()[3][:40, :50], kind, 75, **options))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(3, len(file) - 1))] = data.draw(st.integers(0, 255))
    decoder = random_decoder(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))))
    try:
        found = decoder.decode_one(bytes(file), "here", data.draw(st.integers(0, 2**64 - 1)))
    except DecodeError:
        return
    assert np.isfinite(found).all()


def patched(data: bytes, marker: bytes, at: int, new: bytes) -> bytes:
    """`data` with `new` at byte `at` behind the first `marker`."""
    start = data.index(marker) + 2 + at
    return data[:start] + new + data[start + len(new) :]


_PLAIN = pictures.jpeg(pictures.photographs()[3][:40, :50], "420", 75)
_HOSTILE = {
    "no height": patched(_PLAIN, b"\xff\xc0", 3, b"\0\0"),
    "no width": patched(_PLAIN, b"\xff\xc0", 5, b"\0\0"),
    "12 bits": patched(_PLAIN, b"\xff\xc0", 2, b"\x0c"),
    "lossless": _PLAIN.replace(b"\xff\xc0", b"\xff\xc3"),
    "arithmetic": _PLAIN.replace(b"\xff\xc0", b"\xff\xc9"),
    "a sampling factor of 0": patched(_PLAIN, b"\xff\xc0", 9, b"\x02"),
    "sampling factors that do not divide": patched(_PLAIN, b"\xff\xc0", 9, b"\x32"),
    "luma below chroma": patched(_PLAIN, b"\xff\xc0", 12, b"\x44"),
    "no quantisation table": _PLAIN.replace(b"\xff\xdb", b"\xff\xe5"),
    "no Huffman table": _PLAIN.replace(b"\xff\xc4", b"\xff\xe5"),
    "a segment of no length": patched(_PLAIN, b"\xff\xdb", 0, b"\0\0"),
    "a segment beyond the end": patched(_PLAIN, b"\xff\xdb", 0, b"\xff\xff"),
    "two frames": _PLAIN[:-2] + _PLAIN[2:],
    **{path.stem: path.read_bytes() for path in sorted((Path(__file__).parent / "found").glob("*.jpg"))},
}
# libjpeg takes the first for what it says it is, has tables for the second, and never comes to the second frame.
_UNNOTICED = {"arithmetic", "no Huffman table", "two frames"}


@pytest.mark.parametrize("name", sorted(_HOSTILE))
def test_hostile_files_are_errors(name: str) -> None:
    """Hand-made ones, and what fuzzing has found."""
    fd.image(8).decode_one(_PLAIN, "here")  # whose tables must not serve the next file
    for size in (1, 32):
        decoder = fd.image(size, random_resized_crop=True, exif_orientation=True, dct_scaling=True)
        for key in KEYS[:10]:
            if name in _UNNOTICED:
                assert np.isfinite(decoder.decode_one(_HOSTILE[name], "here", int(key))).all()
            else:
                with pytest.raises(DecodeError, match=r"^here: "):
                    decoder.decode_one(_HOSTILE[name], "here", int(key))


def test_an_error_names_the_first_that_failed_and_the_rest_of_a_thread_is_unharmed() -> None:
    good = pictures.jpeg(pictures.photographs()[1][:50, :60], "420")
    expected = fd.image(16).decode_one(good, "here")
    bad = good[:200] + b"\xff\xd9"
    for _ in range(50):
        with pytest.raises(DecodeError, match=r"^s3://b/t.tar: sample 2: column x: damaged JPEG of 202 bytes: "):
            decode(fd.image(16), [good, good, bad, good, bad])
        np.testing.assert_array_equal(fd.image(16).decode_one(good, "here"), expected)


def test_threads_have_contexts_of_their_own_and_give_them_back() -> None:
    rng = np.random.default_rng(14)
    values, offsets = group([pictures.random_jpeg(rng, 200) for _ in range(20)])
    decoder = fd.image(48, random_resized_crop=True)
    expected = decoder.decode(values, offsets, where, KEYS[:20].copy())
    barrier = threading.Barrier(4)

    def work(_: int) -> bool:
        barrier.wait()
        return all(np.array_equal(decoder.decode(values, offsets, where, KEYS[:20].copy()), expected) for _ in range(5))

    gc.collect()
    before = sum(type(each) is native.Context for each in gc.get_objects())
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    gc.collect()
    assert sum(type(each) is native.Context for each in gc.get_objects()) == before


def test_a_unit_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ABI", 999)
    unit = native.c_unit()
    assert unit is not None
    with pytest.raises(ConfigError, match="another version of fastload; reinstall"):
        native._load(Path(unit._name))
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"no library")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        native._load(broken)


def test_structures_have_the_size_that_c_gives_them() -> None:
    assert ctypes.sizeof(native.Settings) == 5 * 8 + 8 + 6 * 4 + 7 * 4 + 4
    assert ctypes.sizeof(native.DecodeReport) == 212


def test_the_environment_can_ask_for_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLOAD_NATIVE", "0")
    assert native.c_unit.__wrapped__() is None
    monkeypatch.setenv("FASTLOAD_NATIVE", "1")
    assert native.c_unit.__wrapped__() is not None


def test_where_it_is_missing_one_process_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(native, "_NOTE", tmp_path / "_native.txt")
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert native.c_unit.__wrapped__() is None
    native._NOTE.write_text("there was no working C compiler")
    for rank in range(4):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert native.c_unit.__wrapped__() is None
    monkeypatch.setenv("FASTLOAD_NATIVE", "0")
    assert native.c_unit.__wrapped__() is None
    first, second = caplog.messages
    assert "fastload has no C unit here, since pip has not installed it. Install gcc and libjpeg-turbo's" in first
    assert "since there was no working C compiler when it was installed. Install gcc" in second


@pytest.mark.slow
def test_the_sanitizers_have_nothing_to_say(tmp_path: Path) -> None:
    """Two seconds of what `make fuzz` does for ten minutes: some 15,000 damaged files."""
    if shutil.which(fuzz.compiler()) is None:
        pytest.skip("no compiler")
    assert fuzz.run(tmp_path, seconds=2, seed=1) == 0
