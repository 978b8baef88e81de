"""The C unit (`native/`), called through ctypes, which lets go of the GIL: one call for a group of images.

It is there where a compiler and libjpeg-turbo's header were when fastload was installed, and in binary wheels.
Elsewhere simplejpeg and numba do the same work, with the same results, more slowly; `FASTLOAD_NATIVE=0` asks for that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import multiprocessing
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Keys, Offsets
from fastload.errors import ConfigError
from fastload.lifecycle import on_drop

__all__ = [
    "DAMAGED",
    "NOT_JPEG",
    "NO_MEMORY",
    "REFUSED",
    "ROW_PADDING",
    "Context",
    "DecodeReport",
    "Settings",
    "c_unit",
    "path",
    "why_not",
]

_ABI = 1
"""Of the functions and structures below; must be that of `native/image.c`."""

NOT_JPEG, DAMAGED, REFUSED, NO_MEMORY = 1, 2, 3, 4
ROW_PADDING = 32
"""Bytes behind pixels that are read, and do not count."""

_NOTE = Path(__file__).with_name("_native.txt")
_log = logging.getLogger("fastload.decode")


class Settings(ctypes.Structure):
    """What is the same for all images of a column; `struct settings` of `native/view.h`."""

    _fields_ = (
        ("area_min", ctypes.c_double),
        ("area_max", ctypes.c_double),
        ("log_ratio_min", ctypes.c_double),
        ("log_ratio_max", ctypes.c_double),
        ("flip", ctypes.c_double),
        ("pixels_max", ctypes.c_int64),
        ("factor", ctypes.c_float * 3),
        ("offset", ctypes.c_float * 3),
        ("mode", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("resize", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("turn", ctypes.c_int32),
        ("dct_scaling", ctypes.c_int32),
    )


class DecodeReport(ctypes.Structure):
    """Why an image was not decoded; `struct report` of `native/image.c`."""

    _fields_ = (
        ("code", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("message", ctypes.c_char * 200),
    )
    code: int
    width: int
    height: int
    message: bytes


@cache
def c_unit() -> ctypes.CDLL | None:
    """The C unit, or None where it was not built. `ConfigError` where it is not the one that belongs to this code."""
    if os.environ.get("FASTLOAD_NATIVE") == "0":
        return None
    found = path()
    if found is None and _speaks_for_its_node():
        _log.warning("images are decoded by simplejpeg, more slowly: fastload has no C unit here, %s", why_not())
    return None if found is None else _load(found)


def path() -> Path | None:
    """Where the C unit is, if it is anywhere."""
    # Python's own lookup finds it in every kind of installation; it is no module, and is not imported.
    spec = importlib.util.find_spec("fastload.decode._native")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def why_not() -> str:
    """Why there is no C unit, as its build has left word, and the cure."""
    try:
        reason = f"since {_NOTE.read_text()} when it was installed"
    except FileNotFoundError:
        reason = "since pip has not installed it"
    return (
        f"{reason}. Install gcc and libjpeg-turbo's headers (`apt install gcc libjpeg62-turbo-dev`), then fastload "
        "again; FASTLOAD_NATIVE=0 says that simplejpeg is wanted"
    )


def _speaks_for_its_node() -> bool:
    """Whether other processes of the same job leave it to this one to say what is true for all of them."""
    ranks = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
    is_worker = multiprocessing.current_process().daemon
    return not is_worker and all(os.environ.get(name, "0") == "0" for name in ranks)


def _load(path: Path) -> ctypes.CDLL:
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        raise ConfigError(f"{path} cannot be loaded: {error}; reinstall fastload, or set FASTLOAD_NATIVE=0") from error
    if found.fastload_abi() != _ABI:
        raise ConfigError(f"{path} belongs to another version of fastload; reinstall it, or set FASTLOAD_NATIVE=0")
    pointer, settings, report = ctypes.c_void_p, ctypes.POINTER(Settings), ctypes.POINTER(DecodeReport)
    int32, int64, uint64 = ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    found.fastload_new.restype = pointer
    found.fastload_free.argtypes = (pointer,)
    found.fastload_free.restype = None
    found.fastload_set_avx2.argtypes = (pointer, int32)
    found.fastload_decode.argtypes = (pointer, settings, pointer, pointer, pointer, int64, int64, pointer, report)
    found.fastload_decode.restype = int64
    found.fastload_resize.argtypes = (pointer, settings, uint64, pointer, int32, int32, int32, pointer)
    return found


class Context:
    """What one thread needs to call the C unit: its rows and tables."""

    def __init__(self, unit: ctypes.CDLL) -> None:
        self._unit = unit
        self._pointer = unit.fastload_new()
        if not self._pointer:
            raise MemoryError("no memory for a JPEG decoder")
        # At the interpreter's end other threads may still be decoding: the system takes the memory back.
        on_drop(self, unit.fastload_free, self._pointer)

    def set_avx2(self, wanted: bool) -> bool:
        """Whether to use AVX2, for tests of the other path; returns whether the processor has it."""
        return bool(self._unit.fastload_set_avx2(self._pointer, wanted))

    def decode(
        self,
        settings: Settings,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        keys: Keys | None,
        first: int,
        out: npt.NDArray[Any],
        report: DecodeReport,
    ) -> int:
        """Decode the JPEGs of a group from number `first` on into `out`. Returns the number of the first that is not
        decoded, with the reason in `report`, or the number of images.
        """
        count = len(offsets) - 1
        assert all(array.flags.c_contiguous for array in (values, offsets, out)), "arrays with gaps"
        assert offsets.dtype == np.int64, offsets.dtype
        assert 0 <= offsets[0] <= offsets[-1] <= len(values), f"offsets to {offsets[-1]} of {len(values)} bytes"
        assert (offsets[1:] >= offsets[:-1]).all(), "offsets that fall"
        assert len(out) == count, (out.shape, count)
        assert keys is None or (keys.dtype == np.uint64 and keys.shape == (count,) and keys.flags.c_contiguous)
        done: int = self._unit.fastload_decode(
            self._pointer,
            settings,
            values.ctypes.data,
            offsets.ctypes.data,
            None if keys is None else keys.ctypes.data,
            first,
            count,
            out.ctypes.data,
            report,
        )
        return done

    def resize(
        self, settings: Settings, key: int, pixels: npt.NDArray[np.uint8], orientation: int, out: npt.NDArray[Any]
    ) -> None:
        """Resize a picture (height, 4 * width; RGBX) that was decoded elsewhere; `ROW_PADDING` bytes behind it are
        read.
        """
        assert out.flags.c_contiguous
        height, width = pixels.shape[0], pixels.shape[1] // 4
        code = self._unit.fastload_resize(
            self._pointer, settings, key, pixels.ctypes.data, width, height, orientation, out.ctypes.data
        )
        if code:
            assert code == NO_MEMORY, code
            raise MemoryError(f"no memory to resize a picture of {width} x {height} pixels")
