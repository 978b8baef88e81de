"""Archives for tests, written by Python's tarfile or block by block, and what tarfile and webdataset see in them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_iterator

from fastload.formats import ShardIndex
from fastload.formats.tar import TarIndexer

URL = "s3://bucket/train-000000.tar"
BLOCK = 512


@dataclass(frozen=True)
class Member:
    """One member to write."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    target: str = ""


def write(members: Iterable[Member], form: int = tarfile.GNU_FORMAT, **options: object) -> bytes:
    """An archive as tarfile writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, **options) as archive:  # type: ignore[call-overload]
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname = member.kind, member.target
            info.size = len(member.data) if member.kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(member.data))
    return out.getvalue()


def header(
    name: bytes,
    size: bytes | int = 0,
    kind: bytes = b"0",
    *,
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    signed: bool = False,
) -> bytes:
    """One header block, with the checksum that belongs to it."""
    field = size if isinstance(size, bytes) else b"%011o\x00" % size
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field.ljust(12, b"\0"))
    block += b"00000000000\0" + b" " * 8 + kind + b"\0" * 100 + magic + b"\0" * 80
    block += prefix.ljust(155, b"\0") + b"\0" * 12
    assert len(block) == BLOCK
    total = sum(block) - (256 * sum(byte >> 7 for byte in block) if signed else 0)
    block[148:156] = b"%06o\0 " % total
    return bytes(block)


def padded(data: bytes) -> bytes:
    """`data` filled up to a whole block."""
    return data + b"\0" * (-len(data) % BLOCK)


def pax(records: dict[str, str | bytes], kind: bytes = b"x") -> bytes:
    """A pax header of its own, with its payload."""
    body = b""
    for key, value in records.items():
        tail = b" %b=%b\n" % (key.encode(), value if isinstance(value, bytes) else value.encode())
        length = len(tail) + 1
        while len(b"%d" % length) + len(tail) != length:
            length += 1
        body += b"%d" % length + tail
    return header(b"pax", len(body), kind) + padded(body)


def index(data: bytes, chunk_bytes: int = 4096, skip: bool = True) -> ShardIndex:
    """The index of an archive that comes in chunks; with `skip`, only those that the indexer asks for."""
    indexer = TarIndexer(URL, len(data))
    array = np.frombuffer(data, np.uint8)
    start = 0
    while start < len(data) and not indexer.done:
        indexer.feed(array[start : start + chunk_bytes], start)
        start = (
            max(start + chunk_bytes, indexer.next_offset // chunk_bytes * chunk_bytes) if skip else start + chunk_bytes
        )
    return indexer.finish()


def members_of(found: ShardIndex, column: str) -> np.ndarray:
    """int64[S]: per sample, the number of its member in `column`, or -1 where it has none."""
    numbers = np.full(found.sample_count, -1, np.int64)
    if column in found.columns:
        members = np.flatnonzero(found.member_column == found.columns.index(column))
        numbers[np.searchsorted(found.member_start, members, side="right") - 1] = members
    return numbers


def as_samples(found: ShardIndex, data: bytes) -> list[dict[str, object]]:
    """What an index says, in plain Python."""
    samples = []
    for number in range(found.sample_count):
        sample: dict[str, object] = {"__key__": found.key(number)}
        for member in range(found.member_start[number], found.member_start[number + 1]):
            at, size = found.member_offset[member], found.member_size[member]
            sample[found.columns[found.member_column[member]]] = data[at : at + size]
        samples.append(sample)
    return samples


def from_webdataset(data: bytes) -> list[dict[str, object]]:
    """The samples of an archive as webdataset groups them; errors come out."""

    def files() -> Iterable[dict[str, object]]:
        for item in tar_file_iterator(io.BytesIO(data)):
            name = item["fname"]
            # webdataset's pattern makes "folder/.hidden" the column "hidden" of a sample "folder/", which nobody can
            # mean; a base name that starts with a dot is passed over here.
            if name.rpartition("/")[2].startswith("."):
                continue
            yield {**item, "__url__": URL}

    return [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        for sample in group_by_keys(files())
    ]


def from_tarfile(data: bytes) -> Sequence[tuple[str, int, int]]:
    """Name, offset and size of the regular members that tarfile sees."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        return [(m.name, m.offset_data, m.size) for m in archive.getmembers() if m.isreg()]
