r"""Arrays in numpy's npy format, read by a parser of our own that trusts nothing.

The format (versions 1 to 3): the magic `\x93NUMPY`, major and minor version (a byte each), the length of
the header (uint16, from version 2 on uint32, little-endian), the header, which is the text of a Python dict
with exactly the keys `descr`, `fortran_order` and `shape`, then the elements.

Refused, since the bytes come from elsewhere: anything that would need pickle; headers over 10,000 bytes (numpy's own
limit); shapes that are not exactly as large as what follows; kinds other than numbers and booleans, because a batch of
them cannot become a tensor. Regular expressions take the header apart. numpy's own readers (`read_array_header_1_0` and
`_2_0`) are not used: there is none for version 3, and with hostile headers they print warnings, raise MemoryError or
TokenError, and accept lengths such as -1 and True.

Samples of one column mostly have the same header, byte for byte. So parsed headers are remembered, and a
group in which all are alike is converted by one numpy call.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Fixed, Keys, Offsets, Where, each, located
from fastload.errors import ConfigError, DecodeError
from fastload.ragged import Ragged

__all__ = ["NpyArray", "array", "converted", "declared_dtype", "declared_shape", "read_npy"]

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES_MAX = 10_000
_DIMENSIONS_MAX = 32  # of numpy 1; torch has no more than 64
_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)|\?")
_SPACES = " \t\n"  # not \s: Python, which wrote the header, knows no others
_ENTRY = re.compile(
    rf"""[{_SPACES}]*['"](\w+)['"][{_SPACES}]*:[{_SPACES}]*"""
    r"""('[^'\\]*'|"[^"\\]*"|True|False|\([^()]*\)|\[.*\])"""
    rf"""[{_SPACES}]*(?:,|(?=\}}$))""",
    re.DOTALL,
)
_LENGTH = rf"[{_SPACES}]*(?:0|[1-9][0-9]{{0,18}})[{_SPACES}]*"
_SHAPE = re.compile(rf"\([{_SPACES}]*\)|\({_LENGTH},[{_SPACES}]*\)|\({_LENGTH}(,{_LENGTH})+,?[{_SPACES}]*\)")


@dataclass(frozen=True, slots=True)
class NpyHeader:
    """What a header says: dtype (in the file's byte order), shape and order of the elements, and where they
    start.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran_order: bool
    data_start: int

    @property
    def data_bytes(self) -> int:
        """Bytes that the elements take, as a Python int, so that no shape overflows."""
        count = self.dtype.itemsize
        for length in self.shape:
            count *= length
        return count


def read_npy(value: memoryview) -> npt.NDArray[Any]:
    """The array in `value`: a read-only view, where order and bytes allow, else a copy. Raises
    `DecodeError`.
    """
    header = read_header(value)
    _check_length(header, len(value))
    flat = np.frombuffer(value, np.uint8, offset=header.data_start)
    return _elements(flat, header, header.shape)


def read_header(value: memoryview) -> NpyHeader:
    """The checked header; raises `DecodeError`."""
    if len(value) < 10 or value[:6] != _MAGIC:
        raise DecodeError(f"not an npy file: it starts with {bytes(value[:10])!r} and is {len(value)} bytes long")
    version = (value[6], value[7])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise DecodeError(f"npy version {version[0]}.{version[1]} is unknown; 1.0, 2.0 and 3.0 are read")
    text_start = 10 if version == (1, 0) else 12
    header_bytes = int.from_bytes(value[8:text_start], "little")
    if header_bytes > _HEADER_BYTES_MAX:
        raise DecodeError(f"the npy header says it is {header_bytes} bytes long; at most {_HEADER_BYTES_MAX} are read")
    if text_start + header_bytes > len(value):
        raise DecodeError(f"the npy header is {header_bytes} bytes long, but the file ends at byte {len(value)}")
    return _parse(bytes(value[: text_start + header_bytes]), text_start)


@lru_cache(maxsize=256)  # of at most 10 kB each
def _parse(head: bytes, text_start: int) -> NpyHeader:
    text = head[text_start:].decode("utf-8" if head[6] == 3 else "latin-1", "replace")
    fields = _fields(text)
    if set(fields) != {"descr", "fortran_order", "shape"}:
        raise DecodeError(f"the npy header {text[:80]!r} is not a dict of exactly descr, fortran_order and shape")
    if fields["fortran_order"] not in ("True", "False"):
        raise DecodeError(f"fortran_order {fields['fortran_order']} in the npy header is neither True nor False")
    return NpyHeader(_dtype(fields["descr"]), _shape(fields["shape"]), fields["fortran_order"] == "True", len(head))


def _fields(text: str) -> dict[str, str]:
    """The entries of a dict, values as they are written; nothing where it is not a dict of such entries."""
    body = text.strip(_SPACES)
    if len(body) < 2 or body[0] != "{" or body[-1] != "}":
        return {}
    fields: dict[str, str] = {}
    at = 1
    while entry := _ENTRY.match(body, at):
        fields[entry[1]] = entry[2]
        at = entry.end()
    return fields if not body[at:-1].strip(_SPACES) else {}


def _dtype(descr: str) -> np.dtype[Any]:
    if not _NUMBER.fullmatch(descr[1:-1]):
        raise DecodeError(
            f"npy dtype {descr[:80]}: only numbers and booleans are decoded, never objects, which would need "
            "pickle; raw() gives the bytes"
        )
    return np.dtype(descr[1:-1])


def _shape(shape: str) -> tuple[int, ...]:
    if not _SHAPE.fullmatch(shape):
        raise DecodeError(f"npy shape {shape[:80]} is not a tuple of lengths")
    lengths = tuple(int(length) for length in re.findall("[0-9]+", shape))
    if len(lengths) > _DIMENSIONS_MAX:
        raise DecodeError(f"npy shape has {len(lengths)} dimensions; at most {_DIMENSIONS_MAX} are read")
    return lengths


def _check_length(header: NpyHeader, file_bytes: int) -> None:
    there = file_bytes - header.data_start
    if header.data_bytes != there:
        raise DecodeError(
            f"npy shape {header.shape} of {header.dtype} takes {header.data_bytes} bytes, but {there} follow the header"
        )


def _elements(data: npt.NDArray[np.uint8], header: NpyHeader, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """`data` (bytes, last axis contiguous) seen as elements of `shape`."""
    # A bool that is neither 0 nor 1 breaks the code that gets it.
    elements = data != 0 if header.dtype.kind == "b" else data.view(header.dtype)
    try:
        return elements.reshape(shape, order="F" if header.fortran_order else "C")
    except (
        ValueError,
        OverflowError,
    ) as error:  # an empty array whose other lengths are beyond what numpy can hold
        raise DecodeError(f"npy shape {header.shape} is too large for numpy") from error


@dataclass(frozen=True, slots=True)
class NpyArray(Decoder):
    """See `array`."""

    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None
    default: bytes | None = None  # in the npy format, so that decoders compare and no two samples share it

    def missing(self) -> npt.NDArray[Any] | None:
        return None if self.default is None else self._decode(memoryview(self.default))

    def takes_missing(self) -> bool:
        return self.shape is None or self.default is not None

    def fixed(self) -> Fixed | None:
        return (self.shape, self.dtype) if self.shape is not None and self.dtype is not None else None

    def _read(self, value: memoryview) -> npt.NDArray[Any]:
        """The array as in the file, once shape and dtype are known to suit."""
        found = read_npy(value)
        if self.shape is not None and found.shape != self.shape:
            raise DecodeError(
                f"an array of shape {found.shape}, not {self.shape} as declared; array() takes differing shapes"
            )
        if self.dtype is not None and not np.can_cast(found.dtype, self.dtype, "same_kind"):
            raise DecodeError(f"an array of {found.dtype} cannot be read as {self.dtype}")
        return found

    def _decode(self, value: memoryview) -> npt.NDArray[Any]:
        found = self._read(value)
        return np.array(found, dtype=self.dtype or found.dtype.newbyteorder("="), order="C")

    def decode_into(
        self,
        values: npt.NDArray[np.uint8],
        offsets: Offsets,
        out: npt.NDArray[Any],
        where: Where,
        keys: Keys | None = None,
    ) -> None:
        assert (self.shape, self.dtype) == (out.shape[1:], out.dtype), (self, out.shape, out.dtype)
        rows = _alike(values, offsets)
        if rows is not None:
            self._decode_alike(rows, out, where)
            return

        def place(number: int, value: memoryview) -> None:
            np.copyto(out[number], self._read(value), casting="same_kind")

        each(values, offsets, where, place)

    def _decode_alike(self, rows: npt.NDArray[np.uint8], out: npt.NDArray[Any], where: Where) -> None:
        """Decode files (n, file_bytes) that all begin with the same C-order header."""
        try:
            self._read(rows[0].data)
        except DecodeError as error:
            raise located(error, where(0)) from error.__cause__
        header = read_header(rows[0].data)
        found = _elements(rows[:, header.data_start :], header, out.shape)
        np.copyto(out, found, casting="same_kind")

    def decode(
        self, values: npt.NDArray[np.uint8], offsets: Offsets, where: Where, keys: Keys | None = None
    ) -> Ragged | list[Any] | npt.NDArray[Any]:
        if self.shape is None or self.dtype is not None:
            return super(NpyArray, self).decode(values, offsets, where)
        rows: Any = super(NpyArray, self).decode(values, offsets, where)  # a list, since `fixed()` is None
        for number, row in enumerate(rows):
            if row.dtype != rows[0].dtype:
                raise DecodeError(
                    f"{where(number)}: an array of {row.dtype} in a batch of {rows[0].dtype}; "
                    "declare array(shape, dtype)"
                )
        return np.stack(rows) if rows else np.empty((0, *self.shape), np.float32)


def _alike(values: npt.NDArray[np.uint8], offsets: Offsets) -> npt.NDArray[np.uint8] | None:
    """The files as rows of one array, where all have one length and one C-order header; else None."""
    lengths = np.diff(offsets)
    if len(lengths) < 2 or (lengths != lengths[0]).any() or lengths[0] < 10:
        return None
    rows = values[offsets[0] : offsets[-1]].reshape(len(lengths), -1)
    try:
        header = read_header(rows[0].data)
    except DecodeError:  # raised again below, for the one sample
        return None
    same = (rows[:, : header.data_start] == rows[0, : header.data_start]).all()
    return rows if same and not header.fortran_order else None


def array(
    shape: int | tuple[int, ...] | None = None,
    dtype: npt.DTypeLike | None = None,
    *,
    default: npt.ArrayLike | None = None,
) -> Decoder:
    """A numpy array in the npy format, of numbers or booleans.

    Without `shape`: arrays of any shape; a batch is a list of them. With `shape`: each must have it, and a
    batch is one array (n, *shape), of `dtype` or, without it, of the dtype that all files of the batch have.
    `dtype` converts, within a kind and from integers to floats. Anything else is a `DecodeError`; arguments
    that are no shape or number type are a `ConfigError`. Pickle is never run.

    `default` stands for the value of samples that lack an optional column: an array, or a number that fills `shape`.
    With `shape` it needs `dtype`, too. Without a default, samples and lists have None there.
    """
    declared = NpyArray(None if shape is None else declared_shape(shape), declared_dtype(dtype))
    return declared if default is None else replace(declared, default=_declared_default(default, declared))


def _declared_default(default: npt.ArrayLike, declared: NpyArray) -> bytes:
    if declared.shape is not None and declared.dtype is None:
        raise ConfigError(
            f"default={default!r} needs dtype=, which a batch has where all of its samples lack the array"
        )
    try:
        given = np.asarray(default)
        shape = given.shape if declared.shape is None else declared.shape
        found = np.array(np.broadcast_to(converted(given, declared.dtype or given.dtype), shape), order="C")
    except (TypeError, ValueError) as error:
        wanted = "numbers" if declared.shape is None else f"{declared.dtype} of shape {declared.shape}"
        raise ConfigError(f"default={default!r} is no array of {wanted}: {error}") from error
    out = io.BytesIO()
    np.save(out, found, allow_pickle=False)
    return out.getvalue()


def converted(given: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The numbers as `dtype`. TypeError where that changes more than rounding floats does."""
    if not _NUMBER.fullmatch(given.dtype.str) or given.dtype.kind == "c" != dtype.kind:
        raise TypeError(f"{given.dtype} is not {dtype}")
    with np.errstate(invalid="ignore", over="ignore"):
        found = given.astype(dtype)
    if dtype.kind not in "fc" and not np.array_equal(found, given):
        raise TypeError(f"{given} is not {dtype}")
    return found


def declared_shape(shape: object) -> tuple[int, ...]:
    """The shape that a user gave. Raises `ConfigError`."""
    lengths = shape if isinstance(shape, tuple | list) else (shape,)
    if not all(isinstance(length, int) and not isinstance(length, bool) and length >= 0 for length in lengths):
        raise ConfigError(f"shape={shape!r} is not a shape; give a tuple of lengths such as (3, 224, 224)")
    return tuple(lengths)


def declared_dtype(dtype: npt.DTypeLike | None) -> np.dtype[Any] | None:
    """The number type that a user gave, in the machine's byte order. Raises `ConfigError`."""
    if dtype is None:
        return None
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise ConfigError(f'dtype={dtype!r} is not a numpy dtype; "float32" is one') from error
    if not _NUMBER.fullmatch(found.str):
        raise ConfigError(f'dtype={dtype!r} is not a number type of up to 64 bits a part; "float32" is one')
    return found.newbyteorder("=")
