"""Where settings come from, and that secrets stay where they belong."""

from __future__ import annotations

import json
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
