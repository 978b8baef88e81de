"""URLs of objects. A key is taken as it is, as S3's own tools do: nothing in it is decoded, cut at `?` or
normalised.

One store serves one root: a bucket, a host, or this machine's files. `/data/a.tar` and `file:///data/a.tar`
are the same object, and are written the first way.
"""

from __future__ import annotations

import importlib
import os
import re
import urllib.parse
from difflib import get_close_matches

from fastload.errors import ConfigError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
LOCAL_ROOT = "file://"
BUCKETS = ("s3", "s3a", "gs", "az")
_OTHERS = ("adl", "azure", "abfs", "abfss", "http", "https", "file")
# What is left of "s3:/bucket/key", which is a local path, once it has been made absolute.
_SINGLE_SLASH = re.compile(r"(?:^|/)(s3a?|gs|az|https?):/([^/].*)")
_FILE_COLON = re.compile(r"(?:^|/)file:/?([^/].*)")


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
    if not authority and kind in (*BUCKETS, "http", "https"):
        raise ConfigError(f"{url!r} names no bucket or host; write it as {kind}://name/key")
    return f"{kind}://{authority}"


def check_key(url: str) -> None:
    """Raises `ConfigError` for a bucket that is named as if it were an object."""
    if scheme(url) in BUCKETS and not url.split("://", 1)[1].partition("/")[2] and not url.endswith("/"):
        raise ConfigError(f'{url} is a bucket, not an object; for all shards in it write it with "/" at the end')


def check_written(url: str) -> None:
    """Raises `ConfigError` for what other libraries take and no store here has."""
    if url.startswith("pipe:"):
        raise ConfigError(
            f"{url!r}: no command is run for data; name what it reads, such as s3://bucket/train-{{000..123}}.tar or "
            "https://host/train-{000..123}.tar"
        )
    first, mark, rest = url.partition("::")
    if mark and (_SCHEME.match(rest) or rest.startswith("/")):
        cure = "write several URLs as a list, [..., ...]"
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", first):
            cure = f'leave out "{first}::", since all that is read is cached anyhow'
        raise ConfigError(f'{url!r}: URLs are not chained by "::" here; {cure}')
    kind = scheme(url)
    if kind not in (*BUCKETS, *_OTHERS):
        close = get_close_matches(kind, (*BUCKETS[:1], *BUCKETS[2:], *_OTHERS), 1, 0.5)
        if kind not in _of_fsspec(default=() if close else (kind,)):
            cure = f"did you mean {close[0]}://?" if close else "write s3://, gs://, az://, https:// or a path"
            raise ConfigError(f"{url!r}: neither fastload nor fsspec has a scheme {kind!r}; {cure}")


def _of_fsspec(default: tuple[str, ...]) -> tuple[str, ...]:
    """The schemes of fsspec; `default` where that is not installed, which an error will say."""
    try:
        registry = importlib.import_module("fsspec.registry")
    except ImportError:
        return default
    return (*registry.known_implementations, *registry.registry)


def how_to_name(url: str) -> str:
    """What to do about an object that is not there: most often its name is wrong in one of a few ways."""
    single = _SINGLE_SLASH.search(url)
    if single is not None:
        return f"a URL has two slashes; write {single[1]}://{single[2]}"
    local = _FILE_COLON.search(url)
    if local is not None:
        return f"write {local[1]}, or file:// and an absolute path"
    if "::" in url:
        return '"::" is a part of the name; write several as a list, [..., ...]'
    if "{" in url:
        return "braces stand for themselves where one object is named; name it without"
    wild = next((character for character in "*?[" if character in url), None)
    if wild is not None:
        return f'"{wild}" stands for itself; write {{000000..000123}}, or the folder with "/" at the end'
    return "check its name"


def folder_without_slash(url: str) -> str:
    """What is wrong with a folder that is named as if it were an object."""
    return f"{url} is a folder; for the shards in it write {url}/"


def key_of(url: str) -> str:
    """The object's key within its store's root; a local file's absolute path."""
    if scheme(url) == "file":
        return normalise(url)
    return url.split("://", 1)[1].partition("/")[2]


def encode_path(path: str) -> str:
    """A key as it stands in the request line and in the signature: every byte but the unreserved and `/` as
    %XX.
    """
    return urllib.parse.quote(path, safe="/-_.~")
