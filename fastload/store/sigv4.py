"""AWS Signature Version 4 for a GET without a body.

The request is written in a canonical form, hashed, and signed with a key derived from the secret, the day,
the region and the service; the server does the same. Signed are exactly the headers that `sign` is given,
host included.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import urllib.parse
from collections.abc import Mapping

from fastload.store.options import StoreOptions

_EMPTY = hashlib.sha256(b"").hexdigest()


def encode_path(path: str) -> str:
    """A key as it stands in the request line and in the signature: every byte but the unreserved and `/` as
    %XX.
    """
    return urllib.parse.quote(path, safe="/-_.~")


def sign(
    target: str, headers: Mapping[str, str], options: StoreOptions, region: str, now: datetime.datetime
) -> dict[str, str]:
    """`headers` and those that sign a GET of `target` (an encoded path without a query); `now` is in UTC."""
    assert options.access_key_id is not None
    assert options.secret_access_key is not None
    time, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    signed = {**headers, "x-amz-content-sha256": _EMPTY, "x-amz-date": time}
    if options.session_token is not None:
        signed["x-amz-security-token"] = options.session_token
    lines = sorted((name.lower(), value.strip()) for name, value in signed.items())
    names = ";".join(name for name, _ in lines)
    canonical = "\n".join(["GET", target, "", *(f"{name}:{value}" for name, value in lines), "", names, _EMPTY])
    scope = f"{day}/{region}/s3/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    signature = hmac.digest(
        _key(options.secret_access_key, day, region), f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{digest}".encode(), "sha256"
    ).hex()
    signed["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={options.access_key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
    )
    return signed


def _key(secret: str, day: str, region: str) -> bytes:
    key = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key
