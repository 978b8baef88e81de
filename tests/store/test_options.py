"""Where settings come from, and that secrets stay where they belong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fastload
from fastload.errors import ConfigError
from fastload.store import StoreOptions

KEYS = {"AWS_ACCESS_KEY_ID": "ENVKEY", "AWS_SECRET_ACCESS_KEY": "ENVSECRET", "AWS_SESSION_TOKEN": "ENVTOKEN"}


def options(given: dict[str, Any] | None = None, **environ: str) -> StoreOptions:
    return StoreOptions.from_environment(given, {"HOME": "/nonexistent", **environ})


def test_variables() -> None:
    found = options(None, AWS_ENDPOINT_URL="http://a", AWS_ENDPOINT_URL_S3="http://b/", AWS_REGION="r", **KEYS)
    assert found == StoreOptions("http://b/", "ENVKEY", "ENVSECRET", "ENVTOKEN", "r")
    assert found.endpoint == "http://b"
    assert options() == StoreOptions()


@pytest.mark.parametrize(
    "given",
    [
        {"endpoint_url": "http://e", "access_key_id": "K", "secret_access_key": "S"},
        {"endpoint": "http://e", "aws_access_key_id": "K", "aws_secret_access_key": "S", "allow_http": True},
        {"key": "K", "secret": "S", "client_kwargs": {"endpoint_url": "http://e"}, "token": None},
        {"AWS_ENDPOINT_URL": "http://e", "AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S"},
    ],
)
def test_storage_options_win_in_any_spelling_and_credentials_do_not_mix(given: dict[str, Any]) -> None:
    assert options(given, AWS_ENDPOINT_URL="http://other", **KEYS) == StoreOptions("http://e", "K", "S")


def test_profiles(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text(
        "[default]\naws_access_key_id=D\naws_secret_access_key=DS\n[work]\naws_access_key_id=W\naws_secret_access_key=WS\n"
    )
    (tmp_path / ".aws" / "config").write_text("[profile work]\nregion=eu\nendpoint_url=http://w\n")
    home = {"HOME": str(tmp_path)}
    work = StoreOptions("http://w", "W", "WS", None, "eu")
    assert options(None, **home) == StoreOptions(None, "D", "DS")
    assert options(None, AWS_PROFILE="work", **home) == work
    assert options({"profile": "work"}, **KEYS, **home) == work
    assert options(None, AWS_PROFILE="work", **KEYS, **home).access_key_id == "ENVKEY"
    with pytest.raises(ConfigError, match="profile 'none' is in neither"):
        options({"profile": "none"}, **home)


def test_profiles_that_only_the_aws_tools_can_use(tmp_path: Path) -> None:
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(
        "[default]\nsso_session=s\n[profile role]\nrole_arn=r\nweb_identity_token_file=/t\n"
    )
    home = {"HOME": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"profile 'default' gets its credentials by sso_session.*export-credentials"):
        options({"profile": "default"}, **home)
    assert options(None, **home) == StoreOptions()  # whoever reads local files only needs none
    assert options({"profile": "role"}, **home, **KEYS).extra == (("role_arn", "r"), ("web_identity_token_file", "/t"))
    elsewhere = {"AWS_CONFIG_FILE": str(tmp_path / ".aws" / "config"), "AWS_PROFILE": "role"}
    assert options(None, **elsewhere).extra == (("role_arn", "r"), ("web_identity_token_file", "/t"))


def test_credentials_of_each_provider_come_whole_from_one_place(tmp_path: Path) -> None:
    role = {"AWS_ROLE_ARN": "r", "AWS_WEB_IDENTITY_TOKEN_FILE": "/t"}
    assert options(None, **role, **KEYS).extra == ()
    assert options({"role_arn": "mine", "web_identity_token_file": "/u"}, **role, **KEYS) == StoreOptions(
        extra=(("role_arn", "mine"), ("web_identity_token_file", "/u"))
    )
    assert options({"anonymous": True}, **role, **KEYS) == StoreOptions(anonymous=True)
    shared = {"AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "file")}
    (tmp_path / "file").write_text("[default]\naws_access_key_id=D\naws_secret_access_key=DS\n")
    assert options(None, AWS_ROLE_ARN="alone", **shared) == StoreOptions(None, "D", "DS")
    assert options(None, **role, **shared).access_key_id is None
    azure = {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_SAS_TOKEN": "s", "AZURE_CLIENT_ID": "c"}
    assert options({"account_key": "k"}, **azure).extra == (("account_key", "k"), ("account_name", "a"))
    google = {"GOOGLE_SERVICE_ACCOUNT": "/a", "GOOGLE_APPLICATION_CREDENTIALS": "/b"}
    assert dict(options({"service_account_key": "{}"}, **google).extra).keys() == {"service_account_key", "fsspec"}


def test_what_the_tools_of_other_stores_would_find(tmp_path: Path) -> None:
    gcloud = tmp_path / ".config" / "gcloud" / "application_default_credentials.json"
    gcloud.parent.mkdir(parents=True)
    gcloud.write_text("{}")
    (tmp_path / ".config" / "fsspec").mkdir()
    (tmp_path / ".config" / "fsspec" / "mine.json").write_text('{"ftp": {"host": "h", "port": 1}}')
    found = dict(options({"fsspec": {"timeout": 5}}, HOME=str(tmp_path), FSSPEC_FTP_PORT="21", HF_TOKEN="t").extra)
    assert found.pop("application_credentials") == str(gcloud)
    assert json.loads(found.pop("fsspec")) == {
        "ftp": {"host": "h", "port": 21},
        "hf": {"token": "t"},
        "*": {"timeout": 5},
    }
    assert found == {}
    assert "application_credentials" not in dict(
        options(None, GOOGLE_SERVICE_ACCOUNT_KEY="{}", HOME=str(tmp_path)).extra
    )
    with pytest.raises(ConfigError, match="FSSPEC_FTP is not a JSON object"):
        options(None, FSSPEC_FTP="secret")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_home_that_one_may_not_look_into_says_nothing(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        assert options(None, HOME=str(tmp_path), **KEYS) == options(None, **KEYS)
    finally:
        os.seteuid(0)


def test_files_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service has a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    found = dict(options({"federated_token_file": "token"}, GOOGLE_APPLICATION_CREDENTIALS="key.json").extra)
    assert found["federated_token_file"] == str(tmp_path / "token")
    assert found["application_credentials"] == str(tmp_path / "key.json")


def test_proxies_and_authorities(tmp_path: Path) -> None:
    found = options(None, HTTP_PROXY="a", http_proxy="b", ALL_PROXY="c", NO_PROXY="d", REQUEST_METHOD="GET")
    assert found.extra == (("all_proxy", "c"), ("http_proxy", "b"), ("no_proxy", "d"))
    assert options(None, HTTP_PROXY="a", REQUEST_METHOD="GET").extra == ()
    pem = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----"
    (tmp_path / "certificates").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "certificates" / name).write_text(pem.format(name[0]))
    (tmp_path / "certificates" / "by-hash.0").symlink_to("two")  # as OpenSSL names them
    (tmp_path / "certificates" / "broken").symlink_to("nothing")
    (tmp_path / "certificates" / "folder").mkdir()
    one = str(tmp_path / "certificates" / "one")
    for variables, names in (
        ({"AWS_CA_BUNDLE": one, "REQUESTS_CA_BUNDLE": "/other", "SSL_CERT_FILE": one}, "o"),
        ({"REQUESTS_CA_BUNDLE": one}, "o"),
        ({"CURL_CA_BUNDLE": one}, "o"),
        ({"SSL_CERT_DIR": str(tmp_path / "certificates")}, "ot"),
    ):
        assert options(None, **variables).extra == (("root_certificate", "\n".join(map(pem.format, names))),)
    (tmp_path / "certificates" / "one").write_text(pem.format("new"))  # which is read anew
    found = options(None, SSL_CERT_DIR=str(tmp_path / "certificates"))
    assert found.extra == (("root_certificate", "\n".join(map(pem.format, ("new", "t")))),)


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_missing_certificates_are_a_warning(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A data set of local files has no use for them."""
    missing = str(tmp_path / "missing")
    for _ in range(2):
        assert options(None, **{name: missing}) == options()
    (warning,) = caplog.messages
    assert f"cannot read {name}={missing}: FileNotFoundError" in warning


def test_some_folders_of_certificates_may_be_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pem = "-----BEGIN CERTIFICATE-----\no\n-----END CERTIFICATE-----"
    (tmp_path / "one").write_text(pem)
    found = options(None, SSL_CERT_DIR=f"/nonexistent:{tmp_path}:{tmp_path / 'missing'}", SSL_CERT_FILE="")
    assert found.extra == (("root_certificate", pem),)
    assert not caplog.messages


def test_each_provider_is_told_what_is_its_own() -> None:
    found = options({"timeout": "9s"}, AWS_ENDPOINT_URL="http://e", AZURE_STORAGE_ACCOUNT_NAME="a", **KEYS)
    found = StoreOptions.from_wire(json.loads(json.dumps(found.to_wire())))
    assert found.of_scheme("s3") == StoreOptions(
        "http://e", "ENVKEY", "ENVSECRET", "ENVTOKEN", extra=(("timeout", "9s"),)
    )
    assert found.of_scheme("az") == StoreOptions(extra=(("account_name", "a"), ("timeout", "9s")))
    assert found.of_scheme("gs") == found.of_scheme("https") == StoreOptions(extra=(("timeout", "9s"),))
    assert options({"endpoint": "http://e", "anon": True}, **KEYS).of_scheme("gs") == StoreOptions(
        "http://e", anonymous=True
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"acess_key_id": "K"}, "unknown key 'acess_key_id'"),
        ({"endpoint_url": "localhost:9000"}, "endpoint_url='localhost:9000' is not a URL"),
        ({"endpoint_url": "http://u:geheim@h"}, "user name"),
        ({"access_key_id": "K"}, "without secret_access_key"),
        ({"deadline_s": "soon"}, "deadline_s='soon'"),
    ],
)
def test_what_cannot_be_used(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        options(given)
    assert "geheim" not in str(error.value)


def test_secrets_are_not_shown() -> None:
    found = options({"account_key": "azuresecret", "deadline_s": 5}, **KEYS)
    for secret in ("ENVKEY", "ENVSECRET", "ENVTOKEN", "azuresecret"):
        assert secret not in repr(found)
        assert secret not in f"{found}"


def test_the_wire() -> None:
    found = options({"account_key": "x", "anon": True, "deadline_s": 5, "region": "r"}, AWS_ENDPOINT_URL="http://e")
    assert found.deadline_s == 5
    assert StoreOptions.from_wire(json.loads(json.dumps(found.to_wire()))) == found
    assert StoreOptions.from_wire(StoreOptions().to_wire()) == StoreOptions()
    assert StoreOptions.from_wire(StoreOptions(deadline_s=0).to_wire()).deadline_s == 0
    with pytest.raises(ConfigError, match="another version"):
        StoreOptions.from_wire({"new": 1})


def test_needs_neither_torch_nor_numba() -> None:
    code = "import sys, fastload.store; sys.exit(any(name in sys.modules for name in ('torch', 'numba', 'fsspec')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("given", [5, "endpoint", ["key"], {1: 2}, {1: 2, "key": "secret"}])
def test_options_that_are_no_mapping_are_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="give a mapping such as"):
        options(given)
    cache = fastload.Cache(tmp_path / "cache", ram_bytes="16MiB", disk_bytes=0)
    with pytest.raises(ConfigError, match="give a mapping such as"):
        fastload.open("s3://bucket/key", cache, storage_options=given)
