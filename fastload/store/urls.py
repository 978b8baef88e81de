"""URLs of objects. A key is taken as it is, as S3's own tools do: nothing in it is decoded, cut at `?` or
normalised.

One store serves one root: a bucket, a host, or this machine's files. `/data/a.tar` and `file:///data/a.tar`
are the same object, and are written the first way.
"""

from __future__ import annotations

import os
import re

from fastload.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
LOCAL_ROOT = "file://"


def scheme(url: str) -> str:
    """The scheme in lower case; "file" for a plain path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


def normalise(url: str) -> str:
    """`url` as it stands in an `ObjectInfo`: a local file as its absolute path; a slash at the end stays."""
    if scheme(url) != "file":
        return _SCHEME.sub(lambda match: match[0].lower(), url, count=1)
    path = url[len(LOCAL_ROOT) :] if _SCHEME.match(url) else os.path.expanduser(url)
    if path.startswith("localhost/"):
        path = path.removeprefix("localhost")
    slash = "/" if path.endswith("/") else ""
    return os.path.abspath(path).rstrip("/") + slash


def store_root(url: str) -> str:
    """What one store serves: `s3://bucket`, `https://host:port`, or `file://`.

    Raises `ConfigError` for a URL without a bucket or host.
    """
    kind = scheme(url)
    if kind == "file":
        return LOCAL_ROOT
    authority = url.split("://", 1)[1].split("/", 1)[0]
    if not authority and kind in ("s3", "s3a", "gs", "az", "http", "https"):
        raise ConfigError(f"{url!r} names no bucket or host; write it as {kind}://name/key")
    return f"{kind}://{authority}"


def key_of(url: str) -> str:
    """The object's key within its store's root; a local file's absolute path."""
    if scheme(url) == "file":
        return normalise(url)
    return url.split("://", 1)[1].partition("/")[2]
