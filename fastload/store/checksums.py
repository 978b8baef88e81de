"""Checksums that a reply carries: which of them cover the very bytes that came, and whether these have it.

Over plain HTTP nothing else protects bytes on their way but TCP's sum of 16 bits; over TLS every record is
authenticated, and there nothing of this is used. A checksum counts where it is certain what it is of:

- `Content-Digest` (RFC 9530): of what the reply holds, whatever range that is;
- `Repr-Digest`, `Content-MD5`, Google's `x-goog-hash`, and S3's `x-amz-checksum-*` of the kind FULL_OBJECT: of the
  whole object, and so only of replies that hold all of it. S3 sends them when asked (`ASK`), for requests without a
  range.

S3's checksums of the kind COMPOSITE are of the checksums of parts, and one that comes with a range may be of a part or
of all (servers differ); neither is used. The checksums of ranges could be joined to that of an object, but not before
its last byte was there, when the first ones have long been handed out.

CRC32C and CRC64NVME are used where their kernel is there in compiled form: no fetch waits for a compiler.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ASK = {"x-amz-checksum-mode": "ENABLED"}

# By what they cost: 0.4, 0.5, 0.5, 0.8, 0.8, 1.2 and 1.3 CPU-seconds a GB.
_BYTES = {"crc32": 4, "crc32c": 4, "crc64nvme": 8, "sha256": 32, "sha1": 20, "sha512": 64, "md5": 16}
# Reflected.
_POLYNOMIALS = {"crc32c": 0x82F63B78, "crc64nvme": 0x9A6C9329AC4BC9B5}
_DIGEST = re.compile(r"(sha-256|sha-512)=:([A-Za-z0-9+/=]+):")
_GOOGLE = re.compile(r"(crc32c|md5)=([A-Za-z0-9+/=]+)")
_OF_PARTS = re.compile(r'-[0-9]+"?$')  # at the end of an ETag


@dataclass(frozen=True, slots=True)
class Checksum:
    """`algorithm` is one of those of S3, in small letters, or md5 or sha512."""

    algorithm: str
    value: bytes

    def is_of(self, data: memoryview) -> bool:
        """Whether these bytes have it."""
        if self.algorithm == "crc32":
            return zlib.crc32(data) == int.from_bytes(self.value, "big")
        if self.algorithm in _POLYNOMIALS:
            return _crc(self.algorithm, data) == int.from_bytes(self.value, "big")
        return hashlib.new(self.algorithm, data, usedforsecurity=False).digest() == self.value


def told(headers: Iterable[tuple[str, str]], etag: str | None, *, is_whole: bool) -> Checksum | None:
    """The cheapest checksum of exactly the bytes of a reply, by its headers; None where there is none that can be
    computed at once. `is_whole`: they are all of the object's.
    """
    named: dict[str, str] = {}
    for name, value in headers:
        lower = name.lower()
        named[lower] = f"{named[lower]},{value}" if lower in named else value
    found = _digests(named.get("content-digest", ""))
    if is_whole:
        found |= _of_objects(named, etag)
    for algorithm, length in _BYTES.items():
        checksum = Checksum(algorithm, _decoded(found.get(algorithm, "")))
        if len(checksum.value) == length and (algorithm not in _POLYNOMIALS or _has_kernel()):
            return checksum
    return None


@functools.cache
def _has_kernel() -> bool:
    """Whether `_crc` computes at once."""
    from fastload.kernels import is_compiled

    return is_compiled("crc")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def _digests(text: str) -> dict[str, str]:
    return {name.replace("-", ""): value for name, value in _DIGEST.findall(text)}


def _of_objects(named: dict[str, str], etag: str | None) -> dict[str, str]:
    found = _digests(named.get("repr-digest", ""))
    if "content-md5" in named:
        found["md5"] = named["content-md5"].strip()
    stored_as = named.get("x-goog-stored-content-encoding", "identity")
    if stored_as == named.get("content-encoding", "identity"):  # else it was unpacked on the way
        found |= dict(_GOOGLE.findall(named.get("x-goog-hash", "")))
    kind = named.get("x-amz-checksum-type")
    if kind == "FULL_OBJECT" or (kind is None and not _OF_PARTS.search(etag or "")):
        prefix = "x-amz-checksum-"
        found |= {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    return found


def _crc(algorithm: str, data: memoryview) -> int:
    from fastload.kernels.crc import advance

    tables = _tables(algorithm)
    ones = (1 << 8 * _BYTES[algorithm]) - 1
    check = np.array([ones], np.uint64)
    even = len(data) & ~15
    if even:
        advance(np.frombuffer(data[:even], "<u8"), tables, check)
    now = int(check[0])
    for byte in data[even:].cast("B"):
        now = (now >> 8) ^ int(tables[(now ^ byte) & 255])
    return now ^ ones


@functools.lru_cache(maxsize=len(_POLYNOMIALS))
def _tables(algorithm: str) -> NDArray[np.uint64]:
    """As `kernels.crc` takes them."""
    polynomial = _POLYNOMIALS[algorithm]
    first = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (polynomial if byte & 1 else 0)
        first.append(byte)
    rows = [first]
    for _ in range(15):
        rows.append([(value >> 8) ^ first[value & 255] for value in rows[-1]])
    tables = np.array(rows, np.uint64).ravel()
    tables.flags.writeable = False
    return tables
