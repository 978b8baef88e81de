"""Objects that are packed as a whole, by the endings of their names.

A packed object and what is in it are two objects to cache and plan: the first is read as it is stored, by
`fastload.open` for example, the second in ranges of its unpacked bytes (see `service.unpacking`).
"""

from __future__ import annotations

import re
from urllib.parse import urlsplit

_BY_ENDING = {
    ".gz": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
    ".br": "brotli",
    ".snappy": "snappy",
}
_OF_TARS = {".tgz": "gzip", ".tzst": "zstd", ".tbz2": "bz2", ".txz": "xz"}
# LitData says before the ending how it packed a chunk.
_PACKED_CHUNK = re.compile(r"(chunk-[0-9]+-[0-9]+)\.zstd(?::[0-9]+)?(\.bin)\Z", re.IGNORECASE)

_LOOKED_AT = (*_BY_ENDING, *_OF_TARS, ".bin")

PACKED_ENDINGS = tuple(_BY_ENDING)
"""What a name ends in, behind the ending that says its format, where the object is packed."""

PACKED_TAR_ENDINGS = tuple(_OF_TARS)
"""What the names of packed tars end in besides."""

FRAMES = "ldfz"
"""LitData's chunks whose items are packed by zstd, some in each frame (see `unpacker`). Only their index says so."""

TABLE = "ldarw"
"""LitData's chunks whose tables of Arrow are compressed. Only their index says so."""

PACKINGS = ("", "gzip", "zstd", "bz2", "xz", "brotli", "snappy", FRAMES, TABLE)
"""How objects are packed; the numbers of these stand in tables and frames, so new ones come last."""

RATIO_MAX, BYTES_ALWAYS = 1000, 1 << 30
"""What is unpacked to more than so many times its size, and to more than so many bytes, is a bomb."""


def packing_of(url: str) -> str:
    """How an object is packed as a whole, by its name; "" where it is not."""
    # Asked of each of a million shards: most names are known not to be by a look.
    if not url.lower().endswith(_LOOKED_AT) and "?" not in url and "#" not in url:
        return ""
    name = name_of(url).lower()
    if name.endswith(".bin"):
        return "zstd" if _PACKED_CHUNK.match(name) else ""
    return next((how for end, how in (_BY_ENDING | _OF_TARS).items() if name.endswith(end)), "")


def unpacked_name(name: str) -> str:
    """The name without the ending that says how the object is packed."""
    lower = name.lower()
    for ending in _OF_TARS:
        if lower.endswith(ending):
            return name[: -len(ending)] + ".tar"
    if lower.endswith(".bin"):
        return _PACKED_CHUNK.sub(r"\1\2", name)
    found = next((ending for ending in _BY_ENDING if lower.endswith(ending)), "")
    return name[: len(name) - len(found)]


def is_bomb(packed_bytes: int, unpacked_bytes: int) -> bool:
    return unpacked_bytes > max(BYTES_ALWAYS, RATIO_MAX * packed_bytes)


def name_of(url: str) -> str:
    """The last part of a URL or path; on a web server it ends before the query, elsewhere "?" and "#" belong to it."""
    path = urlsplit(url).path if url[:8].lower().startswith(("http://", "https://")) else url
    return path.rpartition("/")[2]
