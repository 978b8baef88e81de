"""npy files, against numpy's own reader and writer, and hostile ones."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastload import decode as fd
from fastload.errors import ConfigError, DecodeError
from tests.decode.helpers import decode, group, npy, where

_DTYPES = ["?", "i1", "u1", "<i2", ">i2", "<u4", ">u4", "<i8", "<f2", ">f4", "<f8", ">c8", "<c16"]


def forged(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("utf-8" if version == 3 else "latin-1")
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def head(descr: str = "'<f4'", fortran: str = "False", shape: str = "(2,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


@st.composite
def _arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(_DTYPES)))
    array = draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    return np.asfortranarray(array) if draw(st.booleans()) and array.ndim else array


@settings(deadline=None)
@given(_arrays(), st.sampled_from([(1, 0), (2, 0), (3, 0)]))
def test_as_numpy_reads_it(array: np.ndarray, version: tuple[int, int]) -> None:
    found = fd.array().decode_one(npy(array, version), "here")
    np.testing.assert_array_equal(found, array)
    assert found.shape == array.shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.dtype.isnative
    assert found.flags.writeable
    assert found.flags.c_contiguous
    assert found.flags.owndata or found.base is not None


@settings(deadline=None)
@given(st.lists(_arrays(), max_size=5), st.binary(max_size=3))
def test_a_batch_of_differing_shapes_is_a_list(arrays: list[np.ndarray], before: bytes) -> None:
    values, offsets = group([npy(array) for array in arrays], before)
    found = fd.array().decode(values, offsets, where)
    assert isinstance(found, list)
    for mine, theirs in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert not np.shares_memory(mine, values)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("source", ["<f4", ">f4", "<f8", "<i2", "?"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_declared_shape_and_dtype(order: str, source: str, count: int) -> None:
    arrays = [np.asarray((np.arange(6) + n).reshape(2, 3) % 5, source, order=order) for n in range(count)]
    decoder = fd.array((2, 3), "float32")
    assert decoder.fixed() == ((2, 3), np.dtype("float32"))
    out = np.zeros((count + 1, 2, 3), np.float32)
    decoder.decode_into(*group([npy(array) for array in arrays], b"x"), out[1:], where)
    np.testing.assert_array_equal(out[1:], np.array(arrays, np.float32).reshape(count, 2, 3))
    assert not out[0].any()


def test_files_of_one_length_that_are_not_alike() -> None:
    arrays = [np.arange(4, dtype="<f4"), np.arange(4, dtype=">f4"), np.arange(4, dtype="<i4")]
    out = np.zeros((3, 4), np.float32)
    fd.array(4, "f4").decode_into(*group([npy(array) for array in arrays]), out, where)
    assert (out == np.arange(4)).all()


def test_declared_shape_alone_takes_the_files_dtype() -> None:
    found = decode(fd.array(3), [npy(np.arange(3)), npy(np.arange(3) * 2)])
    assert found.dtype == np.int64
    assert found.tolist() == [[0, 1, 2], [0, 2, 4]]
    with pytest.raises(DecodeError, match=r"sample 1: column x: an array of float64 in a batch of int64"):
        decode(fd.array(3), [npy(np.arange(3)), npy(np.zeros(3))])


def test_scalars() -> None:
    assert decode(fd.array((), "f4"), [npy(np.array(1.5)), npy(np.array(2.5))]).tolist() == [1.5, 2.5]


@pytest.mark.parametrize("together", [True, False], ids=["alike", "one by one"])
def test_other_shape_or_kind_than_declared(together: bool) -> None:
    first = npy(np.zeros(3)) if together else npy(np.zeros(2, "f4"))
    place = "sample 0" if together else "sample 1"
    with pytest.raises(DecodeError, match=rf"{place}: column x: an array of shape \(3,\), not \(2,\)"):
        decode(fd.array(2, "f4"), [first, npy(np.zeros(3))])
    with pytest.raises(DecodeError, match="an array of float64 cannot be read as int64"):
        decode(fd.array(3, "i8"), [npy(np.zeros(3))] * 2)


def test_odd_but_valid_headers() -> None:
    data = np.arange(2, dtype="<f4").tobytes()
    for header in (
        head(),
        head() + " " * 40 + "\n",
        "{'shape': (2,), 'fortran_order': False, 'descr': '<f4'}",
        '{"descr": "<f4", "fortran_order": False, "shape": (2,)}',
        "{ 'descr' : '<f4' , 'fortran_order' : False , 'shape' : ( 2 , ) }",
    ):
        assert fd.array().decode_one(forged(header, data), "here").tolist() == [0, 1], header


def test_a_bool_is_zero_or_one() -> None:
    found = fd.array().decode_one(forged(head("'|b1'"), b"\x00\x07"), "here")
    assert found.view(np.uint8).tolist() == [0, 1]


def test_objects_are_never_unpickled() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return pytest.fail, ("unpickled",)

    file = io.BytesIO()
    np.save(file, np.array([Bomb()], object), allow_pickle=True)
    with pytest.raises(DecodeError, match=r"dtype '\|O'.*pickle"):
        fd.array().decode_one(file.getvalue(), "here")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"", "not an npy file"),
        (b"\x93NUMPY\x01\x00", "not an npy file"),
        (b"PK\x03\x04 an npz file", "not an npy file"),
        (forged(head(), b"x" * 8, version=4), "version 4.0"),
        (b"\x93NUMPY\x01\x07\x00\x00", "version 1.7"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "4294967295 bytes long; at most 10000"),
        (b"\x93NUMPY\x02\x00\x10\x00\x00\x00{", "header is 16 bytes long, but the file ends"),
        (b"\x93NUMPY\x02\x00\x10\x00", "header is .* bytes long, but the file ends"),
        (forged(head(shape="(3,)"), b"x" * 8), r"shape \(3,\) of float32 takes 12 bytes, but 8 follow"),
        (forged(head(shape="(1,)"), b"x" * 8), "takes 4 bytes, but 8 follow"),
        (forged(head(shape="(9999999999999999999, 9999999999999999999)")), "but 0 follow"),
        (forged(head(shape="(0, 9999999999999999999)")), "too large for numpy"),
        (forged(head(shape="(0, 4611686018427387904, 4611686018427387904)")), "too large for numpy"),
        (forged(head(shape="(-1,)")), "not a tuple of lengths"),
        (forged(head(shape="(2)")), "not a tuple of lengths"),
        (forged(head(shape="(02,)")), "not a tuple of lengths"),
        (forged(head(shape="(2,)\x85")), "not a dict"),
        (forged(head(shape="(,)")), "not a tuple of lengths"),
        (forged(head(shape="(True,)")), "not a tuple of lengths"),
        (forged(head(shape="(" + "1," * 40 + ")")), "40 dimensions"),
        (forged(head(shape="'x'")), "not a tuple of lengths"),
        (forged(head(shape="(" + "9" * 6000 + ",)")), "not a tuple of lengths"),
        (forged(head("[('a', '<f4', (2,)), ('b', '<i8')]")), "dtype .* only numbers"),
        (forged(head("[('\u017c', '<f4')]"), version=3), "dtype .*\u017c.* only numbers"),
        (forged(head("'<U3'")), "only numbers"),
        (forged(head("'<M8[ns]'")), "only numbers"),
        (forged(head("'f4,f4'")), "only numbers"),
        (forged(head("True")), "only numbers"),
        (forged(head(fortran="(1,)")), "neither True nor False"),
        (forged(head(fortran="1")), "not a dict"),
        (forged("{" * 9000), "not a dict"),
        (forged("(" * 9000), "not a dict"),
        (forged(""), "not a dict"),
        (forged("{}"), "not a dict"),
        (forged("}{"), "not a dict"),
        (forged(head()[:-1] + "'more': 'x'}", b"x" * 8), "not a dict"),
        (forged("__import__('os').system('false')"), "not a dict"),
        (forged(head("__import__('os')")), "not a dict"),
        (b"\x93NUMPY\x03\x00\x02\x00\x00\x00\xff\xfe", "not a dict"),
    ],
)
def test_hostile_files(bad: bytes, message: str) -> None:
    for decoder in (fd.array(), fd.array(2), fd.array(2, "f4")):
        with pytest.raises(DecodeError, match=rf"sample 0: column x: .*{message}"):
            decode(decoder, [bad])
        with pytest.raises(DecodeError, match=rf"sample 0: column x: .*{message}"):
            decode(decoder, [bad, bad])


@settings(deadline=None)
@given(st.data())
def test_any_change_is_read_as_numpy_reads_it_or_an_error(data: st.DataObject) -> None:
    file = bytearray(npy(data.draw(_arrays()), data.draw(st.sampled_from([(1, 0), (2, 0), (3, 0)]))))
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(file[: data.draw(st.integers(0, len(file)))]) if data.draw(st.booleans()) else bytes(file)
    try:
        found = fd.array().decode_one(cut, "here")
    except DecodeError:
        return
    theirs = np.load(io.BytesIO(cut), allow_pickle=False)
    assert found.shape == theirs.shape
    if theirs.dtype.kind != "b":
        assert found.tobytes() == theirs.astype(found.dtype).tobytes()


@settings(deadline=None)
@given(st.text("{}()[]'\",: 0123456789TrueFalsdcphnotL<f4|\\\n", max_size=80))
def test_any_header_text(text: str) -> None:
    with pytest.raises(DecodeError, match=r"^here: "):
        fd.array().decode_one(forged(text, b"x" * 3), "here")


@pytest.mark.parametrize("shape", ["x", (1.5,), -1, (True,), (2, None), {3}])
def test_arguments_shape(shape: object) -> None:
    with pytest.raises(ConfigError, match="shape="):
        fd.array(shape)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["nonsense", object, "U3", "i4,i4", "M8[ns]", "float128"])
def test_arguments_dtype(dtype: object) -> None:
    with pytest.raises(ConfigError, match="dtype="):
        fd.array(3, dtype)  # type: ignore[arg-type]
