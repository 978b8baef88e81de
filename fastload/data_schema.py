"""`fastload.schema`: which columns a data set has, before anything is trained on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fastload.callers import public
from fastload.client.cache import AnyCache
from fastload.dataset import StreamingDataset
from fastload.errors import ConfigError
from fastload.formats import Format, ShardIndex, record_reader
from fastload.formats.records import RecordReader

__all__ = ["Column", "schema"]


class Column(NamedTuple):
    """What a column's values are, where no `decode=` says otherwise.

    `dtype`: a numpy dtype for numbers and arrays of them, otherwise a type: `bytes`, `str`, or `object` for what may be
    anything. `shape`: of each value, `()` for a number; None where values differ in it. `encoding`: how it is stored,
    in the format's own words.
    """

    dtype: Any
    shape: tuple[int, ...] | None
    encoding: str


@public
def schema(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    cache: AnyCache = None,
    format: Format = "auto",  # noqa: A002  # as a data set calls it
    split: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Column]:
    """The columns of the data at `urls`, by name in their stored order: those of its first shard, which is indexed for
    it where that was not done before. A shard that cannot be read is named by a warning, and the next one is taken.
    Arguments as of `StreamingDataset`. ShardError where no shard can be read.
    """
    dataset = StreamingDataset(urls, cache=cache, format=format, split=split, storage_options=storage_options)
    try:
        index = dataset.first_index()
    finally:
        dataset.close()
    if isinstance(index, ShardIndex):
        return {name: Column(bytes, None, "a member of a tar") for name in index.columns}
    read = record_reader(index.layout)
    return {name: _column(read, name) for name in read.columns}


def _column(read: RecordReader, name: str) -> Column:
    try:
        dtype, shape = read.decoder(name).gives()
    except ConfigError:  # its values are not decoded: pickles, and what a format has beside what we read
        dtype, shape = object, None
    return Column(dtype, shape, read.kind(name))
