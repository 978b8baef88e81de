"""Objects on plain web servers: no listing, and what is known of an object comes from its first ranged
answer.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from typing import NoReturn

from typing_extensions import Buffer

from fastload.errors import ConfigError, ObjectMissingError, StoreError
from fastload.store.answers import is_strong
from fastload.store.httpclient import HttpClient
from fastload.store.logins import authorization, login_of, refuse_signed
from fastload.store.options import StoreOptions
from fastload.store.proxies import proxy_for
from fastload.store.replies import size_told
from fastload.store.types import ObjectInfo
from fastload.store.urls import encode_path, key_of

SCHEMES = frozenset({"http", "https"})

# What a server without ranges says, it says each time; and what is not there, is not there twice.
_LOOKS = 3


class HttpStore:
    """One web server; `root` is `https://host:port`. See `Store` for the contract."""

    def __init__(self, root: str, options: StoreOptions) -> None:
        settings = dict(options.extra)
        proxy = proxy_for(root, settings)
        if proxy is not None and not proxy.is_http:
            raise ConfigError(
                f"{root}: a proxy of the kind {proxy.scheme}:// is not supported; name an http:// one, or set no_proxy"
            )
        login = login_of(root, settings)
        self._headers = {} if login is None else {"Authorization": authorization(login)}
        try:
            self._reader = HttpClient(root, settings.get("root_certificate"), proxy)
        except ssl.SSLError as error:
            raise ConfigError("root_certificate is not a certificate in PEM; pass its text, not its path") from error

    def list(self, prefix_url: str) -> Iterator[ObjectInfo]:
        """Web servers have no listing: always a `ConfigError`."""
        raise ConfigError(f"{prefix_url}: http has no listing; name the objects, for example train-{{000..123}}.tar")
        yield  # a generator, as the other stores' are

    def head(self, url: str) -> ObjectInfo:
        """The object at `url`, by asking for its first byte."""
        target = _target(url)
        for look in range(_LOOKS):
            try:
                reply = self._reader.first_byte(url, target, self._headers)
            except ObjectMissingError:
                if look:
                    raise
                continue
            size = size_told(reply)
            if size is not None:
                return ObjectInfo(url, size, reply.etag, reply.mtime_ns)
            self._reader.renew()
        raise StoreError(
            f"{url}: the server, or a proxy before it, does not serve ranges: asked for the first byte, it answered "
            f"{reply}; serve it from one that does (nginx, Apache, caddy, any S3 store; Python's http.server does not)"
        )

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the object's bytes from `start`."""
        if len(out) == 0:
            return
        headers = {"Range": f"bytes={start}-{start + len(out) - 1}", **self._headers}
        if is_strong(info.etag):
            headers["If-Match"] = str(info.etag)
        self._reader.get_range(info, _target(info.url), headers, start, out)

    def put(self, url: str, data: Buffer) -> str | None:
        """Web servers are only read, so that this is always a `ConfigError`, as are the others that write."""
        _refuse_to_write(url)

    def put_if_absent(self, url: str, data: Buffer) -> str | None:
        _refuse_to_write(url)

    def put_if_match(self, url: str, data: Buffer, etag: str) -> str | None:
        _refuse_to_write(url)

    def delete(self, url: str) -> None:
        _refuse_to_write(url)

    def close(self) -> None:
        self._reader.close()


def _refuse_to_write(url: str) -> NoReturn:
    raise ConfigError(f"{url}: nothing is written to web servers; name an object store (s3://, gs://, az://) or a path")


def _target(url: str) -> str:
    """Path and query for the request line. In a web address escapes are the user's own."""
    refuse_signed(url)
    path, mark, query = key_of(url).partition("?")
    return "/" + (path if "%" in path else encode_path(path)) + mark + query
