"""What looks like a secret in a text is not shown, and what does not is."""

from __future__ import annotations

import pickle

import pytest

from fastload import errors
from fastload.errors import ConfigError, FastloadError, MissingColumnError, StoreUnavailableError
from fastload.redaction import redact, showable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:SECRET@host/a.tar: no", "https://***@host/a.tar: no"),
        ("http://SECRET@host:1/a", "http://***@host:1/a"),
        ("sftp://user:SECRET@host/a", "sftp://user:***@host/a"),
        ("s3://key:SECRET@bucket/a and s3://key:SECRET@b/c", "s3://key:***@bucket/a and s3://key:***@b/c"),
        ("endpoint_url='user:SECRET@host:9000' is", "endpoint_url='***@host:9000' is"),
        ("HTTPS_PROXY=user:SECRET@host:3128 is", "HTTPS_PROXY=***@host:3128 is"),
        ("{'proxy_url': 'user:SECRET@[::1]:3128'}", "{'proxy_url': '***@[::1]:3128'}"),
        ("https://h/a?x=1&X-Amz-Credential=SECRET%2F2&X-Amz-Signature=SECRET&y=2", None),
        ("https://h/a?X-Amz-Security-Token=SECRET", "https://h/a?X-Amz-Security-Token=***"),
        ("https://h/a?AWSAccessKeyId=SECRET&Signature=SECRET%3D&Expires=1", None),
        ("https://h/a?GoogleAccessId=SECRET&Signature=SECRET", None),
        ("https://a.blob.core.windows.net/c?sv=2024&sp=r&sig=SECRET", None),
        ("sv=2024&sp=r&sig=SECRET", "sv=2024&sp=r&sig=***"),
        ("https://h/a?token=SECRET'", "https://h/a?token=***'"),
        ("AWS4-HMAC-SHA256 Credential=SECRET/2026, SignedHeaders=host, Signature=SECRET", None),
        ("Proxy-Authorization: Basic SECRET=", "Proxy-Authorization: Basic ***"),
        ("<Code>Bad</Code><AWSAccessKeyId>SECRET</AWSAccessKeyId><StringToSign>SECRET</StringToSign>", None),
        ('{"type": "x", "private_key": "SECRET\\nSECRET", "client_secret": "SECRET"}', None),
        ("-----BEGIN RSA PRIVATE KEY-----\nSECRET\n-----END RSA PRIVATE KEY-----\n", "***\n"),
        ("the key AKIAIOSFODNN7EXAMPLE is", "the key *** is"),
    ],
)
def test_secrets(text: str, shown: str | None) -> None:
    found = redact(text)
    assert "SECRET" not in found
    assert "***" in found
    assert shown is None or found == shown
    assert redact(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a=b/train-{000..123}.tar: there is no such object; check its name",
        "https://host:8080/data/a.tar?version=2&part=3: truncated answer: 5 of the 7 bytes from offset 0",
        "abfss://container@account.dfs.core.windows.net/a.tar",
        "github://organisation:repository@main/a.tar",
        "/data/user@host/a:b.tar, key='a:b', columns=['jpg', 'txt'] at 12:30:01 me@host.example",
        "sample 'a:b@c' lacks .jpg; its key is a:b@c, and one of train.tar is key='x:1@y'",
        "write them into its address, as http://host; AWS_SECRET_ACCESS_KEY='' or token_file=/var/run/token",
    ],
)
def test_what_is_none(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize("kind", errors._BY_NAME.values())
def test_no_error_of_ours_shows_one(kind: type[FastloadError]) -> None:
    error = kind("https://user:SECRET@host/a.tar: no")
    for each in (error, pickle.loads(pickle.dumps(error)), errors.from_wire(*errors.to_wire(error))):
        assert type(each) is kind
        assert str(each) == "https://***@host/a.tar: no"
        assert "SECRET" not in repr(each)
        assert "SECRET" not in f"{each.args}{each.__dict__}"
    _, message = errors.to_wire(OSError("https://user:SECRET@host/a.tar"))
    assert "SECRET" not in message


def test_causes() -> None:
    secret, harmless = OSError("https://user:SECRET@host/"), OSError("no route to host")
    assert showable(secret) is None
    assert showable(harmless) is harmless
    assert showable(OSError("a:" * 100_000)) is None  # quickly
    over = StoreUnavailableError("no")
    over.__cause__ = secret
    assert showable(over) is None
    wrapped = ConfigError("no")
    wrapped.__context__ = secret
    assert showable(wrapped) is None
    wrapped.__suppress_context__ = True
    assert showable(wrapped) is wrapped
    assert showable(MissingColumnError("no")) is not None
