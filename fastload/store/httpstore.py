"""Objects on plain web servers: no listing, and what is known of an object comes from its first ranged
answer.
"""

from __future__ import annotations

import email.utils
import re
import ssl
from collections.abc import Iterator, Mapping

from fastload.errors import ConfigError, StoreError
from fastload.store.answers import changed, is_strong, same_etag
from fastload.store.httpreader import HttpReader
from fastload.store.options import StoreOptions
from fastload.store.proxies import proxy_for
from fastload.store.sigv4 import encode_path
from fastload.store.types import ObjectInfo
from fastload.store.urls import key_of

SCHEMES = frozenset({"http", "https"})

_SIGNED = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)


class HttpStore:
    """One web server; `root` is `https://host:port`. See `Store` for the contract."""

    def __init__(self, root: str, options: StoreOptions) -> None:
        settings = dict(options.extra)
        proxy = proxy_for(root, settings.get("proxy_url"))
        if proxy is not None and not proxy.is_http:
            raise ConfigError(
                f"{root}: a proxy of the kind {proxy.scheme}:// is not supported; name an http:// one, or set no_proxy"
            )
        try:
            self._reader = HttpReader(root, settings.get("root_certificate"), proxy)
        except ssl.SSLError as error:
            raise ConfigError("root_certificate is not a certificate in PEM; pass its text, not its path") from error

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """Web servers have no listing: always a `ConfigError`."""
        raise ConfigError(f"{prefix_url}: http has no listing; name the objects, for example train-{{000..123}}.tar")
        yield  # a generator, as the other stores' are

    def head(self, url: str) -> ObjectInfo:
        """The object at `url`, by asking for its first byte."""
        first = bytearray(1)
        answer = self._reader.get_range(url, _target(url), {"Range": "bytes=0-0"}, 0, memoryview(first))
        total = answer.get("content-range", "").rpartition("/")[2]
        if not total.isdigit():
            raise StoreError(
                f"{url}: the server does not answer ranged requests with Content-Range; serve it from one that does"
            )
        return ObjectInfo(url, int(total), answer.get("etag"), _mtime_ns(answer))

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the object's bytes from `start`."""
        if len(out) == 0:
            return
        headers = {"Range": f"bytes={start}-{start + len(out) - 1}"}
        if is_strong(info.etag):
            headers["If-Match"] = str(info.etag)
        answer = self._reader.get_range(info.url, _target(info.url), headers, start, out)
        total = answer.get("content-range", "").rpartition("/")[2]
        if total.isdigit() and int(total) != info.size:
            raise changed(info.url, f"its size was {info.size} and is {total}")
        if not same_etag(info.etag, answer.get("etag")) or (info.etag is None and _mtime_ns(answer) != info.mtime_ns):
            raise changed(info.url)

    def close(self) -> None:
        """Close the connections."""
        self._reader.close()


def _target(url: str) -> str:
    """Path and query for the request line. In a web address escapes are the user's own."""
    if _SIGNED.search(url):
        shown = url.partition("?")[0]
        raise ConfigError(f"{shown}?...: signed URLs are not supported yet; use the bucket's own URL and credentials")
    path, mark, query = key_of(url).partition("?")
    return "/" + (path if "%" in path else encode_path(path)) + mark + query


def _mtime_ns(answer: Mapping[str, str]) -> int:
    try:
        return int(email.utils.parsedate_to_datetime(answer["last-modified"]).timestamp()) * 10**9
    except (KeyError, ValueError):  # the server does not say, or not in a way that is understood
        return 0
