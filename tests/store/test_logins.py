"""Logins in URLs: out of the URL, and to the store that they are for."""

from __future__ import annotations

import json

import pytest

from fastload.errors import ConfigError
from fastload.store import StoreOptions
from fastload.store.logins import apart, authorization, login_of


@pytest.mark.parametrize(
    ("url", "clean", "login"),
    [
        (
            "https://user:p%40ss@host:1/a-{0..3}.tar?x=1",
            "https://host:1/a-{0..3}.tar?x=1",
            ("https://host:1", "user:p%40ss"),
        ),
        ("HTTPS://token@host/a", "HTTPS://host/a", ("https://host", "token")),
        ("sftp://user:pass@host/a", "sftp://host/a", ("sftp://host", "user:pass")),
        ("sftp://user@host/a", None, None),
        ("abfss://container@account.dfs.core.windows.net/a", None, None),
        ("github://organisation:repository@main/a", None, None),
        ("s3://bucket/a:b@c", None, None),
        ("/data/a:b@c/d.tar", None, None),
    ],
)
def test_apart(url: str, clean: str | None, login: tuple[str, str] | None) -> None:
    urls, options = apart([url], {"timeout": "5s"})
    assert urls == (clean or url,)
    assert options == {"timeout": "5s", **({"logins": dict([login])} if login else {})}
    found = StoreOptions.from_environment(options, {"HOME": "/none"})
    for kind in ("https", "sftp"):
        settings = dict(found.of_scheme(kind).extra)
        assert (login_of(login[0], settings) if login else login_of("https://host", settings)) == (login and login[1])
    assert "logins" not in dict(found.of_scheme("s3").extra)
    assert "p%40ss" not in repr(found)


def test_more_than_one() -> None:
    given = {"logins": {"http://a": "u:old", "http://c": "u:kept"}}
    _, options = apart(["http://u:new@a/x", "http://v:other@b/x", "http://c/x"], given)
    assert options == {"logins": {"http://a": "u:new", "http://b": "v:other", "http://c": "u:kept"}}
    wire = json.dumps(StoreOptions.from_environment(options, {"HOME": "/none"}).to_wire())
    assert login_of("http://b", dict(StoreOptions.from_wire(json.loads(wire)).extra)) == "v:other"


def test_what_is_refused() -> None:
    for url in ("s3://key:hidden@bucket/a", "gs://key:hidden@bucket/a"):
        with pytest.raises(ConfigError, match=r"bucket/a: its URL contained a login; give storage_options") as error:
            apart([url], None)
        assert "hidden" not in str(error.value)
    with pytest.raises(ConfigError, match=r"^https://host/a\?\.\.\.: signed URLs"):
        apart(["https://host/a?X-Amz-Signature=hidden"], None)
    with pytest.raises(ConfigError, match="give a mapping"):
        apart(["https://u:hidden@host/a"], 5)  # type: ignore[arg-type]


def test_as_a_header() -> None:
    assert authorization("Aladdin:open%20sesame") == "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
    assert authorization("token") == "Basic dG9rZW46"
