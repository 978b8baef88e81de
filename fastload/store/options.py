"""Where a store is and who asks: endpoint, region and credentials, as plain values.

People configure S3 once, for every tool: by AWS_* variables, by a profile in `~/.aws`, or by a mapping in
whatever spelling their last library wanted. All of that is read here, once, where a data set is made, and
becomes one frozen value, which crosses the socket to the cache service and is the key under which it keeps
its stores. Nothing further down looks at the environment.

What wins: `storage_options`, then the AWS_* variables, then the profile. Credentials are taken whole from
one place: a key from one and a session token from another would be refused by the store with a message that
helps nobody. Where none are found the provider's own ways (web identity, container, instance metadata) are
left to obstore.
"""

from __future__ import annotations

import configparser
import os
import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fastload.errors import ConfigError

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
_CREDENTIALS = ("access_key_id", "secret_access_key", "session_token")

# Settings that go to obstore as they are. Those of other providers, and what S3 needs in special places.
_PASSED_ON = frozenset(
    {
        # S3
        "virtual_hosted_style_request",
        "request_payer",
        "s3_express",
        "role_arn",
        "role_session_name",
        "web_identity_token_file",
        "sts_endpoint",
        "container_credentials_relative_uri",
        "container_credentials_full_uri",
        "container_authorization_token_file",
        "metadata_endpoint",
        "imdsv1_fallback",
        "sse_customer_key_base64",
        "server_side_encryption",
        # Google
        "service_account",
        "service_account_key",
        "service_account_path",
        "application_credentials",
        # Azure
        "account_name",
        "account_key",
        "sas_key",
        "client_id",
        "client_secret",
        "tenant_id",
        "federated_token_file",
        "use_azure_cli",
        # the HTTP client
        "allow_invalid_certificates",
        "connect_timeout",
        "read_timeout",
        "timeout",
        "proxy_url",
        "root_certificate",
        "user_agent",
    }
)
# Variables that say how credentials are got, by the name of the setting that they stand for.
_FROM_VARIABLES = {
    "AWS_ROLE_ARN": "role_arn",
    "AWS_ROLE_SESSION_NAME": "role_session_name",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "web_identity_token_file",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": "container_credentials_relative_uri",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": "container_credentials_full_uri",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "container_authorization_token_file",
    "AWS_REQUEST_PAYER": "request_payer",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "virtual_hosted_style_request",
    "GOOGLE_APPLICATION_CREDENTIALS": "application_credentials",
    "GOOGLE_SERVICE_ACCOUNT": "service_account",
    "AZURE_STORAGE_ACCOUNT_NAME": "account_name",
    "AZURE_STORAGE_ACCOUNT_KEY": "account_key",
    "AZURE_STORAGE_SAS_KEY": "sas_key",
    "AZURE_CLIENT_ID": "client_id",
    "AZURE_CLIENT_SECRET": "client_secret",
    "AZURE_TENANT_ID": "tenant_id",
}


@dataclass(frozen=True, slots=True, repr=False)
class StoreOptions:
    """One way to reach a provider. Frozen and hashable; its repr shows no secret.

    `endpoint_url` None is the provider's own. `anonymous` sends unsigned requests.
    `deadline_s` is how long a request that fails for the moment is tried again. `extra` holds settings of
    obstore under obstore's names, as (name, value) pairs in the order of the names.
    """

    endpoint_url: str | None = None
    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    region: str | None = None
    anonymous: bool = False
    deadline_s: float = 60.0
    extra: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.endpoint_url is not None:
            parts = urllib.parse.urlsplit(self.endpoint_url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(
                    f"endpoint_url={self.endpoint_url!r} is not a URL; write it as http://host:port or https://host"
                )
            if parts.username is not None or parts.password is not None:
                raise ConfigError("endpoint_url holds a user name; pass access_key_id and secret_access_key instead")
        if (self.access_key_id is None) != (self.secret_access_key is None):
            have, lack = "access_key_id", "secret_access_key"
            if self.access_key_id is None:
                have, lack = lack, have
            raise ConfigError(f"{have} is given without {lack}; give both, or neither")

    @property
    def endpoint(self) -> str:
        """The endpoint without a slash at its end, "" for the provider's own: part of an object's identity."""
        return (self.endpoint_url or "").rstrip("/")

    def to_wire(self) -> dict[str, Any]:
        """Plain values for msgpack or JSON, secrets included: for a private socket, never for a file or
        log.
        """
        wire: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        wire["extra"] = [list(pair) for pair in self.extra]
        return {name: value for name, value in wire.items() if value is not None}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> StoreOptions:
        """What `to_wire` described. Unknown names are a `ConfigError` (another version on the other side)."""
        unknown = set(wire) - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(
                f"unknown store options {sorted(unknown)}: the other side runs another version of fastload"
            )
        extra = tuple((str(name), str(value)) for name, value in wire.get("extra", ()))
        return cls(**{**wire, "extra": extra})

    @classmethod
    def from_environment(
        cls, storage_options: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
    ) -> StoreOptions:
        """What `storage_options` says, filled up from AWS_* variables and the profile.

        Raises `ConfigError` that names a key of `storage_options` which is not known, or a profile that is
        not there.
        """
        environ = os.environ if environ is None else environ
        given, extra, profile = _sort(checked(storage_options))
        found = [given]
        # A profile that was asked for by name in the call goes before the variables, one from AWS_PROFILE
        # after.
        if profile is not None:
            found.append(_profile_fields(profile, environ, required=True))
        found.append(_variable_fields(environ))
        if profile is None:
            name = environ.get("AWS_PROFILE") or environ.get("AWS_DEFAULT_PROFILE")
            found.append(_profile_fields(name or "default", environ, required=name is not None))
        merged = _merge(found)
        by_variable = {setting: environ[name] for name, setting in _FROM_VARIABLES.items() if environ.get(name)}
        if "root_certificate" not in extra and environ.get("AWS_CA_BUNDLE"):
            by_variable["root_certificate"] = _text_of(environ["AWS_CA_BUNDLE"])
        merged["extra"] = tuple(sorted({**by_variable, **extra}.items()))
        return cls(**merged)

    def __repr__(self) -> str:
        shown = [
            f"endpoint_url={self.endpoint_url!r}",
            f"region={self.region!r}",
            f"anonymous={self.anonymous}",
        ]
        shown += [f"{name}=<hidden>" for name in _CREDENTIALS if getattr(self, name) is not None]
        shown += [f"{name}=..." for name, _ in self.extra]
        return f"StoreOptions({', '.join(shown)})"


def _sort(storage_options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """A user's mapping as our fields, settings to pass on, and a profile's name."""
    given: dict[str, Any] = {}
    extra: dict[str, str] = {}
    profile: str | None = None
    for name, value in _flat(storage_options):
        key = name.lower()
        if value is None:
            continue
        if key in ("profile", "aws_profile"):
            profile = str(value)
        elif key in _FIELD_OF:
            field = _FIELD_OF[key]
            given[field] = as_bool(value) if field == "anonymous" else str(value)
        elif key == "deadline_s":
            given[key] = _as_seconds(value)
        elif key in _PASSED_ON or key.removeprefix("aws_") in _PASSED_ON:
            extra[key if key in _PASSED_ON else key.removeprefix("aws_")] = str(value)
        else:
            known = ", ".join(sorted(_ALIASES))
            raise ConfigError(
                f"unknown key {name!r} in storage_options; known are {known}, deadline_s, profile, and obstore's names"
            )
    return given, extra, profile


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


def _merge(sources: list[dict[str, Any]]) -> dict[str, Any]:
    """First come, first served; but the three parts of the credentials all from the first source that has
    any.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        has_credentials = merged.get("anonymous") or any(name in merged for name in _CREDENTIALS)
        for name, value in source.items():
            if name not in merged and not (has_credentials and name in _CREDENTIALS):
                merged[name] = value
    return merged


def _variable_fields(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {
        "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "access_key_id": ("AWS_ACCESS_KEY_ID",),
        "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
        "session_token": ("AWS_SESSION_TOKEN",),
        "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    found: dict[str, Any] = {}
    for field, variables in names.items():
        value = next((environ[name] for name in variables if environ.get(name)), None)
        if value is not None:
            found[field] = value
    if "access_key_id" not in found:  # a token alone is left over from something else
        found.pop("session_token", None)
    if as_bool(environ.get("AWS_SKIP_SIGNATURE", "")):
        found["anonymous"] = True
    return found


def _profile_fields(profile: str, environ: Mapping[str, str], required: bool) -> dict[str, Any]:
    """A profile of the AWS tools; what only they can do (SSO, assumed roles, helper programs) is not
    followed.
    """
    home = Path(environ.get("HOME") or Path.home())
    credentials = Path(environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials")
    config = Path(environ.get("AWS_CONFIG_FILE") or home / ".aws" / "config")
    section = profile if profile == "default" else f"profile {profile}"
    values = {**_section(config, section), **_section(credentials, profile)}
    if not values and required:
        raise ConfigError(f"profile {profile!r} is in neither {credentials} nor {config}; name one that is")
    names = {
        "endpoint_url": "endpoint_url",
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
    }
    return {names[name]: value for name, value in values.items() if name in names and value}


def _section(path: Path, section: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise ConfigError(f"cannot read {path}: {error.__class__.__name__}; mend it or unset AWS_PROFILE") from None
    return dict(parser.items(section)) if parser.has_section(section) else {}


def _text_of(bundle: str) -> str:
    try:
        return Path(bundle).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read AWS_CA_BUNDLE={bundle}: {error.__class__.__name__}; mend or unset it") from None


def as_bool(value: object) -> bool:
    """Whether a setting or variable says yes."""
    return value is True or str(value).strip().lower() in ("1", "true", "yes", "on")


def _as_seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 86400:
        raise ConfigError(f"deadline_s={value!r} is not a number of seconds; 60 is the default")
    return seconds
