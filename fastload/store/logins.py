"""Users and passwords that are written into URLs, as `https://user:password@host/a.tar`.

They are taken out where a URL comes in, and go with the storage options to the store that is asked: so no name, key,
listing, figure or file that a URL gets into can show them.
"""

from __future__ import annotations

import base64
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from fastload.errors import ConfigError
from fastload.store.options import checked
from fastload.store.settings import LOGINS
from fastload.store.urls import BUCKETS, scheme, store_root

_SIGNED = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=", re.IGNORECASE)
# Where a name alone may be a token. Elsewhere it is part of the address (`abfss://container@account`).
_WEB = ("http", "https", "ftp", "ftps")
# Where `a:b@` is no login: `github://organisation:repository@version/path`.
_OTHERWISE = ("github", "git", "gist")


def apart(
    urls: Sequence[str], storage_options: Mapping[str, Any] | None
) -> tuple[tuple[str, ...], Mapping[str, Any] | None]:
    """The URLs without logins, and the options with them. ConfigError for signed URLs, and for a login that is none."""
    logins: dict[str, str] = {}
    found = tuple(_without(url, logins) for url in urls)
    if not logins:
        return found, storage_options
    options = checked(storage_options)
    return found, {**options, LOGINS: {**options.get(LOGINS, {}), **logins}}


def login_of(root: str, settings: Mapping[str, str]) -> str | None:
    """The login for a store's root, `user:password` as it stood in the URL."""
    login = json.loads(settings.get(LOGINS, "{}")).get(root)
    return None if login is None else str(login)


def authorization(login: str) -> str:
    """A login as HTTP has it in a header."""
    names = (urllib.parse.unquote(part) for part in login.partition(":")[::2])
    return f"Basic {base64.b64encode(':'.join(names).encode()).decode()}"


def refuse_signed(url: str) -> None:
    """ConfigError for a signed URL, which lasts for minutes and lists nothing."""
    if scheme(url) in ("http", "https") and _SIGNED.search(url):
        shown = url.partition("?")[0]
        raise ConfigError(f"{shown}?...: signed URLs are not supported yet; use the bucket's own URL and credentials")


def _without(url: str, logins: dict[str, str]) -> str:
    kind = scheme(url)
    if kind == "file":
        return url
    refuse_signed(url)
    start, rest = url.split("://", 1)
    authority, slash, path = rest.partition("/")
    login, _, host = authority.rpartition("@")
    if kind in _OTHERWISE or not login or (":" not in login and kind not in _WEB):
        return url
    clean = f"{start}://{host}{slash}{path}"
    if kind in BUCKETS:
        raise ConfigError(
            f'{clean}: its URL contained a login; give storage_options={{"key": ..., "secret": ...}} instead'
        )
    logins[store_root(clean)] = login
    return clean
