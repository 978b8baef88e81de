"""Who may see the page: decided for each request, from its method and headers alone, before any route is looked at.

The page listens where browsers and other users of the machine reach it, so:

- GET and HEAD only: nothing can be changed through it.
- `Host` must be one of an exact list. A site whose name was rebound to this address has its own name there.
- Where the browser says which site asks (`Sec-Fetch-Site`), it must be this page, or the user himself.
- Any user of the machine can connect to a port of 127.0.0.1, so a token is needed. It comes once, in the address that
  `fastload status --open` prints, and becomes a cookie that scripts cannot read and other sites cannot send.
- Cookies are not kept apart by port: a server that another user runs on this host would be sent ours. So it is for one
  path only, which is as hard to guess as the token.

Nothing is decided from a URL that is put together from the Host header.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qs

COOKIE = "fastload"
_METHODS = ("GET", "HEAD")
_SITES = ("none", "same-origin")
_NO_TOKEN = "open the address that `fastload status --open` prints on this node"

# On every reply, refusals included. Trusted types: an assignment to innerHTML is an error in browsers that have them.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def _secret() -> str:
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Door:
    """What lets a request in. Token and path are new with each process, so that nothing of an old one is of use."""

    hosts: frozenset[str]  # lower case, with the port where browsers send it
    token: str = field(default_factory=_secret, repr=False)
    path: str = field(default_factory=lambda: f"/{_secret()}", repr=False)


@dataclass(frozen=True)
class Refused:
    """The reply to a request that is not let in."""

    status: HTTPStatus
    text: str


@dataclass(frozen=True)
class SignedIn:
    """The token came: it becomes a cookie, and the address loses it."""

    location: str
    cookie: str


def judge(door: Door, method: str, headers: Iterable[tuple[bytes, bytes]], query: bytes) -> Refused | SignedIn | None:
    """What a request gets instead of what it asks for; None: it is let in. Names of headers are in lower case."""
    sent: dict[str, list[str]] = {}
    for name, value in headers:
        sent.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    hosts = sent.get("host", [])
    if len(hosts) != 1 or hosts[0].lower() not in door.hosts:
        return Refused(HTTPStatus.FORBIDDEN, "this page is not served under that name; see --host")
    if method not in _METHODS:
        return Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD")
    if not all(site in _SITES for site in sent.get("sec-fetch-site", [])):
        return Refused(HTTPStatus.FORBIDDEN, "another site asks for it; copy the address into the browser")
    tokens = parse_qs(query.decode("latin-1")).get("token", [])
    if tokens:
        if len(tokens) == 1 and _is_token(tokens[0], door):
            cookie = f"{COOKIE}={door.token}; Path={door.path}/; HttpOnly; SameSite=Strict"
            return SignedIn(f"{door.path}/", cookie)
        return Refused(HTTPStatus.FORBIDDEN, f"another token; {_NO_TOKEN}")
    if any(_is_token(value, door) for value in _cookies(sent.get("cookie", []))):
        return None
    return Refused(HTTPStatus.FORBIDDEN, _NO_TOKEN)


def _cookies(headers: Iterable[str]) -> list[str]:
    """The values of ours."""
    pairs = (pair.strip().partition("=") for header in headers for pair in header.split(";"))
    return [value for name, _, value in pairs if name == COOKIE]


def _is_token(value: str, door: Door) -> bool:
    return secrets.compare_digest(value.encode("latin-1", "replace"), door.token.encode())
