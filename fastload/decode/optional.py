"""Columns that samples may lack: decoding the values that there are, and putting what stands for the others between.

A decoder never sees a value that is missing: the values of a group lie end to end and a missing one takes no bytes, so
leaving it out is leaving out its offset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastload.decode.base import Decoder, Keys, Offsets, Where
from fastload.errors import ConfigError
from fastload.ragged import Ragged

__all__ = ["Present", "check_missing", "decode_optional"]

Present = npt.NDArray[np.bool_]
Room = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]


def check_missing(decoder: Decoder) -> None:
    """Raise `ConfigError` where nothing can stand for a missing value."""
    if not decoder.takes_missing():
        raise ConfigError("batches of it are tensors, which have no room for a value that is missing")
    fixed = decoder.fixed()
    if fixed is not None:
        shape, dtype = fixed
        try:
            np.empty(shape, dtype)[...] = decoder.missing()
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"its default does not fit {dtype}{list(shape)}: {error}") from error


def decode_optional(
    decoder: Decoder,
    values: npt.NDArray[np.uint8],
    offsets: Offsets,
    present: Present,
    where: Where,
    keys: Keys | None,
    room: Room,
) -> Ragged | list[Any] | npt.NDArray[Any]:
    """As `decoder.decode_into` or `decode`, of a group in which only the samples that are `present` have a value. To
    a decoder that works in place, `values` are given away (see `decode_owned`). `room` makes the array of a batch of
    fixed shape.
    """
    there = np.flatnonzero(present)
    offsets = offsets[np.append(there, len(present))]
    if keys is not None:
        keys = keys[there]

    def place(number: int) -> str:
        return where(int(there[number]))

    fixed = decoder.fixed()
    if fixed is not None:
        out = room((len(present), *fixed[0]), fixed[1])
        decoder.decode_into(values, offsets, out[: len(there)], place, keys)
        return _spread_rows(out, there, present, decoder)
    rows = (decoder.decode_owned if decoder.is_in_place else decoder.decode)(values, offsets, place, keys)
    if isinstance(rows, Ragged):
        return _spread_ragged(rows, present, decoder.missing())
    if isinstance(rows, np.ndarray):
        out = np.empty((len(present), *rows.shape[1:]), rows.dtype)
        out[: len(there)] = rows
        if decoder.missing() is None and len(there) < len(present):
            lacking = where(int(np.flatnonzero(~present)[0]))
            raise ConfigError(f"{lacking}: the sample lacks it, and {decoder} makes arrays, with no room for that")
        return _spread_rows(out, there, present, decoder)
    decoded = iter(rows)
    return [next(decoded) if is_there else decoder.missing() for is_there in present.tolist()]


def _spread_rows(
    out: npt.NDArray[Any], there: npt.NDArray[np.int64], present: Present, decoder: Decoder
) -> npt.NDArray[Any]:
    """Move the first rows to where samples are `there`; the others are the decoder's `missing()`."""
    if len(there) < len(out):
        out[there] = out[: len(there)].copy()
        out[~present] = decoder.missing()
    return out


def _spread_ragged(rows: Ragged, present: Present, missing: Any) -> Ragged:
    spread = rows.spread(present)
    if missing is None:
        return spread
    item = np.frombuffer(missing, np.uint8) if rows.kind == "bytes" else np.asarray(missing, rows.values.dtype)
    lacking = np.flatnonzero(~present)
    at = np.repeat(spread.offsets[lacking], item.size)
    values = np.insert(spread.values, at, np.tile(item.reshape(-1), len(lacking)))
    offsets = spread.offsets + item.size * np.append(0, np.cumsum(~present))
    shapes = None
    if rows.shapes is not None or item.ndim != 1:
        of_rows = iter(rows.shapes or [(length,) for length in rows.lengths.tolist()])
        shapes = [next(of_rows) if is_there else item.shape for is_there in present.tolist()]
    return Ragged(values, offsets, shapes, rows.kind)
