"""Where a store is, and with which credentials it is read: endpoint, region and keys, as plain values.

People configure S3 once, for every tool: by AWS_* variables, by a profile in `~/.aws`, or by a mapping in
any spelling that their last library wanted. All of that is read here, once, where a data set is made, and
becomes one frozen value, which crosses the socket to the cache service and is the key under which it keeps
its stores. Nothing further down looks at the environment: the service that fetches was started by some job or other,
whose settings no other tool has.

What wins: `storage_options`, then the variables, then the profile. Credentials are taken whole from
one place: a key from one and a session token from another would be refused by the store with a message that
does not help. Where none are found the machine's (instance metadata) are left to obstore. Files that are renewed
(tokens of web identities) cross as their paths, which the service can read as well, being the same user's.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import msgspec

from fastload.errors import ConfigError
from fastload.store import environment, settings
from fastload.store.environment import Found, Profile, as_bool

# Spellings of our own fields in obstore, boto3, s3fs, pyarrow, polars and the AWS variables, in lower case.
_ALIASES = {
    "endpoint_url": (
        "endpoint_url",
        "endpoint",
        "aws_endpoint",
        "aws_endpoint_url",
        "aws_endpoint_url_s3",
        "endpoint_override",
    ),
    "access_key_id": ("access_key_id", "aws_access_key_id", "key", "access_key"),
    "secret_access_key": ("secret_access_key", "aws_secret_access_key", "secret", "secret_key"),
    "session_token": ("session_token", "aws_session_token", "token", "aws_token"),
    "region": ("region", "aws_region", "region_name", "aws_default_region", "default_region"),
    "anonymous": ("anonymous", "anon", "skip_signature", "aws_skip_signature", "no_sign_request"),
}
_FIELD_OF = {alias: field for field, aliases in _ALIASES.items() for alias in aliases}
_GIVEN = "storage_options"
_CREDENTIALS = frozenset({"access_key_id", "secret_access_key", "session_token"})
_WHOLE = (_CREDENTIALS, settings.GOOGLE_WAYS, settings.AZURE_WAYS)


@dataclass(frozen=True, slots=True, repr=False)
class StoreOptions:
    """One way to reach a provider. Frozen and hashable; its repr shows no secret.

    `endpoint_url` None is the provider's own. `anonymous` sends unsigned requests.
    `deadline_s` is how long a request that fails for the moment is tried again. `extra` holds settings of
    obstore under obstore's names and some of fastload's (see `settings`), as (name, value) pairs in the order of the
    names. `sources` says of each that was found somewhere where that was, for messages, and is no part of what is
    equal.
    """

    endpoint_url: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    region: str | None = None
    anonymous: bool = False
    deadline_s: float = 60.0
    extra: tuple[tuple[str, str], ...] = ()
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.endpoint_url is not None:
            parts = urllib.parse.urlsplit(self.endpoint_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(
                    f"endpoint_url={self.endpoint_url!r} is not a URL; write it as http://host:port or https://host"
                )
            if parts.username is not None or parts.password is not None:
                raise ConfigError("endpoint_url contains a user name; pass access_key_id and secret_access_key instead")
        if (self.access_key_id is None) != (self.secret_access_key is None):
            have, lack = "access_key_id", "secret_access_key"
            if self.access_key_id is None:
                have, lack = lack, have
            raise ConfigError(f"{have} is given without {lack}; give both, or neither")

    @property
    def endpoint(self) -> str:
        """The endpoint without a slash at its end, "" for the provider's own: part of an object's identity."""
        return (self.endpoint_url or "").rstrip("/")

    def of_scheme(self, kind: str) -> StoreOptions:
        """What of these is for stores of this scheme. What is said of S3 by the AWS variables or a profile is nobody
        else's: neither an endpoint nor that requests are unsigned.
        """
        extra = tuple(settings.of_scheme(kind, self.extra).items())
        if kind in ("s3", "s3a"):
            return replace(self, extra=extra)
        sources = dict(self.sources)
        general = {name for name in ("endpoint_url", "anonymous") if sources.get(name, _GIVEN) == _GIVEN}
        return StoreOptions(
            endpoint_url=self.endpoint_url if "endpoint_url" in general else None,
            anonymous=self.anonymous and "anonymous" in general,
            deadline_s=self.deadline_s,
            extra=extra,
            sources=self.sources,
        )

    def to_wire(self) -> dict[str, Any]:
        """Plain values for msgpack or JSON, secrets included: for a private socket, never for a file or
        log.
        """
        wire: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        wire["extra"] = [list(pair) for pair in self.extra]
        wire["sources"] = [list(pair) for pair in self.sources]
        return {name: value for name, value in wire.items() if value is not None}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> StoreOptions:
        """What `to_wire` described. Unknown names are a `ConfigError` (another version on the other side)."""
        unknown = set(wire) - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(
                f"unknown store options {sorted(unknown)}: the other side runs another version of fastload"
            )
        try:
            return msgspec.convert(wire, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"store options are in a form that this version of fastload does not support: {error}"
            ) from error

    @classmethod
    def from_environment(
        cls, storage_options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> StoreOptions:
        """What `storage_options` says, filled up from variables, the profile, and the files of Google's tools.

        Raises `ConfigError` that names a key of `storage_options` which is not known, a profile that is not there or
        that only the AWS tools can use. Certificates that cannot be read cost a warning in the log.
        """
        environ = os.environ if environ is None else environ
        given, profile_name, for_fsspec = _sort(checked(storage_options))
        profile = _profile(profile_name, environ)
        variables = {**environment.of_variables(environ), **settings.of_variables(environ)}
        # A profile that was asked for by name in the call goes before the variables, one from AWS_PROFILE after.
        found = [given, variables, profile.found()] if profile_name is None else [given, profile.found(), variables]
        merged = _merge([*found, environment.besides(environ, for_fsspec)])
        for name in settings.FILES & merged.keys():
            path, where = merged[name]
            merged[name] = os.path.abspath(os.path.expanduser(path)), where
        own = {each.name for each in fields(cls)}
        sources = {name: where for name, (_, where) in merged.items()}
        return cls(
            **{name: value for name, (value, _) in merged.items() if name in own},
            extra=tuple(sorted((name, value) for name, (value, _) in merged.items() if name not in own)),
            sources=tuple(sorted({"profile": profile.place, **sources}.items())),
        )

    def __repr__(self) -> str:
        shown = [
            f"endpoint_url={self.endpoint_url!r}",
            f"region={self.region!r}",
            f"anonymous={self.anonymous}",
        ]
        shown += [f"{name}=<hidden>" for name in sorted(_CREDENTIALS) if getattr(self, name) is not None]
        shown += [f"{name}=<hidden>" for name, _ in self.extra]
        return f"StoreOptions({', '.join(shown)})"


def _sort(storage_options: Mapping[str, Any]) -> tuple[Found, str | None, Mapping[str, Any]]:
    """A user's mapping as our fields and settings to pass on, a profile's name, and what is for fsspec."""
    given: Found = {}
    profile: str | None = None
    for_fsspec: Mapping[str, Any] = {}
    for name, value in _flat(storage_options):
        key = name.lower()
        if value is None:
            continue
        if key in ("profile", "aws_profile"):
            profile = str(value)
        elif key == settings.FSSPEC and isinstance(value, Mapping):
            for_fsspec = value
        elif key == settings.LOGINS and isinstance(value, Mapping):
            logins = {str(root): str(login) for root, login in value.items()}
            given[key] = json.dumps(logins, sort_keys=True), _GIVEN
        elif key in _FIELD_OF:
            field_name = _FIELD_OF[key]
            given[field_name] = (as_bool(value) if field_name == "anonymous" else str(value)), _GIVEN
        elif key == "deadline_s":
            given[key] = _as_seconds(value), _GIVEN
        elif key in settings.PASSED_ON or key.removeprefix("aws_") in settings.PASSED_ON:
            given[key if key in settings.PASSED_ON else key.removeprefix("aws_")] = str(value), _GIVEN
        else:
            known = ", ".join(sorted(_ALIASES))
            raise ConfigError(
                f"unknown key {name!r} in storage_options; known are {known}, deadline_s, profile, fsspec (a mapping, "
                "for the file systems of fsspec), and obstore's names"
            )
    return given, profile, for_fsspec


def _profile(name: str | None, environ: Mapping[str, str]) -> Profile:
    """The profile of that name, or the one that the environment names; ConfigError where it is not there, or where it
    was asked for by name and only the AWS tools can use it.
    """
    named = name or environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE")
    profile = Profile(named or "default", environ)
    if named and not profile.values:
        raise ConfigError(f"profile {named!r} is in neither {' nor '.join(profile.files)}; name one that is")
    if name and profile.not_followed:
        raise ConfigError(
            f"profile {name!r} gets its credentials by {profile.not_followed}, which fastload does not follow; have "
            f"them put into the environment: eval $(aws configure export-credentials --profile {name} --format env)"
        )
    return profile


def checked(storage_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options as a dict, empty for none; ConfigError, without a value that may be secret, for what is none."""
    given = {} if storage_options is None else storage_options
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(
            f"storage_options is of type {type(given).__name__}, or has keys that are no strings; "
            'give a mapping such as {"endpoint_url": "http://host:port"}'
        )
    return dict(given)


def _flat(storage_options: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """s3fs and boto3 nest some settings one level down."""
    for name, value in storage_options.items():
        if name in ("client_kwargs", "client_options") and isinstance(value, Mapping):
            yield from value.items()
        elif name == "allow_http":  # obstore's; an http:// endpoint says it already
            continue
        else:
            yield name, value


def _merge(sources: Iterable[Found]) -> Found:
    """First come, first served, but credentials of a provider all from the first source that has any."""
    merged: Found = {}
    for source in sources:
        closed = {name for whole in _WHOLE if whole & merged.keys() for name in whole}
        if _is_unsigned(merged) or _has_way(merged):
            closed |= _CREDENTIALS
        merged = {**{name: each for name, each in source.items() if name not in closed}, **merged}
    if _is_unsigned(merged) or _CREDENTIALS & merged.keys():
        merged = {name: each for name, each in merged.items() if name not in settings.S3_WAYS}
    return merged


def _is_unsigned(found: Found) -> bool:
    return bool(found.get("anonymous", (False, ""))[0])


def _has_way(found: Found) -> bool:
    """Whether it is said how S3's credentials are to be found out, by the call or completely."""
    ways = settings.S3_WAYS & found.keys()
    complete = {"role_arn", "web_identity_token_file"} <= ways or any("credentials" in name for name in ways)
    return complete or any(found[name][1] == _GIVEN for name in ways)


def _as_seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 86400:
        raise ConfigError(f"deadline_s={value!r} is not a number of seconds; 60 is the default")
    return seconds
