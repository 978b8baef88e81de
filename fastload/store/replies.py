"""Whether a reply is what was asked for: the one place that decides it, for every way a byte comes in.

A server, or a proxy or cache before it, may answer with another range, another object, the whole of it, or a page that
says sorry, under a status that says all is well. Bytes are taken only from a reply whose head names the very range, the
size and the version that were asked for. What else comes is either a *bad reply*, a fault that passes: it is tried
again on another connection. Or it says that the object is another by now, which one reply alone is not believed
(`wrappers.SecondLook`).

What is decided about the oddities:
- a 206 without Content-Range, with another range, with `*` for the size, or in several parts: a bad reply;
- a 200 is taken where the whole object was asked for; in place of a range it is a bad reply;
- the same header twice with two values, where one of them must be right: a bad reply;
- Content-Encoding says nothing here: objects are stored compressed, too, and are taken as they are stored, while one
  that was compressed on the way has another length;
- an ETag that is absent, or weak, speaks for nothing: size and range must fit, and where the listing had no strong one
  either, the time of the last change;
- a time of the last change that is absent speaks for nothing, either: some nodes of a CDN send it and others do not.

Checksums that a reply carries: which of them cover the very bytes that came, and whether these have it.

Over plain HTTP nothing else protects bytes on their way but TCP's sum of 16 bits; over TLS every record is
authenticated, and there nothing of this is used. A checksum counts where it is certain what it is of:

- `Content-Digest` (RFC 9530): of what the reply holds, for any range;
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
import email.utils
import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastload.errors import StoreError
from fastload.store.answers import BadReplyError, changed, is_strong, same_etag
from fastload.store.crc32 import crc32
from fastload.store.types import ObjectInfo

_CONTENT_RANGE = re.compile(r"bytes[ \t]+(?:([0-9]{1,19})-([0-9]{1,19})|\*)/([0-9]{1,19}|\*)", re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]{1,19}")
# Of these two values cannot both be right.
_SINGLE = frozenset({"content-length", "content-range", "etag", "last-modified"})


@dataclass(frozen=True, slots=True)
class Reply:
    """What the head of a reply says. `start` and `end` are those of its range, `total` the object's size, `length` the
    body's; None where it does not say. `modified` is the time of the last change: nanoseconds, or as HTTP writes it.
    `contradiction` says in what it contradicts itself.
    """

    status: int
    start: int | None = None
    end: int | None = None
    total: int | None = None
    length: int | None = None
    etag: str | None = None
    modified: int | str = 0
    contradiction: str = ""

    @classmethod
    def of(cls, status: int, headers: Iterable[tuple[str, str]], length: int | None) -> Reply:
        """From the headers of HTTP; `length` of the body as far as it is known."""
        found: dict[str, str] = {}
        contradiction = ""
        for name, value in headers:
            lower = name.lower()
            if lower in _SINGLE and found.setdefault(lower, value) != value:
                contradiction = f"two of {name}: {found[lower][:100]!r} and {value[:100]!r}"
        told_length, content_range = found.get("content-length"), found.get("content-range")
        if told_length is not None and not _NUMBER.fullmatch(told_length.strip()):
            contradiction = f"a Content-Length of {told_length[:100]!r}"
        start = end = total = None
        if content_range is not None:
            match = _CONTENT_RANGE.fullmatch(content_range.strip())
            if match is None:
                contradiction = contradiction or f"a Content-Range of {content_range[:100]!r}"
            else:
                start, end = (int(match[1]), int(match[2]) + 1) if match[1] else (None, None)
                total = None if match[3] == "*" else int(match[3])
        modified = found.get("last-modified", 0)
        return cls(status, start, end, total, length, found.get("etag"), modified, contradiction)

    @property
    def mtime_ns(self) -> int:
        """When the object was changed last; 0 where the server does not say, or not in a way that is understood."""
        if isinstance(self.modified, int):
            return self.modified
        try:
            return int(email.utils.parsedate_to_datetime(self.modified).timestamp()) * 10**9
        except (ValueError, OverflowError):
            return 0

    def __str__(self) -> str:
        if self.contradiction:
            return f"{self.status} with {self.contradiction}"
        if self.start is None:
            said = "no range" if self.length is None else f"no range and {self.length} bytes"
        else:
            total = "an unknown size" if self.total is None else self.total
            said = f"bytes {self.start}-{(self.end or 0) - 1} of {total}"
            if self.length is not None and self.end is not None and self.length != self.end - self.start:
                said += f" and a body of {self.length}"
        return f"{self.status} with {said}" + (f", ETag {self.etag}" if self.etag else "")


def check(reply: Reply, info: ObjectInfo, start: int, length: int, endpoint: str) -> None:
    """Raises what `misfit` says."""
    if (error := misfit(reply, info, start, length, endpoint)) is not None:
        try:
            raise error
        finally:
            del error  # else it holds this frame, and by it the buffer of who called, in a cycle


def misfit(reply: Reply, info: ObjectInfo, start: int, length: int, endpoint: str) -> StoreError | None:
    """None where `reply` holds `length` bytes of this version of the object from `start`; else the error that it is:
    `ObjectChangedError` where it speaks of another version, which a second look has to confirm, or `BadReplyError`.
    """
    whole = reply.status == 200
    if not reply.contradiction and reply.status in (200, 206):
        size = reply.length if whole else reply.total
        mtime_ns = 0 if is_strong(info.etag) else reply.mtime_ns
        if other := other_version(info, size, reply.etag, mtime_ns):
            return changed(info.url, f"{other}: {endpoint or 'the store'} answered {reply}")
        is_range = (reply.start, reply.end) == (start, start + length) and reply.total is not None
        is_all = whole and (start, length) == (0, info.size)
        if (is_all or (is_range and not whole)) and reply.length in (None, length):
            return None
    cure = "; the server must serve ranges, as nginx and S3 do" if whole and not reply.contradiction else ""
    return bad_reply(info.url, endpoint, asked(info, start, length), f"{reply}{cure}")


def size_told(reply: Reply) -> int | None:
    """The object's size, by the reply to a request for its first byte alone; None where that is not what it is."""
    if reply.contradiction:
        return None
    if reply.status == 206 and (reply.start, reply.end) == (0, 1) and reply.length in (None, 1):
        return reply.total
    if reply.status == 200 and reply.length in (0, 1):  # all of it
        return reply.length
    return 0 if reply.status == 416 and reply.start is None and reply.total == 0 else None


def other_version(info: ObjectInfo, size: int | None, etag: str | None, mtime_ns: int) -> str:
    """How what a store says of an object differs from the version that was listed; "" where it does not."""
    if size is not None and size != info.size:
        return f"its size was {info.size} and is {size}"
    if not same_etag(info.etag, etag) and info.url.startswith("/"):
        return "it was written to or replaced, or got another mode, owner or name"
    if not same_etag(info.etag, etag):
        return f"its ETag was {info.etag} and is {etag}"
    if not is_strong(info.etag) and info.mtime_ns and mtime_ns and mtime_ns != info.mtime_ns:
        return "its modification time has changed"
    return ""


def asked(info: ObjectInfo, start: int, length: int) -> str:
    """What was asked for, for messages."""
    version = f", ETag {info.etag}" if info.etag else ""
    return f"bytes {start}-{start + length - 1} of {info.size}{version}"


def bad_reply(url: str, endpoint: str, asked: str, came: str) -> BadReplyError:
    """Something else came than was asked for."""
    return BadReplyError(
        f"{url}: a bad reply{f' from {endpoint}' if endpoint else ''}: requested {asked}; received {came}. The request "
        "is retried on a new connection until the deadline; if this persists, check proxies and caches before the store"
    )


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
            return crc32(data) == int.from_bytes(self.value, "big")
        if self.algorithm in _POLYNOMIALS:
            return _crc(self.algorithm, data) == int.from_bytes(self.value, "big")
        return hashlib.new(self.algorithm, data, usedforsecurity=False).digest() == self.value


def checksum_of(headers: Iterable[tuple[str, str]], etag: str | None, *, is_whole: bool) -> Checksum | None:
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
        checksum = Checksum(algorithm, _from_base64(found.get(algorithm, "")))
        if len(checksum.value) == length and (algorithm not in _POLYNOMIALS or _has_kernel()):
            return checksum
    return None


@functools.cache
def _has_kernel() -> bool:
    """Whether `_crc` computes at once."""
    from fastload.kernels import is_compiled

    return is_compiled("crc")


def _from_base64(text: str) -> bytes:
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
    from fastload.kernels.crc import advance, tables_of

    tables = tables_of(_POLYNOMIALS[algorithm])
    ones = (1 << 8 * _BYTES[algorithm]) - 1
    check = np.array([ones], np.uint64)
    even = len(data) & ~15
    if even:
        advance(np.frombuffer(data[:even], "<u8"), tables, check)
    now = int(check[0])
    for byte in data[even:].cast("B"):
        now = (now >> 8) ^ int(tables[(now ^ byte) & 255])
    return now ^ ones
