"""What a user's environment says of stores: variables, profiles of the AWS tools, certificates, proxies.

Read in the consumer's process only. Each value comes with where it was found, for messages: a variable's or profile's
name, never a value.
"""

from __future__ import annotations

import configparser
import contextlib
import functools
import importlib
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastload.errors import ConfigError
from fastload.store import settings

_log = logging.getLogger("fastload.store")

Found = dict[str, tuple[Any, str]]  # (value, where it was found) by field or setting

_FIELDS = {
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "access_key_id": ("AWS_ACCESS_KEY_ID",),
    "secret_access_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN",),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
}
_PROFILE = {
    "endpoint_url": "endpoint_url",
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "role_arn": "role_arn",
    "web_identity_token_file": "web_identity_token_file",
    "role_session_name": "role_session_name",
}
# What only the AWS tools can do with a profile, by the key that says so.
_NOT_FOLLOWED = ("sso_session", "sso_start_url", "credential_process", "source_profile", "credential_source")

# Authorities for TLS. The first three stand in for each other in the tools that read them; what the others name is for
# everything on the machine.
_BUNDLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_PEM = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)

# Variables that file systems of fsspec read by themselves, by protocol and argument.
_FSSPEC = {"hf": {"token": "HF_TOKEN", "endpoint": "HF_ENDPOINT"}, "gcs": {"token": "GOOGLE_APPLICATION_CREDENTIALS"}}

# All that is read here, besides what begins as these do.
_NAMES = frozenset({"HOME", "CLOUDSDK_CONFIG", "IDENTITY_ENDPOINT", *_BUNDLES, "SSL_CERT_FILE", "SSL_CERT_DIR"})
_NAMES |= settings.PROXIES | {name.upper() for name in settings.PROXIES}
_BEGIN = ("AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "HF_")

Fingerprint = tuple[tuple[str, str], ...]
_last: tuple[tuple[Any, ...], Fingerprint] = ((), ())


def fingerprint() -> Fingerprint:
    """This process's variables that matter here: while these stay the same, `StoreOptions.from_environment` gives the
    same, but for what was changed in files.
    """
    global _last
    # A job that opens files by the thousand asks each time. `environ` decodes `_data`, which takes 30 times as long.
    raw = tuple(getattr(os.environ, "_data", os.environ).items())
    seen, found = _last
    if raw != seen:
        names = (name for name in sorted(os.environ) if name in _NAMES or name.startswith(_BEGIN))
        found = tuple((name, os.environ.get(name, "")) for name in names)
        _last = raw, found
    return found


def of_variables(environ: Mapping[str, str]) -> Found:
    """Fields of `StoreOptions` that AWS_* variables give."""
    found: Found = {}
    for field, variables in _FIELDS.items():
        variable = next((name for name in variables if environ.get(name)), None)
        if variable is not None:
            found[field] = environ[variable], variable
    if "access_key_id" not in found:  # a token alone is left over from something else
        found.pop("session_token", None)
    if as_bool(environ.get("AWS_SKIP_SIGNATURE", "")):
        found["anonymous"] = True, "AWS_SKIP_SIGNATURE"
    return found


class Profile:
    """A profile of the AWS tools; what only they can do (SSO, assumed roles, helper programs) is not followed."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        """Read it; one that is not there says nothing. ConfigError for files that cannot be read."""
        home = _home(environ)
        credentials = Path(environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / ".aws" / "credentials").expanduser()
        config = Path(environ.get("AWS_CONFIG_FILE") or home / ".aws" / "config").expanduser()
        section = name if name == "default" else f"profile {name}"
        kept, more = _section(credentials, name), _section(config, section)
        self.values = {**more, **kept}
        self.files = str(credentials), str(config)
        self.not_followed = ""  # the key by which it says how to get credentials, where that is for the AWS tools only
        if "aws_access_key_id" not in self.values:
            self.not_followed = next((key for key in _NOT_FOLLOWED if self.values.get(key)), "")
        self.place = f"profile {name!r} of {credentials if 'aws_access_key_id' in kept else config}"
        if not self.values:
            self.place = f"profile {name!r} ({credentials}, {config})"
        elif self.not_followed:
            self.place += f", whose {self.not_followed} is not followed"

    def found(self) -> Found:
        """The fields and settings that it gives."""
        return {_PROFILE[key]: (value, self.place) for key, value in self.values.items() if value and key in _PROFILE}


def besides(environ: Mapping[str, str], for_fsspec: Mapping[str, Any]) -> Found:
    """What is neither S3's nor in one variable: certificates, proxies, the file that `gcloud` makes, fsspec's."""
    found: Found = {name: (value, name) for name, value in _proxies(environ).items()}
    folder = Path(environ.get("CLOUDSDK_CONFIG") or _home(environ) / ".config" / "gcloud")
    gcloud = str(folder / "application_default_credentials.json")
    if os.path.isfile(gcloud):
        found["application_credentials"] = gcloud, gcloud
    certificates = _root_certificate(environ)
    if certificates is not None:
        found["root_certificate"] = certificates
    arguments = _fsspec(environ, for_fsspec)
    if arguments is not None:
        found[settings.FSSPEC] = arguments, "storage_options" if for_fsspec else "FSSPEC_*"
    return found


def _root_certificate(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The certificates (PEM) of the authorities that variables name. What cannot be read adds none, and a warning says
    so: most data sets have no use for them, and TLS fails where they are missing.
    """
    bundle = next((name for name in _BUNDLES if environ.get(name)), None)
    files = [bundle] if bundle else []
    if environ.get("SSL_CERT_FILE") and not any(environ["SSL_CERT_FILE"] == environ[name] for name in files):
        files.append("SSL_CERT_FILE")
    texts = {name: _text_of_file(name, Path(environ[name]).expanduser()) for name in files}
    if environ.get("SSL_CERT_DIR"):
        texts["SSL_CERT_DIR"] = _text_of_folders(environ["SSL_CERT_DIR"])
    texts = {name: text for name, text in texts.items() if text}
    return ("\n".join(texts.values()), ", ".join(texts)) if texts else None


def _proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """`http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`; one in small letters goes before one in capitals."""
    found = {name: environ.get(name) or environ.get(name.upper()) for name in sorted(settings.PROXIES)}
    if "REQUEST_METHOD" in environ:  # in CGI, capitals may come from a header of a request
        found["http_proxy"] = environ.get("http_proxy")
    return {name: value for name, value in found.items() if value}


def _fsspec(environ: Mapping[str, str], given: Mapping[str, Any]) -> str | None:
    """Arguments for file systems of fsspec, as JSON by protocol: `given` (under "*", for all), and what fsspec or one
    of its file systems would read by itself from variables and the home directory.
    """
    found: dict[str, dict[str, Any]] = {}
    folder = Path(environ.get("FSSPEC_CONFIG_DIR") or _home(environ) / ".config" / "fsspec")
    if os.path.isdir(folder):
        with contextlib.suppress(ImportError):  # then nothing reads that file
            importlib.import_module("fsspec.config").set_conf_files(str(folder), found)
    for protocol, arguments in _FSSPEC.items():
        for argument, variable in arguments.items():
            if environ.get(variable):
                found.setdefault(protocol, {})[argument] = environ[variable]
    for name in sorted(environ):  # FSSPEC_FTP, a JSON object, before FSSPEC_FTP_HOST
        protocol, _, argument = name.removeprefix("FSSPEC_").lower().partition("_")
        if name.startswith("FSSPEC_") and protocol and protocol != "config":
            value = _from_json(environ[name])
            if not argument and not isinstance(value, dict):
                raise ConfigError(f"{name} is not a JSON object, as fsspec requires; correct or unset it")
            found.setdefault(protocol, {}).update({argument: value} if argument else value)
    if given:
        found["*"] = dict(given)
    try:
        return json.dumps(found, sort_keys=True) if found else None
    except TypeError:
        raise ConfigError(
            "storage_options['fsspec'] contains a value that is neither text, number, list nor mapping"
        ) from None


def as_bool(value: object) -> bool:
    """Whether a setting or variable says yes."""
    return value is True or str(value).strip().lower() in ("1", "true", "yes", "on")


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _home(environ: Mapping[str, str]) -> Path:
    """It need not exist, nor be ours to look into: in a container it is often that of the image's user."""
    return Path(environ.get("HOME") or os.path.expanduser("~"))


def _section(path: Path, section: str) -> dict[str, str]:
    if not os.path.lexists(path):  # or its folder may not be searched
        return {}
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise ConfigError(f"cannot read {path}: {error.__class__.__name__}; correct it or unset AWS_PROFILE") from None
    return dict(parser.items(section)) if parser.has_section(section) else {}


def _text_of_file(variable: str, path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        _warn_of_certificates(variable, str(path), type(error).__name__)
        return ""


def _text_of_folders(folders: str) -> str:
    """The certificates in folders, each once: they are there under several names. As for OpenSSL, some of the folders
    may be missing.
    """
    found: dict[str, None] = {}
    missing = 0
    named = [folder for folder in folders.split(":") if folder]
    for folder in named:
        try:
            with os.scandir(folder) as entries:  # by their inodes, since resolving each link takes 70 us
                seen = [(each.path, each.stat()) for each in entries if each.is_file()]
            files = {(at.st_dev, at.st_ino): (path, at.st_size, at.st_mtime_ns, at.st_ino) for path, at in seen}
            certificates = _certificates_of(tuple(files.values()))
        except FileNotFoundError:
            missing += 1
            continue
        except OSError as error:
            _warn_of_certificates("SSL_CERT_DIR", folder, type(error).__name__)
            continue
        found |= dict.fromkeys(certificates)
    if named and missing == len(named):
        _warn_of_certificates("SSL_CERT_DIR", folders, FileNotFoundError.__name__)
    return "\n".join(found)


@functools.lru_cache(maxsize=8)  # 10 ms for 140 files, and options are made for each call that opens a store
def _certificates_of(files: tuple[tuple[str, int, int, int], ...]) -> tuple[str, ...]:
    """Those in files: path, and by which one is known that changed since, which are size, time and inode."""
    texts = [Path(path).read_text(errors="replace") for path, *_ in files]
    return tuple(sorted(each for text in texts for each in _PEM.findall(text)))


@functools.cache  # once in a process: many data sets may be made
def _warn_of_certificates(variable: str, path: str, reason: str) -> None:
    _log.warning(
        "cannot read %s=%s: %s. Stores whose certificates are issued by an authority in it cannot be read over TLS; "
        "correct or unset the variable",
        variable,
        path,
        reason,
    )
