"""Which bytes a cached chunk holds.

A key names a fixed range of one version of one object, so a changed object is another key and nothing is ever
invalidated. The object id is a hash of everything that can make the bytes differ:

- the URL without what only grants access (user and password, the parameters of a signed URL), so that a URL
  signed anew
  finds what an earlier one brought;
- the version: a strong ETag with the size, or, where the store has none, the size, the modification time and
  the endpoint. The endpoint is left out where the ETag is made of the bytes (an MD5, or one of the parts' MD5s): a
  replica behind another address holds the same. Of other ETags in S3 each endpoint may give one like it to other bytes.
  Of a local file the size and the modification time, and, where that was set explicitly, so that the status changed at
  another time than the bytes, its inode and that time: without these another file could have the same;
- the size of a chunk, since chunk 3 of 8 MiB chunks is not chunk 3 of 4 MiB ones;
- of a piece of an object, where it begins and how large it is: its chunks are counted from there;
- of what is in a packed object, how it is packed, and how large it should be.

Each field is hashed with its length before it, so that no two different sets of fields give one input.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from fastload.store import local

if TYPE_CHECKING:  # a consumer that only maps the arena need not load the object stores
    from fastload.store.types import ObjectInfo

OBJECT_ID_BYTES = 16
_INDEX_MAX = (1 << 63) - 1
_OF_BYTES = re.compile(r"[0-9a-fA-F]{32}(-[0-9]+)?")
_NAME = re.compile(r"([0-9a-f]{32})-([0-9a-f]{8,16})")

# What signed URLs carry. The first kind is known by its prefix; the others have names so short that they only
# count as a signature's when the signature itself is there.
_SIGNED_PREFIXES = ("x-amz-", "x-goog-")
_SIGNED_WITH = {
    "signature": {"signature", "expires", "awsaccesskeyid", "googleaccessid", "key-pair-id", "policy"},
    "sig": {"sig", "se", "sp", "sv", "sr", "st", "spr", "sip", "si", "ss", "srt", "sks", "ske", "skt", "skv"}
    | {"skoid", "sktid", "saoid", "suoid", "scid", "sdd", "ses"},
}


@dataclass(frozen=True, slots=True, order=True)
class ChunkKey:
    """Chunk number `index` (from 0) of the object version `object_id` (16 bytes)."""

    object_id: bytes
    index: int

    def __post_init__(self) -> None:
        if len(self.object_id) != OBJECT_ID_BYTES or not 0 <= self.index <= _INDEX_MAX:
            raise ValueError(f"no chunk key: object id of {len(self.object_id)} bytes, index {self.index}")

    @property
    def name(self) -> str:
        """The stem of the chunk's file name: 32 hex digits, a dash, and the index in 8 or more hex digits."""
        return f"{self.object_id.hex()}-{self.index:08x}"

    @property
    def fan_out(self) -> str:
        """One of 256 directory names; neighbours of one object lie in different ones: none grows long."""
        return f"{(self.object_id[0] + self.index) & 0xFF:02x}"

    @classmethod
    def from_name(cls, name: str) -> ChunkKey | None:
        """The key whose `.name` this is, or None for a name of another form."""
        match = _NAME.fullmatch(name)
        if match is None or int(match[2], 16) > _INDEX_MAX:
            return None
        key = cls(bytes.fromhex(match[1]), int(match[2], 16))
        return key if key.name == name else None


def object_id(info: ObjectInfo, chunk_bytes: int, endpoint: str) -> bytes:
    """The 16 bytes that stand for this version of the object, cut into chunks of `chunk_bytes`.

    `endpoint` is the address that serves it ("" for local files and the provider's own); it counts only where there is
    no strong ETag, or in S3 one that the bytes do not give.
    """
    digest = hashlib.blake2b(digest_size=OBJECT_ID_BYTES, person=b"fastload-object1")
    piece = ("piece", str(info.start), str(info.size)) if info.is_piece else ()
    if info.packing:
        piece = "unpacked", info.packing, str(info.size)
    for field in (url_without_credentials(info.url), *_version(info.stored, endpoint), str(chunk_bytes), *piece):
        data = field.encode("utf-8", "surrogateescape")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


def url_without_credentials(url: str) -> str:
    """`url` less user, password and, for http, the signature's parameters and the fragment.

    Other schemes and plain paths have no parameters: there `?` and `#` are part of the object's name.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    authority, slash, path = rest.partition("/")
    url = f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
    return _without_signature(url) if scheme.lower() in ("http", "https") else url


def _without_signature(url: str) -> str:
    parts = urlsplit(url)
    fields = parse_qsl(parts.query, keep_blank_values=True)
    signed = {name.lower() for name, _ in fields}
    dropped = set().union(*(names for mark, names in _SIGNED_WITH.items() if mark in signed))
    kept = [
        (name, value)
        for name, value in fields
        if name.lower() not in dropped and not name.lower().startswith(_SIGNED_PREFIXES)
    ]
    query = parts.query if len(kept) == len(fields) else urlencode(kept)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, query, ""))


def _version(info: ObjectInfo, endpoint: str) -> tuple[str, ...]:
    status = local.parse_version_tag(info.url, info.etag)
    if status is not None and status[1] != info.mtime_ns:
        return "status", str(info.size), str(info.mtime_ns), *map(str, status)
    etag = (info.etag or "").strip()
    if etag and not etag.startswith(("W/", "w/")):
        etag = etag.strip('"')
        # Elsewhere the URL names the host, or the provider's ETags are unlike each other.
        is_of_place = endpoint and info.url.startswith(("s3://", "s3a://")) and not _OF_BYTES.fullmatch(etag)
        return "etag", etag, str(info.size), *([endpoint] if is_of_place else [])
    return "mtime", str(info.size), str(info.mtime_ns), endpoint
