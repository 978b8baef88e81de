"""What a store's refusal means, in words for the user.

Every store says no in its own way: a status with an XML body, an exception with a page of debug text, an
errno. Here a refusal becomes one of `fastload.errors`, by what the caller does next, with URL, endpoint and
cure. The XML's `<Code>` decides where a status does not: 404 is a missing bucket or a missing key, 403 is a
right that lacks or a secret that is wrong. No message holds a credential: nothing of the request is quoted,
and of the answer only code and message.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from typing import ClassVar

from fastload.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectMissingError,
    StoreError,
    StoreUnavailableError,
)
from fastload.store.urls import how_to_name

_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")

_WRONG_CREDENTIALS = {
    "InvalidAccessKeyId": "there is no such access key; check access_key_id (AWS_ACCESS_KEY_ID)",
    "SignatureDoesNotMatch": "the secret does not belong to the access key; check AWS_SECRET_ACCESS_KEY and the region",
    "ExpiredToken": "the session token has expired; get new credentials",
    "InvalidToken": "the session token is not valid; get new credentials, or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "AuthenticationFailed": "the account's key or token is not accepted; check the credentials",
}
# What arrived is not what was sent: the network's fault.
_DAMAGED_CODES = {"BadDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"}
_SET_THEM = "set them in the environment or storage_options"
_THROTTLING_CODES = {"SlowDown", "ServerBusy", "TooManyRequests", "RequestLimitExceeded", "Throttling"}
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "ServerBusy"}
_WRONG_REGION = {
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "AuthorizationQueryParametersError",
    "TemporaryRedirect",
    "IllegalLocationConstraintException",
}


_WHAT_NAMES_A_HOST = {
    "s3": "endpoint_url (AWS_ENDPOINT_URL), the region, and the bucket where it is part of the name, for a typo",
    "http": "the URL",
    "https": "the URL",
}


class ThrottledError(StoreUnavailableError):
    """The store could serve it, and wants to be asked less.

    Of this layer only: what is tried again ends as a `StoreUnavailableError`.
    """


class UnreachableError(StoreUnavailableError):
    """No answer came, or it broke off. Of this layer only."""


class HopelessError(UnreachableError):
    """What most likely will not pass, unless the store has answered before. Of this layer only.

    It is tried again for `patience_s` at most, and ends as an `ends_as`.
    """

    patience_s: ClassVar[float] = 3.0
    ends_as: ClassVar[type[StoreError]] = StoreUnavailableError


class ResolverError(HopelessError):
    """Whether there is such a host could not be found out just now."""

    patience_s = 15.0


class NoCredentialsError(HopelessError):
    """There are no credentials to ask with, or what hands them out does not answer: an agent that starts together with
    the job may need a while until it does.
    """

    patience_s = 30.0
    ends_as = AccessDeniedError


class BadReplyError(StoreUnavailableError):
    """A reply that is not what was asked for (`replies`), and says nothing of the object. Of this layer only."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is not the object: HTTP status, and what the body said (empty where it had none)."""

    status: int
    code: str = ""
    message: str = ""

    @classmethod
    def from_body(cls, status: int, body: str) -> Refusal:
        """Read the XML error of S3, Azure and Google's XML interface; any other body gives no code."""
        code, message = _CODE.search(body), _MESSAGE.search(body)
        return cls(status, code[1] if code else "", message[1] if message else "")

    def error(self, url: str, endpoint: str) -> StoreError:
        """The exception that this answer to a request for `url` is."""
        said = f"{self.status} {self.code}".rstrip()
        where = f" (at {endpoint}: {said})" if endpoint else f" ({said})"
        throttled = self.status in (429, 503) or self.code in _THROTTLING_CODES
        if throttled or self.status in (408, 425) or self.status >= 500 or self.code in _TRANSIENT_CODES:
            kind = ThrottledError if throttled else StoreUnavailableError
            return kind(f"{url}: the store cannot serve it now{where}; it is retried until the deadline")
        if self.code in _DAMAGED_CODES:
            return BadReplyError(
                f"{url}: what arrived is not what was sent{where}; it is sent again until the deadline"
            )
        if self.code in _WRONG_CREDENTIALS:
            return AccessDeniedError(f"{url}: wrong credentials: {_WRONG_CREDENTIALS[self.code]}{where}")
        if self.code in _WRONG_REGION or self.status in (301, 307):
            return StoreError(f"{url}: the bucket is in another region or at another endpoint; check AWS_REGION{where}")
        if self.status == 401:
            is_web = url.startswith(("http://", "https://"))
            cure = "write user and password into the URL, before the host" if is_web else _SET_THEM
            return AccessDeniedError(f"{url}: the store requires credentials; {cure}{where}")
        if self.status == 407:
            return AccessDeniedError(
                f"{url}: the proxy requires credentials; write user and password into its address, before the "
                f"host{where}"
            )
        if self.status == 403:
            return AccessDeniedError(
                f"{url}: access denied: the credentials that were found, if any, do not permit this request; set "
                f"others in the environment or storage_options, or ask for permission to read and list{where}"
            )
        if self.code in ("NoSuchBucket", "ContainerNotFound"):
            return ObjectMissingError(f"{url}: there is no such bucket; check its name and the endpoint{where}")
        if self.status in (404, 410):
            return ObjectMissingError(f"{url}: there is no such object; {how_to_name(url)}{where}")
        if self.status in (412, 416, 304):
            return changed(url)
        return StoreError(f"{url}: the store refused: {self.message or 'it gave no reason'}{where}")


def is_doubtful(error: StoreError) -> bool:
    """Whether a reply is to be believed only when another connection gives it, too."""
    return isinstance(error, BadReplyError) or not isinstance(error, StoreUnavailableError)


def changed(url: str, detail: str = "") -> ObjectChangedError:
    """`url` is no longer the version that was listed."""
    detail = f" ({detail})" if detail else ""
    return ObjectChangedError(
        f"{url}: the object has changed since it was listed{detail}; list again: make the data set anew"
    )


def unreachable(url: str, endpoint: str, reason: str) -> StoreUnavailableError:
    """No answer came, or it broke off."""
    where = f" at {endpoint}" if endpoint else ""
    return UnreachableError(f"{url}: cannot reach the store{where}: {reason}; check the endpoint and the network")


def unresolved(url: str, endpoint: str, *, for_now: bool, proxy: str = "") -> HopelessError:
    """There is no host of the endpoint's name (or the proxy's); `for_now`: that is not known just now."""
    host = proxy or urllib.parse.urlsplit(endpoint).hostname
    whose = "the proxy's name" if proxy else "the host's name"
    cure = (
        "the proxy's address" if proxy else _WHAT_NAMES_A_HOST.get(url.partition("://")[0], "endpoint_url and account")
    )
    if for_now:
        return ResolverError(
            f"{url}: cannot reach the store at {endpoint}: {whose} {host} cannot be looked up now, no name server "
            "answers; check this machine's DNS and network"
        )
    return HopelessError(
        f"{url}: cannot reach the store at {endpoint}: {whose} {host} does not resolve; check {cure}, and this "
        "machine's DNS"
    )


def without_credentials(url: str, endpoint: str, who: str, reason: str) -> NoCredentialsError:
    """There are none to ask with; `who` is whose they would be."""
    return NoCredentialsError(
        f"{url}: no credentials for the store at {endpoint}: requests would use {who}, but obtaining them failed: "
        f"{reason}; set credentials in the environment or storage_options, or anonymous=True for public data"
    )


def truncated(url: str, got: int, wanted: int, start: int) -> StoreUnavailableError:
    """A body of another length than was asked for: a connection that broke, or a proxy that meddles."""
    return StoreUnavailableError(
        f"{url}: truncated answer: {got} of the {wanted} bytes from offset {start}; it is retried until the deadline"
    )


def same_etag(listed: str | None, answered: str | None) -> bool:
    """Whether an answer is the version that was listed; where either has no ETag nothing speaks against it."""
    if listed is None or answered is None:
        return True
    return listed.removeprefix("W/").strip('"') == answered.removeprefix("W/").strip('"')


def is_strong(etag: str | None) -> bool:
    """Whether `etag` can be sent as If-Match: a weak one never matches there, and a listing may have anything in it."""
    return etag is not None and not etag.startswith(("W/", "w/")) and etag.isascii() and etag.isprintable()
