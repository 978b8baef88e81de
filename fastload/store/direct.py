"""Objects by requests of our own: who is asked, who signs, and which buckets are not read and written this way.

Moving bytes is where a store's CPU time goes, and HttpClient does it for two thirds of what obstore takes to read.
Writing, over plain HTTP, 256 MiB to `bench.sink`, medians of six in turn on two busy cores, CPU-seconds a GB: obstore
with its SHA-256 1.68; this with a CRC-32 1.03 from a mapped file (0.28 without it) and 1.07 from other memory (0.50);
the CRC-32 alone 0.74. This says what to ask for. In S3 that is:
- with a key at hand, or anonymously: SigV4 in the headers (`sign_v4`);
- with credentials that the machine hands out for a while (instance roles, containers, web identities): a URL that
  obstore signs, since it finds and refreshes them and does not hand them out. That takes 14 us and no request.

obstore does what is left: conditional writes, Google (who signs URLs there needs a key file, which few have, or a
request for each), Azure, S3 Express with its sessions, and buckets for which something special is asked.

What vouches for the bytes of an upload: over TLS the connection, so that the signature is not of them. Over plain HTTP
a CRC-32 in the headers (`crc32`), which S3 compares and repeats in its answer; a store whose answer is without it has
not compared, and is not written to this way. With signed URLs there can be no such header.

AWS Signature Version 4 for a request whose body is not signed.

The request is written in a canonical form, hashed, and signed with a key derived from the secret, the day,
the region and the service; the server does the same. Signed are exactly the headers that `sign_v4` is given,
host included.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import obstore
from obstore.store import S3Store

from fastload.errors import ConfigError, StoreError
from fastload.store import settings
from fastload.store.answers import is_strong
from fastload.store.crc32 import crc32
from fastload.store.environment import as_bool
from fastload.store.httpclient import HttpClient, has_trusted_roots
from fastload.store.options import StoreOptions
from fastload.store.proxies import proxy_for
from fastload.store.replies import ASK
from fastload.store.types import ObjectInfo
from fastload.store.urls import encode_path, key_of

DEFAULT_REGION = "us-east-1"
_CHECKSUM = "x-amz-checksum-crc32"
EXPRESS = "--x-s3"  # buckets of S3 Express end in their zone and that
# Long enough for a clock that is wrong by minutes, short enough for policies that refuse URLs that are good for long.
_URL_LASTS = datetime.timedelta(minutes=5)
# Settings that are used here, and those of how credentials are found, which obstore does for both ways.
_UNDERSTOOD = settings.S3_FINDING | settings.PROXIES | {"root_certificate", "proxy_url", "virtual_hosted_style_request"}


class UnverifiedError(StoreError):
    """An object was sent whole, and nothing says that it arrived so. Of this layer only."""


@dataclass(frozen=True, slots=True, repr=False)
class _SignedRequest:
    """`origin` is scheme, host and port. Its repr would show a signature."""

    origin: str
    target: str
    headers: Mapping[str, str]


_Ask = Callable[[Literal["GET", "PUT"], str, Mapping[str, str]], _SignedRequest]


class DirectBucket:
    """Reads ranges of the objects of one bucket, and writes objects. Safe to use from several threads."""

    def __init__(self, ask: _Ask, make_client: Callable[[str], HttpClient], origin: str, *, signs_urls: bool) -> None:
        """`ask(method, key, headers)` addresses and signs a request, as a rule to `origin`; `make_client(origin)` sends
        it.
        """
        self._ask, self._make_client = ask, make_client
        self.signs_urls = signs_urls
        self._is_plain = origin.startswith("http:")
        self.writes = not (self._is_plain and signs_urls)
        self._lock = threading.Lock()
        self._clients = {origin: make_client(origin)}

    def read_into(self, info: ObjectInfo, start: int, out: memoryview) -> None:
        """Fill `out` from `start`, if the object is still that version. Errors of `HttpClient`, and of obstore where it
        signs.
        """
        # A checksum comes with the whole object only, and only for a request without a range. A signed URL would have
        # to be signed for the header, too.
        is_checked = self._is_plain and not self.signs_urls and len(out) == info.size
        headers = dict(ASK) if is_checked else {"Range": f"bytes={start}-{start + len(out) - 1}"}
        if is_strong(info.etag):
            headers["If-Match"] = str(info.etag)
        request = self._ask("GET", key_of(info.url), headers)
        self._client(request.origin).get_range(info, request.target, request.headers, start, out)

    def put(self, url: str, data: memoryview) -> str | None:
        """Store `data` as the object at `url`; its ETag. Errors as of `read_into`, and UnverifiedError where nothing
        vouches for the bytes that the store has.
        """
        headers = {}
        if self._is_plain:
            headers[_CHECKSUM] = base64.b64encode(crc32(data).to_bytes(4, "big")).decode()
        request = self._ask("PUT", key_of(url), headers)
        answer = self._client(request.origin).put(url, request.target, request.headers, data)
        if answer.get(_CHECKSUM) != headers.get(_CHECKSUM) and self._is_plain:
            raise UnverifiedError(f"{url}: the store has not compared the checksum of what it was sent")
        return answer.get("etag")

    def close(self) -> None:
        """Close the connections, those in use as they come back."""
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.close()

    def _client(self, origin: str) -> HttpClient:
        with self._lock:
            if origin not in self._clients:
                self._clients[origin] = self._make_client(origin)
            return self._clients[origin]


def direct_s3_bucket(bucket: str, options: StoreOptions, store: S3Store) -> DirectBucket | None:
    """For an S3 bucket that `store` lists; None where obstore has to read and write it."""
    said = dict(options.extra)
    certificate, virtual_host = said.get("root_certificate"), as_bool(said.get("virtual_hosted_style_request"))
    origin, path = place(bucket, options, virtual_host)
    proxy = proxy_for(origin, said)
    if not said.keys() <= _UNDERSTOOD or bucket.endswith(EXPRESS) or (proxy is not None and not proxy.is_http):
        return None
    if origin.startswith("https:") and certificate is None and not has_trusted_roots():
        return None

    def make_client(origin: str) -> HttpClient:
        return HttpClient(origin, certificate, proxy)

    known = options.anonymous or options.access_key_id is not None
    ask = _in_headers(origin, path, options) if known else _in_url(store)
    try:
        return DirectBucket(ask, make_client, origin, signs_urls=not known)
    except ssl.SSLError as error:
        raise ConfigError("root_certificate is not a certificate in PEM; pass its text, not its path") from error


def place(bucket: str, options: StoreOptions, virtual_host: bool) -> tuple[str, str]:
    """Where a bucket of S3 is: scheme, host and port, and the path that comes before its keys."""
    endpoint = options.endpoint
    if not endpoint and bucket.endswith(EXPRESS):
        virtual_host = True
        zone = bucket.removesuffix(EXPRESS).rpartition("--")[2]
        endpoint = f"https://{bucket}.s3express-{zone}.{options.region or DEFAULT_REGION}.amazonaws.com"
    elif not endpoint:
        host = f"s3.{options.region or DEFAULT_REGION}.amazonaws.com"
        endpoint = f"https://{bucket}.{host}" if virtual_host else f"https://{host}"
    parts = urllib.parse.urlsplit(endpoint)
    return f"{parts.scheme}://{parts.netloc}", parts.path + ("" if virtual_host else f"/{bucket}")


def _in_headers(origin: str, path: str, options: StoreOptions) -> _Ask:
    host = urllib.parse.urlsplit(origin).netloc
    region = options.region or DEFAULT_REGION

    def ask(method: str, key: str, headers: Mapping[str, str]) -> _SignedRequest:
        target = encode_path(f"{path}/{key}")
        if not options.anonymous:
            now = datetime.datetime.now(datetime.UTC)
            headers = sign_v4(method, target, {"Host": host, **headers}, options, region, now)
        return _SignedRequest(origin, target, headers)

    return ask


def _in_url(store: S3Store) -> _Ask:
    def ask(method: Literal["GET", "PUT"], key: str, headers: Mapping[str, str]) -> _SignedRequest:
        parts = urllib.parse.urlsplit(obstore.sign(store, method, key, _URL_LASTS))
        return _SignedRequest(f"{parts.scheme}://{parts.netloc}", f"{parts.path}?{parts.query}", headers)

    return ask


_EMPTY = hashlib.sha256(b"").hexdigest()


def sign_v4(
    method: str, target: str, headers: Mapping[str, str], options: StoreOptions, region: str, now: datetime.datetime
) -> dict[str, str]:
    """`headers` and those that sign a request for `target` (an encoded path without a query); `now` is in UTC."""
    assert options.access_key_id is not None
    assert options.secret_access_key is not None
    content = _EMPTY if method == "GET" else "UNSIGNED-PAYLOAD"
    time, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    signed = {**headers, "x-amz-content-sha256": content, "x-amz-date": time}
    if options.session_token is not None:
        signed["x-amz-security-token"] = options.session_token
    lines = sorted((name.lower(), value.strip()) for name, value in signed.items())
    names = ";".join(name for name, _ in lines)
    canonical = "\n".join([method, target, "", *(f"{name}:{value}" for name, value in lines), "", names, content])
    scope = f"{day}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    signature = hmac.digest(
        _signing_key(options.secret_access_key, day, region),
        f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{digest}".encode(),
        "sha256",
    ).hex()
    signed["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={options.access_key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return signed


def _signing_key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
